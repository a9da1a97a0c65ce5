"""`ablation sweep` on files: what is asked is decided before a model is loaded, and every kind of study is saved."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ablation.cli import main
from ablation.results import Result

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
