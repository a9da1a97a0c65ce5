"""Ablations, the edits that they make to heads and MLPs, and receipts that prove the edits were made."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ablation.errors import AblationNotApplied, InvalidAblation, InvalidHead, UnsupportedModel
from ablation.heads import AttentionLayer, HeadMap
from ablation.imputation import Imputation, Site, as_imputation
from ablation.projections import Key, MLPOutput, Projection
from ablation.rows import Positions, Rows, as_positions
from ablation.units import MLP, Pair


@dataclass(frozen=True, init=False)
class Ablation:
    """A set of heads and MLPs that are ablated together, with one imputation, at all tokens or at some.

    heads: (layer, head) pairs, and (layer, "mlp") for the MLP of a layer, whose output is replaced, the bias of its
    last projection included; if there are none, the ablated run is a clean run. positions: "all", "last", or the
    positions of tokens, from 0, or from the end of the row if negative; padding does not count. Raises
    UnknownImputation for an unknown name, InvalidHead if `heads` is a mapping, a text or not iterable, and
    InvalidAblation for positions that are none. Whether the pairs are heads of a model is checked by `HeadAblation` and
    `run`.
    """

    heads: tuple[Pair, ...]
    imputation: Imputation
    positions: Positions | None
    """None for all."""

    def __init__(
        self,
        heads: Iterable[Pair],
        imputation: str | Imputation = "zero",
        positions: str | Iterable[int] | None = None,
    ) -> None:
        if isinstance(heads, Mapping | str | bytes):  # whose items would pass for heads
            raise InvalidHead(f"a {type(heads).__name__} is not a list of heads: pass pairs, such as [(0, 1)]")
        if not isinstance(heads, Iterable):
            raise InvalidHead(f"{heads!r} is not a list of heads: pass pairs, such as [(0, 1)]")
        object.__setattr__(self, "heads", tuple(heads))
        object.__setattr__(self, "imputation", as_imputation(imputation))
        object.__setattr__(self, "positions", as_positions(positions))

    def validated(self, heads: HeadMap) -> Ablation:
        """Return the ablation with its heads as ints, each named once.

        Raises InvalidHead if the model lacks a head, or an MLP that can be ablated, and InvalidAblation if the
        imputation has no values for it.
        """
        pairs = tuple(dict.fromkeys(map(heads.validate, self.heads)))
        for key in dict.fromkeys(map(key_of, pairs)):
            self.imputation.validate(heads.projection(key))
        return Ablation(pairs, self.imputation, self.positions)

    def __str__(self) -> str:
        pairs = "; ".join(map(described, self.heads)) or "no head"
        at = "" if self.positions is None else f" at positions {', '.join(map(str, self.positions))}"
        return f"{pairs}; {self.imputation.name} imputation{at}"


def key_of(pair: Pair) -> Key:
    """Return which projection ablates a pair."""
    layer, head = pair
    return (layer, head) if head == MLP else layer


def described(pair: Pair) -> str:
    """Return a pair as it is called in messages."""
    layer, head = pair
    return f"layer {layer}, {'MLP' if head == MLP else f'head {head}'}"


class Edit(NamedTuple):
    """One head of a layer, or its MLP, to be replaced in one row of the batch, at some tokens of the row.

    head: 0 for an MLP. row: None for every row. positions: None for all tokens, padding included.
    """

    head: int
    imputation: Imputation
    row: int | None = None
    positions: Positions | None = None


class EditCounts(NamedTuple):
    """The effect of one edit, counted in the tensor that the hook passes on.

    expected: elements that the edit has to replace. replaced: those of them that hold the imputed value. changed:
    elements that differ from the head's or MLP's own output.
    """

    expected: int
    replaced: int
    changed: int


class Receipt:
    """What the hook did in one forward pass.

    calls: how often the attention output projection of each decoder layer was called, [layers]; 0 for a layer without
    heads. mlp_calls: the same for the last projection of each MLP, counted since the first ablation of the MLP.
    """

    def __init__(self, num_layers: int) -> None:
        self.calls = [0] * num_layers
        self.mlp_calls = [0] * num_layers
        self.edited: dict[Key, Tensor] = {}
        """{layer with edits, or (layer, "mlp"): int64 [edits, 3], with the columns of `EditCounts`, on z's device}."""

    def count_call(self, key: Key) -> None:
        """Count one call of a projection."""
        if isinstance(key, tuple):
            self.mlp_calls[key[0]] += 1
        else:
            self.calls[key] += 1

    def calls_of(self, key: Key) -> int:
        """Return how often a projection was called."""
        return self.mlp_calls[key[0]] if isinstance(key, tuple) else self.calls[key]

    @property
    def counts(self) -> dict[Key, list[EditCounts]]:
        """{layer with edits: the counts of each edit, in the order of the edits}; (layer, "mlp") for an MLP."""
        if not self.edited:
            return {}
        device = next(iter(self.edited.values())).device
        joined = torch.cat([counts.to(device) for counts in self.edited.values()]).tolist()  # waits for the device once
        edits = iter([EditCounts(*edit) for edit in joined])
        return {key: list(itertools.islice(edits, len(counts))) for key, counts in self.edited.items()}

    def __repr__(self) -> str:
        mlps = f"mlp_calls={self.mlp_calls}, " if any(self.mlp_calls) else ""
        return f"Receipt(calls={self.calls}, {mlps}counts={self.counts})"


def edits_by_layer(ablations: Iterable[tuple[Ablation, int | None]]) -> dict[Key, list[Edit]]:
    """Return {layer: edits of its heads, (layer, "mlp"): edits of its MLP}.

    ablations: each with the row of the batch that carries it, or None for every row.
    """
    edits: dict[Key, list[Edit]] = {}
    for ablation, row in ablations:
        for layer, head in ablation.heads:
            number = 0 if head == MLP else head
            edit = Edit(number, ablation.imputation, row, ablation.positions)
            edits.setdefault(key_of((layer, head)), []).append(edit)
    return edits


def apply_edits(z: Tensor, layer: Projection, edits: Sequence[Edit], rows: Rows) -> tuple[Tensor, Tensor]:
    """Return a copy of z with the edited heads replaced, and counts [edits, 3] in the order of `EditCounts`.

    Each replacement is computed from z itself, so edits do not see each other. z: [rows, tokens, num_heads * head_dim],
    the input of an attention output projection or the output of an MLP, not written to. Raises UnsupportedModel if z is
    anything else, and InvalidAblation if it does not fit the rows.
    """
    _check_editable(z, layer)
    mask = rows.mask_of(z)
    edited = z.clone()
    before, after = (t.unflatten(-1, (layer.num_heads, layer.head_dim)) for t in (z, edited))  # views
    counts = torch.zeros(len(edits), 3, dtype=torch.long, device=z.device)
    # All slices of one imputation are replaced at once: a growing batch has an edit for each row.
    groups: dict[tuple[Imputation, Positions | None], list[tuple[int, int, int]]] = {}
    for index, edit in enumerate(edits):
        edited_rows = range(len(z)) if edit.row is None else [edit.row]
        group = groups.setdefault((edit.imputation, edit.positions), [])
        group.extend((index, of_row, edit.head) for of_row in edited_rows)
    for (imputation, positions), slices in groups.items():
        number, row, head = torch.tensor(slices, device=z.device).reshape(-1, 3).unbind(-1)
        at = torch.ones(len(row), z.shape[1], dtype=torch.bool, device=z.device)  # [slices, tokens]
        if positions is not None:
            at = rows.selected(positions, z)[row]
        site = Site(
            layer=layer.index,
            heads=head,
            is_mlp=isinstance(layer, MLPOutput),
            longest=rows.past + z.shape[1],
            mask=None if mask is None else mask[row, rows.past :],
            positions=rows.positions(z)[row].where(at, 0) if imputation.by_position else None,
        )
        value = _imputed(imputation, before[row, :, head], site)  # [slices, tokens, head_dim]
        own = before[row, :, head]  # not the tensor that was passed to the imputation, which may write into it
        after[row, :, head] = value if positions is None else torch.where(at[..., None], value, own)
        held = edited.unflatten(-1, (layer.num_heads, layer.head_dim))[row, :, head]  # what the projection receives
        expected = at[..., None].expand_as(held)
        seen = [expected, _equal(held, value) & expected, ~_equal(held, own)]
        counts.index_add_(0, number, torch.stack(seen, dim=-1).sum(dim=(1, 2)))
    return edited, counts


def _imputed(imputation: Imputation, z: Tensor, site: Site) -> Tensor:
    """Return the replacement of z, in its shape. Raises InvalidAblation if an imputation returns anything else."""
    value = imputation(z, site)
    try:
        expanded = value.expand_as(z)
    except (RuntimeError, AttributeError):
        returned = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidAblation(
            f"the imputation {imputation.name!r} returned {returned}, which does not broadcast to z of {list(z.shape)}"
        ) from None
    if (expanded.dtype, expanded.device) != (z.dtype, z.device):
        raise InvalidAblation(
            f"the imputation {imputation.name!r} returned {value.dtype} on {value.device}, but z is {z.dtype} on "
            f"{z.device}"
        )
    return expanded


def _check_editable(z: Any, layer: Projection) -> None:
    """Raise UnsupportedModel unless z is a plain tensor of rows, tokens and channels, with values."""
    reason = ""
    if not isinstance(z, Tensor):
        reason = f"a {type(z).__name__}, not a tensor"
    elif type(z).__name__ == "DTensor":
        reason = "a DTensor, which is spread over devices: gather it before the projection"
    elif torch._C._functorch.is_functorch_wrapped_tensor(z):  # its values cannot be counted
        reason = "a tensor of a torch.func transform: pass a batch instead of vmap, and call backward() instead of grad"
    elif z.is_meta:
        reason = "a tensor on the meta device, which has no values"
    elif z.ndim != 3:
        reason = f"{z.ndim} dimensions, not [rows, tokens, channels]"
    elif z.shape[-1] != layer.num_heads * layer.head_dim:
        of_heads = "" if isinstance(layer, MLPOutput) else f"{layer.num_heads} heads of "
        reason = f"{z.shape[-1]} channels, not {of_heads}{layer.head_dim}"
    if reason:
        did = "returned" if isinstance(layer, MLPOutput) else "received"
        raise UnsupportedModel(f"{layer.projection_name} {did} {reason}")


def _equal(left: Tensor, right: Tensor) -> Tensor:
    """Whether elements are equal; NaN equals NaN."""
    return (left == right) | (left.isnan() & right.isnan())


def verify_shape(layer: AttentionLayer, z: Tensor, rows: int, tokens: int) -> None:
    """Raise UnsupportedModel unless z, the input of the projection, has this many rows and tokens, and all heads."""
    channels = layer.num_heads * layer.head_dim
    if z.shape != (rows, tokens, channels):
        expected = f"[{rows} rows, {tokens} tokens, {channels} channels]"
        raise UnsupportedModel(f"{layer.projection_name} received {tuple(z.shape)}, not {expected}")


def verify_called_once(layer: Projection, receipt: Receipt) -> None:
    """Raise AblationNotApplied unless a projection was called exactly once."""
    if (calls := receipt.calls_of(layer.key)) != 1:
        so = "the MLP cannot" if isinstance(layer, MLPOutput) else "no head of it can"
        raise AblationNotApplied(
            f"{layer.projection_name} was called {calls} times in one forward, not once: {so} be ablated"
        )


def verify_replaced(
    heads: HeadMap, edits: Mapping[Key, Sequence[Edit]], receipt: Receipt, *, may_be_none: bool
) -> None:
    """Raise AblationNotApplied unless every element that an edit has to replace holds the imputed value.

    may_be_none: an edit may have no element to replace, since its positions are those of other forward passes.
    """
    for key, counts in receipt.counts.items():
        for edit, count in zip(edits[key], counts, strict=True):
            if count.replaced != count.expected or not (count.expected or may_be_none):
                part = "the MLP" if isinstance(key, tuple) else f"head {edit.head}"
                raise AblationNotApplied(
                    f"{heads.projection(key).projection_name}: {count.replaced} of {count.expected} elements of {part} "
                    "hold the imputed value, so it was not ablated"
                )
