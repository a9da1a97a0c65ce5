"""Shape: head_dim, the rows or the tokens are wrong."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.mutants.mutant import Mutant


class WidthFromHidden(Mutant):
    """Assumes that head_dim is hidden_size / heads, which is wrong if the configuration states head_dim."""

    source = "stanfordnlp/pyvene#229"

    def head_dim(self, z: Tensor) -> int:
        return self.config.hidden_size // self.num_heads()


class SkipsMismatch(Mutant):
    """Silently skips a layer whose heads do not add up to hidden_size."""

    source = "interp-reasoning/thought-anchors#7"
    expected_check = "smoke"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return super().hook(layer, module, args) if args[0].shape[-1] == self.config.hidden_size else None


class GuessedHeads(Mutant):
    """Guesses the number of heads if the configuration gives it another name."""

    source = "interp-reasoning/thought-anchors#7"

    def head_dim(self, z: Tensor) -> int:
        return z.shape[-1] // self.config.to_dict().get("n_head", 2)


class KeyValueWidth(Mutant):
    """Divides the channels by the number of key/value heads."""

    source = "TransformerLensOrg/TransformerLens#980"

    def head_dim(self, z: Tensor) -> int:
        return z.shape[-1] // getattr(self.config, "num_key_value_heads", self.num_heads())


class AllHeads(Mutant):
    """Replaces the outputs of all heads of the layer."""

    source = "decoderesearch/SAELens#163"

    def channels(self, head: int, z: Tensor) -> slice:
        return slice(None)


class CopyLost(Mutant):
    """Writes into the copy that a reshape made, and returns the original."""

    source = "ndif-team/nnsight, documentation of modifications"
    expected_check = "smoke"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        per_head = z.unflatten(-1, (self.num_heads(), -1)).transpose(1, 2).contiguous()  # [rows, heads, tokens, width]
        per_head[:, heads] = 0
        return z


class LastTokenOnly(Mutant):
    """Ablates only the last token, whose logits are read."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        out[:, -1:] = super().replace_heads(z, heads)[:, -1:]
        return out


class FirstTokenLeft(Mutant):
    """Leaves out the first token, as if every sequence began with a special one."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = super().replace_heads(z, heads)
        out[:, 0] = z[:, 0]
        return out


class SixTokens(Mutant):
    """Ablates as many tokens as the prompt had for which it was written."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        out[:, :6] = super().replace_heads(z, heads)[:, :6]
        return out


class FirstRowOnly(Mutant):
    """Ablates only the first row of a batch, as if all tokens were in one dimension and the slice ended early."""

    source = "ndif-team/nnsight#722"
    expected_check = "independence.rows"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        out[0] = super().replace_heads(z, heads)[0]
        return out


class OneRowOnly(Mutant):
    """Ablates nothing in a batch of several rows."""

    expected_check = "independence.rows"

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return super().hook(layer, module, args) if len(args[0]) == 1 else None


class PaddedRowsLeft(Mutant):
    """Ablates nothing in padded rows."""

    expected_check = "locality.padded"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        if self.real.shape != z.shape[:2]:
            return super().replace_heads(z, heads)
        return super().replace_heads(z, heads).where(self.real.all(dim=-1)[:, None, None], z)


class RightPaddingOnly(Mutant):
    """Uses the first n tokens of a row as its n real ones, which is right only for padding on the right."""

    expected_check = "locality.padded"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        out = z.clone()
        for row, tokens in enumerate(self.real.sum(dim=-1).tolist()):
            out[row, :tokens] = super().replace_heads(z, heads)[row, :tokens]
        return out


class ChunksOfFour(Mutant):
    """Runs four rows at a time to save memory, always with the mask of the first four."""

    expected_check = "independence.padding"
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


class SixtyFourTokens(Mutant):
    """Ablates the first block of 64 tokens of a long prompt."""

    expected_check = "oracle.long_prompt"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        return torch.cat([super().replace_heads(z[:, :64], heads), z[:, 64:]], dim=1)

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return super().mean(z, real[:, :64])


class SixteenRows(Mutant):
    """Ablates the first 16 rows of a batch."""

    expected_check = "independence.many_rows"

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        return torch.cat([super().replace_heads(z, heads)[:16], z[16:]])
