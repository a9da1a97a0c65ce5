"""Where the attention heads of a Hugging Face decoder are.

The outputs z of a layer's heads lie side by side in the input of its attention output projection (W_O): head h is
channels [h * width, (h + 1) * width). Everything here is read from the modules themselves, so that a model is either
understood or refused, never guessed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.errors import InvalidHead, UnsupportedModel

# What transformers' modules cannot say but by a name. An attention, by its class; one that reads another sequence, by
# its place in the layer; its output projection, by its place in the attention.
ATTENTION = re.compile(r"Attention|MLA$")
CROSS_ATTENTION = re.compile(r"cross|encoder", re.IGNORECASE)
PROJECTION = re.compile(r"(attention_)?o(ut|utput)?(_proj|_lin|_linear)?|Wo|c_proj|dense")

# An attention's own word, the first that it has: channels of one head's z, and query heads.
HEAD_DIM_ATTRIBUTES = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "dim_head")
HEAD_COUNT_ATTRIBUTES = ("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head")


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """The heads of one decoder layer.

    index: among all decoder layers. block: the decoder layer. projection: its attention output projection, of dotted
    name `name` in the model. heads: number of query heads. key_value_heads: of key/value heads. width: channels of
    one head's z.
    """

    index: int
    block: nn.Module
    projection_name: str
    projection: nn.Module
    num_heads: int
    key_value_heads: int
    head_dim: int

    def channels(self, head: int) -> slice:
        """The channels of one head in the projection's input."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


@dataclass(frozen=True, eq=False)
class HeadMap:
    """All heads of a model.

    decoder: the module that runs the layers (it is called once a forward). depth: number of its layers. layers: those
    that have attention heads; in a hybrid model, some do not.
    """

    decoder: nn.Module
    num_layers: int
    layers: tuple[AttentionLayer, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(decoder layers, heads of the layer that has the most)."""
        return self.num_layers, max(layer.num_heads for layer in self.layers)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Every (layer, head), layer by layer."""
        return ((layer.index, head) for layer in self.layers for head in range(layer.num_heads))

    def layer(self, index: Any) -> AttentionLayer:
        """The layer of that index. Raises NoSuchHead if there is none, or if it has no heads."""
        index = _index(index, "layer", self.num_layers, "the model")
        for layer in self.layers:
            if layer.index == index:
                return layer
        raise InvalidHead(f"layer {index} has no attention heads")

    def validate(self, pair: Any) -> tuple[int, int]:
        """A (layer, head) pair as two ints. Raises NoSuchHead unless both are integers, not bools, and it exists."""
        try:
            layer, head = pair
        except (TypeError, ValueError):
            raise InvalidHead(
                f"{pair!r} is no (layer, head) pair; what is asked for is a list of them, such as [(0, 1)]"
            ) from None
        found = self.layer(layer)
        return found.index, _index(head, "head", found.num_heads, f"layer {found.index}")


def as_index(value: Any) -> int:
    """An integer. Raises TypeError for what else Python takes for one: True, and a tensor that is a row of one."""
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool or getattr(value, "ndim", 0):
        raise TypeError
    return operator.index(value)


def _index(value: Any, what: str, count: int, owner: str) -> int:
    try:
        index = as_index(value)
    except TypeError:
        raise InvalidHead(f"{what} {value!r} is not an integer") from None
    if not 0 <= index < count:
        raise InvalidHead(f"no {what} {index}: {owner} has {count} {what}s, 0 to {count - 1}")
    return index


def find_heads(model: PreTrainedModel) -> HeadMap:
    """The heads of a causal language model of transformers.

    Of a model of several parts (vision, speech) it is the text decoder. Layers without attention, or with linear
    attention, a convolution or a state-space model in its place, have no heads; cross-attention is left alone.

    Raises UnsupportedModel, with the reason, where a head's z cannot be told from the modules, or where replacing it
    at the projection's input would not be an ablation of that head.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{_class_name(model)} is not a transformers model; for a compiled one, pass the original"
        )
    config = model.config.get_text_config(decoder=True)
    decoder, blocks = _decoder_layers(model, config)
    names = {module: name for name, module in model.named_modules()}
    kinds = getattr(config, "layer_types", None) or []
    if len(kinds) != len(blocks):
        kinds = [""] * len(blocks)
    layers = []
    for index, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
        if kind == "linear_attention":  # whatever its class is called: a recurrence, whose state is not a head's z
            continue
        attentions = _attentions(block)
        if not attentions and "attention" not in kind:
            continue
        projection, attention = _projection(attentions, block, index)
        heads, head_dim = _head_count_and_dim(attention, projection, config, index)
        layers.append(
            AttentionLayer(index, block, names[projection], projection, heads, _key_values(attention, heads), head_dim)
        )
    found = HeadMap(decoder, len(blocks), tuple(layers))
    _check_supported(model, found)
    return found


def _decoder_layers(model: PreTrainedModel, config: PretrainedConfig) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The text decoder, and the one list of layers with attention that it runs."""
    root = model.get_decoder()
    if not isinstance(root, PreTrainedModel):  # where the name `decoder` is that of the unembedding
        root = model
    found: list[tuple[str, PreTrainedModel, nn.ModuleList]] = []
    _find_layer_lists(root, root, "", found)
    text = [(name, owner, blocks) for name, owner, blocks in found if type(owner.config) is type(config)]
    if len(text) == 1:
        return text[0][1:]
    if not found:
        raise UnsupportedModel(f"{_class_name(model)} has no attention heads: none of its layers has an attention")
    lists = ", ".join(name for name, *_ in text or found)
    if not text:
        raise UnsupportedModel(
            f"{_class_name(model)} has no text decoder of its own, only parts with attention: {lists}"
        )
    raise UnsupportedModel(
        f"{_class_name(model)} has {len(text)} lists of layers with attention ({lists}), not one decoder"
    )


def _find_layer_lists(
    module: nn.Module, owner: PreTrainedModel, prefix: str, found: list[tuple[str, PreTrainedModel, nn.ModuleList]]
) -> None:
    """Append every outermost list of layers with attention, with the model that it is part of."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and any(_attentions(block) for block in child):
            found.append((path, owner, child))
        else:
            _find_layer_lists(child, child if isinstance(child, PreTrainedModel) else owner, f"{path}.", found)


def _attentions(block: nn.Module) -> dict[str, nn.Module]:
    """The self-attentions of a decoder layer, and what they consist of, by their place in it."""
    return {
        name: module
        for name, module in block.named_modules()
        if ATTENTION.search(_class_name(module)) and not CROSS_ATTENTION.search(name + _class_name(module))
    }


def _projection(attentions: dict[str, nn.Module], block: nn.Module, index: int) -> tuple[nn.Linear | Conv1D, nn.Module]:
    """The one attention output projection of a decoder layer, and the attention that knows its heads.

    It is a Linear or Conv1D, or stands as `dense` or `linear` in a module around it (`output.dense` of BERT).
    """
    found: dict[nn.Linear | Conv1D, str] = {}
    for place, attention in attentions.items():
        for name, child in attention.named_children():
            if PROJECTION.fullmatch(name):
                for linear in (child, getattr(child, "dense", None), getattr(child, "linear", None)):
                    if isinstance(linear, nn.Linear | Conv1D):
                        found.setdefault(linear, place)
    if len(found) != 1:
        raise UnsupportedModel(
            f"layer {index} ({_class_name(block)}) has {len(found)} attention output projections that are "
            "Linear or Conv1D; exactly one can be ablated"
        )
    ((projection, place),) = found.items()
    inside = [
        m
        for name, m in attentions.items()
        if name.startswith(place) and _int_attribute(m, HEAD_DIM_ATTRIBUTES + HEAD_COUNT_ATTRIBUTES) is not None
    ]
    return projection, inside[0] if inside else attentions[place]


def _head_count_and_dim(
    attention: nn.Module, projection: nn.Linear | Conv1D, config: PretrainedConfig, index: int
) -> tuple[int, int]:
    """Number and width of a layer's query heads, that together fill the projection's input."""
    # Conv1D keeps its weight as [in, out]; a Linear says so itself, also where its weight is packed.
    channels = projection.weight.shape[0] if isinstance(projection, Conv1D) else projection.in_features
    if hasattr(attention, "lambda_init"):  # differential attention: two heads make one output, of twice the width
        raise UnsupportedModel(f"layer {index} ({_class_name(attention)}) subtracts heads from each other before W_O")
    heads, head_dim = _int_attribute(attention, HEAD_COUNT_ATTRIBUTES), _int_attribute(attention, HEAD_DIM_ATTRIBUTES)
    if heads is None:
        try:
            heads = int(config.num_attention_heads)
        except Exception:  # it has none, or one for each layer, which a configuration by layer refuses to say
            heads = None
    if heads is None and head_dim is not None:
        heads = channels // head_dim
    if heads is None:
        raise UnsupportedModel(
            f"layer {index} ({_class_name(attention)}) says neither how many heads it has nor how wide"
        )
    if head_dim is None:
        head_dim = channels // heads
    if heads * head_dim != channels:
        raise UnsupportedModel(
            f"layer {index} ({_class_name(attention)}): its projection takes {channels} channels, "
            f"which are not {heads} heads of {head_dim}"
        )
    return heads, head_dim


def _int_attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes of a module that is an int."""
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _key_values(attention: nn.Module, heads: int) -> int:
    """Number of a layer's key/value heads: as many as query heads, where the attention knows no groups of them."""
    groups, own = (
        _int_attribute(attention, ("num_key_value_groups",)),
        _int_attribute(attention, ("num_key_value_heads", "num_kv_heads")),
    )
    return heads // groups if groups else own or heads


def _check_supported(model: PreTrainedModel, heads: HeadMap) -> None:
    """Raise UnsupportedModel where a hook on the projection would not fire once a forward, for one layer."""
    if not heads.layers:
        raise UnsupportedModel(f"{_class_name(model)} has no attention heads: none of its layers has an attention")
    projections = [layer.projection for layer in heads.layers]
    if len(set(projections)) < len(projections):
        raise UnsupportedModel(
            f"{_class_name(model)} shares one projection among its layers: no layer's head stands alone"
        )
    for module in (model, heads.decoder, *(m for layer in heads.layers for m in layer.block.modules())):
        if module._compiled_call_impl is not None:
            raise UnsupportedModel(
                f"{_class_name(module)} is compiled, and may never call a hook: compile after ablating"
            )
    if getattr(model.config, "pretraining_tp", 1) > 1 and getattr(model.config, "slow_but_exact", False):
        raise UnsupportedModel(f"{_class_name(model)} bypasses its projections: set config.slow_but_exact = False")


def _class_name(module: object) -> str:
    return type(module).__name__
