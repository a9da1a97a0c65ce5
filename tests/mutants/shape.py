"""Shape: the head's width, its rows or its tokens are taken wrongly."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.mutants.mutant import Mutant


class WidthFromHidden(Mutant):
    """Takes a head to be hidden_size / heads wide, which it is not where the configuration names a width."""

    source = "stanfordnlp/pyvene#229"

    def head_dim(self, z: Tensor) -> int:
        return self.config.hidden_size // self.count()


class SkipsMismatch(Mutant):
    """Leaves a layer alone, in silence, where its width is not hidden_size."""

    source = "interp-reasoning/thought-anchors#7"
    killer = "smoke"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return super().hook(layer, module, args) if args[0].shape[-1] == self.config.hidden_size else None


class GuessedHeads(Mutant):
    """Guesses the number of heads where the configuration calls it otherwise."""

    source = "interp-reasoning/thought-anchors#7"

    def head_dim(self, z: Tensor) -> int:
        return z.shape[-1] // self.config.to_dict().get("n_head", 2)


class KeyValueWidth(Mutant):
    """Divides the channels by the number of key/value heads."""

    source = "TransformerLensOrg/TransformerLens#980"

    def head_dim(self, z: Tensor) -> int:
        return z.shape[-1] // getattr(self.config, "num_key_value_heads", self.count())


class AllHeads(Mutant):
    """Replaces the outputs of all heads of the layer."""

    source = "decoderesearch/SAELens#163"

    def channels(self, head: int, z: Tensor) -> slice:
        return slice(None)


class CopyLost(Mutant):
    """Writes into what a reshape has copied, and returns what it has copied from."""

    source = "ndif-team/nnsight, documentation of modifications"
    killer = "smoke"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        per_head = z.unflatten(-1, (self.count(), -1)).transpose(1, 2).contiguous()  # [rows, heads, tokens, width]
        per_head[:, heads] = 0
        return z


class LastTokenOnly(Mutant):
    """Ablates the last token only, the one that is looked at."""

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        out[:, -1:] = super().edited(z, heads)[:, -1:]
        return out


class FirstTokenLeft(Mutant):
    """Leaves the first token, taken for one that begins every sequence, as it is."""

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        out = super().edited(z, heads)
        out[:, 0] = z[:, 0]
        return out


class SixTokens(Mutant):
    """Ablates as many tokens as the prompt had for which it was written."""

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        out[:, :6] = super().edited(z, heads)[:, :6]
        return out


class FirstRowOnly(Mutant):
    """Ablates the first row of a batch, as where all rows' tokens lie in one dimension and the slice ends early."""

    source = "ndif-team/nnsight#722"
    killer = "independence.rows"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        out[0] = super().edited(z, heads)[0]
        return out


class OneRowOnly(Mutant):
    """Ablates nothing in a batch of several rows."""

    killer = "independence.rows"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return super().hook(layer, module, args) if len(args[0]) == 1 else None


class PaddedRowsLeft(Mutant):
    """Ablates nothing in rows that are padded."""

    killer = "locality.padded"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        if self.real.shape != z.shape[:2]:
            return super().edited(z, heads)
        return super().edited(z, heads).where(self.real.all(dim=-1)[:, None, None], z)


class RightPaddingOnly(Mutant):
    """Takes the first n tokens of a row for its n real ones, which they are only with padding on the right."""

    killer = "locality.padded"

    def edited(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        for row, tokens in enumerate(self.real.sum(dim=-1).tolist()):
            out[row, :tokens] = super().edited(z, heads)[row, :tokens]
        return out


class ChunksOfFour(Mutant):
    """Runs four rows at a time, to save memory, each time with the mask of the first four."""

    killer = "independence.padding"
    unsupported: ClassVar[dict[str, str]] = {"single_forward": "it runs four rows at a time"}

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        if len(input_ids) <= 4:
            return super().run(input_ids, attention_mask, **inputs)
        parts = []
        for start in range(0, len(input_ids), 4):
            rows = slice(start, start + 4)
            given = {name: some[rows] if isinstance(some, Tensor) else some for name, some in inputs.items()}
            mask = None if attention_mask is None else attention_mask[: len(input_ids[rows])]
            parts.append(super().run(input_ids[rows], mask, **given))
        return torch.cat(parts)
