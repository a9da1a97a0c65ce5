"""Chapter 6, oracles: two independent computations of the logits of an ablated model.

One writes the ablation into the weights of the model ("surgery"); the other is a GPT-2 written in numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.checks.assertions import assert_close, assert_equals_bare
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check, unsupported_features
from ablation.checks.decoders import VOCABULARY
from ablation.checks.driving import ablate, ablated_logits, made, run
from ablation.checks.observe import WITH_VALUE_PROJECTION, recorded_inputs, spoil_values
from ablation.checks.protocol import Factory
from ablation.heads import AttentionLayer, find_heads

Array = Any  # a numpy array of float64
Pair = tuple[int, int]


@check(
    "oracle.zero",
    "Zero imputation of a head gives, up to rounding, the logits of the bare model after the weights of W_O that "
    "read the head, but not the bias, are set to 0.",
    cases=CaseSpec(imputations=("zero",)),
    needs=("zero",),
)
def zero(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)


@check(
    "oracle.zero_sets",
    "Zero imputation of several heads gives, up to rounding, the logits of the bare model after all weights of W_O "
    "that read one of these heads are set to 0.",
    cases=CaseSpec(imputations=("zero",), max_rows=2, max_heads=4),
    needs=("zero", "multiple_heads"),
)
def zero_sets(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)


@check(
    "oracle.zero_deep",
    "With more than 12 heads per layer and more than 10 layers (where sorting by name puts layer 10 before layer 2), "
    "zero imputation gives, up to rounding, the logits of the bare model after the weights of W_O that read the head "
    "are set to 0.",
    cases=CaseSpec(imputations=("zero",), dtypes=("float32",), min_layers=11, min_layer_heads=13),
    needs=("zero",),
)
def zero_deep(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)
    _assert_equals_surgery(factory, replace(case, heads=((case.decoder.num_layers - 1, case.decoder.num_heads - 1),)))


@check(
    "oracle.non_finite",
    "Zero imputation of a head whose z is NaN or infinite gives, up to rounding, the logits that it gives if this z is "
    "finite.",
    cases=CaseSpec(imputations=("zero",), families=WITH_VALUE_PROJECTION),
    needs=("zero", "non_finite"),
)
def non_finite(factory: Factory, case: Case) -> None:
    model, layer = case.model(), case.heads[0][0]
    group = case.heads[0][1] // case.decoder.num_key_value_groups
    heads = spoil_values(model, case.decoder, layer, group, float("nan") if case.rows[0][0] % 2 else float("inf"))
    if len(heads) > 1 and "multiple_heads" in unsupported_features(factory):
        return  # heads that share their values are NaN together
    case = replace(case, heads=heads)
    assert_close(ablated_logits(factory, case, model), expected_logits(case), "the logits, with that z not finite")


@check(
    "oracle.mean",
    "Mean imputation of a head gives, up to rounding, the logits of the bare model whose W_O receives the mean of the "
    "head's z, as a constant, in each channel of the head.",
    cases=CaseSpec(imputations=("mean",)),
    needs=("mean",),
)
def mean(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)


@check(
    "oracle.mean_sets",
    "Mean imputation of several heads uses the mean of each head's z in the ablated run itself, where the ablated "
    "heads of lower layers are already replaced.",
    cases=CaseSpec(imputations=("mean",), max_heads=4),
    needs=("mean", "multiple_heads", "single_forward"),
)
def mean_sets(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)


@check(
    "oracle.long_prompt",
    "With a prompt of more than 64 tokens, an ablation gives, up to rounding, the logits of the bare model after the "
    "ablation is written into its weights.",
    cases=CaseSpec(dtypes=("float32",)),
)
def long_prompt(factory: Factory, case: Case) -> None:
    row = tuple((token + number) % VOCABULARY for number in range(70) for token in case.rows[0])[:70]
    _assert_equals_surgery(factory, replace(case, rows=(row,)))


def _assert_equals_surgery(factory: Factory, case: Case) -> None:
    what = "the logits, against those of the ablation written into W_O and its bias"
    assert_close(ablated_logits(factory, case), expected_logits(case), what)


@lru_cache(maxsize=256)
def expected_logits(case: Case) -> Tensor:
    """Return the logits that an ablation should give, computed by surgery on the weights of a new model.

    Mean imputation: for a case of one row only. Means are measured layer by layer, since the z of a head depends on the
    heads that are ablated in lower layers.
    """
    model = case.model()
    if case.imputation == "zero":
        apply_surgery(model, case.heads)
    else:
        found = find_heads(model)
        for index, group in groupby(sorted(case.heads), key=itemgetter(0)):
            with recorded_inputs(model) as calls:
                run(model, case.inputs())
            z = calls[index][0].double()
            means = {(index, head): z[..., found.layer(index).channels(head)].mean().item() for _, head in group}
            apply_surgery(model, means, means)
    return run(model, case.inputs())


def apply_surgery(model: PreTrainedModel, heads: Iterable[Pair], means: Mapping[Pair, float] | None = None) -> None:
    """Write an ablation into the weights of a model, in place.

    The block of W_O that reads an ablated head becomes 0. means: {(layer, head): mean of z}, for mean imputation; the
    mean times the sum of the block over the head's channels is added to the projection's bias.
    """
    found = find_heads(model)
    with torch.no_grad():
        for index, head in heads:
            projection, block = found.layer(index).projection, w_o_block(found.layer(index), head)
            if means is not None:
                constant = means[index, head] * block.sum(dim=0)
                bias = projection.bias
                projection.bias = nn.Parameter(constant if bias is None else bias + constant)  # type: ignore[operator]
            block.zero_()


def w_o_block(layer: AttentionLayer, head: int) -> Tensor:
    """Return the part of W_O that reads one head, [head_dim, hidden]: a view of the weight."""
    weight: Tensor = layer.projection.weight  # type: ignore[assignment]
    return head_block(layer, head, weight)


def head_block(layer: AttentionLayer, head: int, weight: Tensor) -> Tensor:
    """Return the part that belongs to one head, [head_dim, hidden], of a tensor of the shape of W_O: a view."""
    by_input = weight if isinstance(layer.projection, Conv1D) else weight.T  # Conv1D [in, out], Linear [out, in]
    return by_input[layer.channels(head)]


@check(
    "oracle.numpy",
    "The logits are, up to rounding, those of a GPT-2 written in numpy that replaces the z of the ablated head by "
    "the imputed value.",
    cases=CaseSpec(families=("gpt2",)),
)
def numpy_gpt2(factory: Factory, case: Case) -> None:
    want = gpt2_logits(case.model(), case.rows[0], dict.fromkeys(case.heads, case.imputation))
    got = ablated_logits(factory, case)
    assert_close(got[0], torch.from_numpy(want).to(got.dtype), "the logits, against a GPT-2 in numpy")


def gpt2_logits(model: PreTrainedModel, ids: tuple[int, ...], ablated: dict[Pair, str]) -> Array:
    """Return the logits [tokens, vocabulary] of a GPT-2 in float64, with the z of some heads replaced.

    ids: the prompt. ablated: {(layer, head): "zero" or "mean"}. This computation shares no code with transformers.
    """
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
        outputs = []  # the z of each head, [tokens, head_dim]
        for head, (q, k, v) in enumerate(zip(*(np.split(part, heads, axis=-1) for part in qkv), strict=True)):
            z = softmax(q @ k.T / np.sqrt(q.shape[-1]) + future) @ v
            imputed = {"zero": np.zeros_like(z), "mean": np.full_like(z, z.mean())}
            outputs.append(imputed[ablated[layer, head]] if (layer, head) in ablated else z)
        x = x + linear(np.concatenate(outputs, axis=-1), f"h.{layer}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")), f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@check(
    "oracle.unread_head",
    "If the weights of W_O that read a head are 0, ablating the head does not change the logits, bit for bit.",
)
def unread_head(factory: Factory, case: Case) -> None:
    model = case.model()
    apply_surgery(model, case.heads)
    with made(factory, model) as implementation:
        clean = implementation.run(**case.inputs())
        ablate(implementation, case)
        ablated = implementation.run(**case.inputs())
    assert_equals_bare(factory, ablated, clean, "the logits, with W_O's block of the ablated head set to 0,")


@check(
    "oracle.permuted_heads",
    "After the weights of a layer are changed to store its heads in another order, ablating a head at its new index "
    "gives, up to rounding, the logits that ablating it at its old index gave before.",
    cases=CaseSpec(families=("gpt2",)),
)
def permuted_heads(factory: Factory, case: Case) -> None:
    ((layer, head),) = case.heads
    model = case.model()
    attention: Any = model.get_submodule(f"transformer.h.{layer}.attn")
    num_heads, head_dim = case.decoder.num_heads, case.decoder.head_dim
    with torch.no_grad():
        for tensor in (attention.c_attn.weight, attention.c_attn.bias):  # [..., 3 * num_heads * head_dim]
            tensor.copy_(tensor.unflatten(-1, (3, num_heads, head_dim)).flip(-2).flatten(-3))
        weight = attention.c_proj.weight  # [num_heads * head_dim, hidden]
        weight.copy_(weight.unflatten(0, (num_heads, head_dim)).flip(0).flatten(0, 1))
    permuted = num_heads - 1 - head
    got = ablated_logits(factory, replace(case, heads=((layer, permuted),)), model)
    what = f"the logits, with head {head} of layer {layer} stored as head {permuted}"
    assert_close(got, ablated_logits(factory, case), what)
