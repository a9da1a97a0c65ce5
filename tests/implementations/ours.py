"""Our own hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from ablation.hook import HeadAblation


class Ours:
    unsupported: ClassVar[dict[str, str]] = {}

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.ablation = model, HeadAblation(model)
        self.ablation.__enter__()

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        self.ablation.ablate(heads, imputation)

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, **{"use_cache": False} | inputs).logits

    def clear(self) -> None:
        self.ablation.clear()

    def close(self) -> None:
        self.ablation.__exit__(None, None, None)
