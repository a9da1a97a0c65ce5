"""`HeadAblation`, a context manager that replaces the output (z) of heads, and receipts that prove that it did."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.errors import AblationNotApplied, InvalidAblation, UnsupportedModel
from ablation.heads import AttentionLayer, HeadMap, find_heads
from ablation.imputation import Imputation, as_imputation


@dataclass(frozen=True, init=False)
class Ablation:
    """A set of heads that are ablated together, with one imputation.

    heads: (layer, head) pairs; if there are none, the ablated run is a clean run. Raises UnknownImputation.
    """

    heads: tuple[tuple[int, int], ...]
    imputation: Imputation

    def __init__(self, heads: Iterable[tuple[int, int]], imputation: str | Imputation = "zero") -> None:
        object.__setattr__(self, "heads", tuple(heads))
        object.__setattr__(self, "imputation", as_imputation(imputation))

    def validated(self, heads: HeadMap) -> Ablation:
        """Return the ablation with its heads as ints, each named once. Raises InvalidHead if the model lacks a head."""
        return Ablation(dict.fromkeys(map(heads.validate, self.heads)), self.imputation)

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

    @property
    def counts(self) -> dict[int, list[EditCounts]]:
        """{layer with edits: the counts of each edit, in the order of the edits}."""
        return {layer: [EditCounts(*edit) for edit in counts.tolist()] for layer, counts in self.edited.items()}

    def __repr__(self) -> str:
        return f"Receipt(calls={self.calls}, counts={self.counts})"


@dataclass(frozen=True)
class _ModelCall:
    """A call of the model whose decoder has not started yet. mask: the attention mask that the model was given."""

    mask: Any


def edits_by_layer(ablations: Iterable[tuple[Ablation, int | None]]) -> dict[int, list[Edit]]:
    """Return {layer: edits}. ablations: each with the row of the batch that carries it, or None for every row."""
    edits: dict[int, list[Edit]] = {}
    for ablation, row in ablations:
        for layer, head in ablation.heads:
            edits.setdefault(layer, []).append(Edit(head, ablation.imputation, row))
    return edits


class HeadAblation:
    """A context manager that replaces the output of attention heads in every forward pass of a model.

    with HeadAblation(model) as ablation:       # nothing is ablated yet: the logits are the model's, bit for bit
        ablation.ablate([(9, 6)], "mean")       # layer 9, head 6
        logits = model(input_ids).logits
        ablation.clear()

    Entering registers one forward pre-hook on each attention output projection; two hooks on the decoder, which begin
    and verify the receipt; and two on the model, which keep the attention mask and verify that the decoder's hooks ran.
    The hooks never write into a tensor that they receive. Leaving, also by an exception, removes these hooks and
    changes nothing else. The context manager can be entered again.

    heads: the `HeadMap` of the model. edits: {layer: edits} in force; empty if nothing is ablated. receipt: the
    `Receipt` of the last forward pass.

    Raises UnsupportedModel if the heads of the model cannot be ablated correctly.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.heads: HeadMap = find_heads(model)
        self.edits: Mapping[int, Sequence[Edit]] = {}
        self.receipt = Receipt(self.heads.num_layers)
        self._model = model
        self._installed: ExitStack | None = None
        self._model_call: _ModelCall | None = None
        self._mask: Tensor | None = None

    def __enter__(self) -> Self:
        """Register the hooks. Raises InvalidAblation if the model already carries an ablation."""
        decoder = self.heads.decoder
        if any(isinstance(getattr(h, "__self__", None), HeadAblation) for h in decoder._forward_pre_hooks.values()):
            raise InvalidAblation("the model already carries an ablation: leave it first, or ablate all heads with it")
        with ExitStack() as hooks:
            hooks.callback(self._model.register_forward_pre_hook(self._remember_mask, with_kwargs=True).remove)
            hooks.callback(decoder.register_forward_pre_hook(self._begin_forward, with_kwargs=True).remove)
            for layer in self.heads.layers:
                edit = partial(self._edit_input, layer)
                hooks.callback(layer.projection.register_forward_pre_hook(edit, with_kwargs=True).remove)
            hooks.callback(decoder.register_forward_hook(self._verify_calls).remove)
            hooks.callback(self._model.register_forward_hook(self._verify_decoder_ran).remove)
            self._installed = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        if self._installed is not None:
            self._installed.close()
            self._installed = None

    def ablate(self, heads: Iterable[tuple[int, int]], imputation: str | Imputation = "zero") -> None:
        """Ablate these (layer, head) pairs, and no others, in every row of every following forward pass.

        Raises InvalidHead, UnknownImputation, and InvalidAblation outside of `with`. After an error, the previous
        heads stay in force.
        """
        if self._installed is None:
            raise InvalidAblation("the ablation is not installed, so it would never fire: enter it first, using `with`")
        self.edits = edits_by_layer([(Ablation(heads, imputation).validated(self.heads), None)])

    def clear(self) -> None:
        """Ablate nothing: following forward passes give the model's own logits."""
        self.edits = {}
        self._mask = None

    def _remember_mask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Model pre-hook: keep the 2-D mask; a multi-part model passes masks derived from it to its decoder."""
        self._model_call = _ModelCall(_named_arguments(model, args, kwargs).get("attention_mask"))

    def _begin_forward(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decoder pre-hook: begin a receipt, and find the padding mask if an imputation depends on other tokens."""
        call, self._model_call = self._model_call, None
        self.receipt = Receipt(self.heads.num_layers)
        self._mask = None
        if all(edit.imputation.per_token for edits in self.edits.values() for edit in edits):
            return
        arguments = _named_arguments(decoder, args, kwargs)
        # A cache is recognised by its method: its argument is past_key_values or, since transformers 5.24, cache.
        caches = [value for value in arguments.values() if hasattr(value, "get_seq_length")]
        if any(cache.get_seq_length() > 0 for cache in caches):
            raise InvalidAblation("this imputation needs the whole sequence in one forward: pass use_cache=False")
        mask = arguments.get("attention_mask")
        if isinstance(mask, dict) and call is not None:  # one mask per layer type, all made from the model's mask
            mask = call.mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise InvalidAblation("this imputation needs an attention mask of [rows, tokens] to leave out the padding")
        self._mask = mask

    def _edit_input(
        self, layer: AttentionLayer, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Projection pre-hook: count the call, and replace the slices of the edited heads in the input."""
        self.receipt.calls[layer.index] += 1
        edits = self.edits.get(layer.index)
        if not edits:
            return None
        if args:
            z, *rest = args
            edited, counts = apply_edits(z, layer, edits, self._mask)
            result = (edited, *rest), kwargs
        else:
            ((name, z),) = kwargs.items()
            edited, counts = apply_edits(z, layer, edits, self._mask)
            result = (), {name: edited}
        self.receipt.edited[layer.index] = counts
        return result

    def _verify_calls(self, decoder: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Decoder hook: raise AblationNotApplied unless each edited projection was called exactly once."""
        for index in self.edits:
            verify_called_once(self.heads.layer(index), self.receipt)

    def _verify_decoder_ran(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Model hook: raise if the decoder's hooks did not run. A forward that was compiled earlier omits them."""
        if self.edits and self._model_call is not None:
            raise AblationNotApplied("the decoder's hooks did not run, as in a compiled forward: nothing was ablated")


def verify_called_once(layer: AttentionLayer, receipt: Receipt) -> None:
    """Raise AblationNotApplied unless the layer's projection was called exactly once."""
    if (calls := receipt.calls[layer.index]) != 1:
        raise AblationNotApplied(
            f"{layer.projection_name} was called {calls} times in one forward, not once: no head of it can be ablated"
        )


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's forward by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def apply_edits(z: Tensor, layer: AttentionLayer, edits: Sequence[Edit], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a copy of z with the edited heads replaced, and counts [edits, 2] in the order of `EditCounts`.

    Each replacement is computed from z itself, so edits do not see each other. z: [rows, tokens, num_heads * head_dim],
    not written to. mask: [rows, tokens] or None, see `Imputation`. Raises UnsupportedModel if z has another shape.
    """
    if z.ndim != 3:
        raise UnsupportedModel(f"{layer.projection_name} received {z.ndim} dimensions, not [rows, tokens, channels]")
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
        value = imputation(own, None if mask is None else mask.to(z.device)[row])
        after[row, :, head] = value.expand_as(own)
        held = after[row, :, head]
        per_slice = torch.stack([held == value, held != own], dim=-1).sum(dim=(1, 2))  # [slices, 2]
        counts.index_add_(0, number, per_slice)
    return edited, counts
