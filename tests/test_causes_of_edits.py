"""Known mistakes in a hook of one's own are named, and an unknown one is not given a false name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ablation.checks import CHECKS, Case, Decoder, adapter_from_context
from ablation.checks.causes.diagnosis import diagnosis
from ablation.checks.on_model.own_model import OwnModel
from ablation.heads import AttentionLayer, find_heads
from tests.mutants.shape import WidthFromHidden

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=8)
CASE = Case(GPT2, rows=((3, 1, 4, 1),), heads=((1, 0),))
SEVERAL = replace(CASE, rows=((3, 1, 4, 1), (1, 4, 1, 5)), heads=((1, 0), (1, 2), (0, 1)), imputation="mean")
CHECK = {check.id: check for check in CHECKS}

Edit = Callable[[Tensor, AttentionLayer, list[int]], None]
"""Changes z in place, [rows, tokens, channels]: (z, layer, heads)."""


@contextlib.contextmanager
def hooked(model: Any, heads: Sequence[tuple[int, int]], edit: Edit) -> Iterator[None]:
    """Edit a copy of z at the projection of each layer that has an ablated head."""
    handles = []
    for index in dict(heads):
        layer = find_heads(model).layer(index)
        named = [head for other, head in heads if other == index]

        def hook(_: Any, args: Any, layer: Any = layer, named: Any = named) -> tuple[Tensor]:
            z = args[0].clone()
            edit(z, layer, named)
            return (z,)

        handles.append(layer.projection.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adapter(edit: Edit, imputation: str = "zero") -> Any:
    return adapter_from_context(lambda model, heads: hooked(model, heads, edit), imputations=[imputation])


def zero(channels: Callable[[int, int], slice]) -> Edit:
    """Zero the channels of each head, which are computed from its number and its width."""

    def edit(z: Tensor, layer: AttentionLayer, heads: list[int]) -> None:
        for head in heads:
            z[..., channels(head, layer.head_dim)] = 0

    return edit


def sliced(width: int) -> Callable[[int, int], slice]:
    return lambda head, dim: slice(head * width, (head + 1) * width)


SHIFTED = "the slice of the head is shifted by one channel"
WIDTH = "the width of a head is not that of this model"


@pytest.mark.parametrize(
    ("channels", "cause"),
    [
        (lambda head, dim: slice(head * dim + 1, (head + 1) * dim + 1), SHIFTED),
        (lambda head, dim: slice(max(0, head * dim - 1), (head + 1) * dim - 1), SHIFTED),
        (sliced(64), WIDTH),
        (sliced(128), WIDTH),
        (lambda head, dim: slice(head * dim, head * dim + dim // 2), "only the first half of the head's channels"),
        (
            lambda head, dim: slice(head * dim + dim // 2, (head + 1) * dim),
            "only the second half of the head's channels",
        ),
    ],
    ids=["shifted up", "shifted down", "64", "128", "first half", "second half"],
)
def test_wrong_slice_is_named(channels: Any, cause: str) -> None:
    found = diagnosis(adapter(zero(channels)), CHECK["locality"], CASE)
    assert found is not None and found.startswith(cause)


def test_fixed_width_is_named_with_its_number_in_a_larger_model() -> None:
    larger = replace(CASE, decoder=Decoder("gpt2", num_layers=2, num_heads=12, head_dim=16))
    assert diagnosis(adapter(zero(sliced(64))), CHECK["locality"], larger) == (
        f"{WIDTH}: it is taken as 64, whatever the model has"
    )


def keep(z: Tensor, layer: AttentionLayer, heads: list[int]) -> None:
    kept = torch.zeros_like(z)
    for head in heads:
        kept[..., layer.channels(head)] = z[..., layer.channels(head)]
    z.copy_(kept)


def test_inverted_mask_of_heads_is_named() -> None:
    found = diagnosis(adapter(keep), CHECK["locality"], CASE)
    assert found == "all heads of the layer are ablated but the named ones: the mask of heads is inverted"


def mean(over: tuple[int, ...], z: Tensor, layer: AttentionLayer, heads: list[int]) -> None:
    for head in heads:
        own = z[..., layer.channels(head)]
        own.copy_(own.mean(dim=over, keepdim=True).expand_as(own))


OVER_ROWS = "z is replaced by one mean over all rows of the batch"


@pytest.mark.parametrize(
    ("edit", "check", "cause"),
    [
        (partial(mean, (0, 1, 2)), "locality.sets", OVER_ROWS),
        (partial(mean, (0, 1, 2)), "independence.rows", OVER_ROWS),
        (partial(mean, (0, 1, 2)), "locality.padded", f"{OVER_ROWS}: padding included"),
        (partial(mean, (0, 1)), "locality.sets", f"{OVER_ROWS}, for each channel"),
    ],
    ids=["rows", "rows alone", "padded rows", "channels"],
)
def test_wrong_mean_is_named(edit: Edit, check: str, cause: str) -> None:
    case = replace(SEVERAL, rows=((3, 1, 4, 1), (1, 5)), side="left") if check == "locality.padded" else SEVERAL
    assert diagnosis(adapter(edit, "mean"), CHECK[check], case) == cause


def test_mean_of_each_channel_over_the_batch_is_named() -> None:
    case = replace(SEVERAL, imputation="channel-mean")
    found = diagnosis(adapter(partial(mean, (0, 1)), "channel-mean"), CHECK["locality.sets"], case)
    assert found == "each channel is replaced by one mean over all rows of the batch"


def of_inputs(part: int, model: Any, heads: Sequence[tuple[int, int]]) -> Any:
    """Zero the queries (0), keys (1) or values (2) of heads, in the output of GPT-2's c_attn."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        handles = []
        for index, head in heads:
            layer = find_heads(model).layer(index)
            size, channels = layer.num_heads * layer.head_dim, layer.channels(head)
            place = slice(part * size + channels.start, part * size + channels.stop)

            def hook(_: Any, args: Any, output: Tensor, place: slice = place) -> Tensor:
                return output.index_fill(-1, torch.arange(place.start, place.stop), 0)

            handles.append(model.transformer.h[index].attn.c_attn.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return context()


@pytest.mark.parametrize("check", ["locality", "oracle.zero", "hygiene.later_hooks", "hygiene.later_patch"])
@pytest.mark.parametrize("part", [0, 1], ids=["queries", "keys"])
def test_unknown_mistake_has_no_false_name(part: int, check: str) -> None:
    factory = adapter_from_context(partial(of_inputs, part), imputations=["zero"], families=["gpt2"])
    what = "the logits with hooks that the user registered later: 3 of 4 elements differ"
    what = what if "hooks" in check else "the logits with a `forward` that the user replaced later: 3 of 4 differ"
    assert diagnosis(factory, CHECK[check], CASE, AssertionError(what)) is None


def test_width_from_hidden_size_is_named_on_the_users_model() -> None:
    """One model cannot tell all wrong widths apart: at most two are named."""
    mine = OwnModel(Decoder("qwen3", 3, 4, 8, 2).fresh(), "mine", [(3, 14, 15, 9, 26, 5)])
    found = diagnosis(WidthFromHidden, CHECK["locality"], mine.case(mine.rows, heads=((1, 0),)))
    assert found is not None and "head_dim is taken as hidden_size / heads, but this model has another" in found
