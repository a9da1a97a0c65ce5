"""The growing batch: one forward pass that carries many ablations, each from the first layer that it changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ablation.edits import Ablation, Edit, Receipt, edits_by_layer
from ablation.hook import HeadAblation
from ablation.module_hooks import register
from ablation.projections import Key
from ablation.units import MLP

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's forward."""


class BatchMismatch(Exception):
    """A batch of several rows fails in the model, or a row differs from the same row of an ordinary forward pass."""


Step = tuple[int, tuple[float, ...]]
"""A layer that an ablation changes, with its heads in this layer, sorted; the MLP runs last, and counts as infinity."""


class Join(NamedTuple):
    """How a row joins a growing batch: before `layer`, as a copy of the row `source`.

    shared: how many steps of the row's ablation the source has made by then; it has made no others.
    """

    layer: int
    source: Any
    shared: int


@dataclass(frozen=True)
class RowLayout:
    """Which row of a batch carries which ablation. Only this module computes row indices.

    ablations: one for each ablated row, in the order of the rows. first_row: the row of ablations[0]. order: for each
    ablation, its index in the list that the layout was made from. clean_row: the row that is not ablated, if there is
    one. joins: how each ablated row joins a growing batch; empty for other batches.

    A growing batch starts as the clean row alone. Before each layer, rows join at the end, each as a copy of a row that
    was edited as its ablation asks in all layers before: for an ablation of one head, the clean row; for an ablation of
    a head in layer 2 and one in layer 5, before layer 5, a row that was edited in the head of layer 2 alone. A plain
    batch has all rows from the start, and its clean row last, so the guard notices code that treats the first or the
    last row in a special way.
    """

    ablations: tuple[Ablation, ...]
    first_row: int
    order: tuple[int, ...]
    clean_row: int | None
    joins: tuple[Join, ...] = ()

    @classmethod
    def growing(cls, ablations: Sequence[Ablation]) -> Self:
        """The layout of a growing batch."""
        found = _joins(ablations)
        order = tuple(sorted(found, key=lambda number: found[number].layer))
        row_of = {number: row for row, number in enumerate((None, *order))}
        joins = tuple(found[number]._replace(source=row_of[found[number].source]) for number in order)
        return cls(tuple(ablations[number] for number in order), 1, order, clean_row=0, joins=joins)

    @classmethod
    def plain(cls, ablations: Sequence[Ablation]) -> Self:
        """The layout of a batch that has all its rows from the start."""
        return cls(tuple(ablations), 0, tuple(range(len(ablations))), clean_row=len(ablations))

    @classmethod
    def single(cls, ablation: Ablation) -> Self:
        """The layout of a batch of one ablated row."""
        return cls((ablation,), 0, (0,), clean_row=None)

    @property
    def num_rows(self) -> int:
        """Rows of the whole batch."""
        return len(self.ablations) + (self.clean_row is not None)

    @property
    def ablated_rows(self) -> slice:
        """The rows of the ablations, in their order."""
        return slice(self.first_row, self.first_row + len(self.ablations))

    @cached_property
    def edits(self) -> dict[Key, list[Edit]]:
        """{layer: edits of its heads, (layer, "mlp"): edits of its MLP}, without those of the row that a row copies."""
        own = self.ablations
        if self.joins:
            own = tuple(
                _without_steps(of, join.shared) if join.shared else of for of, join in zip(own, self.joins, strict=True)
            )
        return edits_by_layer(zip(own, itertools.count(self.first_row), strict=False))

    def rows_in_layer(self, layer: int) -> int:
        """Rows that a growing batch has in this layer: the clean row, and those that have joined."""
        return 1 + sum(join.layer <= layer for join in self.joins)

    def receipts(self, receipt: Receipt) -> NDArray[np.int64]:
        """Return the receipt of each ablation, [ablations, 3]: calls, elements replaced, elements changed.

        calls: 1 if each projection that the ablation edits was called once, or else the calls of one that was not. The
        receipt of a row begins as a copy, like the row.
        """
        found = np.zeros((self.num_rows, 3), dtype=np.int64)
        found[:, 0] = 1
        counts = receipt.counts
        for layer in sorted({key[0] if isinstance(key, tuple) else key for key in self.edits}):
            for row, join in enumerate(self.joins, start=self.first_row):
                if join.layer == layer:
                    found[row] = found[join.source]
            keys: tuple[Key, ...] = (layer, (layer, MLP))
            for key in keys:
                rows = [edit.row for edit in self.edits.get(key, []) if edit.row is not None]
                if rows and receipt.calls_of(key) != 1:
                    found[rows, 0] = receipt.calls_of(key)
                if rows and key in counts:
                    np.add.at(found[:, 1:], rows, np.array(counts[key])[:, 1:])
        return found[self.ablated_rows]


def steps(ablation: Ablation) -> tuple[Step, ...]:
    """Return what an ablation changes, layer by layer: the sort key that keeps rows with equal beginnings together."""
    by_layer: dict[int, list[float]] = {}
    for layer, head in ablation.heads:
        by_layer.setdefault(layer, []).append(math.inf if head == MLP else head)
    return tuple((layer, tuple(sorted(heads))) for layer, heads in sorted(by_layer.items()))


def _without_steps(ablation: Ablation, count: int) -> Ablation:
    """Return an ablation without its first steps."""
    rest = dict(steps(ablation)[count:])
    return Ablation([pair for pair in ablation.heads if pair[0] in rest], ablation.imputation, ablation.positions)


def _joins(ablations: Sequence[Ablation]) -> dict[int, Join]:
    """Return {index of an ablation: how its row joins}, with ablations as sources in place of rows; None if clean."""
    found: dict[int, Join] = {}
    all_steps = [steps(ablation) for ablation in ablations]
    # Of several ablations with equal first steps, the one that goes on last comes first: the others are copied from it
    # while it has made these steps only.
    order = sorted(
        range(len(ablations)), key=lambda number: [*(layer for layer, _ in all_steps[number]), math.inf], reverse=True
    )
    carriers: dict[Any, int] = {}
    for number in order:
        of, own = ablations[number], all_steps[number]
        beginnings = [(of.imputation, of.positions, own[:count]) for count in range(1, len(own) + 1)]
        shared = max((n for n, beginning in enumerate(beginnings[:-1], start=1) if beginning in carriers), default=0)
        source = carriers[beginnings[shared - 1]] if shared else None
        found[number] = Join(own[shared][0] if own else 0, source, shared)
        for beginning in beginnings:
            carriers.setdefault(beginning, number)
    return dict(sorted(found.items()))


def first_layer(ablation: Ablation) -> int:
    """The first layer that an ablation changes; 0 if the ablation has no heads."""
    return min((layer for layer, _ in ablation.heads), default=0)


def last_layer(ablation: Ablation) -> int:
    """The last layer that an ablation changes; 0 if the ablation has no heads."""
    return max((layer for layer, _ in ablation.heads), default=0)


@contextmanager
def growing_batch(
    hook: HeadAblation, layout: RowLayout, *, last_token_only: bool, on_layer: Callable[[], object]
) -> Iterator[None]:
    """Context manager in which a forward pass that starts with one row grows to all rows of the layout.

    hook: the entered ablation of the model. last_token_only: after the attention of the last layer, only the last token
    is computed; the logits of other tokens mean nothing. This is right if all other parts of that layer treat each
    token by itself, and nothing edits its MLP, whose values and receipt are those of all tokens. The caller has to
    compare the result with an ordinary forward pass. on_layer: called before each layer with heads.
    """
    heads = hook.heads
    with ExitStack() as hooks:
        with_heads = {layer.index: layer.block for layer in heads.layers}
        with_mlps = {key[0]: heads.mlp(key[0]).block for key in layout.edits if isinstance(key, tuple)}
        rows_before = 1
        for index, block in sorted((with_mlps | with_heads).items()):
            rows = layout.rows_in_layer(index)
            sources = [*range(rows_before), *(join.source for join in layout.joins[rows_before - 1 : rows - 1])]
            grow = partial(_grow, rows_before, sources, on_layer if index in with_heads else None)
            hooks.callback(register(block, grow, owner=hook))
            rows_before = rows
        last = heads.layers[-1]
        if last_token_only and last.index == heads.num_layers - 1 and last.index not in with_mlps:
            narrowing = _LastToken()
            hooks.callback(register(last.projection, narrowing.at_projection, owner=hook))
            for part in last.block.children():
                hooks.callback(register(part, narrowing.at_part, owner=hook))
        yield


def _grow(
    rows_before: int,
    sources: list[int],
    on_layer: Callable[[], object] | None,
    block: nn.Module,
    args: Any,
    kwargs: Any,
) -> Arguments:
    """Layer pre-hook: rows join the hidden states, [rows_before, ...] -> [rows, ...].

    sources: for each row, the row of the hidden states that it is a copy of.
    """
    if on_layer is not None:
        on_layer()

    def grown(hidden: Any) -> Tensor:
        if not isinstance(hidden, Tensor) or len(hidden) != rows_before:
            raise BatchMismatch(f"a layer received {_size(hidden)}, not {rows_before} rows")
        return hidden[sources]

    args, kwargs = _change_hidden_states(grown, args, kwargs)
    return _repeat_rows(args, len(sources)), _repeat_rows(kwargs, len(sources))


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
