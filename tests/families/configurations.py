"""A tiny model of every causal-LM family of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ablation.checks.decoders import randomised

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IDS = [3, 17, 4, 29, 5, 11]

LAYERS, HEADS = 3, 4  # fewer layers than heads: a grid that is not square

# The value of each attribute, in every configuration that has it. If a family can choose, head_dim is not hidden /
# heads, there are fewer key/value heads than query heads, and a sparse attention sees less than the prompt.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_query_groups"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "dim_head"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dff", "dim_ff", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "encoder_layers"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "zero_expert_num", "num_encoder_layers"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "pronunciation_vocab_size", "shape_vocab_size"), 41),
    "encoder_hash_byte_group_vocab": 41,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("embedding_size", "pronunciation_embed_dim", "shape_embed_dim"), 16),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "adapter_rank"), 16),
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16},
    **{"v_head_dim": 12, "hidden_size_per_layer_input": 8, "rotary_dim": 4, "router_hidden_size": 16},
    **{"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4, "sliding_window": 3, "attention_chunk_size": 3},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4, "hc_lowrank": 8},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_head_dim": 8},
    **{"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 4},
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4},
    **{"state_size": 8, "time_step_rank": 4, "mamba_dt_rank": 4, "lru_width": 32, "audio_vocab_size": 41},
    **{"is_decoder": True, "causal": True, "is_encoder_decoder": False, "add_cross_attention": False},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)

# Attributes that a family needs besides, or with another value.
CONV, LINEAR, FULL, HYBRID = "conv", "linear_attention", "full_attention", "hybrid"
DOTS3 = {"swa_num_attention_heads": 6, "swa_num_key_value_heads": 6, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16}
DOTS3 |= {"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
INDEXER |= {"indexer_budget": 4, "indexer_compress_ratio": 2}
SWA = {"swa_num_attention_heads": 6, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": [LINEAR, HYBRID, LINEAR, HYBRID]}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {f"{part}_config": {"head_dim": 8} for part in ("patcher", "encoder", "decoder", "global")},
    "cohere_compass_text": {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "dory": {  # an attention and an MLP count as two layers
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", FULL, "mlp", "sliding_attention", "mlp"],
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 2),
    },
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 1}},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL, LINEAR]},
    "helium": {"head_dim": 8},
    "inkling_text": SWA,
    "inkling2_text": SWA,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 6, 4]},
    "lfm2": {"layer_types": [CONV, FULL, CONV]},
    "lfm2_moe": {"layer_types": [CONV, FULL, CONV]},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "attention_head_size": 8,
        "attn_layers": ["local"] * LAYERS,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
}


def tiny(config_class: type[PretrainedConfig], **special: Any) -> PretrainedConfig:
    """Return a small configuration of that class, with every layer type of its default."""
    default = config_class()
    given = {name: value for name, value in default.to_dict().items() if name not in default.sub_configs}
    depth = next((given[name] for name in DEPTHS if isinstance(given.get(name), int)), None)
    by_layer = {name: v for name, v in given.items() if isinstance(v, list) and v and len(v) == depth}
    layer_types = {name: list(dict.fromkeys(v)) for name, v in by_layer.items() if isinstance(v[0], str)}
    layers = max([LAYERS, *map(len, layer_types.values())])
    small = {name: SIZES[name] for name in given if name in SIZES}
    small |= {name: layers for name in DEPTHS if name in given}
    small |= {
        name: (layer_types[name] * layers if name in layer_types else values)[:layers]
        for name, values in by_layer.items()
    }
    if "qk_rope_head_dim" in given:  # MLA has no groups, and its `head_dim` is that of the rotary part
        small |= {name: v for name, v in {"num_key_value_heads": HEADS, "head_dim": 8}.items() if name in given}
    for name in default.sub_configs:
        if isinstance(part := getattr(default, name, None), PretrainedConfig):
            small[name] = tiny(type(part), **special.pop(name, {}))
    return config_class(**small | special)


def config_of(family: str, **given: Any) -> PretrainedConfig:
    """Return the tiny configuration of a family. given: attributes with other values."""
    return tiny(CONFIG_MAPPING[family], **SPECIAL.get(family, {}) | given)


def decoder_switches(family: str) -> dict[str, bool]:
    """Return the attributes that make a decoder of a family, such as is_decoder, and that are off by default."""
    default = CONFIG_MAPPING[family]().to_dict()
    return {name: True for name in ("is_decoder", "causal") if default.get(name) is False}


def build(family: str, **given: Any) -> PreTrainedModel:
    """Return a tiny model of a family, with random weights. Raises what transformers raises if it cannot be built."""
    return randomised(config_of(family, **given), seed=1, attention=None)


def logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of the prompt IDS, [1, tokens, vocabulary]."""
    with torch.no_grad():
        out: Tensor = model(torch.tensor([IDS]), use_cache=False).logits
    return out
