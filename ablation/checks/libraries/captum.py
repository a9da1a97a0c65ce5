"""Captum: LayerFeatureAblation of a projection's input, with two features: the head, and all others.

One ablation runs the model at least three times: to see the layer's input (captum/attr/_core/layer/
layer_feature_ablation.py:291), for the clean score and for each feature (feature_ablation.py:508 and :660).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from captum.attr import LayerActivation, LayerFeatureAblation
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.libraries.shared import Library, Recorded
from ablation.heads import find_heads


class Captum(Library):
    unsupported: ClassVar[dict[str, str]] = {
        "multiple_heads": "it ablates in one layer at a time",
        "cache": "it runs the model several times for one ablation, and each run would extend the cache",
        "single_forward": "it runs the model several times for one ablation",
        "non_finite": "it multiplies z by 1 - mask (feature_ablation.py:755), and NaN times 0 is NaN",
        "validation": "it knows features, not heads: the adapter decides what an index means",
    }

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.found = model, find_heads(model)
        self.clear()

    def record(self, batch: Mapping[str, Any]) -> Recorded:
        def score(input_ids: Tensor) -> Tensor:
            with torch.no_grad():
                return self.model(input_ids, **others).logits[:, -1].max(dim=-1).values

        others = dict(batch)
        input_ids = others.pop("input_ids")
        return {
            layer.index: LayerActivation(score, layer.projection)
            .attribute(input_ids, attribute_to_layer_input=True)
            .unflatten(-1, (layer.num_heads, -1))
            for layer in self.found.layers
        }

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        runs: list[Tensor] = []  # Captum returns the change of a score, so the logits are kept here

        def score(input_ids: Tensor) -> Tensor:
            with torch.no_grad():
                output = self.model(input_ids, attention_mask=attention_mask, **{"use_cache": False} | inputs)
            runs.append(output.logits)
            return output.logits[:, -1].max(dim=-1).values  # any score works

        if not self.heads:
            score(input_ids)
        for index, head in self.heads:
            layer = self.found.layer(index)
            at = {"attribute_to_layer_input": True}
            z = LayerActivation(score, layer.projection).attribute(input_ids, **at)
            features = torch.zeros(1, 1, z.shape[-1], dtype=torch.long)
            features[..., layer.channels(head)] = 1  # ablated last
            baseline = z.clone()
            baseline[..., layer.channels(head)] = self.imputed(
                index, head, z[..., layer.channels(head)], attention_mask
            )
            LayerFeatureAblation(score, layer.projection).attribute(input_ids, baseline, layer_mask=features, **at)
        return runs[-1]
