"""The pinned results of each named model: a number changes only if the change is intended."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ablation.models import LoadedModel
from ablation.reports.report import trend
from ablation.results import Result
from tests import other_imputations
from tests.golden import (
    Golden,
    agreement_arrays,
    atol_of,
    head_mean_arrays,
    made_with,
    probability_change,
    robustness_arrays,
    sensitivity_arrays,
    tolerances,
)


@pytest.fixture
def result(known: LoadedModel, swept: Callable[[LoadedModel], Result], golden: Golden) -> Result:
    """The sweep of a model whose arrays are pinned, or are to be pinned."""
    if known.name not in tolerances() and not golden.regenerate:
        pytest.skip(
            f"{known.name} has no golden arrays yet: python -m tests.noise, then pytest --force-regen makes them"
        )
    return swept(known)


def test_argmax_robustness(known: LoadedModel, result: Result, golden: Golden) -> None:
    """Which ablations keep the clean prediction, and which token the others turn to."""
    pinned = robustness_arrays(result, atol_of(known.name, "margin"))
    golden(known.name, "argmax_robustness", pinned, made_with(result))
    assert (pinned["kept"] + pinned["near_ties"] <= result.has_head.size).all()
    assert (result.calls == 1).all() and (result.replaced > 0).all()  # a hook that does nothing would look robust


def test_target_sensitivity(known: LoadedModel, result: Result, golden: Golden) -> None:
    """The change of the target's probability; both signs occur."""
    golden(known.name, "target_sensitivity", sensitivity_arrays(result, "target"), made_with(result))
    change = probability_change(result)[0]
    assert (change.min(axis=(1, 2)) < 0).all() and (change.max(axis=(1, 2)) > 0).all()


def test_control_token_stability(known: LoadedModel, result: Result, golden: Golden) -> None:
    """The change of the control's probability, which is smaller than the target's."""
    golden(known.name, "control_stability", sensitivity_arrays(result, "control"), made_with(result))
    target, control = np.abs(probability_change(result)).max(axis=(2, 3))  # [imputation] each
    assert (control < target).all()


def test_zero_and_mean_imputation_agree(known: LoadedModel, result: Result, golden: Golden) -> None:
    """The difference between the two imputations, whose effects are correlated."""
    golden(known.name, "zero_mean_agreement", agreement_arrays(result), made_with(result))
    zero, mean = probability_change(result)[0].reshape(2, -1)
    assert np.corrcoef(zero, mean)[0, 1] > 0.9


def test_head_means_do_not_drift_with_depth(known: LoadedModel, result: Result, golden: Golden) -> None:
    """The head means, whose trend over all layers is smaller than their scatter."""
    golden(known.name, "head_means", head_mean_arrays(result), made_with(result))
    assert abs(trend(result.head_mean[0]).drift) < result.head_mean.std()


def test_other_imputations(capitals: LoadedModel, golden: Golden) -> None:
    """The changes of the probabilities, and the predictions, with imputations that read more than the prompt's z."""
    result = other_imputations.swept(capitals)
    assert result.imputations == other_imputations.IMPUTATIONS
    assert (result.calls == 1).all() and (result.replaced == result.replaced[0, 0]).all()
    pinned = other_imputations.arrays(result, atol_of("capitals", "other_margin"))
    card = {"imputations": list(result.imputations), "draws": other_imputations.DRAWS, **made_with(result)}
    golden("capitals", "other_imputations", pinned, card)
