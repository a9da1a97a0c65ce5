"""Where the heads are, and which models are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from ablation.checks.decoders import Decoder
from ablation.errors import UnsupportedModel
from ablation.heads import find_heads


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (Decoder("gpt2", 3, 4, 2), "transformer.h.1.attn.c_proj"),
        (Decoder("llama", 3, 4, 2, groups=2), "model.layers.1.self_attn.o_proj"),
        (Decoder("gemma3", 3, 4, 6, groups=2), "model.layers.1.self_attn.o_proj"),
        (Decoder("gpt_neox", 3, 4, 2), "gpt_neox.layers.1.attention.dense"),
        (Decoder("opt", 3, 4, 2), "model.decoder.layers.1.self_attn.out_proj"),
    ],
)
def test_heads_are_the_query_heads_at_the_attention_output_projection(decoder: Decoder, name: str) -> None:
    model = decoder.build()
    heads = find_heads(model)
    assert heads.shape == (3, 4)
    assert list(heads) == [(layer, head) for layer in range(3) for head in range(4)]
    layer = heads.layers[1]
    assert (layer.index, layer.name, layer.width) == (1, name, decoder.width)
    assert layer.projection is model.get_submodule(name)
    assert layer.channels(3) == slice(3 * decoder.width, 4 * decoder.width)


def from_config(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


def test_the_width_of_a_head_is_what_the_projection_reads() -> None:
    """Not `config.head_dim`: with latent attention, that is the width of rotary positions."""
    latent = dict(q_lora_rank=None, kv_lora_rank=4, qk_rope_head_dim=2, qk_nope_head_dim=4, v_head_dim=6)
    config = DeepseekV3Config(**SMALL, num_attention_heads=2, num_key_value_heads=2, intermediate_size=8, **latent)
    assert config.head_dim != 6
    layer = find_heads(from_config(config)).layers[1]
    assert (layer.heads, layer.width) == (2, 6) and layer.channels(1) == slice(6, 12)


def shared() -> PreTrainedModel:
    model = fresh_gpt2()
    model.transformer.h[1].attn.c_proj = model.transformer.h[0].attn.c_proj
    return model


def mixed() -> PreTrainedModel:
    """As where a layer has heads of its own number: each is narrower, and there are more."""
    model = Decoder("llama", 2, 3, 4).fresh()
    model.model.layers[1].self_attn.head_dim = 2
    return model


def compiled_block() -> PreTrainedModel:
    model = fresh_gpt2()
    model.transformer.h[1].attn.compile(backend="eager")
    return model


def renamed() -> PreTrainedModel:
    model = fresh_gpt2()
    model.transformer.h[1].attn.project = model.transformer.h[1].attn.c_proj
    del model.transformer.h[1].attn.c_proj
    return model


def fresh_gpt2() -> PreTrainedModel:
    return from_config(Decoder("gpt2", 2, 3, 2).build().config)


SMALL = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2, bos_token_id=None, eos_token_id=None, pad_token_id=None)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: from_config(MambaConfig(**SMALL)), "no attention heads"),
        (lambda: from_config(Qwen3NextConfig(**SMALL, num_experts=2)), "none of its layers has an attention"),
        (lambda: from_config(BloomConfig(**SMALL, n_head=2, pretraining_tp=2, slow_but_exact=True)), "bypasses"),
        (mixed, r"layer 1 \(LlamaAttention\): its projection takes 12 channels, which are not 3 heads of 2"),
        (
            lambda: from_config(DiffLlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)),
            "subtracts heads from each other",
        ),
        (shared, "shares one projection"),
        (compiled_block, "is compiled"),
        (lambda: torch.compile(fresh_gpt2(), backend="eager"), "pass the original"),
        (renamed, "layer 1 .* has 0 attention output projections"),
        (lambda: nn.Linear(2, 2), "Linear is not a transformers model"),
    ],
    ids=[
        "state space",
        "linear attention only",
        "bypassed",
        "mixed",
        "differential",
        "shared",
        "compiled block",
        "compiled model",
        "unknown name",
        "a module",
    ],
)
def test_a_model_whose_heads_cannot_be_ablated_honestly_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        find_heads(make())
