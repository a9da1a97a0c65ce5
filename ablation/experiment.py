"""One experiment: a model answers a question, first unchanged, then with each head ablated in turn."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

from ablation.edits import Ablation
from ablation.engine import Progress, run_sequential
from ablation.errors import InvalidPrompt, UnsupportedModel
from ablation.imputation import IMPUTATIONS
from ablation.models import LoadedModel
from ablation.prompts import Question, other_spacing, prompt_ids, single_token
from ablation.provenance import weights_digest
from ablation.results import SweepResult
from ablation.sweeps import sweep

FAR_LIKELIER = 10.0
"""A token is suggested in place of another if it is more probable by this factor."""


def sweep_question(
    loaded: LoadedModel,
    question: Question,
    imputations: Sequence[str] = tuple(IMPUTATIONS),
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Sweep a model on the prompt of a question, and watch the question's target and control.

    Arguments, result and errors are those of `sweep`. Warns if the target or the control would be far more probable
    with, or without, its leading space, and if the model ignores weights of its file.

    In addition, raises InvalidPrompt for a prompt that is unusable, for a target or control that is not one token, and
    if the two are equal, all before the sweep.
    """
    if not isinstance(loaded, LoadedModel):
        raise UnsupportedModel(f"a {type(loaded).__name__} has no tokenizer: pass what `ablation.load` returns")
    if not isinstance(question, Question):
        raise InvalidPrompt(f"a {type(question).__name__} is not a question: pass Question(prompt)")
    ids = prompt_ids(loaded.tokenizer, question.prompt, chat=question.chat)
    watch = [t if t is None else single_token(loaded.tokenizer, t) for t in (question.target, question.control)]
    if None not in watch and watch[0] == watch[1]:
        raise InvalidPrompt(f"target and control are the same token, {question.target!r}: name another with --control")
    _check_watched(loaded, question, ids, watch)
    if loaded.ignored_weights:
        count, first = len(loaded.ignored_weights), loaded.ignored_weights[0]
        warnings.warn(f"{loaded.name} has {count} weights that this model does not use, such as {first}", stacklevel=2)
    result = sweep(loaded.model, ids, watch, imputations, max_rows=max_rows, progress=progress)
    provenance = {
        "model": loaded.name,
        "revision": loaded.revision,
        "source": loaded.source,
        **weights_digest(loaded.model),
        "ignored_weights": list(loaded.ignored_weights),
        "prompt": question.prompt,
        "chat": question.chat,
        "watched": [loaded.decode(token) for token in result.watched],
    }
    return dataclasses.replace(result, provenance={**provenance, **result.provenance})


def _check_watched(loaded: LoadedModel, question: Question, ids: list[int], watch: list[int | None]) -> None:
    """Compare the named tokens with the clean run. Raises InvalidPrompt, and warns; see `sweep_question`."""
    named = {
        (what, text): (token, other_spacing(loaded.tokenizer, text))
        for what, text, token in zip(("target", "control"), (question.target, question.control), watch, strict=True)
        if text is not None and token is not None
    }
    if not named:
        return
    tokens = list(dict.fromkeys(token for pair in named.values() for token in pair if token is not None))
    clean = run_sequential(loaded.model, ids, [Ablation([])], tokens)
    if question.target is None and watch[1] == clean.clean_argmax:
        raise InvalidPrompt(
            f"the control, {question.control!r}, is the model's own prediction: name a target with --target"
        )
    probability = dict(zip(tokens, clean.clean_probability.tolist(), strict=True))
    for (what, text), (token, other) in named.items():
        if other is not None and probability[other] > FAR_LIKELIER * probability[token]:
            warnings.warn(
                f"the {what} {text!r} has probability {probability[token]:.2g}, but {loaded.decode(other)!r} has "
                f"{probability[other]:.2g}: a leading space makes another token",
                stacklevel=3,
            )
