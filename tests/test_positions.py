"""Imputations at positions, against an oracle: hooked forward passes, growing batches, texts and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ablation.checks.assertions import assert_close, assert_identical
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.decoders import DTYPES, FAMILIES, LAYOUTS
from ablation.checks.driving import run
from ablation.checks.observe import recorded_inputs
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from tests.surgery import KINDS, Oracle, kind

# ---- every imputation at every position


@st.composite
def cases(draw: st.DrawFn, families: tuple[str, ...], dtypes: tuple[str, ...]) -> tuple[Case, list[int] | None]:
    """A padded batch, heads, and positions: None for all, or any that all rows have."""
    spec = CaseSpec(("zero",), families, dtypes, max_rows=4, ragged=True, max_heads=4, min_layers=2, min_layer_heads=2)
    case = draw(spec.strategy())
    shortest = min(map(len, case.rows))
    position = st.integers(-shortest, shortest - 1)
    return case, draw(st.one_of(st.none(), st.just([-1]), st.lists(position, min_size=1, max_size=3)))


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_imputations_at_positions_equal_surgery(name: str, data: st.DataObject) -> None:
    case, positions = data.draw(cases(FAMILIES, DTYPES))
    assert_equals_surgery(name, case, positions)


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_imputations_in_layouts_equal_surgery(name: str, data: st.DataObject) -> None:
    """Sliding windows, layers without heads, and a vision tower."""
    case, positions = data.draw(cases(LAYOUTS, ("float32",)))
    assert_equals_surgery(name, case, positions)


def assert_equals_surgery(name: str, case: Case, positions: list[int] | None) -> None:
    """Assert that the projections receive the expected z, and, except in bfloat16, that the logits are the expected."""
    decoder, inputs = case.decoder, case.inputs()
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
    rounding = torch.finfo(getattr(torch, decoder.dtype)).eps if "mean" in name else 0.0
    for layer in find_heads(model).layers:
        (received,) = calls[layer.index]
        want = oracle.expected(layer, own[layer.index], mask)
        atol = rounding * float(want[real].abs().max())
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
