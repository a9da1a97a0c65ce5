"""The hook beyond what the specification asks of any implementation: its receipts, its errors, its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.checks.decoders import Decoder
from ablation.checks.observe import received
from ablation.errors import InvalidAblation, InvalidReceipt, NoSuchHead, UnknownImputation
from ablation.heads import find_heads
from ablation.hook import HeadAblation

GPT2 = Decoder("gpt2", layers=3, heads=4, width=2)
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def test_sets_of_heads_are_ablated_at_once_each_from_its_own_output() -> None:
    model = GPT2.build()
    heads = [(0, 1), (0, 3), (2, 0)]
    with received(model) as calls, HeadAblation(model) as ablation:
        ablation.set(heads)
        logits(model, IDS)
        for layer in range(3):
            z = calls[layer][0].unflatten(-1, (4, 2))
            zero = [(layer, head) for head in range(4) if not z[:, :, head].any()]
            assert zero == [pair for pair in heads if pair[0] == layer]
        assert ablation.receipt.calls == [1, 1, 1]
        assert {layer: [f.replaced for f in fired] for layer, fired in ablation.receipt.fired.items()} == {
            0: [10, 10],  # 5 tokens x 2 channels
            2: [10],
        }


def test_it_never_writes_into_the_tensor_it_is_given() -> None:
    model = GPT2.build()
    kept: list[Tensor] = []
    handle = find_heads(model).layers[1].projection.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        logits(model, IDS)
        with HeadAblation(model) as ablation:
            ablation.set([(1, 2)])
            logits(model, IDS)
    finally:
        handle.remove()
    assert torch.equal(kept[0], kept[1])


def test_it_works_where_the_projection_is_called_by_keyword() -> None:
    model = GPT2.build()
    projection = find_heads(model).layers[1].projection
    attention = model.get_submodule("transformer.h.1.attn")

    class ByKeyword(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return projection(x=x)

    with HeadAblation(model) as ablation:
        ablation.set([(1, 2)])
        usual = logits(model, IDS)
        attention.c_proj = ByKeyword()
        try:
            by_keyword = logits(model, IDS)
        finally:
            attention.c_proj = projection
    assert torch.equal(by_keyword, usual)


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    """Every hook of every module, in order."""
    return {
        f"{name}.{table}": list(hooks.items())
        for name, module in model.named_modules()
        for table, hooks in vars(module).items()
        if table.endswith("_hooks") or table.endswith("_hooks_with_kwargs")
    }


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, GeneratorExit])
def test_the_model_is_left_as_it_was_found_on_every_way_out(error: type[BaseException]) -> None:
    model = GPT2.build()
    mine = model.get_submodule("transformer.h.0.attn.c_proj").register_forward_pre_hook(lambda *_: None)
    try:
        before, weights = hooks_of(model), {name: t.clone() for name, t in model.state_dict().items()}
        with HeadAblation(model) as ablation:
            assert hooks_of(model) != before
        assert hooks_of(model) == before
        with pytest.raises(error), ablation:
            ablation.set([(0, 0)])
            logits(model, IDS)
            raise error
        assert hooks_of(model) == before
        assert ablation.edits == {}
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    finally:
        mine.remove()


def test_a_failed_install_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2.build()
    before = hooks_of(model)

    def broken(*_: Any, **__: Any) -> None:
        raise Boom

    monkeypatch.setattr(find_heads(model).layers[2].projection, "register_forward_pre_hook", broken)
    with pytest.raises(Boom):
        HeadAblation(model).__enter__()
    assert hooks_of(model) == before


def test_a_second_ablation_on_the_same_model_is_refused() -> None:
    model = GPT2.build()
    with HeadAblation(model) as ablation:
        ablation.set([(1, 1)])
        once = logits(model, IDS)
        with pytest.raises(InvalidAblation, match="already carries an ablation"):
            HeadAblation(model).__enter__()
        assert torch.equal(logits(model, IDS), once)


def test_setting_it_before_it_is_installed_is_refused() -> None:
    with pytest.raises(InvalidAblation, match="enter it first"):
        HeadAblation(GPT2.build()).set([(0, 0)])


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ((3, 0), "no layer 3: the model has 3 layers, 0 to 2"),
        ((-1, 0), "no layer -1"),
        ((0, 4), "no head 4: layer 0 has 4 heads, 0 to 3"),
        ((0, -1), "no head -1"),
        ((True, 0), "layer True is not an integer"),
        ((0, 1.0), "head 1.0 is not an integer"),
        ((0, "1"), "head '1' is not an integer"),
    ],
)
def test_a_head_that_is_not_there_is_refused_and_the_state_kept(pair: tuple[Any, Any], reason: str) -> None:
    model = GPT2.build()
    with HeadAblation(model) as ablation:
        ablation.set([(1, 1)])
        kept = ablation.edits
        with pytest.raises(NoSuchHead, match=reason):
            ablation.set([(0, 0), pair])
        assert ablation.edits == kept


def test_an_unknown_imputation_is_refused() -> None:
    with HeadAblation(GPT2.build()) as ablation, pytest.raises(UnknownImputation, match="'zero', 'mean'"):
        ablation.set([(0, 0)], "median")


def test_a_projection_that_is_not_called_is_an_error_not_a_robust_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2.build()
    attention = model.get_submodule("transformer.h.1.attn")
    projection = attention.c_proj
    with HeadAblation(model) as ablation:
        ablation.set([(1, 0)])
        monkeypatch.setitem(attention._modules, "c_proj", nn.Identity())  # another module does the work
        with pytest.raises(InvalidReceipt, match=r"transformer.h.1.attn.c_proj was called 0 times"):
            logits(model, IDS)
    assert not projection._forward_pre_hooks


def test_a_mean_over_a_sequence_that_comes_in_pieces_is_refused() -> None:
    model = GPT2.build()
    with HeadAblation(model) as ablation, torch.no_grad():
        ablation.set([(0, 0)], "mean")
        first = model(IDS, use_cache=True)
        with pytest.raises(InvalidAblation, match="use_cache=False"):
            model(IDS[:, :1], past_key_values=first.past_key_values)


def test_gradients_flow_around_the_ablated_head() -> None:
    model = GPT2.build()
    try:
        with HeadAblation(model) as ablation:
            ablation.set([(1, 2)])
            model(IDS).logits.sum().backward()
        values = model.get_submodule("transformer.h.1.attn.c_attn").weight.grad[:, 2 * 8 :]  # the values of 4 heads
        touched = values.unflatten(-1, (4, 2)).abs().sum(dim=(0, 2)) > 0
        assert touched.tolist() == [True, True, False, True]
    finally:
        model.zero_grad()
