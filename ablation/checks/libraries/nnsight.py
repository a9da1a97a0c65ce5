"""nnsight: one trace for each run, in which the input of each projection is replaced.

It does not leave the model as it was found: `install_controller` (nnsight/intervention/source.py:688) puts an object in
place of the `forward` of every module, "left there permanently", and has no counterpart that takes it out. Outside a
trace it does nothing but call the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import nnsight
import torch
from nnsight import NNsight
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.libraries.shared import Library, Recorded
from ablation.heads import find_heads


class Nnsight(Library):
    unsupported: ClassVar[dict[str, str]] = {
        "restores": "it leaves an object in place of every module's `forward`, by design",
        "validation": "it knows modules, not heads: the adapter decides what an index means",
    }

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = NNsight(model)
        self.layers = find_heads(model).layers
        self.clear()

    def record(self, batch: Mapping[str, Any]) -> Recorded:
        with torch.no_grad(), self.model.trace(**batch):
            saved = nnsight.save([])
            for layer in self.layers:
                saved.append(self.model.get(layer.projection_name).input.clone())
        pairs = zip(self.layers, saved, strict=True)
        return {layer.index: z.unflatten(-1, (layer.num_heads, -1)) for layer, z in pairs}

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        inputs = {"use_cache": False} | inputs
        with torch.no_grad(), self.model.trace(input_ids=input_ids, attention_mask=attention_mask, **inputs):
            for layer in self.layers:  # a trace reads the model in the order in which it runs
                if layer.index in dict(self.heads):
                    projection = self.model.get(layer.projection_name)
                    projection.input = self.edited(layer, projection.input, attention_mask)
            logits = self.model.output.logits.save()
        return logits
