"""Means over prompts: intervals and p values against other formulas, published values and hand computations."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ablation.errors import InvalidResult
from ablation.results import Result
from ablation.studies import statistics
from ablation.studies.statistics import Effects, effects, groups, share
from tests.synthetic import synthetic


def with_change(change: Any, clean: Any = 1.0) -> Result:
    """An invented result whose margins change by these values, [P, A]."""
    change = np.asarray(change, dtype=np.float64)
    prompts, ablations = change.shape
    result = synthetic(1, ablations, imputations=["zero"], prompts=prompts)
    values = np.broadcast_to(np.asarray(clean, dtype=np.float64), (prompts,))
    return replace(
        result,
        clean={**result.clean, "margin": values},
        ablated={**result.ablated, "margin": values[:, None] + change},
    )


def normal_sample(prompts: int, ablations: int, mean: float = 0.0) -> NDArray[np.float64]:
    return mean + np.random.default_rng(7).standard_normal((prompts, ablations))


def test_effects_are_means_over_prompts() -> None:
    result = with_change([[1.0, -2.0], [3.0, 0.0], [2.0, 5.0]], clean=[1.0, 2.0, 6.0])
    found = effects(result, "margin")
    assert (found.metric, found.prompts, found.clean) == ("margin", 3, 3.0)
    assert found.mean.tolist() == pytest.approx([2.0, 1.0])
    assert (found.low <= found.mean).all() and (found.mean <= found.high).all()


def test_bootstrap_interval_of_a_normal_sample_is_near_that_of_t() -> None:
    """With 200 prompts, the percentile interval has almost the ends of Student's interval."""
    change = normal_sample(200, 20, mean=0.3)
    found = effects(with_change(change), "margin")
    error = stats.sem(change, axis=0)
    low, high = stats.t.interval(0.95, df=199, loc=change.mean(axis=0), scale=error)
    assert np.abs(found.low - low).max() < 0.3 * error.max()
    assert np.abs(found.high - high).max() < 0.3 * error.max()
    assert (found.high - found.low).mean() == pytest.approx((high - low).mean(), rel=0.03)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Of 400 invented ablations whose mean change is 0, 5 % have an interval that excludes 0, up to chance."""
    found = effects(with_change(normal_sample(60, 400)), "margin")
    assert 0.02 < found.excludes_zero.mean() < 0.10


def test_effects_are_the_same_bits_every_time() -> None:
    result = with_change(normal_sample(25, 6))
    np.random.seed(1)
    first = effects(result, "margin")
    np.random.seed(2)
    second = effects(result, "margin")
    for name in ("mean", "low", "high", "adjusted_p"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_small_batches_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the order in which a matrix product sums."""
    result = with_change(normal_sample(10, 4))
    whole = effects(result, "margin")
    monkeypatch.setattr(statistics, "BATCH", 7)
    parts = effects(result, "margin")
    np.testing.assert_allclose([whole.low, whole.high], [parts.low, parts.high], rtol=0, atol=1e-14)


def test_interval_does_not_depend_on_other_ablations() -> None:
    change = normal_sample(12, 5)
    together, alone = effects(with_change(change), "margin"), effects(with_change(change[:, 2:3]), "margin")
    ends = (alone.low[0], alone.high[0])
    assert (together.low[2], together.high[2]) == pytest.approx(ends, rel=0, abs=1e-14)


def test_interval_of_two_prompts_lies_between_them() -> None:
    found = effects(with_change([[1.0], [2.0]]), "margin")
    assert (found.low[0], found.high[0]) == pytest.approx((1.0, 2.0)) and found.excludes_zero.all()


def test_share_is_wilsons_interval() -> None:
    """Newcombe (1998), Statistics in Medicine 17, table I: 81 of 263, and 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (count, of), (low, high) in published.items():
        found = share(np.arange(of) < count)
        assert (found.count, found.of) == (count, of) and found.share == count / of
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_share_of_all_flags_of_a_table() -> None:
    found = share(np.ones((3, 4), dtype=bool))
    assert (found.count, found.of, found.share) == (12, 12, 1.0)
    assert found.high == pytest.approx(1.0) and 0.7 < found.low < 0.8


def test_p_values_are_those_of_a_t_test_adjusted_by_hand() -> None:
    """Benjamini and Hochberg: of sorted p values, the smallest p[j] * m / j over all j >= i."""
    change = normal_sample(15, 7) + np.linspace(0, 1.5, 7)
    found = effects(with_change(change), "margin")
    t = change.mean(axis=0) / (change.std(axis=0, ddof=1) / np.sqrt(15))
    p = 2 * stats.t.sf(np.abs(t), df=14)
    order = np.argsort(p)
    expected = np.empty(7)
    for i, index in enumerate(order, start=1):
        expected[index] = min(min(p[order[j - 1]] * 7 / j for j in range(i, 8)), 1.0)
    assert found.adjusted_p == pytest.approx(expected, rel=1e-9)
    assert found.differs.tolist() == (expected < 0.05).tolist() and found.differs.any() and not found.differs.all()


def test_adjusted_p_values_of_a_known_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """P = 0.01, 0.04, 0.03, 0.005 become 0.02, 0.04, 0.04, 0.02."""

    class Test:
        pvalue = np.array([0.01, 0.04, 0.03, 0.005])

    monkeypatch.setattr(stats, "ttest_1samp", lambda *_, **__: Test)
    found = effects(with_change(normal_sample(5, 4)), "margin")
    assert found.adjusted_p == pytest.approx([0.02, 0.04, 0.04, 0.02])


def test_one_prompt_has_neither_interval_nor_p_value() -> None:
    found = effects(with_change([[0.5, -0.5]]), "margin")
    assert found.prompts == 1 and found.mean.tolist() == [0.5, -0.5]
    for values in (found.low, found.high, found.adjusted_p):
        assert values.shape == (2,) and np.isnan(values).all()
    assert not found.excludes_zero.any() and not found.differs.any()


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25])
def test_constant_change_has_a_point_as_interval(value: float) -> None:
    """Such as an ablation that never changes the rank, or one that always makes the answer wrong."""
    change = np.stack([np.full(8, value), np.arange(8.0) - 3.5], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = effects(with_change(change), "margin")
    assert (found.low[0], found.high[0]) == (value, value) and found.mean[0] == value
    assert found.adjusted_p[0] == (1.0 if value == 0 else 0.0)
    assert found.differs[0] == found.excludes_zero[0] == (value != 0)
    assert np.isfinite([found.low[1], found.high[1], found.adjusted_p[1]]).all(), "the other ablation is not affected"


def test_constant_change_of_all_ablations() -> None:
    found = effects(with_change(np.zeros((4, 3))), "margin")
    assert found.adjusted_p.tolist() == [1.0] * 3 and found.low.tolist() == found.high.tolist() == [0.0] * 3


def test_effects_of_some_prompts_are_those_of_a_smaller_result() -> None:
    change = normal_sample(9, 4)
    some = effects(with_change(change, clean=np.arange(9.0)), "margin", [1, 4, 8])
    alone = effects(with_change(change[[1, 4, 8]], clean=[1.0, 4.0, 8.0]), "margin")
    assert some.prompts == alone.prompts == 3 and some.clean == alone.clean == pytest.approx(13 / 3)
    for name in ("mean", "low", "high", "adjusted_p"):
        assert np.allclose(getattr(some, name), getattr(alone, name), rtol=0, atol=1e-14), name


@pytest.mark.parametrize(
    ("metric", "prompts", "reason"),
    [
        ("surprise", None, "'surprise' is no metric of the result with a change: it has target_probability, "),
        ("argmax", None, "'argmax' is no metric of the result with a change"),
        ("kl", [], "there are no prompts"),
    ],
)
def test_effects_without_a_meaning_are_refused(metric: str, prompts: list[int] | None, reason: str) -> None:
    with pytest.raises(InvalidResult, match=reason):
        effects(synthetic(1, 2, prompts=2), metric, prompts)


@pytest.mark.parametrize("flags", [[], [1, 0], [0.5], np.zeros((0, 3), dtype=bool)])
def test_share_of_anything_but_flags_is_refused(flags: Any) -> None:
    with pytest.raises(InvalidResult, match="a share is one of at least one bool"):
        share(flags)


def test_share_of_a_list_is_that_of_its_array() -> None:
    assert share([True, False, True]) == share(np.array([True, False, True]))  # type: ignore[arg-type]


def test_integer_metric_has_effects() -> None:
    found = effects(synthetic(2, 3, prompts=4), "target_rank")
    assert found.clean == 1.0 and (found.mean >= 0).all() and found.mean.dtype == np.float64


def test_groups_keep_the_order_of_the_prompts() -> None:
    result = synthetic(1, 1, prompts=5)
    names = ["b", "a", None, "b", "a"]
    prompts = [replace(prompt, group=name) for prompt, name in zip(result.prompts, names, strict=True)]
    found = groups(replace(result, prompts=tuple(prompts)))
    assert found == {"b": [0, 3], "a": [1, 4]} and list(found) == ["b", "a"]
    assert groups(result) == {}


def test_nothing_is_excluded_where_the_interval_touches_zero() -> None:
    zeros = np.zeros(1)
    assert not Effects("kl", 2, 0.0, zeros, zeros, zeros + 1, zeros + 1).excludes_zero.any()
    assert Effects("kl", 2, 0.0, zeros, zeros + 1e-9, zeros + 1, zeros).excludes_zero.all()
