"""The results of a run and of a sweep: arrays with documented dimensions, which are saved and loaded without loss.

Dimensions: A ablations, W watched tokens, I imputations, L decoder layers, H the largest number of heads in a layer.
Floats are float64. All values are measured at the last token of the prompt: probabilities in [0, 1], log-probabilities
in nats, and margins (top-1 logit - top-2 logit) in logits. A change is the ablated value - the clean value.

Rounding cannot change the argmax: logits that differ by no more than rounding are a tie (see
`ablation.measure.tie_tolerance`). In a tie, the argmax is the lowest token id, and the margin is 0.

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

from ablation.edits import Ablation


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

    def save(self, folder: Path | str) -> None:
        """Write sweep.npz (arrays) and sweep.json (imputations, provenance) into an existing folder. Raises OSError."""
        folder = Path(folder)
        names = [f.name for f in fields(self) if f.name not in ("imputations", "provenance")]
        arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in names}
        np.savez(folder / "sweep.npz", **arrays)
        rest = {"imputations": self.imputations, "provenance": self.provenance}
        (folder / "sweep.json").write_text(json.dumps(rest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a result that `save` wrote, without any loss. Raises OSError, ValueError or KeyError."""
        folder = Path(folder)
        rest = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        with np.load(folder / "sweep.npz", allow_pickle=False) as arrays:
            values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
        return cls(imputations=tuple(rest["imputations"]), provenance=rest["provenance"], **values)
