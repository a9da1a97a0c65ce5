"""Dtype: numbers pass through a dtype that cannot hold them, or the arithmetic is nearly right."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.mutants.correct_variants import Multiplied
from tests.mutants.mutant import Mutant


class FillerOfDefaultType(Mutant):
    """Makes its filler in float32 for any z: torch then promotes a bfloat16 z, and the projection rejects it."""

    source = "TransformerLensOrg/TransformerLens#1260"
    crashes = RuntimeError

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        if self.imputation == "mean":
            return super().replace_heads(z, heads)
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
    """Casts the whole layer to float16 and back, which rounds all heads."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        return super().replace_heads(z, heads).half().to(z.dtype)


class FloatForAll(Mutant):
    """Casts every layer to float32 and back, even if nothing is ablated."""

    expected_check = "identity"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return ((super().hook(layer, module, args) or args)[0].float().to(args[0].dtype),)


class HalfForAll(Mutant):
    """Casts every layer to bfloat16 and back, even if nothing is ablated."""

    expected_check = "identity"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return ((super().hook(layer, module, args) or args)[0].bfloat16().to(args[0].dtype),)


class LogitsInFloat32(Mutant):
    """Returns the logits in float32, whatever the model's dtype."""

    expected_check = "identity"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs).float()


class NearlyZero(Mutant):
    """Writes a small number instead of zero, to avoid dividing by zero later."""

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
    """Scales the other heads up to compensate for the missing one, as dropout does."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z * (self.num_heads() / max(1, self.num_heads() - len(heads)))
        for head in heads:
            out[..., self.channels(head, z)] = self.value(z[..., self.channels(head, z)])
        return out


class LogitsNormalised(Mutant):
    """Returns log-probabilities instead of logits."""

    expected_check = "identity"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, **inputs).log_softmax(dim=-1)


class TimesZero(Mutant, Multiplied):
    """Multiplies z by 0, and NaN times 0 is NaN."""

    expected_check = "oracle.non_finite"
    unsupported: ClassVar[dict[str, str]] = {}


class MinusItself(Mutant):
    """Subtracts z from itself, and infinity minus infinity is NaN."""

    expected_check = "oracle.non_finite"

    def zero(self, z: Tensor) -> Tensor | float:
        return z - z


class MeanByProduct(Mutant):
    """Selects the head by a product with a mask of channels, to which NaN in other heads adds NaN."""

    expected_check = "locality.non_finite"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        self.z = z
        return super().replace_heads(z, heads)

    def channels(self, head: int, z: Tensor) -> slice:
        self.head = head
        return super().channels(head, z)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        chosen = torch.zeros(self.z.shape[-1], dtype=torch.float64)
        chosen[self.channels(self.head, self.z)] = 1
        per_token = (self.z.double() @ chosen / chosen.sum()).where(real, 0)
        return (per_token.sum(dim=-1) / real.sum(dim=-1))[:, None, None].to(z.dtype)
