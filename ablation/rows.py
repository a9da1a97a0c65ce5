"""The rows of a forward pass: their padding, their tokens in a key/value cache, and the positions of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ablation.errors import InvalidAblation
from ablation.heads import as_index

Positions = tuple[int, ...]
"""Positions of tokens: from 0, or from the end of the row if negative. Padding does not count."""


def as_positions(positions: str | Iterable[int] | None) -> Positions | None:
    """Return positions, or None for all. positions: "all", "last", or ints. Raises InvalidAblation."""
    if positions is None or positions == "all":
        return None
    if positions == "last":
        return (-1,)
    try:
        found = tuple(dict.fromkeys(map(as_index, positions)))
    except TypeError:
        found = ()
    if not found or isinstance(positions, str):
        raise InvalidAblation(f"positions are 'all', 'last' or a list of integers, not {positions!r}")
    return found


@dataclass(frozen=True)
class Rows:
    """What a forward pass knows of its rows.

    mask: [rows, past + tokens], nonzero at real tokens; one row stands for all; None if no token is known to be
    padding. past: tokens of a row that are in the key/value cache, before the first token of this pass. is_cached:
    whether there is a cache, so that the row may go on in later passes.
    """

    mask: Tensor | None = None
    past: int = 0
    is_cached: bool = False

    def mask_of(self, z: Tensor) -> Tensor | None:
        """Return the mask of all tokens of the rows, [rows, past + tokens], on z's device.

        z: [rows, tokens, channels]. Raises InvalidAblation if the mask does not fit.
        """
        rows, tokens = z.shape[:2]
        if self.mask is None:
            return None
        if self.mask.shape[1] != self.past + tokens or len(self.mask) not in (1, rows):
            cached = f" after {self.past} in the cache" if self.past else ""
            raise InvalidAblation(
                f"the attention mask of {list(self.mask.shape)} does not fit z of {rows} rows and {tokens} tokens"
                + cached
            )
        return self.mask.to(z.device).expand(rows, -1)

    def positions(self, z: Tensor) -> Tensor:
        """Return the number of real tokens before each token of the pass, int64 [rows, tokens]; 0 before the first."""
        rows, tokens = z.shape[:2]
        mask = self.mask_of(z)
        if mask is None:
            return torch.arange(self.past, self.past + tokens, device=z.device).expand(rows, -1)
        return ((mask != 0).cumsum(dim=1) - 1).clamp(min=0)[:, self.past :]

    def selected(self, positions: Positions, z: Tensor) -> Tensor:
        """Return which tokens of the pass are at these positions, bool [rows, tokens].

        Raises InvalidAblation if a row has no token at one of them, and cannot get it in a later pass.
        """
        mask, found = self.mask_of(z), self.positions(z)
        real = None if mask is None else mask != 0
        lengths = found.new_full((len(z), 1), self.past + z.shape[1]) if real is None else real.sum(dim=1, keepdim=True)
        if not self.is_cached or min(positions) < 0:  # positions from the end need the whole row in this pass
            shortest = z.shape[1] if real is None else int(lengths.min())
            verify_positions(positions, shortest, "a row")
        wanted = found.new_tensor(positions)
        at = torch.isin(found, wanted) | torch.isin(found - lengths, wanted)  # from the start, or from the end
        return at if real is None else at & real[:, self.past :]


def verify_positions(positions: Positions, tokens: int, what: str, error: type[Exception] = InvalidAblation) -> None:
    """Raise an error unless a row of so many tokens has all these positions. what: names the row."""
    if missing := [position for position in positions if not -tokens <= position < tokens]:
        raise error(f"{what} has {tokens} tokens, so it has no position {missing[0]}")


def rows_of_forward(arguments: Mapping[str, Any], *, whole: bool) -> Rows:
    """Return what the arguments of a decoder, by name, say of its rows.

    whole: each row has to be in this forward pass as a whole, not in part in a cache. Raises InvalidAblation if it is
    not, if several sequences are packed into a row, and if the mask does not tell which tokens are padding.
    """
    # A cache is recognised by its method: its argument is past_key_values or, since transformers 5.24, cache.
    caches = [value for value in arguments.values() if hasattr(value, "get_seq_length")]
    past = max((int(cache.get_seq_length()) for cache in caches), default=0)
    if whole and past:
        raise InvalidAblation(
            "an imputation that reads the whole row, and positions from its end, need the whole sequence in one "
            "forward: pass use_cache=False"
        )
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise InvalidAblation("this imputation needs an attention mask of [rows, tokens] to leave out the padding")
    if _is_packed(arguments, mask):
        raise InvalidAblation(
            "this imputation needs one sequence in each row, but a row holds several packed sequences: pass each "
            "sequence as a row of its own, with padding"
        )
    return Rows(mask, past, is_cached=bool(caches))


def _is_packed(arguments: Mapping[str, Any], mask: Tensor | None) -> bool:
    """Whether a row holds several sequences.

    Signs are positions that start again, boundaries of sequences (cu_seq_lens_q, cu_seqlens, ...), numbers of sequences
    (seq_idx), and a mask that counts sequences.
    """
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            if name.startswith(("cu_seq_lens", "cu_seqlens")) and value.numel() > 2:
                return True
            if name.startswith("seq_idx") and value.unique().numel() > 1:
                return True
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point() and mask.max() > 1:
        return True
    positions = arguments.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3):
        return False
    step = 1  # by which positions have to grow
    if positions.ndim == 3:  # [temporal, height, width]; tokens of an image share their temporal position
        positions, step = positions[0], 0
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask.to(positions.device) != 0
    if real.shape[1] != positions.shape[1]:
        return False
    positions = positions.expand_as(real)
    largest = positions.where(real, -1).cummax(dim=-1).values  # so far
    return bool((real[:, 1:] & (positions[:, 1:] < largest[:, :-1] + step)).any())
