"""Head ablation by forward pre-hooks, in steps that a mutant can override one at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

PLACES = {  # family -> its list of layers, and the attention output projection in each
    "gpt2": ("transformer.h", "attn.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense"),
    "opt": ("model.decoder.layers", "self_attn.out_proj"),
    "lfm2": ("model.layers", "self_attn.out_proj"),
    "gemma3": ("model.language_model.layers", "self_attn.o_proj"),
}
LLAMA = ("model.layers", "self_attn.o_proj")


class Reference:
    """One hook on each projection, from `__init__` to `close`, which replaces slices of a copy of z."""

    unsupported: ClassVar[Mapping[str, str]] = {}
    differentiable: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config.get_text_config()
        self.heads: list[tuple[int, int]] = []
        self.imputation = "zero"
        self.real: Any = None  # [rows, tokens] bool, in a run
        self.handles: list[RemovableHandle] = []
        try:
            self.install()
        except BaseException:
            self.remove()
            raise

    def __deepcopy__(self, memo: Any) -> Reference:
        """A copy of the model has the hooks, too: those of the copy ablate nothing."""
        idle = copy.copy(self)
        idle.heads, idle.handles = [], []
        return idle

    # ---- which channels of which projection

    def layers(self) -> list[Any]:
        layers: Any = self.model.get_submodule(PLACES.get(self.model.config.model_type, LLAMA)[0])
        return list(layers)

    def projections(self) -> list[Any]:
        """Return the projection of each layer; of a layer without heads, a module that is never called."""
        name = PLACES.get(self.model.config.model_type, LLAMA)[1]
        return [
            block.get_submodule(name) if hasattr(block, name.split(".")[0]) else nn.Identity()
            for block in self.layers()
        ]

    def num_heads(self) -> int:
        count: int = self.config.num_attention_heads
        return count

    def head_dim(self, z: Tensor) -> int:
        return z.shape[-1] // self.num_heads()

    def channels(self, head: int, z: Tensor) -> slice:
        return slice(head * self.head_dim(z), (head + 1) * self.head_dim(z))

    def targets(self, layer: int) -> list[int]:
        return [head for index, head in self.heads if index == layer]

    # ---- the replacement

    def value(self, z: Tensor) -> Tensor | float:
        """Return the replacement of one head's z, [rows, tokens, head_dim], to which it broadcasts."""
        return self.zero(z) if self.imputation == "zero" else self.mean(z, self.real)

    def zero(self, z: Tensor) -> Tensor | float:
        return 0.0

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        per_token = z.double().mean(dim=-1).where(real, 0)  # [rows, tokens]
        return (per_token.sum(dim=-1) / real.sum(dim=-1))[:, None, None].to(z.dtype)

    # ---- the hook

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        """Return a copy of z, [rows, tokens, num_heads * head_dim], with these heads replaced."""
        out = z.clone()
        for head in heads:
            channels = self.channels(head, z)
            out[..., channels] = self.value(z[..., channels])
        return out

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if heads := self.targets(layer):
            return (self.replace_heads(args[0], heads), *args[1:])
        return None

    def install(self) -> None:
        for layer, projection in enumerate(self.projections()):
            self.handles.append(projection.register_forward_pre_hook(partial(self.hook, layer)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    # ---- the protocol

    def check(self, layer: Any, head: Any) -> None:
        for index, size in ((layer, len(self.layers())), (head, self.num_heads())):
            if type(index) is not int or not 0 <= index < size:
                raise IndexError(f"no layer {layer!r} head {head!r}")

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        if imputation not in ("zero", "mean"):
            raise ValueError(f"no imputation {imputation!r}")
        for pair in heads:
            self.check(*pair)
        self.heads, self.imputation = list(heads), imputation

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        self.real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return self.forward(input_ids, attention_mask=attention_mask, **inputs)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        logits: Tensor = self.model(input_ids, **{"use_cache": False} | inputs).logits
        return logits

    def clear(self) -> None:
        self.heads = []

    def close(self) -> None:
        self.clear()
        self.remove()
