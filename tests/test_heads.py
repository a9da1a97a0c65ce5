"""Where the heads of a model are, and which models are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)
from transformers.pytorch_utils import Conv1D

from ablation.checks.decoders import Decoder
from ablation.errors import UnsupportedModel
from ablation.heads import find_heads


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (Decoder("gpt2", 3, 4, 2), "transformer.h.1.attn.c_proj"),
        (Decoder("llama", 3, 4, 2, num_key_value_groups=2), "model.layers.1.self_attn.o_proj"),
        (Decoder("gemma3", 3, 4, 6, num_key_value_groups=2), "model.layers.1.self_attn.o_proj"),
        (Decoder("gpt_neox", 3, 4, 2), "gpt_neox.layers.1.attention.dense"),
        (Decoder("opt", 3, 4, 2), "model.decoder.layers.1.self_attn.out_proj"),
    ],
)
def test_heads_are_query_heads_at_the_output_projection(decoder: Decoder, name: str) -> None:
    model = decoder.shared()
    heads = find_heads(model)
    assert heads.shape == (3, 4)
    assert list(heads) == [(layer, head) for layer in range(3) for head in range(4)]
    layer = heads.layers[1]
    assert (layer.index, layer.projection_name, layer.head_dim) == (1, name, decoder.head_dim)
    assert layer.projection is model.get_submodule(name)
    assert layer.channels(3) == slice(3 * decoder.head_dim, 4 * decoder.head_dim)


def from_config(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


def test_head_dim_is_what_the_projection_reads() -> None:
    """With latent attention, `config.head_dim` is another number: the channels that hold rotary positions."""
    latent: dict[str, Any] = dict(
        q_lora_rank=None, kv_lora_rank=4, qk_rope_head_dim=2, qk_nope_head_dim=4, v_head_dim=6
    )
    config = DeepseekV3Config(**SMALL, num_attention_heads=2, num_key_value_heads=2, intermediate_size=8, **latent)
    assert config.head_dim != 6
    layer = find_heads(from_config(config)).layers[1]
    assert (layer.num_heads, layer.head_dim) == (2, 6) and layer.channels(1) == slice(6, 12)


def described(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """(query heads, key/value heads, head_dim) of each layer."""
    found = [(layer.num_heads, layer.key_value_heads, layer.head_dim) for layer in find_heads(model).layers]
    assert all(type(number) is int for layer in found for number in layer)
    return found


def test_attention_attributes_override_config() -> None:
    """In BERT `attention.self` knows the heads, and the projection is `attention.output.dense`."""
    small: dict[str, Any] = dict(num_attention_heads=4, intermediate_size=8, is_decoder=True)
    model = from_config(BertConfig(**SMALL, **small))
    model.config.num_attention_heads = 2
    assert described(model) == [(4, 4, 2)] * 2


def test_missing_head_count_or_head_dim_is_derived() -> None:
    whole = [(3, 3, 2)] * 2
    model = Decoder("llama", 2, 3, 2).fresh()
    for layer in model.model.layers:  # the number of heads is in the configuration only
        del layer.self_attn.head_dim
    assert described(model) == whole
    model = Decoder("llama", 2, 3, 2).fresh()
    vars(model.config)["num_attention_heads"] = None  # bypasses validation, as in a configuration without the attribute
    assert described(model) == whole
    for layer in model.model.layers:
        del layer.self_attn.head_dim
    with pytest.raises(UnsupportedModel, match=r"layer 0 \(LlamaAttention\) states neither its number of heads"):
        find_heads(model)


@pytest.mark.parametrize("number", ["num_key_value_heads", "num_kv_heads"])
def test_key_value_heads_follow_groups_or_count(number: str) -> None:
    model = Decoder("llama", 2, 6, 2, num_key_value_groups=3).fresh()
    assert described(model) == [(6, 2, 2)] * 2
    for layer in model.model.layers:
        del layer.self_attn.num_key_value_groups
        setattr(layer.self_attn, number, 2)
    assert described(model) == [(6, 2, 2)] * 2


def test_conv1d_channels_are_its_inputs() -> None:
    model = fresh_gpt2()
    for block in model.transformer.h:
        block.attn.c_proj, block.attn.head_dim = Conv1D(nf=6, nx=12), 4
    assert described(model) == [(3, 3, 4)] * 2


def shared() -> PreTrainedModel:
    model = fresh_gpt2()
    model.transformer.h[1].attn.c_proj = model.transformer.h[0].attn.c_proj
    return model


def mixed() -> PreTrainedModel:
    """A model whose second layer has smaller heads, but as many of them as the configuration says."""
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


def unknown_attention() -> PreTrainedModel:
    """A model with a layer that has attention by its configuration, but not by the class of any module."""
    model = Decoder("qwen3", 2, 3, 2).fresh()
    assert model.config.layer_types == ["full_attention"] * 2
    model.model.layers[1].self_attn = nn.Identity()
    return model


def linear_by_name() -> PreTrainedModel:
    """A model with linear attention by its configuration, in modules whose class is called an attention."""
    model = Decoder("qwen3", 2, 3, 2).fresh()
    model.config.layer_types = ["linear_attention"] * 2
    return model


def with_vision() -> PreTrainedModel:
    """A model with a second part, whose attention has a configuration of another class, as in vision models."""
    model = fresh_gpt2()
    model.transformer.vision = Decoder("llama", 3, 4, 2).fresh().model
    return model


def two_texts() -> PreTrainedModel:
    model: Any = with_vision()
    layers: Any = copy.deepcopy(model.transformer.h)
    model.transformer.inner = nn.ModuleDict({"more": layers})
    return model


def no_text() -> PreTrainedModel:
    model = fresh_gpt2()
    model.transformer.config = LlamaConfig()
    return model


def test_find_heads_picks_the_text_decoder() -> None:
    model: Any = with_vision()
    heads = find_heads(model)
    assert heads.shape == (2, 3) and heads.decoder is model.transformer
    model.get_decoder = lambda: model.lm_head  # some models call their unembedding `decoder`
    assert find_heads(model).decoder is model.transformer


@pytest.mark.parametrize("name", ["dense", "linear"])
def test_projection_may_be_wrapped_beside_cross_attention(name: str) -> None:
    class CrossAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_proj = Conv1D(nf=6, nx=6)

    model = fresh_gpt2()
    for block in model.transformer.h:
        block.attn.c_proj = nn.ModuleDict({name: block.attn.c_proj})
        block.other = CrossAttention()
    assert [layer.projection_name for layer in find_heads(model).layers] == [
        f"transformer.h.{i}.attn.c_proj.{name}" for i in (0, 1)
    ]


def fresh_gpt2() -> PreTrainedModel:
    return from_config(Decoder("gpt2", 2, 3, 2).shared().config)


SMALL: dict[str, Any] = dict(
    vocab_size=9, hidden_size=8, num_hidden_layers=2, bos_token_id=None, eos_token_id=None, pad_token_id=None
)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: from_config(MambaConfig(**SMALL)), "^MambaForCausalLM has no attention heads"),
        (lambda: from_config(Qwen3NextConfig(**SMALL, num_experts=2)), "^Qwen3NextForCausalLM has no attention heads"),
        (
            lambda: from_config(BloomConfig(**SMALL, n_head=2, pretraining_tp=2, slow_but_exact=True)),
            "^Bloom.* does not call its projections",
        ),
        (mixed, r"layer 1 \(LlamaAttention\): its projection takes 12 channels, which are not 3 heads of 2"),
        (
            lambda: from_config(DiffLlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)),
            r"layer 0 \(DiffLlama\w*Attention\) subtracts heads from each other",
        ),
        (two_texts, r"^GPT2LMHeadModel has 2 lists of layers with attention \(h, inner.more\), not one decoder$"),
        (no_text, "^GPT2LMHeadModel has attention only outside a text decoder: h$"),
        (shared, "^GPT2LMHeadModel shares one projection"),
        (compiled_block, "^GPT2Attention is compiled"),
        (lambda: torch.compile(fresh_gpt2(), backend="eager"), "pass the original model"),
        (renamed, r"^layer 1 \(GPT2Block\) has 0 attention output projections .*; exactly one can be ablated$"),
        (linear_by_name, "^Qwen3ForCausalLM has no attention heads"),
        (unknown_attention, "layer 1 .* has 0 attention output projections"),
        (lambda: nn.Linear(2, 2), "Linear is not a transformers model"),
    ],
    ids=[
        "state space",
        "linear attention only",
        "bypassed",
        "mixed",
        "differential",
        "two texts",
        "no text",
        "shared",
        "compiled block",
        "compiled model",
        "unknown name",
        "linear by name",
        "unknown attention",
        "a module",
    ],
)
def test_unsupported_model_is_refused_with_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        find_heads(make())


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(**SMALL, n_head=2, pretraining_tp=2, slow_but_exact=False),
        BloomConfig(**SMALL, n_head=2, pretraining_tp=1, slow_but_exact=True),
        LlamaConfig(**SMALL, num_attention_heads=2, intermediate_size=8, pretraining_tp=2),
        GPT2Config(**SMALL | {"n_head": 2, "slow_but_exact": True}),
    ],
    ids=["fast path", "one slice", "no slow path", "no slices"],
)
def test_model_that_calls_its_projections_is_supported(config: Any) -> None:
    assert find_heads(from_config(config)).shape == (2, 2)
