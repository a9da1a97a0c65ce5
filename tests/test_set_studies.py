"""Studies of sets of heads: the numbers are those of one hooked forward pass for each set."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ablation.choices import BY
from ablation.errors import InvalidAblation, InvalidHead, InvalidPrompt, UnknownImputation
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Imputation
from ablation.models import LoadedModel
from ablation.prompts import Question, continuation_ids, prompt_ids
from ablation.reference import Reference
from ablation.results import Result
from ablation.studies.curves import METRICS, ORDERED, RANDOM, Curve, Heads, random_orders
from ablation.studies.experiment import sweep_prompts
from ablation.studies.pairs import Pairs
from ablation.studies.sets import greedy_order, removal_curve, sweep_pairs
from ablation.units import MLP, Pair
from tests.comparing import ATOL

RECORDS: list[dict[str, str]] = [
    {"prompt": f"{city} is the capital of", "target": " Germany", "control": " France", "subject": city}
    for city in ("Berlin", "Paris", "Rome")
]
HEADS: list[Pair] = [(layer, head) for layer in range(3) for head in range(2)]


@pytest.fixture(scope="session")
def tiny(capitals: LoadedModel) -> LoadedModel:
    """A random GPT-2 of 3 layers and 2 heads in float64, with the tokenizer of capitals."""
    torch.manual_seed(0)
    size = len(capitals.tokenizer)
    config = GPT2Config(n_layer=3, n_head=2, n_embd=8, vocab_size=size, n_positions=32, initializer_range=0.5)
    config.bos_token_id = config.eos_token_id = 0
    return LoadedModel("tiny", GPT2LMHeadModel(config).double().eval(), capitals.tokenizer)


@cache
def hooked(
    loaded: LoadedModel, number: int, heads: frozenset[Pair], imputation: str | Imputation = "zero", at: Any = None
) -> dict[str, float]:
    """The metrics of one of `RECORDS` with a set of heads ablated."""
    record = RECORDS[number]
    return hooked_forward(
        loaded, Question(record["prompt"], record["target"], record["control"]), heads, imputation, at
    )


def hooked_forward(
    loaded: LoadedModel,
    question: Question,
    heads: Iterable[Pair],
    imputation: str | Imputation = "zero",
    at: Any = None,
) -> dict[str, float]:
    """The metrics of a question with a set of heads ablated, by one hooked forward pass. Texts are of one token."""
    assert question.target is not None and question.control is not None
    ids = torch.tensor([prompt_ids(loaded.tokenizer, question.prompt)])
    target, control = (continuation_ids(loaded.tokenizer, text)[0] for text in (question.target, question.control))
    with torch.no_grad(), HeadAblation(loaded.model) as ablation:
        clean = loaded.model(ids).logits[0, -1].double().log_softmax(-1)
        if members := list(heads):
            ablation.ablate(members, imputation, at)
        found = loaded.model(ids).logits[0, -1].double().log_softmax(-1)
    first, second = found.topk(2).values.tolist()
    return {
        "target_log_probability": float(found[target]),
        "control_log_probability": float(found[control]),
        "target_probability": float(found[target].exp()),
        "logit_difference": float(found[target] - found[control]),
        "kl": float((clean.exp() * (clean - found)).sum()),
        "argmax": float(found.argmax()),
        "margin": first - second,
        "correct": float(found.argmax() == target),
    }


def assert_columns(result: Result, loaded: LoadedModel, columns: Iterable[int], atol: float) -> None:
    """Assert that columns of a result of `RECORDS` are what one hooked forward pass gives for each prompt."""
    for number in columns:
        key = result.ablations[number]
        for p in range(len(result.prompts)):
            expected = hooked(loaded, p, frozenset(key.heads), key.imputation)
            decided = expected["margin"] > 2 * atol
            for name, value in expected.items():
                if decided or name not in ("argmax", "correct"):
                    assert abs(result.ablated[name][p, number] - value) <= atol, (str(key), p, name)


# ---- removal curves


def test_curve_is_one_hooked_forward_per_set(tiny: LoadedModel) -> None:
    order: list[Pair] = [(1, 1), (0, 0), (2, 1), (1, 0)]
    result = removal_curve(tiny, RECORDS, order, [3, 1, 4, 3], ["zero", "mean"], random=2, seed=5)
    assert len(result.ablations) == 2 * 3 * (1 + 2 * 2)
    assert_columns(result, tiny, range(len(result.ablations)), ATOL["float64"])
    assert (result.calls == 1).all() and (result.replaced > 0).all()
    curve = Curve.of(result)
    assert (curve.ks, curve.imputations) == ((1, 3, 4), ("zero", "mean"))
    series: dict[str, list[Heads]] = {ORDERED: [tuple(order)], **{kind: [] for kind in RANDOM}}
    for of in random_orders(order, HEADS, 2, 5):
        series[of.kind].append(of.heads)
    for i, imputation in enumerate(curve.imputations):
        for j, k in enumerate(curve.ks):
            for kind, orders in series.items():
                for draw, heads in enumerate(orders):
                    runs = [hooked(tiny, p, frozenset(heads[:k]), imputation) for p in range(3)]
                    for metric in METRICS:
                        mean = sum(run[metric] for run in runs) / 3
                        found = (
                            curve.ordered[metric][i, j] if kind == ORDERED else curve.random[kind][metric][i, draw, j]
                        )
                        assert found == pytest.approx(mean, abs=ATOL["float64"])


def test_curve_goes_up_to_all_heads_by_default(tiny: LoadedModel) -> None:
    curve = Curve.of(removal_curve(tiny, RECORDS[:1], HEADS[::-1], random=0))
    assert curve.ks == (1, 2, 4, 6) and curve.random == {}
    assert curve.imputations == ("zero",)


def test_curve_without_random_heads_has_the_same_ordered_ones(tiny: LoadedModel) -> None:
    order = HEADS[2:5]
    with_random, without = (Curve.of(removal_curve(tiny, RECORDS, order, random=count)) for count in (3, 0))
    for metric in METRICS:
        np.testing.assert_allclose(with_random.ordered[metric], without.ordered[metric], rtol=0, atol=ATOL["float64"])


def test_all_heads_of_a_layer_are_as_harmful_as_themselves(tiny: LoadedModel) -> None:
    curve = Curve.of(removal_curve(tiny, RECORDS, [(1, 1), (1, 0)], [1, 2], random=8, max_rows=5))
    for metric in METRICS:
        assert curve.as_harmful("layers", metric)[0, 1] == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"order": []}, InvalidAblation, "names at least one head, and each only once"),
        ({"order": [(0, 0), (0, 0)]}, InvalidAblation, "names at least one head, and each only once"),
        ({"order": [(0, 2)]}, InvalidHead, "no head 2"),
        ({"order": [(3, 0)]}, InvalidHead, "no layer 3"),
        ({"order": [(0, MLP)]}, InvalidAblation, "name no MLPs"),
        ({"order": ["L0H0"]}, InvalidHead, "is not a .layer, head. pair"),
        ({"order": 3}, InvalidHead, "3 is no list of heads"),
        ({"ks": []}, InvalidAblation, "at least one size"),
        ({"ks": [0, 1]}, InvalidAblation, "none below 1"),
        ({"ks": [1, 3]}, InvalidAblation, "no set of 3 heads: 2 heads are ranked"),
        ({"ks": [1.5]}, InvalidAblation, "a list of integers"),
        ({"ks": 2}, InvalidAblation, "a list of integers"),
        ({"random": -1}, InvalidAblation, "the number of random orders is -1"),
        ({"random": 1.0}, InvalidAblation, "the number of random orders is 1.0"),
        ({"random": True}, InvalidAblation, "the number of random orders is True"),
        ({"seed": -1}, InvalidAblation, "seed"),
        ({"seed": 0.5}, InvalidAblation, "seed"),
        ({"imputations": ["median"]}, UnknownImputation, "median"),
        ({"imputations": []}, InvalidAblation, "at least one imputation"),
        ({"prompts": []}, InvalidPrompt, "prompt"),
        ({"sets": [[(0, 0)]]}, TypeError, "sets"),
    ],
)
def test_curve_refuses_wrong_arguments(
    tiny: LoadedModel, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"prompts": RECORDS[:1], "order": [(0, 0), (1, 1)], "random": 1, **changes}
    with pytest.raises(error, match=message):
        removal_curve(tiny, **arguments)


# ---- pairs


@pytest.mark.parametrize("imputation", ["zero", "mean"])
def test_pairs_are_one_hooked_forward_per_set(tiny: LoadedModel, imputation: str) -> None:
    result = sweep_pairs(tiny, RECORDS, [imputation])
    assert len(result.ablations) == 6 + 15
    assert_columns(result, tiny, range(21), ATOL["float64"])
    pairs = Pairs.of(result)
    for n, (one, other) in enumerate(pairs.pairs):
        for p in range(3):
            clean, first, second, both = (
                hooked(tiny, p, frozenset(heads), imputation)["kl"] for heads in ([], [one], [other], [one, other])
            )
            expected = (both - clean) - (first - clean) - (second - clean)
            assert pairs.interaction("kl")[p, n] == pytest.approx(expected, abs=4 * ATOL["float64"])


def test_pairs_of_some_heads_are_those_of_all(tiny: LoadedModel) -> None:
    every = Pairs.of(sweep_pairs(tiny, RECORDS))
    some = Pairs.of(sweep_pairs(tiny, RECORDS, heads=iter(HEADS[:3]), with_heads=iter([(2, 1)])))
    assert set(some.pairs) == {((0, 0), (2, 1)), ((0, 1), (2, 1)), ((1, 0), (2, 1))}
    own = [every.pairs.index(pair) for pair in some.pairs]
    for metric in ("kl", "target_probability"):
        np.testing.assert_allclose(
            some.interaction(metric), every.interaction(metric)[:, own], rtol=0, atol=4 * ATOL["float64"]
        )


def test_pairs_may_hold_mlps(tiny: LoadedModel) -> None:
    result = sweep_pairs(tiny, RECORDS[:1], heads=[(1, MLP), (1, 0), (0, 1)])
    assert set(Pairs.of(result).pairs) == {((1, 0), (1, MLP)), ((0, 1), (1, MLP)), ((0, 1), (1, 0))}
    assert_columns(result, tiny, range(6), ATOL["float64"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": []}, InvalidAblation, "no pair of heads: name at least two"),
        ({"heads": [(0, 0)]}, InvalidAblation, "no pair of heads: name at least two"),
        ({"heads": [(0, 0), (0, 0)]}, InvalidAblation, "no pair of heads: name at least two"),
        ({"heads": [(0, 0), (0, 5)]}, InvalidHead, "no head 5"),
        ({"heads": [(0, 0), (0, 1)], "with_heads": []}, InvalidAblation, "no pair of heads: name at least two"),
        ({"with_heads": [(9, 0)]}, InvalidHead, "no layer 9"),
        ({"with_heads": [(0, 0)], "heads": []}, InvalidAblation, "no pair of heads: name at least two"),
        ({"heads": 3}, InvalidHead, "3 is no list of heads"),
        ({"with_heads": (0, 0)}, InvalidHead, "is not a .layer, head. pair"),
    ],
)
def test_pairs_refuse_wrong_heads(
    tiny: LoadedModel, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sweep_pairs(tiny, RECORDS[:1], **changes)


def test_pairs_of_capitals_are_hooked_forwards(capitals: LoadedModel) -> None:
    """Some of the 10,296; `tests.test_golden_sets` has 200 of a run of all."""
    every = list(itertools.combinations(find_heads(capitals.model), 2))
    drawn = np.random.default_rng(0).choice(len(every), 30, replace=False)
    result = sweep_prompts(capitals, RECORDS[:1], ["zero"], sets=[every[n] for n in drawn])
    assert len(every) == 10_296
    assert_columns(result, capitals, range(30), ATOL["float32"])


# ---- greedy orders


def greedy_by_hand(loaded: LoadedModel, count: int, by: str, imputation: str = "zero") -> list[Pair]:
    """A greedy order by plain loops over hooked forward passes."""
    metric, sign, _ = BY[by]
    order: list[Pair] = []
    left = list(find_heads(loaded.model))
    for _ in range(count):
        harm = {
            head: sum(sign * hooked(loaded, p, frozenset([*order, head]), imputation)[metric] for p in range(3))
            for head in left
        }
        best = max(left, key=lambda head: round(harm[head], 10))
        order.append(best)
        left.remove(best)
    return order


@pytest.mark.parametrize(("by", "imputation"), [("target", "zero"), ("kl", "mean"), ("logit-difference", "zero")])
def test_greedy_order_is_a_plain_loop(tiny: LoadedModel, by: str, imputation: str) -> None:
    assert list(greedy_order(tiny, RECORDS, 4, imputation, by)) == greedy_by_hand(tiny, 4, by, imputation)


def test_greedy_order_differs_from_single_effects(tiny: LoadedModel) -> None:
    single = sweep_prompts(tiny, RECORDS, ["zero"]).change("kl").mean(axis=0)
    ranked = [HEADS[n] for n in np.argsort(-single)]
    found = list(greedy_order(tiny, RECORDS, 6, by="kl"))
    assert sorted(found) == HEADS and found[0] == ranked[0] and found != ranked


def test_first_greedy_pair_is_the_best_that_holds_the_best_head(tiny: LoadedModel) -> None:
    """Against all sets of two heads."""
    kl = {
        frozenset(heads): sum(hooked(tiny, p, frozenset(heads))["kl"] for p in range(3))
        for heads in [*((head,) for head in HEADS), *itertools.combinations(HEADS, 2)]
    }
    first, second = greedy_order(tiny, RECORDS, 2, by="kl")
    assert kl[frozenset([first])] == max(kl[frozenset([head])] for head in HEADS)
    assert kl[frozenset([first, second])] == max(value for of, value in kl.items() if first in of and len(of) == 2)


def test_greedy_order_of_equal_heads_takes_the_first(tiny: LoadedModel) -> None:
    """An imputation that changes nothing does no harm."""
    assert greedy_order(tiny, RECORDS[:1], 3, "scale:1", "correct") == tuple(HEADS[:3])


def test_greedy_order_uses_one_reference_and_reports_progress(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = Reference.of

    def counted(*arguments: Any, **options: Any) -> Reference:
        made.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(Reference, "of", counted)
    shares: list[float] = []
    order = greedy_order(tiny, RECORDS, 3, "reference-mean", "kl", progress=shares.append)
    assert len(made) == 1 and shares == sorted(shares) and shares[-1] == 1
    reference = real(tiny.model, [prompt_ids(tiny.tokenizer, record["prompt"]) for record in RECORDS])
    assert order == greedy_order(tiny, RECORDS, 3, reference.mean(), "kl")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), InvalidAblation, "an order has 1 to 6 heads, not 0"),
        ((7,), InvalidAblation, "an order has 1 to 6 heads, not 7"),
        ((1.0,), InvalidAblation, "an order has 1 to 6 heads, not 1.0"),
        ((True,), InvalidAblation, "an order has 1 to 6 heads, not True"),
        ((1, "zero", "size"), InvalidAblation, "unknown ranking 'size'"),
        ((1, "median"), UnknownImputation, "median"),
    ],
)
def test_greedy_order_refuses_wrong_arguments(
    tiny: LoadedModel, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        greedy_order(tiny, RECORDS[:1], *arguments)
