"""Every causal-LM family of transformers, as a tiny random model: supported, or refused for a reason of its own.

python -m tests.families --write    makes the page tests/families.md and the number in the README

What a head is, is not taken from `ablation.heads` but seen from outside: see `Witness`.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ablation.checks.assertions import assert_close
from ablation.checks.decoders import randomised
from ablation.checks.oracles import w_o_block
from ablation.errors import AblationNotApplied, UnsupportedModel
from ablation.heads import AttentionLayer, HeadMap, find_heads
from ablation.hook import HeadAblation
from ablation.sweeps import sweep, sweep_sequential
from tests.test_sweep import ATOL, assert_equal

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = Path(__file__).with_suffix(".md")
README = Path(__file__).parent.parent / "README.md"
IDS = [3, 17, 4, 29, 5, 11]

# Refused, and a part of the reason. A family that is named neither here nor below has to be supported.
STATE_SPACE = "no attention heads: none of its layers has an attention"
NO_LINEAR = "has 0 attention output projections that are Linear or Conv1D"
REFUSED = {
    "blt": "BltForCausalLM has no text decoder of its own, only parts with attention: local_encoder.layers,",
    "cpmant": "attention_out was given (4, 38, 64), not [4 rows, 6 tokens",  # 32 tokens of its own before the prompt
    "deepseek_v4": NO_LINEAR,  # W_O is a product of two, the first in groups of heads
    "diffllama": "subtracts heads from each other before W_O",
    "dory": "model.layers.1.self_attn.o_proj was called 2 times in one forward",  # it runs layers in a loop
    "falcon_mamba": STATE_SPACE,
    "hrm_text": "2 lists of layers with attention (L_module.layers, H_module.layers)",  # each run several times
    "jetmoe": NO_LINEAR,  # W_O is a mixture of experts
    "longcat_flash": "has 2 attention output projections",  # two attentions a layer
    "mamba": STATE_SPACE,
    "mamba2": STATE_SPACE,
    "prophetnet": "was given 4 dimensions, not [rows, tokens, channels]",  # a z for each future token
    "rwkv": "(RwkvSelfAttention) says neither how many heads it has nor how wide",  # a recurrence of that name
    "xlnet": NO_LINEAR,  # W_O is a parameter of an einsum
    "xlstm": STATE_SPACE,
}

# Not to be built here from a small configuration, or not to be run on a prompt alone, and a part of the reason.
NOT_BUILT = {
    "gemma3n": "requires the timm library",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",  # its default configuration is invalid
    "gemma4_unified_assistant": "shared_kv_states cannot be None",  # reads the keys of another model
    "musicgen": "'MusicgenConfig' object has no attribute 'dropout'",  # the class takes another configuration
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute 'dropout'",
}

# ---- tiny configurations

LAYERS, HEADS = 3, 4  # fewer layers than heads: a grid that is not square

# What an attribute of that name becomes, in any configuration that has it. The width of a head is not hidden / heads
# where a family can choose, key/value heads are fewer than heads, and a sparse attention sees less than the prompt.
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
    **{"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False},
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

# What a family needs otherwise.
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
    """A small configuration of that class, that has every kind of layer that its default has."""
    default = config_class()
    given = {name: value for name, value in default.to_dict().items() if name not in default.sub_configs}
    depth = next((given[name] for name in DEPTHS if isinstance(given.get(name), int)), None)
    by_layer = {name: v for name, v in given.items() if isinstance(v, list) and v and len(v) == depth}
    kinds = {name: list(dict.fromkeys(v)) for name, v in by_layer.items() if isinstance(v[0], str)}
    layers = max([LAYERS, *map(len, kinds.values())])
    small = {name: SIZES[name] for name in given if name in SIZES}
    small |= {name: layers for name in DEPTHS if name in given}
    small |= {name: (kinds[name] * layers if name in kinds else values)[:layers] for name, values in by_layer.items()}
    if "qk_rope_head_dim" in given:  # MLA: no groups, and `head_dim` is that of the rotary part
        small |= {name: v for name, v in {"num_key_value_heads": HEADS, "head_dim": 8}.items() if name in given}
    for name in default.sub_configs:
        if isinstance(part := getattr(default, name, None), PretrainedConfig):
            small[name] = tiny(type(part), **special.pop(name, {}))
    return config_class(**small | special)


def config_of(family: str) -> PretrainedConfig:
    """The tiny configuration of a family."""
    return tiny(CONFIG_MAPPING[family], **SPECIAL.get(family, {}))


def build(family: str) -> PreTrainedModel:
    """A tiny model of that family, all its weights random. Raises whatever transformers raises where it cannot."""
    return randomised(config_of(family), seed=1, attention=None)


# ---- what a head is, seen from outside


class Witness(TorchFunctionMode):
    """Sees attention where it happens: weights [rows, heads, tokens, keys] from a softmax, or a fused attention's z.

    heads: for each layer, the number of heads of each attention that ran in it. boost: (layer, head) whose weights or
    z it doubles, which must show at the projection in that head's channels, and nowhere else.
    """

    SEEN = (F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax, torch.exp)  # exp: Reformer's

    def __init__(self, blocks: Sequence[nn.Module], boost: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.blocks, self.boost = blocks, boost
        self.heads: dict[int, list[int]] = {index: [] for index in range(len(blocks))}
        self.layer: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.layer is None or func not in self.SEEN or out.ndim not in (3, 4) or out.shape[-2] != len(IDS):
            return out
        keys = out.shape[-1]
        if (func is torch.exp and keys != len(IDS)) or (func is not F.scaled_dot_product_attention and keys < len(IDS)):
            return out  # no weights of keys
        self.heads[self.layer].append(out.shape[-3])
        if self.boost is not None and self.boost[0] == self.layer:
            out = out.clone()
            out[..., self.boost[1], :, :] *= 2
        return out

    def run(self, model: PreTrainedModel) -> None:
        """One forward of the model, under its eyes."""

        def enter(index: int) -> Any:
            return lambda *_: setattr(self, "layer", index)

        with ExitStack() as hooks, self:
            for index, block in enumerate(self.blocks):
                hooks.callback(block.register_forward_pre_hook(enter(index)).remove)
                hooks.callback(block.register_forward_hook(lambda *_: setattr(self, "layer", None)).remove)
            logits(model)


def logits(model: PreTrainedModel) -> Tensor:
    """[1, tokens, vocabulary]"""
    with torch.no_grad():
        out: Tensor = model(torch.tensor([IDS]), use_cache=False).logits
    return out


@contextmanager
def recorded_inputs(heads: HeadMap) -> Iterator[dict[int, Tensor]]:
    """What the projection of each layer is given, [1, tokens, channels]."""
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        return lambda _, args, kwargs: seen.update({index: next(iter((*args, *kwargs.values())))})

    with ExitStack() as hooks:
        for layer in heads.layers:
            hooks.callback(layer.projection.register_forward_pre_hook(keep(layer.index), with_kwargs=True).remove)
        yield seen


def blocks_of(model: PreTrainedModel, heads: HeadMap) -> Sequence[nn.Module]:
    """All decoder layers, also those without heads."""
    lists = (m for m in heads.decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == heads.num_layers)
    return next(m for m in lists if heads.layers[0].block is m[heads.layers[0].index])


def check_heads(model: PreTrainedModel, heads: HeadMap) -> bool:
    """Assert that the heads found are those that attend. Returns whether each head's channels are its own.

    They are not where something between the heads and the projection mixes them, as a norm over all of them does.
    """
    blocks = blocks_of(model, heads)
    seen = Witness(blocks)
    with recorded_inputs(heads) as clean:
        seen.run(model)
    found = {layer.index: layer.num_heads for layer in heads.layers}
    for index, counts in seen.heads.items():
        assert set(counts) == {found[index]} - {None} if index in found else not counts, (
            f"layer {index}: {found.get(index, 'no')} heads were found, but {counts or 'none'} attend"
        )
    own = True
    for layer in heads.layers:
        for head in range(layer.num_heads):
            with recorded_inputs(heads) as boosted:
                Witness(blocks, (layer.index, head)).run(model)
            changed = (boosted[layer.index] != clean[layer.index]).any(dim=(0, 1)).unflatten(-1, (layer.num_heads, -1))
            which = changed.any(dim=-1).nonzero().flatten().tolist()
            if which == list(range(layer.num_heads)) and layer.num_heads > 1:
                own = False
            else:
                assert which == [head], f"layer {layer.index}: head {head} writes to the channels of heads {which}"
    return own


# ---- outcomes


@dataclass(frozen=True)
class Outcome:
    """What became of a family. what: supported, refused or not built. note: the heads, or the reason."""

    family: str
    model: str
    what: str
    note: str
    sweep: str = ""
    z: str = ""


def outcome(family: str) -> Outcome:
    """Build a family and check all that is claimed of it. Raises AssertionError where it is silently wrong."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    try:
        model = build(family)
    except Exception as error:  # whatever transformers raises
        return Outcome(family, name, "not built", one_line(error))
    try:
        heads = find_heads(model)
    except UnsupportedModel as error:
        return Outcome(family, name, "refused", one_line(error))
    try:
        logits(model)
    except Exception as error:
        return Outcome(family, name, "not built", one_line(error))
    try:
        check_zero_oracle(model, heads)
        how = check_sweeps(model, heads)
    except (UnsupportedModel, AblationNotApplied) as error:
        return Outcome(family, name, "refused", one_line(error))
    own = check_heads(model, heads)
    return Outcome(family, name, "supported", described(heads), how, "its own" if own else "mixed")


def check_zero_oracle(model: PreTrainedModel, heads: HeadMap) -> None:
    """Assert for every head that zeroing it is zeroing its block of W_O, and that this has an effect."""
    for layer in heads.layers:  # where layers share weights, surgery on one must not reach the others
        layer.projection.weight = nn.Parameter(layer.projection.weight.clone())
    clean = logits(model)
    for layer in heads.layers:
        for head in range(layer.num_heads):
            with HeadAblation(model) as ablation:
                ablation.ablate([(layer.index, head)], "zero")
                ablated = logits(model)
            block = w_o_block(layer, head)
            with torch.no_grad():
                before = block.clone()
                block.zero_()
                without = logits(model)
                block.copy_(before)
            assert_close(ablated, without, f"the logits without layer {layer.index}, head {head}")
            assert not torch.equal(ablated, clean), f"layer {layer.index}, head {head} has no effect"


def check_sweeps(model: PreTrainedModel, heads: HeadMap) -> str:
    """Assert that the sweep equals the double loop, with every receipt. Returns how it went."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        swept = sweep(model, IDS)
    assert_equal(swept, sweep_sequential(model, IDS), ATOL["float32"] * max(1.0, float(logits(model).abs().max())))
    for layer in range(heads.num_layers):
        for head in range(heads.shape[1]):
            here = (layer, head) in set(heads)
            head_dim = heads.layer(layer).head_dim if here else 0
            assert (swept.calls[:, layer, head] == (1 if here else -1)).all()
            assert (swept.replaced[:, layer, head] == (len(IDS) * head_dim if here else -1)).all()
            assert (np.isnan(swept.margin[:, layer, head]) != here).all()
    method = swept.provenance["method"]
    fell_back = [str(note.message) for note in notes if "growing batch" in str(note.message)]
    assert bool(fell_back) == (method == "sequential")
    return "grows" if method == "growing batch" else f"one by one: {one_line(swept.provenance['reason'])}"


def described(heads: HeadMap) -> str:
    """Layers and heads in a few words."""

    def one(layer: AttentionLayer) -> str:
        return f"{layer.num_heads}/{layer.key_value_heads} x {layer.head_dim}"

    without = heads.num_layers - len(heads.layers)
    kinds = ", ".join(dict.fromkeys(map(one, heads.layers)))
    return (
        f"{len(heads.layers)} of {heads.num_layers} layers: {kinds}"
        if without
        else f"{heads.num_layers} layers: {kinds}"
    )


def one_line(message: object) -> str:
    """A message in one line of a table."""
    text = " ".join(str(message).replace("|", " ").split())
    return text if len(text) <= 150 else f"{text[:150]}..."


# ---- the page


def page(outcomes: Sequence[Outcome]) -> str:
    """The table of all families."""
    made = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
    lines = [
        "# Every causal-LM family of transformers",
        "",
        f"{summary(outcomes)}.",
        "Supported: all heads of a tiny random model pass the zero oracle, they are those that are seen to attend, and",
        "its sweep equals the double loop. Every other is refused, with the reason.",
        "",
        f"Made by `python -m tests.families --write` with {made}; `pytest -m families` tests it.",
        "",
        "- heads: decoder layers, query/key-value heads x width, of a tiny model that has every kind of layer.",
        "- sweep: whether its batch grows, or it runs one by one, and why.",
        "- z: whether a head's channels at the projection's input are its own (gated or not), or mixed with those of",
        "  others, as by a norm over all of them. What is ablated is what the projection is given.",
        "",
        "| family | model | outcome | heads, or reason | sweep | z |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {o.family} | {o.model} | {o.what} | {o.note} | {o.sweep} | {o.z} |" for o in outcomes]
    return "\n".join(lines) + "\n"


def summary(outcomes: Sequence[Outcome]) -> str:
    """The number of families that are supported, of those that can be built here."""
    built = [o for o in outcomes if o.what != "not built"]
    supported = sum(o.what == "supported" for o in built)
    version = VERSIONS["transformers"]
    return (
        f"{supported} of the {len(built)} causal-LM families of transformers {version} that can be built are supported"
    )


VERSIONS = {"transformers": transformers.__version__, "torch": torch.__version__}
MARKS = "<!-- families -->{}<!-- /families -->"


def main() -> None:
    """Check all families and print the table; with --write, into the page, and the number into the README."""
    parser = argparse.ArgumentParser(description="Check every causal-LM family of transformers.")
    parser.add_argument("--write", action="store_true", help="write tests/families.md and the number in the README")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    outcomes = []
    for family in FAMILIES:
        print(family, file=sys.stderr)
        outcomes.append(outcome(family))
    if not write:
        print(page(outcomes), end="")
        return
    PAGE.write_text(page(outcomes), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    marked = re.sub(MARKS.format(".*?"), MARKS.format(summary(outcomes)), text, flags=re.DOTALL)
    README.write_text(marked, encoding="utf-8")


if __name__ == "__main__":
    main()
