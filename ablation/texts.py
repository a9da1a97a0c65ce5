"""The loss on a text: what each head does to the prediction of every token."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ablation.engine import score
from ablation.errors import InvalidPrompt, UnsupportedModel
from ablation.imputation import DEFAULT_IMPUTATIONS, Imputation
from ablation.models import LoadedModel
from ablation.passes import Progress
from ablation.prompts import prompt_ids
from ablation.results import Result
from ablation.study import Task, origin, run_tasks, settings_of
from ablation.sweeps import as_imputations, one_head_ablations

LARGEST_STRIDE = 128
"""Tokens that each window scores by default, unless this is more than half of the model's longest input."""


class Window(NamedTuple):
    """A part of a text. token_ids: the context and the scored tokens. scored: how many last tokens are scored."""

    token_ids: tuple[int, ...]
    scored: int


def windows(token_ids: Sequence[int], stride: int) -> list[Window]:
    """Split a text into windows that score `stride` tokens each, after a context of at most `stride` tokens.

    Each token but the first is scored once, except for a rest of fewer than `stride` tokens at the end, which is left
    out. A text of fewer tokens is one window. Raises InvalidPrompt for a text of one token.
    """
    ids, tokens = tuple(token_ids), len(token_ids)
    if tokens < 2:
        raise InvalidPrompt("a text needs at least two tokens: the first is not scored")
    if tokens <= stride:
        return [Window(ids, tokens - 1)]
    starts = range(1, tokens - stride + 1, stride)
    return [Window(ids[max(0, start - stride) : start + stride], stride) for start in starts]


def sweep_text(
    loaded: LoadedModel,
    text: str,
    stride: int | None = None,
    imputations: Sequence[str | Imputation] = DEFAULT_IMPUTATIONS,
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    overwrite: bool = False,
) -> Result:
    """Measure the mean next-token loss on a text, in nats per token, clean and with each head ablated.

    The text is read in windows, see `windows`; the prompts of the result are the windows, and its only metric is
    `loss`. stride: by default `LARGEST_STRIDE`. An imputation that takes a mean over the tokens takes it over the
    tokens of a window. The other arguments are those of `ablation.sweep_prompts`. Raises the errors of `sweep`, and
    InvalidPrompt for a text that is unusable or a stride that does not fit the model.
    """
    if not isinstance(loaded, LoadedModel):
        raise UnsupportedModel(f"a {type(loaded).__name__} has no tokenizer: pass what `ablation.load` returns")
    stride = _checked_stride(loaded, stride)
    try:
        ids = prompt_ids(loaded.tokenizer, text)
    except InvalidPrompt as error:
        raise InvalidPrompt(f"the text cannot be used as a prompt: {error}") from None
    parts = windows(ids, stride)
    chosen, known = as_imputations(imputations), origin(loaded)
    settings = {
        **settings_of(loaded),
        "text_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "stride": stride,
        "imputations": [imputation.name for imputation in chosen],
        "max_rows": max_rows,
    }
    arguments = {"ablations": one_head_ablations(loaded.model, chosen), "max_rows": max_rows}
    tasks: list[Task] = [partial(_score, loaded, window, known, arguments) for window in parts]
    return run_tasks(tasks, settings, checkpoint, overwrite=overwrite, progress=progress)


def _checked_stride(loaded: LoadedModel, stride: int | None) -> int:
    """Return the stride, or the default one. Raises InvalidPrompt if it does not fit the model."""
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if stride is None:
        return LARGEST_STRIDE if longest is None else min(LARGEST_STRIDE, longest // 2)
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
        raise InvalidPrompt(f"the stride is {stride!r}, not a number of tokens")
    if longest is not None and 2 * stride > longest:
        raise InvalidPrompt(f"a stride of {stride} needs windows of {2 * stride} tokens, the model takes {longest}")
    return stride


def _score(
    loaded: LoadedModel,
    window: Window,
    known: Mapping[str, Any],
    arguments: Mapping[str, Any],
    progress: Progress | None,
) -> Result:
    """Return the loss on one window. known: where the model came from. arguments: those of `score`."""
    result = score(loaded.model, window.token_ids, window.scored, **arguments, progress=progress)
    (record,) = result.prompts
    named = dataclasses.replace(
        record, prompt=loaded.decode(*record.token_ids), target_text=loaded.decode(*record.target)
    )
    return dataclasses.replace(result, prompts=(named,), provenance={**known, **result.provenance})
