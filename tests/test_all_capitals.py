"""The published experiment over all capitals of a shipped model, with intervals over the prompts."""

from __future__ import annotations

import numpy as np
import pytest

from ablation.models import LoadedModel
from ablation.studies.experiment import sweep_prompts
from tests.all_capitals import arrays, questions
from tests.golden import Golden, atol_of


def check(loaded: LoadedModel, golden: Golden) -> None:
    result = sweep_prompts(loaded, questions(loaded.name))
    assert (result.calls == 1).all() and (result.replaced > 0).all()
    pinned = arrays(result, atol_of(loaded.name, "all_margin"))
    card = {key: value for key, value in result.provenance.items() if key != "rounding"}
    golden(loaded.name, "all_capitals", pinned, {"model": loaded.name, "prompts": len(result.prompts), **card})
    assert (np.abs(pinned["all_control_probability_change"]) <= 0.1).all()
    low, high = pinned["all_target_probability_change_low"], pinned["all_target_probability_change_high"]
    assert (low <= pinned["all_target_probability_change"]).all() and (low <= high).all()


@pytest.mark.slow
def test_experiment_over_all_capitals(capitals: LoadedModel, golden: Golden) -> None:
    check(capitals, golden)


@pytest.mark.end_to_end
def test_experiment_over_all_capitals_with_a_real_model(known: LoadedModel, golden: Golden) -> None:
    if known.name != "smollm2":
        pytest.skip("run above, or without a file of prompts")
    check(known, golden)
