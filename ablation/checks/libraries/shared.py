"""What the adapters of the libraries share: the protocol, and the values that replace z."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ablation.checks.cases import token_positions
from ablation.checks.protocol import IMPUTATIONS
from ablation.heads import AttentionLayer

Recorded = dict[int, Tensor]
"""{layer: z of a clean run, [rows, tokens, num_heads, head_dim]}"""


class Imputed:
    """Makes the replacement of z for one `ablate` of the protocol, `ablation.checks.protocol`.

    record: runs the model, without an ablation, on the keyword arguments of a batch.
    """

    def __init__(
        self,
        imputation: str,
        values: Mapping[tuple[int, int], Tensor] | None = None,
        reference: Sequence[Mapping[str, Tensor]] | None = None,
        positions: Sequence[int] | None = None,
        *,
        record: Callable[[Mapping[str, Any]], Recorded],
    ) -> None:
        self.kind, _, factor = imputation.partition(":")
        self.factor = float(factor or 0)
        self.values, self.positions = values or {}, positions
        self.batches = []
        for batch in reference or ():
            real = batch["attention_mask"] != 0
            inputs = {"position_ids": token_positions(real), "use_cache": False, **batch}
            self.batches.append((record(inputs), real))

    def __call__(self, layer: int, head: int, z: Tensor, mask: Tensor | None) -> Tensor:
        """Return the replacement. z: [rows, tokens, head_dim]. mask: [rows, tokens so far], or None."""
        real = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if mask is None else mask != 0
        places = token_positions(real)[:, -z.shape[1] :]
        replaced = self._replacement(layer, head, z, real, places).to(z.dtype).expand_as(z)
        if self.positions is None:
            return replaced
        lengths = real.sum(dim=1, keepdim=True)
        at = sum((places == (p if p >= 0 else lengths + p)) for p in set(self.positions)) * real[:, -z.shape[1] :]
        return torch.where((at > 0)[..., None], replaced, z)

    def _replacement(self, layer: int, head: int, z: Tensor, real: Tensor, places: Tensor) -> Tensor:
        if self.kind == "zero":
            return torch.zeros_like(z)
        if self.kind == "scale":
            return z * self.factor if self.factor else torch.zeros_like(z)
        if self.kind in ("mean", "channel-mean"):
            rows = [row[here].double() for row, here in zip(z, real, strict=True)]
            return torch.stack([row.mean(0) if self.kind == "channel-mean" else row.mean() for row in rows]).reshape(
                len(z), 1, -1
            )
        if self.kind == "values":
            value = self.values[layer, head]
            return value if value.ndim == 1 else value[places]
        if self.kind == "resample":
            ((recorded, _),) = self.batches
            return recorded[layer][:, :, head]
        tokens = torch.cat([recorded[layer][:, :, head][mask].double() for recorded, mask in self.batches])
        if self.kind == "reference-mean":
            return tokens.mean(dim=0)
        places_of_tokens = torch.cat([(mask.cumsum(dim=1) - 1)[mask] for _, mask in self.batches])
        means = [tokens[places_of_tokens == place].mean(dim=0) for place in range(int(places_of_tokens.max()) + 1)]
        return torch.stack(means)[places]


class Library:
    """An adapter without the two methods that each library has in its own way: `record` and `run`."""

    imputations: ClassVar[tuple[str, ...]] = tuple(IMPUTATIONS)

    def ablate(
        self, heads: Sequence[tuple[int, int]], imputation: str, *, positions: Sequence[int] | None = None, **given: Any
    ) -> None:
        """Keep the heads and what replaces them. A reference is run here, by `record`."""
        self.heads, self.imputed = list(heads), Imputed(imputation, positions=positions, **given, record=self.record)

    def record(self, batch: Mapping[str, Any]) -> Recorded:
        """Return the z of a run of the model without an ablation, on these keyword arguments."""
        raise NotImplementedError

    def edited(self, layer: AttentionLayer, z: Tensor, mask: Tensor | None) -> Tensor:
        """Return the input of a layer's projection with the heads in force replaced, [rows, tokens, heads * width]."""
        replaced = z.clone()
        for head in [head for index, head in self.heads if index == layer.index]:
            own = z[..., layer.channels(head)]
            replaced[..., layer.channels(head)] = self.imputed(layer.index, head, own, mask)
        return replaced

    def clear(self) -> None:
        self.ablate([], "zero")

    def close(self) -> None:
        self.clear()


def replace_slice(layer: int, head: int, imputed: Imputed, mask: Tensor | None, z: Tensor, hook: Any) -> Tensor:
    """A hook function of TransformerLens, once the first four arguments are bound. z: [rows, tokens, heads, width]."""
    z[:, :, head] = imputed(layer, head, z[:, :, head], mask)
    return z
