"""Imputations other than those of the published experiment: what is pinned of a sweep of a model's own question."""

from __future__ import annotations

from typing import Any

import numpy as np

from ablation.engine import run
from ablation.models import LoadedModel
from ablation.prompts import continuation_ids, prompt_ids
from ablation.reference import Reference
from ablation.results import Result
from ablation.sources import NAMED_MODELS
from ablation.studies.replacements import Replacements
from ablation.sweeps import one_head_ablations
from tests.all_capitals import questions
from tests.golden import robustness_arrays, sensitivity_arrays

IMPUTATIONS = ("channel-mean", "reference-mean", "reference-mean-by-position", "resample", "scale:0.5")
DRAWS = 3
PREFIX = "other_"
"""Of the names of the pinned arrays."""


def swept(loaded: LoadedModel, max_rows: int | None = None) -> Result:
    """Sweep a named model on its own question. All capitals are the reference, and are resampled from."""
    capitals = [prompt_ids(loaded.tokenizer, question.prompt) for question in questions(loaded.name)]
    own = NAMED_MODELS[loaded.name].question
    assert own.target is not None and own.control is not None
    ids = prompt_ids(loaded.tokenizer, own.prompt)
    target, control = (continuation_ids(loaded.tokenizer, text) for text in (own.target, own.control))
    replacements = Replacements.of(IMPUTATIONS, Reference.of(loaded.model, capitals), capitals, DRAWS)
    imputations = replacements.of_prompt(loaded.model, replacements.sources(ids))
    ablations = one_head_ablations(loaded.model, imputations)
    return run(loaded.model, ids, ablations, target, control, max_rows=max_rows).averaged_over_draws()


def arrays(result: Result, noise: float) -> dict[str, Any]:
    """Return what is pinned, by the names of tests.golden after `PREFIX`. noise: the tolerance of a margin."""
    pinned = (
        robustness_arrays(result, noise) | sensitivity_arrays(result, "target") | sensitivity_arrays(result, "control")
    )
    return {f"{PREFIX}{name}": value for name, value in pinned.items()}


def noise_between(one: Result, other: Result) -> dict[str, float]:
    """Return the largest difference of each pinned float array between two results."""
    first, second = arrays(one, 0.0), arrays(other, 0.0)
    floats = [name for name, value in first.items() if np.asarray(value).dtype.kind == "f"]
    return {name: float(np.abs(first[name] - second[name]).max()) for name in floats}
