"""The command line, as a person meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig, PretrainedConfig

from ablation import experiment, figures, report
from ablation.cli import main
from ablation.results import SweepResult
from tests.test_models import Hub, folder, hub  # noqa: F401 (fixtures)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `ablation sweep` in an empty folder. Returns exit status, standard output, standard error."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["sweep", *arguments])
        return status, *capsys.readouterr()

    return run


FILES = {
    *("sweep.npz", "sweep.json"),
    *("sensitivity.png", "difference.png", "histograms.png", "head_means.png", "margins.png"),
}


def test_alone_it_sweeps_capitals_and_writes_beside_itself(run: Run) -> None:
    status, out, err = run()
    assert (status, err) == (0, "")
    assert "capitals: 'Berlin is the capital of'" in out
    assert "zero       144 of 144 ablations keep ' Germany'" in out
    assert "mean       144 of 144 ablations keep ' Germany'" in out
    assert {path.name for path in Path("ablation-capitals").iterdir()} == FILES
    result = SweepResult.load(Path("ablation-capitals"))
    assert result.provenance["prompt"] == "Berlin is the capital of"
    assert result.provenance["watched"] == [" Germany", " France"]


def test_a_terminal_that_cannot_show_a_token_is_shown_its_escape(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ablation", "sweep", "--impute", "zero", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "r\\xb2" in done.stdout, done.stderr


def test_a_control_that_is_the_prediction_needs_a_target(run: Run) -> None:
    status, _, err = run("--prompt", "Berlin is the capital of", "--control", " Germany", "--impute", "zero")
    assert status == 2 and "the control, ' Germany', is the model's own prediction" in err


def test_findings_can_be_had_as_json(run: Run) -> None:
    status, out, _ = run("--json", "--impute", "zero", "--out", "elsewhere/deep")
    found = json.loads(out)
    assert status == 0 and found["imputations"]["zero"]["kept"] == 144 and found["provenance"]["model"] == "capitals"
    assert {path.name for path in Path("elsewhere/deep").iterdir()} == FILES - {"difference.png"}


def test_it_runs_on_the_device_and_in_the_dtype_that_are_asked_for(run: Run) -> None:
    status, out, _ = run("--device", "cpu", "--dtype", "bfloat16", "--impute", "zero", "--json")
    made = json.loads(out)["provenance"]
    assert (status, made["device"], made["dtype"], made["method"]) == (0, "cpu", "bfloat16", "growing batch")


def test_a_prompt_of_ones_own_is_about_what_the_model_itself_predicts(run: Run) -> None:
    status, out, _ = run("--prompt", "Paris is the capital of", "--json")
    found = json.loads(out)
    assert status == 0 and found["clean"]["prediction"] == " France"
    assert found["clean"]["target"]["token"] == " France" and found["clean"]["control"]["token"] == " the"


def test_flips_are_named_with_the_token_they_turn_to(run: Run) -> None:
    status, out, _ = run("--prompt", "The capital of Iraq is Baghdad. The", "--json", "--impute", "zero")
    assert status == 0
    found = json.loads(out)["imputations"]["zero"]
    assert found["kept"] + len(found["flips"]) == 144
    status, out, _ = run("--prompt", "The capital of Iraq is Baghdad. The", "--impute", "zero")
    for flip in found["flips"]:
        assert f"L{flip['layer']}H{flip['head']} turns it to {flip['token']!r}" in out


def test_a_folder_that_is_used_again_holds_nothing_of_the_sweep_before(run: Run) -> None:
    run("--out", "out")
    run("--out", "out", "--impute", "mean")
    assert {path.name for path in Path("out").iterdir()} == FILES - {"difference.png"}


def test_a_local_folder_is_swept(run: Run, folder: Path) -> None:  # noqa: F811
    status, out, _ = run("--model", str(folder), "--prompt", "Berlin is the capital of", "--json")
    assert status == 0 and json.loads(out)["heads"] == 6
    assert Path("ablation-model").is_dir()


def test_gpt2_by_name_asks_the_published_question(run: Run, folder: Path) -> None:  # noqa: F811
    """The code path of GPT-2 small, on random weights of its shape but smaller."""
    status, out, _ = run("--model", f"gpt2={folder}", "--json", "--out", "out")
    found = json.loads(out)
    assert status == 0 and found["provenance"]["prompt"] == "Berlin is the capital of"
    assert found["clean"]["target"]["token"] == " Germany" and found["clean"]["control"]["token"] == " France"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target", "Germany France"], r"'Germany France' is not one token but 2 ('Germany', ' France')"),
        (["--target", " Gondor"], "' Gondor' is not a token of this model"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "Gondor is the capital of"], "does not know all words of the prompt ('Gondor')"),
        (["--prompt", "Berlin" + " is" * 40], "the prompt has 41 tokens, the model takes at most 32"),
        (["--device", "nonsense"], "no device 'nonsense' here"),
        (["--model", "nowhere/"], "no model 'nowhere/'"),
        (["--model", "./nowhere", "--prompt", "x"], "cannot load a model from nowhere: it does not exist"),
        (["--model", "gtp2", "--prompt", "x"], "no model 'gtp2'"),
        (["--model", "gpt2"], "no model 'gpt2': it is not on this machine, and the hub cannot be reached"),
        (["--model", "gtp2"], "gtp2 has no prompt of its own: pass one with --prompt"),
        (["--target", ""], "'' is not one token but 0"),
        (["--target", " France"], "target and control are the same token, ' France'"),
        (["--max-rows", "1"], "max_rows is 1"),
        (["--out", "/dev/null/out"], "/dev/null"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2_with_nothing_written(
    run: Run,
    hub: Hub,  # noqa: F811
    arguments: list[str],
    reason: str,
) -> None:
    if arguments == ["--model", "nowhere/"]:
        arguments = [*arguments, "--prompt", "x"]
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("ablation: ") and reason in err and err.count("\n") == 1
    assert not list(Path().rglob("*"))


def test_a_damaged_model_ends_in_one_line(run: Run, folder: Path) -> None:  # noqa: F811
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    status, out, err = run("--model", str(folder), "--prompt", "Berlin is")
    assert (status, out) == (2, "") and "SafetensorError" in err and err.count("\n") == 1


def test_an_output_that_is_a_file_ends_in_one_line_and_is_left_alone(run: Run) -> None:
    Path("file").write_text("mine")
    status, out, err = run("--out", "file")
    assert (status, out) == (2, "") and "file" in err and err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["file"] and Path("file").read_text() == "mine"


@pytest.mark.parametrize("where", [(experiment, "sweep"), (figures, "draw")])
def test_interrupted_it_writes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, interrupt)
    status, out, err = run()
    assert (status, out, err) == (130, "", "ablation: interrupted, nothing written\n")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("out", ["file", "file/deep"])
def test_a_file_where_the_folder_should_be_is_said_before_the_work(run: Run, out: str) -> None:
    Path("file").touch()
    status, printed, err = run("--out", out)
    assert (status, printed) == (2, "")
    assert re.fullmatch(f"ablation: cannot write to {out}: .*file is not a folder\n", err)


def test_it_ends_quietly_when_nobody_reads_on() -> None:
    command = [sys.executable, "-m", "ablation", "heads", "capitals", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_what_stood_in_the_folder_before_is_kept_when_the_next_sweep_fails(run: Run) -> None:
    run("--out", "out")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    status, _, _ = run("--out", "out", "--target", "nonsense")
    assert status == 2
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_heads_shows_the_map_of_a_model_without_its_weights(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "model.safetensors").unlink()
    assert main(["heads", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "GPT2LMHeadModel, 6 heads in 2 layers" in out
    assert re.search(r"0-1 +3 +3 +\d+ +transformer\.h\.\{layer\}\.attn\.c_proj \(Conv1D\)", out)


def test_heads_gives_the_map_layer_by_layer_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", "capitals", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["architecture"], found["heads"]) == ("capitals", "GPT2LMHeadModel", 144)
    assert found["layers"][3] == {
        "layer": 3,
        "heads": 12,
        "key_value_heads": 12,
        "width": 8,
        "projection": "transformer.h.3.attn.c_proj",
        "type": "Conv1D",
    }


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(num_hidden_layers=2), "MambaForCausalLM has no attention heads"),
        (None, "cannot load a model from model: it does not exist"),
    ],
)
def test_heads_of_a_model_that_is_refused_are_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: PretrainedConfig | None,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if config is not None:
        config.save_pretrained("model")
    assert main(["heads", "./model"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ablation: ") and reason in err and err.count("\n") == 1


def test_layers_that_are_alike_are_shown_in_runs() -> None:
    assert report._ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"


@pytest.mark.parametrize("command", ["sweep", "heads"])
def test_help_answers_without_importing_torch(command: str) -> None:
    code = f"import sys, ablation.cli as c\ntry: c.main(['{command}', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model" in done.stdout and ("examples:" in done.stdout) == (command == "sweep")


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "ablation"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: ablation" in done.stderr
