"""Baukit: a Trace of each projection, whose `edit_output` returns the projection of the edited z.

Baukit is on no package index: `pip install git+https://github.com/davidbau/baukit`. A Trace edits the output of a
module only (nethook.py:76), and in the output of the projection the heads are mixed, so the projection runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from baukit import Trace, TraceDict
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.libraries.shared import Library, Recorded
from ablation.heads import AttentionLayer, find_heads


class Baukit(Library):
    unsupported: ClassVar[dict[str, str]] = {
        "observable": "it edits the output of a module, so the projection is called with the original z first",
        "validation": "it knows modules, not heads: the adapter decides what an index means",
    }

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.layers = model, find_heads(model).layers
        self.clear()

    def record(self, batch: Mapping[str, Any]) -> Recorded:
        names = [layer.projection_name for layer in self.layers]
        with torch.no_grad(), TraceDict(self.model, names, retain_input=True) as traces:
            self.model(**batch)
        return {
            layer.index: traces[layer.projection_name].input.unflatten(-1, (layer.num_heads, -1))
            for layer in self.layers
        }

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        with torch.no_grad(), ExitStack() as traces:
            for layer in self.layers:
                if layer.index in dict(self.heads):
                    edit = self.edit(layer, attention_mask)
                    traces.enter_context(Trace(self.model, layer.projection_name, edit_output=edit))
            return self.model(input_ids, attention_mask=attention_mask, **{"use_cache": False} | inputs).logits

    def edit(self, layer: AttentionLayer, mask: Tensor | None) -> Callable[..., Tensor]:
        """Return a function of the output of a projection and of its inputs, which Trace passes by name."""

        def edit_output(output: Tensor, inputs: tuple[Tensor]) -> Tensor:
            z = self.edited(layer, inputs[0], mask)
            return layer.projection.forward(z)  # a call of the module would call this function again

        return edit_output
