"""The results of a run and of a sweep: arrays with documented dimensions, which are saved and loaded without loss.

Dimensions: A ablations, W watched tokens, I imputations, L decoder layers, H the largest number of heads in a layer.
Floats are float64. All values are measured at the last token of the prompt: probabilities in [0, 1], log-probabilities
in nats, and margins (top-1 logit - top-2 logit) in logits. A change is the ablated value - the clean value.

Logits that differ by no more than rounding are a tie (see `ablation.measure.tie_tolerance`). In a tie, the argmax is
the lowest token id, and the margin is 0.

A receipt proves that the ablation took place: how often a projection was called, and how many elements of z were
replaced and changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ablation import output
from ablation.edits import Ablation
from ablation.errors import InvalidResult, one_line

ARRAYS = "sweep.npz"
NOT_ARRAYS = ("imputations", "provenance")


@dataclass(frozen=True, eq=False)
class RunResult:
    """The effect of each ablation in a list."""

    ablations: tuple[Ablation, ...]
    """[A]"""
    watched: NDArray[np.int64]
    """[W] token ids."""
    clean_probability: NDArray[np.float64]
    """[W]"""
    clean_log_probability: NDArray[np.float64]
    """[W]"""
    clean_argmax: int
    clean_margin: float
    probability_change: NDArray[np.float64]
    """[W, A]"""
    log_probability_change: NDArray[np.float64]
    """[W, A]"""
    argmax: NDArray[np.int64]
    """[A] token ids."""
    margin: NDArray[np.float64]
    """[A]"""
    head_mean: NDArray[np.float64]
    """[L, H] the mean of z over all tokens and channels in the clean run; NaN where there is no head."""
    calls: NDArray[np.int64]
    """[A] receipt: how often each projection that the ablation edits was called; always 1."""
    replaced: NDArray[np.int64]
    """[A] receipt: elements of z that hold the imputed value; always tokens x head_dim, summed over the heads."""
    changed: NDArray[np.int64]
    """[A] receipt: elements of z that the imputation changed; 0 if z already had the imputed values."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """The tokens, versions and settings that the result was made with, as values that JSON can hold."""


@dataclass(frozen=True, eq=False)
class SweepResult:
    """The effect of ablating each head alone. Cells without a head hold NaN in float arrays and -1 in int arrays."""

    imputations: tuple[str, ...]
    """[I] names."""
    watched: NDArray[np.int64]
    """[W] token ids."""
    clean_probability: NDArray[np.float64]
    """[W]"""
    clean_log_probability: NDArray[np.float64]
    """[W]"""
    clean_argmax: int
    clean_margin: float
    probability_change: NDArray[np.float64]
    """[W, I, L, H]"""
    log_probability_change: NDArray[np.float64]
    """[W, I, L, H]"""
    argmax: NDArray[np.int64]
    """[I, L, H] token ids."""
    margin: NDArray[np.float64]
    """[I, L, H]"""
    head_mean: NDArray[np.float64]
    """[L, H] the mean of z over all tokens and channels in the clean run."""
    calls: NDArray[np.int64]
    """[I, L, H] receipt: how often the edited projection was called in that ablation's forward pass; always 1."""
    replaced: NDArray[np.int64]
    """[I, L, H] receipt: elements of z that hold the imputed value; always tokens x head_dim."""
    changed: NDArray[np.int64]
    """[I, L, H] receipt: elements of z that the imputation changed; 0 if z already had the imputed value."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """The tokens, versions and settings that the sweep was made with, as values that JSON can hold."""

    @property
    def has_head(self) -> NDArray[np.bool_]:
        """[L, H] whether the head exists."""
        exists: NDArray[np.bool_] = self.argmax[0] >= 0
        return exists

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[I, L, H] whether the argmax is that of the clean run; False where there is no head."""
        return np.equal(self.argmax, self.clean_argmax)

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """[I, L, H] whether the argmax differs from that of the clean run; False where there is no head."""
        flipped: NDArray[np.bool_] = self.has_head & ~self.kept
        return flipped

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write sweep.npz (the arrays) and sweep.json (the rest) into a folder, both or neither.

        With `overwrite`, an earlier result in the folder is replaced. Without it, an earlier result is replaced only if
        model, weights, question and imputations are recorded in both and the same, as after a repeated command; for any
        other result, InvalidOutput is raised. Results of `sweep` record no question. Files that are not part of a
        result are never replaced: InvalidOutput is raised, with and without `overwrite`. Raises OSError if the folder
        cannot be written.
        """
        with output.staging(Path(folder)) as draft:
            self.write_arrays(draft)
            self.publish(draft, Path(folder), overwrite=overwrite)

    def write_arrays(self, folder: Path) -> None:
        """Write sweep.npz into an existing folder. Raises OSError."""
        names = [f.name for f in fields(self) if f.name not in NOT_ARRAYS]
        arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in names}
        np.savez(folder / ARRAYS, **arrays)

    def publish(self, draft: Path, folder: Path, *, overwrite: bool) -> None:
        """Move the files of `draft` into a folder, with sweep.json; see `ablation.output.publish`."""
        content = {"imputations": self.imputations, "provenance": self.provenance}
        output.publish(draft, folder, content, overwrite=overwrite)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a result that `save` wrote, without any loss. Raises InvalidResult if it is missing or damaged."""
        folder = Path(folder)
        try:
            rest = json.loads((folder / output.MANIFEST).read_text(encoding="utf-8"))
            digest = rest.get("files", {}).get(ARRAYS)
            if digest is not None and output.sha256(folder / ARRAYS) != digest:
                raise ValueError(f"{ARRAYS} is not the file that was saved")
            with (folder / ARRAYS).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
            result = cls(imputations=tuple(rest["imputations"]), provenance=rest["provenance"], **values)
            result._check_shapes()
        except Exception as error:  # a damaged file makes json, zipfile, zlib and numpy raise many kinds of errors
            raise InvalidResult(f"no result can be read from {folder}: {one_line(error)}") from error
        return result

    def _check_shapes(self) -> None:
        """Raise ValueError or TypeError unless all fields have the types and dimensions documented above."""
        if not all(isinstance(name, str) for name in self.imputations) or not isinstance(self.provenance, dict):
            raise TypeError("the imputations or the provenance have the wrong type")
        if type(self.clean_argmax) is not int or type(self.clean_margin) is not float:
            raise TypeError("the clean argmax or its margin have the wrong type")
        watched, grid = self.watched.shape, (len(self.imputations), *self.head_mean.shape)
        floats, ints = np.dtype(np.float64), np.dtype(np.int64)
        expected: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "watched": ((self.watched.size,), ints),
            "head_mean": (self.head_mean.shape[:2], floats),
            **dict.fromkeys(("clean_probability", "clean_log_probability"), (watched, floats)),
            **dict.fromkeys(("probability_change", "log_probability_change"), ((*watched, *grid), floats)),
            **dict.fromkeys(("argmax", "calls", "replaced", "changed"), (grid, ints)),
            "margin": (grid, floats),
        }
        for name, (shape, dtype) in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} has the dimensions {array.shape} and the dtype {array.dtype}")
