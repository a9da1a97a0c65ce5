"""One experiment: a model answers a question, first unchanged, then with each head ablated in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ablation.engine import Progress
from ablation.errors import InvalidPrompt
from ablation.imputation import IMPUTATIONS
from ablation.models import LoadedModel
from ablation.prompts import Question, prompt_ids, single_token
from ablation.provenance import weights_sha256
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
    """Sweep a model on the prompt of a question, and watch the question's target and control.

    Arguments, result and errors are those of `sweep`. In addition, raises InvalidPrompt for a prompt that is empty or
    that the tokenizer does not preserve, for a target or control that is not one token, and if the two are equal.
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
        "weights_sha256": weights_sha256(loaded.model),
        "prompt": question.prompt,
        "watched": [loaded.decode(token) for token in result.watched],
    }
    return dataclasses.replace(result, provenance={**provenance, **result.provenance})
