"""Dtype: numbers that pass through a type that cannot hold them, and other arithmetic that is nearly right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants.mutant import Mutant


class FillerOfDefaultType(Mutant):
    """Makes its filler in float32 whatever z is: torch then widens a bfloat16 z, and the projection refuses it."""

    source = "TransformerLensOrg/TransformerLens#1260"
    crashes = RuntimeError

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        if self.imputation == "mean":
            return super().edited(z, heads)
        channels = torch.zeros(z.shape[-1], dtype=torch.bool)
        for head in heads:
            channels[self.channels(head, z)] = True
        return torch.where(channels, torch.zeros(z.shape), z)


class MeanInFloat32(Mutant):
    """Rounds the mean to float32."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real).float().to(z.dtype)


class MeanInFloat16(Mutant):
    """Rounds the mean to float16."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real).half().to(z.dtype)


class LayerInFloat16(Mutant):
    """Takes the whole layer through float16: all heads are rounded."""

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        return super().edited(z, heads).half().to(z.dtype)


class FloatForAll(Mutant):
    """Takes every layer through float32, also where nothing is ablated: the identity is none."""

    killer = "identity"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return ((super().hook(layer, module, args) or args)[0].float().to(args[0].dtype),)


class HalfForAll(Mutant):
    """Takes every layer through bfloat16, also where nothing is ablated."""

    killer = "identity"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return ((super().hook(layer, module, args) or args)[0].bfloat16().to(args[0].dtype),)


class LogitsInFloat32(Mutant):
    """Returns the logits in float32, whatever the model's type."""

    killer = "identity"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs).float()


class NearlyZero(Mutant):
    """Writes a small number for zero, so as not to divide by it later."""

    def zero(self, z: Tensor) -> Tensor | float:
        return 1e-6


class NearlyOff(Mutant):
    """Scales the head down instead of switching it off."""

    def zero(self, z: Tensor) -> Tensor | float:
        return z * 1e-3


class Negated(Mutant):
    """Subtracts the head twice."""

    def zero(self, z: Tensor) -> Tensor | float:
        return -z


class OthersRescaled(Mutant):
    """Scales the other heads up to make good for the one that is missing, as dropout does."""

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z * (self.count() / max(1, self.count() - len(heads)))
        for head in heads:
            out[..., self.channels(head, z)] = self.value(z[..., self.channels(head, z)])
        return out


class LogitsNormalised(Mutant):
    """Returns log-probabilities for logits."""

    killer = "identity"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs).log_softmax(dim=-1)
