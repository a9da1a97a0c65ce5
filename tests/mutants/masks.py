"""Masks: an attention mask is read as if it had one form only, or hidden tokens have an influence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.mutants.mutant import Mutant


class BoolMaskIgnored(Mutant):
    """Takes a boolean mask for one that the model has made, and so for no mask of padding."""

    expected_check = "masks.dtype"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        self.boolean = attention_mask is not None and attention_mask.dtype == torch.bool
        return super().run(input_ids, attention_mask, **inputs)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, torch.ones_like(real) if self.boolean else real)


class FloatMaskIsAdded(Mutant):
    """Takes a mask of floats for one that is added to attention scores, in which 0 is real."""

    expected_check = "masks.dtype"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        mask = inputs.get("attention_mask")
        if mask is not None and mask.is_floating_point():
            self.real = mask == 0
        return super().forward(input_ids, **inputs)


class SpanOfMask(Mutant):
    """Counts every token between the first and the last real one as real."""

    expected_check = "masks.single_row"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        after_first, before_last = real.cumsum(dim=-1) > 0, real.flip(-1).cumsum(dim=-1).flip(-1) > 0
        return super().mean(z, after_first & before_last)


class SingleRowUnpadded(Mutant):
    """Ignores the mask of a batch of one, as if only batches had padding."""

    expected_check = "masks.single_row"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, torch.ones_like(real) if len(z) == 1 else real)


class EmptyRowSpoils(Mutant):
    """Writes zero for the whole batch if the mean of any row is not finite."""

    expected_check = "masks.empty_row"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        mean = super().mean(z, real)
        return mean if mean.isfinite().all() else torch.zeros_like(mean)


class RowsSkipped(Mutant):
    """Computes the means of the rows that have tokens, and assigns them to the first rows of the batch."""

    expected_check = "masks.empty_row"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        mean = super().mean(z, real)
        some = real.any(dim=-1)
        return torch.cat([mean[some], mean[~some]])


class MaskByProduct(Mutant):
    """Multiplies z by the mask to leave out the padding, where NaN times 0 is NaN."""

    expected_check = "masks.non_finite"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        per_token = z.double().mean(dim=-1) * real
        return (per_token.sum(dim=-1) / real.sum(dim=-1))[:, None, None].to(z.dtype)
