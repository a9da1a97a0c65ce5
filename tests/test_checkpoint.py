"""Checkpoints: an interrupted sweep of several prompts goes on where it stopped, with the same bits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ablation import output
from ablation.errors import InvalidOutput, InvalidPrompt, InvalidResult
from ablation.models import LoadedModel
from ablation.passes import Progress
from ablation.prompts import Question
from ablation.results import RECEIPTS, Result
from ablation.studies import experiment
from ablation.studies.experiment import sweep_prompts
from tests.test_cli import Run, run  # noqa: F401 (fixture)
from tests.test_output import contents, quick  # noqa: F401 (fixture)

CITIES = ["Berlin", "Paris", "Madrid", "Rome"]
QUESTIONS = [Question(f"{city} is the capital of", " Germany", " France", group=city[0]) for city in CITIES]
PART = "unfinished/000001"


class Interrupted(Exception):
    """What stops a sweep in these tests."""


def interrupt_after(prompts: float) -> Progress:
    """A callback that raises when so many of the prompts are finished."""

    def progress(share: float) -> None:
        if share * len(QUESTIONS) > prompts:
            raise Interrupted

    return progress


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The prompts that are swept, as token ids, in their order."""
    found: list[tuple[int, ...]] = []
    real = experiment.run

    def sweep(model: Any, token_ids: Any, *arguments: Any, **options: Any) -> Result:
        found.append(tuple(token_ids))
        return real(model, token_ids, *arguments, **options)

    monkeypatch.setattr(experiment, "run", sweep)
    return found


@pytest.fixture(scope="session")
def interrupted(capitals: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a sweep was interrupted during its third prompt, not to be changed."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.raises(Interrupted):
        sweep_prompts(capitals, QUESTIONS, ["zero"], checkpoint=out, progress=interrupt_after(2.5))
    assert sorted(path.name for path in (out / output.UNFINISHED).iterdir()) == ["000000", "000001", "settings.json"]
    return out


@pytest.fixture
def stopped(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(interrupted, tmp_path / "out")


def assert_same_bits(one: Result, other: Result) -> None:
    assert (one.ablations, one.prompts) == (other.ablations, other.prompts)
    assert json.loads(json.dumps(one.provenance)) == json.loads(json.dumps(other.provenance))
    assert list(one.clean) == list(other.clean) == list(one.ablated) == list(other.ablated)
    pairs = [(one.clean[name], other.clean[name]) for name in one.clean]
    pairs += [(one.ablated[name], other.ablated[name]) for name in one.ablated]
    pairs += [(getattr(one, name), getattr(other, name)) for name in ("head_mean", *RECEIPTS)]
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_interrupted_sweep_goes_on_with_the_same_bits(
    capitals: LoadedModel, tmp_path: Path, asked: list[tuple[int, ...]]
) -> None:
    whole = sweep_prompts(capitals, QUESTIONS)
    ids = [prompt.token_ids for prompt in whole.prompts]
    assert asked == ids
    asked.clear()
    with pytest.raises(Interrupted):
        sweep_prompts(capitals, QUESTIONS, checkpoint=tmp_path / "out", progress=interrupt_after(2.5))
    assert asked == ids[:3]
    asked.clear()
    shares: list[float] = []
    again = sweep_prompts(capitals, QUESTIONS, checkpoint=tmp_path / "out", progress=shares.append)
    assert asked == ids[2:], "only the prompts that are missing are swept"
    assert_same_bits(again, whole)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert contents(tmp_path) == {"out": None}, "nothing remains of the checkpoint"


def test_sweep_may_be_interrupted_again_and_again(capitals: LoadedModel, tmp_path: Path) -> None:
    whole = sweep_prompts(capitals, QUESTIONS, ["mean"])
    for prompts in (0.5, 1.5, 1.7, 2.0, 3.5):
        with pytest.raises(Interrupted):
            sweep_prompts(capitals, QUESTIONS, ["mean"], checkpoint=tmp_path, progress=interrupt_after(prompts))
    assert_same_bits(sweep_prompts(capitals, QUESTIONS, ["mean"], checkpoint=tmp_path), whole)
    assert contents(tmp_path) == {}


def test_checkpoint_of_an_uninterrupted_sweep_changes_nothing(capitals: LoadedModel, tmp_path: Path) -> None:
    plain, saved = (
        sweep_prompts(capitals, QUESTIONS, ["zero"], checkpoint=place) for place in (None, tmp_path / "new")
    )
    assert_same_bits(plain, saved)
    assert contents(tmp_path) == {"new": None}


@pytest.mark.end_to_end
def test_metrics_and_targets_of_several_tokens_are_kept(capitals: LoadedModel, tmp_path: Path) -> None:
    questions = [dataclasses.replace(question, target=" Germany France") for question in QUESTIONS]
    options: dict[str, Any] = {"metrics": {"largest": lambda logits: logits.amax(dim=-1)}}
    whole = sweep_prompts(capitals, questions, ["zero"], **options)
    with pytest.raises(Interrupted):
        sweep_prompts(capitals, questions, ["zero"], **options, checkpoint=tmp_path, progress=interrupt_after(2))
    assert_same_bits(sweep_prompts(capitals, questions, ["zero"], **options, checkpoint=tmp_path), whole)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"imputations": ["mean"]}, r"imputations: \['zero'\] there, \['mean'\] now"),
        ({"imputations": ["zero", "mean"]}, r"imputations: \['zero'\] there, \['zero', 'mean'\] now"),
        ({"prompts": QUESTIONS[:3]}, "prompts: 4 there, 3 now"),
        ({"prompts": QUESTIONS[::-1]}, "prompts_sha256: .* there, .* now"),
        ({"prompts": [dataclasses.replace(QUESTIONS[0], group=None), *QUESTIONS[1:]]}, "prompts_sha256: "),
        ({"prompts": [dataclasses.replace(QUESTIONS[0], control=None), *QUESTIONS[1:]]}, "prompts_sha256: "),
        ({"metrics": {"own": lambda logits: logits[:, 0]}}, r"metrics: \{\} there, \{'own': '\w+'\} now"),
        ({"max_rows": 8}, "max_rows: None there, 8 now"),
    ],
)
def test_other_settings_are_refused_by_name(
    capitals: LoadedModel, stopped: Path, change: dict[str, Any], setting: str
) -> None:
    before = contents(stopped)
    call = {"prompts": QUESTIONS, "imputations": ["zero"], **change}
    with pytest.raises(InvalidOutput, match=rf"holds an unfinished run with other settings \({setting}") as caught:
        sweep_prompts(capitals, **call, checkpoint=stopped)
    assert "--overwrite" in str(caught.value) and "\n" not in str(caught.value)
    assert contents(stopped) == before


def retrained(loaded: LoadedModel) -> LoadedModel:
    model = type(loaded.model)(loaded.model.config).eval()
    return dataclasses.replace(loaded, model=model)


@pytest.mark.parametrize(
    ("other", "setting"),
    [
        (lambda loaded: dataclasses.replace(loaded, name="other"), "model: capitals there, other now"),
        (lambda loaded: dataclasses.replace(loaded, source="/elsewhere"), "source: capitals there, /elsewhere now"),
        (lambda loaded: dataclasses.replace(loaded, revision="abc"), "revision: None there, abc now"),
        (retrained, "weights_sha256: "),
    ],
)
def test_another_model_is_refused(
    capitals: LoadedModel, stopped: Path, other: Callable[[LoadedModel], LoadedModel], setting: str
) -> None:
    with pytest.raises(InvalidOutput, match=rf"other settings \({setting}"):
        sweep_prompts(other(capitals), QUESTIONS, ["zero"], checkpoint=stopped)


def test_other_number_of_threads_is_refused(capitals: LoadedModel, stopped: Path) -> None:
    """The last bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(InvalidOutput, match=rf"other settings \(threads: {threads} there, {threads + 1} now\)"):
            sweep_prompts(capitals, QUESTIONS, ["zero"], checkpoint=stopped)
    finally:
        torch.set_num_threads(threads)


def test_overwrite_discards_a_checkpoint_of_other_settings(
    capitals: LoadedModel, stopped: Path, asked: list[tuple[int, ...]]
) -> None:
    result = sweep_prompts(capitals, QUESTIONS, ["mean"], checkpoint=stopped, overwrite=True)
    assert len(asked) == 4
    assert_same_bits(result, sweep_prompts(capitals, QUESTIONS, ["mean"]))
    assert contents(stopped) == {}


def test_overwrite_keeps_a_checkpoint_of_the_same_settings(
    capitals: LoadedModel, stopped: Path, asked: list[tuple[int, ...]]
) -> None:
    sweep_prompts(capitals, QUESTIONS, ["zero"], checkpoint=stopped, overwrite=True)
    assert len(asked) == 2


def truncate(name: str) -> Callable[[Path], None]:
    def damage(part: Path) -> None:
        content = (part / name).read_bytes()
        (part / name).write_bytes(content[: len(content) // 2])

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        truncate("sweep.npz"),
        truncate("sweep.json"),
        lambda part: (part / "sweep.npz").unlink(),
        lambda part: (part / "sweep.json").unlink(),
    ],
    ids=["half of the arrays", "half of the manifest", "no arrays", "no manifest"],
)
def test_damaged_part_is_a_named_error(capitals: LoadedModel, stopped: Path, damage: Callable[[Path], None]) -> None:
    damage(stopped / PART)
    with pytest.raises((InvalidResult, InvalidOutput), match=f"(read from|write to) .*{PART}: ") as caught:
        sweep_prompts(capitals, QUESTIONS, ["zero"], checkpoint=stopped)
    assert "\n" not in str(caught.value)
    whole = sweep_prompts(capitals, QUESTIONS, ["mean"], checkpoint=stopped, overwrite=True)
    assert len(whole.prompts) == 4 and contents(stopped) == {}


@pytest.mark.parametrize("content", [b"{", b"\xff", b""])
def test_damaged_settings_are_a_named_error(capitals: LoadedModel, stopped: Path, content: bytes) -> None:
    (stopped / "unfinished" / "settings.json").write_bytes(content)
    with pytest.raises(InvalidOutput, match="unfinished is in the way: ") as caught:
        sweep_prompts(capitals, QUESTIONS, ["zero"], checkpoint=stopped)
    assert "\n" not in str(caught.value) and (stopped / PART).exists()


def test_file_in_place_of_the_checkpoint_is_a_named_error(capitals: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "unfinished").write_text("mine")
    with pytest.raises(InvalidOutput, match="unfinished is in the way: "):
        sweep_prompts(capitals, QUESTIONS, ["zero"], checkpoint=tmp_path)
    assert contents(tmp_path) == {"unfinished": b"mine"}


@pytest.mark.parametrize(
    "place", ["notes.txt", "unfinished/notes.txt", f"{PART}/notes.txt", "unfinished/mine/sweep.npz"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_survive(capitals: LoadedModel, stopped: Path, place: str, overwrite: bool) -> None:
    """Neither the end of a sweep nor a discarded checkpoint removes them, and they do not lose the result."""
    (stopped / place).parent.mkdir(exist_ok=True)
    (stopped / place).write_text("mine")
    imputations = ["mean"] if overwrite else ["zero"]
    result = sweep_prompts(capitals, QUESTIONS, imputations, checkpoint=stopped, overwrite=overwrite)
    assert len(result.prompts) == 4
    assert {name for name, content in contents(stopped).items() if content is not None} == {place}
    assert (stopped / place).read_text() == "mine"


def test_part_is_written_as_a_whole_or_not_at_all(
    capitals: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the disk were full when the second prompt is saved."""
    real, calls = np.savez, iter(range(100))

    def savez(*arguments: Any, **arrays: Any) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        real(*arguments, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="No space left"):
        sweep_prompts(capitals, QUESTIONS, ["zero"], checkpoint=tmp_path)
    assert sorted(path.name for path in (tmp_path / "unfinished").iterdir()) == ["000000", "settings.json"]
    monkeypatch.undo()
    assert len(sweep_prompts(capitals, QUESTIONS, ["zero"], checkpoint=tmp_path).prompts) == 4
    assert contents(tmp_path) == {}


def test_unusable_prompt_writes_no_checkpoint(capitals: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidPrompt, match="prompt 2"):
        sweep_prompts(capitals, [QUESTIONS[0], Question("Minas is")], checkpoint=tmp_path / "out")
    assert contents(tmp_path) == {}


# ---- on the command line


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The arguments of a sweep of a file of prompts."""
    path = tmp_path / "cities.jsonl"
    path.write_text("\n".join(json.dumps(dataclasses.asdict(question)) for question in QUESTIONS))
    return ["--prompts", str(path), "--imputation", "zero", "--out", "out"]


@pytest.mark.usefixtures("quick")
def test_interrupted_command_keeps_prompts_and_goes_on(
    run: Run,  # noqa: F811
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[int, ...]],
) -> None:
    counting = experiment.run

    def sweep(*positional: Any, **options: Any) -> Result:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return counting(*positional, **options)

    monkeypatch.setattr(experiment, "run", sweep)
    status, out, err = run(*arguments)
    assert (status, out) == (130, "") and err.startswith("ablation: interrupted, ") and "kept in out" in err
    assert err.count("\n") == 1 and len(list(Path("out/unfinished").glob("0*"))) == 2
    monkeypatch.setattr(experiment, "run", counting)
    status, out, err = run(*arguments)
    assert (status, err) == (0, "") and out.startswith("capitals: 4 prompts\n") and len(asked) == 4
    assert not Path("out/unfinished").exists() and len(Result.load("out").prompts) == 4


@pytest.mark.usefixtures("quick")
def test_command_refuses_other_settings_unless_overwritten(
    run: Run,  # noqa: F811
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "run", stop)
        assert run(*arguments)[0] == 130
    status, out, err = run(*arguments, "--max-rows", "40")
    assert (status, out) == (2, "") and "(max_rows: None there, 40 now)" in err and err.count("\n") == 1
    assert run(*arguments, "--max-rows", "40", "--overwrite")[0] == 0
    assert Result.load("out").provenance["passes"] == 4 and not Path("out/unfinished").exists()


def largest(logits: torch.Tensor) -> torch.Tensor:
    return logits.amax(dim=-1)


@pytest.mark.parametrize(
    "other",
    [
        lambda logits: logits.amin(dim=-1),
        lambda logits: logits.amax(dim=-1) + 1,
        lambda logits, add=2.0: logits.amax(dim=-1) + add,
    ],
    ids=["another method", "another constant", "another default"],
)
def test_other_metric_of_the_same_name_is_refused(capitals: LoadedModel, tmp_path: Path, other: Any) -> None:
    """Otherwise, some prompts would have the values of one function, and some those of the other."""
    with pytest.raises(Interrupted):
        sweep_prompts(
            *(capitals, QUESTIONS, ["zero"]),
            metrics={"x": largest},
            checkpoint=tmp_path,
            progress=interrupt_after(2.5),
        )
    with pytest.raises(InvalidOutput, match="other settings .metrics"):
        sweep_prompts(capitals, QUESTIONS, ["zero"], metrics={"x": other}, checkpoint=tmp_path)
    again = sweep_prompts(capitals, QUESTIONS, ["zero"], metrics={"x": largest}, checkpoint=tmp_path)
    assert_same_bits(again, sweep_prompts(capitals, QUESTIONS, ["zero"], metrics={"x": largest}))


def test_single_question_is_not_swept_in_an_unfinished_study(stopped: Path, run: Run) -> None:  # noqa: F811
    before = contents(stopped)
    status, out, err = run("--out", str(stopped))
    assert status == 2 and out == "" and "holds an unfinished study" in err
    assert contents(stopped) == before
