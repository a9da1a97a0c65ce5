"""The engine: any list of ablations of one prompt, in one growing batch or one forward pass each."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation import provenance
from ablation.errors import (
    AblationNotApplied,
    InvalidAblation,
    InvalidPrompt,
    NonFiniteLogits,
    UnsupportedModel,
)
from ablation.growing import BatchMismatch, RowLayout, first_layer, growing_batch
from ablation.heads import AttentionLayer, HeadMap, as_index
from ablation.hook import Ablation, HeadAblation, Receipt, verify_called_once
from ablation.measure import LogitSummary, resolve_watched, summarise_logits, tie_tolerance
from ablation.results import RunResult

# Activations of one pass may take this much memory, unless `max_rows` says otherwise. Larger passes are no faster on a
# CPU: a heap that grows beyond some 100 MB is returned to the system and mapped again at every operation.
ROW_BUDGET_BYTES = 2**27

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
    disagree, or if the model's own code fails on the batch, the ablations run one forward pass each, with a warning;
    `provenance["method"]` says which way was taken. An error in this package, an imputation or `progress` propagates.

    token_ids: the prompt, one row without padding. watch: token ids whose probabilities are measured, by convention the
    target and the control; None stands for the most probable token of the clean run that is not watched yet.
    max_rows: the largest number of rows in a forward pass, at least 2; by default as many as fit in ROW_BUDGET_BYTES.
    Further ablations take further passes.

    Raises InvalidPrompt, InvalidHead, InvalidAblation, UnsupportedModel, AblationNotApplied, NonFiniteLogits.
    """
    request = _request(model, token_ids, ablations, watch)
    rows = _rows_per_pass(request, max_rows)
    with torch.no_grad():
        for last_token_only in (True, False):
            try:
                return _run_growing(request, rows, last_token_only, progress)
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
    with torch.no_grad():
        return _run_sequential(_request(model, token_ids, ablations, watch), progress)


# ---- what is asked for


@dataclass(frozen=True)
class _Request:
    """A validated model, prompt and list of ablations."""

    hook: HeadAblation
    model: PreTrainedModel
    token_ids: list[int]
    ablations: list[Ablation]
    watch: list[int | None]

    @property
    def heads(self) -> HeadMap:
        return self.hook.heads


def _request(
    model: PreTrainedModel, token_ids: Sequence[int], ablations: Sequence[Ablation], watch: Sequence[int | None]
) -> _Request:
    """Validate the arguments of a run. Raises UnsupportedModel, InvalidAblation, InvalidHead, InvalidPrompt."""
    hook = HeadAblation(model)
    if any(module.training for module in model.modules()):
        raise InvalidAblation("the model is in training mode, where dropout hides effects: call model.eval()")
    ids = [_token_id(token) for token in token_ids]
    watched = [None if token is None else _token_id(token) for token in watch]
    vocabulary = len(_embedding(model))
    if not ids or not watched:
        raise InvalidPrompt("a run needs at least one prompt token and one watched token")
    if not ablations:
        raise InvalidAblation("the list of ablations is empty")
    if unknown := [token for token in (*ids, *watched) if token is not None and not 0 <= token < vocabulary]:
        raise InvalidPrompt(f"no token {unknown[0]}: the model has {vocabulary} tokens")
    if len(watched) > vocabulary:
        raise InvalidPrompt(f"{len(watched)} tokens cannot be watched: the model has {vocabulary}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and len(ids) > longest:
        raise InvalidPrompt(f"the prompt has {len(ids)} tokens, the model takes at most {longest}")
    return _Request(hook, model, ids, [ablation.validated(hook.heads) for ablation in ablations], watched)


def _token_id(token: Any) -> int:
    try:
        return as_index(token)
    except TypeError:
        raise InvalidPrompt(f"{token!r} is not a token id: a prompt is one flat list of integers") from None


def _embedding(model: PreTrainedModel) -> Tensor:
    """The input embedding, [vocabulary, channels]."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight


def _rows_per_pass(request: _Request, max_rows: int | None) -> int:
    """Rows of a forward pass: `max_rows`, or as many as fit in ROW_BUDGET_BYTES. Raises InvalidAblation."""
    if max_rows is not None:
        if max_rows < 2:
            raise InvalidAblation(f"max_rows is {max_rows}: a pass needs 2 rows, a clean one and an ablated one")
        return max_rows
    tokens = len(request.token_ids)
    shapes = [p.shape for layer in request.heads.layers for p in layer.block.parameters() if p.ndim > 1]
    widest = 4 * max((max(shape) for shape in shapes), default=1)
    scores = request.heads.shape[1] * tokens
    logits = len(_embedding(request.model)) * (1 if _keeps_last_logits(request.model) else tokens)
    row_bytes = (tokens * (widest + scores) + logits) * request.model.dtype.itemsize
    return max(2, ROW_BUDGET_BYTES // row_bytes)


# ---- forward passes


def _keeps_last_logits(model: PreTrainedModel) -> bool:
    """Whether the model can be asked for the logits of the last token alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _last_logits(request: _Request, rows: int) -> Tensor:
    """Run the model on that many rows of the prompt. Returns the logits of the last token, [rows, vocabulary]."""
    embedding = _embedding(request.model)
    # An embedding on the meta device is loaded from elsewhere by accelerate, which also moves its input there.
    device = "cpu" if embedding.is_meta else embedding.device
    ids = torch.tensor([request.token_ids] * rows, device=device)
    kept: dict[str, Any] = {"logits_to_keep": 1} if _keeps_last_logits(request.model) else {}
    logits: Tensor = request.model(ids, use_cache=False, **kept).logits
    return logits[:, -1]


def _batch_logits(request: _Request, rows: int) -> Tensor:
    """`_last_logits`, where a failure of the model's own code raises BatchMismatch."""
    try:
        return _last_logits(request, rows)
    except Exception as error:
        if _raised_by_package(error):
            raise
        raise BatchMismatch(f"{type(error).__name__}: {error}".splitlines()[0]) from error


PACKAGE = f"{Path(__file__).parent}{os.sep}"


def _raised_by_package(error: BaseException | None) -> bool:
    """Whether an error passed through one of this package's hooks on its way from the model's forward."""
    while error is not None:
        if any(code is not _last_logits.__code__ and code is not _batch_logits.__code__ for code in _own_code(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _own_code(error: BaseException) -> Iterator[Any]:
    """The code of this package in the traceback of an error."""
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_filename.startswith(PACKAGE):
            yield code
        traceback = traceback.tb_next


@dataclass(frozen=True)
class _CleanRun:
    """The clean run, and what an ablated run is compared with.

    logits: of the last token, [vocabulary]. head_mean: [L, H], see `RunResult`. watched: token ids, [W], on the device
    of the logits. tolerance: see `tie_tolerance`. summary: of one row.
    """

    logits: Tensor
    head_mean: NDArray[np.float64]
    watched: Tensor
    tolerance: float
    summary: LogitSummary


def _clean_run(request: _Request, logits: Tensor, head_mean: NDArray[np.float64]) -> _CleanRun:
    """Measure the clean run. Raises NonFiniteLogits."""
    if not logits.isfinite().all():
        raise NonFiniteLogits("the model's clean logits are not finite")
    tolerance = tie_tolerance(logits)
    watched = torch.tensor(resolve_watched(request.watch, logits, tolerance), device=logits.device)
    return _CleanRun(logits, head_mean, watched, tolerance, summarise_logits(logits[None], watched, tolerance))


def _run_plain(request: _Request, probes: Sequence[Ablation]) -> tuple[_CleanRun, Tensor]:
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
        logits = _batch_logits(request, layout.num_rows) if probes else _last_logits(request, 1)
        for layer in request.heads.layers:
            verify_called_once(layer, hook.receipt)
    return _clean_run(request, logits[layout.clean_row], head_mean), logits[layout.ablated_rows]


def _run_sequential(request: _Request, progress: Progress | None, **how: Any) -> RunResult:
    """Run one forward pass for each ablation."""
    clean, _ = _run_plain(request, [])
    outcomes = []
    with request.hook as hook:
        for done, ablation in enumerate(request.ablations, start=1):
            layout = RowLayout.single(ablation)
            hook.edits = layout.edits
            logits = _last_logits(request, layout.num_rows)
            outcomes.append(_measure(request, clean, layout, logits, hook.receipt))
            if progress is not None:
                progress(done / len(request.ablations))
    return _result(request, clean, outcomes, method="sequential", **how)


def _run_growing(request: _Request, max_rows: int, last_token_only: bool, progress: Progress | None) -> RunResult:
    """Run all ablations in as few growing batches as `max_rows` allows. Raises BatchMismatch."""
    order = sorted(range(len(request.ablations)), key=lambda index: first_layer(request.ablations[index]))
    ablations = [request.ablations[index] for index in order]
    # Of each layer the last ablation, since some models mix up only the rows of a middle layer (HY-V4).
    probes = list({first_layer(ablation): ablation for ablation in ablations}.values())
    probes.reverse()  # so that a probe's row differs from its row in the growing batch
    clean, ordinary = _run_probes(request, probes, max_rows)
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
                logits = _batch_logits(request, 1)
            _check_agreement(logits[layout.clean_row], clean.logits)
            ablated = logits[layout.ablated_rows]
            for ablation, row in zip(chunk, ablated, strict=True):
                if ablation in ordinary:
                    _check_agreement(row, ordinary[ablation])
            outcomes.append(_measure(request, clean, layout, ablated, hook.receipt))
    return _result(request, clean, outcomes, order, method="growing batch", passes=len(passes))


def _run_probes(
    request: _Request, probes: Sequence[Ablation], max_rows: int
) -> tuple[_CleanRun, dict[Ablation, Tensor]]:
    """Run the clean run and some ablations in plain batches. Returns the clean run, and the logits of each probe."""
    found: dict[Ablation, Tensor] = {}
    for chunk in _chunks(probes, max_rows - 1):
        clean, logits = _run_plain(request, chunk)
        found |= zip(chunk, logits, strict=True)
    return clean, found


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


def _measure(request: _Request, clean: _CleanRun, layout: RowLayout, logits: Tensor, receipt: Receipt) -> _Outcomes:
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
    request: _Request, clean: _CleanRun, outcomes: Sequence[_Outcomes], order: Sequence[int] = (), **how: Any
) -> RunResult:
    """Join the outcomes of all batches. order: the index of each outcome's ablation in the request, if they differ."""
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
