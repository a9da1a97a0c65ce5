"""Gradients under an ablation, also where gradient checkpointing runs layers again in backward()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import PreTrainedModel

from ablation.checks.decoders import Decoder
from ablation.errors import AblationNotApplied
from ablation.hook import HeadAblation

DECODERS = [
    Decoder("llama", num_layers=3, num_heads=4, head_dim=8, num_key_value_groups=2),
    Decoder("gpt2", num_layers=3, num_heads=4, head_dim=4),
]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
Work = Callable[[PreTrainedModel, HeadAblation], None]


def loss(model: PreTrainedModel) -> Tensor:
    value: Tensor = model(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss
    return value


def two_heads_and_one_backward(model: PreTrainedModel, ablation: HeadAblation) -> None:
    losses = []
    for heads, imputation in (([(1, 0)], "zero"), ([(1, 1), (2, 0)], "mean")):
        ablation.ablate(heads, imputation)
        losses.append(loss(model))
    sum(losses).backward()


def one_backward_a_head(model: PreTrainedModel, ablation: HeadAblation) -> None:
    for head in (0, 1, 2):
        ablation.ablate([(1, head)], "mean")
        loss(model).backward()


def clean_and_ablated(model: PreTrainedModel, ablation: HeadAblation) -> None:
    clean = loss(model)
    ablation.ablate([(0, 3)])
    (loss(model) - clean).backward()


def ablated_and_cleared(model: PreTrainedModel, ablation: HeadAblation) -> None:
    ablation.ablate([(0, 3)], "mean")
    ablated = loss(model)
    ablation.clear()
    (ablated - 2 * loss(model)).backward()


def backward_twice(model: PreTrainedModel, ablation: HeadAblation) -> None:
    ablation.ablate([(0, 3)])
    first = loss(model)
    ablation.ablate([(0, 2)])
    second = loss(model)
    first.backward(retain_graph=True)
    second.backward()
    first.backward()


def backward_after_entering_again(model: PreTrainedModel, ablation: HeadAblation) -> None:
    ablation.ablate([(0, 3)])
    first = loss(model)
    ablation.__exit__()
    ablation.__enter__()
    ablation.ablate([(1, 2)])
    (loss(model) + first).backward()


WORK = [
    two_heads_and_one_backward,
    one_backward_a_head,
    clean_and_ablated,
    ablated_and_cleared,
    backward_twice,
    backward_after_entering_again,
]


def gradients(model: PreTrainedModel, work: Work) -> dict[str, Tensor]:
    with HeadAblation(model) as ablation:
        work(model, ablation)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def checkpointed(decoder: Decoder, reentrant: bool) -> PreTrainedModel:
    model = decoder.fresh().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    enable = "activation_checkpointing_enable"  # its name since transformers 5.24
    if not hasattr(model, enable):
        enable = "gradient_checkpointing_enable"
    getattr(model, enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


@REENTRANT
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.family)
@pytest.mark.parametrize("work", WORK)
def test_layers_are_recomputed_as_they_were_recorded(work: Work, decoder: Decoder, reentrant: bool) -> None:
    want = gradients(decoder.fresh(), work)
    got = gradients(checkpointed(decoder, reentrant), work)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@REENTRANT
def test_backward_after_leaving_is_refused(reentrant: bool) -> None:
    model = checkpointed(DECODERS[0], reentrant)
    with HeadAblation(model) as ablation:
        ablation.ablate([(1, 1)])
        value = loss(model)
    with pytest.raises(AblationNotApplied, match=r"their ablation was left: call backward\(\) inside `with`"):
        value.backward()


def test_backward_after_leaving_is_right_without_checkpointing() -> None:
    def late(model: PreTrainedModel, ablation: HeadAblation) -> None:
        ablation.ablate([(1, 1)], "mean")
        value = loss(model)
        ablation.__exit__()
        value.backward()

    def early(model: PreTrainedModel, ablation: HeadAblation) -> None:
        ablation.ablate([(1, 1)], "mean")
        loss(model).backward()

    want, got = (gradients(DECODERS[0].fresh(), work) for work in (early, late))
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())


@REENTRANT
def test_forward_before_entering_is_recomputed_clean_or_refused(reentrant: bool) -> None:
    model = checkpointed(DECODERS[0], reentrant)
    before = loss(model)
    with HeadAblation(model) as ablation:
        before.backward(retain_graph=True)  # unset
        ablation.ablate([(1, 1)])
        both = loss(model) + before
        with pytest.raises(AblationNotApplied, match="began before this ablation was entered"):
            both.backward()


@REENTRANT
@pytest.mark.parametrize("then", ["same", "other", "cleared", "left"])
def test_recomputing_the_whole_model_is_refused(reentrant: bool, then: str) -> None:
    model = DECODERS[0].fresh().train()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def forward(embedded: Tensor) -> Any:
        return model(inputs_embeds=embedded, use_cache=False).logits

    ablation = HeadAblation(model)
    with ablation:
        ablation.ablate([(1, 1)])
        value = checkpoint(forward, embedded, use_reentrant=reentrant).sum()
        if then == "left":
            pass
        elif then != "same":
            ablation.ablate([(1, 2)]) if then == "other" else ablation.clear()
            model(IDS)
        if then != "left":
            with pytest.raises(AblationNotApplied, match=r"backward\(\) runs the whole model again"):
                value.backward()
    if then == "left" and not reentrant:  # a reentrant one leaves no trace in the graph
        with pytest.raises((AblationNotApplied, CheckpointError)):
            value.backward()
