"""Mean: another number than the mean of the head's z over its row's real tokens and channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.mutants.mutant import Mutant


class MeanPerChannel(Mutant):
    """Uses a mean over tokens for each channel."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        kept = z.where(real[..., None], 0)
        return kept.sum(dim=1, keepdim=True) / real.sum(dim=-1)[:, None, None]


class MeanPerToken(Mutant):
    """Uses a mean over channels for each token."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return z.mean(dim=-1, keepdim=True)


class MeanOverRows(Mutant):
    """Uses a mean over the batch, which changes nothing for one prompt."""

    expected_check = "smoke"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return z.mean(dim=0, keepdim=True)


class MeanOfBatch(Mutant):
    """Uses one mean for all rows of a batch."""

    expected_check = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return z[real].double().mean().to(z.dtype)


class MeanOfFirstRow(Mutant):
    """Uses the mean of the first row for all rows."""

    expected_check = "independence.rows"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real)[:1]


class MeanOfPadding(Mutant):
    """Includes the padding in the mean."""

    expected_check = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, torch.ones_like(real))


class MaskOfLastToken(Mutant):
    """Builds a mask of its own that marks only the last real token of each row."""

    source = "hannamw/EAP-IG, utils.py"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        last = real.flip(1).int().argmax(dim=1).neg() + real.shape[1] - 1
        return super().mean(z, torch.arange(real.shape[1]) == last[:, None])


class MaskFlipped(Mutant):
    """Reads padding on the left as padding on the right."""

    expected_check = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real.flip(1))


class PaddingCounted(Mutant):
    """Sums the real tokens and divides by the number of all tokens."""

    expected_check = "locality.padded"

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
    """Uses, at each token, the mean of the tokens up to it."""

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
    """Measures the mean after its own hook, which has already replaced the head."""

    source = "ArthurConmy/Automatic-Circuit-Discovery#52"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(torch.zeros_like(z), real)


class MeanOfLayer(Mutant):
    """Uses one mean for all heads of the layer."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        self.layer = z
        return super().replace_heads(z, heads)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(self.layer, real)


class MeanOfSet(Mutant):
    """Uses one mean for all ablated heads of a layer."""

    expected_check = "locality.sets"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
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
    """Uses the median."""

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
    """Moves z only half of the way to the mean."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return (z + super().mean(z, real)) / 2


class MeanOfUnmaskedBatch(Mutant):
    """Uses one mean for all rows of a batch without an attention mask."""

    expected_check = "independence.rows"

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        self.masked = attention_mask is not None
        return super().run(input_ids, attention_mask, **inputs)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real) if self.masked else z.double().mean().to(z.dtype)


class PaddingByToken(Mutant):
    """Treats every padding token of the configuration as padding, whatever the mask says."""

    expected_check = "oracle.mean"

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        if self.config.pad_token_id is not None:
            self.real = input_ids != self.config.pad_token_id
        return super().forward(input_ids, **inputs)


class MaskUsedUp(Mutant):
    """Removes the mask from its state in the first layer that needs it, so later layers have none."""

    expected_check = "independence.padding"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = super().replace_heads(z, heads)
        self.real = torch.ones_like(self.real)
        return out


class MaskOfFirstHead(Mutant):
    """Overwrites the mask with weights, which leaves none for the next head of the layer."""

    expected_check = "locality.padded"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out, real = z.clone(), self.real
        for head in heads:
            channels = self.channels(head, z)
            out[..., channels] = self.value(z[..., channels])
            self.real = torch.ones_like(real)
        self.real = real
        return out


class PaddingOnOneSide(Mutant):
    """Assumes that the padding of all rows is on the side of the first row's."""

    expected_check = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        left = not real[:, 0].all()
        count = real.sum(dim=-1, keepdim=True)
        place = torch.arange(real.shape[1])[None]
        return super().mean(z, place >= real.shape[1] - count if left else place < count)


class PaddedMeanInFloat32(Mutant):
    """Sums in float32 if there is padding, whatever the dtype of z."""

    expected_check = "locality.padded"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        if real.all():
            return super().mean(z, real)
        per_token = z.float().mean(dim=-1).where(real, 0)
        return (per_token.sum(dim=-1) / real.sum(dim=-1))[:, None, None].to(z.dtype)
