"""Removal curves without a model: rankings, sizes, random orders, and what is made of an invented result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ablation.choices import BY
from ablation.errors import InvalidAblation, InvalidResult
from ablation.results import AblationKey, Result
from ablation.studies import statistics
from ablation.studies.curves import (
    BAND,
    METRICS,
    ORDERED,
    RANDOM,
    Curve,
    Series,
    curve_rows,
    random_orders,
    rank_heads,
    split,
)
from ablation.units import Pair, pair_order
from tests.synthetic import synthetic, synthetic_sets, with_maps

KS = (1, 2, 5)


def curve_result(
    imputations: tuple[str, ...] = ("zero", "mean"), random: int = 3, prompts: int = 4, ks: tuple[int, ...] = KS
) -> Result:
    """An invented result of a curve, in which no two orders share a head."""
    series = [Series(ORDERED, 0, ()), *(Series(kind, draw, ()) for kind in RANDOM for draw in range(random))]
    keys = [
        AblationKey(tuple((layer, head) for head in range(k)), imputation, name=of.name(k))
        for imputation in imputations
        for layer, of in enumerate(series)
        for k in ks
    ]
    result = synthetic_sets(keys, prompts)
    clean = {name: values * np.linspace(1, 1.5, prompts) for name, values in result.clean.items()}
    return replace(result, clean=clean | {"argmax": np.array([0, 1, 0, 0][:prompts])})


# ---- rankings


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("imputation", [None, "zero", "mean"])
@pytest.mark.parametrize("prompts", [None, [0], [2, 1]])
def test_rank_heads_sorts_by_the_mean_change(by: str, imputation: str | None, prompts: list[int] | None) -> None:
    result = synthetic(3, 4, prompts=3, seed=1)
    harm: dict[Pair, float] = {}
    for number, key in enumerate(result.ablations):
        if key.imputation == (imputation or "zero"):
            total = 0.0
            for prompt in prompts or range(3):
                if by == "kl":
                    total += result.ablated["kl"][prompt, number]
                else:
                    name = {"target": "target_probability"}.get(by, by.replace("-", "_"))
                    total += result.clean[name][prompt] - result.ablated[name][prompt, number]
            harm[key.heads[0]] = round(total, 12)
    expected = tuple(sorted(harm, key=lambda head: -harm[head]))
    assert rank_heads(result, by, imputation, prompts) == expected


def test_rank_heads_keeps_the_order_of_ties() -> None:
    effects = np.array([[0.2, 0.1, 0.2], [0.1, 0.2, 0.3]])
    result = with_maps(synthetic(2, 3, ["zero"]), target_probability=effects)
    assert rank_heads(result) == ((0, 1), (1, 0), (0, 0), (0, 2), (1, 1), (1, 2))


def test_rank_heads_puts_the_most_harmful_head_first() -> None:
    result = with_maps(synthetic(1, 3, ["zero"]), target_probability=[[0.1, 0.5, 0.2]], kl=[[0.1, 0.5, 0.2]])
    assert rank_heads(result) == ((0, 0), (0, 2), (0, 1))
    assert rank_heads(result, "kl") == ((0, 1), (0, 2), (0, 0))


def test_rank_heads_refuses_what_it_cannot_rank() -> None:
    result = synthetic(2, 2)
    with pytest.raises(InvalidAblation, match="unknown ranking 'size': use one of target, logit-difference, "):
        rank_heads(result, "size")
    with pytest.raises(InvalidResult, match="no imputation 'resample', only zero, mean"):
        rank_heads(result, imputation="resample")
    with pytest.raises(InvalidResult, match="no prompts"):
        rank_heads(result, prompts=[])
    with pytest.raises(InvalidResult, match="has no prompt 1"):
        rank_heads(result, prompts=[1])
    with pytest.raises(InvalidResult, match="a sweep of single heads; this is a result of sets"):
        rank_heads(curve_result())
    of_mlps = synthetic_sets([AblationKey(((0, 0),), "zero"), AblationKey(((0, "mlp"),), "zero")])
    with pytest.raises(InvalidResult, match="a sweep of single heads"):
        rank_heads(of_mlps)
    twice = synthetic_sets([AblationKey(((0, 0),), "zero", at) for at in ("all", "last")])
    with pytest.raises(InvalidResult, match="L0H0 has several ablations"):
        rank_heads(twice)
    with pytest.raises(InvalidResult, match="no ablations"):
        rank_heads(synthetic_sets([]))
    text = replace(result, clean={"loss": np.zeros(1)}, ablated={"loss": np.zeros((1, 8))})
    with pytest.raises(InvalidResult, match="a sweep of prompts"):
        rank_heads(text)


# ---- random orders

GRID = [(layer, head) for layer in range(4) for head in range(5)]


def test_more_random_orders_do_not_change_the_first() -> None:
    order = GRID[3:9]
    few, many = (random_orders(order, GRID, count, 7) for count in (2, 5))
    assert [of for of in many if of.draw < 2] == few
    assert {(of.kind, of.draw) for of in many} == {(kind, draw) for kind in RANDOM for draw in range(5)}
    assert random_orders(order, GRID, 2, 8) != few
    assert random_orders(order, GRID, 0, 7) == []
    assert random_orders(order, GRID[::-1], 2, 7) == few, "the order in which heads are listed is no matter"


def test_longer_order_does_not_change_the_first_random_heads() -> None:
    short, long = (random_orders(GRID[:count], GRID, 3, 0) for count in (4, 12))
    for one, other in zip(short, long, strict=True):
        assert one.heads == other.heads[:4]


@given(st.permutations(GRID), st.integers(1, 20), st.integers(0, 2**32))
def test_random_orders_have_each_head_once(heads: list[Pair], size: int, seed: int) -> None:
    order = heads[:size]
    for of in random_orders(order, GRID, 3, seed):
        assert len(of.heads) == size == len(set(of.heads)) and set(of.heads) <= set(GRID)
        if of.kind == "layers":
            assert [layer for layer, _ in of.heads] == [layer for layer, _ in order], "at each size"
        if of.kind == "layers" and size == len(GRID):
            assert set(of.heads) == set(GRID)


def test_order_with_all_heads_of_a_layer_has_them_in_any_order() -> None:
    order = [(1, head) for head in (4, 0, 2, 1, 3)]
    drawn = [of.heads for of in random_orders(order, GRID, 40, 0) if of.kind == "layers"]
    assert all(sorted(heads, key=pair_order) == GRID[5:10] for heads in drawn)
    assert len(set(drawn)) > 30


@pytest.mark.parametrize("kind", RANDOM)
def test_every_head_is_equally_likely(kind: str) -> None:
    order = [(1, 0), (3, 2), (1, 4)]
    drawn = [of.heads for of in random_orders(order, GRID, 2000, 0) if of.kind == kind]
    allowed = GRID if kind == "uniform" else [head for head in GRID if head[0] in (1, 3)]
    for place, (layer, _) in enumerate(order):
        counts = dict.fromkeys(allowed if kind == "uniform" else [of for of in allowed if of[0] == layer], 0)
        for heads in drawn:
            counts[heads[place]] += 1
        assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_kinds_of_random_orders_are_drawn_independently() -> None:
    order = [(0, head) for head in range(5)]
    uniform, layers = ([of.heads for of in random_orders(order, GRID[:5], 10, 0) if of.kind == kind] for kind in RANDOM)
    assert uniform != layers


# ---- split


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_split_divides_the_prompts(prompts: int, share: float, seed: int) -> None:
    count = round(share * prompts)
    if not 0 < count < prompts:
        with pytest.raises(InvalidAblation, match="both parts need one"):
            split(prompts, share, seed)
        return
    ranked, evaluated = split(prompts, share, seed)
    assert sorted(ranked + evaluated) == list(range(prompts)) and len(ranked) == count
    assert ranked == sorted(ranked) and evaluated == sorted(evaluated)
    assert split(prompts, share, seed) == (ranked, evaluated)


def test_split_is_drawn_with_the_seed() -> None:
    ranked = [tuple(split(10, 0.3, seed)[0]) for seed in range(20)]
    assert len(set(ranked)) > 5 and len(ranked[0]) == 3


# ---- the arrangement of a result


def column(result: Result, imputation: str, name: str) -> int:
    (found,) = [n for n, key in enumerate(result.ablations) if (key.imputation, key.name) == (imputation, name)]
    return found


@pytest.mark.parametrize(("prompts", "random"), [(4, 3), (1, 3), (4, 0), (2, 1)])
def test_curve_is_the_mean_over_prompts_of_each_set(prompts: int, random: int) -> None:
    result = curve_result(prompts=prompts, random=random)
    curve = Curve.of(result)
    assert (curve.imputations, curve.ks) == (("zero", "mean"), KS)
    assert set(curve.random) == (set(RANDOM) if random else set())
    for metric in METRICS:
        assert curve.clean[metric] == pytest.approx(sum(result.clean[metric]) / prompts)
        for i, imputation in enumerate(curve.imputations):
            for j, k in enumerate(KS):
                values = result.ablated[metric][:, column(result, imputation, f"ordered {k}")]
                assert curve.ordered[metric][i, j] == pytest.approx(sum(values) / prompts, abs=1e-15)
                low, high = statistics.bootstrap_interval(values[:, None].astype(float))
                assert np.allclose(curve.low[metric][i, j], low[0], rtol=1e-12, equal_nan=True)
                assert np.allclose(curve.high[metric][i, j], high[0], rtol=1e-12, equal_nan=True)
                assert np.isnan(low[0]) == (prompts == 1)
                for kind in curve.random:
                    for draw in range(random):
                        own = result.ablated[metric][:, column(result, imputation, f"{kind} {k} #{draw}")]
                        assert curve.random[kind][metric][i, draw, j] == pytest.approx(sum(own) / prompts, abs=1e-15)


def test_order_of_the_columns_is_no_matter() -> None:
    result = curve_result()
    shuffled = np.random.RandomState(0).permutation(len(result.ablations))
    other = replace(
        result,
        ablations=tuple(result.ablations[n] for n in shuffled),
        ablated={name: values[:, shuffled] for name, values in result.ablated.items()},
    )
    one, two = Curve.of(result), Curve.of(other)
    for imputation in ("zero", "mean"):
        i, j = one.imputations.index(imputation), two.imputations.index(imputation)
        for metric in METRICS:
            assert np.array_equal(one.ordered[metric][i], two.ordered[metric][j])
            for kind in RANDOM:
                assert np.array_equal(one.random[kind][metric][i], two.random[kind][metric][j])


def without(result: Result, *names: str) -> Result:
    kept = [n for n, key in enumerate(result.ablations) if key.name not in names]
    return replace(
        result,
        ablations=tuple(result.ablations[n] for n in kept),
        ablated={name: values[:, kept] for name, values in result.ablated.items()},
    )


@pytest.mark.parametrize("missing", [("ordered 2",), ("uniform 5 #1",), tuple(f"ordered {k}" for k in KS)])
def test_curve_with_missing_sets_is_refused(missing: tuple[str, ...]) -> None:
    with pytest.raises(InvalidResult, match="lacks some of its sets"):
        Curve.of(without(curve_result(), *missing))


def test_curve_of_other_results_is_refused() -> None:
    for other in (synthetic(2, 2), synthetic_sets([AblationKey(((0, 0), (0, 1)), "zero", name="pair")])):
        with pytest.raises(InvalidResult, match="is not a set of a removal curve"):
            Curve.of(other)
    with pytest.raises(InvalidResult, match="lacks some of its sets"):
        Curve.of(synthetic_sets([]))
    result = curve_result()
    text = replace(result, clean={"loss": np.zeros(4)}, ablated={"loss": np.zeros((4, len(result.ablations)))})
    with pytest.raises(InvalidResult, match="a removal curve is of prompts"):
        Curve.of(text)
    twice = replace(result, ablations=tuple(key._replace(name="ordered 1") for key in result.ablations))
    with pytest.raises(InvalidResult, match="ordered 1, zero occurs twice"):
        Curve.of(twice)


def test_band_holds_the_percentiles_of_the_random_orders() -> None:
    curve = Curve.of(curve_result(random=7))
    for kind in RANDOM:
        mean, low, high = curve.band(kind, "kl")
        for i in (0, 1):
            for j in range(len(KS)):
                values = sorted(curve.random[kind]["kl"][i, :, j])
                assert mean[i, j] == pytest.approx(sum(values) / 7)
                for end, percent in zip((low, high), BAND, strict=True):
                    place = percent / 100 * 6
                    before = int(place)
                    between = values[before] + (place - before) * (values[before + 1] - values[before])
                    assert end[i, j] == pytest.approx(between)


@pytest.mark.parametrize("metric", METRICS)
def test_as_harmful_counts_orders_that_harm_as_much(metric: str) -> None:
    curve = Curve.of(curve_result(random=6))
    found = curve.as_harmful("layers", metric)
    for i in (0, 1):
        for j in range(len(KS)):
            own, others = curve.ordered[metric][i, j], curve.random["layers"][metric][i, :, j]
            count = sum(other >= own if metric == "kl" else other <= own for other in others)
            assert found[i, j] == (1 + count) / 7
    assert found.min() < found.max()


def test_order_as_harmful_as_all_others_has_the_share_one() -> None:
    result = curve_result(random=4)
    same = replace(result, ablated={name: np.full_like(values, 0.25) for name, values in result.ablated.items()})
    for metric in METRICS:
        assert (Curve.of(same).as_harmful("uniform", metric) == 1).all()


def test_random_set_of_the_same_heads_is_as_harmful() -> None:
    """Rounding may tell apart two runs of the same heads."""
    result = curve_result(random=2)
    five = [n for n, key in enumerate(result.ablations) if len(key.heads) == 5]
    keys = list(result.ablations)
    for n in five:
        keys[n] = keys[n]._replace(heads=tuple((0, (head + n) % 5) for head in range(5)))
    ablated = {name: np.tile(1e-9 * np.arange(len(keys)), (4, 1)) for name in result.ablated}
    curve = Curve.of(replace(result, ablations=tuple(keys), ablated=ablated))
    for kind in RANDOM:
        assert curve.as_harmful(kind, "correct").tolist() == [[1 / 3, 1 / 3, 1]] * 2
        assert curve.as_harmful(kind, "kl").tolist() == [[1, 1, 1]] * 2


# ---- the table


def test_curve_rows_hold_every_number() -> None:
    curve = Curve.of(curve_result())
    rows = list(curve_rows(curve))
    assert len(rows) == 2 * len(KS) * len(METRICS) * (1 + 2 * 3)
    assert {tuple(row) for row in rows} == {
        ("imputation", "k", "metric", "clean", "order", "draw", "value", "low", "high")
    }
    for row in rows:
        i, j, metric = curve.imputations.index(row["imputation"]), KS.index(row["k"]), row["metric"]
        assert row["clean"] == curve.clean[metric]
        if row["order"] == ORDERED:
            expected: tuple[Any, ...] = tuple(of[metric][i, j] for of in (curve.ordered, curve.low, curve.high))
            assert (row["value"], row["low"], row["high"], row["draw"]) == (*expected, None)
        else:
            assert row["value"] == curve.random[row["order"]][metric][i, row["draw"], j]
            assert row["low"] is None and row["high"] is None
    places = [(row["imputation"], row["k"], row["metric"], row["order"], row["draw"]) for row in rows]
    assert len(set(places)) == len(rows)


def test_curve_rows_of_one_prompt_have_no_interval() -> None:
    rows = list(curve_rows(Curve.of(curve_result(prompts=1, random=0))))
    assert len(rows) == 2 * len(KS) * len(METRICS) and {row["order"] for row in rows} == {ORDERED}
    assert all(row["low"] is None and row["high"] is None for row in rows)
