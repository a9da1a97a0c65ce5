"""What an implementation passes on to the model, and what it returns, with no head ablated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ablation.checks.causes.histories import Experiment, History
from ablation.checks.causes.simulation import Attempt, hooked, same_bits, same_logits
from ablation.checks.check import inputs_for, unsupported_features
from ablation.checks.driving import decode_with_cache, run
from ablation.checks.protocol import CACHE, Factory
from ablation.heads import find_heads


def returned_shape(history: History) -> str | None:
    """Compare the shape of the logits with that of the bare model's."""
    got, want = _idle(history), history.bare()
    if got.shape == want[:, -1:].shape != want.shape:
        return "only the logits of the last token are returned"
    return None


def returned_numbers(history: History) -> str | None:
    """Compare the logits with numbers that follow from those of the bare model."""
    got, want = _idle(history), history.bare()
    if got.dtype != want.dtype:
        return f"the logits are returned in {got.dtype}, whatever the dtype of the model"
    if same_logits(got, want.log_softmax(dim=-1)) and not same_logits(got, want):
        return "log-probabilities are returned, not logits"
    return None


def passed_inputs(history: History) -> str | None:
    """Compare the logits with what the bare model gives for other inputs."""
    inputs = inputs_for(history.factory, history.case)
    real, want = inputs["attention_mask"].bool(), history.bare(inputs)
    got = _idle(history)
    if same_bits(got[real], want[real]):
        return None
    if not same_logits(got[real], want[real]):
        others = [(lost, history.bare(_without(inputs, *lost[1]))[real]) for lost in _lost(history.factory)]
        if cause := _least_lost([lost for lost, logits in others if same_logits(got[real], logits)]):
            return cause
    return _prepended(history, got) or _rounded_layers(history, got)


def _idle(history: History) -> Tensor:
    """Return the logits with no head ablated."""
    with history.made() as implementation:
        logits: Tensor = implementation.run(**inputs_for(history.factory, history.case)).detach().clone()
        return logits


FEATURES = {"attention_mask": "padding", "position_ids": "position_ids"}
"""Input of a run -> the feature without which an implementation need not pass it on."""
Lost = tuple[str, tuple[str, ...]]
"""A cause, and the names of the inputs that are not passed on."""
LOST: tuple[Lost, ...] = (
    ("the attention mask is not passed on to the model", ("attention_mask",)),
    ("the position ids are not passed on to the model", ("position_ids",)),
    ("the attention mask and the position ids are not passed on to the model", ("attention_mask", "position_ids")),
)
NO_CACHE = "the key/value cache is not passed on to the model"
WITHOUT_CACHE: tuple[Lost, ...] = tuple(
    (NO_CACHE, (CACHE, *others))
    for others in ((), ("attention_mask",), ("position_ids",), ("attention_mask", "position_ids"))
)


def _lost(factory: Factory) -> list[Lost]:
    """Return the inputs that an implementation may lose, of those that it has to pass on, and what to say."""
    unsupported = unsupported_features(factory)
    return [(cause, names) for cause, names in LOST if not any(FEATURES[name] in unsupported for name in names)]


def _least_lost(found: list[Lost]) -> str | None:
    """Return the one cause that loses the fewest inputs: losing another, too, may change nothing."""
    fewest = min((len(names) for _, names in found), default=0)
    causes = {cause for cause, names in found if len(names) == fewest}
    return causes.pop() if len(causes) == 1 else None


def _without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def invented_positions(history: History) -> str | None:
    """Run with a mask, but without position ids, with no head ablated."""
    given = _without(history.inputs, "position_ids")
    real = history.inputs["attention_mask"].bool()
    with history.made() as implementation:
        got = implementation.run(**given).detach()[real]
    if same_logits(got, history.bare(given)[real]) or not same_logits(got, history.bare()[real]):
        return None
    return "position ids are derived from the mask if none are given; the bare model counts positions differently then"


def passed_pieces(history: History) -> str | None:
    """Decode with a cache, and compare with what the bare model gives if it does not receive everything."""
    if "cache" in unsupported_features(history.factory):
        return None
    real = history.inputs["attention_mask"].bool()

    def decoded_with(forward: Callable[..., Tensor]) -> Tensor:
        pieces = decode_with_cache(forward, history.case)
        return torch.cat([logits.detach() for _, _, logits in pieces], dim=1)[real]

    def of_bare(*lost: str) -> Tensor:
        model = history.case.model()
        return decoded_with(lambda **piece: run(model, _without(piece, *lost)))

    with history.made() as implementation:
        got = decoded_with(implementation.run)
    if same_logits(got, of_bare()):
        return None
    found = []
    for cause, names in (*_lost(history.factory), *WITHOUT_CACHE):
        with Attempt():  # of a model that refuses, say, a mask that is longer than its tokens
            if same_logits(got, of_bare(*names)):
                found.append((cause, names))
    return _least_lost(found)


def _prepended(history: History, got: Tensor) -> str | None:
    ids = history.inputs["input_ids"]
    longer = {"input_ids": torch.cat([ids[:, :1], ids], dim=1), "use_cache": False}
    if same_logits(got, history.bare(longer)[:, 1:]):
        return "a token is prepended to the prompt, which all other tokens see"
    return None


def _rounded_layers(history: History, got: Tensor) -> str | None:
    """Compare with the bare model whose z is rounded in every layer."""
    causes = []
    for name in ("float16", "bfloat16", "float32"):
        dtype, model = getattr(torch, name), history.case.model()
        with ExitStack() as undo:
            for layer in find_heads(model).layers:
                undo.enter_context(hooked(layer.projection, partial(_rounded, dtype), is_output=False))
            if same_bits(got, run(model, history.inputs)):
                causes.append(f"z is rounded to {name} in every layer, even if nothing is ablated")
    return causes[0] if len(causes) == 1 else None


def _rounded(dtype: torch.dtype, z: Tensor) -> Tensor:
    return z.to(dtype).to(z.dtype)


EXPERIMENTS: dict[str, tuple[Experiment, ...]] = {
    "smoke": (returned_shape,),
    "identity": (returned_shape, returned_numbers, passed_inputs, invented_positions, passed_pieces),
    "identity.padded": (returned_shape, returned_numbers, passed_inputs, invented_positions, passed_pieces),
    "locality": (passed_inputs,),
    "locality.padded": (passed_inputs,),
    "independence.padding": (returned_shape, passed_inputs),
}
"""Check -> the experiments that may show why it fails, in this order: only those of inputs that it gives, and of what
it reads of the logits."""
