"""Gradients: the ablated forward pass has wrong gradients, or depends on whether gradients are enabled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants.mutant import Mutant


class ZDetached(Mutant):
    """Edits a detached copy of z, so that no gradient reaches the other heads of the layer."""

    differentiable = True
    expected_check = "gradients.zero"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        return super().replace_heads(z.detach(), heads)


class WrittenThroughData(Mutant):
    """Writes through `.data`, so that the backward pass does not know of the replacement."""

    differentiable = True
    expected_check = "gradients.zero"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        out.data.copy_(super().replace_heads(z, heads))
        return out


class OthersFrozen(Mutant):
    """Stops the gradient of every layer from the first ablated one on, even of those that are not ablated."""

    differentiable = True
    expected_check = "gradients.zero"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        edited = super().hook(layer, module, args) or args
        return (edited[0].detach(),) if self.heads and layer > min(self.heads)[0] else edited


class RemovedBeforeBackward(Mutant):
    """Removes its hooks after the forward pass, although checkpointing runs the layers again in the backward pass."""

    differentiable = True
    source = "stanfordnlp/pyvene#231"
    expected_check = "gradients.checkpointing"

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        try:
            super().install()
            return super().forward(input_ids, **inputs)
        finally:
            self.remove()


class OncePerRun(Mutant):
    """Edits each layer once per run, and so not when checkpointing runs it again."""

    differentiable = True
    source = "huggingface/peft#2826"
    expected_check = "gradients.checkpointing"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.edited: set[int] = set()
        return super().forward(input_ids, **inputs)

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if layer in self.edited:
            return None
        self.edited.add(layer)
        return super().hook(layer, module, args)


class OnlyWithGradients(Mutant):
    """Does nothing under torch.no_grad()."""

    differentiable = True
    expected_check = "independence.gradient_mode"

    def targets(self, layer: int) -> list[int]:
        return super().targets(layer) if torch.is_grad_enabled() else []


class NotInInference(Mutant):
    """Does nothing under torch.inference_mode()."""

    expected_check = "independence.gradient_mode"

    def targets(self, layer: int) -> list[int]:
        return [] if torch.is_inference_mode_enabled() else super().targets(layer)


class BufferOfInference(Mutant):
    """Keeps a buffer that was made under torch.inference_mode(), and cannot be written to elsewhere."""

    expected_check = "independence.gradient_mode"
    crashes = RuntimeError

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        buffers: dict[Any, Tensor] = self.__dict__.setdefault("buffers", {})
        buffer = buffers.setdefault((z.shape, z.dtype), torch.empty_like(z))
        return buffer.copy_(super().replace_heads(z, heads)).clone()
