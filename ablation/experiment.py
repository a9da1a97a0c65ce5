"""One experiment: a question is put to a model, and every head is ablated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ablation.engine import Progress
from ablation.errors import InvalidPrompt
from ablation.imputation import IMPUTATIONS
from ablation.models import LoadedModel
from ablation.prompts import Question, prompt_ids, single_token
from ablation.provenance import weights_digest
from ablation.results import SweepResult
from ablation.sweeps import sweep


def sweep_question(
    loaded: LoadedModel,
    question: Question,
    imputations: Sequence[str] = tuple(IMPUTATIONS),
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Sweep a model on a question; its target and control are watched. See `sweep` for the rest.

    Raises InvalidPrompt for an empty prompt, for a target or control that is not one token, and if both are the same.
    """
    ids = prompt_ids(loaded.tokenizer, question.prompt)
    watch = [t if t is None else single_token(loaded.tokenizer, t) for t in (question.target, question.control)]
    if None not in watch and watch[0] == watch[1]:
        raise InvalidPrompt(f"target and control are the same token, {question.target!r}: name another with --control")
    result = sweep(loaded.model, ids, watch, imputations, max_rows=max_rows, progress=progress)
    if question.target is None and watch[1] == result.clean_argmax:
        raise InvalidPrompt(
            f"the control, {question.control!r}, is the model's own prediction: name a target with --target"
        )
    provenance = {
        "model": loaded.name,
        "revision": loaded.revision,
        "source": loaded.source,
        **weights_digest(loaded.model),
        "prompt": question.prompt,
        "watched": [loaded.decode(token) for token in result.watched],
    }
    return dataclasses.replace(result, provenance={**provenance, **result.provenance})
