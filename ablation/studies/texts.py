"""The loss on a text: what each head does to the prediction of every token."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ablation.engine import score
from ablation.errors import InvalidAblation, InvalidPrompt, UnsupportedModel
from ablation.imputation import DEFAULT_IMPUTATIONS, Imputation
from ablation.models import LoadedModel
from ablation.passes import Progress
from ablation.prompt_files import left_out
from ablation.prompts import prompt_ids
from ablation.reference import Reference
from ablation.results import Result
from ablation.studies.plan import Plan, PreparedPlan
from ablation.studies.questions import positions_from_start, reference_prompts
from ablation.studies.study import run_plan

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
    reference: Reference | Iterable[Any] | None = None,
    positions: str | Iterable[int] = "all",
    seed: int = 0,
    draws: int = 1,
    max_rows: int | None = None,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    overwrite: bool = False,
) -> Result:
    """Measure the mean next-token loss on a text, in nats per token, clean and with each head ablated.

    The text is read in windows, see `windows`; the prompts of the result are the windows, and its only metric is
    `loss`. stride: by default `LARGEST_STRIDE`. An imputation that takes a mean over the tokens takes it over the
    tokens of a window. reference: for reference means; by default the windows. `resample` draws among the other
    windows, of which longer ones are cut to the length of the window. positions: "all", "last", or positions in a
    window, whose last token is not read. The other arguments are those of `ablation.sweep_prompts`. Raises the errors
    of `sweep`, and InvalidPrompt for a text that is unusable or a stride that does not fit the model.
    """
    study = TextStudy(
        loaded, text, stride, imputations, reference=reference, positions=positions, seed=seed, draws=draws
    )
    return study.run(max_rows=max_rows, progress=progress, checkpoint=checkpoint, overwrite=overwrite)


class TextStudy:
    """A text in windows, and what replaces z in them. The arguments are those of `sweep_text`."""

    def __init__(
        self,
        loaded: LoadedModel,
        text: str,
        stride: int | None,
        imputations: Sequence[str | Imputation],
        *,
        reference: Reference | Iterable[Any] | None = None,
        positions: str | Iterable[int] = "all",
        seed: int = 0,
        draws: int = 1,
        skip_bad: bool = False,
    ) -> None:
        if not isinstance(loaded, LoadedModel):
            raise UnsupportedModel(f"a {type(loaded).__name__} has no tokenizer: pass what `ablation.load` returns")
        self.loaded = loaded
        self.stride = _checked_stride(loaded, stride)
        self.plan = plan = Plan.of(loaded, imputations, positions, reference, draws, seed)
        if isinstance(plan.positions, str) and plan.positions not in ("all", "last"):
            raise InvalidAblation(f"a text has no column {plan.positions!r}: its positions are all, last or integers")
        try:
            self.ids = prompt_ids(loaded.tokenizer, text)
        except InvalidPrompt as error:
            raise InvalidPrompt(f"the text cannot be used as a prompt: {error}") from None
        self.windows = windows(self.ids, self.stride)
        read = [window.token_ids[:-1] for window in self.windows]
        others, bad = reference_prompts(loaded, reference, skip_bad)
        if bad:
            warnings.warn(left_out(bad), stacklevel=3)
        plan.reference_ids = [ids for _, ids in others] or read
        plan.pool = [ids[:length] for length in set(map(len, read)) for ids in read if len(ids) >= length]
        self.sources, self.positions = [], []
        for number, ids in enumerate(read, start=1):
            try:
                plan.verify_length(ids)
                self.sources.append(plan.sources(ids))
                self.positions.append(positions_from_start(plan.positions, len(ids)))
            except InvalidPrompt as error:
                raise InvalidPrompt(f"window {number} of the text: {error}") from None

    def run(
        self,
        *,
        max_rows: int | None = None,
        progress: Progress | None = None,
        checkpoint: Path | str | None = None,
        overwrite: bool = False,
    ) -> Result:
        """Compute the reference, if it is needed and was not given, and measure the loss on all windows."""
        settings = {
            "text_sha256": hashlib.sha256(json.dumps(self.ids).encode()).hexdigest(),
            "stride": self.stride,
            "max_rows": max_rows,
        }
        task = partial(self._score, max_rows)
        result, _ = run_plan(
            self.loaded,
            self.plan,
            task,
            len(self.windows),
            settings,
            checkpoint,
            overwrite=overwrite,
            progress=progress,
        )
        return result

    def _score(
        self,
        max_rows: int | None,
        index: int,
        prepared: PreparedPlan,
        known: Mapping[str, Any],
        progress: Progress | None,
    ) -> Result:
        """Return the loss on one window. known: where the model came from."""
        window, sources, positions = self.windows[index], self.sources[index], self.positions[index]
        ablations = prepared.ablations(self.loaded, sources, positions)
        result = score(
            self.loaded.model, window.token_ids, window.scored, ablations, max_rows=max_rows, progress=progress
        )
        (record,) = result.prompts
        named = dataclasses.replace(
            record, prompt=self.loaded.decode(*record.token_ids), target_text=self.loaded.decode(*record.target)
        )
        result = dataclasses.replace(result, prompts=(named,), provenance={**known, **result.provenance})
        return prepared.completed(result, [self.loaded.decode(*ids) for ids in sources], positions)


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
