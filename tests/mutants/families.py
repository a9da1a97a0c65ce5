"""Families: works on one architecture or attention implementation, and quietly does something else on another."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.mutants.mutant import Mutant


class LinearOnly(Mutant):
    """Looks for `nn.Linear`, which a GPT-2's projection is not."""

    killer = "smoke"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return super().hook(layer, module, args) if isinstance(module, nn.Linear) else None


class EagerOnly(Mutant):
    """Does nothing under any attention implementation but eager."""

    source = "stanfordnlp/pyvene#202"
    killer = "smoke"

    def targets(self, layer: int) -> list[int]:
        return super().targets(layer) if self.config._attn_implementation == "eager" else []


class GroupedLeft(Mutant):
    """Does nothing where query heads share key/value heads."""

    killer = "smoke"

    def targets(self, layer: int) -> list[int]:
        shared = getattr(self.config, "num_key_value_heads", self.count())
        return super().targets(layer) if shared == self.count() else []


class ExpertsLeft(Mutant):
    """Does nothing in a mixture of experts."""

    killer = "locality.padded"

    def targets(self, layer: int) -> list[int]:
        return [] if hasattr(self.config, "num_local_experts") else super().targets(layer)


class ThirdLayerLeft(Mutant):
    """Hooks as many layers as the toy model had on which it was tried."""

    killer = "smoke"

    def projections(self) -> list[nn.Module]:
        return super().projections()[:2]


class SingleTokenLeft(Mutant):
    """Squeezes a dimension of one token, and then sees no layer in it."""

    killer = "locality"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        return super().edited(z, heads) if z.shape[1] > 1 else z
