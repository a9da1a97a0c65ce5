"""The engine: any list of ablations of one prompt, in one growing batch or one forward pass each."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation import provenance
from ablation.causality import verify_causal_lm
from ablation.errors import AblationNotApplied, NonFiniteLogits, UnsupportedModel
from ablation.forward import Request, batch_logits, last_logits, rows_per_pass, validated_request
from ablation.growing import BatchMismatch, RowLayout, first_layer, growing_batch
from ablation.heads import AttentionLayer
from ablation.hook import Ablation, Receipt, verify_called_once
from ablation.measure import LogitSummary, resolve_watched, summarise_logits, tie_tolerance
from ablation.results import RunResult

Progress = Callable[[float], None]
"""Receives the share of the work that is done, in (0, 1]."""


def run(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    ablations: Sequence[Ablation],
    watch: Sequence[int | None] = (None, None),
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Run every ablation of a list on one prompt, in one growing batch. Nothing is approximated.

    Before a layer, a copy of the clean row joins the batch for each ablation whose first head is in that layer;
    `HeadAblation` then edits each row's heads. Everything that an ablation shares with the clean run is computed once,
    and after the attention of the last layer only the last token is computed.

    The clean row, and one row for each layer, are compared with an ordinary forward pass of a plain batch. If they
    disagree, or if the model's own code fails on the batch, the batch runs again with all tokens in the last layer; and
    if that fails, too, the ablations run one forward pass each, with a warning. `provenance["method"]` says which way
    was taken. An error in this package, an imputation or `progress` propagates.

    token_ids: the prompt, one row without padding. watch: token ids whose probabilities are measured, by convention the
    target and the control; None stands for the most probable token of the clean run that is not watched yet.
    max_rows: the largest number of rows in a forward pass, at least 2; by default as many as fit in ROW_BUDGET_BYTES.
    Further ablations take further passes.

    Raises InvalidPrompt, InvalidHead, InvalidAblation, UnsupportedModel, AblationNotApplied, NonFiniteLogits.
    """
    request = validated_request(model, token_ids, ablations, watch)
    rows = rows_per_pass(request, max_rows)
    verify_causal_lm(request, rows)
    with torch.no_grad():
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


# ---- forward passes


@dataclass(frozen=True)
class _CleanRun:
    """The clean run, and what an ablated run is compared with.

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


def _run_plain(request: Request, probes: Sequence[Ablation]) -> tuple[_CleanRun, Tensor]:
    """Run a plain batch: the clean run, and some ablations. Returns the clean run, and logits [probes, vocabulary].

    Raises BatchMismatch, AblationNotApplied, NonFiniteLogits, and UnsupportedModel if a projection does not receive
    every head's z.
    """
    layout = RowLayout.plain(probes)
    head_mean = np.full(request.heads.shape, np.nan)

    def look(layer: AttentionLayer, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (z, *_) = args or kwargs.values()
        rows, tokens, channels = layout.num_rows, len(request.token_ids), layer.num_heads * layer.head_dim
        if z.shape != (rows, tokens, channels):
            raise UnsupportedModel(
                f"{layer.projection_name} received {tuple(z.shape)}, not [{rows} rows, {tokens} tokens, "
                f"{channels} channels]"
            )
        per_head = z[layout.clean_row].cpu().double().unflatten(-1, (layer.num_heads, layer.head_dim))
        head_mean[layer.index, : layer.num_heads] = per_head.mean(dim=(0, 2)).numpy()

    with request.hook as hook, ExitStack() as hooks:
        hook.edits = layout.edits
        for layer in request.heads.layers:
            handle = layer.projection.register_forward_pre_hook(partial(look, layer), with_kwargs=True)
            hooks.callback(handle.remove)
        logits = batch_logits(request, layout.num_rows) if probes else last_logits(request, 1)
        for layer in request.heads.layers:
            verify_called_once(layer, hook.receipt)
    return _measure_clean(request, logits[layout.clean_row], head_mean), logits[layout.ablated_rows]


def _run_sequential(request: Request, progress: Progress | None, **how: Any) -> RunResult:
    """Run one forward pass for each ablation."""
    clean, _ = _run_plain(request, [])
    outcomes = []
    with request.hook as hook:
        for done, ablation in enumerate(request.ablations, start=1):
            layout = RowLayout.single(ablation)
            hook.edits = layout.edits
            logits = last_logits(request, layout.num_rows)
            outcomes.append(_measure(request, clean, layout, logits, hook.receipt))
            if progress is not None:
                progress(done / len(request.ablations))
    return _result(request, clean, outcomes, method="sequential", **how)


class _OrdinaryRun(NamedTuple):
    """What growing batches are compared with: the clean run, and the logits [vocabulary] of one ablation per layer."""

    clean: _CleanRun
    probes: dict[Ablation, Tensor]


def _run_probes(request: Request, max_rows: int) -> _OrdinaryRun:
    """Run the clean run, and one ablation of each first layer, in plain batches. Raises BatchMismatch."""
    # Of each layer the last ablation, since some models mix up only the rows of a middle layer (HY-V4).
    last = {first_layer(ablation): ablation for ablation in request.ablations}
    # From the last layer to the first, so that a probe's row differs from its row in the growing batch.
    probes = [last[layer] for layer in sorted(last, reverse=True)]
    found: dict[Ablation, Tensor] = {}
    for chunk in _chunks(probes, max_rows - 1):
        clean, logits = _run_plain(request, chunk)
        found |= zip(chunk, logits, strict=True)
    return _OrdinaryRun(clean, found)


def _run_guarded(request: Request, max_rows: int, progress: Progress | None) -> RunResult:
    """Run all ablations in growing batches, with all tokens in the last layer if need be. Raises BatchMismatch."""
    ordinary = _run_probes(request, max_rows)
    with suppress(BatchMismatch):
        return _run_growing(request, max_rows, ordinary, True, progress)
    return _run_growing(request, max_rows, ordinary, False, progress)


def _run_growing(
    request: Request, max_rows: int, ordinary: _OrdinaryRun, last_token_only: bool, progress: Progress | None
) -> RunResult:
    """Run all ablations in as few growing batches as `max_rows` allows. Raises BatchMismatch."""
    order = sorted(range(len(request.ablations)), key=lambda index: first_layer(request.ablations[index]))
    ablations = [request.ablations[index] for index in order]
    clean = ordinary.clean
    passes = _chunks(ablations, max_rows - 1)
    steps, done = len(passes) * len(request.heads.layers), itertools.count(1)

    def on_layer() -> None:
        if progress is not None:
            progress(next(done) / steps)

    outcomes = []
    with request.hook as hook:
        for chunk in passes:
            layout = RowLayout.growing(chunk)
            hook.edits = layout.edits
            with growing_batch(request.heads, layout, last_token_only=last_token_only, on_layer=on_layer):
                logits = batch_logits(request, 1)
            _check_agreement(logits[layout.clean_row], clean.logits)
            ablated = logits[layout.ablated_rows]
            for ablation, row in zip(chunk, ablated, strict=True):
                if ablation in ordinary.probes:
                    _check_agreement(row, ordinary.probes[ablation])
            outcomes.append(_measure(request, clean, layout, ablated, hook.receipt))
    return _result(request, clean, outcomes, order, method="growing batch", passes=len(passes))


def _chunks(ablations: Sequence[Ablation], largest: int) -> list[Sequence[Ablation]]:
    """Split a list into as few parts as possible, none larger than `largest`, all but the last of one size."""
    size = math.ceil(len(ablations) / math.ceil(len(ablations) / largest))
    return [ablations[start : start + size] for start in range(0, len(ablations), size)]


def _check_agreement(batched: Tensor, ordinary: Tensor) -> None:
    """Raise BatchMismatch unless two rows of logits, [vocabulary], agree up to rounding."""
    difference = (batched - ordinary).abs().max()
    # The spread of the logits as their median absolute deviation, which neither an offset of all logits nor masked
    # tokens change.
    spread = (ordinary - ordinary.median()).abs().median()
    # Tolerance: half of the mantissa digits. Rounding is far smaller, leakage between rows far larger.
    if not difference <= torch.finfo(ordinary.dtype).eps ** 0.5 * 4 * spread:
        raise BatchMismatch(f"a row differs from the same row of an ordinary forward by {difference:.2g}")


# ---- what is measured


class _Outcomes(NamedTuple):
    """What the ablations of one batch did, on the host. The first four as in `LogitSummary`, [A, W] and [A]."""

    probability: NDArray[np.float64]
    log_probability: NDArray[np.float64]
    argmax: NDArray[np.int64]
    margin: NDArray[np.float64]
    receipts: NDArray[np.int64]
    """[A, 3], see `RowLayout.receipts`."""


def _measure(request: Request, clean: _CleanRun, layout: RowLayout, logits: Tensor, receipt: Receipt) -> _Outcomes:
    """Measure the ablated rows of a batch, [A, vocabulary]. Raises NonFiniteLogits and AblationNotApplied."""
    summary = summarise_logits(logits, clean.watched, clean.tolerance)
    probability, log_probability, argmax, margin, finite = (part.cpu().numpy() for part in summary)
    if not finite.all():
        raise NonFiniteLogits(f"the logits are not finite with {layout.ablations[int(finite.argmin())]}")
    receipts = layout.receipts(receipt)
    for ablation, (calls, replaced, _) in zip(layout.ablations, receipts, strict=True):
        elements = len(request.token_ids) * sum(request.heads.layer(layer).head_dim for layer, _ in ablation.heads)
        if calls != 1 or replaced != elements:
            raise AblationNotApplied(f"{ablation}: {calls} calls, {replaced} of {elements} elements replaced")
    return _Outcomes(probability, log_probability, argmax, margin, receipts)


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
