"""pyvene: an IntervenableModel of a copy of the model, one function for each projection's input.

A copy, since `remove_forward_hooks` (pyvene/models/modeling_utils.py:77), before and after each run, removes all hooks
of the model, the user's too, and `disable_model_gradients` (intervenable_base.py:347) freezes its parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pyvene
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.libraries.shared import Library, Recorded
from ablation.heads import AttentionLayer, find_heads


class Pyvene(Library):
    unsupported: ClassVar[dict[str, str]] = {
        "observable": "it removes every hook of the model that it is given and freezes it, so it is given a copy",
        "validation": "the function that replaces z picks the head: the adapter decides what an index means",
    }

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = copy.deepcopy(model)
        self.layers = find_heads(self.model).layers
        self.clear()

    def record(self, batch: Mapping[str, Any]) -> Recorded:
        found: Recorded = {}

        def recorder(layer: AttentionLayer) -> Callable[[Tensor, Any], Tensor]:
            def look(z: Tensor, source: Any) -> Tensor:
                found[layer.index] = z.unflatten(-1, (layer.num_heads, -1)).clone()
                return z

            return look

        representations = [
            {"component": f"{layer.projection_name}.input", "intervention": recorder(layer)} for layer in self.layers
        ]
        with torch.no_grad():
            pyvene.IntervenableModel(representations, self.model)(dict(batch))
        return found

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        representations = [
            {"component": f"{layer.projection_name}.input", "intervention": self.intervention(layer, attention_mask)}
            for layer in self.layers
            if layer.index in dict(self.heads)
        ]
        base = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False} | inputs
        with torch.no_grad():
            bare, ablated = pyvene.IntervenableModel(representations, self.model)(base)
        return (ablated if representations else bare).logits

    def intervention(self, layer: AttentionLayer, mask: Tensor | None) -> Callable[[Tensor, Any], Tensor]:
        """Return a function of z [rows, tokens, num_heads * head_dim], and of a source, which is unused."""
        return lambda z, source: self.edited(layer, z, mask)
