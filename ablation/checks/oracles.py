"""Chapter 6, oracles: the logits of an ablated model, computed by writing the ablation into its weights ("surgery")."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.checks.assertions import assert_close, assert_equals_bare
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check, unsupported_features
from ablation.checks.driving import ablate, ablated_logits, made, run
from ablation.checks.imputed import Pair, frozen_values, recorded_z
from ablation.checks.observe import WITH_VALUE_PROJECTION, spoil_values
from ablation.checks.protocol import IMPUTATIONS, Factory
from ablation.heads import AttentionLayer, find_heads

LONG_PROMPT = 70
"""Tokens of a long prompt: more than 64."""


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
    "oracle.channel_mean",
    "Channel-mean imputation of a head gives, up to rounding, the logits of the bare model whose W_O receives, in each "
    "channel of the head, the mean of this channel over the tokens of the prompt, as a constant.",
    cases=CaseSpec(imputations=("channel-mean",), max_heads=4),
    needs=("channel-mean", "single_forward"),
)
def channel_mean(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)


@check(
    "oracle.scale",
    "Scaling a head gives, up to rounding, the logits of the bare model after the weights of W_O that read the head "
    "are multiplied by the factor; the factor 1 changes no logit, bit for bit.",
    cases=CaseSpec(imputations=("scale",), max_rows=3, ragged=True, max_heads=4),
    needs=("scale",),
)
def scale(factory: Factory, case: Case) -> None:
    for factor in (case.factor, "0"):
        _assert_equals_surgery(factory, replace(case, imputation=f"scale:{factor}"))
    _assert_identity(factory, replace(case, imputation="scale:1"), "scaled by 1")


@check(
    "oracle.values",
    "Imputation by given values gives, up to rounding, the logits of the bare model whose W_O receives these values in "
    "place of the head's z: the same for all tokens, or those of the token's position.",
    cases=CaseSpec(imputations=("values",), max_rows=3, ragged=True, max_heads=4),
    needs=("values",),
)
def values(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)


@check(
    "oracle.reference_mean",
    "Imputation by the mean of a reference gives, up to rounding, the logits of the bare model whose W_O receives, in "
    "each channel of the head, the mean of this channel over all real tokens of the reference, as a constant.",
    cases=CaseSpec(imputations=("reference-mean",), max_rows=3, ragged=True, max_heads=4),
    needs=("reference-mean",),
)
def reference_mean(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)


@check(
    "oracle.reference_by_position",
    "Imputation by the means of a reference by position gives, up to rounding, the logits of the bare model whose W_O "
    "receives, at each token, the mean over the reference's tokens at the same position; if the reference is the "
    "prompt itself, these are the logits of the clean run.",
    cases=CaseSpec(imputations=("reference-mean-by-position",), max_rows=3, ragged=True, max_heads=4),
    needs=("reference-mean-by-position",),
)
def reference_by_position(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)
    alone = replace(case, rows=case.rows[:1])
    with made(factory, alone.model()) as implementation:
        clean = implementation.run(**alone.inputs()).clone()
        ablate(implementation, alone, reference=alone.batches([[alone.rows[0]]]))
        got = implementation.run(**alone.inputs())
    assert_close(got, clean, "the logits with the prompt itself as the reference, against those of the clean run")


@check(
    "oracle.resample",
    "Resampling a head gives, up to rounding, the logits of the bare model whose W_O receives, in each row, the z of "
    "the head in the same row of the reference, at the same tokens; if the reference is the prompt itself, these are "
    "the logits of the clean run, bit for bit.",
    cases=CaseSpec(imputations=("resample",), max_rows=3, ragged=True, max_heads=4),
    needs=("resample",),
)
def resample(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, case)
    alone = replace(case, rows=case.rows[:1])  # an implementation may run the rows of a reference one by one
    _assert_identity(
        factory, alone, "with the prompt itself as the reference", reference=alone.batches([[*alone.rows]])
    )


@check(
    "oracle.long_prompt",
    "With a prompt of more than 64 tokens, an ablation gives, up to rounding, the logits of the bare model after the "
    "ablation is written into its weights.",
    cases=CaseSpec(imputations=tuple(IMPUTATIONS), dtypes=("float32",)),
)
def long_prompt(factory: Factory, case: Case) -> None:
    _assert_equals_surgery(factory, with_long_prompt(case))


def with_long_prompt(case: Case) -> Case:
    """Return a case with a row of LONG_PROMPT tokens."""
    size = case.decoder.vocabulary
    row = tuple((token + number) % size for number in range(LONG_PROMPT) for token in case.rows[0])[:LONG_PROMPT]
    return replace(case, rows=(row,))


def _assert_equals_surgery(factory: Factory, case: Case) -> None:
    what = "the logits, against those of the ablation written into W_O and its bias"
    real = case.replaced()  # of each row; the logits of padding mean nothing
    assert_close(ablated_logits(factory, case)[real], expected_logits(case)[real], what)


def _assert_identity(factory: Factory, case: Case, when: str, **changes: Any) -> None:
    """Assert that an ablation changes no logit. changes: to the keyword arguments of `ablate`."""
    real = case.replaced()
    with made(factory, case.model()) as implementation:
        clean = implementation.run(**case.inputs()).clone()
        ablate(implementation, case, **changes)
        got = implementation.run(**case.inputs())
    assert_equals_bare(factory, got[real], clean[real], f"the logits {when}, against those of the clean run,")


@lru_cache(maxsize=256)
def expected_logits(case: Case) -> Tensor:
    """Return the logits that an ablation should give, as `surgery_logits` does. Logits of equal cases are kept."""
    return surgery_logits(case)


def surgery_logits(case: Case, values: Mapping[Pair, Tensor] | None = None) -> Tensor:
    """Return the logits that an ablation should give, computed by surgery on the weights of a model, which is undone.

    Means of the row are measured layer by layer, since the z of a head depends on the heads that are ablated in lower
    layers. Values that differ between rows or tokens do not go into the weights: a hook adds what W_O makes of them.

    values: what replaces the z of each head, float64 [rows, tokens, head_dim], if that is known.
    """
    model, inputs = case.model(), case.inputs()
    found = find_heads(model)
    replacing = dict(frozen_values(case, model) if values is None else values)
    with ExitStack() as undo:
        for index, group in groupby(sorted(case.heads), key=itemgetter(0)):
            heads, layer = [head for _, head in group], found.layer(index)
            undo.enter_context(_restored(layer.projection))
            if case.kind == "scale":
                with torch.no_grad():
                    for head in heads:
                        w_o_block(layer, head).mul_(float(case.factor))
                continue
            if case.reads_row and values is None:
                z = recorded_z(model, inputs)[index]
                replacing |= {(index, head): row_means(case, z[:, :, head]) for head in heads}
            pairs = [(index, head) for head in heads]
            here = {} if case.kind == "zero" else {pair: replacing[pair] for pair in pairs}
            if all((each == each[:1, :1]).all() for each in here.values()):
                apply_surgery(model, pairs, {pair: each[0, 0] for pair, each in here.items()} or None)
                continue
            for pair, each in here.items():
                undo.callback(_add_to_output(layer, pair[1], each))
            apply_surgery(model, pairs)
        return run(model, inputs)


@contextmanager
def _restored(projection: Any) -> Iterator[None]:
    """Context manager: restore the weight and the bias of a projection, of which a real model has one copy."""
    weight, bias = projection.weight.detach().clone(), projection.bias
    try:
        yield
    finally:
        with torch.no_grad():
            projection.weight.copy_(weight)
        projection.bias = bias


def row_means(case: Case, z: Tensor) -> Tensor:
    """Return what replaces the z of a head under an imputation that reads the row, float64 of the shape of z.

    z: [rows, tokens, head_dim]. The mean is over the real tokens of each row, and with `mean` over the channels, too.
    """
    means = torch.stack(
        [
            of_row[real].double().mean(dim=0)
            for of_row, real in zip(z, case.inputs()["attention_mask"].bool(), strict=True)
        ]
    )  # [rows, head_dim]
    if case.kind == "mean":
        means = means.mean(dim=-1, keepdim=True)
    return means[:, None].expand(z.shape)


def _add_to_output(layer: AttentionLayer, head: int, values: Tensor) -> Callable[[], None]:
    """Let the projection add what W_O makes of values of one head, [rows, tokens, head_dim]. Returns how to undo it."""
    block = w_o_block(layer, head).detach()
    added = values.to(block.dtype) @ block  # before the surgery
    return layer.projection.register_forward_hook(lambda module, args, output: output + added).remove


def apply_surgery(
    model: PreTrainedModel, heads: Iterable[Pair], constants: Mapping[Pair, Tensor] | None = None
) -> None:
    """Write an ablation into the weights of a model, in place.

    The block of W_O that reads an ablated head becomes 0. constants: {(layer, head): what replaces z, [head_dim]};
    their product with the block is added to the projection's bias.
    """
    found = find_heads(model)
    with torch.no_grad():
        for index, head in heads:
            projection, block = found.layer(index).projection, w_o_block(found.layer(index), head)
            if constants is not None:
                constant = (constants[index, head] @ block.double()).to(block.dtype)
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
    # Values are given for the index of a head.
    cases=CaseSpec(imputations=tuple(IMPUTATIONS), without=("values",), families=("gpt2",)),
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
