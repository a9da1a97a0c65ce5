"""Studies that are refused before any sweep, rows that are left out, and spans of characters as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ablation.errors import InvalidAblation, InvalidPrompt, InvalidResult, UnknownImputation
from ablation.imputation import ChannelMean, Values
from ablation.models import LoadedModel
from ablation.prompts import Question
from ablation.reference import Reference, record_z
from ablation.studies.experiment import Study, sweep_prompts
from ablation.studies.plan import load_values
from ablation.studies.study import origin
from tests.comparing import assert_results_equal
from tests.test_studies import OTHERS, RECORDS, few_heads, ids_of


def test_bad_rows_are_named_and_may_be_left_out(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        RECORDS[0] | {"resample": "Rome is the capital of"},
        RECORDS[1] | {"resample": "Rome is"},
        RECORDS[2] | {"resample": "Minas is the capital of"},
        RECORDS[3] | {"resample": 3},
        {"prompt": "The capital of Germany is", "target": " Germany", "resample": None},
        {"prompt": "Rome is", "target": " a"},
    ]
    for index, reason in [
        (1, "prompt 2: the prompt to resample from has 2 tokens, the prompt 5"),
        (2, "prompt 2: column resample: this model has no token for 'Minas'"),
        (3, "prompt 2, column resample: a text is needed, not 3"),
        (5, "prompt 2: no other prompt has 2 tokens, so there is none to resample from"),
    ]:
        with pytest.raises(InvalidPrompt, match=reason):
            Study(capitals, [records[0], records[index]], ["resample"])
    with pytest.warns(UserWarning, match="4 prompts are left out: prompt 4"):
        study = Study(capitals, records, ["resample", "reference-mean"], skip_bad=True)
    assert [of.row.question.prompt for of in study.asked] == [records[0]["prompt"], records[4]["prompt"]]
    assert len(study.plan.reference_ids) == 2, "the reference is that of the prompts that are left"


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ({}, "column where: it is missing"),
        ({"where": None}, "column where: it is missing"),
        ({"wher": [0, 3]}, "column where: it is missing: is this wher"),
        ({"where": ""}, "column where: it is empty"),
        ({"where": "Paris"}, "column where: 'Paris' does not occur in the prompt"),
        ({"where": "i"}, "column where: 'i' occurs more than once in the prompt"),
        ({"where": []}, "column where: spans are pairs"),
        ({"where": [[]]}, "column where: a span is a pair"),
        ({"where": 3}, "column where: spans are pairs"),
        ({"where": {"start": 0}}, "column where: spans are pairs"),
        ({"where": [0, 1, 2]}, "column where: a span is a pair"),
        ({"where": [0, "1"]}, "column where: a span is a pair"),
        ({"where": [0.0, 1.0]}, "column where: a span is a pair"),
        ({"where": [[0, True]]}, "column where: a span is a pair"),
        ({"where": [3, 3]}, "column where: the prompt has 24 characters, and so no span .3, 3."),
        ({"where": [-3, 3]}, "column where: the prompt has 24 characters"),
        ({"where": [0, 25]}, "column where: the prompt has 24 characters, and so no span .0, 25."),
        ({"where": [[0, 6], [24, 30]]}, "column where: the prompt has 24 characters"),
        ({"where": [6, 3]}, "column where: the prompt has 24 characters"),
    ],
)
def test_bad_span_is_a_bad_row(capitals: LoadedModel, column: dict[str, Any], reason: str) -> None:
    record = {"prompt": "Berlin is the capital of", "target": " Germany"}
    with pytest.raises(InvalidPrompt, match=f"^prompt 1, {reason}") as caught:
        Study(capitals, [record | column], ["zero"], positions="where")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "positions"),
    [
        ("Berlin", (0,)),
        ([0, 6], (0,)),
        ([[0, 6]], (0,)),
        (((7, 9), (18, 21)), (1, 3)),
        ([0, 24], (0, 1, 2, 3, 4)),
        ("the capital", (2, 3)),
        ([3, 8], (0, 1)),
        ([[0, 6], [2, 4]], (0,)),
        (np.array([[0, 6], [7, 9]]), (0, 1)),
        ([np.array([7, 9])], (1,)),
    ],
)
def test_spans_are_the_tokens_that_they_overlap(capitals: LoadedModel, where: Any, positions: tuple[int, ...]) -> None:
    record = {"prompt": "Berlin is the capital of", "target": " Germany", "where": where}
    (asked,) = Study(capitals, [record], ["zero"], positions="where").asked
    assert asked.positions == positions


def test_spans_of_a_question_need_no_column(capitals: LoadedModel) -> None:
    question = Question("Berlin is the capital of", " Germany", spans=((0, 6),))
    (asked,) = Study(capitals, [question], ["zero"], positions="subject").asked
    assert asked.positions == (0,)
    with pytest.raises(InvalidPrompt, match="^prompt 1: it has no spans of characters, which the positions 'subject'"):
        Study(capitals, [Question("Berlin is", " a")], ["zero"], positions="subject")


def test_spans_are_those_of_the_message_in_a_chat(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(template: str, prompt: str, span: tuple[int, int]) -> Any:
        monkeypatch.setattr(capitals.tokenizer, "chat_template", template, raising=False)
        question = Question(prompt, " Germany", chat=True, spans=(span,))
        (asked,) = Study(capitals, [question], ["zero"], positions="subject").asked
        return asked.positions

    assert at("<|endoftext|>{{ messages[0].content }} is", "Berlin", (0, 6)) == (1,)
    assert at("is is {{ messages[0].content }}", "is", (0, 2)) == (2,)
    assert at("is {{ messages[0].content | trim }} of", " Berlin is ", (0, 7)) == (1,)
    with pytest.raises(InvalidPrompt, match="no token is at the characters 0 to 1"):
        at("is {{ messages[0].content | trim }} of", " Berlin is ", (0, 1))
    with pytest.raises(InvalidPrompt, match="the chat template changes the prompt"):
        at("{{ messages[0].content | replace('Berlin', 'Rome') }}", "Berlin is", (0, 6))


def test_slow_tokenizer_has_no_spans(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(capitals.tokenizer), "is_fast", False)
    with pytest.raises(InvalidAblation, match="positions of the column 'subject' need a fast tokenizer"):
        Study(capitals, RECORDS, ["zero"], positions="subject")


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"positions": [5]}, InvalidPrompt, "prompt 1: the prompt has 5 tokens, so it has no position 5"),
        ({"positions": [-6]}, InvalidPrompt, "prompt 1: the prompt has 5 tokens, so it has no position -6"),
        ({"positions": []}, InvalidAblation, "positions are 'all', 'last' or a list"),
        ({"positions": [True]}, InvalidAblation, "positions are 'all', 'last' or a list"),
        ({"positions": ""}, InvalidAblation, "names no positions"),
        ({"draws": 0}, InvalidAblation, "draws is 0"),
        ({"draws": True}, InvalidAblation, "draws is True"),
        ({"seed": -1}, InvalidAblation, "the seed is -1"),
        ({"imputations": []}, InvalidAblation, "name at least one imputation"),
        ({"imputations": ["resample", "resample"]}, InvalidAblation, "each only once"),
        ({"imputations": "resample"}, UnknownImputation, "`imputations` is a list"),
        ({"imputations": ["median"]}, UnknownImputation, "use one of 'zero', .*'values:FILE', or an `Imputation`"),
        ({"imputations": ["scale:x"]}, UnknownImputation, "scale:x"),
        ({"imputations": ["values:nowhere.npz"]}, InvalidResult, "no values can be read from nowhere.npz"),
        ({"reference": []}, InvalidPrompt, "the reference: there are no prompts"),
        ({"reference": "capitals"}, InvalidPrompt, "the reference: prompts are a list of records"),
        ({"reference": [{"text": "x"}]}, InvalidPrompt, "the reference: prompt 1, column prompt: it is missing"),
        ({"reference": [{"prompt": "Minas"}]}, InvalidPrompt, "the reference: prompt 1: this model has no token"),
        ({"reference": [{"prompt": "is" + " is" * 40}]}, InvalidPrompt, "the reference: prompt 1: .* takes at most 32"),
        (
            {"reference": [{"prompt": "Rome is"}]},
            InvalidPrompt,
            "the prompt has 5 tokens, and 'reference-mean-by-position' has",
        ),
        ({"records": RECORDS[:1]}, InvalidPrompt, "'reference-mean-by-position' takes z from other prompts, and"),
        ({"records": RECORDS[:1], "imputations": ["resample"]}, InvalidPrompt, "'resample' takes z from other prompts"),
    ],
)
def test_impossible_studies_are_refused_before_any_sweep(
    capitals: LoadedModel, arguments: dict[str, Any], error: type[Exception], reason: str
) -> None:
    call: dict[str, Any] = {"imputations": ["reference-mean-by-position"], "records": RECORDS, **arguments}
    with pytest.raises(error, match=reason) as caught:
        Study(capitals, call.pop("records"), call.pop("imputations"), **call)
    assert "\n" not in str(caught.value)


def test_reference_of_another_model_is_refused(capitals: LoadedModel) -> None:
    reference = Reference.of(capitals.model, ids_of(capitals, OTHERS), known=origin(capitals))
    Study(capitals, RECORDS, ["reference-mean"], reference=reference)
    weights = {**reference.provenance, "weights_sha256": "0" * 64}
    other = Reference(reference.counts, reference.sums, weights)
    with pytest.raises(InvalidAblation, match="the reference is of other weights .capitals, float32, 00000000. than"):
        Study(capitals, RECORDS, ["reference-mean"], reference=other)
    few = Reference(reference.counts, {layer: z[:, :3] for layer, z in reference.sums.items()})
    with pytest.raises(InvalidAblation, match="the layer has 12 heads of 8: they are of another model"):
        Study(capitals, RECORDS, ["reference-mean"], reference=few)
    missing = Reference(reference.counts, {0: reference.sums[0]})
    with pytest.raises(InvalidAblation, match="do not include layer 1"):
        Study(capitals, RECORDS, ["reference-mean"], reference=missing)


# ---- values of a file


def test_values_of_a_file_are_those_of_its_arrays(capitals: LoadedModel, tmp_path: Path) -> None:
    z = record_z(capitals.model, ids_of(capitals, RECORDS)[1])
    np.savez(tmp_path / "paris.npz", **{f"layer.{layer}": value.numpy() for layer, value in z.items()})  # type: ignore[arg-type]
    found = load_values(tmp_path / "paris.npz")
    assert found.name == "values:paris.npz" and found.by_position
    assert all(torch.equal(found.values[layer], value) for layer, value in z.items())
    one = sweep_prompts(capitals, RECORDS[:1], [f"values:{tmp_path / 'paris.npz'}"])
    other = sweep_prompts(capitals, RECORDS[:1], [Values(z, "values:paris.npz")])
    assert_results_equal(one, other, 0)
    assert one.provenance["values_sha256"] == other.provenance["values_sha256"]
    with pytest.raises(
        InvalidPrompt, match="the prompt has 6 tokens, and 'values:paris.npz' has values for 5 positions"
    ):
        Study(capitals, [RECORDS[0] | {"prompt": "Berlin is the capital of the"}], [found], positions=[0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "No data left in file|EOF"),
        (b"PK\x03\x04", "zip"),
        ({}, "values have as many positions"),
        ({"layer.0": np.zeros(3)}, "values are "),
        ({"layer.0": np.zeros((1, 2), dtype=np.int64)}, "isfinite|values are "),
        ({"layer.0": np.full((1, 2), np.nan)}, "its values in layer 0 are not finite"),
        ({"layer.x": np.zeros((1, 2))}, "its array 'layer.x' is not named layer.N"),
        ({"z": np.zeros((1, 2))}, "its array 'z' is not named layer.N"),
        ({"layer.0": np.array([None])}, "Object arrays"),
        ({"layer.0": np.array(["x"])}, "can't convert"),
        ({"layer.0": np.zeros((1, 2)), "layer.1": np.zeros((3, 1, 2))}, "as many positions"),
    ],
)
def test_damaged_values_are_a_named_error(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "v.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(InvalidResult, match=f"no values can be read from .*v.npz: .*({reason})") as caught:
        load_values(path)
    assert "\n" not in str(caught.value)


def test_imputation_object_and_name_are_one(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for imputation in ("channel-mean", ChannelMean()):
        study = Study(capitals, RECORDS[:1], [imputation])
        few_heads(study, monkeypatch)
        results.append(study.run())
    assert_results_equal(results[0], results[1], 0)
