"""Published claims hold for the models that they are about, and the checks of the claims can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ablation.models import LoadedModel
from ablation.results import Result
from ablation.sources import NAMED_MODELS
from tests.claims import CHECKS, check, claims_of
from tests.golden import probability_change
from tests.synthetic import CLEAN, WORDS, synthetic, with_maps

PUBLISHED = claims_of("gpt2")


@pytest.mark.parametrize(("known", "key"), [(m, key) for m in NAMED_MODELS for key in claims_of(m)], indirect=["known"])
def test_published_claim(key: str, known: LoadedModel, swept: Callable[[LoadedModel], Result]) -> None:
    check(key, claims_of(known.name)[key], swept(known), known.decode)


def test_claims_and_checks_correspond() -> None:
    assert PUBLISHED.keys() == CHECKS.keys()
    assert all("claim" in claim for claim in PUBLISHED.values())


def as_published() -> Result:
    """An invented sweep of 12 x 12 heads that agrees with everything that was published."""
    rng = np.random.RandomState(0)
    grid = (2, 12, 12)
    change = np.stack([rng.uniform(-0.03, 0.03, grid), rng.uniform(-0.001, 0.001, grid)])
    change[:, 1] = change[:, 0] + rng.uniform(-0.005, 0.005, (2, 12, 12))
    argmax = np.zeros(grid, dtype=np.int64)
    argmax[0, 7, 5] = 1
    return synthetic(
        12,
        12,
        target_probability=CLEAN["target_probability"] + change[0],
        control_probability=CLEAN["control_probability"] + change[1],
        argmax=argmax,
        margin=np.ones(grid),
        head_mean=rng.uniform(-0.05, 0.05, (12, 12)),
    )


def changed(sweep: Result, **cells: Any) -> Result:
    """Return a copy with some cells of maps [I, L, H] set: name of the metric -> (index, value)."""
    maps = {}
    for name, (index, value) in cells.items():
        maps[name] = sweep.grid(sweep.ablated[name][0])
        maps[name][index] = value
    return with_maps(sweep, **maps)


def with_target_change(sweep: Result, change: Callable[[Any], Any]) -> Result:
    """Return a copy with another change of the target's probability, a function of the present one."""
    return with_maps(sweep, target_probability=CLEAN["target_probability"] + change(probability_change(sweep)[0]))


@pytest.mark.parametrize("key", CHECKS)
def test_sweep_as_published_passes(key: str) -> None:
    check(key, PUBLISHED[key], as_published(), WORDS.__getitem__)


@pytest.mark.parametrize(
    ("key", "breaks", "found"),
    [
        (
            "clean_prediction",
            lambda s: replace(s, clean={**s.clean, "argmax": np.array([1])}),
            "the clean argmax is ' the'",
        ),
        (
            "argmax_robustness_zero",
            lambda s: changed(s, argmax=((0, 1, 2), 1)),
            "kept 142 of 144: L1H2 to ' the', L7H5",
        ),
        ("argmax_robustness_zero", lambda s: changed(s, argmax=((0, 7, 5), 0)), "kept 144 of 144: no head flips it"),
        ("argmax_robustness_zero", lambda s: changed(s, argmax=((0, 7, 5), 2)), "L7H5 to ' France'"),
        ("argmax_robustness_mean", lambda s: changed(s, argmax=((1, 3), 1)), "kept 132 of 144"),
        ("target_sensitivity", lambda s: with_target_change(s, lambda change: 0.3 * change), "zero: from -0.8"),
        ("target_sensitivity", lambda s: with_target_change(s, np.abs), r"zero: from \+"),
        ("control_stability", lambda s: changed(s, control_probability=((0, 4, 4), 0.03)), "up to 2.00 pp"),
        ("zero_mean_agreement", lambda s: changed(s, target_probability=((1, 4, 4), 0.5)), "mean - zero is up to"),
        ("head_means", lambda s: replace(s, head_mean=2.5 * s.head_mean), "median size"),
        ("head_means", lambda s: replace(s, head_mean=np.where(np.eye(12), 0.9, 0.01)[None]), "average"),
        ("head_means", lambda s: replace(s, head_mean=np.linspace(-0.05, 0.05, 144).reshape(1, 12, 12)), "drift by"),
    ],
)
def test_broken_claim_is_reported_with_what_was_found(key: str, breaks: Callable[[Result], Result], found: str) -> None:
    with pytest.raises(AssertionError, match=found) as error:
        check(key, PUBLISHED[key], breaks(as_published()), WORDS.__getitem__)
    assert PUBLISHED[key]["claim"] in str(error.value)


def test_claims_about_gpt2_fail_on_another_model(capitals: LoadedModel, swept: Callable[[LoadedModel], Result]) -> None:
    """The claims are about GPT-2 small, so a real sweep of another model contradicts them."""
    with pytest.raises(AssertionError, match="drift|median size"):
        check("head_means", PUBLISHED["head_means"], swept(capitals), capitals.decode)
