"""Imputations: the values that replace a head's z, and the properties that each imputation promises.

docs/imputations.md says what each choice means and assumes, and who uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ablation.errors import InvalidAblation, UnknownImputation
from ablation.projections import MLPOutput, Projection

Reads = Literal["nothing", "token", "row"]
"""What of z an imputation reads to make its values: see `Imputation`."""


@dataclass(frozen=True, eq=False)
class Site:
    """Where an imputation is applied. A slice is one head, or the MLP, of one row: several slices are replaced at once.

    layer: the index of the layer. heads: the head of each slice, int64 [slices]; 0 for an MLP. is_mlp: whether the
    slices are the output of the layer's MLP, not of heads. longest: no row has more tokens, those
    in a key/value cache included; known without a wait for the device. mask: [slices, tokens], nonzero at real tokens,
    or None if no token is known to be padding. positions: int64 [slices, tokens], the number of real tokens before each
    token of its row, those in a cache included; in padding, that of the last real token, or 0 before the first; 0 at
    tokens whose z is not replaced; None unless the imputation is `by_position`. All tensors are on z's device.
    """

    layer: int
    heads: Tensor
    longest: int
    mask: Tensor | None = None
    positions: Tensor | None = None
    is_mlp: bool = False


class Imputation:
    """Replaces z: the output of one head before the projection, or of an MLP. Subclasses declare what they promise.

    name: identifies the imputation in results. reads: what of z the values depend on. "nothing": they are fixed before
    the run. "token": the value at a token depends on z at this token alone. "row": it depends on all real tokens of the
    row, so each forward pass has to contain the whole row, and no key/value cache may be used. by_position: whether the
    values depend on the positions of the tokens. No imputation depends on other rows of the batch, or on padding.
    """

    name: ClassVar[str]
    reads: ClassVar[Reads]
    by_position: ClassVar[bool] = False

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        """Return the values that replace z: a tensor that broadcasts to z's shape, of z's dtype and device.

        z: [slices, tokens, head_dim], any floating dtype; must not be written to.
        """
        raise NotImplementedError

    def validate(self, layer: Projection) -> None:
        """Raise InvalidAblation if the imputation has no values for the heads of a layer, or for an `MLPOutput`."""


class Zero(Imputation):
    """Replaces z by 0: the head writes nothing to the residual stream."""

    name: ClassVar[str] = "zero"
    reads: ClassVar[Reads] = "nothing"

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        """Return 0, as a tensor without dimensions."""
        return z.new_zeros(())


class Mean(Imputation):
    """Replaces z by one number for each row: the mean of z over the row's real tokens and all channels.

    This is the mean of the published GPT-2 experiment (golden/gpt2/claims.toml); for one prompt without padding, the
    mean is `z.mean()`. In the literature, "mean ablation" usually has another meaning: see `Reference`.
    """

    name: ClassVar[str] = "mean"
    reads: ClassVar[Reads] = "row"

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        """Return the means, [slices, 1, 1]. The mean of a row without real tokens is NaN."""
        return _mean_over_tokens(_accumulable(z).mean(dim=-1, keepdim=True), site.mask).to(z.dtype)


class ChannelMean(Imputation):
    """Replaces z by its mean over the row's real tokens, for each channel by itself."""

    name: ClassVar[str] = "channel-mean"
    reads: ClassVar[Reads] = "row"

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        """Return the means, [slices, 1, head_dim]. The means of a row without real tokens are NaN."""
        return _mean_over_tokens(_accumulable(z), site.mask).to(z.dtype)


def _accumulable(z: Tensor) -> Tensor:
    """Return z in float64, or in float32 on MPS, which lacks float64: means are rounded to z's dtype once."""
    return z.to(torch.float32 if z.device.type == "mps" else torch.float64)


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the real tokens, [slices, tokens, n] -> [slices, 1, n]."""
    if mask is None:
        return values.mean(dim=1, keepdim=True)
    real = (mask != 0)[..., None]
    # Not a product with the mask: padding may hold NaN.
    return values.where(real, 0.0).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Scale(Imputation):
    """Multiplies z by a number: 0 gives what `Zero` gives, and 1 changes no bit; a NaN stays a NaN.

    factor: any finite number, kept as a float. Raises UnknownImputation for anything else.
    """

    factor: float
    reads: ClassVar[Reads] = "token"

    def __post_init__(self) -> None:
        factor = self.factor
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise UnknownImputation(f"scale multiplies z by a number, not by {factor!r}")
        if not abs(factor) <= sys.float_info.max:  # NaN, infinity, or an int beyond all floats
            raise UnknownImputation("scale multiplies z by a finite number that fits a float")
        object.__setattr__(self, "factor", float(factor) + 0.0)  # not -0.0

    @property
    def name(self) -> str:  # type: ignore[override]
        """The imputation with its factor, such as scale:0.5."""
        return f"scale:{str(self.factor).removesuffix('.0')}"  # all digits: another factor has another name

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        """Return z times the factor, or 0 also where z is not finite if the factor is 0."""
        return z * self.factor if self.factor else z.new_zeros(())


class Values(Imputation):
    """Replaces z by given values: the same ones for every token, or those of the token's position.

    values: {layer: tensor}, with a tensor of [num_heads, head_dim] in every layer, or of [positions, num_heads,
    head_dim] in every layer. name: identifies the imputation in results. Raises UnknownImputation for other values.
    """

    reads: ClassVar[Reads] = "nothing"

    def __init__(self, values: Mapping[int, Tensor], name: str = "values") -> None:
        if not isinstance(values, Mapping) or not all(
            isinstance(v, Tensor) and v.ndim in (2, 3) and v.is_floating_point() for v in values.values()
        ):
            raise UnknownImputation(
                "values are {layer: tensor}, with tensors of [num_heads, head_dim] or [positions, num_heads, head_dim]"
            )
        if len({v.shape[:-2] for v in values.values()}) != 1:
            raise UnknownImputation("values have as many positions in one layer as in any other, in at least one layer")
        self.values = {layer: v.detach() for layer, v in values.items()}
        self.name = name  # type: ignore[misc]
        self.by_position = next(iter(values.values())).ndim == 3  # type: ignore[misc]

    def validate(self, layer: Projection) -> None:
        """Raise InvalidAblation unless there are values of all heads of a layer. There are none for MLPs."""
        if isinstance(layer, MLPOutput):
            raise InvalidAblation(f"{self.name!r} has values for heads, and none for the MLP of layer {layer.index}")
        if layer.index not in self.values:
            raise InvalidAblation(f"the values of {self.name!r} do not include layer {layer.index}")
        *_, num_heads, head_dim = self.values[layer.index].shape
        if (num_heads, head_dim) != (layer.num_heads, layer.head_dim):
            raise InvalidAblation(
                f"the values of {self.name!r} in layer {layer.index} are of {num_heads} heads of {head_dim} channels, "
                f"but the layer has {layer.num_heads} heads of {layer.head_dim}: they are of another model"
            )

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        """Return the values, [slices, 1, head_dim] or [slices, tokens, head_dim].

        Raises InvalidAblation if a row is longer than the values.
        """
        values = self.values[site.layer].to(z.dtype).to(z.device)  # in this order: MPS has no float64
        if not self.by_position:
            return values[site.heads, None]
        assert site.positions is not None
        if site.longest > len(values) and (last := int(site.positions.max())) >= len(values):
            raise InvalidAblation(
                f"the values of {self.name!r} end at position {len(values) - 1}, the prompt at {last}"
            )
        return values[site.positions, site.heads[:, None]]


IMPUTATIONS: dict[str, Imputation] = {imputation.name: imputation for imputation in (Zero(), Mean(), ChannelMean())}
"""Imputations that need nothing but the prompt, by name."""
DEFAULT_IMPUTATIONS = ("zero", "mean")
"""Those of the published experiment."""


def as_imputation(imputation: str | Imputation) -> Imputation:
    """Return the imputation of that name, or the given one. Raises UnknownImputation.

    Names are those of `IMPUTATIONS`, and `scale:FACTOR`.
    """
    if isinstance(imputation, str):
        if imputation in IMPUTATIONS:
            return IMPUTATIONS[imputation]
        kind, colon, factor = imputation.partition(":")
        if kind == "scale" and colon:
            try:
                return Scale(float(factor))
            except ValueError:
                pass
    if not isinstance(imputation, Imputation):
        known = ", ".join(map(repr, [*IMPUTATIONS, "scale:0.5"]))
        raise UnknownImputation(f"unknown imputation {imputation!r}: use one of {known}, or an `Imputation`")
    name, reads, by_position = (getattr(imputation, key, None) for key in ("name", "reads", "by_position"))
    if not isinstance(name, str) or reads not in get_args(Reads) or not isinstance(by_position, bool):
        raise UnknownImputation(
            f"{type(imputation).__name__} has to declare `name`, a str, `reads`, which is "
            f"{' or '.join(map(repr, get_args(Reads)))}, and `by_position`, a bool"
        )
    try:
        hash(imputation)
    except TypeError:
        raise UnknownImputation(
            f"{type(imputation).__name__} has to be hashable, as a dataclass is with `frozen=True` or `eq=False`"
        ) from None
    return imputation
