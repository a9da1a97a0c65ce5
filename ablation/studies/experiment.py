"""A study: a model answers questions, each first unchanged, then with each head ablated in turn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ablation.choices import OF_REFERENCE, RESAMPLE
from ablation.edits import Ablation
from ablation.engine import run
from ablation.errors import InvalidPrompt, UnsupportedModel
from ablation.imputation import DEFAULT_IMPUTATIONS, Imputation
from ablation.measure import Metric
from ablation.models import LoadedModel
from ablation.passes import Progress
from ablation.prompt_files import Columns, as_rows, valid_rows
from ablation.reference import Reference
from ablation.results import Result
from ablation.studies.plan import Plan, PreparedPlan, Sets
from ablation.studies.questions import Asked, reference_prompts, tokenised, warn
from ablation.studies.replacements import TokenIds
from ablation.studies.study import run_plan


def sweep_prompts(
    loaded: LoadedModel,
    prompts: Iterable[Any],
    imputations: Sequence[str | Imputation] = DEFAULT_IMPUTATIONS,
    *,
    sets: Sets | None = None,
    reference: Reference | Iterable[Any] | None = None,
    positions: str | Iterable[int] = "all",
    seed: int = 0,
    draws: int = 1,
    metrics: Mapping[str, Metric] | None = None,
    skip_bad: bool = False,
    max_rows: int | None = None,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    overwrite: bool = False,
) -> Result:
    """Sweep a model on several prompts, each by itself and without padding.

    prompts: `Question` objects, or records with the columns prompt, target, and optionally control, group and resample;
    see `ablation.prompt_files.as_rows`. imputations: names or `Imputation` objects; see docs/imputations.md. sets: the
    sets of heads that are ablated, {name: heads} or a list of heads for each; by default, each head alone. reference:
    for reference means, a `Reference`, or prompts, of which only the column prompt matters; by default, `prompts`.
    `resample` takes the prompt of the column resample, or draws among reference prompts of equal length, if they are
    prompts, or else among `prompts`. draws: how many prompts are drawn for each prompt; metrics are averaged over them.
    seed: of the draws. positions: "all", "last", positions, or a column with spans of characters of the prompt, at
    whose tokens ablations act; see `ablation.prompt_files.spans_of`. skip_bad: leave out prompts that cannot be used,
    and warn. checkpoint: a folder for the prompts that are finished, one by one. The same call goes on where an earlier
    one was interrupted, with the same bits, and removes the checkpoint at the end; overwrite: discard a checkpoint of
    other settings. Processes started by torchrun or `accelerate launch` share the prompts if there is a checkpoint;
    each returns the whole result. The other arguments are those of `sweep`.

    Warns if a target or control would be far more probable with, or without, its leading space, and if the model
    ignores weights of its file. Raises the errors of `sweep`; InvalidPrompt, before any sweep, for a prompt, target or
    control that cannot be used, if target and control are equal, and if there is no prompt to resample from;
    InvalidAblation for a reference of other weights, and for sets that are none; InvalidOutput for a checkpoint of
    other settings.
    """
    study = Study(
        loaded,
        prompts,
        imputations,
        sets=sets,
        reference=reference,
        positions=positions,
        seed=seed,
        draws=draws,
        skip_bad=skip_bad,
        stacklevel=3,
    )
    return study.run(metrics=metrics, max_rows=max_rows, progress=progress, checkpoint=checkpoint, overwrite=overwrite)


class Study:
    """Questions and what replaces z in them, checked before any sweep. The arguments are those of `sweep_prompts`."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Iterable[Any],
        imputations: Sequence[str | Imputation],
        *,
        sets: Sets | None = None,
        reference: Reference | Iterable[Any] | None = None,
        positions: str | Iterable[int] = "all",
        seed: int = 0,
        draws: int = 1,
        skip_bad: bool = False,
        stacklevel: int = 2,
    ) -> None:
        """stacklevel: of the warnings."""
        if not isinstance(loaded, LoadedModel):
            raise UnsupportedModel(f"a {type(loaded).__name__} has no tokenizer: pass what `ablation.load` returns")
        self.loaded = loaded
        self.plan = plan = Plan.of(loaded, imputations, positions, reference, draws, seed, sets)
        self.prepared: PreparedPlan | None = None
        column = plan.positions if plan.positions not in ("all", "last") else None
        columns = Columns(spans=column if isinstance(column, str) else None)
        rows, bad = valid_rows(as_rows(prompts, columns=columns), skip_bad=skip_bad)
        others, bad_others = reference_prompts(loaded, reference, skip_bad)
        asked, unusable = valid_rows(
            tokenised(loaded, rows, plan.positions, resample=plan.resamples), skip_bad=skip_bad
        )
        plan.texts = {ids: row.question.prompt for row, ids in others}
        plan.texts |= {of.token_ids: of.row.question.prompt for of in asked}
        plan.reference_ids = plan.pool = [ids for _, ids in others] or [of.token_ids for of in asked]
        if not others and len(asked) == 1:
            _verify_needs_no_others(plan, asked[0])
        parts, unmatched = valid_rows(map(self._with_sources, asked), skip_bad=skip_bad)
        self.asked, self.sources = [of for of, _ in parts], [sources for _, sources in parts]
        if not others:
            plan.reference_ids = [of.token_ids for of in self.asked]
        warn(loaded, [*bad_others, *bad, *unusable, *unmatched], self.asked, stacklevel=stacklevel)

    def _with_sources(self, of: Asked) -> tuple[Asked, tuple[TokenIds, ...]] | InvalidPrompt:
        """Return a question with the prompts that `resample` takes z from, or what is wrong with it."""
        try:
            self.plan.verify_length(of.token_ids)
            return of, self.plan.sources(of.token_ids, of.resample)
        except InvalidPrompt as error:
            return of.row.problem(error)

    def run(
        self,
        *,
        metrics: Mapping[str, Metric] | None = None,
        max_rows: int | None = None,
        progress: Progress | None = None,
        checkpoint: Path | str | None = None,
        overwrite: bool = False,
    ) -> Result:
        """Compute the reference, if it is needed and was not given, and sweep all questions."""
        questions = json.dumps(list(map(_settings_of_question, self.asked)))
        settings = {
            "prompts": len(self.asked),
            "prompts_sha256": hashlib.sha256(questions.encode()).hexdigest(),
            "metrics": {name: _code_of(metric) for name, metric in (metrics or {}).items()},
            "max_rows": max_rows,
        }
        task = partial(self._sweep, {"metrics": metrics, "max_rows": max_rows})
        result, self.prepared = run_plan(
            self.loaded,
            self.plan,
            task,
            len(self.asked),
            settings,
            checkpoint,
            overwrite=overwrite,
            progress=progress,
        )
        return result

    def ablations(self, index: int) -> list[Ablation]:
        """Return the ablations of a question, after the study has run."""
        assert self.prepared is not None
        return self._ablations(index, self.prepared)

    def _ablations(self, index: int, prepared: PreparedPlan) -> list[Ablation]:
        return prepared.ablations(self.loaded, self.sources[index], self.asked[index].positions)

    def _sweep(
        self,
        arguments: Mapping[str, Any],
        index: int,
        prepared: PreparedPlan,
        known: Mapping[str, Any],
        progress: Progress | None,
    ) -> Result:
        """Return the result of one question. arguments: those of `run`. known: where the model came from."""
        of, question = self.asked[index], self.asked[index].row.question
        result = run(
            self.loaded.model,
            of.token_ids,
            self._ablations(index, prepared),
            of.target,
            of.control,
            **arguments,
            progress=progress,
        )
        (record,) = result.prompts
        named = dataclasses.replace(
            record,
            prompt=question.prompt,
            target_text=self.loaded.decode(*record.target),
            control_text=self.loaded.decode(*record.control),
            group=question.group,
        )
        provenance = {**known, "chat": question.chat, **result.provenance}
        result = dataclasses.replace(result, prompts=(named,), provenance=provenance)
        given = None if of.resample is None else question.resample
        texts = [given or self.plan.texts[ids] for ids in self.sources[index]]
        return prepared.completed(result, texts, of.positions)


def _verify_needs_no_others(plan: Plan, of: Asked) -> None:
    """Raise InvalidPrompt if one prompt, for which there is no other one, needs others."""
    needed = [name for name in OF_REFERENCE if name in plan.imputations and plan.reference is None]
    needed += [RESAMPLE] if plan.resamples and of.resample is None else []
    if needed:
        raise InvalidPrompt(
            f"{needed[0]!r} takes z from other prompts, and there is one prompt only: pass others as `reference` "
            "(on the command line, --reference FILE)"
        )


def _settings_of_question(of: Asked) -> list[Any]:
    """Return everything about a question on which the bits of its result depend, as values that JSON can hold."""
    question = of.row.question
    texts = (question.prompt, question.target, question.control, question.chat, question.group)
    return [*texts, of.token_ids, of.target, of.control, of.positions, of.resample]


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
