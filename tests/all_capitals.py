"""The published experiment over all capitals that a model ships with: what is pinned of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablation.prompt_files import read_rows, valid_rows
from ablation.prompts import Question
from ablation.results import Result
from ablation.studies.statistics import bootstrap_interval

PREFIX = "all_"
"""Of the names of the pinned arrays."""


def questions(name: str) -> list[Question]:
    """Return the questions about all capitals for a named model."""
    rows, _ = valid_rows(read_rows(name), skip_bad=False)
    return [row.question for row in rows]


def changes(result: Result) -> dict[str, NDArray[np.float64]]:
    """Return the changes that are averaged, {name: [prompt, ...]}.

    Those of the target's and the control's probability are [prompt, imputation, layer, head], and the difference
    between mean and zero imputation is [prompt, layer, head].
    """
    target, control = (result.grid(result.change(f"{name}_probability")) for name in ("target", "control"))
    zero, mean = (result.imputations.index(name) for name in ("zero", "mean"))
    return {
        "target_probability_change": target,
        "control_probability_change": control,
        "mean_minus_zero": target[:, mean] - target[:, zero],
    }


def arrays(result: Result, noise: float) -> dict[str, Any]:
    """Return what is pinned. noise: the tolerance of a margin.

    kept, near_ties: of the ablations of each prompt, [prompt, imputation]; a margin within the noise of both logits is
    a near tie, and counts as neither kept nor flipped. The means over the prompts have the shapes of `changes` without
    the first dimension, and so have the ends of their bootstrap intervals.
    """
    decided = result.grid(result.ablated["margin"] > 2 * noise)
    kept = result.grid(result.kept)
    found: dict[str, Any] = {
        "correct": result.clean["correct"].astype(np.int64),  # [prompt]
        "kept": (kept & decided).sum(axis=(2, 3)),
        "near_ties": (result.has_head & ~decided).sum(axis=(2, 3)),
    }
    for name, values in changes(result).items():
        low, high = bootstrap_interval(values.reshape(len(values), -1))
        found[name] = values.mean(axis=0)
        found[f"{name}_low"], found[f"{name}_high"] = (end.reshape(values.shape[1:]) for end in (low, high))
    return {f"{PREFIX}{name}": value for name, value in found.items()}


def noise_between(one: Result, other: Result) -> dict[str, float]:
    """Return the largest difference of each pinned float array between two results of the same prompts.

    A mean over prompts, or an end of its interval, moves by no more than the largest change of a single prompt.
    """
    first, second = changes(one), changes(other)
    moved = {name: float(np.nanmax(np.abs(first[name] - second[name]))) for name in first}
    ends = {f"{name}{end}": value for name, value in moved.items() for end in ("", "_low", "_high")}
    margin = float(np.abs(one.ablated["margin"] - other.ablated["margin"]).max())
    return {f"{PREFIX}{name}": value for name, value in {"margin": margin, **ends}.items()}
