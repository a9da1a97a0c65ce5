"""Forward passes: the ablations of one request in growing batches, or in one forward pass each."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ablation.edits import Ablation, Receipt, verify_called_once, verify_shape
from ablation.errors import NonFiniteLogits
from ablation.forward import Request, batch_logits, last_logits
from ablation.growing import BatchMismatch, RowLayout, growing_batch, steps
from ablation.guard import Guard, choose_probes, coupled_rows
from ablation.heads import AttentionLayer
from ablation.measure import Measure, float64
from ablation.memory import is_out_of_memory, release
from ablation.module_hooks import register

T = TypeVar("T")
Progress = Callable[[float], None]
"""A callback that receives the share of the work that is done, in (0, 1]."""
Values = dict[str, NDArray[Any]]
"""{name: [rows]}"""
Measuring = Callable[[Tensor], Measure]
"""Chooses what is measured, given the clean logits, [scored, vocabulary]."""


class Run(NamedTuple):
    """What was measured in the runs of a prompt, or of a prompt with a continuation.

    measure: what measured it. clean: of one row. ablated: of a row for each ablation. head_mean: [L, H]. receipts: see
    `RowLayout.receipts`. how: the method, for the provenance.
    """

    measure: Measure
    clean: Values
    ablated: Values
    head_mean: NDArray[np.float64]
    receipts: NDArray[np.int64]
    how: dict[str, Any]


class _CleanRun(NamedTuple):
    """The clean run, with which an ablated run is compared.

    logits: of the last tokens, [scored, vocabulary]. head_mean: [L, H], see `Result`. measure: measures the ablated
    runs, too. values: what it measures in the clean run.
    """

    logits: Tensor
    head_mean: NDArray[np.float64]
    measure: Measure
    values: Values


def _measure_clean(logits: Tensor, head_mean: NDArray[np.float64], measuring: Measuring) -> _CleanRun:
    """Measure the clean run. Raises NonFiniteLogits."""
    if not logits.isfinite().all():
        raise NonFiniteLogits("the model's clean logits are not finite")
    measure = measuring(logits)
    return _CleanRun(logits, head_mean, measure, _on_host(measure(logits[None])))


def _on_host(values: Mapping[str, Tensor]) -> Values:
    """Return measured values as arrays."""
    return {name: part.cpu().numpy() for name, part in values.items()}


class _PlainRun(NamedTuple):
    """Logits of the last tokens, and head means, [L, H], of the clean run: see `Result`."""

    clean: Tensor
    """[scored, vocabulary]"""
    ablated: Tensor
    """[ablations, scored, vocabulary]"""
    head_mean: NDArray[np.float64]


def _run_plain(request: Request, probes: Sequence[Ablation]) -> _PlainRun:
    """Run the clean row and some ablations in a plain batch, which has all its rows from the start.

    Raises BatchMismatch, AblationNotApplied, and UnsupportedModel if a projection does not receive every head's z.
    """
    layout = RowLayout.plain(probes)
    means: dict[AttentionLayer, Tensor] = {}

    def look(layer: AttentionLayer, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (z, *_) = args or kwargs.values()
        verify_shape(layer, z, layout.num_rows, len(request.token_ids))
        per_head = float64(z[layout.clean_row]).unflatten(-1, (layer.num_heads, layer.head_dim))
        means[layer] = per_head.mean(dim=(0, 2))  # on the device: nothing waits for it before the end

    with request.hook as hook, ExitStack() as hooks:
        hook.set_edits(layout.edits)
        for layer in request.heads.layers:
            hooks.callback(register(layer.projection, partial(look, layer), owner=hook))
        logits = batch_logits(request, layout.num_rows) if probes else last_logits(request, 1)
        for layer in request.heads.layers:
            verify_called_once(layer, hook.receipt)
    head_mean = np.full(request.heads.shape, np.nan)
    for layer, mean in means.items():
        head_mean[layer.index, : layer.num_heads] = mean.cpu().numpy()
    return _PlainRun(logits[layout.clean_row], logits[layout.ablated_rows], head_mean)


def run_batched(request: Request, measuring: Measuring, progress: Progress | None, *, max_rows: int) -> Run:
    """Run all ablations in growing batches, or, if these do not suit the model, in one forward pass each."""
    reason = coupled_rows(request.model)
    if reason is None:
        try:
            return _run_guarded(request, measuring, max_rows, progress)
        except BatchMismatch as error:
            reason = str(error)
    warnings.warn(
        f"the growing batch does not suit {type(request.model).__name__} ({reason}): running one forward per ablation",
        stacklevel=4,
    )
    return run_one_by_one(request, measuring, progress, reason=reason)


def run_one_by_one(request: Request, measuring: Measuring, progress: Progress | None, **how: Any) -> Run:
    """Run one forward pass for each ablation."""
    plain = _run_plain(request, [])
    clean = _measure_clean(plain.clean, plain.head_mean, measuring)
    outcomes = []
    with request.hook as hook:
        for done, ablation in enumerate(request.ablations, start=1):
            layout = RowLayout.single(ablation)
            hook.set_edits(layout.edits)
            logits = last_logits(request, layout.num_rows)
            outcomes.append(_measure(clean, layout, logits, hook.receipt))
            if progress is not None:
                progress(done / len(request.ablations))
    return _joined(clean, outcomes, range(len(outcomes)), **{"method": "sequential", **how})


def _run_probes(request: Request, measuring: Measuring, max_rows: int) -> tuple[_CleanRun, Guard]:
    """Run the clean run, and some ablations, in plain batches. Raises BatchMismatch and NonFiniteLogits."""
    probes: list[Tensor] = []

    def run_pass(chunk: Sequence[Ablation]) -> _PlainRun:
        plain = _run_plain(request, chunk)
        probes.extend(plain.ablated)
        return plain

    chosen = choose_probes(request.model, request.ablations)
    (*_, plain) = _in_passes(chosen, max_rows, run_pass)
    clean = _measure_clean(plain.clean, plain.head_mean, measuring)
    return clean, Guard(request, clean.logits, dict(zip(chosen, probes, strict=True)), max_rows)


def _run_guarded(request: Request, measuring: Measuring, max_rows: int, progress: Progress | None) -> Run:
    """Run all ablations in growing batches, with all tokens in the last layer if need be. Raises BatchMismatch."""
    clean, guard = _run_probes(request, measuring, max_rows)
    if request.scored == 1:
        with suppress(BatchMismatch):
            return _run_growing(request, max_rows, clean, guard, True, progress)
    return _run_growing(request, max_rows, clean, guard, False, progress)


def _run_growing(
    request: Request, max_rows: int, clean: _CleanRun, guard: Guard, last_token_only: bool, progress: Progress | None
) -> Run:
    """Run all ablations in as few growing batches as `max_rows` allows. Raises BatchMismatch."""
    order = sorted(range(len(request.ablations)), key=lambda index: steps(request.ablations[index]))
    ablations = [request.ablations[index] for index in order]
    done = 0

    def run_pass(chunk: Sequence[Ablation]) -> _Outcomes:
        nonlocal done
        begun = itertools.count(1)

        def on_layer() -> None:
            if progress is not None:
                progress((done + len(chunk) * next(begun) / len(request.heads.layers)) / len(ablations))

        layout = RowLayout.growing(chunk)
        with request.hook as hook:
            hook.set_edits(layout.edits)
            with growing_batch(hook, layout, last_token_only=last_token_only, on_layer=on_layer):
                logits = batch_logits(request, 1)
            receipt = hook.receipt
        ablated = logits[layout.ablated_rows]
        guard.check(logits[layout.clean_row], layout.ablations, ablated)
        outcomes = _measure(clean, layout, ablated, receipt)
        done += len(chunk)
        return outcomes

    outcomes = list(_in_passes(ablations, max_rows, run_pass))
    return _joined(clean, outcomes, order, method="growing batch", passes=len(outcomes))


def _in_passes(
    ablations: Sequence[Ablation], max_rows: int, run_pass: Callable[[Sequence[Ablation]], T]
) -> Iterator[T]:
    """Run ablations in passes of at most `max_rows` rows, in their order; a pass that runs out of memory is halved."""
    waiting = _chunks(ablations, max_rows - 1)
    while waiting:
        chunk, found = waiting[0], None
        try:
            found = run_pass(chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(chunk) == 1:
                raise
        if found is not None:
            yield found
            waiting = waiting[1:]
        else:
            release()  # outside of `except`, where the error holds what the pass has allocated
            waiting = _chunks([ablation for part in waiting for ablation in part], math.ceil(len(chunk) / 2))


def _chunks(ablations: Sequence[Ablation], largest: int) -> list[Sequence[Ablation]]:
    """Split a list into as few parts as possible, none larger than `largest`, all but the last of one size."""
    size = math.ceil(len(ablations) / math.ceil(len(ablations) / largest))
    return [ablations[start : start + size] for start in range(0, len(ablations), size)]


# ---- what is measured


class _Outcomes(NamedTuple):
    """What was measured of the ablations of one batch.

    values: of a row for each ablation, in the order of the list that the layout was made from. receipts: [A, 3], see
    `RowLayout.receipts`.
    """

    values: Values
    receipts: NDArray[np.int64]


def _measure(clean: _CleanRun, layout: RowLayout, logits: Tensor, receipt: Receipt) -> _Outcomes:
    """Measure the ablated rows of a batch, [A, scored, vocabulary]. Raises NonFiniteLogits."""
    values = _on_host(clean.measure(logits))
    finite = values["finite"]
    if not finite.all():
        raise NonFiniteLogits(f"the logits are not finite with {layout.ablations[int(finite.argmin())]}")
    back = np.argsort(layout.order)
    return _Outcomes({name: of[back] for name, of in values.items()}, layout.receipts(receipt)[back])


def _joined(clean: _CleanRun, outcomes: Sequence[_Outcomes], order: Sequence[int], **how: Any) -> Run:
    """Join the outcomes of all batches. order: the request's index of each outcome."""
    back = np.argsort(order)
    ablated = {name: np.concatenate([part.values[name] for part in outcomes])[back] for name in outcomes[0].values}
    receipts = np.concatenate([part.receipts for part in outcomes])[back]
    return Run(clean.measure, clean.values, ablated, clean.head_mean, receipts, how)
