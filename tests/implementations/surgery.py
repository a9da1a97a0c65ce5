"""Weight surgery: W_O and its bias are changed in a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.heads import find_heads
from ablation.imputation import Scale, Zero, as_imputation
from ablation.reference import Reference


class Surgery:
    imputations: ClassVar[tuple[str, ...]] = ("zero", "scale", "reference-mean")
    unsupported: ClassVar[dict[str, str]] = {
        "mean": "the mean depends on the prompt, the weights do not",
        "observable": "z does not change, only the weights that read it",
        "adapters": "it edits the weight of the projection, and no weight beside it",
        "non_finite": "it multiplies z by zeros, and NaN times 0 is NaN",
    }

    def __init__(self, model: PreTrainedModel) -> None:
        self.original = model
        self.model = model

    def ablate(
        self,
        heads: Sequence[tuple[int, int]],
        imputation: str,
        *,
        reference: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        model = copy.deepcopy(self.original)
        found = find_heads(model)
        pairs = sorted(set(map(found.validate, heads)))  # so that the bias is the same sum in any order
        factor, means = 0.0, {}
        if reference is not None:
            prompts = [
                ids[real.bool()].tolist()
                for batch in reference
                for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            means = Reference.of(self.original, prompts).mean().values
        else:
            of = as_imputation(imputation)
            if not isinstance(of, Zero | Scale):
                raise ValueError(f"no imputation {imputation!r}: weights do not depend on the prompt")
            factor = of.factor if isinstance(of, Scale) else 0.0
        for layer, head in pairs:
            assert head != "mlp"
            projection: Any = found.layer(layer).projection
            with torch.no_grad():
                weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
                block = weight[found.layer(layer).channels(head)]  # [head_dim, hidden], a view
                if means:
                    constant = (means[layer][head] @ block.double()).to(block.dtype)
                    bias = projection.bias
                    projection.bias = nn.Parameter(constant if bias is None else bias + constant)
                block.mul_(factor)
        self.model = model

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids, attention_mask=attention_mask, **{"use_cache": False} | inputs).logits

    def clear(self) -> None:
        self.model = self.original

    def close(self) -> None:
        self.model = self.original
