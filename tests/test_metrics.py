"""The metrics of a result: each equals an independent computation on the logits of one hooked forward per ablation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, rankdata
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.decoders import VOCABULARY, Decoder, decoders, randomised
from ablation.edits import Ablation
from ablation.engine import run, run_sequential
from ablation.errors import InvalidAblation
from ablation.hook import HeadAblation
from ablation.results import INTEGERS, METRICS, Result
from ablation.sweeps import sweep, sweep_sequential
from tests.comparing import ATOL, IDS, assert_results_equal
from tests.test_hook import hooks_of

FAMILIES = ("gpt2", "llama", "gemma3", "gpt_neox", "opt", "mixtral")
GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
PAIR = [Ablation([(0, 1)]), Ablation([(0, 2), (1, 0)], "mean")]
TOKEN = st.integers(0, VOCABULARY - 1)
CONTINUATION = st.one_of(st.none(), TOKEN, st.lists(TOKEN, min_size=1, max_size=3))
PROMPT = st.lists(TOKEN, min_size=1, max_size=6)
Float64 = NDArray[np.float64]


# ---- the independent computation: one forward pass for each number


def logits(model: PreTrainedModel, ids: Sequence[int], ablation: Ablation) -> Float64:
    """The logits of all tokens, [tokens, vocabulary], of one forward pass with an ablation."""
    with torch.no_grad(), HeadAblation(model) as hook:
        hook.ablate(ablation.heads, ablation.imputation)
        return model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


def margin(row: Float64) -> float:
    second, first = np.sort(row)[-2:]
    return float(first - second)


class Greedy(NamedTuple):
    """A greedy continuation, and the smallest margin by which one of its tokens was chosen."""

    tokens: tuple[int, ...]
    margin: float


def greedy(model: PreTrainedModel, ids: Sequence[int], ablation: Ablation, length: int) -> Greedy:
    """Generate one token after the other, without a cache."""
    tokens: list[int] = []
    margins: list[float] = []
    for _ in range(length):
        last = logits(model, [*ids, *tokens], ablation)[-1]
        tokens.append(int(last.argmax()))
        margins.append(margin(last))
    return Greedy(tuple(tokens), min(margins))


class Forced(NamedTuple):
    """A continuation whose every token is predicted from the true ones before it."""

    log_probability: float
    greedy: bool
    margin: float


def forced(model: PreTrainedModel, ids: Sequence[int], ablation: Ablation, tokens: Sequence[int]) -> Forced:
    rows = logits(model, [*ids, *tokens[:-1]], ablation)[len(ids) - 1 :]
    log_probability = log_softmax(rows, axis=-1)[range(len(tokens)), tokens].sum()
    return Forced(float(log_probability), rows.argmax(axis=-1).tolist() == list(tokens), min(map(margin, rows)))


def assert_run_is_as_computed(
    values: Mapping[str, Any], model: PreTrainedModel, ids: Sequence[int], ablation: Ablation, prompt: Any, atol: float
) -> None:
    """Assert that the metrics of one run are those of its logits. values: {metric: number}."""
    row, clean = logits(model, ids, ablation)[-1], logits(model, ids, Ablation([]))[-1]
    target, control = (forced(model, ids, ablation, tokens) for tokens in (prompt.target, prompt.control))
    near = pytest.approx
    long = 2 * atol * max(len(prompt.target), len(prompt.control))
    assert values["target_log_probability"] == near(target.log_probability, abs=long)
    assert values["control_log_probability"] == near(control.log_probability, abs=long)
    assert values["target_probability"] == near(np.exp(target.log_probability), abs=long)
    assert values["control_probability"] == near(np.exp(control.log_probability), abs=long)
    assert values["logit_difference"] == near(target.log_probability - control.log_probability, abs=2 * long)
    if len(prompt.target) == len(prompt.control) == 1:
        assert values["logit_difference"] == near(row[prompt.target[0]] - row[prompt.control[0]], abs=2 * long)
    assert values["kl"] == near(entropy(softmax(clean), softmax(row)), abs=4 * atol)
    assert values["margin"] == near(margin(row), abs=2 * atol)
    others = np.delete(row, prompt.target[0])
    if np.abs(others - row[prompt.target[0]]).min() > 4 * atol:
        assert values["target_rank"] == rankdata(-row, method="min")[prompt.target[0]]
    if margin(row) > 4 * atol:
        assert values["argmax"] == row.argmax()
    if target.margin > 4 * atol:
        assert values["correct"] == target.greedy
    generated = greedy(model, ids, ablation, len(prompt.target))
    if ablation.imputation.reads != "row" and generated.margin > 4 * atol:
        assert values["correct"] == (generated.tokens == prompt.target)


def of_run(arrays: Mapping[str, NDArray[Any]], *index: int) -> dict[str, Any]:
    """The metrics of one run of a result."""
    return {name: values[index].item() for name, values in arrays.items()}


@st.composite
def lists_of_sets(draw: st.DrawFn) -> tuple[Decoder, list[Ablation]]:
    """A decoder, and ablations of up to three heads, or of none."""
    decoder = draw(decoders(FAMILIES))
    head = st.tuples(st.integers(0, decoder.num_layers - 1), st.integers(0, decoder.num_heads - 1))
    ablation = st.builds(Ablation, st.lists(head, max_size=3), st.sampled_from(["zero", "mean"]))
    return decoder, draw(st.lists(ablation, min_size=1, max_size=4))


@given(lists_of_sets(), PROMPT, CONTINUATION, CONTINUATION, st.sampled_from([None, 2, 3]))
def test_every_metric_equals_one_hooked_forward_each(
    drawn: tuple[Decoder, list[Ablation]], ids: list[int], target: Any, control: Any, max_rows: int | None
) -> None:
    (decoder, ablations), atol = drawn, ATOL[drawn[0].dtype]
    model = decoder.shared()
    best = np.sort(logits(model, ids, Ablation([]))[-1])[-3:]
    assume(min(np.diff(best)) > 4 * atol)  # otherwise, rounding chooses the target that is not named
    result = run(model, ids, ablations, target, control, max_rows=max_rows)
    assert result.provenance["method"] == "growing batch"
    (prompt,) = result.prompts
    assert prompt.token_ids == tuple(ids)
    expected = list(logits(model, ids, Ablation([]))[-1].argsort()[::-1])
    for named, found, other in ((target, prompt.target, control), (control, prompt.control, prompt.target)):
        if named is None:
            taken = {other} if isinstance(other, int) else set(() if other is None else other[:1])
            assert found == (next(token for token in expected if token not in taken),)
        else:
            assert found == ((named,) if isinstance(named, int) else tuple(named))
    assert list(result.clean) == list(result.ablated) == list(METRICS)
    assert_run_is_as_computed(of_run(result.clean, 0), model, ids, Ablation([]), prompt, atol)
    for index, ablation in enumerate(ablations):
        assert_run_is_as_computed(of_run(result.ablated, 0, index), model, ids, ablation, prompt, atol)
    assert_results_equal(result, run_sequential(model, ids, ablations, target, control), 3 * atol)


@given(lists_of_sets(), PROMPT, st.integers(1, 4), st.booleans())
def test_correct_is_the_greedy_continuation(
    drawn: tuple[Decoder, list[Ablation]], ids: list[int], length: int, other_end: bool
) -> None:
    """The target is what the clean model generates, or differs from it in the last token."""
    (decoder, ablations), atol = drawn, ATOL[drawn[0].dtype]
    model = decoder.shared()
    generated = greedy(model, ids, Ablation([]), length)
    assume(generated.margin > 4 * atol)
    target = [*generated.tokens[:-1], (generated.tokens[-1] + other_end) % VOCABULARY]
    result = run(model, ids, ablations, target)
    assert result.clean["correct"] == (not other_end)
    assert (result.clean["target_rank"] == 1) == (length > 1 or not other_end)
    for index, ablation in enumerate(ablations):
        assert_run_is_as_computed(of_run(result.ablated, 0, index), model, ids, ablation, result.prompts[0], atol)


def test_metrics_have_the_documented_dtypes_and_limits() -> None:
    result = sweep(GPT2.shared(), IDS, [7, 3], 11)
    for name in METRICS:
        for array, shape in ((result.clean[name], (1,)), (result.ablated[name], (1, 12))):
            assert array.dtype == (np.int64 if name in INTEGERS else np.float64) and array.shape == shape, name
            assert np.isfinite(array).all(), name
    assert result.clean["kl"][0] < 1e-14 and (result.ablated["kl"] > 1e-6).all()
    assert (result.ablated["target_rank"] >= 1).all() and (result.ablated["target_rank"] <= VOCABULARY).all()
    assert set(result.ablated["correct"].flat) <= {0.0, 1.0}


def test_mean_over_the_tokens_takes_those_of_the_continuation() -> None:
    """As documented: it is taken in the pass over the prompt and the target without its last token."""
    model, ablation = GPT2.shared(), Ablation([(0, 1)], "mean")
    result = run(model, IDS, [ablation], [7, 3], [7, 3, 9])
    (prompt,) = result.prompts
    for name, tokens in (("target", prompt.target), ("control", prompt.control)):
        expected = forced(model, IDS, ablation, tokens).log_probability
        assert result.ablated[f"{name}_log_probability"] == pytest.approx(expected, abs=ATOL["float32"])
    first = log_softmax(logits(model, IDS, ablation)[-1])[7]
    chain = first + log_softmax(logits(model, [*IDS, 7], ablation)[-1])[3]
    assert abs(result.ablated["target_log_probability"][0, 0] - chain) > 10 * ATOL["float32"]


# ---- ties


def test_ties_within_a_continuation_go_to_the_lowest_token() -> None:
    """Equal columns of W_U: of the tokens 2, 20 and 40, the model predicts 2, whichever is the largest by rounding."""
    model = randomised(GPT2.shared().config, seed=1)
    ids, twins = [11, 12, 13], [2, 20, 40]
    first = int(sweep(model, ids).clean["argmax"][0])
    with torch.no_grad():
        embedding = model.transformer.wte.weight
        embedding[twins] = embedding[first].clone()
        embedding[first] = -embedding[first]
    second = int(logits(model, [*ids, 2], Ablation([]))[-1].argmax())
    for way in (sweep, sweep_sequential):
        for twin in twins:
            result = way(model, ids, [twin, second])
            assert result.clean["argmax"] == 2 and result.clean["margin"] == 0
            assert result.clean["target_rank"] == 1 and result.clean["correct"] == (twin == 2)
            assert result.ablated["correct"].any() == (twin == 2)
            tied = result.ablated["argmax"] == 2
            assert tied.any() and (result.ablated["target_rank"][tied] == 1).all()


# ---- metrics of one's own


def spread(logits: Tensor) -> Tensor:
    """The entropy of the prediction, in nats."""
    return torch.distributions.Categorical(logits=logits.double()).entropy()


@pytest.mark.parametrize("way", [sweep, sweep_sequential])
@pytest.mark.parametrize("target", [7, [7, 3]])
def test_own_metric_gets_the_logits_after_the_prompt(way: Any, target: Any) -> None:
    model, seen = GPT2.shared(), list[Tensor]()

    def log_probability(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows.requires_grad_().log_softmax(dim=-1)[:, 11]  # a graph is of no use, and does no harm

    result: Result = way(model, IDS, target, 11, metrics={"spread": spread, "log_probability": log_probability})
    assert list(result.clean) == list(result.ablated) == [*METRICS, "spread", "log_probability"]
    for values in (result.clean, result.ablated):
        np.testing.assert_allclose(values["log_probability"], values["control_log_probability"], rtol=0, atol=1e-5)
        assert values["spread"].dtype == values["log_probability"].dtype == np.float64
    assert result.clean["spread"].shape == (1,) and result.ablated["spread"].shape == (1, 12)
    for index, key in enumerate(result.ablations):
        row = logits(model, IDS, Ablation(key.heads, key.imputation))[-1]
        assert result.ablated["spread"][0, index] == pytest.approx(entropy(softmax(row)), abs=ATOL["float32"])
    assert result.clean["spread"][0] == pytest.approx(entropy(softmax(logits(model, IDS, Ablation([]))[-1])), abs=1e-4)
    assert all(rows.dtype == torch.float32 and rows.shape[1:] == (VOCABULARY,) for rows in seen)
    assert sum(map(len, seen)) == 1 + 12  # each run once, and not again for the other tokens of the target
    plain = way(model, IDS, target, 11)
    for name in METRICS:
        assert np.array_equal(plain.ablated[name], result.ablated[name]), name


@pytest.mark.parametrize(
    ("metric", "returned"),
    [
        (lambda rows: rows, r"\[1, 41\]"),
        (lambda rows: rows[:, :1], r"\[1, 1\]"),
        (lambda rows: rows.sum(), r"\[\]"),
        (lambda rows: rows[0], r"\[41\]"),
        (lambda rows: rows[:0, 0], r"\[0\]"),
        (lambda rows: [0.0] * len(rows), "a list"),
        (lambda rows: rows[:, 0].numpy(), "a ndarray"),
        (lambda rows: 0.0, "a float"),
        (lambda rows: None, "a NoneType"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_metric_of_another_shape_is_refused(metric: Callable[[Tensor], Any], returned: str) -> None:
    model = GPT2.shared()
    before = hooks_of(model)
    for way in (sweep, sweep_sequential):
        reason = f"^the metric 'own' returned {returned}, not one number for each of 1 rows$"
        with pytest.raises(InvalidAblation, match=reason):
            way(model, IDS, metrics={"own": metric})
    assert hooks_of(model) == before


def test_metric_that_is_wrong_for_several_rows_is_refused() -> None:
    """One row is the clean run; in a sequential sweep, all of them."""
    with pytest.raises(InvalidAblation, match=r"^the metric 'own' returned \[1\], not one number for each of 12 rows$"):
        sweep(GPT2.shared(), IDS, metrics={"own": lambda rows: rows[:1, 0]})
    flags = sweep(GPT2.shared(), IDS, metrics={"own": lambda rows: rows[:, 0] > 0}).ablated["own"]
    assert flags.dtype == np.float64 and set(flags.flat) <= {0.0, 1.0}


@pytest.mark.parametrize("name", [*METRICS, "finite", "", "a b", "a.b", "2nd", 3, None])
def test_names_that_are_taken_are_refused(name: Any) -> None:
    for way in (sweep, sweep_sequential):
        with pytest.raises(InvalidAblation, match=f"^{name!r} cannot name a metric"):
            way(GPT2.shared(), IDS, metrics={"own": spread, name: spread})


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ([spread], r"^`metrics` is a mapping of names to functions, not \["),
        ({spread}, r"^`metrics` is a mapping of names to functions, not \{"),
        ({"own": 3}, "^the metric 'own' is 3, not a function of the logits$"),
        ({"own": None}, "^the metric 'own' is None, not a function of the logits$"),
    ],
)
def test_metrics_have_to_be_named_functions(metrics: Any, reason: str) -> None:
    with pytest.raises(InvalidAblation, match=reason):
        sweep(GPT2.shared(), IDS, metrics=metrics)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("rows", [1, 12], ids=["clean", "ablated"])
def test_error_in_a_metric_propagates(error: type[BaseException], rows: int) -> None:
    """A failure of the metric is not a failure of the growing batch, so nothing falls back."""
    model = GPT2.shared()
    before, raised = hooks_of(model), error("mine")

    def fail(found: Tensor) -> Tensor:
        if len(found) == rows:
            raise raised
        return found[:, 0]

    with pytest.raises(error, match="mine") as caught:
        sweep(model, IDS, metrics={"own": fail})
    assert caught.value is raised and hooks_of(model) == before


# ---- targets of several tokens, in runs that fall back or are split


@contextmanager
def failing(model: Any, fails: Callable[[int, int], bool]) -> Iterator[None]:
    """A model that fails for batches of some numbers of rows and tokens."""

    def fail(module: Any, args: Any, out: Tensor) -> None:
        if fails(*out.shape[:2]):
            raise ValueError("not these rows")

    handle = model.transformer.h[0].mlp.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("fails", "method"),
    [(lambda rows, tokens: rows > 1, "sequential"), (lambda rows, tokens: rows > 1 and tokens > 5, "growing batch")],
    ids=["always", "continuation"],
)
def test_target_of_several_tokens_may_fall_back(fails: Callable[[int, int], bool], method: str) -> None:
    """The warning comes once for each kind of pass that does not suit the model."""
    model = GPT2.shared()
    expected = run_sequential(model, IDS, PAIR, [7, 3], 11)
    with failing(model, fails), pytest.warns(UserWarning, match="does not suit GPT2LMHeadModel") as notes:
        result = run(model, IDS, PAIR, [7, 3], 11, metrics={"spread": spread})
    assert len(notes) == 1 and result.provenance["method"] == method
    assert {name: how["method"] for name, how in result.provenance["continuations"].items()} == {"target": "sequential"}
    atol = 0 if method == "sequential" else ATOL["float32"]
    assert_results_equal(without_own_metrics(result), expected, atol)


def without_own_metrics(result: Result) -> Result:
    clean, ablated = ({name: values[name] for name in METRICS} for values in (result.clean, result.ablated))
    return dataclasses.replace(result, clean=clean, ablated=ablated)


@pytest.mark.parametrize(("way", "steps"), [(sweep, 2), (sweep_sequential, 12)])
def test_progress_over_continuations_rises_to_one(way: Any, steps: int) -> None:
    shares: list[float] = []
    way(GPT2.shared(), IDS, [7, 3], [7, 4, 5], progress=shares.append)
    assert shares == pytest.approx([(i + 1) / (3 * steps) for i in range(3 * steps)])


def test_continuation_takes_two_more_passes() -> None:
    """The probes of the guard, and one growing batch: none that keeps too few tokens in the last layer."""
    model, tokens = GPT2.shared(), list[tuple[int, ...]]()
    handle = model.transformer.register_forward_hook(lambda _, args, out: tokens.append(tuple(out[0].shape[:2])))
    try:
        sweep(model, IDS, 7, 11)
        once = list(tokens)
        tokens.clear()
        assert sweep(model, IDS, [7, 3, 9], 11).provenance["method"] == "growing batch"
    finally:
        handle.remove()
    assert once == [(4, 5), (3, 5), (13, 5)]  # four rows that verify the model
    assert tokens == [*once, (3, 7), (13, 7)]
