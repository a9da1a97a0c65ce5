"""Files and tables of prompts: each row becomes a question, or an error that names its line and its column."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.errors import InvalidPrompt
from ablation.models import LoadedModel
from ablation.prompt_files import COLUMNS, PROMPTS_ONLY, SHIPPED, Columns, Row, as_rows, read_rows, valid_rows
from ablation.prompts import Question, continuation_ids, prompt_ids
from ablation.results import Result
from ablation.studies.experiment import sweep_prompts
from tests.test_cli import Run, run  # noqa: F401 (fixture)
from tests.test_output import quick  # noqa: F401 (fixture)

BERLIN: dict[str, Any] = {
    "prompt": "Berlin is the capital of",
    "target": " Germany",
    "control": " France",
    "group": "Europe",
}
ZERO = ["--imputation", "zero"]


def written(folder: Path, name: str, content: str | bytes) -> str:
    """Write a file of prompts, and return its path."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def questions(rows: Iterable[Row | InvalidPrompt]) -> list[Question]:
    """Return the questions of rows. Raises the first problem."""
    return [row.question for row in valid_rows(rows, skip_bad=False)[0]]


def problems(rows: Iterable[Row | InvalidPrompt]) -> list[str]:
    """Return what is wrong with the rows that are not questions."""
    return [str(row) for row in rows if isinstance(row, InvalidPrompt)]


# ---- files that can be read


def test_jsonl_row_becomes_a_question(tmp_path: Path) -> None:
    lines = [json.dumps(BERLIN), json.dumps({"prompt": "Paris is", "target": " a", "comment": 3, "control": None})]
    name = written(tmp_path, "p.jsonl", "\n".join(lines))
    assert questions(read_rows(name)) == [Question(**BERLIN), Question("Paris is", " a")]
    assert questions(read_rows(name, chat=True)) == [
        Question(**BERLIN, chat=True),
        Question("Paris is", " a", chat=True),
    ]


def test_csv_row_becomes_a_question(tmp_path: Path) -> None:
    text = "group,prompt,target,control,comment\nEurope,Berlin is the capital of, Germany, France,3\n,Paris is, a,,\n"
    assert questions(read_rows(written(tmp_path, "p.csv", text))) == [Question(**BERLIN), Question("Paris is", " a")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"prompt": "Zürich is", "target": " a"}\n{"prompt": "Paris is", "target": " b"}\n'),
        ("p.csv", "prompt,target\nZürich is, a\nParis is, b\n"),
    ],
)
@pytest.mark.parametrize("change", ["none", "BOM", "CRLF", "BOM and CRLF", "blank lines", "no last line break"])
def test_encodings_and_line_ends_do_not_matter(tmp_path: Path, name: str, text: str, change: str) -> None:
    expected = [Question("Zürich is", " a"), Question("Paris is", " b")]
    if "CRLF" in change:
        text = text.replace("\n", "\r\n")
    if change == "blank lines":
        first, *rest = text.splitlines()
        text = "\n\n".join([first, *rest]) + "\n\n\n"
    if change == "no last line break":
        text = text.rstrip("\n")
    assert questions(read_rows(written(tmp_path, name, ("\ufeff" if "BOM" in change else "") + text))) == expected


def test_spaces_of_a_cell_are_kept(tmp_path: Path) -> None:
    """A leading space makes another token."""
    name = written(tmp_path, "p.csv", 'prompt,target\n" Berlin is "," Germany "\n')
    assert questions(read_rows(name)) == [Question(" Berlin is ", " Germany ")]


def test_quoted_cell_may_hold_line_breaks_and_quotes(tmp_path: Path) -> None:
    text = 'prompt,target\n"He said ""yes"",\nand\nleft",", then"\nParis is, a\n'
    found = questions(read_rows(written(tmp_path, "p.csv", text)))
    assert found == [Question('He said "yes",\nand\nleft', ", then"), Question("Paris is", " a")]


def test_line_breaks_of_a_quoted_cell_are_kept(tmp_path: Path) -> None:
    """Another line break would be another token."""
    name = written(tmp_path, "p.csv", 'prompt,target\r\n"User: hi\r\nBot:\r", a\r\n')
    assert questions(read_rows(name)) == [Question("User: hi\r\nBot:\r", " a")]


def test_json_text_may_hold_line_separators(tmp_path: Path) -> None:
    """Only a line feed ends a line of JSON, unlike what `str.splitlines` does."""
    record: dict[str, Any] = {"prompt": "one\u2028two\x85three", "target": "\nfour"}
    name = written(tmp_path, "p.jsonl", json.dumps(record, ensure_ascii=False) + "\n" + json.dumps(BERLIN))
    assert questions(read_rows(name)) == [Question(**record), Question(**BERLIN)]


def test_columns_of_spans_and_of_a_source_are_read(tmp_path: Path) -> None:
    record = BERLIN | {"resample": "Rome is the capital of", "where": [[0, 6]]}
    expected = Question(**BERLIN, resample="Rome is the capital of", spans=((0, 6),))
    columns = Columns(spans="where")
    text = "prompt,target,control,group,resample,where\n"
    text += "Berlin is the capital of, Germany, France,Europe,Rome is the capital of,Berlin\n"
    for name, content in (("p.jsonl", json.dumps(record)), ("p.csv", text)):
        assert questions(read_rows(written(tmp_path, name, content), columns=columns)) == [expected]
    assert questions(as_rows([record], columns=columns)) == [expected]
    assert questions(as_rows([record])) == [replace(expected, spans=None)]


def test_reference_prompts_need_no_target(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "Rome is", "target": 3}), json.dumps({"prompt": "Paris is", "group": ["x"]})]
    name = written(tmp_path, "p.jsonl", "\n".join(lines))
    assert questions(read_rows(name, columns=PROMPTS_ONLY)) == [Question("Rome is"), Question("Paris is")]
    assert problems(as_rows([{"promt": "Rome is"}], columns=PROMPTS_ONLY)) == [
        "prompt 1, column promt: is this prompt?"
    ]


def test_columns_similar_to_resample_are_ignored() -> None:
    record = BERLIN | {"sample": 1, "example": 2}
    assert questions(as_rows([record])) == [Question(**BERLIN)]
    assert problems(as_rows([BERLIN | {"resampled": "x"}])) == ["prompt 1, column resampled: is this resample?"]


def test_empty_cells_of_optional_columns_are_missing(tmp_path: Path) -> None:
    text = "prompt,target,control,group\nBerlin is, a,,\n"
    assert questions(read_rows(written(tmp_path, "p.csv", text))) == [Question("Berlin is", " a", None, group=None)]


# ---- files that cannot be read


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.jsonl", "", "p.jsonl has no prompts"),
        ("p.jsonl", "\n \n", "p.jsonl has no prompts"),
        ("p.csv", "", "p.csv has no prompts"),
        ("p.csv", "prompt,target\n", "p.csv has no prompts"),
        ("p.jsonl", b"\xff\xfe\x00", "cannot read prompts from .*p.jsonl: 'utf-8' codec can't decode"),
        ("p.csv", 'prompt,target\n"Berlin is, a\n', "cannot read prompts from .*p.csv: unexpected end of data"),
        (
            "p.csv",
            "prompt;target\nBerlin is; a\n",
            "header has the one column 'prompt;target': is this a CSV with commas",
        ),
        ("p.csv", "prompt\ttarget\nBerlin is\t a\n", "is this a CSV with commas"),
        (
            "p.csv",
            "prompt,target,prompt\nBerlin is, a,x\n",
            "cannot read prompts from .*p.csv: it has several columns 'pro",
        ),
        ("p.csv", 'prompt,target\n"Berlin" is, a\n', "cannot read prompts from .*p.csv: ',' expected after '\"'"),
        ("p.txt", "Berlin is", "p.txt': pass a .jsonl or .csv file, or capitals or smollm2$"),
        ("p", "Berlin is", "p': pass a .jsonl or .csv file"),
        ("p.json", "[]", "p.json': pass a .jsonl or .csv file"),
    ],
)
def test_unreadable_file_is_refused(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason) as caught:
        list(read_rows(written(tmp_path, name, content)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.csv", "nowhere/x.csv", "folder.csv"])
def test_file_that_cannot_be_opened_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InvalidPrompt, match=f"cannot read prompts from .*{name}: (No such file|Is a directory)"):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "Berlin is", "target"', "p.jsonl, line 3: .*delimiter"),
        ("nonsense", "p.jsonl, line 3: Expecting value"),
        ('{"prompt": "a", "target": " a", "prompt": "b"}', "p.jsonl, line 3: it has several values of 'prompt'"),
        ('{"prompt": "a", "target": " a", "x": {"y": 1, "y": 1}}', "p.jsonl, line 3: it has several values of 'y'"),
        ("[" * 100_000, "p.jsonl, line 3: .*recursion"),
        ('["Berlin is", " a"]', r"p.jsonl, line 3: a record has columns, unlike \['Berlin is', ' a'\]"),
        ("3", "p.jsonl, line 3: a record has columns, unlike 3"),
        ("{}", "p.jsonl, line 3, column prompt: it is missing"),
        ('{"prompt": "Berlin is"}', "p.jsonl, line 3, column target: it is missing"),
        ('{"prompt": "Berlin is", "target": null}', "p.jsonl, line 3, column target: it is missing"),
        ('{"prompt": null, "target": " a"}', "p.jsonl, line 3, column prompt: it is missing"),
        ('{"prompt": NaN, "target": " a"}', "p.jsonl, line 3, column prompt: it is missing"),
        ('{"promt": "Berlin is", "target": " a"}', "p.jsonl, line 3, column promt: is this prompt?"),
        ('{"prompt": "Berlin is", "targets": " a"}', "p.jsonl, line 3, column targets: is this target?"),
        ('{"prompt": "Berlin is", "target": " a", "contrl": " b"}', "line 3, column contrl: is this control?"),
        ('{"prompt": "Berlin is", "target": " a", "groups": "x"}', "line 3, column groups: is this group?"),
        ('{"prompt": "", "target": " a"}', "p.jsonl, line 3, column prompt: it is empty"),
        ('{"prompt": "Berlin is", "target": ""}', "p.jsonl, line 3, column target: it is empty"),
        ('{"prompt": "Berlin is", "target": " a", "control": ""}', "p.jsonl, line 3, column control: it is empty"),
        ('{"prompt": ["Berlin"], "target": " a"}', r"line 3, column prompt: a text is needed, not \['Berlin'\]"),
        ('{"prompt": "Berlin is", "target": 4}', "p.jsonl, line 3, column target: a text is needed, not 4"),
        ('{"prompt": "Berlin is", "target": " a", "group": 4}', "line 3, column group: a text is needed, not 4"),
        (r'{"prompt": "\udcff", "target": " a"}', "p.jsonl, line 3, column prompt: the prompt is not valid UTF-8"),
    ],
)
def test_bad_jsonl_row_names_line_and_column(tmp_path: Path, line: str, reason: str) -> None:
    text = "\n".join([json.dumps(BERLIN), "", line, json.dumps(BERLIN)])
    rows = list(read_rows(written(tmp_path, "p.jsonl", text)))
    assert [isinstance(row, Row) for row in rows] == [True, False, True]
    with pytest.raises(InvalidPrompt, match=reason) as caught:
        questions(rows)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,target\nBerlin is, a\nBerlin is\n", "p.csv, line 3: it does not have 2 cells, as the header has"),
        ("prompt,target\nBerlin is, a\nBerlin, is, a\n", "p.csv, line 3: it does not have 2 cells, as the header has"),
        ("prompt,target\nBerlin is, a\n, a\n", "p.csv, line 3, column prompt: it is empty"),
        ("prompt,target\nBerlin is, a\nBerlin is,\n", "p.csv, line 3, column target: it is empty"),
        ("prompt,traget\nBerlin is, a\n", "p.csv, line 2, column traget: is this target?"),
        ("Prompt,target\nBerlin is, a\n", "p.csv, line 2, column Prompt: is this prompt?"),
        ("question,target\nBerlin is, a\n", "p.csv, line 2, column prompt: it is missing"),
        ('prompt,target\n"Berlin\nis", a\n\n, a\n', "p.csv, line 5, column prompt: it is empty"),
    ],
)
def test_bad_csv_row_names_line_and_column(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason) as caught:
        questions(read_rows(written(tmp_path, "p.csv", text)))
    assert "\n" not in str(caught.value)


# ---- shipped files


@pytest.mark.parametrize("name", ["capitals", "smollm2"])
def test_shipped_file_is_read_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = questions(read_rows(name))
    assert len(found) >= 50 and all(question.target and question.control for question in found)
    assert len({question.prompt for question in found}) == len(found)
    assert found == questions(read_rows(str(SHIPPED / f"{name}.jsonl")))


def test_shipped_files_have_only_known_columns() -> None:
    for path in SHIPPED.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert records and all(set(record) <= set(COLUMNS) for record in records), path


def test_own_folder_or_file_has_precedence_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("capitals").write_text("mine")
    with pytest.raises(InvalidPrompt, match="pass a .jsonl or .csv file"):
        list(read_rows("capitals"))


@pytest.mark.slow
def test_capitals_prompts_are_answered_by_capitals(capitals: LoadedModel) -> None:
    for question in questions(read_rows("capitals")):
        assert prompt_ids(capitals.tokenizer, question.prompt)
        for text in (question.target, question.control):
            assert text is not None and len(continuation_ids(capitals.tokenizer, text)) == 1


# ---- records of a program


def records_of_every_kind() -> dict[str, Any]:
    """The same two questions as each kind of table."""
    pd = pytest.importorskip("pandas")
    both = [BERLIN, {"prompt": "Paris is", "target": " a", "control": None, "group": None}]
    return {
        "dicts": both,
        "tuple": tuple(both),
        "generator": (record for record in both),
        "questions": [Question(**BERLIN), Question("Paris is", " a")],
        "mixed": [BERLIN, Question("Paris is", " a")],
        "frame": pd.DataFrame(both),
        "frame with NaN": pd.DataFrame(both).fillna(float("nan")),
        "frame with another index": pd.DataFrame(both, index=[7, 7]),
        "frame without missing columns": pd.DataFrame([BERLIN, {"prompt": "Paris is", "target": " a"}]),
        "NaN": [BERLIN, {"prompt": "Paris is", "target": " a", "control": float("nan")}],
    }


def test_records_of_every_kind_are_the_same_questions() -> None:
    for kind, records in records_of_every_kind().items():
        assert questions(as_rows(records)) == [Question(**BERLIN), Question("Paris is", " a")], kind


def test_frame_of_nullable_texts_is_read() -> None:
    """In a pandas column of strings, pd.NA stands for a missing value, and it has no truth value."""
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame([BERLIN, {"prompt": "Paris is", "target": " a"}]).astype("string")
    for records in (frame, frame.to_dict("records")):
        assert questions(as_rows(records)) == [Question(**BERLIN), Question("Paris is", " a")]


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (BERLIN, "prompts are a list of records, not a dict"),
        ("capitals", "prompts are a list of records, not a str"),
        (Question("Berlin is"), "prompts are a list of records, not a Question"),
        (None, "prompts are a list of records, not a NoneType"),
        (3, "prompts are a list of records, not a int"),
        ([], "there are no prompts"),
        ({}, "prompts are a list of records, not a dict"),
        (["Berlin is"], "prompt 1: a record has columns, unlike 'Berlin is'"),
        ([BERLIN, ("Berlin is", " a")], r"prompt 2: a record has columns, unlike \('Berlin is', ' a'\)"),
        ([BERLIN, BERLIN | {"target": float("nan")}], "prompt 2, column target: it is missing"),
        ([BERLIN | {"prompt": 3.5}], "prompt 1, column prompt: a text is needed, not 3.5"),
        ([BERLIN | {"prompt": np.zeros(2)}], r"prompt 1, column prompt: a text is needed, not array\(\[0., 0.\]\)"),
        ([{"promptt": "Berlin is", "target": " a"}], "prompt 1, column promptt: is this prompt?"),
        ([{1: "Berlin is", "target": " a"}], "prompt 1, column prompt: it is missing"),
    ],
)
def test_unusable_records_are_refused(records: Any, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason) as caught:
        questions(as_rows(records))
    assert "\n" not in str(caught.value)


# ---- bad rows that are left out


def test_skip_bad_leaves_out_rows_and_names_each(capitals: LoadedModel) -> None:
    unknown = {"prompt": "Minas is the capital of", "target": " Germany"}
    records = [BERLIN, {"prompt": "Berlin is"}, unknown, {**BERLIN, "prompt": "Paris is the capital of"}]
    with pytest.raises(InvalidPrompt, match="^prompt 2, column target: it is missing$"):
        sweep_prompts(capitals, records, ["zero"])
    reasons = "prompt 2, column target: it is missing; prompt 3: this model has no token for 'Minas' in the prompt"
    with pytest.warns(UserWarning, match=f"^2 prompts are left out: {reasons}$"):
        result = sweep_prompts(capitals, records, ["zero"], skip_bad=True)
    assert [prompt.prompt for prompt in result.prompts] == [BERLIN["prompt"], "Paris is the capital of"]
    assert result.prompts[0].group == "Europe"


def test_question_that_cannot_be_asked_names_its_row(capitals: LoadedModel) -> None:
    unknown = {"prompt": "Minas is the capital of", "target": " Germany"}
    with pytest.raises(InvalidPrompt, match="^prompt 2: this model has no token for 'Minas' in the prompt$"):
        sweep_prompts(capitals, [BERLIN, unknown])
    same = {**BERLIN, "control": " Germany"}
    with pytest.raises(InvalidPrompt, match="^prompt 2: target and control are the same tokens"):
        sweep_prompts(capitals, [BERLIN, same])


def test_no_usable_row_is_an_error(capitals: LoadedModel) -> None:
    with pytest.raises(
        InvalidPrompt, match="^no row is usable; the first problem: prompt 1, column target: it is miss"
    ):
        sweep_prompts(capitals, [{"prompt": "Berlin is"}], skip_bad=True)


@pytest.mark.usefixtures("quick")
def test_command_sweeps_a_file_and_skips_bad_rows(run: Run, tmp_path: Path) -> None:  # noqa: F811
    lines = [BERLIN, {"prompt": "Berlin is"}, BERLIN | {"prompt": "Minas is"}, BERLIN | {"prompt": "Paris is"}]
    name = written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, lines)))
    status, out, err = run("--prompts", name, *ZERO, "--out", "out")
    assert (status, out, err) == (2, "", "ablation: p.jsonl, line 2, column target: it is missing\n")
    assert not Path("out").exists()
    status, out, err = run("--prompts", name, "--skip-bad", *ZERO, "--out", "out")
    assert status == 0 and out.startswith("capitals: 2 prompts\n")
    of_file, of_model = (
        "line 2, column target: it is missing",
        "line 3: this model has no token for 'Minas' in the prompt",
    )
    assert err == f"ablation: note: 2 prompts are left out: p.jsonl, {of_file}; p.jsonl, {of_model}\n"
    assert [prompt.prompt for prompt in Result.load("out").prompts] == [BERLIN["prompt"], "Paris is"]


def test_reading_prompts_imports_no_torch() -> None:
    code = (
        "import sys, ablation.prompt_files as files\n"
        "assert list(files.read_rows('capitals'))\n"
        "print({'torch', 'transformers', 'pandas'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
