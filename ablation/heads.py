"""Where the attention heads of a Hugging Face decoder are.

z is the output of one head before the attention output projection (W_O). The z of all heads of a layer lie side by side
in the input of the projection: head h has the channels [h * head_dim, (h + 1) * head_dim). The number of heads and
head_dim are read from the modules, and from the configuration if the modules do not state them. A model whose heads
cannot be determined is refused; nothing is guessed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.errors import InvalidHead, UnsupportedModel
from ablation.projections import Key, MLPOutput, Projection, find_mlps, unwrapped
from ablation.units import MLP, Pair

# Only names identify these modules in transformers: the class name of an attention, the class name or attribute name of
# a cross-attention, and the attribute name of an output projection.
ATTENTION = re.compile(r"Attention|MLA$")
CROSS_ATTENTION = re.compile(r"cross|encoder", re.IGNORECASE)
PROJECTION = re.compile(r"(attention_)?o(ut|utput)?(_proj|_lin|_linear)?|Wo|c_proj|dense")

# Attributes of an attention module, in order of preference: channels of one head's z, and number of query heads.
HEAD_DIM_ATTRIBUTES = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "dim_head")
HEAD_COUNT_ATTRIBUTES = ("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head")


@dataclass(frozen=True, eq=False)
class AttentionLayer(Projection):
    """The heads of one decoder layer: slices of the input of its attention output projection.

    num_heads: query heads. key_value_heads: key/value heads. head_dim: channels of one head's z.
    """

    key_value_heads: int

    def channels(self, head: int) -> slice:
        """Return the channels of one head in the projection's input."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


@dataclass(frozen=True, eq=False)
class HeadMap:
    """All heads of a model. Iteration gives every (layer, head) pair, layer by layer.

    decoder: the module that runs the layers; a forward pass calls it once. num_layers: the number of all decoder
    layers. layers: the decoder layers with attention heads, in order; some layers of a hybrid model have none. mlps:
    for each decoder layer, its MLP, or the reason why this MLP cannot be ablated.
    """

    decoder: nn.Module = field(repr=False)
    num_layers: int
    layers: tuple[AttentionLayer, ...]
    mlps: tuple[MLPOutput | str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of a map of all heads: (number of decoder layers, largest number of heads in a layer)."""
        return self.num_layers, max(layer.num_heads for layer in self.layers)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((layer.index, head) for layer in self.layers for head in range(layer.num_heads))

    def layer(self, index: Any) -> AttentionLayer:
        """Return the decoder layer with this index. Raises InvalidHead if it does not exist or has no heads."""
        index = _checked_index(index, "layer", self.num_layers, "the model")
        for layer in self.layers:
            if layer.index == index:
                return layer
        raise InvalidHead(f"layer {index} has no attention heads")

    def mlp(self, index: Any) -> MLPOutput:
        """Return the MLP of the decoder layer with this index. Raises InvalidHead if there is none to be ablated."""
        index = _checked_index(index, "layer", self.num_layers, "the model")
        found: MLPOutput | str = self.mlps[index]
        if isinstance(found, str):
            raise InvalidHead(f"the MLP of layer {index} cannot be ablated: {found}")
        return found

    def projection(self, key: Key) -> Projection:
        """Return the projection of this key. Raises InvalidHead as `layer` and `mlp` do."""
        return self.mlp(key[0]) if isinstance(key, tuple) else self.layer(key)

    def validate(self, pair: Any) -> Pair:
        """Return a (layer, head) pair as two ints, or (layer, "mlp").

        Raises InvalidHead unless both are integers and the head exists, or the MLP can be ablated.
        """
        try:
            layer, head = pair
        except (TypeError, ValueError):
            raise InvalidHead(f"{pair!r} is not a (layer, head) pair: pass a list of pairs, such as [(0, 1)]") from None
        if isinstance(head, str) and head == MLP:
            return self.mlp(layer).index, MLP
        found = self.layer(layer)
        return found.index, _checked_index(head, "head", found.num_heads, f"layer {found.index}")


def as_index(value: Any) -> int:
    """Return an integer (of Python, numpy or torch) as an int.

    Raises TypeError for any other value, also for a bool and for a tensor that has dimensions.
    """
    # operator.index accepts np.bool_ in numpy 1.
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool or getattr(value, "ndim", 0):
        raise TypeError
    return operator.index(value)


def _checked_index(value: Any, what: str, count: int, owner: str) -> int:
    """Return an integer in [0, count). Raises InvalidHead."""
    try:
        index = as_index(value)
    except TypeError:
        raise InvalidHead(f"{what} {value!r} is not an integer") from None
    if not 0 <= index < count:
        raise InvalidHead(f"no {what} {index}: {owner} has {count} {what}s, 0 to {count - 1}")
    return index


def find_heads(model: PreTrainedModel) -> HeadMap:
    """Find the heads of a model of transformers, also inside a PeftModel.

    In a multi-part model (vision, speech), the heads of the text decoder are found. A layer that has linear attention,
    a convolution or a state-space model instead of attention has no heads. Cross-attention is ignored. If an adapter
    (LoRA) wraps a projection, the wrapper is the projection, since it reads z. Encoders have heads, too: `run` refuses
    them, because they do not continue a prompt.

    Raises UnsupportedModel, with the reason, if the modules do not determine where z is, or if replacing a slice of the
    projection's input would not ablate exactly one head.
    """
    base = _base_model(model)
    config = base.config.get_text_config(decoder=True)
    decoder, blocks = _decoder_layers(base, config)
    names = {module: name for name, module in model.named_modules()}
    layer_types = getattr(config, "layer_types", None) or []
    if len(layer_types) != len(blocks):
        layer_types = [""] * len(blocks)
    layers = []
    for index, (block, layer_type) in enumerate(zip(blocks, layer_types, strict=True)):
        if layer_type == "linear_attention":  # a recurrence without z, even if its class name contains "Attention"
            continue
        attentions = _attentions(block)
        if not attentions and "attention" not in layer_type:
            continue
        projection, attention = _projection(attentions, block, index)
        num_heads, head_dim = _head_count_and_dim(attention, projection, config, index)
        kv_heads = _key_value_heads(attention, num_heads)
        layers.append(AttentionLayer(index, block, names[projection], projection, num_heads, head_dim, kv_heads))
    heads = HeadMap(decoder, len(blocks), tuple(layers), find_mlps(blocks, names))
    _check_supported(base, heads)
    return heads


def _base_model(model: Any) -> PreTrainedModel:
    """Return the model of transformers that an adapter is applied to, or the model itself. Raises UnsupportedModel."""
    if isinstance(model, PreTrainedModel):
        return model
    name = _class_name(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        active = model.active_peft_config
        if active.is_prompt_learning:
            raise UnsupportedModel(f"{name} adds virtual tokens to the prompt ({active.peft_type.value})")
        if active.peft_type.value == "XLORA":
            raise UnsupportedModel(f"{name} runs its decoder twice in a forward pass (XLORA)")
        return _base_model(model.get_base_model())
    if isinstance(model, str):
        raise UnsupportedModel(f"{model!r} is a name, not a model: pass ablation.load({model!r}).model")
    for attribute in ("_orig_mod", "module", "model"):  # torch.compile, DataParallel, LoadedModel
        if isinstance(getattr(model, attribute, None), PreTrainedModel):
            raise UnsupportedModel(
                f"{name} is not a transformers model, but holds one: pass the original model, its .{attribute}"
            )
    raise UnsupportedModel(f"{name} is not a transformers model")


def _decoder_layers(model: PreTrainedModel, config: PretrainedConfig) -> tuple[PreTrainedModel, nn.ModuleList]:
    """Return the text decoder, and its list of layers. Raises UnsupportedModel unless just one list has attention."""
    root = model.get_decoder()
    if not isinstance(root, PreTrainedModel):  # some models call their unembedding `decoder`
        root = model
    found: list[tuple[str, PreTrainedModel, nn.ModuleList]] = []
    _find_layer_lists(root, root, "", found)
    text = [(name, owner, blocks) for name, owner, blocks in found if type(owner.config) is type(config)]
    if len(text) == 1:
        return text[0][1:]
    if not found:
        raise UnsupportedModel(f"{_class_name(model)} has no attention heads: no layer has an attention module")
    lists = ", ".join(name for name, *_ in text or found)
    if not text:
        raise UnsupportedModel(f"{_class_name(model)} has attention only outside a text decoder: {lists}")
    raise UnsupportedModel(
        f"{_class_name(model)} has {len(text)} lists of layers with attention ({lists}), not one decoder"
    )


def _find_layer_lists(
    module: nn.Module, owner: PreTrainedModel, prefix: str, found: list[tuple[str, PreTrainedModel, nn.ModuleList]]
) -> None:
    """Append each outermost list of layers with attention to `found`, with its name and the model that owns it."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and any(_attentions(block) for block in child):
            found.append((path, owner, child))
        else:
            _find_layer_lists(child, child if isinstance(child, PreTrainedModel) else owner, f"{path}.", found)


def _attentions(block: nn.Module) -> dict[str, nn.Module]:
    """Return the self-attentions of a decoder layer and the attention modules within them, by their dotted name."""
    return {
        name: module
        for name, module in block.named_modules()
        if ATTENTION.search(_class_name(module)) and not CROSS_ATTENTION.search(name + _class_name(module))
    }


def _projection(attentions: dict[str, nn.Module], block: nn.Module, index: int) -> tuple[nn.Module, nn.Module]:
    """Return the attention output projection of a decoder layer, and the module that states its number of heads.

    The projection is a Linear or Conv1D, either itself a child of the attention, or the `dense` or `linear` of such a
    child (BERT's `output.dense`); or it is the wrapper that an adapter puts around one of these. Raises
    UnsupportedModel unless there is exactly one.
    """
    found: dict[nn.Module, str] = {}
    for place, attention in attentions.items():
        for name, child in attention.named_children():
            if PROJECTION.fullmatch(name):
                for reader in (child, getattr(child, "dense", None), getattr(child, "linear", None)):
                    if isinstance(reader, nn.Module) and isinstance(unwrapped(reader), nn.Linear | Conv1D):
                        found.setdefault(reader, place)
    if len(found) != 1:
        raise UnsupportedModel(
            f"layer {index} ({_class_name(block)}) has {len(found)} attention output projections that are Linear or "
            "Conv1D; exactly one can be ablated"
        )
    ((projection, place),) = found.items()
    attributes = HEAD_DIM_ATTRIBUTES + HEAD_COUNT_ATTRIBUTES
    inside = f"{place}." if place else ""
    within = (module for name, module in attentions.items() if name == place or name.startswith(inside))
    knowing = (module for module in within if _int_attribute(module, attributes) is not None)
    return projection, next(knowing, attentions[place])


def _head_count_and_dim(
    attention: nn.Module, projection: nn.Module, config: PretrainedConfig, index: int
) -> tuple[int, int]:
    """Return the number of query heads of a layer, and head_dim. Their product is the projection's input size."""
    # Conv1D stores its weight as [in, out]. A Linear states in_features, even if its weight is quantised and packed.
    linear: Any = unwrapped(projection)
    channels = linear.weight.shape[0] if isinstance(linear, Conv1D) else linear.in_features
    layer = f"layer {index} ({_class_name(attention)})"
    if hasattr(attention, "lambda_init"):  # differential attention: two heads make one output of twice the size
        raise UnsupportedModel(f"{layer} subtracts heads from each other before W_O")
    num_heads = _int_attribute(attention, HEAD_COUNT_ATTRIBUTES)
    head_dim = _int_attribute(attention, HEAD_DIM_ATTRIBUTES)
    if num_heads is None:
        try:
            num_heads = int(config.num_attention_heads)
        except Exception:  # missing, or different in each layer: such a configuration raises when asked for one value
            num_heads = None
    if num_heads is None and head_dim is not None:
        num_heads = channels // head_dim
    if num_heads is None:
        raise UnsupportedModel(f"{layer} states neither its number of heads nor their size")
    if head_dim is None:
        head_dim = channels // num_heads
    if num_heads * head_dim != channels:
        raise UnsupportedModel(
            f"{layer}: its projection takes {channels} channels, which are not {num_heads} heads of {head_dim}"
        )
    return num_heads, head_dim


def _int_attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the value of the first of these attributes of a module that is an int, or None."""
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _key_value_heads(attention: nn.Module, num_heads: int) -> int:
    """Return the number of key/value heads of a layer: num_heads, unless the attention groups its query heads."""
    groups = _int_attribute(attention, ("num_key_value_groups",))
    stated = _int_attribute(attention, ("num_key_value_heads", "num_kv_heads"))
    return num_heads // groups if groups else stated or num_heads


def _check_supported(model: PreTrainedModel, heads: HeadMap) -> None:
    """Raise UnsupportedModel if a hook on a projection would not fire exactly once per forward pass, for one layer."""
    if not heads.layers:
        raise UnsupportedModel(f"{_class_name(model)} has no attention heads: no layer has an attention module")
    projections = [layer.projection for layer in heads.layers]
    if len(set(projections)) < len(projections):
        raise UnsupportedModel(
            f"{_class_name(model)} shares one projection among its layers: no ablation can be limited to one layer"
        )
    for module in (model, heads.decoder, *(m for layer in heads.layers for m in layer.block.modules())):
        if module._compiled_call_impl is not None:
            raise UnsupportedModel(
                f"{_class_name(module)} is compiled, so its hooks may never be called: compile it after the ablation"
            )
    if getattr(model.config, "pretraining_tp", 1) > 1 and getattr(model.config, "slow_but_exact", False):
        raise UnsupportedModel(f"{_class_name(model)} does not call its projections: set config.slow_but_exact = False")


def _class_name(module: object) -> str:
    return type(module).__name__
