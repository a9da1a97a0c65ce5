"""The growing batch: hooks that let one forward carry every ablation, each from the layer on at which it differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ablation.heads import HeadMap

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a module's forward: by position, by keyword."""


class BatchMismatch(Exception):
    """A row of a growing batch is not what the same forward gives without growth."""


def growing_batch(
    heads: HeadMap, clean: int, added: Mapping[int, int], narrow: bool, step: Callable[[], object]
) -> ExitStack:
    """While entered, the batch of a forward grows from layer to layer; with `narrow`, it ends with the last token.

    clean: rows that the model is given, one for each prompt. added: {layer: how many copies of all these rows join
    before that layer, behind the rows that are there}. step: called before each layer with heads.

    narrow: what comes behind the attention of the last layer is computed for the last token only, and the logits of
    other tokens mean nothing. That is right where its parts, but for the attention, look at each token by itself; like
    the growth, it has to be checked against a forward without.
    """
    with ExitStack() as hooks:
        rows = clean
        for layer in heads.layers:
            copies = added.get(layer.index, 0)
            grow = partial(_grow, clean, rows, copies, step)
            hooks.callback(layer.block.register_forward_pre_hook(grow, with_kwargs=True).remove)
            rows += clean * copies
        last = heads.layers[-1]
        if narrow and last.index == heads.num_layers - 1:
            token = _LastToken()
            hooks.callback(last.projection.register_forward_pre_hook(token.at_projection, with_kwargs=True).remove)
            for part in last.block.children():
                hooks.callback(part.register_forward_pre_hook(token.at_part, with_kwargs=True).remove)
        return hooks.pop_all()


def _grow(
    clean: int, rows: int, copies: int, step: Callable[[], object], block: nn.Module, args: Any, kwargs: Any
) -> Arguments:
    """Before a decoder layer: copies of the clean rows join its hidden states, [rows, tokens, ...]."""
    step()

    def longer(hidden: Tensor) -> Tensor:
        if len(hidden) != rows:  # its first dimension is another
            raise BatchMismatch(f"a layer was given {len(hidden)} rows, not {rows}")
        return torch.cat([hidden, *[hidden[:clean]] * copies])

    args, kwargs = _with_hidden(longer, args, kwargs)
    groups = rows // clean + copies  # for all of which it takes what the model has made for its own rows
    return _tiled(args, clean, groups), _tiled(kwargs, clean, groups)


def _tiled(value: Any, clean: int, groups: int) -> Any:
    """The same, with tensors of a row for each prompt, such as masks and positions, repeated for groups of rows."""
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == clean:
        return value.repeat(groups, *[1] * (value.ndim - 1))
    if isinstance(value, tuple):
        return tuple(_tiled(part, clean, groups) for part in value)
    if isinstance(value, dict):
        return {name: _tiled(part, clean, groups) for name, part in value.items()}
    return value


class _LastToken:
    """Narrows what comes behind an attention to the last token. Where all tokens are added to it, it broadcasts."""

    def __init__(self) -> None:
        self.is_behind = False

    def at_projection(self, projection: nn.Module, args: Any, kwargs: Any) -> Arguments:
        """Before the projection: the attention has seen all tokens."""
        self.is_behind = True
        return self.at_part(projection, args, kwargs)

    def at_part(self, part: nn.Module, args: Any, kwargs: Any) -> Arguments:
        """Before a part of the layer: [rows, tokens, channels] -> [rows, 1, channels], behind the attention."""
        if not self.is_behind or not (args or "hidden_states" in kwargs):
            return args, kwargs
        return _with_hidden(_last_token, args, kwargs)


def _last_token(hidden: Any) -> Any:
    return hidden[:, -1:] if isinstance(hidden, Tensor) and hidden.ndim == 3 else hidden


def _with_hidden(change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments, the hidden states among them changed: by position the first."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}
