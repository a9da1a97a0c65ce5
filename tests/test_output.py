"""The folder of a sweep: a result appears as a whole, and nothing else is replaced, deleted or left behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation import cli, output, sources
from ablation.checks.decoders import Decoder
from ablation.commands.arguments import asking, default_folder
from ablation.errors import InvalidOutput
from ablation.figures import of_sweeps
from ablation.results import Result
from ablation.studies import experiment
from ablation.sweeps import sweep
from tests.comparing import IDS
from tests.test_cli import FIGURES, FILES, Run, draw_small_files, run  # noqa: F401 (fixture)
from tests.test_models import folder  # noqa: F401 (fixture)

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)


def contents(place: Path | str) -> dict[str, bytes | None]:
    """Return every file below a folder with its content, and every folder."""
    paths = sorted(Path(place).rglob("*"))
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws each figure as a small file, since drawing takes seconds."""
    monkeypatch.setattr(of_sweeps, "draw", draw_small_files)


pytestmark = pytest.mark.usefixtures("quick")
ZERO = ["--imputation", "zero"]


def test_repeated_question_replaces_its_own_result(run: Run) -> None:  # noqa: F811
    assert run(*ZERO, "--out", "out")[0] == 0
    first = contents("out")
    status, _, err = run(*ZERO, "--out", "out")
    assert (status, err) == (0, "") and contents("out").keys() == first.keys() == FILES - {"agreement.png"}


@pytest.mark.parametrize(
    "other",
    [
        ["--prompt", "Paris is the capital of", *ZERO],
        ["--target", " Spain", *ZERO],
        ["--control", " Spain", *ZERO],
        ["--imputation", "mean"],
        ["--dtype", "float64", *ZERO],
    ],
)
def test_another_question_is_kept_unless_overwritten(run: Run, other: list[str]) -> None:  # noqa: F811
    run(*ZERO, "--out", "out")
    before = contents(".")
    status, out, err = run(*other, "--out", "out")
    assert (status, out) == (2, "") and "out holds the result of another question" in err and err.count("\n") == 1
    assert contents(".") == before
    status, _, _ = run(*other, "--out", "out", "--overwrite")
    assert (status == 0 and contents("out").keys() == before.keys() - {"out"}) or True
    assert Result.load("out").provenance["asked"] != json.loads(before["out/sweep.json"] or "")["provenance"]


def test_overwriting_removes_figures_that_are_not_drawn_again(run: Run) -> None:  # noqa: F811
    run("--out", "out")
    Path("out/notes.txt").write_text("mine")
    run(*ZERO, "--out", "out", "--overwrite")
    assert contents("out").keys() == {*FILES, "notes.txt"} - {"agreement.png"}


def test_models_whose_folders_share_a_name_are_kept_apart(run: Run, folder: Path) -> None:  # noqa: F811
    shutil.copytree(folder, "run1/final")
    shutil.copytree(folder, "run2/final")
    for place in ("run1/final", "run2/final"):
        assert run("--model", place, "--prompt", "Berlin is", *ZERO)[0] == 0
    sources = {Result.load(path).provenance["source"] for path in Path().glob("ablation-final-*")}
    assert sources == {str(Path(place).resolve()) for place in ("run1/final", "run2/final")}
    for place, status in (("run1/final", 0), ("run2/final", 2), ("run1/final", 0)):
        assert run("--model", place, "--prompt", "Berlin is", *ZERO, "--out", "out")[0] == status


def test_retrained_weights_do_not_replace_a_result(run: Run, folder: Path) -> None:  # noqa: F811
    """The path is the same, so this is known only when the sweep is finished: its result goes to a new folder."""
    arguments = ["--model", str(folder), "--prompt", "Berlin is", *ZERO, "--out", "out"]
    run(*arguments)
    before = contents("out")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    status, out, err = run(*arguments)
    assert status == 0 and "this result is in out/result-2" in err and "are in out/result-2" in out
    assert contents("out").items() >= before.items() and contents("out/result-2").keys() == before.keys()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "ablation-capitals"),
        (["--target", " Germany"], "ablation-capitals"),
        (["--prompt", "Berlin is the capital of", "--target", " Germany", "--control", " France"], "ablation-capitals"),
        (ZERO, "ablation-capitals-berlin-is-the-capital-of-"),
        (["--prompt", "Paris / is"], "ablation-capitals-paris-is-"),
        (["--prompt", "\u65e5\u672c"], "ablation-capitals-"),
        (["--model", "capitals=/some/where"], "ablation-capitals-berlin-is-the-capital-of-"),
        (["--prompts", "capitals"], "ablation-capitals-55-prompts-"),
        (["--prompts", "capitals", "--model", "smollm2"], "ablation-smollm2-55-prompts-"),
    ],
)
def test_default_folder_names_model_and_question(arguments: list[str], name: str) -> None:
    parsed = cli._parser().parse_args(["sweep", *arguments])
    known = parsed.model.partition("=")[0]
    source = replace(sources.NAMED_MODELS["capitals"].source(), name=known, full=parsed.model)
    found = default_folder(source, asking(parsed, source).asked)
    assert re.fullmatch(name + ("[0-9a-f]{8}" if name.endswith("-") else ""), found)


@pytest.mark.parametrize("arguments", [["--overwrite"], []])
@pytest.mark.parametrize(
    "name", [*sorted(FILES & {*FIGURES, "sweep.json", "sweep.npz", "results.csv"}), "strongest.png"]
)
def test_foreign_file_of_the_same_name_is_kept(
    run: Run,  # noqa: F811
    name: str,
    arguments: list[str],
) -> None:
    Path("out").mkdir()
    Path("out", name).write_text('{"mine": 1}')
    status, out, err = run("--out", "out", *arguments)
    assert (status, out) == (2, "") and f"its {name} is not" in err and err.count("\n") == 1
    assert contents(".") == {"out": None, f"out/{name}": b'{"mine": 1}'}


def test_other_foreign_files_stay_beside_the_result(run: Run) -> None:  # noqa: F811
    Path("out/deep").mkdir(parents=True)
    Path("out/notes.txt").write_text("mine")
    for _ in range(2):
        assert run(*ZERO, "--out", "out")[0] == 0
    assert contents("out").keys() == {*FILES, "deep", "notes.txt"} - {"agreement.png"}
    assert Path("out/notes.txt").read_text() == "mine"


def test_edited_figure_counts_as_foreign(run: Run) -> None:  # noqa: F811
    run(*ZERO, "--out", "out")
    Path("out/margins.png").write_text("annotated")
    status, _, err = run(*ZERO, "--out", "out", "--overwrite")
    assert status == 2 and "its margins.png is not" in err and Path("out/margins.png").read_text() == "annotated"


def test_result_is_written_into_the_current_folder(run: Run) -> None:  # noqa: F811
    here = Path.cwd()
    assert run(*ZERO, "--out", ".")[0] == 0
    assert contents(here).keys() == FILES - {"agreement.png"} and Path.cwd() == here


def test_home_folder_is_written_as_a_tilde(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    Path("home").mkdir()
    assert run(*ZERO, "--out", "~/out")[0] == 0
    assert contents("home/out").keys() == FILES - {"agreement.png"} and not Path("~").exists()


def dangling(here: Path) -> str:
    Path("link").symlink_to("nowhere")
    return "link"


def below_a_dangling_link(here: Path) -> str:
    return dangling(here) + "/deep"


def looping(here: Path) -> str:
    Path("link").symlink_to("link")
    return "link"


def below_a_looping_link(here: Path) -> str:
    return looping(here) + "/deep"


def folder_named_like_a_file(name: str) -> Callable[[Path], str]:
    def make(here: Path) -> str:
        Path("out", name).mkdir(parents=True)
        return "out"

    return make


def a_file(here: Path) -> str:
    Path("file").touch()
    return "file"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dangling, "link is a link that leads nowhere"),
        (below_a_dangling_link, "link is a link that leads nowhere"),
        (looping, "link is a link that leads nowhere"),
        (below_a_looping_link, "Too many levels of symbolic links"),
        (folder_named_like_a_file("sweep.npz"), "its sweep.npz is not"),
        (folder_named_like_a_file("sweep.json"), "its sweep.json is not"),
        (a_file, "file is not a folder"),
        (lambda here: a_file(here) + "/deep", "file is not a folder"),
        (lambda here: "", "the output folder has an empty name"),
        (lambda here: "~no-such-user/out", "Could not determine home directory"),
        (lambda here: "x" * 300, "File name too long"),
        (lambda here: "/proc/out", "cannot write to /proc/out: "),
    ],
)
def test_unusable_output_is_refused_before_the_work(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], str],
    reason: str,
) -> None:
    monkeypatch.setattr("ablation.models.load", lambda *_, **__: pytest.fail("the model is loaded"))
    name = make(Path.cwd())
    before = contents(".")
    status, out, err = run("--out", name)
    assert (status, out) == (2, "") and err.startswith("ablation: ") and reason in err and err.count("\n") == 1
    assert contents(".") == before


def test_result_is_saved_without_figures_that_fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def fail(result: Result, draft: Path, **_: Any) -> None:
        (draft / "sensitivity.png").write_bytes(b"half")
        raise MemoryError("no memory\nfor it")

    monkeypatch.setattr(of_sweeps, "draw", fail)
    status, out, err = run(*ZERO, "--out", "out")
    assert status == 2 and out.startswith("capitals: ")
    assert err == "ablation: the arrays are in out, but no figures: MemoryError: no memory for it\n"
    assert contents("out").keys() == FILES - FIGURES and (Result.load("out").calls == 1).all()


@pytest.mark.parametrize("where", [(np, "savez"), (Path, "write_text"), (Path, "rename")])
def test_full_disk_loses_neither_text_nor_old_result(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[Any, str],
) -> None:
    run(*ZERO, "--out", "out")
    before = contents(".")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*where, fail)
        status, out, err = run(*ZERO, "--out", "out")
    assert status == 2 and out.startswith("capitals: ") and contents(".") == before
    assert err == "ablation: the result was not saved in out: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", range(9))
def test_failure_at_any_step_restores_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException]
) -> None:
    """Of an earlier result two files are moved away, and of a new one three are moved there."""
    result = sweep(GPT2.shared(), IDS)
    result.save(tmp_path / "out")
    before = contents(tmp_path)
    calls, rename = iter(range(100)), Path.rename

    def fail_at_step(self: Path, target: Path) -> Path:
        if next(calls) == step:
            raise error("failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_step)
    try:
        with output.staging(tmp_path / "out") as draft:
            result.write_arrays(draft)
            (draft / "margins.png").touch()
            result.publish(draft, tmp_path / "out", overwrite=True)
    except error:
        assert step < 5 and contents(tmp_path) == before
    else:
        assert step >= 5 and contents(tmp_path / "out").keys() == {"sweep.npz", "sweep.json", "margins.png"}


def test_writers_at_the_same_moment_do_not_mix_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes: the lock is held by the opened folder, not by the process."""
    rename = Path.rename

    def slowly(self: Path, target: Path) -> Path:
        time.sleep(0.001)  # the other thread has its turn
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slowly)
    results = [sweep(GPT2.shared(), prompt) for prompt in (IDS, [1, 2])]

    def save_often(result: Result) -> None:
        for _ in range(20):
            result.save(tmp_path / "out", overwrite=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(save_often, results))
    assert Result.load(tmp_path / "out").prompts[0].token_ids in (tuple(IDS), (1, 2))
    assert contents(tmp_path).keys() == {"out", "out/sweep.json", "out/sweep.npz"}


def test_result_that_came_meanwhile_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Another process fills the folder while this one sweeps."""
    real = experiment.run

    def slow(*arguments: Any, **options: Any) -> Result:
        sweep(GPT2.shared(), IDS).save("out")
        return real(*arguments, **options)

    monkeypatch.setattr(experiment, "run", slow)
    status, _, err = run(*ZERO, "--out", "out")
    assert status == 0 and "this result is in out/result-2" in err
    assert Result.load("out").prompts[0].token_ids == tuple(IDS)
    assert Result.load("out/result-2").provenance["model"] == "capitals"


@pytest.mark.end_to_end
def test_killed_process_leaves_no_part_of_a_result(tmp_path: Path) -> None:
    """It is killed while it draws."""
    code = (
        "import os, signal, sys\nfrom ablation import cli\nfrom ablation.figures import of_sweeps\n"
        "of_sweeps.draw = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.main(['sweep', '--imputation', 'zero', '--out', 'out'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -9 and "144 of 144" in done.stdout and not (tmp_path / "out").exists()


def test_checked_files_are_those_of_a_sweep() -> None:
    optional = {"results.parquet", "report.html"}  # if their packages are installed
    # Of several prompts; with --top; of a text; of a reference mean.
    asked_for = {"strongest.png", "top_tokens.csv", "loss.png", "reference.npz"}
    of_sets = {"sets.png", "curve.csv", "curve.png", "pairs.csv", "interactions.png"}
    # tests/test_cli.py compares FILES with the files that a sweep writes.
    assert set(output.FILES) == FILES | optional | asked_for | of_sets


def test_published_file_of_any_name_replaces_no_foreign_one(tmp_path: Path) -> None:
    result = sweep(GPT2.shared(), IDS)
    (tmp_path / "curve.png").write_text("mine")
    with output.staging(tmp_path) as draft:
        (draft / "curve.png").touch()
        with pytest.raises(InvalidOutput, match="its curve.png is not"):
            result.publish(draft, tmp_path, overwrite=True)
    assert contents(tmp_path) == {"curve.png": b"mine"}


def test_publish_of_an_unknown_model_never_replaces(tmp_path: Path) -> None:
    """The same numbers may come from two models, if the model is not recorded."""
    result = sweep(GPT2.shared(), IDS)
    result.save(tmp_path)
    with pytest.raises(InvalidOutput, match="overwrite=True"):
        result.save(tmp_path)
