"""Imputations: the values that replace a head's z, and the properties that each imputation promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ablation.errors import UnknownImputation


@dataclass(frozen=True, eq=False)
class Imputation:
    """Replaces z, the output of one head before the projection.

    name: identifies the imputation in results. per_token: promises that the value at a token depends on that token
    alone, so that later tokens and tokens in a key/value cache do not matter. Every imputation must be independent of
    the other rows of the batch and of padding.
    """

    name: ClassVar[str]
    per_token: ClassVar[bool]

    def __call__(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the replacement: a new tensor that broadcasts to z's shape, of z's dtype and device.

        z: [rows, tokens, head_dim], any floating dtype; must not be written to. mask: [rows, tokens], nonzero at real
        tokens, on z's device; None if no mask is known; an imputation that is per token must not need it.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Zero(Imputation):
    """Replaces z by 0: the head writes nothing to the residual stream."""

    name: ClassVar[str] = "zero"
    per_token: ClassVar[bool] = True

    def __call__(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return 0, as a tensor without dimensions."""
        return z.new_zeros(())


@dataclass(frozen=True, eq=False)
class Mean(Imputation):
    """Replaces z by one number for each row: the mean of z over the row's real tokens and all channels.

    This is the mean of the published GPT-2 experiment (golden/gpt2/claims.toml); for one prompt without padding, the
    mean is `z.mean()`. In the literature, "mean ablation" usually has another meaning: a vector of channel means over a
    reference data set. The mean depends on later tokens, so `per_token` is False.
    """

    name: ClassVar[str] = "mean"
    per_token: ClassVar[bool] = False

    def __call__(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the means, [rows, 1, 1], computed in float64 (float32 on MPS, which lacks it) and rounded once.

        The mean of a row without real tokens is NaN.
        """
        per_token = z.to(torch.float32 if z.device.type == "mps" else torch.float64).mean(dim=-1)  # [rows, tokens]
        if mask is None:
            mean = per_token.mean(dim=-1)  # [rows]
        else:
            real = mask != 0
            mean = per_token.where(real, 0.0).sum(dim=-1) / real.sum(dim=-1)  # not a product: padding may hold NaN
        return mean.to(z.dtype)[:, None, None]


IMPUTATIONS: dict[str, Imputation] = {imputation.name: imputation for imputation in (Zero(), Mean())}


def as_imputation(imputation: str | Imputation) -> Imputation:
    """Return the imputation of that name, or the given one. Raises UnknownImputation."""
    if isinstance(imputation, str) and imputation in IMPUTATIONS:
        return IMPUTATIONS[imputation]
    if not isinstance(imputation, Imputation):
        raise UnknownImputation(f"unknown imputation {imputation!r}: use one of {', '.join(map(repr, IMPUTATIONS))}")
    for attribute, kind in (("name", str), ("per_token", bool)):
        if not isinstance(getattr(imputation, attribute, None), kind):
            raise UnknownImputation(f"{type(imputation).__name__} does not declare `{attribute}`, a {kind.__name__}")
    return imputation
