"""Studies of sets of heads: what is pinned of a removal curve and of all pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablation.heads import find_heads
from ablation.models import LoadedModel
from ablation.results import Result
from ablation.sources import NAMED_MODELS
from ablation.studies.curves import Heads
from ablation.studies.pairs import Pairs
from ablation.studies.sets import removal_curve, sweep_pairs
from tests.all_capitals import questions
from tests.golden import FOLDER

KS = {"capitals": (1, 2, 4, 8, 16, 32, 64, 144), "smollm2": (1, 2, 4, 8, 16)}
PROMPTS = {"capitals": 8, "smollm2": 3}
"""So many prompts are asked for a removal curve: the first ones about capitals that the model answers."""
RANDOM = 3
"""Random orders of each kind."""


def curve(loaded: LoadedModel, max_rows: int | None = None) -> Result:
    """Return the removal curve that is pinned, with zero imputation.

    The heads are ordered by their mean effect on P(target) in golden/MODEL/all_capitals.npz, so that no rounding
    changes the order.
    """
    ks, asked = KS[loaded.name], questions(loaded.name)
    with np.load(FOLDER / loaded.name / "all_capitals.npz") as pinned:
        zero, correct = pinned["all_target_probability_change"][0], pinned["all_correct"]
    order: Heads = tuple(sorted(find_heads(loaded.model), key=lambda head: float(zero[head])))
    answered = [asked[n] for n in np.flatnonzero(correct)[: PROMPTS[loaded.name]]]
    return removal_curve(loaded, answered, order[: ks[-1]], ks, random=RANDOM, max_rows=max_rows)


def pairs(loaded: LoadedModel, max_rows: int | None = None) -> Result:
    """Return all pairs of a named model on its own question, with zero imputation."""
    return sweep_pairs(loaded, [NAMED_MODELS[loaded.name].question], max_rows=max_rows)


def curve_arrays(result: Result, noise: float) -> dict[str, Any]:
    """Return what is pinned of a removal curve, in the order of its sets: the ordered heads, then the random ones.

    correct, near_ties: counts of prompts, [A]; a margin within the noise of both logits, `noise`, is a near tie, which
    is not counted as correct. logit_difference, kl: means over the prompts, [A].
    """
    decided = result.ablated["margin"] > 2 * noise
    return {
        "curve_correct": ((result.ablated["correct"] > 0) & decided).sum(axis=0),
        "curve_near_ties": (~decided).sum(axis=0),
        "curve_logit_difference": result.ablated["logit_difference"].mean(axis=0),
        "curve_kl": result.ablated["kl"].mean(axis=0),
    }


def pairs_arrays(result: Result, noise: float) -> dict[str, Any]:
    """Return what is pinned of all pairs of a prompt. noise: the tolerance of a margin.

    interaction: of P(target), [N]. compensating, restoring: numbers of pairs, without those of which a run is a near
    tie; near_ties: their number.
    """
    of = Pairs.of(result)
    clear = result.ablated["margin"] > 2 * noise
    decided = clear[:, of.lower] & clear[:, of.upper] & clear[:, of.together]
    return {
        "pairs_interaction": of.interaction("target_probability")[0],
        "pairs_compensating": (of.compensates & decided).sum(),
        "pairs_restoring": (of.restores & decided).sum(),
        "pairs_near_ties": (~decided).sum(),
    }


def noise_of_curve(one: Result, other: Result) -> dict[str, float]:
    """Return the largest difference of each pinned float array, and of a margin, between two removal curves."""
    return _noise(curve_arrays(one, 0.0), curve_arrays(other, 0.0)) | {"curve_margin": _margin(one, other)}


def noise_of_pairs(one: Result, other: Result) -> dict[str, float]:
    """Return the largest difference of each pinned float array, and of a margin, between two results of pairs."""
    return _noise(pairs_arrays(one, 0.0), pairs_arrays(other, 0.0)) | {"pairs_margin": _margin(one, other)}


def _noise(one: dict[str, NDArray[Any]], other: dict[str, NDArray[Any]]) -> dict[str, float]:
    floats = [name for name, value in one.items() if np.asarray(value).dtype.kind == "f"]
    return {name: float(np.abs(one[name] - other[name]).max()) for name in floats}


def _margin(one: Result, other: Result) -> float:
    return float(np.abs(one.ablated["margin"] - other.ablated["margin"]).max())
