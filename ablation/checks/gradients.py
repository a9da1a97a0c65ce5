"""Chapter 10, gradients: the ablated forward pass can be differentiated, and its gradients are its own.

They are tried if the logits that `run` returns require gradients, so an adapter that runs under torch.no_grad() need
not declare anything.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.checks.assertions import assert_close
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check
from ablation.checks.driving import ablate, made
from ablation.checks.oracles import apply_surgery, head_block
from ablation.checks.protocol import Factory
from ablation.heads import find_heads

Gradients = dict[str, Tensor]


@check(
    "gradients.zero",
    "Under zero imputation, the gradient of the weights of W_O that read the head is zero, and all other gradients "
    "are, up to rounding, those of the bare model after these weights are set to 0.",
    cases=CaseSpec(imputations=("zero",), max_heads=4, max_rows=2),
    needs=("zero", "gradients"),
)
def zero(factory: Factory, case: Case) -> None:
    model = case.model()
    apply_surgery(model, case.heads)
    weights = dict(model.named_parameters())
    want = _gradients(model(**case.inputs()).logits, weights)
    found, names = find_heads(model), {id(weight): name for name, weight in weights.items()}
    for index, head in case.heads:
        layer = found.layer(index)
        head_block(layer, head, want[names[id(layer.projection.weight)]]).zero_()
    _assert_same_gradients(_of_implementation(factory, case, case.model()), want, "that of surgery on the weights")


@check(
    "gradients.checkpointing",
    "Gradient checkpointing, which runs each layer again in the backward pass, changes the gradients only by rounding.",
    cases=CaseSpec(families=("gpt2", "llama", "qwen3"), max_heads=2, dtypes=("float32",)),
    needs=("gradients", "checkpointing"),
)
def checkpointing(factory: Factory, case: Case) -> None:
    want = _of_implementation(factory, case, case.model())
    for reentrant in (False, True):
        model = case.model()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = _of_implementation(factory, case, model, in_training=True)
        _assert_same_gradients(got, want, f"that without checkpointing (use_reentrant={reentrant})")


def _of_implementation(factory: Factory, case: Case, model: PreTrainedModel, *, in_training: bool = False) -> Gradients:
    """Return the gradients of an ablated run. in_training: layers are in training mode, which checkpointing needs."""
    weights = dict(model.named_parameters())  # now, before an implementation may rename them
    blocks = [layer.block for layer in find_heads(model).layers]
    with made(factory, model) as implementation:
        ablate(implementation, case)
        for block in blocks:
            block.training = in_training  # of the layer alone: the dropouts within it stay in evaluation mode
        return _gradients(implementation.run(**case.inputs()), weights)


def _gradients(logits: Tensor, weights: Mapping[str, nn.Parameter]) -> Gradients:
    """Return the gradient of a fixed weighted sum of all logits with respect to each weight."""
    vocabulary = logits.shape[-1]
    coefficients = torch.arange(vocabulary, dtype=logits.dtype) % 7 - 3
    (logits * coefficients).sum().backward()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in weights.items()
    }


def _assert_same_gradients(got: Gradients, want: Gradients, what: str) -> None:
    """Compare relative to the largest gradient of all weights, in which small ones are sums of large terms."""
    scale = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in got.items():
        assert_close(gradient / scale, want[name] / scale, f"the gradient of {name} / {scale:.3g}, against {what}")
