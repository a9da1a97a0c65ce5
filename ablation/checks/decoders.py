"""Random decoders: hypothesis draws their shape, and a seed that depends on the shape determines their weights.

Every weight is exactly representable in every dtype, and equal on every machine.
"""

from __future__ import annotations

import copy
import zlib
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    SiglipVisionConfig,
)

VOCABULARY = 41
POSITIONS = 128
ROTARY: Any = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}


class Subject(Protocol):
    """The model of a case: a random decoder (`Decoder`), or the user's own (`on_model.own_model.OwnModel`)."""

    @property
    def family(self) -> str:
        """Its name in messages, and a name that `unsupported` may hold."""

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""

    @property
    def num_heads(self) -> int:
        """The number of query heads of a layer."""

    @property
    def head_dim(self) -> int:
        """Channels of the z of one head."""

    @property
    def num_key_value_groups(self) -> int:
        """How many query heads share one key/value head."""

    @property
    def dtype(self) -> str:
        """The name of a torch dtype."""

    @property
    def vocabulary(self) -> int:
        """Every token id is smaller."""

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""

    def heads(self) -> list[tuple[int, int]]:
        """Return all (layer, head) pairs."""

    def shared(self) -> PreTrainedModel:
        """Return the model, which the caller must leave or restore unchanged."""

    def fresh(self) -> PreTrainedModel:
        """Return the model as it was found. There is one copy of the user's own model, which is restored here."""


class Decoder(NamedTuple):
    """A random decoder, described by its shape.

    num_key_value_groups: how many query heads share one key/value head; 1 in families without grouped attention.
    """

    family: str
    num_layers: int
    num_heads: int
    head_dim: int
    num_key_value_groups: int = 1
    attention: str = "sdpa"
    dtype: str = "float32"

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return VOCABULARY

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device("cpu")

    def heads(self) -> list[tuple[int, int]]:
        """Return all (layer, head) pairs. In a hybrid, only every second layer has attention heads."""
        first, step = (1, 2) if self.family == "lfm2" else (0, 1)
        return [(layer, head) for layer in range(first, self.num_layers, step) for head in range(self.num_heads)]

    def shared(self) -> PreTrainedModel:
        """Return the model. Calls for one shape return one object, so the caller must leave or restore it unchanged."""
        return _build(self)

    def fresh(self) -> PreTrainedModel:
        """Return a copy that the caller may change."""
        return copy.deepcopy(_build(self))


@cache
def _build(decoder: Decoder) -> PreTrainedModel:
    seed = zlib.crc32(repr(tuple(decoder)).encode())
    return randomised(_config(decoder), seed, decoder.attention, decoder.dtype)


def _config(decoder: Decoder) -> PretrainedConfig:
    layers, heads, head_dim = decoder.num_layers, decoder.num_heads, decoder.head_dim
    hidden = heads * head_dim
    common: dict[str, Any] = dict(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    llama: dict[str, Any] = dict(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=POSITIONS,
        **common,
    )
    grouped = llama | {"num_key_value_heads": heads // decoder.num_key_value_groups}
    match decoder.family:
        case "gpt2":
            return GPT2Config(n_layer=layers, n_head=heads, n_embd=hidden, n_positions=POSITIONS, **common)
        case "llama":
            return LlamaConfig(hidden_size=hidden, attention_bias=True, **grouped)
        case "qwen3":  # here and in gemma3, head_dim is not hidden / heads
            return Qwen3Config(hidden_size=hidden + 2 * heads, head_dim=head_dim, attention_bias=True, **grouped)
        case "gemma3":
            return _gemma3(decoder, grouped)
        case "gemma3_vision":
            # The vision tower comes first, has more layers, and calls its projections by a usual name.
            vision = SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=layers + 1,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            )
            return Gemma3Config(text_config=_gemma3(decoder, grouped), vision_config=vision, mm_tokens_per_image=4)
        case "lfm2":
            kinds = ["full_attention" if layer % 2 else "conv" for layer in range(layers)]
            return Lfm2Config(hidden_size=hidden, layer_types=kinds, block_multiple_of=1, **grouped)
        case "gpt_neox":
            return GPTNeoXConfig(hidden_size=hidden, rope_parameters=ROTARY, **llama)
        case "mixtral":
            return MixtralConfig(hidden_size=hidden, num_local_experts=3, num_experts_per_tok=2, **grouped)
        case "opt":
            return OPTConfig(
                hidden_size=hidden,
                word_embed_proj_dim=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                ffn_dim=2 * hidden,
                max_position_embeddings=POSITIONS,
                **common,
            )
    raise ValueError(f"no family {decoder.family!r}")


def _gemma3(decoder: Decoder, common: dict[str, Any]) -> Gemma3TextConfig:
    hidden = decoder.num_heads * (decoder.head_dim + 1)
    return Gemma3TextConfig(hidden_size=hidden, head_dim=decoder.head_dim, sliding_window=3, **common)


def randomised(
    config: PretrainedConfig, seed: int, attention: str | None = "sdpa", dtype: str = "float32"
) -> PreTrainedModel:
    """Return a model in evaluation mode whose parameters, with biases and norms, are random.

    The parameters are so large that every head matters. They are integers / 256 of magnitude at most 1, so they are
    exact in every float dtype.
    """
    with torch.random.fork_rng(devices=[]):  # building a model advances the random number generator
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=getattr(torch, dtype)
        ).eval()
    random = np.random.RandomState(seed)  # numpy guarantees its stream; that of a Generator may change
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = min(parameter.shape) if parameter.ndim > 1 else 4
            bound = max(1, int(256 * min(1.0, 1.7 / fan_in**0.5)))  # a standard deviation of about 1 / sqrt(fan_in)
            parameter.copy_(torch.from_numpy(random.randint(-bound, bound + 1, tuple(parameter.shape)) / 256))
    return model


FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox", "opt", "mixtral")
LAYOUTS = ("gemma3", "lfm2", "gemma3_vision")
"""Families in which the place of a head is not obvious: sliding windows, layers without heads, a vision tower."""
ALL_FAMILIES = (*FAMILIES, *LAYOUTS)
GROUPED = ("llama", "qwen3", "gemma3", "gemma3_vision", "lfm2", "mixtral")
"""Families in which query heads may share a key/value head."""
DTYPES = ("float32", "float64", "bfloat16")


@st.composite
def decoders(
    draw: st.DrawFn,
    families: tuple[str, ...] = FAMILIES,
    dtypes: tuple[str, ...] = ("float32", "float64"),
    least_layers: int = 1,
    least_heads: int = 1,
) -> Decoder:
    """Draw a small decoder; few have as many layers as heads, which would hide an exchange of the two."""
    # Mixtral's kernel for experts does not support float64.
    family = draw(st.sampled_from([f for f in families if f != "mixtral" or set(dtypes) - {"float64"}]))
    groups = draw(st.sampled_from([1, 2, 3])) if family in GROUPED else 1
    least = -(-least_heads // groups)
    heads = groups * draw(st.integers(least, least + 2))
    # head_dim is even, for rotary positions; experts are multiplied in blocks of 16 bytes. The decoder has at least six
    # channels: a LayerNorm of fewer, close to each other, amplifies the noise.
    head_dim = 8 if family == "mixtral" else draw(st.sampled_from([w for w in (2, 4, 6) if heads * w >= 6]))
    layers = draw(st.integers(least_layers, least_layers + 2))
    dtype = draw(st.sampled_from([d for d in dtypes if (family, d) != ("mixtral", "float64")]))
    # Eager attention computes its softmax in float32 in most families, so in float64 its noise is that of float32; and
    # it gives NaN for a token that sees only padding.
    attention = draw(st.sampled_from(["eager", "sdpa"])) if dtype != "float64" else "sdpa"
    return Decoder(family, layers, heads, head_dim, groups, attention, dtype)
