"""The values that replace z in a case, computed from runs of the bare model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.cases import Case, token_positions
from ablation.checks.driving import run
from ablation.checks.observe import recorded_inputs
from ablation.checks.protocol import KEYWORDS
from ablation.heads import find_heads

Pair = tuple[int, int]


def frozen_values(case: Case, model: PreTrainedModel) -> dict[Pair, Tensor]:
    """Return what replaces z in each head of a case, float64 [rows, tokens, head_dim].

    Empty for imputations whose values depend on the run, and for those of the implementation's own. model: a bare
    model, on which the reference is run. In padding, the values mean nothing.
    """
    if case.kind not in KEYWORDS:
        return {}
    positions: Tensor = case.inputs()["position_ids"]
    if case.kind == "values":
        of_heads: Mapping[Pair, Tensor] = case.values()
    elif case.kind == "resample":
        (batch,) = case.reference()
        z = recorded_z(model, batch)
        return {(layer, head): z[layer][:, :, head].double() for layer, head in case.heads}
    else:
        mean = _mean_by_position if case.kind == "reference-mean-by-position" else _mean
        z_of_prompts = recorded_prompts(model, case.reference())
        of_heads = {pair: mean([z[pair[0]][:, pair[1]].double() for z in z_of_prompts]) for pair in case.heads}
    return {
        pair: of_heads[pair].double()[positions]
        if of_heads[pair].ndim == 2
        else of_heads[pair].double().expand(*positions.shape, -1)
        for pair in case.heads
    }


def _mean(prompts: Sequence[Tensor]) -> Tensor:
    """Return the mean over the tokens of all prompts, [tokens, head_dim] each -> [head_dim]."""
    return torch.cat(list(prompts)).mean(dim=0)


def _mean_by_position(prompts: Sequence[Tensor]) -> Tensor:
    """Return the means over the prompts that have a token at each position, [positions, head_dim]."""
    longest = max(map(len, prompts))
    return torch.stack([torch.stack([z[at] for z in prompts if len(z) > at]).mean(dim=0) for at in range(longest)])


def recorded_z(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[int, Tensor]:
    """Return the z of a run of the bare model, {layer: [rows, tokens, num_heads, head_dim]}."""
    with recorded_inputs(model) as calls:
        run(model, {**inputs, "position_ids": token_positions(inputs["attention_mask"])})
    return {
        layer.index: calls[layer.index][0].unflatten(-1, (layer.num_heads, layer.head_dim))
        for layer in find_heads(model).layers
    }


def recorded_prompts(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[int, Tensor]]:
    """Return the z of each prompt of a reference, run alone and without padding, {layer: [tokens, num_heads, dim]}."""
    runs = (recorded_z(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for ids in prompts(batches))
    return [{layer: z[0] for layer, z in of_layers.items()} for of_layers in runs]


def prompts(batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return the real tokens of each row of some batches, [1, tokens]."""
    return [
        ids[None, real.bool()]
        for batch in batches
        for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
