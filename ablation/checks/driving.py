"""Helpers with which the checks run models and implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ablation.checks.cases import Case
from ablation.checks.decoders import Decoder
from ablation.checks.protocol import CACHE, Factory, Implementation
from ablation.errors import AblationNotApplied


def run(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Return the logits of a bare model, [rows, tokens, vocabulary]."""
    with torch.no_grad():
        logits: Tensor = model(**{"use_cache": False} | inputs).logits
    return logits


@contextmanager
def made(factory: Factory, model: PreTrainedModel) -> Iterator[Implementation]:
    """Context manager: make an implementation, and close it at the end, also after an error."""
    implementation = factory(model)
    try:
        yield implementation
    finally:
        discard(implementation.close)


def discard(call: Callable[..., object], *args: Any) -> None:
    """Call `ablate` or `close` when no run may have used the heads in force; an error that reports this is ignored."""
    with suppress(AblationNotApplied):
        call(*args)


def ablate(
    implementation: Implementation, case: Case, heads: Sequence[tuple[int, int]] | None = None, **changes: Any
) -> None:
    """Ablate the heads of a case, or others, by its imputation. changes: to the keyword arguments of `ablate`."""
    call: Callable[..., None] = implementation.ablate
    call(list(case.heads) if heads is None else heads, case.imputation, **case.keywords() | changes)


def ablated_logits(factory: Factory, case: Case, model: PreTrainedModel | None = None) -> Tensor:
    """Return the logits of the implementation under test with the heads of a case ablated, [rows, tokens, vocabulary].

    model: the model to use; by default a new one.
    """
    with made(factory, model or case.model()) as implementation:
        ablate(implementation, case)
        return implementation.run(**case.inputs())


@cache
def returns_gradients(factory: Factory, family: str) -> bool:
    """Return whether the logits of an implementation require gradients if these are enabled. After an error: True."""
    model = Decoder(family, num_layers=1, num_heads=2, head_dim=8).fresh()
    try:
        with torch.enable_grad(), made(factory, model) as implementation:
            return implementation.run(torch.tensor([[3, 1]])).requires_grad
    except Exception:  # a check reports it
        return True


def other_ids(case: Case) -> Tensor:
    """Return token ids that all differ from those of the case, [rows, tokens]."""
    ids: Tensor = (case.inputs()["input_ids"] + 7) % case.decoder.vocabulary
    return ids


def other_keywords(case: Case) -> dict[str, Any]:
    """Return keyword arguments of `ablate` that fit a case, with other values or other tokens of the reference."""
    keywords = case.keywords()
    if "values" in keywords:
        return {"values": {pair: -value for pair, value in keywords["values"].items()}}
    batches = keywords.get("reference", [])
    others = [{**batch, "input_ids": (batch["input_ids"] + 7) % case.decoder.vocabulary} for batch in batches]
    return {"reference": others} if others else {}


def piece(case: Case, past: DynamicCache, start: int, stop: int) -> dict[str, Any]:
    """Return the inputs of the tokens from start to stop, which follow those in the cache."""
    inputs = case.inputs()
    return {
        "input_ids": inputs["input_ids"][:, start:stop],
        "attention_mask": inputs["attention_mask"][:, :stop],
        "position_ids": inputs["position_ids"][:, start:stop],
        "use_cache": True,
        CACHE: past,
    }


def decode_with_cache(forward: Callable[..., Tensor], case: Case) -> Iterator[tuple[str, slice, Tensor]]:
    """Decode the prompts of a case with a cache, in alternating pieces of one and two tokens.

    forward: runs a model or an implementation. Yields for each piece its name, its tokens as a slice, and its logits.
    """
    past, length = DynamicCache(config=case.decoder.shared().config), max(map(len, case.rows))
    start, size = 0, 1 + case.rows[0][0] % 2
    while start < length:
        stop = min(start + size, length)
        logits = forward(**piece(case, past, start, stop))
        name = f"token {start}" if stop == start + 1 else f"tokens {start} to {stop - 1}"
        yield name, slice(start, stop), logits
        start, size = stop, 3 - size
