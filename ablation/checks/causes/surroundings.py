"""What an implementation depends on besides its calls: other models, threads, gradients, caches, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ablation.checks.cases import Case, token_positions
from ablation.checks.causes.histories import Experiment, History
from ablation.checks.causes.simulation import (
    NOTHING,
    RIGHT,
    Attempt,
    Mistake,
    Setting,
    hooked,
    real_tokens,
    same_logits,
    simulated,
    while_ablated,
)
from ablation.checks.driving import ablate, decode_with_cache, made, run
from ablation.checks.imputed import frozen_values
from ablation.heads import find_heads


def found_by_next(history: History) -> str | None:
    """Ablate heads by an implementation, and make the next one on another model."""
    bare, real = history.bare(), history.inputs["attention_mask"].bool()
    with history.made() as implementation:
        history.ablated(implementation, history.every)
    with history.made() as implementation:
        got = implementation.run(**history.inputs)
    old = [_right(History(history.factory, replace(history.case, imputation=name))) for name in ("zero", "mean")]
    if any(same_logits(got[real], logits) for logits in old) and not same_logits(got, bare):
        return (
            "the heads are kept outside of the instance, for example on its class: the next implementation finds them"
        )
    return None


def other_models(history: History) -> str | None:
    """Ablate heads of one model, and then of another one."""
    shared = _interfere(history, share_configuration=True)
    if shared and "other" in shared and not _interfere(history, share_configuration=False):
        return "the heads are kept in the configuration, which models may share"
    return shared


def _interfere(history: History, *, share_configuration: bool) -> str | None:
    one, other, inputs = history.case.model(), history.case.model(), history.inputs
    if share_configuration:
        other.config = one.config
    bare, want = run(other, inputs), history.fresh(history.every)
    with made(history.factory, one) as first:
        history.ablated(first, history.every)
        if not same_logits(run(other, inputs), bare):
            return "what is replaced belongs to all models, such as a method of a class or a function of the library"
        with made(history.factory, other) as second:
            ablate(second, history.case, history.another)
            got = first.run(**inputs).detach()
            if not same_logits(got, want):
                return (
                    "the heads are kept outside of the instance, for example on its class: an implementation on the "
                    "other model changes them"
                )
    return None


def threads(history: History) -> str | None:
    """Run in a worker thread."""
    bare = history.bare()
    with history.made() as implementation, ThreadPoolExecutor(1) as worker:
        got = worker.submit(lambda: history.ablated(implementation, history.every)).result()
    if same_logits(got, bare):
        return "nothing is ablated in another thread: what the implementation switches on is valid in one thread only"
    return None


def gradient_modes(history: History) -> str | None:
    """Run in each gradient mode."""
    bare, idle = history.bare(), []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), history.made() as implementation:
            if same_logits(history.ablated(implementation, history.every), bare):
                idle.append(f"torch.{mode.__name__}()")
    if idle and len(idle) < 3:
        return f"nothing is ablated under {' and '.join(idle)}"
    with history.made() as implementation:
        try:
            for mode in (torch.inference_mode, torch.enable_grad):
                with mode():
                    history.ablated(implementation, history.every)
        except RuntimeError as error:
            if "nference tensor" in str(error):
                return "a tensor that was made under torch.inference_mode() is kept, and written to in a later run"
    return None


Piece = Callable[[int, int], bool]
"""(number of tokens in the cache, number of tokens in the piece) -> whether the piece is ablated."""
PIECES: tuple[tuple[str, Piece], ...] = (
    ("nothing is ablated in the first pass, which fills the cache", lambda before, tokens: before > 0),
    ("nothing is ablated in passes that follow a cache", lambda before, tokens: before == 0),
    (
        "nothing is ablated in a piece of several tokens that follows a cache",
        lambda before, tokens: before == 0 or tokens == 1,
    ),
    ("nothing is ablated in a piece of one token", lambda before, tokens: tokens > 1),
)


def decoded(history: History) -> str | None:
    """Decode with a cache, in two ways, and compare with simulations of known mistakes."""
    rows = history.case.rows
    other = replace(
        history.case, rows=(tuple((token + 1) % history.case.decoder.vocabulary for token in rows[0]), *rows[1:])
    )  # other pieces
    causes = _mistakes_in_decoding(history) & _mistakes_in_decoding(History(history.factory, other))
    return causes.pop() if len(causes) == 1 else None


def _mistakes_in_decoding(history: History) -> set[str]:
    """Return the mistakes that give the logits of an implementation: some pieces only, or positions that restart."""
    case = history.case
    if case.positions is not None:
        case = replace(case, positions=tuple(dict.fromkeys(at % min(map(len, case.rows)) for at in case.positions)))
    real = history.inputs["attention_mask"].bool()
    with made(history.factory, case.model()) as implementation:
        ablate(implementation, case)
        got = torch.cat([logits.detach() for _, _, logits in decode_with_cache(implementation.run, case)], dim=1)[real]

    def simulated_pieces(mistake: Mistake, acts: Piece) -> Tensor:
        setting = Setting(case, case.model(), history.inputs)
        position, mask, frozen = setting.position, setting.real, dict(setting.frozen)

        def forward(**piece: Any) -> Tensor:
            tokens, after = piece["input_ids"].shape[1], piece["attention_mask"].shape[1]
            here = slice(after - tokens, after)
            setting.real, setting.position = mask[:, here], position[:, here]
            at = {"at": _at(case, position, mask)[:, here]}
            vars(setting).update(at, frozen={pair: value[:, here] for pair, value in frozen.items()})
            with while_ablated(setting, mistake if acts(after - tokens, tokens) else NOTHING):
                return run(setting.model, piece)

        return torch.cat([logits for _, _, logits in decode_with_cache(forward, case)], dim=1)[real]

    always: Piece = lambda before, tokens: True  # noqa: E731
    causes = [cause for cause, acts in PIECES if _fits(got, lambda acts=acts: simulated_pieces(RIGHT, acts))]  # type: ignore[misc]
    causes += [
        cause
        for cause, mistake in _restarts(case)
        if _fits(got, lambda mistake=mistake: simulated_pieces(mistake, always))  # type: ignore[misc]
    ]
    return set(causes)


def _fits(got: Tensor, simulate: Callable[[], Tensor]) -> bool:
    with Attempt():
        return same_logits(got, simulate())
    return False


def _at(case: Any, position: Tensor, real: Tensor) -> Tensor:
    if case.positions is None:
        return torch.ones_like(real)
    return real & torch.stack([position == at for at in case.positions]).any(dim=0)


def _restarted(site: Any) -> Tensor:
    return token_positions(site.setting.real)


def _at_restarted(site: Any, number: int) -> Tensor:
    if site.setting.case.positions is None:
        raise LookupError("no positions")
    return _at(site.setting.case, _restarted(site), site.setting.real)


RESTARTED = "positions are counted from the first token of each forward pass, not from that of the cache"
RESTARTS = (
    (RESTARTED, Mistake("", tokens=_at_restarted)),
    (
        "the first columns of the mask are used for the tokens that are decoded, not its last ones",
        Mistake("", tokens=lambda site, _: real_tokens(site.setting.inputs)[:, : site.x.shape[1]]),
    ),
)


def _restarts(case: Case) -> tuple[tuple[str, Mistake], ...]:
    """Return mistakes in decoding, with those of values that depend on the position."""
    if not case.by_position and case.kind != "reference-mean-by-position":
        return RESTARTS
    alone = replace(case, rows=(max(case.rows, key=len),))  # without padding, so that columns are positions
    values = frozen_values(alone, case.model())
    return *RESTARTS, (RESTARTED, Mistake("", value=lambda site, own, pair: values[pair][0][_restarted(site)]))


def checkpointed(history: History) -> str | None:
    """Say why gradients differ under checkpointing, if the logits are right."""
    real = history.inputs["attention_mask"].bool()
    if not same_logits(history.fresh(history.every)[real], _right(history)):
        return None
    return (
        "the hooks do not act when checkpointing runs the layers again, in the backward pass: they are removed after "
        "the forward pass, or act once"
    )


def differentiated(history: History) -> str | None:
    """Compare gradients with those of a run in which z is detached, or written behind the back of autograd."""
    model, inputs = history.case.model(), history.inputs
    with torch.enable_grad(), made(history.factory, model) as implementation:
        ablate(implementation, history.case)
        logits = implementation.run(**inputs)
        if not same_logits(logits[inputs["attention_mask"].bool()], _right(history)):
            return None
        logits.sum().backward()
    causes = [cause for cause, edit in DETACHED if _same_gradients(history, edit, model)]
    return causes[0] if len(causes) == 1 else None


def _right(history: History) -> Tensor:
    return simulated(Setting(history.case, history.case.model(), history.inputs), RIGHT).logits


def _same_gradients(history: History, edit: Callable[..., Tensor], model: Any) -> bool:
    """Return whether a model has the gradients of a run with an edit of each projection's input."""
    other = history.case.model()
    with torch.enable_grad(), ExitStack() as undo:
        for layer in find_heads(other).layers:
            heads = [head for index, head in history.case.heads if index == layer.index]
            first = min(index for index, _ in history.case.heads)
            undo.enter_context(hooked(layer.projection, partial(edit, layer, heads, first), is_output=False))
        other(**history.inputs).logits.sum().backward()
    pairs = [(one.grad, two.grad) for one, two in zip(model.parameters(), other.parameters(), strict=True)]
    size = max(float(two.abs().max()) for _, two in pairs if two is not None)
    return all(
        one is two is None or (one is not None and two is not None and same_logits(one / size, two / size))
        for one, two in ((_zeros(one, two), _zeros(two, one)) for one, two in pairs)
    )


def _zeros(gradient: Tensor | None, other: Tensor | None) -> Tensor | None:
    return torch.zeros_like(other) if gradient is None and other is not None else gradient


def _set_to_zero(layer: Any, heads: list[int], z: Tensor) -> Tensor:
    out = z.clone()
    for head in heads:
        out[..., layer.channels(head)] = 0
    return out


def _through_data(layer: Any, heads: list[int], first: int, z: Tensor) -> Tensor:
    out = z.clone()
    for head in heads:
        out.data[..., layer.channels(head)] = 0
    return out


def _all_detached(layer: Any, heads: list[int], first: int, z: Tensor) -> Tensor:
    out = _set_to_zero(layer, heads, z)
    return out.detach() if layer.index > first else out


DETACHED: tuple[tuple[str, Callable[..., Tensor]], ...] = (
    (
        "z is detached before it is edited, so no gradient reaches the other heads of the layer",
        lambda layer, heads, first, z: _set_to_zero(layer, heads, z.detach()) if heads else z,
    ),
    (
        "z is written behind the back of autograd, for example through `.data`: the ablated head gets a gradient",
        _through_data,
    ),
    ("z is detached in all layers after the first ablated one, also where nothing is ablated", _all_detached),
)

EXPERIMENTS: dict[str, tuple[Experiment, ...]] = {
    "identity": (found_by_next,),
    "identity.padded": (found_by_next,),
    "independence.other_models": (other_models,),
    "independence.threads": (threads,),
    "independence.gradient_mode": (gradient_modes,),
    "independence.cache": (decoded,),
    "independence.cache_padded": (decoded,),
    "positions.cache": (decoded,),
    "gradients.zero": (differentiated,),
    "gradients.checkpointing": (checkpointed,),
}
"""Check -> the experiments that may show why it fails, in this order."""
