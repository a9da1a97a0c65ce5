"""Our hook, beyond what the specification asks of any implementation: receipts, errors, state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ablation.checks.decoders import Decoder
from ablation.checks.observe import recorded_inputs
from ablation.checks.protocol import CACHE
from ablation.edits import Ablation, apply_edits, edits_by_layer
from ablation.errors import AblationNotApplied, InvalidAblation, UnsupportedModel
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import IMPUTATIONS, Site
from ablation.rows import Rows

GPT2 = Decoder("gpt2", num_layers=3, num_heads=4, head_dim=2)
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def test_sets_of_heads_are_ablated_at_once() -> None:
    model = GPT2.shared()
    heads = [(0, 1), (0, 3), (2, 0)]
    with recorded_inputs(model) as calls, HeadAblation(model) as ablation:
        ablation.ablate(heads)
        logits(model, IDS)
        for layer in range(3):
            z = calls[layer][0].unflatten(-1, (4, 2))
            zero = [(layer, head) for head in range(4) if not z[:, :, head].any()]
            assert zero == [pair for pair in heads if pair[0] == layer]
        assert ablation.receipt.calls == [1, 1, 1]
        assert {layer: [edit.replaced for edit in counts] for layer, counts in ablation.receipt.counts.items()} == {
            0: [10, 10],  # 5 tokens x 2 channels
            2: [10],
        }


def test_projection_input_is_not_written_to() -> None:
    model = GPT2.shared()
    kept: list[Tensor] = []
    handle = find_heads(model).layers[1].projection.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        logits(model, IDS)
        with HeadAblation(model) as ablation:
            ablation.ablate([(1, 2)])
            logits(model, IDS)
    finally:
        handle.remove()
    assert torch.equal(kept[0], kept[1])


def test_projection_may_be_called_by_keyword() -> None:
    model = GPT2.shared()
    projection = find_heads(model).layers[1].projection
    attention = model.get_submodule("transformer.h.1.attn")

    class ByKeyword(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return projection(x=x)

    ids, mask = torch.tensor([[3, 1, 4, 1, 5], [3, 1, 4, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    for imputation in ("zero", "mean"):
        with HeadAblation(model) as ablation:
            ablation.ablate([(1, 2)], imputation)
            positional, counts = logits(model, ids, attention_mask=mask), ablation.receipt.counts
            attention.c_proj = ByKeyword()
            try:
                by_keyword = logits(model, ids, attention_mask=mask)
            finally:
                attention.c_proj = projection
            assert torch.equal(by_keyword, positional) and ablation.receipt.counts == counts


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    """All hooks of all modules, in their order."""
    return {
        f"{name}.{table}": list(hooks.items())
        for name, module in model.named_modules()
        for table, hooks in vars(module).items()
        if table.endswith("_hooks") or table.endswith("_hooks_with_kwargs")
    }


class Boom(Exception):
    """An error that neither torch nor transformers raises."""


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, GeneratorExit])
def test_every_way_out_restores_the_model(error: type[BaseException]) -> None:
    model = GPT2.shared()
    mine = model.get_submodule("transformer.h.0.attn.c_proj").register_forward_pre_hook(lambda *_: None)
    try:
        before, weights = hooks_of(model), {name: t.clone() for name, t in model.state_dict().items()}
        with HeadAblation(model) as ablation:
            assert hooks_of(model) != before
        assert hooks_of(model) == before
        with pytest.raises(error), ablation:
            ablation.ablate([(0, 0)])
            logits(model, IDS)
            raise error
        assert hooks_of(model) == before
        assert ablation.edits == {}
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    finally:
        mine.remove()


def test_failed_install_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2.shared()
    before = hooks_of(model)

    def broken(*_: Any, **__: Any) -> None:
        raise Boom

    monkeypatch.setattr(find_heads(model).layers[2].projection, "register_forward_pre_hook", broken)
    with pytest.raises(Boom):
        HeadAblation(model).__enter__()
    assert hooks_of(model) == before


def test_projection_that_is_not_called_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2.shared()
    attention = model.get_submodule("transformer.h.1.attn")
    projection = attention.c_proj
    with HeadAblation(model) as ablation:
        ablation.ablate([(1, 0)])
        monkeypatch.setitem(attention._modules, "c_proj", nn.Identity())  # another module takes its place
        with pytest.raises(AblationNotApplied, match=r"transformer.h.1.attn.c_proj was called 0 times"):
            logits(model, IDS)
    assert not projection._forward_pre_hooks


class Twice(nn.Module):
    """A module around a projection, as in BERT, which calls it twice."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        return (self.dense(x) + self.dense(x)) / 2


def test_projection_that_is_called_twice_is_an_error() -> None:
    model = GPT2.fresh()
    attention: Any = model.get_submodule("transformer.h.1.attn")
    attention.c_proj = Twice(attention.c_proj).eval()
    with HeadAblation(model) as ablation:
        logits(model, IDS)
        assert ablation.receipt.calls == [1, 2, 1]
        ablation.ablate([(1, 0)])
        with pytest.raises(AblationNotApplied, match=r"c_proj.dense was called 2 times in one forward, not once"):
            logits(model, IDS)


def test_projection_input_must_have_three_dimensions() -> None:
    model = GPT2.shared()
    with HeadAblation(model) as ablation:
        ablation.ablate([(1, 0)])
        reason = r"^transformer.h.1.attn.c_proj received 2 dimensions, not \[rows, tokens, channels\]$"
        with pytest.raises(UnsupportedModel, match=reason):
            model.get_submodule("transformer.h.1.attn.c_proj")(torch.rand(5, 8))


@pytest.mark.parametrize("imputation", ["zero", "mean"])
def test_edits_ignore_the_default_device(imputation: str) -> None:
    layer = find_heads(GPT2.shared()).layers[1]
    edits = edits_by_layer([(Ablation([(1, 0), (1, 2)], imputation), None)])[1]
    with torch.device("meta"):
        z = torch.ones(1, 5, 8, device="cpu")
        edited, counts = apply_edits(z, layer, edits, Rows(z[..., 0]))
    assert edited.device == counts.device == z.device and counts[:, 0].tolist() == [10, 10]


@pytest.mark.parametrize("known", [1, 5])
def test_mean_of_a_cached_sequence_is_refused(known: int) -> None:
    model = GPT2.shared()
    with HeadAblation(model) as ablation, torch.no_grad():
        ablation.ablate([(0, 0)], "mean")
        first = model(IDS[:, :known], use_cache=True)
        with pytest.raises(InvalidAblation, match=r"in one forward: pass use_cache=False$"):
            model(IDS[:, :1], **{CACHE: first[CACHE]})


def test_mean_of_a_whole_sequence_may_fill_a_cache() -> None:
    model = GPT2.shared()
    with HeadAblation(model) as ablation, torch.no_grad():
        ablation.ablate([(0, 0)], "mean")
        filling = model(IDS, **{CACHE: DynamicCache(config=model.config)}).logits
        assert torch.equal(filling, logits(model, IDS))


def test_mean_needs_a_mask_of_rows_and_tokens() -> None:
    model = Decoder("gemma3", num_layers=3, num_heads=2, head_dim=4).shared()
    made = {"full_attention": None, "sliding_attention": None}  # made from a mask that only the caller has
    with HeadAblation(model) as ablation, torch.no_grad():
        ablation.ablate([(0, 0)], "mean")
        for mask in (made, torch.zeros(1, 1, 5, 5), made):
            with pytest.raises(InvalidAblation, match=r"^this imputation needs an attention mask of \[rows, tokens\]"):
                model.get_decoder()(IDS, attention_mask=mask, use_cache=False)
        ablation.ablate([(0, 0)])
        model.get_decoder()(IDS, attention_mask=made, use_cache=False)  # zero needs no mask


def test_hook_ablates_only_while_entered() -> None:
    model = GPT2.shared()
    clean = logits(model, IDS)
    ablation = HeadAblation(model)
    assert (ablation.edits, ablation.receipt.calls, ablation.receipt.counts) == ({}, [0, 0, 0], {})
    with ablation:
        assert torch.equal(logits(model, IDS), clean)
        assert (ablation.receipt.calls, ablation.receipt.counts) == ([1, 1, 1], {})
    with pytest.raises(InvalidAblation, match="^the ablation is not installed.* enter it first, using `with`$"):
        ablation.ablate([(0, 0)])
    ablation.__exit__(None, None, None)  # a second exit is harmless


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_is_rounded_once(dtype: torch.dtype) -> None:
    z = torch.rand(50, 40, 8, generator=torch.manual_seed(1)).to(dtype)
    exact = z.double().mean(dim=(1, 2), keepdim=True)
    for mask in (None, torch.ones(50, 40)):
        assert torch.equal(
            IMPUTATIONS["mean"](z, Site(0, torch.zeros(50, dtype=torch.long), 40, mask)), exact.to(dtype)
        )


def test_gradients_bypass_the_ablated_head() -> None:
    model = GPT2.shared()
    try:
        with HeadAblation(model) as ablation:
            ablation.ablate([(1, 2)])
            model(IDS).logits.sum().backward()
        values = model.get_submodule("transformer.h.1.attn.c_attn").weight.grad[:, 2 * 8 :]  # values of the 4 heads
        touched = values.unflatten(-1, (4, 2)).abs().sum(dim=(0, 2)) > 0
        assert touched.tolist() == [True, True, False, True]
    finally:
        model.zero_grad()


def test_forward_without_the_decoder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that was traced or exported earlier: its graph has no hooks."""
    model = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2).fresh()
    recorded = model(IDS[:, :3])
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: recorded)
    with HeadAblation(model) as ablation:
        logits(model, IDS[:, :3])  # unset
        ablation.ablate([(0, 1)])
        with pytest.raises(AblationNotApplied, match="the decoder's hooks did not run"):
            logits(model, IDS[:, :3])
