"""Where the attention heads of a Hugging Face decoder are.

The outputs z of a layer's heads lie side by side in the input of its attention output projection (W_O): head h is
channels [h * width, (h + 1) * width). Everything here is read from the modules themselves, so that a model is either
understood or refused, never guessed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.errors import NoSuchHead, UnsupportedModel

# The names of the attention output projection in transformers, all families.
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")


@dataclass(frozen=True, eq=False)
class Layer:
    """The heads of one decoder layer.

    block: the decoder layer. projection: its attention output projection, of dotted name `name` in the model.
    heads: number of query heads. width: channels of one head's z.
    """

    index: int
    block: nn.Module
    name: str
    projection: nn.Module
    heads: int
    width: int

    def channels(self, head: int) -> slice:
        """The channels of one head in the projection's input."""
        return slice(head * self.width, (head + 1) * self.width)


@dataclass(frozen=True, eq=False)
class Heads:
    """All heads of a model. decoder: the module that runs the layers (it is called once a forward)."""

    decoder: nn.Module
    layers: tuple[Layer, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return len(self.layers), self.layers[0].heads

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Every (layer, head), layer by layer."""
        return ((layer.index, head) for layer in self.layers for head in range(layer.heads))

    def check(self, pair: Any) -> tuple[int, int]:
        """A (layer, head) pair as two ints. Raises NoSuchHead unless both are integers, not bools, within range."""
        try:
            layer, head = pair
        except (TypeError, ValueError):
            raise NoSuchHead(
                f"{pair!r} is no (layer, head) pair; what is asked for is a list of them, such as [(0, 1)]"
            ) from None
        return (
            _index(layer, "layer", len(self.layers), "the model"),
            _index(head, "head", self.shape[1], "each layer"),
        )


def _index(value: Any, what: str, count: int, owner: str) -> int:
    try:
        if isinstance(value, bool):  # an int to Python: True would pass for head 1
            raise TypeError
        index = operator.index(value)
    except TypeError:
        raise NoSuchHead(f"{what} {value!r} is not an integer") from None
    if not 0 <= index < count:
        raise NoSuchHead(f"no {what} {index}: {owner} has {count} {what}s, 0 to {count - 1}")
    return index


def find_heads(model: PreTrainedModel) -> Heads:
    """The heads of a causal language model of transformers.

    Raises UnsupportedModel, with the reason, where a head's z cannot be told from the modules, or where replacing it
    at the projection's input would not be an ablation of that head.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"{_kind(model)} is not a transformers model; for a compiled one, pass the original")
    config = model.config.get_text_config(decoder=True)
    try:
        count, queries = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    except Exception as error:  # a configuration by layer refuses to name one number
        raise UnsupportedModel(f"{_kind(model)} has no one number of heads for all layers: {error}") from error
    if not isinstance(count, int) or not isinstance(queries, int):
        raise UnsupportedModel(f"{_kind(model)} has no attention heads: its configuration names no number of them")
    decoder = model.get_decoder()
    blocks = next((m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if blocks is None:
        raise UnsupportedModel(f"{_kind(model)} has no list of {count} decoder layers")
    names = {module: name for name, module in model.named_modules()}
    layers = []
    for index, block in enumerate(blocks):
        projection = _projection(block, index)
        width, rest = divmod(_in_features(projection), queries)
        if rest:
            raise UnsupportedModel(
                f"{names[projection]} takes {_in_features(projection)} channels, not a multiple of {queries} heads"
            )
        attention = model.get_submodule(names[projection].rpartition(".")[0])
        _refuse_other_heads(attention, width, index)
        layers.append(Layer(index, block, names[projection], projection, queries, width))
    heads = Heads(decoder, tuple(layers))
    _refuse_dishonest(model, heads)
    return heads


def _projection(block: nn.Module, index: int) -> nn.Linear | Conv1D:
    """The one attention output projection of a decoder layer."""
    attentions = [m for m in block.modules() if type(m).__name__.endswith("Attention")]
    found = [
        child
        for attention in attentions
        for name, child in attention.named_children()
        if name in PROJECTIONS and isinstance(child, nn.Linear | Conv1D)
    ]
    if len(found) != 1:
        raise UnsupportedModel(
            f"layer {index} ({_kind(block)}) has {len(found)} attention output projections; exactly one can be ablated"
        )
    return found[0]


def _refuse_other_heads(attention: nn.Module, width: int, index: int) -> None:
    """Raise UnsupportedModel where the attention module itself counts its heads otherwise, as in mixed layers."""
    own = {getattr(attention, name, None) for name in ("head_dim", "v_head_dim", "head_size")} - {None}
    if own and width not in own:
        widths = " or ".join(map(str, sorted(map(str, own))))
        raise UnsupportedModel(
            f"layer {index} ({_kind(attention)}) has heads of {widths} channels, not of {width}: "
            "its number of heads is not the one that the configuration names for all layers"
        )
    if hasattr(attention, "lambda_init"):  # differential attention: two heads make one output, of twice the width
        raise UnsupportedModel(f"layer {index} ({_kind(attention)}) subtracts heads from each other before W_O")


def _in_features(projection: nn.Linear | Conv1D) -> int:
    # Conv1D keeps its weight as [in, out]; a Linear says so itself, also where its weight is packed.
    return projection.weight.shape[0] if isinstance(projection, Conv1D) else projection.in_features


def _refuse_dishonest(model: PreTrainedModel, heads: Heads) -> None:
    """Raise UnsupportedModel where a hook on the projection would not fire once a forward, for one layer."""
    projections = [layer.projection for layer in heads.layers]
    if len(set(projections)) < len(projections):
        raise UnsupportedModel(f"{_kind(model)} shares one projection among its layers: no layer's head stands alone")
    for module in (model, heads.decoder, *(m for layer in heads.layers for m in layer.block.modules())):
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModel(f"{_kind(module)} is compiled, and may never call a hook: compile after ablating")
    if getattr(model.config, "pretraining_tp", 1) > 1 and getattr(model.config, "slow_but_exact", False):
        raise UnsupportedModel(f"{_kind(model)} bypasses its projections: set config.slow_but_exact = False")


def _kind(module: object) -> str:
    return type(module).__name__
