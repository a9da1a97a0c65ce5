"""Layouts: heads are where they are in a plain decoder, and elsewhere in hybrids and in models of several parts."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from tests.mutants.mutant import Mutant

PROJECTION = re.compile(r"(attn|attention)\.(c_proj|o_proj|out_proj|dense)$")


class LayersByOrder(Mutant):
    """Takes the l-th module with the name of a projection for layer l, although some layers have none."""

    source = "p-e-w/heretic#187, intel/auto-round#576"
    expected_check = "layouts.hybrid"

    def projections(self) -> list[Any]:
        return [module for name, module in self.model.named_modules() if PROJECTION.search(name)]


class LayersByNumber(Mutant):
    """Reads the layer from the number in a module's name, which the layers of a vision tower have, too."""

    expected_check = "layouts.vision"

    def projections(self) -> list[Any]:
        found: dict[int, nn.Module] = {}
        for name, module in self.model.named_modules():
            if PROJECTION.search(name) and (number := re.search(r"\.(\d+)\.", name)):
                found.setdefault(int(number[1]), module)
        return [found.get(layer, nn.Identity()) for layer in range(len(self.layers()))]


class SlidingLayersLeft(Mutant):
    """Does nothing in layers with a sliding window."""

    expected_check = "layouts.sliding_window"

    def targets(self, layer: int) -> list[int]:
        kinds = getattr(self.config, "layer_types", None) or []
        return [] if kinds and kinds[layer] == "sliding_attention" else super().targets(layer)


class WindowOnly(Mutant):
    """Takes the mean of the tokens in the last window only."""

    expected_check = "layouts.sliding_window"

    def mean(self, z: Any, real: Any) -> Any:
        window = getattr(self.config, "sliding_window", None)
        return super().mean(z[:, -window:], real[:, -window:]) if window else super().mean(z, real)
