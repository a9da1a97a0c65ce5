"""The outcome of every family, and the page that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ablation.engine import run
from ablation.errors import AblationNotApplied, UnsupportedModel
from ablation.heads import AttentionLayer, HeadMap, find_heads
from ablation.hook import Ablation
from tests.families.configurations import IDS, build, decoder_switches, logits
from tests.families.evidence import check_heads, check_sweeps, check_zero_oracle

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
VERSIONS = {"transformers": transformers.__version__, "torch": torch.__version__}

# Families that are refused, and a part of the reason. One that is in neither table has to be supported.
STATE_SPACE = "no attention heads: no layer has an attention module"
NO_LINEAR = "has 0 attention output projections that are Linear or Conv1D"
REFUSED = {
    "blt": "BltForCausalLM has attention only outside a text decoder: local_encoder.layers,",
    "cpmant": "CpmAntForCausalLM is bidirectional, not a causal language model",  # over the prompt: a prefix model
    "deepseek_v4": NO_LINEAR,  # W_O is a product of two, the first in groups of heads
    "diffllama": "subtracts heads from each other before W_O",
    "dory": "model.layers.1.self_attn.o_proj was called 2 times in one forward",  # it runs layers in a loop
    "falcon_mamba": STATE_SPACE,
    "hrm_text": "2 lists of layers with attention (L_module.layers, H_module.layers)",  # each run several times
    "jetmoe": NO_LINEAR,  # W_O is a mixture of experts
    "longcat_flash": "has 2 attention output projections",  # two attentions per layer
    "mamba": STATE_SPACE,
    "mamba2": STATE_SPACE,
    "prophetnet": "received 4 dimensions, not [rows, tokens, channels]",  # a z for each future token
    "rwkv": "(RwkvSelfAttention) states neither its number of heads nor their size",  # a recurrence
    "xlnet": NO_LINEAR,  # W_O is a parameter of an einsum
    "xlstm": STATE_SPACE,
}

# Families that cannot be built from a small configuration, or run on a prompt alone, and a part of the reason.
NOT_BUILT = {
    "gemma3n": "requires the timm library",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",  # its default configuration is invalid
    "gemma4_unified_assistant": "shared_kv_states cannot be None",  # reads the keys of another model
    "musicgen": "'MusicgenConfig' object has no attribute 'dropout'",  # the class takes another configuration
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute 'dropout'",
}


@dataclass(frozen=True)
class Outcome:
    """What was found for a family. what: supported, refused or not built. note: the heads, or the reason."""

    family: str
    model: str
    what: str
    note: str
    sweep: str = ""
    z: str = ""


def outcome(family: str) -> Outcome:
    """Build a family and verify it. Raises AssertionError if it is silently wrong."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    try:
        model = build(family)
    except Exception as error:  # of any kind
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
    note = described(heads) + condition(family)
    return Outcome(family, name, "supported", note, one_line(how), "its own" if own else "mixed")


def condition(family: str) -> str:
    """Return what makes an encoder family a decoder, if its models are refused without that: those published are."""
    if not (switches := decoder_switches(family)):
        return ""
    try:
        run(build(family, **dict.fromkeys(switches, False)), IDS, [Ablation([])])
    except AssertionError as error:  # transformers itself refuses to build a Reformer without it
        assert "is_decoder" in str(error), error
    except UnsupportedModel as error:
        assert "is bidirectional, not a causal language model" in str(error), error
    else:
        return ""
    return f"; only with {', '.join(f'{name}={value}' for name, value in switches.items())}"


def described(heads: HeadMap) -> str:
    """Describe layers and heads in a few words."""

    def one(layer: AttentionLayer) -> str:
        return f"{layer.num_heads}/{layer.key_value_heads} x {layer.head_dim}"

    without = heads.num_layers - len(heads.layers)
    shapes = ", ".join(dict.fromkeys(map(one, heads.layers)))
    return (
        f"{len(heads.layers)} of {heads.num_layers} layers: {shapes}"
        if without
        else f"{heads.num_layers} layers: {shapes}"
    )


def one_line(message: object) -> str:
    """Return a message as one line of a table."""
    text = " ".join(str(message).replace("|", " ").split())
    return text if len(text) <= 150 else f"{text[:150]}..."


INTRODUCTION = """\
# Decoder families

{summary}; the others are refused, with the reason.

"Supported" means that the following holds in a tiny random model: zero imputation of a head gives the
logits of a model in which the weights of W_O that read the head are 0; the heads that `find_heads`
finds are those that are observed to attend; and the sweep equals the sequential sweep.

Made by `python -m tests.families --write` with {made}; `pytest -m families` verifies it.

- heads, or reason: for a supported family, the number of decoder layers with heads, and in each layer
  query heads/key-value heads x head_dim, in a tiny model with every layer type of the family; for a
  refused family, the reason. Encoder families are supported only with the setting that is named, such as
  `is_decoder=True`. Their published models lack it and are refused: later tokens change the logits of earlier ones.
- sweep: "grows" if a sweep runs in a growing batch; otherwise, why each ablation runs in its own
  forward pass.
- z: "its own" if each channel of the projection's input belongs to one head, possibly multiplied by a
  gate; "mixed" if the channels depend on several heads, for instance through a norm over all heads. In
  both cases, an ablation replaces channels of the projection's input.

| family | model | outcome | heads, or reason | sweep | z |
|---|---|---|---|---|---|
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the page with the table of all families."""
    made = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
    rows = [f"| {o.family} | {o.model} | {o.what} | {o.note} | {o.sweep} | {o.z} |\n" for o in outcomes]
    return INTRODUCTION.format(summary=summary(outcomes), made=made) + "".join(rows)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return how many of the families that can be built are supported."""
    built = [o for o in outcomes if o.what != "not built"]
    supported = sum(o.what == "supported" for o in built)
    version = VERSIONS["transformers"]
    return (
        f"{supported} of the {len(built)} causal-LM families of transformers {version} that can be built are supported"
    )
