"""The hook: one object that replaces the output of any heads of a model, and proves that it did."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.errors import AblationNotApplied, InvalidAblation, UnsupportedModel
from ablation.heads import AttentionLayer, HeadMap, find_heads
from ablation.imputation import Imputation, as_imputation

ALL_ROWS = slice(None)
NOT_CALLED = object()


class Edit(NamedTuple):
    """Replace one head's z in some rows of the batch."""

    head: int
    imputation: Imputation
    rows: slice = ALL_ROWS


class EditCounts(NamedTuple):
    """What one edit did, counted on the tensor that the projection was given.

    replaced: elements that hold the imputed value. changed: those of them that differ from the head's own output.
    """

    replaced: int
    changed: int


class Receipt:
    """What the hook did in one forward.

    calls: how often each layer's projection was called, [layers]; 0 in a layer without heads. fired: for each layer
    with edits, one `Fired` an edit, in their order.
    """

    def __init__(self, layers: int) -> None:
        self.calls = [0] * layers
        self.counts: dict[int, list[EditCounts]] = {}

    def __repr__(self) -> str:
        return f"Receipt(calls={self.calls}, counts={self.counts})"


class HeadAblation:
    """Replaces the output of attention heads in every forward of a model, while entered as a context manager.

    with HeadAblation(model) as ablation:       # unset: the model computes what it always computes, bit for bit
        ablation.ablate([(9, 6)], "mean")          # layer 9, head 6
        logits = model(input_ids).logits
        ablation.clear()

    It holds one forward pre-hook on each attention output projection, two hooks on the decoder that start and check
    the receipt, and two on the model that note its mask and see that the decoder's hooks ran. It never writes into a
    tensor that it is given. On leaving, by whatever way, these hooks are gone and everything else is as it was. It can
    be entered again.

    edits: its state, {layer: edits}; empty when unset. receipt: what it did in the last forward.

    Raises UnsupportedModel for a model whose heads cannot be ablated honestly.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.heads: HeadMap = find_heads(model)
        self.edits: Mapping[int, tuple[Edit, ...]] = {}
        self.receipt = Receipt(self.heads.num_layers)
        self._installed: ExitStack | None = None
        self._mask: Tensor | None = None
        self._given: object = NOT_CALLED
        self._model = model

    def __enter__(self) -> Self:
        """Install the hooks. Raises InvalidAblation if the model already carries an ablation."""
        decoder, layers = self.heads.decoder, self.heads.layers
        if any(isinstance(getattr(h, "__self__", None), HeadAblation) for h in decoder._forward_pre_hooks.values()):
            raise InvalidAblation("the model already carries an ablation: leave it first, or set all heads on that one")
        with ExitStack() as hooks:
            hooks.callback(self._model.register_forward_pre_hook(self._note, with_kwargs=True).remove)
            hooks.callback(decoder.register_forward_pre_hook(self._start, with_kwargs=True).remove)
            for layer in layers:
                replace = partial(self._replace, layer)
                hooks.callback(layer.projection.register_forward_pre_hook(replace, with_kwargs=True).remove)
            hooks.callback(decoder.register_forward_hook(self._check).remove)
            hooks.callback(self._model.register_forward_hook(self._check_ran).remove)
            self._installed = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        if self._installed is not None:
            self._installed.close()
            self._installed = None

    def ablate(self, heads: Iterable[tuple[int, int]], imputation: str | Imputation = "zero") -> None:
        """Ablate these (layer, head) pairs, and no others, in every row of every forward from now on.

        Raises NoSuchHead, UnknownImputation, and InvalidAblation outside of `with`; the state is then what it was.
        """
        if self._installed is None:
            raise InvalidAblation("the ablation is not installed, so it would never fire: enter it first, with `with`")
        chosen = as_imputation(imputation)
        edits: dict[int, tuple[Edit, ...]] = {}
        for layer, head in dict.fromkeys(map(self.heads.validate, heads)):
            edits[layer] = (*edits.get(layer, ()), Edit(head, chosen))
        self.edits = edits

    def clear(self) -> None:
        """Ablate nothing: the identity."""
        self.edits = {}
        self._mask = None

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model runs: the mask it was given, from which a model of several parts makes the decoder's."""
        self._given = _arguments(model, args, kwargs).get("attention_mask")

    def _start(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder runs: a new receipt, and the padding mask that a mean has to respect."""
        self.receipt = Receipt(self.heads.num_layers)
        self._mask = None
        noted, self._given = self._given, NOT_CALLED
        if all(edit.imputation.per_token for edits in self.edits.values() for edit in edits):
            return
        given = _arguments(decoder, args, kwargs)
        # By what it can, not by its name, which is past_key_values or, since transformers 5.24, cache.
        caches = [value for value in given.values() if hasattr(value, "get_seq_length")]
        if any(cache.get_seq_length() > 0 for cache in caches):
            raise InvalidAblation("this imputation needs the whole sequence in one forward: pass use_cache=False")
        mask = given.get("attention_mask")
        if isinstance(mask, dict):  # made of it, one for each kind of layer
            mask = noted
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise InvalidAblation("this imputation needs an attention mask of [rows, tokens] to leave out the padding")
        self._mask = mask

    def _replace(
        self, layer: AttentionLayer, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a projection runs: its input with the edited heads' slices replaced."""
        self.receipt.calls[layer.index] += 1
        edits = self.edits.get(layer.index)
        if not edits:
            return None
        if args:
            z, *rest = args
            out, fired = apply_edits(z, layer, edits, self._mask)
            result = (out, *rest), kwargs
        else:
            ((name, z),) = kwargs.items()
            out, fired = apply_edits(z, layer, edits, self._mask)
            result = (), {name: out}
        self.receipt.counts[layer.index] = fired
        return result

    def _check(self, decoder: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """After the decoder ran: each edited projection was called exactly once, or the result is not an ablation."""
        for index in self.edits:
            if self.receipt.calls[index] != 1:
                name, calls = self.heads.layer(index).projection_name, self.receipt.calls[index]
                raise AblationNotApplied(
                    f"{name} was called {calls} times in one forward, not once: no ablation of a head"
                )

    def _check_ran(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """After the model ran: so did the decoder's hooks, which a forward that was compiled before leaves out."""
        if self.edits and self._given is not NOT_CALLED:
            raise AblationNotApplied("the decoder's hooks did not run, as in a compiled forward: nothing was ablated")


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def apply_edits(
    z: Tensor, layer: AttentionLayer, edits: Sequence[Edit], mask: Tensor | None
) -> tuple[Tensor, list[EditCounts]]:
    """A copy of z with the heads of `edits` replaced, each computed from z itself, and what each edit did.

    z: [rows, tokens, heads * width], not written to. mask: [rows, tokens] or None, see `Imputation`.
    """
    if z.ndim != 3:
        raise UnsupportedModel(f"{layer.projection_name} was given {z.ndim} dimensions, not [rows, tokens, channels]")
    out = z.clone()
    before, after = (t.unflatten(-1, (layer.num_heads, layer.head_dim)) for t in (z, out))  # views
    counts = torch.zeros(len(edits), 2, dtype=torch.long, device=z.device)
    for imputation in dict.fromkeys(edit.imputation for edit in edits):
        # All cells of an imputation at once: a sweep has an edit for each row.
        cells = [
            (number, row, edit.head)
            for number, edit in enumerate(edits)
            if edit.imputation == imputation
            for row in range(len(z))[edit.rows]
        ]
        number, row, head = torch.tensor(cells, device=z.device).reshape(-1, 3).unbind(-1)
        own = before[row, :, head]  # [cells, tokens, width]
        value = imputation(own, None if mask is None else mask.to(z.device)[row])
        after[row, :, head] = value.expand_as(own)
        held = after[row, :, head]
        fired = torch.stack([held == value, held != own], dim=-1).sum(dim=(1, 2))  # [cells, 2]
        counts.index_add_(0, number, fired)
    return out, [EditCounts(*count) for count in counts.tolist()]
