"""Ablations, the edits that they make to the z of each layer, and receipts that prove the edits were made."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ablation.errors import AblationNotApplied, InvalidAblation, InvalidHead, UnsupportedModel
from ablation.heads import AttentionLayer, HeadMap
from ablation.imputation import Imputation, as_imputation


@dataclass(frozen=True, init=False)
class Ablation:
    """A set of heads that are ablated together, with one imputation.

    heads: (layer, head) pairs; if there are none, the ablated run is a clean run. Raises
    UnknownImputation for an unknown name, and InvalidHead if `heads` is a mapping, a text or not iterable. Whether the
    pairs are heads of a model is checked by `HeadAblation` and `run`.
    """

    heads: tuple[tuple[int, int], ...]
    imputation: Imputation

    def __init__(self, heads: Iterable[tuple[int, int]], imputation: str | Imputation = "zero") -> None:
        if isinstance(heads, Mapping | str | bytes):  # whose items would pass for heads
            raise InvalidHead(f"a {type(heads).__name__} is not a list of heads: pass pairs, such as [(0, 1)]")
        if not isinstance(heads, Iterable):
            raise InvalidHead(f"{heads!r} is not a list of heads: pass pairs, such as [(0, 1)]")
        object.__setattr__(self, "heads", tuple(heads))
        object.__setattr__(self, "imputation", as_imputation(imputation))

    def validated(self, heads: HeadMap) -> Ablation:
        """Return the ablation with its heads as ints, each named once. Raises InvalidHead if the model lacks a head."""
        return Ablation(tuple(dict.fromkeys(map(heads.validate, self.heads))), self.imputation)

    def __str__(self) -> str:
        pairs = "; ".join(f"layer {layer}, head {head}" for layer, head in self.heads) or "no head"
        return f"{pairs}; {self.imputation.name} imputation"


class Edit(NamedTuple):
    """One head of a layer, to be replaced in one row of the batch, or in every row if `row` is None."""

    head: int
    imputation: Imputation
    row: int | None = None


class EditCounts(NamedTuple):
    """The effect of one edit, counted in the tensor that the hook passes on to the projection.

    replaced: elements that hold the imputed value. changed: elements that differ from the head's own output.
    """

    replaced: int
    changed: int


class Receipt:
    """What the hook did in one forward pass.

    calls: how often the projection of each decoder layer was called, [layers]; 0 for a layer without heads.
    """

    def __init__(self, num_layers: int) -> None:
        self.calls = [0] * num_layers
        self.edited: dict[int, Tensor] = {}
        """{layer with edits: counts, int64 [edits, 2], with the columns of `EditCounts`, on the device of z}."""
        self.expected: dict[int, list[int]] = {}
        """{layer with edits: the number of elements that each edit has to replace}."""

    @property
    def counts(self) -> dict[int, list[EditCounts]]:
        """{layer with edits: the counts of each edit, in the order of the edits}."""
        if not self.edited:
            return {}
        device = next(iter(self.edited.values())).device
        joined = torch.cat([counts.to(device) for counts in self.edited.values()]).tolist()  # waits for the device once
        edits = iter([EditCounts(*edit) for edit in joined])
        return {layer: list(itertools.islice(edits, len(counts))) for layer, counts in self.edited.items()}

    def __repr__(self) -> str:
        return f"Receipt(calls={self.calls}, counts={self.counts})"


def edits_by_layer(ablations: Iterable[tuple[Ablation, int | None]]) -> dict[int, list[Edit]]:
    """Return {layer: edits}. ablations: each with the row of the batch that carries it, or None for every row."""
    edits: dict[int, list[Edit]] = {}
    for ablation, row in ablations:
        for layer, head in ablation.heads:
            edits.setdefault(layer, []).append(Edit(head, ablation.imputation, row))
    return edits


def apply_edits(z: Tensor, layer: AttentionLayer, edits: Sequence[Edit], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a copy of z with the edited heads replaced, and counts [edits, 2] in the order of `EditCounts`.

    Each replacement is computed from z itself, so edits do not see each other. z: [rows, tokens, num_heads * head_dim],
    not written to. mask: [rows, tokens], or one row for all, or None; see `Imputation`. Raises UnsupportedModel if z is
    anything else, and InvalidAblation if the mask does not fit.
    """
    _check_editable(z, layer)
    if mask is not None:
        if mask.shape[1:] != z.shape[1:2] or len(mask) not in (1, len(z)):
            raise InvalidAblation(
                f"the attention mask of {list(mask.shape)} does not fit z of {len(z)} rows and {z.shape[1]} tokens"
            )
        mask = mask.to(z.device).expand(len(z), -1)
    edited = z.clone()
    before, after = (t.unflatten(-1, (layer.num_heads, layer.head_dim)) for t in (z, edited))  # views
    counts = torch.zeros(len(edits), 2, dtype=torch.long, device=z.device)
    for imputation in dict.fromkeys(edit.imputation for edit in edits):
        # All slices of one imputation are replaced at once: a growing batch has an edit for each row.
        slices = [
            (number, row, edit.head)
            for number, edit in enumerate(edits)
            if edit.imputation == imputation
            for row in (range(len(z)) if edit.row is None else [edit.row])
        ]
        number, row, head = torch.tensor(slices, device=z.device).reshape(-1, 3).unbind(-1)
        own = before[row, :, head]  # [slices, tokens, head_dim]
        value = _imputed(imputation, own, None if mask is None else mask[row])
        after[row, :, head] = value
        held = edited.unflatten(-1, (layer.num_heads, layer.head_dim))[row, :, head]  # what the projection receives
        same = _equal(held, before[row, :, head])  # not `own`, into which an imputation may write
        per_slice = torch.stack([_equal(held, value), ~same], dim=-1).sum(dim=(1, 2))  # [slices, 2]
        counts.index_add_(0, number, per_slice)
    return edited, counts


def _imputed(imputation: Imputation, z: Tensor, mask: Tensor | None) -> Tensor:
    """Return the replacement of z, in its shape. Raises InvalidAblation if an imputation returns anything else."""
    value = imputation(z, mask)
    try:
        return value.expand_as(z)
    except (RuntimeError, AttributeError):
        returned = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidAblation(
            f"the imputation {imputation.name!r} returned {returned}, which does not broadcast to z of {list(z.shape)}"
        ) from None


def _check_editable(z: Any, layer: AttentionLayer) -> None:
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
        reason = f"{z.shape[-1]} channels, not {layer.num_heads} heads of {layer.head_dim}"
    if reason:
        raise UnsupportedModel(f"{layer.projection_name} received {reason}")


def _equal(left: Tensor, right: Tensor) -> Tensor:
    """Whether elements are equal; NaN equals NaN."""
    return (left == right) | (left.isnan() & right.isnan())


def expected_elements(z: Tensor, layer: AttentionLayer, edits: Sequence[Edit]) -> list[int]:
    """Return how many elements of z each edit has to replace."""
    rows, tokens, _ = z.shape
    return [(rows if edit.row is None else 1) * tokens * layer.head_dim for edit in edits]


def verify_shape(layer: AttentionLayer, z: Tensor, rows: int, tokens: int) -> None:
    """Raise UnsupportedModel unless z, the input of the projection, has this many rows and tokens, and all heads."""
    channels = layer.num_heads * layer.head_dim
    if z.shape != (rows, tokens, channels):
        expected = f"[{rows} rows, {tokens} tokens, {channels} channels]"
        raise UnsupportedModel(f"{layer.projection_name} received {tuple(z.shape)}, not {expected}")


def verify_called_once(layer: AttentionLayer, receipt: Receipt) -> None:
    """Raise AblationNotApplied unless the layer's projection was called exactly once."""
    if (calls := receipt.calls[layer.index]) != 1:
        raise AblationNotApplied(
            f"{layer.projection_name} was called {calls} times in one forward, not once: no head of it can be ablated"
        )


def verify_replaced(heads: HeadMap, edits: Mapping[int, Sequence[Edit]], receipt: Receipt) -> None:
    """Raise AblationNotApplied unless every element of each edited head holds the imputed value."""
    for index, counts in receipt.counts.items():
        for edit, count, expected in zip(edits[index], counts, receipt.expected[index], strict=True):
            if count.replaced != expected:
                raise AblationNotApplied(
                    f"{heads.layer(index).projection_name}: {count.replaced} of {expected} elements of head "
                    f"{edit.head} hold the imputed value, so the head was not ablated"
                )


def whole_sequence_mask(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the mask, [rows, tokens], that an imputation needs if it depends on all tokens of a row.

    arguments: those of the decoder, by name. Raises InvalidAblation unless each row is one whole sequence.
    """
    # A cache is recognised by its method: its argument is past_key_values or, since transformers 5.24, cache.
    caches = [value for value in arguments.values() if hasattr(value, "get_seq_length")]
    if any(cache.get_seq_length() > 0 for cache in caches):
        raise InvalidAblation("this imputation needs the whole sequence in one forward: pass use_cache=False")
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise InvalidAblation("this imputation needs an attention mask of [rows, tokens] to leave out the padding")
    if _is_packed(arguments, mask):
        raise InvalidAblation(
            "this imputation takes one value from each row, but a row holds several packed sequences: pass each "
            "sequence as a row of its own, with padding"
        )
    return mask


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
