"""Weight surgery: the head's block of W_O becomes 0, in a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.heads import find_heads


class Surgery:
    unsupported: ClassVar[dict[str, str]] = {
        "mean": "the mean depends on the prompt, the weights do not",
        "observable": "z does not change, only the weights that read it",
        "adapters": "it edits the weight of the projection, and no weight beside it",
        "non_finite": "it multiplies z by zeros, and NaN times 0 is NaN",
    }

    def __init__(self, model: PreTrainedModel) -> None:
        self.original = model
        self.model = model

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        if imputation != "zero":
            raise ValueError(f"no imputation {imputation!r}: surgery writes zeros")
        model = copy.deepcopy(self.original)
        found = find_heads(model)
        for layer, head in map(found.validate, heads):
            projection, channels = found.layer(layer).projection, found.layer(layer).channels(head)
            with torch.no_grad():
                if isinstance(projection, Conv1D):
                    projection.weight[channels] = 0
                else:
                    projection.weight[:, channels] = 0
        self.model = model

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids, attention_mask=attention_mask, **{"use_cache": False} | inputs).logits

    def clear(self) -> None:
        self.model = self.original

    def close(self) -> None:
        self.model = self.original
