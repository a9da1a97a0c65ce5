"""Questions as token ids: what is wrong with a question is known before any sweep begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ablation.causality import verify_causal_lm
from ablation.choices import Positions
from ablation.edits import Ablation
from ablation.errors import InvalidAblation, InvalidPrompt
from ablation.forward import last_logits, validated_request
from ablation.measure import float64, lowest_best, tie_tolerance
from ablation.models import LoadedModel
from ablation.prompt_files import PROMPTS_ONLY, Row, as_rows, left_out, valid_rows
from ablation.prompts import continuation_ids, other_spacing, prompt_ids, span_positions
from ablation.reference import Reference
from ablation.rows import verify_positions
from ablation.studies.replacements import TokenIds

FAR_LIKELIER = 10.0
"""A text is suggested in place of another if its first token is more probable by this factor."""


class Asked(NamedTuple):
    """A question as token ids.

    target, control: None for one that the clean run chooses. positions: the tokens at which an ablation acts, from 0;
    None for all. resample: the prompt that the question names to resample from. hint: a sentence about its spacing.
    """

    row: Row
    token_ids: TokenIds
    target: TokenIds | None
    control: TokenIds | None
    positions: tuple[int, ...] | None
    resample: TokenIds | None
    hint: str | None


def tokenised(
    loaded: LoadedModel, rows: Sequence[Row], positions: Positions = "all", *, resample: bool = False
) -> Iterator[Asked | InvalidPrompt]:
    """Yield each question with its tokens, or what is wrong with it, found in a clean run.

    positions: at which tokens an ablation acts; a column stands for the spans of each question. resample: whether the
    prompts to resample from are needed. Raises InvalidAblation if spans are needed and the tokenizer is not a fast one.
    """
    if isinstance(positions, str) and positions not in ("all", "last") and not loaded.tokenizer.is_fast:
        raise InvalidAblation(
            f"positions of the column {positions!r} need a fast tokenizer, which knows the characters of each token; "
            f"{loaded.name} has a {type(loaded.tokenizer).__name__}"
        )
    for number, row in enumerate(rows):
        question = row.question
        try:
            ids = tuple(prompt_ids(loaded.tokenizer, question.prompt, chat=question.chat))
            target, control = (
                None if text is None else continuation_ids(loaded.tokenizer, text)
                for text in (question.target, question.control)
            )
            if target is not None and target == control:
                raise InvalidPrompt(
                    f"target and control are the same tokens, {question.target!r}: name another control"
                )
            request = validated_request(loaded.model, ids, [Ablation([])], target, control, None)
            if number == 0:
                verify_causal_lm(request)
            with torch.no_grad():
                logits = last_logits(request, 1)[0, 0]
            prediction = int(lowest_best(float64(logits), tie_tolerance(logits)))
            if target is None and control == (prediction,):
                raise InvalidPrompt(
                    f"the control, {question.control!r}, is the model's own prediction: name a target, too"
                )
            yield Asked(
                row,
                ids,
                target,
                control,
                _positions(loaded, row, ids, positions),
                _source(loaded, row) if resample else None,
                _spacing_hint(loaded, row, float64(logits).softmax(dim=-1)),
            )
        except InvalidPrompt as error:
            yield row.problem(error)


def reference_prompts(
    loaded: LoadedModel, reference: Any, skip_bad: bool
) -> tuple[list[tuple[Row, TokenIds]], list[InvalidPrompt]]:
    """Return the reference prompts with their tokens, and those that are left out. Raises InvalidPrompt."""
    if reference is None or isinstance(reference, Reference):
        return [], []
    try:
        rows, bad = valid_rows(as_rows(reference, columns=PROMPTS_ONLY), skip_bad=skip_bad)
        found, unusable = valid_rows(_reference_ids(loaded, rows), skip_bad=skip_bad)
    except InvalidPrompt as error:
        raise InvalidPrompt(f"the reference: {error}") from None
    return found, [InvalidPrompt(f"the reference: {error}") for error in (*bad, *unusable)]


def _reference_ids(loaded: LoadedModel, rows: Sequence[Row]) -> Iterator[tuple[Row, TokenIds] | InvalidPrompt]:
    """Yield each reference prompt with its tokens, or what is wrong with it."""
    for row in rows:
        try:
            ids = prompt_ids(loaded.tokenizer, row.question.prompt, chat=row.question.chat)
            yield row, validated_request(loaded.model, ids, [Ablation([])], None, None, None).token_ids
        except InvalidPrompt as error:
            yield row.problem(error)


def positions_from_start(positions: Positions, tokens: int) -> tuple[int, ...] | None:
    """Return positions of a prompt, counted from 0, or None for all. Raises InvalidPrompt if it does not have them."""
    if positions == "all":
        return None
    if positions == "last":
        return (tokens - 1,)
    assert isinstance(positions, tuple)
    verify_positions(positions, tokens, "the prompt", InvalidPrompt)
    return tuple(sorted({position % tokens for position in positions}))


def _positions(loaded: LoadedModel, row: Row, ids: TokenIds, positions: Positions) -> tuple[int, ...] | None:
    """Return the positions of a prompt from 0, or None for all. Raises InvalidPrompt if it does not have them."""
    question = row.question
    if isinstance(positions, tuple) or positions in ("all", "last"):
        return positions_from_start(positions, len(ids))
    if question.spans is None:
        raise InvalidPrompt(f"it has no spans of characters, which the positions {positions!r} name")
    try:
        found = span_positions(loaded.tokenizer, question.prompt, question.spans, chat=question.chat)
    except InvalidPrompt as error:
        raise InvalidPrompt(f"column {positions}: {error}") from None
    return tuple(position for position in found if position < len(ids))


def _source(loaded: LoadedModel, row: Row) -> TokenIds | None:
    """Return the tokens of the prompt that a question names to resample from. Raises InvalidPrompt."""
    question = row.question
    if question.resample is None:
        return None
    try:
        return tuple(prompt_ids(loaded.tokenizer, question.resample, chat=question.chat))
    except InvalidPrompt as error:
        raise InvalidPrompt(f"column resample: {error}") from None


def _spacing_hint(loaded: LoadedModel, row: Row, probability: torch.Tensor) -> str | None:
    """Return a sentence if a target or control would be far likelier with, or without, a leading space."""
    for name, text in (("target", row.question.target), ("control", row.question.control)):
        other = None if text is None else other_spacing(loaded.tokenizer, text)
        if text is not None and other is not None:
            own, others = (float(probability[continuation_ids(loaded.tokenizer, t)[0]]) for t in (text, other))
            if others > FAR_LIKELIER * own:
                return (
                    f"the {name} {text!r} begins with probability {own:.2g}, but {other!r} with {others:.2g}: "
                    "a leading space makes another token"
                )
    return None


def warn(loaded: LoadedModel, bad: Sequence[InvalidPrompt], asked: Sequence[Asked], *, stacklevel: int) -> None:
    """Warn of prompts that are left out, of spaces that may be wrong, and of weights that the model ignores."""
    stacklevel += 1
    if bad:
        warnings.warn(left_out(bad), stacklevel=stacklevel)
    hints = [(of.row.where, of.hint) for of in asked if of.hint]
    if hints:
        (where, hint), others = hints[0], len(hints) - 1
        more = f" (and in {others} other prompt{'' if others == 1 else 's'})" if others else ""
        warnings.warn(hint if len(asked) == 1 else f"{where}: {hint}{more}", stacklevel=stacklevel)
    if loaded.ignored_weights:
        count, first = len(loaded.ignored_weights), loaded.ignored_weights[0]
        weights = f"{count} weight{'' if count == 1 else 's'}"
        warnings.warn(
            f"{loaded.name} has {weights} that this model does not use, such as {first}", stacklevel=stacklevel
        )
