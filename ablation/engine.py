"""The engine: runs any list of ablations on one prompt, in one growing batch or in one forward pass each."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation import provenance
from ablation.causality import verify_causal_lm
from ablation.edits import Ablation, Receipt, verify_called_once, verify_shape
from ablation.errors import NonFiniteLogits
from ablation.forward import Request, batch_logits, last_logits, rows_per_pass, validated_request
from ablation.growing import BatchMismatch, RowLayout, first_layer, growing_batch
from ablation.guard import Guard, choose_probes, coupled_rows
from ablation.heads import AttentionLayer
from ablation.measure import LogitSummary, float64, resolve_watched, summarise_logits, tie_tolerance
from ablation.memory import is_out_of_memory, release
from ablation.module_hooks import register
from ablation.results import RunResult

T = TypeVar("T")
Progress = Callable[[float], None]
"""A callback that receives the share of the work that is done, in (0, 1]."""


def run(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    ablations: Sequence[Ablation],
    watch: Sequence[int | None] = (None, None),
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Run every ablation of a list on one prompt, in growing batches. Nothing is approximated.

    A growing batch is a forward pass that starts with one row, the clean row. Before each layer, a copy of the clean
    row joins the batch for every ablation whose first head is in that layer; `HeadAblation` then edits the heads of
    each row. Layers before an ablation's first head are thus computed once per batch, for the clean row. After the
    attention of the last layer, only the last token is computed, unless that layer has no heads.

    A guard also computes the clean row and some of the ablations in ordinary forward passes: at least one ablation
    for each layer in which an ablation begins. The growing batch fails if its logits differ by more than the model's
    own rounding (see `ablation.guard`), or if the model's own code fails. `run` then tries a growing batch that
    computes all tokens in the last layer. If this one fails, too, each ablation runs in its own forward pass, and `run`
    warns. Growing batches are not tried if the model's own code fails in the guard, or if the rows of a batch are known
    to influence each other in this model. `provenance["method"]` says whether the result is from growing batches.

    Errors that are raised in this package, in an imputation or in `progress` propagate.

    token_ids: the prompt, one row without padding. watch: token ids whose probabilities are measured, by convention the
    target and the control; None stands for the most probable token of the clean run that is not watched yet.
    max_rows: the largest number of rows in a forward pass, at least 2; by default as many as fit in memory.
    Ablations that do not fit run in further passes. progress: called with the share of the work that is done, up to 1.

    Raises InvalidPrompt, InvalidHead, InvalidAblation, UnsupportedModel, AblationNotApplied, NonFiniteLogits.
    """
    request = validated_request(model, token_ids, ablations, watch)
    rows, progress = rows_per_pass(request, max_rows), _never_back(progress)
    verify_causal_lm(request, rows)
    with torch.no_grad():
        reason = coupled_rows(model)
        if reason is None:
            try:
                return _run_guarded(request, rows, progress)
            except BatchMismatch as error:
                reason = str(error)
        warnings.warn(
            f"the growing batch does not suit {type(model).__name__} ({reason}): running one forward per ablation",
            stacklevel=2,
        )
        return _run_sequential(request, progress, reason=reason)


def run_sequential(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    ablations: Sequence[Ablation],
    watch: Sequence[int | None] = (None, None),
    *,
    progress: Progress | None = None,
) -> RunResult:
    """Reference implementation of `run`: one forward pass for each ablation."""
    request = validated_request(model, token_ids, ablations, watch)
    verify_causal_lm(request)
    with torch.no_grad():
        return _run_sequential(request, progress)


def _never_back(progress: Progress | None) -> Progress | None:
    """Return the same report, without shares below one that was reported: a second way starts again."""
    if progress is None:
        return None
    largest = 0.0

    def report(share: float) -> None:
        nonlocal largest
        if share > largest:
            largest = share
            progress(share)

    return report


# ---- forward passes


@dataclass(frozen=True)
class _CleanRun:
    """The measures of the clean run, with which an ablated run is compared.

    logits: of the last token, [vocabulary]. head_mean: [L, H], see `RunResult`. watched: token ids, [W]. tolerance: see
    `tie_tolerance`. summary: of one row.
    """

    logits: Tensor
    head_mean: NDArray[np.float64]
    watched: Tensor
    tolerance: float
    summary: LogitSummary


def _measure_clean(request: Request, logits: Tensor, head_mean: NDArray[np.float64]) -> _CleanRun:
    """Measure the clean run. Raises NonFiniteLogits."""
    if not logits.isfinite().all():
        raise NonFiniteLogits("the model's clean logits are not finite")
    tolerance = tie_tolerance(logits)
    watched = torch.tensor(resolve_watched(request.watch, logits, tolerance), device=logits.device)
    return _CleanRun(logits, head_mean, watched, tolerance, summarise_logits(logits[None], watched, tolerance))


class _PlainRun(NamedTuple):
    """Logits of the last token, and head means, [L, H], of the clean run: see `RunResult`."""

    clean: Tensor
    """[vocabulary]"""
    ablated: Tensor
    """[ablations, vocabulary]"""
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


def _run_sequential(request: Request, progress: Progress | None, **how: Any) -> RunResult:
    """Run one forward pass for each ablation."""
    plain = _run_plain(request, [])
    clean = _measure_clean(request, plain.clean, plain.head_mean)
    outcomes = []
    with request.hook as hook:
        for done, ablation in enumerate(request.ablations, start=1):
            layout = RowLayout.single(ablation)
            hook.set_edits(layout.edits)
            logits = last_logits(request, layout.num_rows)
            outcomes.append(_measure(request, clean, layout, logits, hook.receipt))
            if progress is not None:
                progress(done / len(request.ablations))
    return _result(request, clean, outcomes, method="sequential", **how)


def _run_probes(request: Request, max_rows: int) -> tuple[_CleanRun, Guard]:
    """Run the clean run, and some ablations, in plain batches. Raises BatchMismatch and NonFiniteLogits."""
    probes: list[Tensor] = []

    def run_pass(chunk: Sequence[Ablation]) -> _PlainRun:
        plain = _run_plain(request, chunk)
        probes.extend(plain.ablated)
        return plain

    chosen = choose_probes(request.model, request.ablations)
    (*_, plain) = _in_passes(chosen, max_rows, run_pass)
    clean = _measure_clean(request, plain.clean, plain.head_mean)
    return clean, Guard(request, clean.logits, dict(zip(chosen, probes, strict=True)), max_rows)


def _run_guarded(request: Request, max_rows: int, progress: Progress | None) -> RunResult:
    """Run all ablations in growing batches, with all tokens in the last layer if need be. Raises BatchMismatch."""
    clean, guard = _run_probes(request, max_rows)
    with suppress(BatchMismatch):
        return _run_growing(request, max_rows, clean, guard, True, progress)
    return _run_growing(request, max_rows, clean, guard, False, progress)


def _run_growing(
    request: Request, max_rows: int, clean: _CleanRun, guard: Guard, last_token_only: bool, progress: Progress | None
) -> RunResult:
    """Run all ablations in as few growing batches as `max_rows` allows. Raises BatchMismatch."""
    order = sorted(range(len(request.ablations)), key=lambda index: first_layer(request.ablations[index]))
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
        guard.check(logits[layout.clean_row], chunk, ablated)
        outcomes = _measure(request, clean, layout, ablated, receipt)
        done += len(chunk)
        return outcomes

    outcomes = list(_in_passes(ablations, max_rows, run_pass))
    return _result(request, clean, outcomes, order, method="growing batch", passes=len(outcomes))


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
    """The measures of the ablations of one batch, as arrays. The first four are those of `LogitSummary`."""

    probability: NDArray[np.float64]
    log_probability: NDArray[np.float64]
    argmax: NDArray[np.int64]
    margin: NDArray[np.float64]
    receipts: NDArray[np.int64]
    """[A, 3], see `RowLayout.receipts`."""


def _measure(request: Request, clean: _CleanRun, layout: RowLayout, logits: Tensor, receipt: Receipt) -> _Outcomes:
    """Measure the ablated rows of a batch, [A, vocabulary]. Raises NonFiniteLogits."""
    summary = summarise_logits(logits, clean.watched, clean.tolerance)
    probability, log_probability, argmax, margin, finite = (part.cpu().numpy() for part in summary)
    if not finite.all():
        raise NonFiniteLogits(f"the logits are not finite with {layout.ablations[int(finite.argmin())]}")
    return _Outcomes(probability, log_probability, argmax, margin, layout.receipts(receipt))


def _result(
    request: Request, clean: _CleanRun, outcomes: Sequence[_Outcomes], order: Sequence[int] = (), **how: Any
) -> RunResult:
    """Join the outcomes of all batches. order: the request's index of each outcome, if the orders differ."""
    probability, log_probability, argmax, margin, receipts = (
        np.concatenate(parts)[np.argsort(order) if order else slice(None)] for parts in zip(*outcomes, strict=True)
    )
    before = clean.summary
    return RunResult(
        ablations=tuple(request.ablations),
        watched=clean.watched.cpu().numpy(),
        clean_probability=before.probability[0].cpu().numpy(),
        clean_log_probability=before.log_probability[0].cpu().numpy(),
        clean_argmax=int(before.argmax),
        clean_margin=float(before.margin),
        probability_change=(probability - before.probability.cpu().numpy()).T,
        log_probability_change=(log_probability - before.log_probability.cpu().numpy()).T,
        argmax=argmax,
        margin=margin,
        head_mean=clean.head_mean,
        calls=receipts[:, 0],
        replaced=receipts[:, 1],
        changed=receipts[:, 2],
        provenance={
            "token_ids": request.token_ids,
            **how,
            **provenance.of_model(request.model),
            **provenance.environment(),
        },
    )
