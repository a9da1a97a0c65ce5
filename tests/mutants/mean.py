"""Mean: another number than the mean of the head's z over its row's real tokens and channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.mutants.mutant import Mutant


class MeanPerChannel(Mutant):
    """Takes a mean over tokens for each channel."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        kept = z.where(real[..., None], 0)
        return kept.sum(dim=1, keepdim=True) / real.sum(dim=-1)[:, None, None]


class MeanPerToken(Mutant):
    """Takes a mean over channels for each token."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return z.mean(dim=-1, keepdim=True)


class MeanOverRows(Mutant):
    """Takes a mean over the batch: with one prompt, that changes nothing."""

    killer = "smoke"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return z.mean(dim=0, keepdim=True)


class MeanOfBatch(Mutant):
    """Takes one mean for all rows of a batch."""

    killer = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return z[real].double().mean().to(z.dtype)


class MeanOfFirstRow(Mutant):
    """Takes the first row's mean for all rows."""

    killer = "independence.rows"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real)[:1]


class MeanOfPadding(Mutant):
    """Takes the padding into the mean."""

    killer = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, torch.ones_like(real))


class MaskOfLastToken(Mutant):
    """Builds its own mask, which marks only the last real token of each row."""

    source = "hannamw/EAP-IG, utils.py"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        last = real.flip(1).int().argmax(dim=1).neg() + real.shape[1] - 1
        return super().mean(z, torch.arange(real.shape[1]) == last[:, None])


class MaskFlipped(Mutant):
    """Reads padding on the left as padding on the right."""

    killer = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real.flip(1))


class PaddingCounted(Mutant):
    """Sums the real tokens and divides by all."""

    killer = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z.where(real[..., None], 0), torch.ones_like(real))


class MeanOfMeans(Mutant):
    """Averages the means of pieces of unequal length."""

    source = "UFO-101/auto-circuit, a comment on its means over batches"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        rows = [
            torch.stack([piece.mean() for piece in row[here].split(3)]).mean()
            for row, here in zip(z, real, strict=True)
        ]
        return torch.stack(rows)[:, None, None]


class MeanOfTokensBefore(Mutant):
    """Takes, at each token, the mean of the tokens up to it."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        kept = z.mean(dim=-1).where(real, 0).cumsum(dim=-1)
        return (kept / real.cumsum(dim=-1).clamp(min=1))[..., None]


class FirstTokenNotMeant(Mutant):
    """Leaves the first token out of the mean."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        rest = real & (real.cumsum(dim=-1) > 1)
        return super().mean(z, rest.where(rest.any(dim=-1, keepdim=True), real))


class MeanOfOneLess(Mutant):
    """Divides by n - 1."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        n = (real.sum(dim=-1) * z.shape[-1])[:, None, None]
        return super().mean(z, real) * n / (n - 1)


class MeanOfAblated(Mutant):
    """Measures the mean behind its own hook, where the head is off already."""

    source = "ArthurConmy/Automatic-Circuit-Discovery#52"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(torch.zeros_like(z), real)


class MeanOfLayer(Mutant):
    """Takes one mean for all heads of the layer."""

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        self.layer = z
        return super().edited(z, heads)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(self.layer, real)


class MeanOfSet(Mutant):
    """Takes one mean for all ablated heads of a layer."""

    killer = "locality.sets"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        for head in heads:
            together = torch.cat([z[..., self.channels(head, z)] for head in sorted(set(heads))], dim=-1)
            out[..., self.channels(head, z)] = self.value(together)
        return out


class MeanOfSizes(Mutant):
    """Averages the absolute values."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z.abs(), real)


class Median(Mutant):
    """Takes the median."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return torch.stack([row[here].median() for row, here in zip(z, real, strict=True)])[:, None, None]


class ZeroForMean(Mutant):
    """Falls through to zeros for any other imputation."""

    def value(self, z: Tensor) -> Tensor | float:
        return self.zero(z)


class MeanForZero(Mutant):
    """Swaps the two imputations."""

    def value(self, z: Tensor) -> Tensor | float:
        return self.mean(z, self.real) if self.imputation == "zero" else self.zero(z)


class DeviationKept(Mutant):
    """Subtracts the mean instead of setting it."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return z - super().mean(z, real)


class HalfWay(Mutant):
    """Goes half of the way to the mean."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return (z + super().mean(z, real)) / 2


class MeanOfUnmaskedBatch(Mutant):
    """Takes one mean for all rows of a batch that has no attention mask."""

    killer = "independence.rows"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        self.masked = attention_mask is not None
        return super().run(input_ids, attention_mask, **inputs)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real) if self.masked else z.double().mean().to(z.dtype)


class PaddingByToken(Mutant):
    """Takes every padding token of the configuration for padding, whatever the mask says."""

    killer = "oracle.mean"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        if self.config.pad_token_id is not None:
            self.real = input_ids != self.config.pad_token_id
        return super().forward(input_ids, **inputs)


class MaskUsedUp(Mutant):
    """Takes the mask out of its state in the first layer that needs it, and has none in those above."""

    killer = "independence.padding"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        out = super().edited(z, heads)
        self.real = torch.ones_like(self.real)
        return out


class MaskOfFirstHead(Mutant):
    """Overwrites the mask with its weights, which leaves none for the next head of the layer."""

    killer = "locality.padded"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        out, real = z.clone(), self.real
        for head in heads:
            channels = self.channels(head, z)
            out[..., channels] = self.value(z[..., channels])
            self.real = torch.ones_like(real)
        self.real = real
        return out


class PaddingOnOneSide(Mutant):
    """Takes a row's real tokens to be its first or its last ones, by the first row's padding."""

    killer = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        left = not real[:, 0].all()
        count = real.sum(dim=-1, keepdim=True)
        place = torch.arange(real.shape[1])[None]
        return super().mean(z, place >= real.shape[1] - count if left else place < count)


class PaddedMeanInFloat32(Mutant):
    """Sums in float32 where there is padding, whatever z is."""

    killer = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        if real.all():
            return super().mean(z, real)
        per_token = z.float().mean(dim=-1).where(real, 0)
        return (per_token.sum(dim=-1) / real.sum(dim=-1))[:, None, None].to(z.dtype)
