"""What was measured: arrays with named dimensions, saved and loaded without loss.

Dimensions: A ablations, W watched tokens, I imputations, L decoder layers, H heads of the layer that has the most.
Floats are float64. Probabilities are in [0, 1], log-probabilities in nats, margins (top-1 logit - top-2 logit) in
logits, all at the last token of the prompt. Changes are ablated - clean.

The argmax is decided by a rule that rounding cannot break: logits that differ by rounding only are a tie (see
`ablation.measure.tie_tolerance`), the lowest token id of a tie is the argmax, and its margin is 0.
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
    """What each ablation of a list did."""

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
    """[L, H] mean of z over all tokens and channels in the clean run; NaN without a head."""
    calls: NDArray[np.int64]
    """[A] receipt: calls of each projection that the ablation edits; 1."""
    replaced: NDArray[np.int64]
    """[A] receipt: elements of z that held the imputed value; tokens x head_dim, summed over the heads."""
    changed: NDArray[np.int64]
    """[A] receipt: elements that the imputation changed; 0 if the heads wrote the imputed values anyway."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the result was made with; values that JSON can hold."""


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What the ablation of each single head did. Cells without a head are NaN in float arrays and -1 in int arrays."""

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
    """[L, H] mean of z over all tokens and channels in the clean run."""
    calls: NDArray[np.int64]
    """[I, L, H] receipt: calls of the ablated projection in the forward pass of that ablation; 1."""
    replaced: NDArray[np.int64]
    """[I, L, H] receipt: elements of z that held the imputed value; tokens x head_dim."""
    changed: NDArray[np.int64]
    """[I, L, H] receipt: elements that the imputation changed; 0 for a head that wrote the imputed value anyway."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the sweep was made with; values that JSON can hold."""

    @property
    def has_head(self) -> NDArray[np.bool_]:
        """[L, H] whether the head exists."""
        exists: NDArray[np.bool_] = self.argmax[0] >= 0
        return exists

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[I, L, H] whether the argmax is that of the clean run; False without a head."""
        return np.equal(self.argmax, self.clean_argmax)

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """[I, L, H] whether the argmax differs from that of the clean run; False without a head."""
        flipped: NDArray[np.bool_] = self.has_head & ~self.kept
        return flipped

    def save(self, folder: Path | str) -> None:
        """Write sweep.npz (the arrays) and sweep.json (the rest) into an existing folder. Raises OSError."""
        folder = Path(folder)
        names = [f.name for f in fields(self) if f.name not in ("imputations", "provenance")]
        arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in names}
        np.savez(folder / "sweep.npz", **arrays)
        rest = {"imputations": self.imputations, "provenance": self.provenance}
        (folder / "sweep.json").write_text(json.dumps(rest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a saved result, equal to the last bit. Raises OSError, ValueError or KeyError."""
        folder = Path(folder)
        rest = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        with np.load(folder / "sweep.npz", allow_pickle=False) as arrays:
            values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
        return cls(imputations=tuple(rest["imputations"]), provenance=rest["provenance"], **values)
