"""A study: a model answers questions, each first unchanged, then with each head ablated in turn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch

from ablation.causality import verify_causal_lm
from ablation.edits import Ablation
from ablation.errors import InvalidPrompt, UnsupportedModel
from ablation.forward import last_logits, validated_request
from ablation.imputation import DEFAULT_IMPUTATIONS, Imputation
from ablation.measure import Metric, float64, lowest_best, tie_tolerance
from ablation.models import LoadedModel
from ablation.passes import Progress
from ablation.prompt_files import Row, as_rows, left_out, valid_rows
from ablation.prompts import continuation_ids, other_spacing, prompt_ids
from ablation.results import Result
from ablation.study import Task, origin, run_tasks, settings_of
from ablation.sweeps import as_imputations, one_head_ablations, sweep

FAR_LIKELIER = 10.0
"""A text is suggested in place of another if its first token is more probable by this factor."""


def sweep_prompts(
    loaded: LoadedModel,
    prompts: Iterable[Any],
    imputations: Sequence[str | Imputation] = DEFAULT_IMPUTATIONS,
    *,
    metrics: Mapping[str, Metric] | None = None,
    skip_bad: bool = False,
    max_rows: int | None = None,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    overwrite: bool = False,
) -> Result:
    """Sweep a model on several prompts, each by itself and without padding.

    prompts: `Question` objects, or records with the columns prompt, target, and optionally control and group; see
    `ablation.prompt_files.as_rows`. skip_bad: leave out prompts that cannot be used, and warn. checkpoint: a folder for
    the prompts that are finished, one by one. The same call goes on where an earlier one was interrupted, with the same
    bits, and removes the checkpoint at the end; overwrite: discard a checkpoint of other settings. Processes started by
    torchrun or `accelerate launch` share the prompts if there is a checkpoint; each returns the whole result. The other
    arguments are those of `sweep`.

    Warns if a target or control would be far more probable with, or without, its leading space, and if the model
    ignores weights of its file. Raises the errors of `sweep`; InvalidPrompt, before any sweep, for a prompt, target or
    control that cannot be used, and if target and control are equal; InvalidOutput for a checkpoint of other settings.
    """
    if not isinstance(loaded, LoadedModel):
        raise UnsupportedModel(f"a {type(loaded).__name__} has no tokenizer: pass what `ablation.load` returns")
    one_head_ablations(loaded.model, as_imputations(imputations))  # raises its errors before any work
    rows, bad = valid_rows(as_rows(prompts), skip_bad=skip_bad)
    asked, unusable = valid_rows(_tokenised(loaded, rows), skip_bad=skip_bad)
    _warn(loaded, [*bad, *unusable], asked)

    chosen, known = as_imputations(imputations), origin(loaded)
    questions = [[*dataclasses.astuple(of.row.question), of.token_ids, of.target, of.control] for of in asked]
    settings = {
        **settings_of(loaded),
        "prompts": len(asked),
        "prompts_sha256": hashlib.sha256(json.dumps(questions).encode()).hexdigest(),
        "imputations": [imputation.name for imputation in chosen],
        "metrics": {name: _code_of(metric) for name, metric in (metrics or {}).items()},
        "max_rows": max_rows,
    }
    arguments = {"imputations": chosen, "metrics": metrics, "max_rows": max_rows}
    tasks = [_task(loaded, of, known, arguments) for of in asked]
    return run_tasks(tasks, settings, checkpoint, overwrite=overwrite, progress=progress)


# ---- questions and their tokens


class _Asked(NamedTuple):
    """A question as token ids; None for a target or control that the clean run chooses. hint: about its spacing."""

    row: Row
    token_ids: list[int]
    target: tuple[int, ...] | None
    control: tuple[int, ...] | None
    hint: str | None


def _tokenised(loaded: LoadedModel, rows: Sequence[Row]) -> Iterator[_Asked | InvalidPrompt]:
    """Yield each question with its tokens, or what is wrong with it, found in a clean run."""
    for number, row in enumerate(rows):
        question = row.question
        try:
            ids = prompt_ids(loaded.tokenizer, question.prompt, chat=question.chat)
            target, control = (
                None if text is None else continuation_ids(loaded.tokenizer, text)
                for text in (question.target, question.control)
            )
            if target is not None and target == control:
                raise InvalidPrompt(
                    f"target and control are the same tokens, {question.target!r}: name another with --control"
                )
            request = validated_request(loaded.model, ids, [Ablation([])], target, control, None)
            if number == 0:
                verify_causal_lm(request)
            with torch.no_grad():
                logits = last_logits(request, 1)[0, 0]
            prediction = int(lowest_best(float64(logits), tie_tolerance(logits)))
            if target is None and control == (prediction,):
                raise InvalidPrompt(
                    f"the control, {question.control!r}, is the model's own prediction: name a target with --target"
                )
            yield _Asked(row, ids, target, control, _spacing_hint(loaded, row, float64(logits).softmax(dim=-1)))
        except InvalidPrompt as error:
            yield row.problem(error)


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


def _warn(loaded: LoadedModel, bad: Sequence[InvalidPrompt], asked: Sequence[_Asked]) -> None:
    """Warn of prompts that are left out, of spaces that may be wrong, and of weights that the model ignores."""
    if bad:
        warnings.warn(left_out(bad), stacklevel=3)
    hints = [(of.row.where, of.hint) for of in asked if of.hint]
    if hints:
        (where, hint), others = hints[0], len(hints) - 1
        more = f" (and in {others} other prompts)" if others else ""
        warnings.warn(hint if len(asked) == 1 else f"{where}: {hint}{more}", stacklevel=3)
    if loaded.ignored_weights:
        count, first = len(loaded.ignored_weights), loaded.ignored_weights[0]
        warnings.warn(f"{loaded.name} has {count} weights that this model does not use, such as {first}", stacklevel=3)


# ---- results


def _code_of(metric: Any) -> Any:
    """Return what a function does, as values that JSON can hold, to tell it from another one of the same name.

    What it reads outside of itself, other than defaults and a closure, is not compared. For any other callable, return
    its address, which no other process repeats.
    """
    if not isinstance(metric, FunctionType):
        return repr(id(metric))

    def described(code: CodeType) -> list[Any]:
        constants = [described(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
        return [code.co_code.hex(), list(code.co_names), constants]

    enclosed = [repr(cell.cell_contents) for cell in metric.__closure__ or ()]
    whole = [described(metric.__code__), repr(metric.__defaults__), repr(metric.__kwdefaults__), enclosed]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def _task(loaded: LoadedModel, of: _Asked, known: Mapping[str, Any], arguments: Mapping[str, Any]) -> Task:
    """Return the sweep of one question. known: where the model came from. arguments: those of `sweep`."""

    def run(progress: Progress | None) -> Result:
        result = sweep(loaded.model, of.token_ids, of.target, of.control, **arguments, progress=progress)
        (record,), question = result.prompts, of.row.question
        named = dataclasses.replace(
            record,
            prompt=question.prompt,
            target_text=loaded.decode(*record.target),
            control_text=loaded.decode(*record.control),
            group=question.group,
        )
        provenance = {**known, "chat": question.chat, **result.provenance}
        return dataclasses.replace(result, prompts=(named,), provenance=provenance)

    return run
