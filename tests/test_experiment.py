"""A question put to a model: what is refused before the sweep, what is noted, and what the provenance says."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest

from ablation.errors import InvalidPrompt
from ablation.models import LoadedModel
from ablation.prompts import Question
from ablation.studies import experiment
from ablation.studies.experiment import sweep_prompts

BERLIN = "Berlin is the capital of"


class SweepHasBegun(Exception):
    pass


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything before the sweep."""

    def sweep(*_: Any, **__: Any) -> None:
        raise SweepHasBegun

    monkeypatch.setattr(experiment, "run", sweep)


@pytest.mark.usefixtures("no_sweep")
@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (Question(BERLIN, None, " Germany"), "the control, ' Germany', is the model's own prediction: name a target"),
        (Question(BERLIN, " France", " France"), "target and control are the same tokens"),
        (Question(BERLIN, " Gondor"), "' Gondor' has no tokens"),
        (Question(BERLIN, " Germany", " Gondor"), "' Gondor' has no tokens"),
        (Question(BERLIN, " Germany France", " Germany France"), "target and control are the same tokens"),
        (Question(BERLIN + " of" * 60, " Germany"), "the prompt has 65 tokens, the model takes at most 32"),
        (Question(BERLIN + " of" * 30_000, " Germany"), "the prompt has 30005 tokens, the model takes at most 32"),
        (Question(BERLIN, chat=True), "this model has no chat template"),
        (Question(""), "the prompt is empty"),
        (Question("\udcff"), "not valid UTF-8"),
        (Question(["Berlin"]), "a prompt is a str, not list"),  # type: ignore[arg-type]
    ],
)
def test_unusable_question_is_refused_before_the_sweep(capitals: LoadedModel, question: Question, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason) as caught:
        sweep_prompts(capitals, [question])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


@pytest.mark.usefixtures("no_sweep")
@pytest.mark.parametrize(
    ("target", "control", "said"),
    [
        ("Germany", " France", ["the target 'Germany' begins with probability "]),
        (" France", "Germany", ["the control 'Germany' begins with probability "]),
        (None, "Germany", ["the control 'Germany' begins with probability "]),
        (" Germany", " France", []),
        (" Germany", None, []),
        (None, None, []),
        (None, " France", []),
    ],
)
def test_far_likelier_spacing_is_noted(
    capitals: LoadedModel, target: str | None, control: str | None, said: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as notes, pytest.raises(SweepHasBegun):
        warnings.simplefilter("always")
        sweep_prompts(capitals, [Question(BERLIN, target, control)])
    found = [str(note.message) for note in notes]
    assert len(found) == len(said)
    for note, start in zip(found, said, strict=True):
        assert note.startswith(start)
        assert note.endswith(", but ' Germany' with 0.69: a leading space makes another token")


def test_ignored_weights_are_noted_and_kept_in_provenance(capitals: LoadedModel) -> None:
    loaded = dataclasses.replace(capitals, ignored_weights=("score.bias", "score.weight"))
    with pytest.warns(UserWarning, match="^capitals has 2 weights that this model does not use, such as score.bias$"):
        result = sweep_prompts(loaded, [Question(BERLIN)], ["zero"])
    assert result.provenance["ignored_weights"] == ["score.bias", "score.weight"]
    assert sweep_prompts(capitals, [Question(BERLIN)], ["zero"]).provenance["ignored_weights"] == []


def test_chat_sweeps_the_rendered_prompt(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capitals.tokenizer, "chat_template", "<|endoftext|>{{ messages[0].content }} is", raising=False)
    chat = sweep_prompts(capitals, [Question("Berlin", chat=True)], ["zero"])
    plain = sweep_prompts(capitals, [Question("<|endoftext|>Berlin is")], ["zero"])
    assert (chat.prompts[0].prompt, chat.provenance["chat"]) == ("Berlin", True)
    assert plain.provenance["chat"] is False
    assert chat.prompts[0].token_ids == plain.prompts[0].token_ids
    assert np.array_equal(chat.ablated["margin"], plain.ablated["margin"])
