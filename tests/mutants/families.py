"""Families: works on one architecture or attention implementation, and silently fails on another."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.mutants.mutant import Mutant


class LinearOnly(Mutant):
    """Looks for `nn.Linear`, which the projection of a GPT-2 is not."""

    expected_check = "smoke"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return super().hook(layer, module, args) if isinstance(module, nn.Linear) else None


class EagerOnly(Mutant):
    """Does nothing under any attention implementation but eager."""

    source = "stanfordnlp/pyvene#202"
    expected_check = "smoke"

    def targets(self, layer: int) -> list[int]:
        return super().targets(layer) if self.config._attn_implementation == "eager" else []


class GroupedLeft(Mutant):
    """Does nothing if query heads share key/value heads."""

    expected_check = "smoke"

    def targets(self, layer: int) -> list[int]:
        shared = getattr(self.config, "num_key_value_heads", self.num_heads())
        return super().targets(layer) if shared == self.num_heads() else []


class ExpertsLeft(Mutant):
    """Does nothing in a mixture of experts."""

    expected_check = "locality.padded"

    def targets(self, layer: int) -> list[int]:
        return [] if hasattr(self.config, "num_local_experts") else super().targets(layer)


class ThirdLayerLeft(Mutant):
    """Hooks only as many layers as the toy model had on which it was tried."""

    expected_check = "smoke"

    def projections(self) -> list[Any]:
        return super().projections()[:2]


class InsideTheWrapper(Mutant):
    """Hooks the layer inside the wrapper of an adapter, so that the adapter still reads the head."""

    expected_check = "layouts.low_rank"

    def projections(self) -> list[Any]:
        return [getattr(projection, "base_layer", projection) for projection in super().projections()]


class SingleTokenLeft(Mutant):
    """Squeezes the dimension of a single token, and then finds nothing to ablate."""

    expected_check = "locality"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        return super().replace_heads(z, heads) if z.shape[1] > 1 else z
