"""What an ablated model computes, found without a hook: from the weights, and from a GPT-2 in a few lines of numpy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.checks.cases import Case, CaseSpec, close, run, same
from ablation.checks.check import Check, Factory
from ablation.checks.observe import recorded_inputs
from ablation.heads import AttentionLayer, find_heads

Array = Any  # a numpy array of float64
Pair = tuple[int, int]


def columns(layer: AttentionLayer, head: int) -> torch.Tensor:
    """The block of W_O that reads one head, [width, hidden]: a view into the weight."""
    weight: torch.Tensor = layer.projection.weight  # type: ignore[assignment]  # Conv1D [in, out], Linear [out, in]
    by_input = weight if isinstance(layer.projection, Conv1D) else weight.T
    return by_input[layer.channels(head)]


def apply_surgery(model: PreTrainedModel, heads: Iterable[Pair], means: Mapping[Pair, float] | None = None) -> None:
    """Ablate by surgery: W_O's block becomes 0; a mean, times the sum of the block's rows, joins the bias."""
    layers = find_heads(model).layers
    with torch.no_grad():
        for index, head in heads:
            projection, block = layers[index].projection, columns(layers[index], head)
            if means is not None:
                constant = means[index, head] * block.sum(dim=0)
                bias = projection.bias
                projection.bias = nn.Parameter(constant if bias is None else bias + constant)  # type: ignore[operator]
            block.zero_()


def ablated_logits(make: Factory, case: Case, model: PreTrainedModel | None = None) -> torch.Tensor:
    """The logits of the implementation under test, [rows, tokens, vocabulary]."""
    implementation = make(model or case.model())
    try:
        implementation.ablate(list(case.heads), case.imputation)
        logits: torch.Tensor = implementation.run(**case.inputs())
    finally:
        implementation.close()
    return logits


@lru_cache(maxsize=256)
def expected(case: Case) -> torch.Tensor:
    """The logits that the ablation of a case should give, by surgery on the weights. Mean: one row.

    Means are taken layer by layer: what a head's z is depends on the heads that are ablated below.
    """
    model = case.model()
    if case.imputation == "zero":
        apply_surgery(model, case.heads)
    else:
        layers = find_heads(model).layers
        for index, group in groupby(sorted(case.heads), key=itemgetter(0)):
            with recorded_inputs(model) as calls:
                run(model, case.inputs())
            z = calls[index][0].double()
            means = {(index, head): z[..., layers[index].channels(head)].mean().item() for _, head in group}
            apply_surgery(model, means, means)
    return run(model, case.inputs())


def weight_oracle(make: Factory, case: Case) -> None:
    """Zero imputation is the model whose W_O has zeros where it reads the head; the mean, times that block, is bias."""
    close(ablated_logits(make, case), expected(case), "the logits, against the ablation written into W_O and its bias")


def last_head_oracle(make: Factory, case: Case) -> None:
    """The same, for the last head of the last layer as well."""
    weight_oracle(make, case)
    weight_oracle(make, replace(case, heads=((case.decoder.num_layers - 1, case.decoder.num_heads - 1),)))


def numpy_oracle(make: Factory, case: Case) -> None:
    """A GPT-2 written out in numpy, its heads a list with one entry replaced, gives the same logits."""
    want = gpt2(case.model(), case.rows[0], dict.fromkeys(case.heads, case.imputation))
    got = ablated_logits(make, case)
    close(got[0], torch.from_numpy(want).to(got.dtype), "the logits, against a GPT-2 in numpy")


def gpt2(model: PreTrainedModel, ids: tuple[int, ...], ablated: dict[tuple[int, int], str]) -> Array:
    """Logits [tokens, vocabulary] of a GPT-2 in float64, some heads' outputs replaced. Shares no code with a model."""
    w: dict[str, Array] = {
        name.removeprefix("transformer."): tensor.double().numpy() for name, tensor in model.state_dict().items()
    }
    heads, eps = model.config.n_head, model.config.layer_norm_epsilon

    def norm(x: Array, name: str) -> Array:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def softmax(x: Array) -> Array:
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def gelu(x: Array) -> Array:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    tokens = len(ids)
    future = np.triu(np.full((tokens, tokens), -np.inf), k=1)
    x = w["wte.weight"][list(ids)] + w["wpe.weight"][:tokens]  # [tokens, hidden]
    for layer in range(model.config.n_layer):
        qkv = np.split(linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn"), 3, axis=-1)
        outputs = []  # of each head, [tokens, width]
        for head, (q, k, v) in enumerate(zip(*(np.split(part, heads, axis=-1) for part in qkv), strict=True)):
            z = softmax(q @ k.T / np.sqrt(q.shape[-1]) + future) @ v
            replaced = {"zero": np.zeros_like(z), "mean": np.full_like(z, z.mean())}
            outputs.append(replaced[ablated[layer, head]] if (layer, head) in ablated else z)
        x = x + linear(np.concatenate(outputs, axis=-1), f"h.{layer}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")), f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def unread_head(make: Factory, case: Case) -> None:
    """A head that W_O does not read has no effect, to the last bit."""
    model = case.model()
    apply_surgery(model, case.heads)
    implementation = make(model)
    try:
        clean = implementation.run(**case.inputs())
        implementation.ablate(list(case.heads), case.imputation)
        same(implementation.run(**case.inputs()), clean, "the logits, though W_O's block of the ablated head is 0")
    finally:
        implementation.close()


def relabelled(make: Factory, case: Case) -> None:
    """With a layer's heads stored in the opposite order, ablating the same head by its new number is the same."""
    ((layer, head),) = case.heads
    model = case.model()
    attention: Any = model.get_submodule(f"transformer.h.{layer}.attn")
    heads, head_dim = case.decoder.num_heads, case.decoder.head_dim
    with torch.no_grad():
        for tensor in (attention.c_attn.weight, attention.c_attn.bias):  # [..., 3 * heads * width]
            tensor.copy_(tensor.unflatten(-1, (3, heads, head_dim)).flip(-2).flatten(-3))
        weight = attention.c_proj.weight  # [heads * width, hidden]
        weight.copy_(weight.unflatten(0, (heads, head_dim)).flip(0).flatten(0, 1))
    implementation = make(model)
    try:
        implementation.ablate([(layer, heads - 1 - head)], case.imputation)
        got = implementation.run(**case.inputs())
    finally:
        implementation.close()
    close(
        got,
        ablated_logits(make, case),
        f"the logits, head {head} of layer {layer} being stored as head {heads - 1 - head}",
    )


CHECKS = [
    Check(
        id="oracle.zero",
        requirement="Zero imputation equals the model whose W_O has zeros where it reads the head, bias kept.",
        function=weight_oracle,
        cases=CaseSpec(imputations=("zero",)),
        needs=("zero",),
    ),
    Check(
        id="oracle.zero_sets",
        requirement="Zero imputation of several heads equals the model whose W_O has zeros where it reads any of them.",
        function=weight_oracle,
        cases=CaseSpec(imputations=("zero",), rows=2, heads=4),
        needs=("zero", "multiple_heads"),
    ),
    Check(
        id="oracle.zero_deep",
        requirement="The same for the last of more than twelve heads, and in more than ten layers, as names sort them.",
        function=last_head_oracle,
        cases=CaseSpec(imputations=("zero",), dtypes=("float32",), layers=11, in_layer=13),
        needs=("zero",),
    ),
    Check(
        id="oracle.mean",
        requirement="Mean imputation equals that model with the mean of z, times the sum of the block, in the bias.",
        function=weight_oracle,
        cases=CaseSpec(imputations=("mean",)),
        needs=("mean",),
    ),
    Check(
        id="oracle.mean_sets",
        requirement="The same for several heads, each by the mean of its z in that very forward.",
        function=weight_oracle,
        cases=CaseSpec(imputations=("mean",), heads=4),
        needs=("mean", "multiple_heads", "single_forward"),
    ),
    Check(
        id="oracle.numpy",
        requirement="A GPT-2 written out in numpy, with the head's output replaced in a list of heads, agrees.",
        function=numpy_oracle,
        cases=CaseSpec(families=("gpt2",)),
    ),
    Check(
        id="oracle.unread_head",
        requirement="Ablating a head that W_O does not read changes no bit of the logits.",
        function=unread_head,
        cases=CaseSpec(),
    ),
    Check(
        id="oracle.permuted_heads",
        requirement="A head has the same effect under another number, where the weights are stored in another order.",
        function=relabelled,
        cases=CaseSpec(families=("gpt2",)),
    ),
]
