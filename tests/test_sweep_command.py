"""`ablation sweep` on files: what is asked is decided before a model is loaded, and every kind of study is saved."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ablation.choices import OF_REFERENCE
from ablation.cli import main
from ablation.results import Result
from tests.comparing import ATOL
from tests.test_cli import Run, run  # noqa: F401 (fixture)

LINES = [
    {"prompt": "Berlin is the capital of", "target": " Germany", "group": "Europe"},
    {"prompt": "Tokyo is the capital of", "target": " Japan", "control": " the country", "group": "Asia"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of two prompts."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of some 50 tokens."""
    path = tmp_path / "text.txt"
    path.write_text("Berlin is the capital of Germany. Paris is the capital of France. " * 4 + "Rome")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "capitals", "--prompt", "x"], "--prompts and --prompt exclude each other"),
        (["--prompts", "capitals", "--text", "x"], "--prompts and --text exclude each other"),
        (["--prompts", "capitals", "--target", "x"], "--prompts and --target exclude each other"),
        (["--text", "x", "--control", "y"], "--text and --control exclude each other"),
        (["--text", "nowhere.txt"], "cannot read the text nowhere.txt: No such file"),
        (["--text", "."], "cannot read the text .: Is a directory"),
        (["--stride", "3"], "--stride is a number of tokens"),
        (["--text", "x", "--stride", "0"], "--stride is a number of tokens, of at least 1"),
        (["--text", "x", "--chat"], "--chat is for questions"),
        (["--text", "x", "--top"], "--top is for questions"),
        (["--top", "0"], "--top is 0"),
        (["--text", "x", "--skip-bad"], "--skip-bad leaves out prompts of a file"),
        (["--draws", "2"], "--draws is for the imputation resample"),
        (["--seed", "2", "--imputation", "zero"], "--seed is for the imputation resample"),
        (["--reference", "capitals"], "--reference is for an --imputation of other prompts: reference-mean, "),
        (
            ["--imputation", "reference-mean"],
            "the imputation reference-mean takes z from other prompts: pass them with",
        ),
        (["--imputation", "zero", "resample"], "the imputation resample takes z from other prompts: pass them with"),
        (
            ["--imputation", "reference-mean", "--reference", "x"],
            "--reference: cannot read prompts from 'x': pass a .jso",
        ),
        (
            ["--imputation", "reference-mean", "--reference", "x.csv"],
            "--reference: cannot read prompts from x.csv: No s",
        ),
        (["--imputation", "reference-mean", "--reference", "x.npz"], "cannot read the reference x.npz: No such file"),
        (["--imputation", "reference-mean", "--reference", "."], "--reference: cannot read prompts from '.'"),
        (["--positions", "subject"], "or a column of a file that --prompts names, not 'subject'"),
        (["--positions", "1.5"], "'1.5' names no positions"),
        (["--positions", ""], "'' names no positions"),
        (["--positions", "-9,0"], "the prompt has 5 tokens, so it has no position -9"),
        (["--prompts", "capitals", "--positions", "subjct"], "capitals.jsonl, line 1, column subjct: it is missing"),
        (["--prompts", "prompts.txt"], "pass a .jsonl or .csv file, or capitals or smollm2"),
    ],
)
def test_impossible_questions_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_empty_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert main(["sweep", "--text", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "is empty" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_prompts_are_swept_summarised_and_saved(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sweep", "--prompts", str(prompts), "--imputation", "zero", "--top", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("capitals: 2 prompts\n") and "2 of 2 correct" in printed and "Asia" in printed
    files = {path.name for path in out.iterdir()}
    assert {"sweep.npz", "sweep.json", "results.csv", "top_tokens.csv", "strongest.png"} <= files
    assert not {"unfinished", "agreement.png"} & files
    result = Result.load(out)
    assert [prompt.group for prompt in result.prompts] == ["Europe", "Asia"]
    assert [prompt.control_text for prompt in result.prompts] == [" the", " the country"]
    assert result.provenance["asked"]["prompts"] == 2


@pytest.mark.slow
@pytest.mark.end_to_end
def test_same_prompts_replace_their_result_and_others_do_not(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["sweep", "--prompts", str(prompts), "--imputation", "zero", "--out", str(out), "--json"]
    assert main(command) == 0 and main(command) == 0
    found = json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "\n}")
    assert found["prompts"] == 2 and found["groups"].keys() == {"Europe", "Asia"}
    prompts.write_text(json.dumps(LINES[0]) + "\n")
    assert main(command) == 2
    assert "holds the result of another question" in capsys.readouterr().err
    assert len(Result.load(out).prompts) == 2


@pytest.mark.slow
@pytest.mark.end_to_end
def test_text_is_swept_summarised_and_saved(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", "--text", str(text), "--stride", "8", "--imputation", "mean", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    result = Result.load(out)
    tokens = 8 * len(result.prompts)
    assert f"loss {result.clean['loss'].mean():.4f} nats per token, over {tokens} tokens" in printed
    assert {"loss.png", "results.csv"} <= {path.name for path in out.iterdir()}
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scored_tokens"] == tokens


@pytest.mark.end_to_end
def test_progress_shows_prompts_rate_and_time_left(prompts: Path, tmp_path: Path) -> None:
    """On a terminal, which `script` provides."""
    sweep = f"{sys.executable} -m ablation sweep --prompts {prompts} --imputation zero --out {tmp_path / 'out'}"
    command = f"stty cols 100 rows 40; {sweep}"
    done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True)  # noqa: S607
    assert done.returncode == 0, done.stdout
    assert "of 2 prompts |" in done.stdout and re.search(r"(prompt/s|s/prompt), [\d:]+ left", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--imputation", "median"], "argument --imputation: invalid choice: 'median'"),
        (["--imputation", "scale:x"], "argument --imputation: 'scale:x' names no finite number"),
        (["--imputation", "values:nowhere.npz"], "argument --imputation: 'values:nowhere.npz' names no file"),
        (["--imputation", "resample", "--draws", "0"], "argument --draws: it is a whole number, at least 1, not '0'"),
        (["--imputation", "resample", "--seed", "-1"], "argument --seed: it is a whole number, at least 0, not '-1'"),
        (["--imputation", "resample", "--seed", "1.5"], "argument --seed: it is a whole number"),
    ],
)
def test_unknown_choice_is_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sweep", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.end_to_end
def test_every_imputation_is_swept_side_by_side(run: Run, tmp_path: Path) -> None:  # noqa: F811
    others = tmp_path / "others.csv"
    others.write_text("prompt\nRome is the capital of\nOslo is the capital of\nQuito is the capital of\n")
    np.savez(tmp_path / "own.npz", **{f"layer.{layer}": np.zeros((12, 8)) for layer in range(12)})  # type: ignore[arg-type]
    names = ["zero", "mean", "channel-mean", *OF_REFERENCE, "resample", "scale:0.5", f"values:{tmp_path / 'own.npz'}"]
    arguments = [
        "--imputation",
        *names,
        "--reference",
        str(others),
        "--positions",
        "-2,-1",
        "--draws",
        "2",
        "--top",
        "2",
    ]
    status, printed, err = run(*arguments, "--out", "out")
    assert (status, err) == (0, "") and "scale:0.5" in printed and " at -2,-1" in printed
    result = Result.load("out")
    assert result.imputations == (*names[:-1], "values:own.npz")
    assert {key.positions for key in result.ablations} == {"-2,-1"} and (result.calls == 1).all()
    assert (result.replaced == 2 * 8).all(), "two tokens of 8 channels"
    of = {
        name: result.ablated["kl"][0, [key.imputation == name for key in result.ablations]]
        for name in result.imputations
    }
    assert np.allclose(of["values:own.npz"], of["zero"], rtol=0, atol=ATOL["float32"])
    asked = result.provenance["asked"]
    assert (asked["positions"], asked["draws"], asked["seed"]) == ("-2,-1", 2, 0)
    assert asked["reference"]["prompts"] == 3 and set(asked["values_sha256"]) == {names[-1]}
    with Path("out/results.csv").open(encoding="utf-8", newline="") as file:
        assert {row["positions"] for row in csv.DictReader(file)} == {"-2,-1"}
    assert "reference.npz" in json.loads(Path("out/sweep.json").read_text())["files"]
    assert run(*arguments, "--out", "out")[0] == 0, "the same command replaces its result"
    for other in (["--seed", "1"], ["--draws", "1"], ["--positions", "last"], ["--reference", "capitals"]):
        status, _, err = run(*arguments, *other, "--out", "out")
        assert status == 2 and "holds the result of another question" in err


@pytest.mark.slow
def test_saved_reference_is_used_again(run: Run, tmp_path: Path) -> None:  # noqa: F811
    others = tmp_path / "others.csv"
    others.write_text("prompt\nRome is the capital of\nOslo is the capital of\n")
    mean = ["--imputation", "reference-mean"]
    assert run(*mean, "--reference", str(others), "--out", "one")[0] == 0
    assert run(*mean, "--reference", "one/reference.npz", "--out", "two")[0] == 0
    one, two = Result.load("one"), Result.load("two")
    assert all(np.array_equal(one.ablated[name], two.ablated[name]) for name in one.ablated)
    assert one.provenance["reference"] == two.provenance["reference"]
    assert not Path("two/reference.npz").exists(), "it is kept where it was computed"
    status, out, err = run(*mean, "--reference", "one/reference.npz", "--dtype", "float64", "--out", "three")
    assert (status, out) == (2, "") and "the reference is of other weights (capitals, float32, " in err
    Path("one/reference.npz").write_bytes(b"PK")
    status, out, err = run(*mean, "--reference", "one/reference.npz", "--out", "three")
    assert (status, out) == (2, "") and "no reference can be read from one/reference.npz" in err


def test_column_of_a_file_names_the_positions(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "cities.csv"
    path.write_text(
        "prompt,target,subject,resample\n"
        "Berlin is the capital of, Germany,Berlin,Rome is the capital of\n"
        "The capital of France is, Paris,France,The capital of Italy is\n"
    )
    arguments = ["--prompts", str(path), "--imputation", "resample", "--positions", "subject", "--out", "out"]
    assert run(*arguments)[0] == 0
    result = Result.load("out")
    assert [result.of_prompt(index).provenance["positions"] for index in (0, 1)] == [[0], [3]]
    assert {key.positions for key in result.ablations} == {"subject"} and (result.replaced == 8).all()
    sources = [result.of_prompt(index).provenance["resampled_from"] for index in (0, 1)]
    assert sources == [["Rome is the capital of"], ["The capital of Italy is"]]
    path.write_text("prompt,target,subject\nBerlin is the capital of, Germany,Paris\n")
    status, _, err = run(*arguments, "--overwrite")
    assert status == 2 and "cities.csv, line 2, column subject: 'Paris' does not occur in the prompt" in err


@pytest.mark.slow
@pytest.mark.end_to_end
def test_text_takes_a_reference_and_positions(run: Run, text: Path) -> None:  # noqa: F811
    text.write_text("Berlin is the capital of Germany. Paris is the capital of France.")
    arguments = [
        "--text",
        str(text),
        "--stride",
        "4",
        "--imputation",
        "reference-mean",
        "resample",
        "--positions",
        "-1",
    ]
    assert run(*arguments, "--out", "out")[0] == 0
    result = Result.load("out")
    assert {key.positions for key in result.ablations} == {"last"} and Path("out/reference.npz").exists()
    text.write_text("Berlin is Minas Tirith")
    status, _, err = run("--text", str(text))
    assert status == 2 and err.startswith(f"ablation: --text {text}: the text cannot be used as a prompt")


def test_results_at_other_positions_do_not_match(run: Run, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    for positions in ("all", "last", "-1"):
        assert run("--imputation", "zero", "--positions", positions, "--out", positions)[0] == 0
    assert main(["diff", "all", "last"]) == 2
    assert "no ablation in common" in capsys.readouterr().err
    assert main(["diff", "last", "./-1"]) == 0
