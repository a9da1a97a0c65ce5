"""`Reference` with every imputation, and with positions, in steps that a mutant can override one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ablation.checks.protocol import IMPUTATIONS
from tests.mutants.mutant import Mutant
from tests.mutants.reference import Reference

Batches = list[tuple[Tensor, Tensor]]
"""The z of one head in each batch of a reference, [rows, tokens, head_dim], and its mask, bool [rows, tokens]."""


class Everything(Reference):
    """Measures a reference in `ablate`, in the batches in which it is given."""

    imputations: ClassVar[tuple[str, ...]] = tuple(IMPUTATIONS)

    def __init__(self, model: PreTrainedModel) -> None:
        self.positions: tuple[int, ...] | None = None
        self.factor = 1.0
        self.frozen: dict[tuple[int, int], Tensor] = {}  # what replaces z, if that does not depend on the run
        self.layer = -1  # whose hook is called
        super().__init__(model)

    # ---- the protocol

    def ablate(
        self,
        heads: Sequence[tuple[int, int]],
        imputation: str,
        *,
        values: Mapping[tuple[int, int], Tensor] | None = None,
        reference: Sequence[Mapping[str, Tensor]] | None = None,
        positions: tuple[int, ...] | None = None,
    ) -> None:
        kind, colon, factor = str(imputation).partition(":")
        if kind not in IMPUTATIONS or bool(colon) != (kind == "scale") or not math.isfinite(float(factor or 1)):
            raise ValueError(f"no imputation {imputation!r}")
        multiplier = float(factor) if colon else 1.0
        for pair in heads:
            self.check(*pair)
        frozen = dict(values or {})
        if reference is not None:
            frozen = self.measured(kind, heads, reference)
        self.heads, self.imputation, self.factor = list(heads), kind, multiplier
        self.frozen, self.positions = frozen, positions

    # ---- the reference

    def measured(
        self, kind: str, heads: Sequence[tuple[int, int]], reference: Sequence[Mapping[str, Tensor]]
    ) -> dict[tuple[int, int], Tensor]:
        of_batches = self.recorded(reference)
        step = {
            "reference-mean": self.reference_mean,
            "reference-mean-by-position": self.reference_mean_by_position,
            "resample": self.resampled,
        }[kind]
        found = {}
        for layer, head in heads:
            batches = [(z[layer][..., self.channels(head, z[layer])], real) for z, real in of_batches]
            found[layer, head] = step(batches)
        return found

    def recorded(self, reference: Sequence[Mapping[str, Tensor]]) -> list[tuple[dict[int, Tensor], Tensor]]:
        """Return the z of each layer in each batch, and the mask of the batch."""
        heads = self.heads
        self.heads = self.heads_in_reference()
        z: dict[int, Tensor] = {}
        handles: list[RemovableHandle] = []
        found = []
        try:
            self.record_with(handles, z)
            for batch in reference:
                ids, mask = batch["input_ids"], batch["attention_mask"]
                self.real = mask.bool()
                with torch.no_grad():
                    self.forward(ids, attention_mask=mask, position_ids=self.counted(mask.bool()))
                found.append((dict(z), mask.bool()))
        finally:
            self.heads = heads
            for handle in handles:
                handle.remove()
        return found

    def record_with(self, handles: list[RemovableHandle], z: dict[int, Tensor]) -> None:
        for layer, projection in enumerate(self.projections()):
            handles.append(projection.register_forward_pre_hook(partial(self.keep, z, layer)))

    def heads_in_reference(self) -> list[tuple[int, int]]:
        return []

    def keep(self, found: dict[int, Tensor], layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        found[layer] = args[0].clone()

    def reference_mean(self, batches: Batches) -> Tensor:
        """Return [head_dim]."""
        return torch.cat([z[real] for z, real in batches]).double().mean(dim=0)

    def reference_mean_by_position(self, batches: Batches) -> Tensor:
        """Return [positions, head_dim]."""
        longest = max(int(real.sum(dim=-1).max()) for _, real in batches)
        return torch.stack(
            [
                torch.cat([z[real & (self.counted(real) == at)] for z, real in batches]).double().mean(dim=0)
                for at in range(longest)
            ]
        )

    def resampled(self, batches: Batches) -> Tensor:
        """Return [rows, tokens, head_dim]."""
        ((z, _),) = batches
        return z

    # ---- positions

    def counted(self, real: Tensor) -> Tensor:
        """Return the position of each token, [rows, tokens]."""
        return (real.cumsum(dim=-1) - 1).clamp(min=0)

    def here(self, z: Tensor) -> Tensor:
        """Return the position of each token of this forward pass, which may follow those of a cache."""
        return self.counted(self.real)[:, -z.shape[1] :]

    def wanted(self, position: int) -> Tensor:
        """Return a position from the start of each row, [rows, 1]."""
        length = self.real.sum(dim=-1, keepdim=True)
        return length + position if position < 0 else torch.full_like(length, position)

    def at(self, z: Tensor) -> Tensor:
        """Return which tokens are replaced, bool [rows, tokens]."""
        assert self.positions is not None
        real = self.real[:, -z.shape[1] :]
        return real & torch.stack([self.here(z) == self.wanted(position) for position in self.positions]).any(dim=0)

    # ---- the replacement

    def channel_mean(self, z: Tensor, real: Tensor) -> Tensor:
        return (z.double().where(real[..., None], 0).sum(dim=1) / real.sum(dim=-1, keepdim=True))[:, None]

    def scaled(self, z: Tensor) -> Tensor:
        return z * self.factor if self.factor else torch.zeros_like(z)

    def value_of(self, z: Tensor, head: int) -> Tensor | float:
        """Return the replacement of one head's z, to which it broadcasts."""
        if self.imputation in ("zero", "mean"):
            return self.value(z)
        if self.imputation == "channel-mean":
            return self.channel_mean(z, self.real)
        if self.imputation == "scale":
            return self.scaled(z)
        frozen = self.frozen_of(head)
        return frozen[self.here(z)] if frozen.ndim == 2 else frozen

    def frozen_of(self, head: int) -> Tensor:
        return self.frozen[self.layer, head]

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        for head in heads:
            own = z[..., self.channels(head, z)]
            value = torch.as_tensor(self.value_of(own, head)).to(z.dtype).expand_as(own)
            out[..., self.channels(head, z)] = value if self.positions is None else self.placed(own, value)
        return out

    def placed(self, own: Tensor, value: Tensor) -> Tensor:
        """Return the value at the positions, and z elsewhere."""
        return torch.where(self.at(own)[..., None], value, own)

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.layer = layer
        return super().hook(layer, module, args)


class ImputationMutant(Everything, Mutant):
    """Differs from `Everything` in one way."""
