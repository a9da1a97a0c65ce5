"""Our own hook."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.protocol import IMPUTATIONS
from ablation.edits import Ablation, edits_by_layer
from ablation.hook import HeadAblation
from ablation.imputation import Values
from ablation.reference import Reference, record_z


class Ours:
    imputations: ClassVar[tuple[str, ...]] = tuple(IMPUTATIONS)
    unsupported: ClassVar[dict[str, str]] = {}

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.ablation = model, HeadAblation(model)
        self.ablation.__enter__()

    def ablate(
        self,
        heads: Sequence[tuple[int, int]],
        imputation: str,
        *,
        values: Mapping[tuple[int, int], Tensor] | None = None,
        reference: Sequence[Mapping[str, Tensor]] | None = None,
        positions: tuple[int, ...] | None = None,
    ) -> None:
        given: Any = imputation
        if values is not None:
            given = self._values(values)
        if reference is not None and heads:
            for pair in heads:
                self.ablation.heads.validate(pair)  # before the model runs
            prompts = [
                row[real.bool()].tolist()
                for batch in reference
                for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            clean = copy.deepcopy(self.model)  # which carries no ablation
            if imputation == "resample":
                of_rows = [Values(record_z(clean, prompt), imputation) for prompt in prompts]
                rows = [
                    (Ablation(heads, each, positions).validated(self.ablation.heads), row)
                    for row, each in enumerate(of_rows)
                ]
                self.ablation.set_edits(edits_by_layer(rows))
                return
            given = Reference.of(clean, prompts).imputation(imputation)
        self.ablation.ablate(heads, given if heads else "zero", positions)

    def _values(self, values: Mapping[tuple[int, int], Tensor]) -> Values:
        layers = self.ablation.heads.layers
        return Values(
            {
                layer.index: torch.stack([values[layer.index, head] for head in range(layer.num_heads)], dim=-2)
                for layer in layers
            }
        )

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, **{"use_cache": False} | inputs).logits

    def clear(self) -> None:
        self.ablation.clear()

    def close(self) -> None:
        self.ablation.__exit__(None, None, None)
