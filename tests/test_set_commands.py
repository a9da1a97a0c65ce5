"""`ablation set`, `curve` and `pairs`: what is asked is decided before torch is imported."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.cli import main
from ablation.commands import curve as curve_command
from ablation.commands import pairs as pairs_command
from ablation.commands import sets as set_command
from ablation.commands import study as study_command
from ablation.models import LoadedModel
from ablation.results import AblationKey, Result
from ablation.studies import experiment
from ablation.studies.experiment import sweep_prompts
from tests.comparing import ATOL
from tests.synthetic import synthetic_sets
from tests.test_checkpoint import assert_same_bits

Run = Callable[..., tuple[int, str, str]]
CITIES = {"Berlin": " Germany", "Paris": " France", "Rome": " Italy", "Oslo": " Norway"}
RECORDS = [{"prompt": f"{city} is the capital of", "target": country} for city, country in CITIES.items()]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder, with a stub for its figure. Returns status, stdout, stderr."""

    def draw(result: Result, folder: Path, *_: Any) -> None:
        (folder / "figure.png").write_bytes(b"a figure")

    for command in (set_command, curve_command, pairs_command):
        monkeypatch.setattr(command, "_draw", draw)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_cities(Path())

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def swept_cities(capitals: LoadedModel) -> Result:
    """The sweep of `RECORDS`, with zero and mean imputation."""
    return sweep_prompts(capitals, RECORDS, ["zero", "mean"])


@pytest.fixture
def result(swept_cities: Result, run: Run) -> str:
    """The folder of that sweep."""
    swept_cities.save("swept")
    return "swept"


@pytest.fixture(scope="session")
def odd(swept_cities: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files and results from which a curve cannot take everything, not to be changed."""
    folder = tmp_path_factory.mktemp("odd")
    write_cities(folder)
    for name, text in {"order": "L0H8 L0H9", "empty": "", "mlps": "L0H8 MLP3"}.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "latin.txt").write_bytes(b"L0H8 \xe9")
    swept_cities.save(folder / "swept")
    synthetic_sets([AblationKey(((0, 0), (0, 1)), "zero")]).save(folder / "sets")
    few = swept_cities.of_prompt(0)
    loss: dict[str, Any] = {"clean": {"loss": np.zeros(1)}, "ablated": {"loss": np.zeros((1, len(few.ablations)))}}
    replace(few, **loss).save(folder / "text")
    replace(few, prompts=tuple(replace(of, prompt=None) for of in few.prompts)).save(folder / "without-texts")
    made = {name: value for name, value in few.provenance.items() if name != "source"}
    replace(few, provenance=made).save(folder / "without-model")
    own = tuple(key._replace(imputation={"zero": "half"}.get(key.imputation, "x")) for key in few.ablations)
    replace(few, ablations=own).save(folder / "own-imputation")
    return folder


def write_cities(folder: Path) -> None:
    (folder / "cities.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


def files(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["set"], "name at least one set of heads: ablation set L9"),
        (["set", ""], "'' names no heads"),
        (["set", "L0H8", "9.6"], "'9.6' is no head, layer or MLP: did you mean L9H6?"),
        (["set", "--each", "H8"], "'H8' is no head, layer or MLP"),
        (["set", "--heads-file", "nowhere.txt"], "cannot read sets of heads from nowhere.txt: No such file"),
        (["set", "--heads-file", "."], "cannot read sets of heads from .: Is a directory"),
        (["set", "--heads-file", "cities.jsonl"], "cities.jsonl, line 1: "),
        (["set", "L0", "--draws", "2"], "--draws is for the imputation resample"),
        (["set", "L0", "--seed", "2"], "--seed is for the imputation resample"),
        (["set", "L0", "--prompts", "capitals", "--prompt", "x"], "--prompts and --prompt exclude each other"),
        (["set", "L0", "--max-rows", "1"], "--max-rows is 1: a pass needs 2 rows"),
        (["set", "L0", "--imputation", "resample"], "the imputation resample takes z from other prompts"),
        (["set", "L0", "--prompt", ""], "prompt is empty"),
        (["set", "L0", "--model", "nowhere/at/all"], "nowhere/at/all"),
        (["pairs", "--by", "kl"], "--by ranks the heads of --top: pass --top N"),
        (["pairs", "--pairs-of", "H3"], "'H3' is no head, layer or MLP"),
        (["pairs", "--seed", "1"], "--seed is for the imputation resample"),
        (["curve"], "pass the folder of a sweep, a file of heads, or --greedy, and only one of them"),
        (["curve", "swept", "--greedy"], "pass the folder of a sweep, a file of heads, or --greedy, and only one"),
        (["curve", "nowhere"], "there is no nowhere: pass the folder of a sweep, or a file of heads"),
        (["curve", "swept", "--k", "0"], "none below 1"),
        (["curve", "swept", "--k", "1,2,x"], "--k is a list of sizes, such as 1,2,4,8 or 1,2,4,..., not '1,2,x'"),
        (["curve", "swept", "--k", "1,145"], "there is no set of 145 heads: 144 heads are ranked"),
        (["curve", "swept", "--split", "0.1"], "a split of 0.1 leaves 0 of 4 prompts for the ranking"),
        (["curve", "swept", "--split", "0.5", "--prompt", "x"], "--prompts or --prompt name others"),
        (["curve", "swept", "--target", " x"], "--target is not for the prompts of RESULT"),
        (["curve", "swept", "--control", " x"], "--control is not for the prompts of RESULT"),
        (["curve", "swept", "--chat"], "--chat is not for the prompts of RESULT"),
        (["curve", "swept", "--skip-bad"], "--skip-bad leaves out prompts of a file"),
        (["curve", "swept", "--draws", "2"], "--draws is for the imputation resample"),
        (["curve", "swept", "--positions", "subject"], "of the column 'subject' of its prompts: pass their file"),
        (["curve", "--greedy", "--k", "0"], "none below 1"),
        (["curve", "--greedy", "--split", "0.5"], "a split of 0.5 leaves 0 of 1 prompts for the ranking"),
        (["curve", "order.txt", "--by", "kl"], "--by is for a ranking: order.txt has an order already"),
        (["curve", "order.txt", "--split", "0.5"], "--split is for a ranking: order.txt has an order already"),
        (["curve", "empty.txt"], "'' names no heads"),
        (["curve", "mlps.txt"], "mlps.txt: an order names heads, and no MLPs"),
        (["curve", "cities.jsonl"], "is no head, layer or MLP"),
        (["curve", "latin.txt"], "cannot read heads from latin.txt: "),
        (
            ["curve", "sets", "--model", "capitals"],
            "heads are ranked by a sweep of single heads; this is a result of sets",
        ),
        (["curve", "text"], "the result has no target_probability: heads are ranked by a sweep of prompts"),
        (["curve", "without-texts"], "the result in without-texts has no texts of its prompts: pass --prompts"),
        (["curve", "without-model", "--k", "1"], "does not name its model: pass --model"),
        (["curve", "own-imputation"], "the result is of the imputation 'half': name one with --imputation"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(
    odd: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(odd)
    before = files(".")
    monkeypatch.setattr("ablation.models.load", lambda *_, **__: pytest.fail("a model is loaded"))
    status, (out, err) = main(arguments), capsys.readouterr()
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1 and err.startswith("ablation: ")
    assert files(".") == before, "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curve", "x", "--by", "size"], "argument --by: invalid choice: 'size'"),
        (["curve", "x", "--random", "-1"], "argument --random: it is a whole number, at least 0, not '-1'"),
        (["curve", "x", "--random", "1.5"], "argument --random: it is a whole number"),
        (["curve", "x", "--split", "1"], "argument --split: it is a share between 0 and 1, such as 0.5, not '1'"),
        (["curve", "x", "--split", "nan"], "argument --split: it is a share between 0 and 1"),
        (["curve", "x", "--split", "half"], "argument --split: it is a share between 0 and 1"),
        (["pairs", "--top", "0"], "argument --top: it is a whole number, at least 1, not '0'"),
        (["pairs", "L0H8"], "unrecognized arguments: L0H8"),
        (["set", "L0", "--imputation", "median"], "argument --imputation: invalid choice: 'median'"),
        (["set", "L0", "--heads-file"], "argument --heads-file: expected one argument"),
    ],
)
def test_wrong_options_are_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["set", "L12"], "no layer 12: the model has 12 layers, 0 to 11"),
        (["set", "L0H8", "--each", "KV0.12"], "no key/value head 12"),
        (["pairs", "--pairs-of", "L0H12"], "no head 12"),
        (["curve", "order.txt"], "no head 12"),
        (["curve", "twice.txt", "--k", "3"], "there is no set of 3 heads: 2 heads are ranked"),
        (["curve", "--greedy", "--k", "145"], "there is no set of 145 heads: 144 heads are ranked"),
    ],
)
def test_heads_that_the_model_lacks_are_one_line(run: Run, arguments: list[str], message: str) -> None:
    Path("order.txt").write_text("L0H8 L0H12")
    Path("twice.txt").write_text("L0H8 L0H9 L0H8")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    assert files(".") == {"cities.jsonl", "order.txt", "twice.txt"}


# ---- ablation set


def test_set_measures_named_sets(run: Run, capitals: LoadedModel) -> None:
    Path("circuits.txt").write_text("# found by hand\nearly: L0H8 L0H9\nL0H8+L0H9\nL1\n")
    arguments = ["set", "L0H8", "L0H9 L0H8", "L1", "MLP3", "--heads-file", "circuits.txt", "--each", "KV2.*"]
    status, out, err = run(*arguments, "--imputation", "zero", "--out", "out")
    assert (status, err) == (0, "")
    assert files("out") >= {"sweep.npz", "sweep.json", "results.csv", "figure.png"}
    found = Result.load("out")
    titles = ["L0H8", "L0H8+L0H9", "L1", "MLP3", "early", *(f"KV2.{head}" for head in range(12))]
    assert [key.title for key in found.ablations] == titles, "each set once"
    sets = {key.title: key.heads for key in found.ablations}
    assert sets["L0H8+L0H9"] == sets["early"] == ((0, 8), (0, 9)) and sets["L1"] == tuple((1, n) for n in range(12))
    question = {"prompt": "Berlin is the capital of", "target": " Germany", "control": " France"}
    same = sweep_prompts(capitals, [question], ["zero"], sets=sets)
    for metric in ("target_log_probability", "kl", "control_log_probability"):
        np.testing.assert_allclose(found.ablated[metric], same.ablated[metric], rtol=0, atol=ATOL["float32"])
    assert out.startswith("capitals: 'Berlin is the capital of'\n") and "Arrays, table" in out
    for title in titles:
        assert re.search(rf"^  {re.escape(title)} ", out, re.MULTILINE), title
    table = [(row["set"] or row["heads"], row["heads"]) for row in rows("out/results.csv") if row["metric"] == "kl"]
    assert table == [(key.title, key.label) for key in found.ablations]


def test_set_prints_the_findings_as_json(run: Run) -> None:
    status, out, err = run("set", "L0", "L0H8 L0H9", "--prompts", "cities.jsonl", "--json", "--out", "out")
    found, result = json.loads(out), Result.load("out")
    assert (status, err, found["prompts"]) == (0, "", 4)
    assert [(of["name"], of["imputation"]) for of in found["sets"]] == [
        (key.title, key.imputation) for key in result.ablations
    ]
    for number, of in enumerate(found["sets"]):
        assert of["target_probability"]["mean"] == pytest.approx(result.change("target_probability")[:, number].mean())
        assert of["kept"]["count"] == result.kept[:, number].sum() and of["kept"]["of"] == 4
        assert of["replaced"] == result.replaced[:, number].sum()
    assert found["provenance"]["asked"]["study"]["sets"] == [["L0", "L0"], ["", "L0H8+L0H9"]]


@pytest.mark.end_to_end
def test_default_folders_are_of_each_study(run: Run) -> None:
    commands = [["set", "L0H8"], ["set", "L0H9"], ["pairs", "--pairs-of", "L0H8"], ["pairs", "--top", "2"]]
    commands += [["curve", "--greedy", "--k", "1", "--random", n] for n in ("0", "1")]
    for command in commands:
        assert run(*command, "--imputation", "zero")[0] == 0
    made = files(".") - {"cities.jsonl"}
    assert len(made) == len(commands), "no study replaces another"
    kinds = sorted(name.removeprefix("ablation-").split("-")[0] for name in made)
    assert kinds == ["curve", "curve", "pairs", "pairs", "set", "set"]
    assert run(*commands[0], "--imputation", "zero")[0] == 0 and files(".") - {"cities.jsonl"} == made


@pytest.mark.end_to_end
def test_other_study_in_a_folder_is_kept_unless_overwritten(run: Run) -> None:
    for arguments in (["set", "L0H8"], ["pairs", "--top", "2"], ["curve", "--greedy", "--k", "1", "--random", "0"]):
        assert run(*arguments, "--imputation", "zero", "--out", arguments[0])[0] == 0
    for arguments in (
        ["set", "L0H9", "--out", "set"],
        ["set", "L0H8", "--out", "pairs"],
        ["pairs", "--top", "3", "--out", "pairs"],
        ["pairs", "--top", "2", "--by", "kl", "--out", "pairs"],
        ["curve", "--greedy", "--k", "2", "--out", "curve"],
        ["curve", "--greedy", "--k", "1", "--random", "0", "--by", "kl", "--out", "curve"],
    ):
        before = Path(arguments[-1], "sweep.npz").read_bytes()
        status, out, err = run(*arguments, "--imputation", "zero")
        assert (status, out) == (2, "") and "holds the result of another question" in err
        assert Path(arguments[-1], "sweep.npz").read_bytes() == before
    assert run("set", "L0H9", "--imputation", "zero", "--out", "set", "--overwrite")[0] == 0
    assert Result.load("set").ablations[0].label == "L0H9"


# ---- interruptions and closed pipes


@pytest.mark.parametrize(
    "arguments",
    [
        ["set", "L9", "L10H3"],
        pytest.param(["pairs", "--pairs-of", "L0H8"], marks=pytest.mark.end_to_end),
        pytest.param(["curve", "swept", "--k", "1,2"], marks=pytest.mark.end_to_end),
    ],
)
def test_interrupted_command_goes_on_with_the_same_bits(
    run: Run, result: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    prompts = [] if arguments[0] == "curve" else ["--prompts", "cities.jsonl"]
    real, swept = experiment.run, []

    def interrupted(*positional: Any, **options: Any) -> Result:
        swept.append(positional[1])
        if len(swept) == 3:
            raise KeyboardInterrupt
        return real(*positional, **options)

    monkeypatch.setattr(experiment, "run", interrupted)
    status, out, err = run(*arguments, *prompts, "--out", "out")
    assert (status, out) == (130, "") and "kept in out" in err and err.count("\n") == 1
    assert run(*arguments, *prompts, "--out", "out")[0] == 0
    assert len(swept) == 3 + 2 and not Path("out/unfinished").exists()
    assert run(*arguments, *prompts, "--out", "whole")[0] == 0
    assert_same_bits(Result.load("out"), Result.load("whole"))


def test_closed_pipe_leaves_a_whole_result(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(study_command, "_question_line", closed)  # as the findings are printed
    for arguments in (["set", "L0"], ["pairs", "--top", "2"], ["curve", "--greedy", "--k", "1", "--random", "0"]):
        assert run(*arguments, "--out", arguments[0])[0] == 141
        assert "figure.png" in files(arguments[0]) and Result.load(arguments[0]).prompts


def test_figure_that_cannot_be_drawn_leaves_the_result(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(result: Result, folder: Path, *_: Any) -> None:
        (folder / "half.png").write_bytes(b"")
        raise MemoryError("too large")

    monkeypatch.setattr(set_command, "_draw", failed)
    status, out, err = run("set", "L0", "--out", "out")
    assert status == 2 and "L0" in out and "the arrays are in out, but no figures: MemoryError: too large" in err
    assert Result.load("out").ablations[0].title == "L0" and "half.png" not in files("out")


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("arguments", "figure"),
    [
        (["set", "L0", "L0H8 L0H9", "MLP3"], "sets.png"),
        (["pairs", "--top", "4"], "interactions.png"),
        (["curve", "--greedy", "--k", "1,2", "--random", "2"], "curve.png"),
    ],
)
def test_commands_draw_in_a_new_process(tmp_path: Path, arguments: list[str], figure: str) -> None:
    """Print into a pipe whose reader stops early."""
    command = f"{sys.executable} -m ablation {' '.join(map(repr, arguments))} --out out | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)  # noqa: S607
    assert done.stdout == "capitals: 'Berlin is the capital of'\n" and "Traceback" not in done.stderr
    assert (tmp_path / "out" / figure).read_bytes().startswith(b"\x89PNG")


def test_sets_of_single_heads_equal_the_sweep(run: Run, swept_cities: Result) -> None:
    arguments = ["set", "--each", "L*H*", "--prompts", "cities.jsonl", "--imputation", "zero", "--out", "out"]
    assert run(*arguments)[0] == 0
    found = Result.load("out")
    own = [n for n, key in enumerate(swept_cities.ablations) if key.imputation == "zero"]
    assert found.ablations == tuple(swept_cities.ablations[n] for n in own)
    for metric in ("target_log_probability", "kl"):
        np.testing.assert_allclose(
            found.ablated[metric], swept_cities.ablated[metric][:, own], rtol=0, atol=ATOL["float32"]
        )


def test_name_of_a_set_cannot_control_the_terminal(run: Run) -> None:
    Path("names.txt").write_text("a\x1b[31mred: L0H8\n" + 50 * "long " + ": L0H9\n")
    status, out, err = run("set", "--heads-file", "names.txt", "--imputation", "zero", "scale:1", "--out", "out")
    assert (status, err) == (0, "") and "\x1b" not in out and "  a\\x1b[31mred  " in out
    assert max(map(len, out.splitlines())) < 130
    assert [key.name[:5] for key in Result.load("out").ablations] == ["a\x1b[31", "long "] * 2
