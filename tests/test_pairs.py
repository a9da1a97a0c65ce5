"""Pairs of heads without a model: the sets, and what is made of an invented result."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablation.choices import BY
from ablation.errors import InvalidAblation, InvalidResult
from ablation.results import AblationKey, Result
from ablation.studies import statistics
from ablation.studies.pairs import METRICS, Pairs, pair_rows, sets_of_two, strongest_heads
from ablation.units import MLP, Pair, pair_label
from tests.synthetic import synthetic, synthetic_sets, with_maps

HEADS: list[Pair] = [(0, 0), (0, 1), (0, MLP), (1, 0), (10, 1)]
SOME = st.lists(st.sampled_from([*HEADS, (2, 3), (10, MLP)]), max_size=9)


def pairs_result(prompts: int = 3, imputations: tuple[str, ...] = ("zero", "mean")) -> Result:
    """An invented result of all pairs of `HEADS`. The columns are in no order, nor are the heads of a pair."""
    keys = [
        AblationKey(heads[::-1] if number % 2 else heads, imputation)
        for imputation in imputations
        for number, heads in enumerate(sets_of_two(HEADS))
    ]
    random = np.random.RandomState(1)
    shuffled = [keys[n] for n in random.permutation(len(keys))]
    result = synthetic_sets(shuffled, prompts, argmax=random.rand(prompts, len(keys)) < 0.2)
    clean = {name: values * np.linspace(1, 1.5, prompts) for name, values in result.clean.items()}
    return replace(result, clean=clean | {"argmax": np.array([0, 1, 0][:prompts])})


def column(result: Result, imputation: str, *heads: Pair) -> int:
    (found,) = [
        n for n, key in enumerate(result.ablations) if key.imputation == imputation and set(key.heads) == set(heads)
    ]
    return found


# ---- sets


@given(SOME, st.none() | SOME)
def test_sets_of_two_are_every_head_and_pair_once(heads: list[Pair], with_head: list[Pair] | None) -> None:
    found = sets_of_two(iter(heads), None if with_head is None else iter(with_head))
    members = set(heads)
    expected = {frozenset([head]) for head in members}
    for one in members:
        for other in members - {one}:
            if with_head is None or one in with_head or other in with_head:
                expected.add(frozenset([one, other]))
    assert {frozenset(of) for of in found} == expected and len(found) == len(expected)
    assert [len(of) for of in found] == sorted(len(of) for of in found), "heads alone come first"


def test_sets_of_two_name_the_lower_unit_first() -> None:
    assert sets_of_two(HEADS[::-1])[:5] == [(head,) for head in HEADS]
    assert sets_of_two([(10, 1), (0, MLP), (2, 1)])[3:] == [
        ((0, MLP), (2, 1)),
        ((0, MLP), (10, 1)),
        ((2, 1), (10, 1)),
    ]
    assert sets_of_two([(0, MLP), (0, 1)])[2:] == [((0, 1), (0, MLP))], "a layer's heads run before its MLP"


# ---- the arrangement of a result


@pytest.mark.parametrize("imputation", [None, "zero", "mean"])
def test_pairs_are_plain_loops_over_the_result(imputation: str | None) -> None:
    result = pairs_result()
    pairs = Pairs.of(result, imputation)
    name = imputation or result.imputations[0]
    assert pairs.imputation == name and set(pairs.pairs) == set(itertools.combinations(HEADS, 2))
    assert len(pairs.pairs) == 10 and pairs.heads == tuple(HEADS)
    for metric in METRICS:
        interaction, together, (lower, upper) = (pairs.interaction(metric), pairs.effect(metric), pairs.alone(metric))
        for p in range(3):
            clean = result.clean[metric][p]
            for n, (one, other) in enumerate(pairs.pairs):
                both = result.ablated[metric][p, column(result, name, one, other)] - clean
                first = result.ablated[metric][p, column(result, name, one)] - clean
                second = result.ablated[metric][p, column(result, name, other)] - clean
                assert (together[p, n], lower[p, n], upper[p, n]) == (both, first, second)
                assert interaction[p, n] == pytest.approx(both - first - second, abs=1e-14)


def test_pairs_compensate_and_restore_as_a_plain_loop_says() -> None:
    result = pairs_result()
    pairs = Pairs.of(result)
    kept = result.ablated["argmax"] == result.clean["argmax"][:, None]
    counts = {"compensates": 0, "restores": 0, "alone": 0}
    for p in range(3):
        for n, (one, other) in enumerate(pairs.pairs):
            first, second, both = (
                bool(kept[p, column(result, pairs.imputation, *heads)]) for heads in ([one], [other], [one, other])
            )
            assert pairs.both_kept_alone[p, n] == (first and second)
            assert pairs.compensates[p, n] == (first and second and not both)
            assert pairs.restores[p, n] == ((not first or not second) and both)
            counts["compensates"] += first and second and not both
            counts["restores"] += not (first and second) and both
            counts["alone"] += first and second
    assert min(counts.values()) > 0
    assert (pairs.compensates.sum(), pairs.both_kept_alone.sum()) == (counts["compensates"], counts["alone"])


def test_no_pair_compensates_if_heads_alone_change_the_answer() -> None:
    result = pairs_result()
    other = replace(result, clean={**result.clean, "argmax": np.full(3, 2)})
    assert not Pairs.of(other).both_kept_alone.any()
    assert not Pairs.of(other).compensates.any() and not Pairs.of(other).restores.any()


def test_effects_that_add_up_have_no_interaction() -> None:
    result = pairs_result(imputations=("zero",))
    of_head = {head: (n + 1) / 64 for n, head in enumerate(HEADS)}
    change = np.array([sum(of_head[head] for head in key.heads) for key in result.ablations])
    additive = replace(result, ablated={**result.ablated, "kl": np.tile(change, (3, 1))})
    assert not Pairs.of(additive).interaction("kl").any()
    change[column(result, "zero", (0, 1), (1, 0))] += 0.5
    other = Pairs.of(replace(result, ablated={**result.ablated, "kl": np.tile(change, (3, 1))}))
    assert np.argwhere(other.interaction("kl")[0]).ravel().tolist() == [other.pairs.index(((0, 1), (1, 0)))]
    assert other.interaction("kl").max() == 0.5


def test_map_is_symmetric_with_nan_where_there_is_no_pair() -> None:
    keys = [AblationKey(heads, "zero") for heads in sets_of_two(HEADS, with_head=[(1, 0), (0, MLP)])]
    pairs = Pairs.of(synthetic_sets(keys))
    assert len(pairs.pairs) == 7 and pairs.heads == tuple(HEADS)
    filled = pairs.map_of(np.arange(7.0))
    assert filled.shape == (5, 5)
    for i, one in enumerate(HEADS):
        for j, other in enumerate(HEADS):
            heads = (one, other) if i < j else (other, one)
            if heads in pairs.pairs:
                assert filled[i, j] == pairs.pairs.index(heads)
            else:
                assert np.isnan(filled[i, j])


def test_pairs_ignore_larger_sets_and_sets_without_heads() -> None:
    keys = [AblationKey(heads, "zero") for heads in sets_of_two(HEADS[:2])]
    others = [AblationKey((), "zero"), AblationKey(tuple(HEADS[:3]), "zero", name="three")]
    assert Pairs.of(synthetic_sets([*others, *keys])).pairs == (((0, 0), (0, 1)),)


def test_results_without_pairs_are_refused() -> None:
    with pytest.raises(InvalidResult, match="no pairs of heads with the imputation 'zero'"):
        Pairs.of(synthetic(2, 2))
    with pytest.raises(InvalidResult, match="no pairs of heads with the imputation 'resample'"):
        Pairs.of(pairs_result(), "resample")
    with pytest.raises(InvalidResult, match="the result has no ablation of L0H1 alone"):
        Pairs.of(synthetic_sets([AblationKey(heads, "zero") for heads in (((0, 0),), ((0, 0), (0, 1)))]))
    with pytest.raises(InvalidResult, match="no pairs of heads"):
        Pairs.of(synthetic_sets([]))
    twice = [AblationKey(of, "zero", at) for of in sets_of_two(HEADS[:2]) for at in ("all", "last")]
    with pytest.raises(InvalidResult, match="L0H0 has several ablations with the imputation 'zero'"):
        Pairs.of(synthetic_sets(twice))


# ---- the strongest heads


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("imputation", [None, "mean"])
def test_strongest_heads_have_the_largest_effects_of_either_sign(by: str, imputation: str | None) -> None:
    result = synthetic(3, 3, prompts=4, seed=2)
    effects = {
        key.heads[0]: abs(float(result.change(BY[by][0])[:, n].mean()))
        for n, key in enumerate(result.ablations)
        if key.imputation == (imputation or "zero")
    }
    for count in (2, 5, 9):
        found = strongest_heads(result, count, by, imputation)
        assert len(set(found)) == count
        assert [effects[head] for head in found] == sorted(effects.values(), reverse=True)[:count]


def test_strongest_heads_are_of_either_sign() -> None:
    result = with_maps(synthetic(1, 4, ["zero"]), target_probability=[[0.3, 0.5, 0.15, 0.29]])
    assert strongest_heads(result, 2) == ((0, 1), (0, 2))
    assert strongest_heads(result, 9) == ((0, 1), (0, 2), (0, 3), (0, 0))


def test_strongest_heads_refuses_what_is_no_ranking() -> None:
    assert len(strongest_heads(synthetic(2, 2), 1)) == 1
    with pytest.raises(InvalidAblation, match="0 heads are none: take at least 1"):
        strongest_heads(synthetic(2, 2), 0)
    with pytest.raises(InvalidAblation, match="unknown ranking"):
        strongest_heads(synthetic(2, 2), 2, "size")
    with pytest.raises(InvalidResult, match="a sweep of single heads"):
        strongest_heads(pairs_result(), 2)


# ---- the table


@pytest.mark.parametrize("prompts", [1, 3])
def test_pair_rows_hold_the_means_over_prompts(prompts: int) -> None:
    result = pairs_result(prompts)
    rows = list(pair_rows(result))
    assert len(rows) == 2 * len(METRICS) * 10
    labels = {pair_label(head): head for head in HEADS}
    for row in rows:
        one, other, metric = labels[row["lower"]], labels[row["upper"]], row["metric"]
        change = result.change(metric)
        effects = [change[:, column(result, row["imputation"], *heads)] for heads in ([one], [other], [one, other])]
        means = [sum(of) / prompts for of in effects]
        assert [row["effect_lower"], row["effect_upper"], row["effect"]] == pytest.approx(means, abs=1e-14)
        assert row["interaction"] == pytest.approx(means[2] - means[0] - means[1], abs=1e-14)
        low, high = statistics.bootstrap_interval((effects[2] - effects[0] - effects[1])[:, None])
        if prompts == 1:
            assert row["low"] is None and row["high"] is None
        else:
            assert (row["low"], row["high"]) == (pytest.approx(low[0], abs=1e-14), pytest.approx(high[0], abs=1e-14))
        pairs = Pairs.of(result, row["imputation"])
        assert row["compensates"] == pairs.compensates[:, pairs.pairs.index((one, other))].sum()
    assert len({(row["imputation"], row["lower"], row["upper"], row["metric"]) for row in rows}) == len(rows)


def test_pair_rows_of_a_text_are_refused() -> None:
    result = pairs_result()
    text = replace(result, clean={"loss": np.zeros(3)}, ablated={"loss": np.zeros((3, len(result.ablations)))})
    with pytest.raises(InvalidResult, match="a result of a text has a loss"):
        list(pair_rows(text))
