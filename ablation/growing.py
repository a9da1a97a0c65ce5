"""The growing batch: one forward pass that carries many ablations, each from the first layer that it changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ablation.edits import Ablation, Edit, Receipt, edits_by_layer
from ablation.hook import HeadAblation
from ablation.module_hooks import register

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's forward."""


class BatchMismatch(Exception):
    """A batch of several rows fails in the model, or a row differs from the same row of an ordinary forward pass."""


@dataclass(frozen=True)
class RowLayout:
    """Which row of a batch carries which ablation. Only this module computes row indices.

    ablations: one for each ablated row. first_row: the row of ablations[0]; the others follow in order. clean_row: the
    row that is not ablated, if there is one.

    A growing batch starts as the clean row alone. Before each layer, a copy of the clean row joins at the end for every
    ablation whose first head is in that layer, so the ablations have to be sorted by `first_layer`. A plain batch has
    all rows from the start, and its clean row last, so the guard notices code that treats the first or the last row in
    a special way.
    """

    ablations: tuple[Ablation, ...]
    first_row: int
    clean_row: int | None

    @classmethod
    def growing(cls, ablations: Sequence[Ablation]) -> Self:
        """The layout of a growing batch. ablations: sorted by `first_layer`."""
        return cls(tuple(ablations), first_row=1, clean_row=0)

    @classmethod
    def plain(cls, ablations: Sequence[Ablation]) -> Self:
        """The layout of a batch that has all its rows from the start."""
        return cls(tuple(ablations), first_row=0, clean_row=len(ablations))

    @classmethod
    def single(cls, ablation: Ablation) -> Self:
        """The layout of a batch of one ablated row."""
        return cls((ablation,), first_row=0, clean_row=None)

    @property
    def num_rows(self) -> int:
        """Rows of the whole batch."""
        return len(self.ablations) + (self.clean_row is not None)

    @property
    def ablated_rows(self) -> slice:
        """The rows of the ablations, in their order."""
        return slice(self.first_row, self.first_row + len(self.ablations))

    @cached_property
    def edits(self) -> dict[int, list[Edit]]:
        """{layer: the edits of that layer's projection}."""
        return edits_by_layer(zip(self.ablations, itertools.count(self.first_row), strict=False))

    @cached_property
    def _first_layers(self) -> NDArray[np.int64]:
        return np.array([first_layer(ablation) for ablation in self.ablations], dtype=np.int64)

    def rows_in_layer(self, layer: int) -> int:
        """Rows that a growing batch has in this layer: the clean row, and those that have joined."""
        return 1 + int(np.count_nonzero(self._first_layers <= layer))

    def receipts(self, receipt: Receipt) -> NDArray[np.int64]:
        """Return the receipt of each ablation, [ablations, 3]: calls, elements replaced, elements changed.

        calls: 1 if each projection that the ablation edits was called once, or else the calls of one that was not.
        """
        found = np.zeros((len(self.ablations), 3), dtype=np.int64)
        found[:, 0] = 1
        counts = receipt.counts
        for layer, edits in self.edits.items():
            numbers = [edit.row - self.first_row for edit in edits if edit.row is not None]
            if receipt.calls[layer] != 1:
                found[numbers, 0] = receipt.calls[layer]
            if layer in counts:
                np.add.at(found[:, 1:], numbers, np.array(counts[layer])[:, 1:])
        return found


def first_layer(ablation: Ablation) -> int:
    """The first layer that an ablation changes: the sort key of a growing batch; 0 if the ablation has no heads."""
    return min((layer for layer, _ in ablation.heads), default=0)


@contextmanager
def growing_batch(
    hook: HeadAblation, layout: RowLayout, *, last_token_only: bool, on_layer: Callable[[], object]
) -> Iterator[None]:
    """Context manager in which a forward pass that starts with one row grows to all rows of the layout.

    hook: the entered ablation of the model. last_token_only: after the attention of the last layer, only the last token
    is computed; the logits of other tokens mean nothing. This is right if all other parts of that layer treat each
    token by itself. The caller has to compare the result with an ordinary forward pass. on_layer: called before each
    layer with heads.
    """
    heads = hook.heads
    with ExitStack() as hooks:
        rows_before = 1
        for layer in heads.layers:
            rows = layout.rows_in_layer(layer.index)
            grow = partial(_grow, rows_before, rows, on_layer)
            hooks.callback(register(layer.block, grow, owner=hook))
            rows_before = rows
        last = heads.layers[-1]
        if last_token_only and last.index == heads.num_layers - 1:
            narrowing = _LastToken()
            hooks.callback(register(last.projection, narrowing.at_projection, owner=hook))
            for part in last.block.children():
                hooks.callback(register(part, narrowing.at_part, owner=hook))
        yield


def _grow(
    rows_before: int, rows: int, on_layer: Callable[[], object], block: nn.Module, args: Any, kwargs: Any
) -> Arguments:
    """Layer pre-hook: copies of the clean row join the hidden states, [rows_before, ...] -> [rows, ...]."""
    on_layer()

    def grown(hidden: Any) -> Tensor:
        if not isinstance(hidden, Tensor) or len(hidden) != rows_before:
            raise BatchMismatch(f"a layer received {_size(hidden)}, not {rows_before} rows")
        return torch.cat([hidden, hidden[:1].expand(rows - rows_before, *hidden.shape[1:])])

    args, kwargs = _change_hidden_states(grown, args, kwargs)
    return _repeat_rows(args, rows), _repeat_rows(kwargs, rows)


def _size(hidden: object) -> str:
    return f"{len(hidden)} rows" if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}"


def _repeat_rows(value: Any, rows: int) -> Any:
    """Return a layer's arguments, with every tensor of one row (mask, positions) expanded to all rows of the batch."""
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    if isinstance(value, tuple):
        return tuple(_repeat_rows(part, rows) for part in value)
    if isinstance(value, dict):
        return {name: _repeat_rows(part, rows) for name, part in value.items()}
    return value


class _LastToken:
    """Narrows everything after the attention of a layer to the last token.

    By broadcasting, the layer then adds the residual stream of every token to the narrowed output. The sum is right at
    the last token, and only that token is read.
    """

    def __init__(self) -> None:
        self.after_attention = False

    def at_projection(self, projection: nn.Module, args: Any, kwargs: Any) -> Arguments:
        """Projection pre-hook: the attention has read all tokens."""
        self.after_attention = True
        return self.at_part(projection, args, kwargs)

    def at_part(self, part: nn.Module, args: Any, kwargs: Any) -> Arguments:
        """Pre-hook of a part of the layer: [rows, tokens, channels] -> [rows, 1, channels], after the attention."""
        if not self.after_attention or not (args or "hidden_states" in kwargs):
            return args, kwargs
        return _change_hidden_states(_last_token, args, kwargs)


def _last_token(hidden: Any) -> Any:
    return hidden[:, -1:] if isinstance(hidden, Tensor) and hidden.ndim == 3 else hidden


def _change_hidden_states(change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments with the hidden states changed: the first positional one, or the keyword hidden_states."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    if "hidden_states" not in kwargs:
        raise BatchMismatch(f"a layer received no hidden states, only {', '.join(kwargs) or 'nothing'}")
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}
