"""The removal curve and the pairs of the shipped models are pinned."""

from __future__ import annotations

import numpy as np
import pytest

from ablation.heads import find_heads
from ablation.models import LoadedModel
from ablation.sources import NAMED_MODELS
from ablation.studies.curves import Curve
from ablation.studies.pairs import Pairs
from tests import golden_sets
from tests.comparing import ATOL
from tests.golden import Golden, atol_of, made_with
from tests.test_set_studies import hooked_forward


def check_curve(loaded: LoadedModel, golden: Golden) -> None:
    result = golden_sets.curve(loaded)
    assert (result.calls == 1).all() and (result.replaced > 0).all()
    assert Curve.of(result).ks == golden_sets.KS[loaded.name]
    pinned = golden_sets.curve_arrays(result, atol_of(loaded.name, "curve_margin"))
    card = {key: value for key, value in result.provenance.items() if key != "rounding"}
    card |= {"model": loaded.name, "prompts": len(result.prompts), "random": golden_sets.RANDOM}
    golden(loaded.name, "removal_curve", pinned, card)


@pytest.mark.slow
def test_removal_curve(capitals: LoadedModel, golden: Golden) -> None:
    check_curve(capitals, golden)


@pytest.mark.end_to_end
def test_removal_curve_of_a_real_model(known: LoadedModel, golden: Golden) -> None:
    if known.name != "smollm2":
        pytest.skip("run above, or without a file of prompts")
    check_curve(known, golden)


@pytest.mark.end_to_end
def test_pairs(capitals: LoadedModel, golden: Golden) -> None:
    """200 of all pairs, drawn with a seed, are also what one hooked forward pass gives."""
    result = golden_sets.pairs(capitals)
    pairs = Pairs.of(result)
    assert len(pairs.pairs) == 10_296 and pairs.heads == tuple(find_heads(capitals.model))
    pinned = golden_sets.pairs_arrays(result, atol_of("capitals", "pairs_margin"))
    golden("capitals", "pairs", pinned, made_with(result))
    for n in np.random.default_rng(0).choice(len(pairs.pairs), 200, replace=False):
        expected = hooked_forward(capitals, NAMED_MODELS["capitals"].question, pairs.pairs[n])
        for name, value in expected.items():
            if name not in ("argmax", "correct") or expected["margin"] > 2 * ATOL["float32"]:
                found = result.ablated[name][0, pairs.together[n]]
                assert abs(found - value) <= ATOL["float32"], (pairs.pairs[n], name)
