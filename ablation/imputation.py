"""What replaces the output of a head, and what that choice promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ablation.errors import UnknownImputation


@dataclass(frozen=True, eq=False)
class Imputation:
    """Replaces z, the output of one head before the projection.

    `pointwise` promises that the value at one token depends on no other token: neither on later ones (causality),
    nor on those already in a key/value cache. Every imputation is independent of the other rows of the batch and of
    padding.
    """

    name: ClassVar[str]
    per_token: ClassVar[bool]

    def __call__(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The replacement for z.

        z: [rows, tokens, width], any floating dtype. mask: [rows, tokens], nonzero at real tokens, on z's device; None
        if all are real.
        Returns a new tensor of z's dtype and device that broadcasts to z's shape.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Zero(Imputation):
    """z becomes 0: the head writes nothing to the residual stream."""

    name: ClassVar[str] = "zero"
    per_token: ClassVar[bool] = True

    def __call__(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """0, of no dimensions."""
        return z.new_zeros(())


@dataclass(frozen=True, eq=False)
class Mean(Imputation):
    """z becomes one number a row: the mean of z over the row's real tokens and all channels.

    For one prompt without padding it is `z.mean()`. It sees later tokens, hence it is not pointwise.
    """

    name: ClassVar[str] = "mean"
    per_token: ClassVar[bool] = False

    def __call__(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The means, [rows, 1, 1]; computed in float64, where the device has it, and rounded once."""
        per_token = z.to(torch.float32 if z.device.type == "mps" else torch.float64).mean(dim=-1)  # [rows, tokens]
        if mask is None:
            mean = per_token.mean(dim=-1)  # [rows]
        else:
            real = mask != 0
            # where, not a product: a pad may hold NaN. A row with no real token has no mean: 0 / 0 is NaN, and shows.
            mean = per_token.where(real, 0.0).sum(dim=-1) / real.sum(dim=-1)
        return mean.to(z.dtype)[:, None, None]


IMPUTATIONS: dict[str, Imputation] = {imputation.name: imputation for imputation in (Zero(), Mean())}


def as_imputation(imputation: str | Imputation) -> Imputation:
    """The imputation of that name. Raises UnknownImputation."""
    if isinstance(imputation, Imputation):
        return imputation
    if isinstance(imputation, str) and imputation in IMPUTATIONS:
        return IMPUTATIONS[imputation]
    raise UnknownImputation(f"unknown imputation {imputation!r}: use one of {', '.join(map(repr, IMPUTATIONS))}")
