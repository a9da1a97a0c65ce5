"""Chapter 6, oracles: a second, independent computation of the logits of an ablated model, by a GPT-2 in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ablation.checks.assertions import assert_close
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check
from ablation.checks.driving import ablated_logits
from ablation.checks.imputed import Pair, prompts
from ablation.checks.protocol import IMPUTATIONS, Factory

Array = Any  # a numpy array of float64
Replace = Callable[[Pair, Array], Array]
"""Takes a (layer, head) pair and its z, [tokens, head_dim], and returns what takes the place of z."""


@check(
    "oracle.numpy",
    "The logits are, up to rounding, those of a GPT-2 written in numpy that replaces the z of the ablated head by "
    "the imputed value, at the tokens where the ablation acts.",
    cases=CaseSpec(imputations=tuple(IMPUTATIONS), families=("gpt2",), positions=True),
)
def numpy_gpt2(factory: Factory, case: Case) -> None:
    model = case.model()
    imputed = _imputed(case, model)

    def replaced(pair: Pair, z: Array) -> Array:
        if pair not in case.heads:
            return z
        at = slice(None) if case.positions is None else list(case.positions)
        out = z.copy()
        out[at] = imputed(pair, z)[at]
        return out

    want = gpt2_logits(model, case.rows[0], replaced)
    got = ablated_logits(factory, case)
    assert_close(got[0], torch.from_numpy(want).to(got.dtype), "the logits, against a GPT-2 in numpy")


def _imputed(case: Case, model: PreTrainedModel) -> Replace:
    """Return the imputation of a case of one row."""
    tokens = len(case.rows[0])
    match case.kind:
        case "zero":
            return lambda pair, z: np.zeros_like(z)
        case "mean":
            return lambda pair, z: np.full_like(z, z.mean())
        case "channel-mean":
            return lambda pair, z: np.tile(z.mean(axis=0), (tokens, 1))
        case "scale":
            return lambda pair, z: z * float(case.factor)
        case "values":
            values = {pair: value.double().numpy() for pair, value in case.values().items()}
            return lambda pair, z: np.broadcast_to(values[pair], z.shape)
    listed = [_z_of(model, ids[0].tolist()) for ids in prompts(case.reference())]
    match case.kind:
        case "reference-mean":
            return lambda pair, z: np.tile(np.concatenate([of[pair] for of in listed]).mean(axis=0), (tokens, 1))
        case "reference-mean-by-position":
            return lambda pair, z: np.stack(
                [np.mean([of[pair][at] for of in listed if len(of[pair]) > at], axis=0) for at in range(tokens)]
            )
        case _:
            return lambda pair, z: listed[0][pair]


def _z_of(model: PreTrainedModel, ids: Sequence[int]) -> dict[Pair, Array]:
    """Return the z of each head in the clean run, [tokens, head_dim]."""
    found: dict[Pair, Array] = {}

    def keep(pair: Pair, z: Array) -> Array:
        found[pair] = z
        return z

    gpt2_logits(model, ids, keep)
    return found


def gpt2_logits(model: PreTrainedModel, ids: Sequence[int], replaced: Replace) -> Array:
    """Return the logits [tokens, vocabulary] of a GPT-2 in float64, with the z of some heads replaced.

    ids: the prompt. This computation shares no code with transformers.
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
            outputs.append(replaced((layer, head), z))
        x = x + linear(np.concatenate(outputs, axis=-1), f"h.{layer}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")), f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T
