"""Imputations: wrong values, wrong statistics of a reference, and wrong positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.mutants.everything import Batches, ImputationMutant

# ---- values that depend on the run


class GateTwice(ImputationMutant):
    """Applies the gate twice: in the hook, and in the slice that the hook was given."""

    expected_check = "oracle.scale"

    def scaled(self, z: Tensor) -> Tensor:
        return super().scaled(super().scaled(z))


class GateInverted(ImputationMutant):
    """Takes the factor for the share that is removed."""

    expected_check = "oracle.scale"

    def scaled(self, z: Tensor) -> Tensor:
        return z * (1 - self.factor)


class ChannelMeanOverChannels(ImputationMutant):
    """Averages over channels in place of tokens."""

    expected_check = "oracle.channel_mean"

    def channel_mean(self, z: Tensor, real: Tensor) -> Tensor:
        return z.mean(dim=-1, keepdim=True)


class ChannelMeanOfPadding(ImputationMutant):
    """Includes the padding in the channel means."""

    expected_check = "locality.padded"

    def channel_mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().channel_mean(z, torch.ones_like(real))


# ---- given values


class ValuesOfNextLayer(ImputationMutant):
    """Reads the values of the next layer, as if a list of hidden states began with the embedding."""

    expected_check = "oracle.values"

    def frozen_of(self, head: int) -> Tensor:
        return self.frozen.get((self.layer + 1, head), self.frozen[self.layer, head])


class ValuesOfFirstPosition(ImputationMutant):
    """Uses the values of the first position at every token."""

    expected_check = "oracle.values"

    def frozen_of(self, head: int) -> Tensor:
        frozen = super().frozen_of(head)
        return frozen[0] if frozen.ndim == 2 else frozen


class ValuesAtColumns(ImputationMutant):
    """Counts padding when it looks up the values of a position."""

    expected_check = "oracle.values"

    def here(self, z: Tensor) -> Tensor:
        tokens = self.real.shape[1]
        return torch.arange(tokens).expand_as(self.real)[:, -z.shape[1] :]


class ValuesRestart(ImputationMutant):
    """Counts positions from the first token of each forward pass, not from that of the cache."""

    expected_check = "independence.cache"

    def here(self, z: Tensor) -> Tensor:
        return self.counted(self.real[:, -z.shape[1] :])


# ---- statistics of a reference


class MeanOfBatchMeans(ImputationMutant):
    """Averages the means of the batches of a reference."""

    source = "UFO-101/auto-circuit, a comment on its means over batches"
    expected_check = "reference.partition"

    def reference_mean(self, batches: Batches) -> Tensor:
        return torch.stack([super(MeanOfBatchMeans, self).reference_mean([batch]) for batch in batches]).mean(dim=0)


class MeanOfPromptMeans(ImputationMutant):
    """Averages the means of the prompts, whatever their lengths, so that the split into batches does not matter."""

    expected_check = "oracle.reference_mean"

    def reference_mean(self, batches: Batches) -> Tensor:
        return torch.stack(
            [row[here].double().mean(dim=0) for z, real in batches for row, here in zip(z, real, strict=True)]
        ).mean(dim=0)


class ReferencePaddingCounted(ImputationMutant):
    """Includes the padding of a reference in its mean."""

    expected_check = "reference.partition"

    def reference_mean(self, batches: Batches) -> Tensor:
        return super().reference_mean([(z, torch.ones_like(real)) for z, real in batches])


class LastRowOnly(ImputationMutant):
    """Measures only the last row of each batch of a reference."""

    expected_check = "reference.partition"

    def reference_mean(self, batches: Batches) -> Tensor:
        return super().reference_mean([(z[-1:], real[-1:]) for z, real in batches])


class LastBatchOnly(ImputationMutant):
    """Overwrites what it has measured with each batch."""

    expected_check = "reference.partition"

    def reference_mean(self, batches: Batches) -> Tensor:
        return super().reference_mean(batches[-1:])


class ReferenceOfLastTokens(ImputationMutant):
    """Measures only the last token of each prompt."""

    expected_check = "oracle.reference_mean"

    def reference_mean(self, batches: Batches) -> Tensor:
        return super().reference_mean(
            [(z, real & (self.counted(real) == real.sum(dim=-1, keepdim=True) - 1)) for z, real in batches]
        )


class ReferenceByColumn(ImputationMutant):
    """Takes the column of a padded reference for the position."""

    expected_check = "reference.partition"

    def reference_mean_by_position(self, batches: Batches) -> Tensor:
        return super().reference_mean_by_position([(z, torch.ones_like(real)) for z, real in batches])


class ShortPromptsAsZero(ImputationMutant):
    """Divides the sums of each position by the number of all prompts."""

    expected_check = "oracle.reference_by_position"

    def reference_mean_by_position(self, batches: Batches) -> Tensor:
        means = super().reference_mean_by_position(batches)
        lengths = torch.cat([real.sum(dim=-1) for _, real in batches])
        share = (lengths > torch.arange(len(means))[:, None]).double().mean(dim=-1)
        return means * share[:, None]


class ReferenceAblated(ImputationMutant):
    """Measures a reference while the heads in force are ablated."""

    expected_check = "reference.clean"

    def heads_in_reference(self) -> list[tuple[int, int]]:
        return self.heads


class RecordersLeft(ImputationMutant):
    """Leaves the hooks that measure a reference if one of them cannot be registered."""

    expected_check = "hygiene.exception"

    def record_with(self, handles: list[Any], z: dict[int, Tensor]) -> None:
        made: list[Any] = []
        super().record_with(made, z)
        handles.extend(made)


class ReferenceKept(ImputationMutant):
    """Measures only the first reference that it is given for a head."""

    expected_check = "independence.earlier_runs"

    def measured(
        self, kind: str, heads: Sequence[tuple[int, int]], reference: Sequence[Mapping[str, Tensor]]
    ) -> dict[tuple[int, int], Tensor]:
        self.known = getattr(self, "known", {})
        for pair, value in super().measured(kind, heads, reference).items():
            self.known.setdefault((kind, pair), value)
        return {pair: self.known[kind, pair] for pair in heads}


class StatisticsOfTheGroup(ImputationMutant):
    """Uses the statistics of the first of the query heads that share a key/value head."""

    expected_check = "oracle.reference_mean"

    def measured(
        self, kind: str, heads: Sequence[tuple[int, int]], reference: Sequence[Mapping[str, Tensor]]
    ) -> dict[tuple[int, int], Tensor]:
        group = self.num_heads() // (getattr(self.config, "num_key_value_heads", None) or self.num_heads())
        first = {(layer, head): (layer, head - head % group) for layer, head in heads}
        found = super().measured(kind, list(first.values()), reference)
        return {pair: found[of] for pair, of in first.items()}


class RowBelow(ImputationMutant):
    """Resamples each row from the row below it."""

    expected_check = "oracle.resample"

    def resampled(self, batches: Batches) -> Tensor:
        return super().resampled(batches).roll(-1, dims=0)


class ResampledFromFirstRow(ImputationMutant):
    """Resamples all rows from the first."""

    expected_check = "oracle.resample"

    def resampled(self, batches: Batches) -> Tensor:
        return super().resampled(batches)[:1]


# ---- positions


class PositionsTransposed(ImputationMutant):
    """Reads the tokens to be replaced as [tokens, rows]."""

    expected_check = "positions"

    def at(self, z: Tensor) -> Tensor:
        at = super().at(z)
        return at.T.reshape(at.shape)


class PositionsWithPadding(ImputationMutant):
    """Counts padding in the positions, as an index into the batch does."""

    expected_check = "positions"

    def at(self, z: Tensor) -> Tensor:
        assert self.positions is not None
        at = torch.zeros(z.shape[:2], dtype=torch.bool)
        at[:, list(self.positions)] = True
        return at


class OneBeforeTheEnd(ImputationMutant):
    """Counts from the last token in place of the end: -1 is the token before the last."""

    expected_check = "positions"

    def wanted(self, position: int) -> Tensor:
        return super().wanted(position) - int(position < 0)


class FirstPositionOnly(ImputationMutant):
    """Replaces z at the first of several positions only."""

    expected_check = "positions"

    def at(self, z: Tensor) -> Tensor:
        every, self.positions = self.positions, (self.positions or ())[:1]
        at = super().at(z)
        self.positions = every
        return at


class PositionsOfFirstRow(ImputationMutant):
    """Replaces z in every row at the columns of the first row."""

    expected_check = "positions"

    def at(self, z: Tensor) -> Tensor:
        return super().at(z)[:1].expand(z.shape[:2])


class PositionsIgnored(ImputationMutant):
    """Replaces z at all tokens."""

    expected_check = "positions"

    def at(self, z: Tensor) -> Tensor:
        return torch.ones(z.shape[:2], dtype=torch.bool)


class OtherTokensZero(ImputationMutant):
    """Writes zero at the other tokens."""

    expected_check = "positions"

    def placed(self, own: Tensor, value: Tensor) -> Tensor:
        return torch.where(self.at(own)[..., None], value, 0)


class MeanOfThePositions(ImputationMutant):
    """Takes the mean over the tokens that it replaces."""

    expected_check = "positions"

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real if self.positions is None else self.at(z))


class PositionsInEachPass(ImputationMutant):
    """Counts positions from the first token of each forward pass, not from that of the cache."""

    expected_check = "positions.cache"

    def at(self, z: Tensor) -> Tensor:
        every = self.real
        self.real = every[:, -z.shape[1] :]
        at = super().at(z)
        self.real = every
        return at
