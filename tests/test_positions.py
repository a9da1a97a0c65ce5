"""Imputations at positions, against an oracle: hooked forward passes, growing batches, texts and positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ablation.checks.assertions import assert_close, assert_identical
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.decoders import DTYPES, FAMILIES, LAYOUTS, VOCABULARY, Decoder, decoders
from ablation.checks.driving import run
from ablation.checks.observe import recorded_inputs
from ablation.edits import Ablation
from ablation.engine import run as run_list
from ablation.engine import run_sequential, score
from ablation.errors import InvalidAblation, InvalidPrompt
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Values
from ablation.reference import record_z
from ablation.results import AblationKey
from ablation.rows import as_positions
from ablation.sweeps import sweep
from tests.comparing import ATOL, assert_results_equal
from tests.surgery import KINDS, Oracle, kind
from tests.test_hook import logits

LLAMA = Decoder("llama", num_layers=3, num_heads=4, head_dim=8, num_key_value_groups=2)
IDS = [3, 1, 4, 1, 5]


# ---- every imputation at every position


@st.composite
def cases(draw: st.DrawFn, families: tuple[str, ...], dtypes: tuple[str, ...]) -> tuple[Case, list[int] | None]:
    """A padded batch, heads, and positions: None for all, or any that all rows have."""
    shape: Any = {"max_rows": 4, "ragged": True, "max_heads": 4, "min_layers": 2, "min_layer_heads": 2}
    spec = CaseSpec(("zero",), families=families, dtypes=dtypes, **shape)
    case = draw(spec.strategy())
    shortest = min(map(len, case.rows))
    position = st.integers(-shortest, shortest - 1)
    return case, draw(st.one_of(st.none(), st.just([-1]), st.lists(position, min_size=1, max_size=3)))


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_imputations_at_positions_equal_surgery(name: str, data: st.DataObject) -> None:
    case, positions = data.draw(cases(FAMILIES, DTYPES))
    assert_equals_surgery(name, case, positions)


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_imputations_in_layouts_equal_surgery(name: str, data: st.DataObject) -> None:
    """Sliding windows, layers without heads, and a vision tower."""
    case, positions = data.draw(cases(LAYOUTS, ("float32",)))
    assert_equals_surgery(name, case, positions)


def assert_equals_surgery(name: str, case: Case, positions: list[int] | None) -> None:
    """Assert that the projections receive the expected z, and, except in bfloat16, that the logits are the expected."""
    decoder, inputs = case.random_decoder, case.inputs()
    model, mask = decoder.shared(), inputs["attention_mask"].tolist()
    oracle, imputation = Oracle(decoder, case.heads, name, positions), kind(name, decoder).imputation
    own: dict[int, Tensor] = {}

    def look(layer: Any) -> Any:
        return layer.projection.register_forward_pre_hook(lambda _, args: own.__setitem__(layer.index, args[0].clone()))

    handles = [look(layer) for layer in find_heads(model).layers]  # before those of the ablation
    try:
        with recorded_inputs(model) as calls, HeadAblation(model) as hook:
            hook.ablate(case.heads, imputation, positions)
            got = run(model, inputs)
            counts = hook.receipt.counts
    finally:
        for handle in handles:
            handle.remove()
    real = inputs["attention_mask"].bool()
    # A mean is rounded to z's dtype once. In float64, a sum also depends on its order: 64 elements are added at most.
    rounding = torch.finfo(getattr(torch, decoder.dtype)).eps * (64 if decoder.dtype == "float64" else 1)
    for layer in find_heads(model).layers:
        (received,) = calls[layer.index]
        want = oracle.expected(layer, own[layer.index], mask)
        size = max(float(z[real].abs().max()) for z in (want, own[layer.index]))
        atol = rounding * size if "mean" in name else 0.0
        torch.testing.assert_close(received.double()[real], want[real], rtol=0, atol=atol)
        heads = [head for index, head in case.heads if index == layer.index]
        for other in set(range(layer.num_heads)) - set(heads):
            at = (..., layer.channels(other))
            assert_identical(received[at], own[layer.index][at], "z of other heads, padding included,")
        for count, head in zip(counts.get(layer.index, []), heads, strict=True):
            replaced = real.numel() if positions is None else sum(len(oracle.tokens(of_row)) for of_row in mask)
            assert count.expected == count.replaced == replaced * layer.head_dim
            differs = received[..., layer.channels(head)] != own[layer.index][..., layer.channels(head)]
            assert count.changed == int(differs.sum())
    if decoder.dtype != "bfloat16":  # in which rounding is as large as the effect of a head
        assert_close(got[real], oracle.logits(inputs)[real], f"the logits with {name} at {positions}")


# ---- growing batches


@st.composite
def lists(draw: st.DrawFn, tokens: int) -> tuple[Decoder, list[tuple[Any, str, list[int] | None]]]:
    """A decoder, and ablations of any heads, kinds and positions: several of each in one list."""
    decoder = draw(decoders(("gpt2", "llama", "qwen3", "gpt_neox", "opt", "mixtral", "gemma3")))
    head = st.tuples(st.integers(0, decoder.num_layers - 1), st.integers(0, decoder.num_heads - 1))
    position = st.integers(-tokens, tokens - 1)
    at = st.one_of(st.none(), st.just([-1]), st.lists(position, min_size=1, max_size=3))
    heads = st.lists(head, min_size=1, max_size=4, unique=True)
    return decoder, draw(st.lists(st.tuples(heads, st.sampled_from(KINDS), at), min_size=2, max_size=9))


def ablation_of(decoder: Decoder, heads: Any, name: str, positions: list[int] | None) -> Ablation:
    return Ablation(heads, kind(name, decoder).imputation, positions)


def batch_of(ids: list[int]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_lists_of_all_kinds_equal_surgery(data: st.DataObject) -> None:
    """In one growing batch or several, and in one forward pass each; the target has several tokens."""
    ids = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6))
    target = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3))
    decoder, drawn = data.draw(lists(len(ids)))
    max_rows = data.draw(st.one_of(st.none(), st.integers(2, 5)))
    model, atol = decoder.shared(), ATOL[decoder.dtype]
    ablations = [ablation_of(decoder, *one) for one in drawn]
    result = run_list(model, ids, ablations, target, 11, max_rows=max_rows)
    assert result.provenance["method"] == "growing batch"
    alone = run_sequential(model, ids, ablations, target, 11)
    # The z of equal tokens is their mean, or differs from it in the last bits: this depends on the number of rows.
    exact = np.array([name in ("zero", "scale", "values") for _, name, _ in drawn])
    one, other = (replace(of, changed=of.changed * exact) for of in (result, alone))
    assert_results_equal(one, other, atol)
    for index, (heads, name, positions) in enumerate(drawn):
        with_target = ids + target[:-1]
        counted = len(ids) if positions is not None or kind(name, decoder).imputation.by_position else None
        oracle = Oracle(decoder, heads, name, positions, counted)
        of_tokens = oracle.logits(batch_of(with_target))[0, len(ids) - 1 :].double().log_softmax(-1)
        want = sum(float(of_tokens[at, token]) for at, token in enumerate(target))
        got = result.ablated["target_log_probability"][0, index]
        assert got == pytest.approx(want, rel=0, abs=4 * len(target) * atol), result.ablations[index]
        tokens = len(ids) if positions is None else len({at % len(ids) for at in positions})
        assert result.replaced[0, index] == tokens * decoder.head_dim * len(heads)
        assert result.calls[0, index] == 1


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_loss_of_a_text_equals_surgery(data: st.DataObject) -> None:
    """Positions are those of the whole text that is read."""
    text = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=8))
    scored = data.draw(st.integers(1, len(text) - 1))
    decoder, drawn = data.draw(lists(len(text) - 1))
    model, atol = decoder.shared(), ATOL[decoder.dtype]
    max_rows = data.draw(st.one_of(st.none(), st.integers(2, 5)))
    result = score(model, text, scored, [ablation_of(decoder, *one) for one in drawn], max_rows=max_rows)
    for index, (heads, name, positions) in enumerate(drawn):
        found = Oracle(decoder, heads, name, positions).logits(batch_of(text[:-1]))[0, -scored:].double()
        want = float(-found.log_softmax(-1)[range(scored), text[-scored:]].mean())
        assert result.ablated["loss"][0, index] == pytest.approx(want, rel=0, abs=4 * atol), result.ablations[index]


def test_values_by_position_leave_a_continuation_alone() -> None:
    """They are of the prompt, and have no values for the tokens of a target."""
    model = LLAMA.shared()
    values = Values(record_z(model, [9, 2, 6, 5, 3]), "resample")
    for ablations in ([Ablation([(1, 2)], values)], [Ablation([(1, 2)], values, [0, -1])]):
        result = run_list(model, IDS, ablations, [7, 8, 9], [10, 11])
        positions = ablations[0].positions
        with HeadAblation(model) as hook:
            hook.ablate([(1, 2)], values, range(5) if positions is None else [0, 4])
            found = logits(model, torch.tensor([[*IDS, 7, 8]]))[0, 4:].double().log_softmax(-1)
        want = float(found[range(3), [7, 8, 9]].sum())
        assert result.ablated["target_log_probability"][0, 0] == pytest.approx(want, abs=ATOL["float32"])
        assert result.ablations == (AblationKey(((1, 2),), "resample", "all" if positions is None else "0,-1"),)
        assert (result.replaced == 8 * (5 if positions is None else 2)).all()


def test_sweep_at_positions_is_labelled() -> None:
    result = sweep(LLAMA.shared(), IDS, 7, 11, ["zero", "channel-mean"], positions=[0, -1])
    assert {key.positions for key in result.ablations} == {"0,-1"}
    assert (result.replaced == 2 * LLAMA.head_dim).all()
    assert str(result.ablations[0]) == "L0H0, zero at 0,-1"


def test_ablation_at_the_last_token_of_the_last_layer() -> None:
    """There, all tokens or only the last one give the same logits of the next token."""
    heads = [(2, head) for head in range(4)]
    ablations = [Ablation([pair], "zero", at) for at in (None, "last") for pair in heads]
    changes = run_list(LLAMA.shared(), IDS, ablations, 7, 11).change("target_log_probability")[0]
    np.testing.assert_allclose(changes[:4], changes[4:], rtol=0, atol=ATOL["float32"])
    assert (np.abs(changes) > 100 * ATOL["float32"]).all()


def test_later_tokens_do_not_see_a_later_position() -> None:
    """The logits of tokens before the ablated one stay as they are."""
    model = LLAMA.shared()
    with HeadAblation(model) as hook:
        clean = logits(model, torch.tensor([IDS]))
        for position in range(5):
            hook.ablate([(0, 1), (1, 2)], "zero", [position])
            got = logits(model, torch.tensor([IDS]))
            assert torch.equal(got[:, :position], clean[:, :position])
            assert (got != clean).any(dim=-1)[0, position:].all()


# ---- positions


@pytest.mark.parametrize(
    ("given", "positions"),
    [
        (None, None),
        ("all", None),
        ("last", (-1,)),
        ([0, 3, -1], (0, 3, -1)),
        ((2,), (2,)),
        (range(3), (0, 1, 2)),
        ((at for at in (1, 1, 2)), (1, 2)),
        (np.array([1, -2]), (1, -2)),
        (torch.tensor([1, -2]), (1, -2)),
    ],
    ids=["None", "all", "last", "list", "tuple", "range", "generator", "array", "tensor"],
)
def test_positions_are_names_or_integers(given: Any, positions: Any) -> None:
    assert as_positions(given) == positions
    assert Ablation([(0, 1)], "zero", given if isinstance(given, str) else positions).positions == positions


@pytest.mark.parametrize("given", [[], "", "first", "0,1", 3, -1, [0.0], [True], ["0"], [None], [[0]], object()])
def test_positions_of_other_kinds_are_refused(given: Any) -> None:
    with pytest.raises(InvalidAblation, match="^positions are 'all', 'last' or a list of integers, not "):
        Ablation([(0, 1)], "zero", given)
    with pytest.raises(InvalidAblation, match="^positions are"):
        sweep(LLAMA.shared(), IDS, positions=given)


@pytest.mark.parametrize("position", [5, -6, 2**40, -(2**40), 2**70, -(2**70)])
def test_position_outside_of_the_prompt_is_refused(position: int) -> None:
    model, reason = LLAMA.shared(), f"has 5 tokens, so it has no position {position}$"
    for ablations in ([Ablation([(0, 1)], "zero", [0, position])], [Ablation([], "mean", [position])]):
        for way in (run_list, run_sequential):
            with pytest.raises(InvalidPrompt, match=f"^the prompt {reason}"):
                way(model, IDS, ablations, 7, [11, 12])
    with HeadAblation(model) as hook:
        hook.ablate([(0, 1)], "zero", [0, position])
        with pytest.raises(InvalidAblation, match=f"^a row {reason}"):
            logits(model, torch.tensor([IDS]))


def test_position_that_the_shortest_row_lacks_is_refused() -> None:
    model, mask = LLAMA.shared(), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with HeadAblation(model) as hook:
        for position in (3, -4):
            hook.ablate([(0, 1)], "zero", [position])
            with pytest.raises(InvalidAblation, match=f"a row has 3 tokens, so it has no position {position}"):
                logits(model, torch.tensor([IDS, IDS]), attention_mask=mask)


@contextmanager
def passed_to(projection: Any) -> Iterator[list[Tensor]]:
    """Context manager: keep the tensors that a projection receives after all hooks, with their gradients."""
    forward, kept = projection.forward, []

    def keeping(z: Tensor) -> Tensor:
        z.retain_grad()
        kept.append(z)
        return forward(z)

    projection.forward = keeping
    yield kept
    del projection.forward


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_gradients_at_positions_are_those_of_surgery(family: str) -> None:
    """None passes through replaced values; scaled z passes a scaled gradient; other tokens pass theirs."""
    decoder = Decoder(family, num_layers=3, num_heads=2, head_dim=8, dtype="float64")
    for name in ("zero", "scale", "values-by-position"):
        imputation, model = kind(name, decoder).imputation, decoder.fresh()
        layer = find_heads(model).layer(1)
        received: list[Tensor] = []

        def keep(module: Any, args: tuple[Tensor, ...], into: list[Tensor] = received) -> None:
            args[0].retain_grad()
            into.append(args[0])

        layer.projection.register_forward_pre_hook(keep)  # before that of the ablation: the head's own z
        with passed_to(layer.projection) as passed_on, HeadAblation(model) as hook:
            hook.ablate([(1, 1)], imputation, [0, -2])
            model(torch.tensor([IDS]), use_cache=False).logits[0, -1, 7].backward()
        own, after = received[0].grad, passed_on[0].grad
        assert own is not None and after is not None and after[:, -2:].abs().min() > 0
        factor = torch.ones_like(own)
        factor[:, [0, 3], layer.channels(1)] = -1.5 if name == "scale" else 0.0
        torch.testing.assert_close(own, after * factor, rtol=1e-12, atol=1e-15)
