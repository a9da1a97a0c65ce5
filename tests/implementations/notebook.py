"""The style of a course notebook: one closure for each layer, steered by module globals, writing in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.heads import find_heads

layer_to_ablate = -1
head_to_ablate = -1
replace_zero = True


def make_hook(layer: int, head_dim: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z, *rest = args
        if layer == layer_to_ablate:
            head = z[..., head_to_ablate * head_dim : (head_to_ablate + 1) * head_dim]
            head[...] = 0 if replace_zero else head.mean()
        return (z, *rest)

    return hook


class Notebook:
    unsupported: ClassVar[dict[str, str]] = {"multiple_heads": "its globals name one head"}

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.clear()
        self.handles = [
            layer.projection.register_forward_pre_hook(make_hook(layer.index, layer.head_dim))
            for layer in find_heads(model).layers
        ]

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        global layer_to_ablate, head_to_ablate, replace_zero
        self.clear()
        for layer_to_ablate, head_to_ablate in heads:  # noqa: B007 (the globals are what the hooks read)
            replace_zero = imputation == "zero"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids, attention_mask=attention_mask, **{"use_cache": False} | inputs).logits

    def clear(self) -> None:
        global layer_to_ablate
        layer_to_ablate = -1

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
