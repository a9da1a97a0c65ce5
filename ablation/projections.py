"""Projections that are ablated, and where the MLPs of a decoder are.

An MLP is ablated at its output: the output of its last projection, with the bias of the projection. A head is ablated
before its projection, whose bias belongs to no head; an MLP has its last projection for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ablation.units import MLP, Pair

# The name, in a decoder layer, of the last projection of its MLP.
MLP_PROJECTION = re.compile(
    r"(mlp|ffn|ff|feed_forward|mlp_block|mixer)\.(c_proj|down_proj|dense_4h_to_h|fc2|fc_out|w2|Wo|output\.dense|2)"
    r"|fc2|output\.dense"
)
EXPERT = re.compile("expert", re.IGNORECASE)

Key = int | Pair
"""Identifies a projection in edits and receipts: 9 for that of the heads of layer 9, (9, "mlp") for that of its MLP."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A projection whose input or output is ablated in parts of equal size: the heads of a layer, or an MLP alone.

    index: position of the layer among all decoder layers, from 0. block: the decoder layer. projection_name: the dotted
    name of the projection in the model. num_heads: the number of parts. head_dim: channels of one part.
    """

    index: int
    block: nn.Module = field(repr=False)
    projection_name: str
    projection: nn.Module = field(repr=False)
    num_heads: int
    head_dim: int

    @property
    def key(self) -> Key:
        """What identifies the projection in edits and receipts."""
        return self.index


@dataclass(frozen=True, eq=False)
class MLPOutput(Projection):
    """The MLP of one decoder layer, as one part: the output of its last projection, with its bias.

    num_heads is 1, and head_dim the number of channels of the output.
    """

    @property
    def key(self) -> Key:
        """What identifies the projection in edits and receipts."""
        return self.index, MLP


def find_mlps(blocks: Iterable[nn.Module], names: Mapping[nn.Module, str]) -> tuple[MLPOutput | str, ...]:
    """Return the MLP of each decoder layer, or the reason why it cannot be ablated. names: of all modules."""
    found: list[MLPOutput | str] = []
    for index, block in enumerate(blocks):
        parts = dict(block.named_modules())
        projections = [
            module
            for name, module in parts.items()
            if MLP_PROJECTION.fullmatch(name) and isinstance(unwrapped(module), nn.Linear | Conv1D)
        ]
        if any(EXPERT.search(name.rpartition(".")[2] + type(module).__name__) for name, module in parts.items()):
            found.append("the layer has a mixture of experts, which has no one output projection")
        elif len(projections) != 1:
            found.append(
                f"{type(block).__name__} has {len(projections)} output projections of an MLP that are Linear or "
                "Conv1D; exactly one can be ablated"
            )
        else:
            (projection,) = projections
            linear: Any = unwrapped(projection)
            channels = linear.weight.shape[1] if isinstance(linear, Conv1D) else linear.out_features
            found.append(MLPOutput(index, block, names[projection], projection, 1, channels))
    used = [mlp.projection for mlp in found if isinstance(mlp, MLPOutput)]
    shared = "its layer shares the MLP with another layer"
    return tuple(mlp if isinstance(mlp, str) or used.count(mlp.projection) == 1 else shared for mlp in found)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the layer inside the wrappers of adapters: the `base_layer` of a LoRA, the `original_module` of a copy."""
    for attribute in ("base_layer", "original_module"):
        inner = module._modules.get(attribute)
        if inner is not None:
            return unwrapped(inner)
    return module
