"""The command line, as a user meets it."""

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
from transformers import BertConfig, BertForMaskedLM, MambaConfig, PretrainedConfig

from ablation import tables
from ablation.cli import main
from ablation.figures import of_sweeps
from ablation.reports import html_report
from ablation.results import Result
from ablation.studies import experiment
from tests.test_models import Hub, folder, hub, small_gpt2  # noqa: F401 (fixtures)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `ablation sweep` in an empty folder, with stubs for figures and page. Returns status, stdout, stderr."""
    monkeypatch.setattr(html_report, "write_html", lambda result, path, **_: path.write_text("a page"))
    monkeypatch.setattr(of_sweeps, "draw", draw_small_files)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["sweep", *arguments])
        return status, *capsys.readouterr()

    return run


DRAW = of_sweeps.draw
FIGURES = {"sensitivity.png", "agreement.png", "histograms.png", "head_means.png", "margins.png"}
FILES = {"sweep.npz", "sweep.json", "results.csv", *FIGURES}
"""The files of a sweep of one prompt with both imputations."""
FILES |= {"results.parquet"} if tables.can_write_parquet() else set()
FILES |= {"report.html"} if html_report.available() else set()


def draw_small_files(result: Result, draft: Path, **_: Any) -> None:
    """Write each figure as a small file that depends on the result."""
    for name in FIGURES - ({"agreement.png"} if len(result.imputations) < 2 else set()):
        (draft / name).write_bytes(result.ablated["argmax"].tobytes())


def test_sweep_defaults(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_sweeps, "draw", DRAW)
    status, out, err = run()
    assert (status, err) == (0, "")
    assert "capitals: 'Berlin is the capital of'" in out
    assert "zero       144 of 144 ablations keep ' Germany'" in out
    assert "mean       144 of 144 ablations keep ' Germany'" in out
    assert {path.name for path in Path("ablation-capitals").iterdir()} == FILES
    result = Result.load(Path("ablation-capitals"))
    (prompt,) = result.prompts
    assert prompt.prompt == "Berlin is the capital of"
    assert (prompt.target_text, prompt.control_text) == (" Germany", " France")


@pytest.mark.end_to_end
def test_undisplayable_token_is_escaped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ablation", "sweep", "--imputation", "zero", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "r\\xb2" in done.stdout, done.stderr


def test_control_that_is_the_prediction_needs_a_target(run: Run) -> None:
    status, _, err = run("--prompt", "Berlin is the capital of", "--control", " Germany", "--imputation", "zero")
    assert status == 2 and "the control, ' Germany', is the model's own prediction" in err


def test_json_holds_findings_and_provenance(run: Run) -> None:
    status, out, _ = run("--json", "--imputation", "zero", "--out", "elsewhere/deep")
    found = json.loads(out)
    assert status == 0 and found["imputations"]["zero"]["kept"] == 144 and found["provenance"]["model"] == "capitals"
    assert {path.name for path in Path("elsewhere/deep").iterdir()} == FILES - {"agreement.png"}


def test_device_and_dtype_options_apply(run: Run) -> None:
    status, out, _ = run("--device", "cpu", "--dtype", "bfloat16", "--imputation", "zero", "--json")
    made = json.loads(out)["provenance"]
    assert (status, made["device"], made["dtype"], made["method"]) == (0, "cpu", "bfloat16", "growing batch")


def test_own_prompt_follows_the_models_prediction(run: Run) -> None:
    status, out, _ = run("--prompt", "Paris is the capital of", "--json")
    found = json.loads(out)
    assert status == 0 and found["clean"]["prediction"] == " France"
    assert found["clean"]["target"]["token"] == " France" and found["clean"]["control"]["token"] == " the"


def test_target_of_several_tokens_is_swept(run: Run) -> None:
    arguments = ["--target", " Germany France", "--control", " France", "--imputation", "zero", "--out", "out"]
    status, out, err = run(*arguments)
    assert (status, err) == (0, "") and "P(' Germany France') = " in out
    target = json.loads(run(*arguments, "--json")[1])["clean"]["target"]
    assert target["token"] == " Germany France" and len(target["ids"]) == 2
    assert target["probability"] == Result.load("out").clean["target_probability"][0]


def test_flips_name_the_new_token(run: Run) -> None:
    status, out, _ = run("--prompt", "The capital of Iraq is Baghdad. The", "--json", "--imputation", "zero")
    assert status == 0
    found = json.loads(out)["imputations"]["zero"]
    assert found["kept"] + len(found["flips"]) == 144
    status, out, _ = run("--prompt", "The capital of Iraq is Baghdad. The", "--imputation", "zero")
    for flip in found["flips"]:
        assert f"L{flip['layer']}H{flip['head']} turns it to {flip['token']!r}" in out


def test_local_folder_is_swept(run: Run, folder: Path) -> None:  # noqa: F811
    status, out, _ = run("--model", str(folder), "--prompt", "Berlin is the capital of", "--json")
    assert status == 0 and json.loads(out)["heads"] == 6
    (written,) = Path().iterdir()
    assert re.fullmatch("ablation-model-berlin-is-the-capital-of-[0-9a-f]{8}", written.name)


def test_gpt2_by_name_uses_the_published_question(
    run: Run,
    folder: Path,  # noqa: F811
    small_gpt2: None,  # noqa: F811
) -> None:
    """The code path of GPT-2 small, on smaller random weights."""
    status, out, _ = run("--model", f"gpt2={folder}", "--json", "--out", "out")
    found = json.loads(out)
    assert status == 0 and found["provenance"]["asked"]["prompt"] == "Berlin is the capital of"
    assert found["clean"]["target"]["token"] == " Germany" and found["clean"]["control"]["token"] == " France"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--target", " Gondor"], "' Gondor' has no tokens in this model"),
        (["--target", "Germany Gondor"], "'Germany Gondor' has no tokens in this model"),
        (["--control", " Gondor"], "' Gondor' has no tokens in this model"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "Gondor is the capital of"], "this model has no token for 'Gondor' in the prompt"),
        (["--prompt", "Berlin" + " is" * 40], "the prompt has 41 tokens, the model takes at most 32"),
        (["--device", "nonsense"], "no device 'nonsense' here"),
        (["--model", "nowhere/"], "cannot load a model from nowhere: it does not exist"),
        (["--model", "a/b/c"], "cannot load a model from a/b/c: it does not exist"),
        (["--model", ""], "the model has an empty name"),
        (["--model", "x" * 100_000], "File name too long"),
        (["--model", "~no-such-user/x"], "Could not determine home directory"),
        (["--model", "capitls/"], "it does not exist. Did you mean capitals?"),
        (["--model", "capitls"], "Did you mean capitals? Use capitals, smollm2, gpt2"),
        (
            ["--model", "capitls=folder"],
            "no model has the name 'capitls', so it takes no folder. Did you mean capitals?",
        ),
        (["--model", "gpt2="], "gpt2= names no folder"),
        (["--model", "./nowhere", "--prompt", "x"], "cannot load a model from nowhere: it does not exist"),
        (["--model", "gtp2", "--prompt", "x"], "no model 'gtp2'"),
        (["--model", "gpt2"], "no model 'gpt2': it is not on this machine, and the hub cannot be reached"),
        (["--model", "gtp2"], "no model 'gtp2': it is not on this machine"),
        (["--prompt", "Zürich \udcff"], r"--prompt is not valid UTF-8: 'Z\xfcrich \udcff'"),
        (["--target", "\udcff"], r"--target is not valid UTF-8: '\udcff'"),
        (["--control", "\udcff"], r"--control is not valid UTF-8: '\udcff'"),
        (["--device", "meta"], "no device 'meta' here"),
        (["--device", "vulkan"], "no device 'vulkan' here"),
        (["--device", ""], "no device '' here"),
        (["--prompt", "Gondor " * 15_000], "Gondor"),
        (["--target", " Gondor" * 15_000], " Gondor"),
        (["--target", ""], "'' has no tokens in this model"),
        (["--target", "  Gondor"], "'  Gondor'"),
        (["--target", " France"], "target and control are the same tokens, ' France'"),
        (["--max-rows", "1"], "--max-rows is 1"),
        (["--out", "/dev/null/out"], "/dev/null"),
        (["--prompts", "capitals", "--prompt", "Berlin is"], "--prompts and --prompt exclude each other"),
        (["--prompts", "capitals", "--target", " a"], "--prompts and --target exclude each other"),
        (["--prompts", "capitals", "--control", " a"], "--prompts and --control exclude each other"),
        (["--text", "nowhere.txt", "--prompt", "Berlin is"], "--text and --prompt exclude each other"),
        (["--text", "nowhere.txt"], "cannot read the text nowhere.txt: No such file or directory"),
        (["--stride", "4"], "--stride is a number of tokens"),
        (["--skip-bad"], "--skip-bad leaves out prompts of a file"),
        (["--prompts", "nowhere.csv"], "cannot read prompts from nowhere.csv: No such file or directory"),
        (["--prompts", "nowhere"], "pass a .jsonl or .csv file, or capitals or smollm2"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    run: Run,
    hub: Hub,  # noqa: F811
    arguments: list[str],
    reason: str,
) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("ablation: ") and reason in err and err.count("\n") == 1
    assert len(err) < 600 and not list(Path().rglob("*"))


def test_damaged_model_is_one_line(run: Run, folder: Path) -> None:  # noqa: F811
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    status, out, err = run("--model", str(folder), "--prompt", "Berlin is")
    assert (status, out) == (2, "") and "SafetensorError" in err and err.count("\n") == 1


def test_output_that_is_a_file_is_kept(run: Run) -> None:
    Path("file").write_text("mine")
    status, out, err = run("--out", "file")
    assert (status, out) == (2, "") and "file" in err and err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["file"] and Path("file").read_text() == "mine"


@pytest.mark.parametrize("where", [(experiment, "run"), (of_sweeps, "draw")])
def test_interrupt_writes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, interrupt)
    status, out, err = run()
    assert (status, err) == (130, "ablation: interrupted, nothing written\n")
    assert bool(out) == (where == (of_sweeps, "draw")), "a finished sweep is printed before it is drawn"
    assert not list(Path().iterdir())


@pytest.mark.parametrize("out", ["file", "file/deep"])
def test_file_in_place_of_the_output_folder_is_one_line(run: Run, out: str) -> None:
    Path("file").touch()
    status, printed, err = run("--out", out)
    assert (status, printed) == (2, "")
    assert re.fullmatch(f"ablation: cannot write to {out}: .*file is not a folder\n", err)


@pytest.mark.end_to_end
def test_closed_output_ends_quietly() -> None:
    command = [sys.executable, "-m", "ablation", "heads", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_failed_sweep_keeps_the_previous_result(run: Run) -> None:
    run("--out", "out")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    status, _, _ = run("--out", "out", "--target", "nonsense")
    assert status == 2
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_heads_needs_no_weights(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "model.safetensors").unlink()
    assert main(["heads", "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "GPT2LMHeadModel, 6 heads in 2 layers" in out
    assert re.search(r"0-1 +3 +3 +\d+ +transformer\.h\.\{layer\}\.attn\.c_proj \(Conv1D\)", out)


def test_heads_prints_json_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["architecture"], found["heads"]) == ("capitals", "GPT2LMHeadModel", 144)
    assert found["layers"][3] == {
        "layer": 3,
        "heads": 12,
        "key_value_heads": 12,
        "head_dim": 8,
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
def test_heads_of_a_refused_model_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: PretrainedConfig | None,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if config is not None:
        config.save_pretrained("model")
    assert main(["heads", "--model", "./model"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ablation: ") and reason in err and err.count("\n") == 1


def test_token_ids_are_in_json_and_in_unclear_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are fragments of bytes all read as U+FFFD."""
    monkeypatch.setattr("ablation.models.LoadedModel.decode", lambda self, token: "\ufffd")
    _, out, _ = run("--json", "--imputation", "zero", "--out", "out")
    clean = json.loads(out)["clean"]
    (target,), (control,) = clean["target"]["ids"], clean["control"]["ids"]
    (prompt,) = Result.load("out").prompts
    assert ((target,), (control,)) == (prompt.target, prompt.control) and clean["prediction_id"] == target
    _, out, _ = run("--imputation", "zero", "--out", "out")
    assert f"P('\ufffd' (token {target})) = 69.2%, P('\ufffd' (token {control})) = " in out
    assert f"keep '\ufffd' (token {target})" in out


def modules_after(*arguments: str) -> tuple[int, str, set[str]]:
    """Run the command line in a process of its own. Returns its status, its output, and its heavy imports."""
    code = (
        "import sys, ablation.cli as cli\n"
        f"try: status = cli.main({list(arguments)!r})\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'hypothesis', 'pandas', 'scipy'} & set(sys.modules)\n"
        "print('imported:', *heavy, file=sys.stderr)\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message, _, modules = done.stderr.rpartition("imported:")
    return done.returncode, done.stdout + message, set(modules.split())


@pytest.mark.parametrize("command", ["sweep", "generate", "heads", "check"])
def test_help_imports_no_torch(command: str) -> None:
    status, out, modules = modules_after(command, "--help")
    assert (status, modules) == (0, set())
    assert "usage: ablation" in out and ("examples:" in out) == (command in ("sweep", "generate"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sweep", "--model", "./nowhere"], "cannot load a model from nowhere: it does not exist"),
        (["sweep", "--model", "nowhere.gguf", "--prompt", "x"], "cannot load a model from nowhere.gguf"),
        (["sweep", "--model", "gpt2=nowhere"], "cannot load a model from nowhere"),
        (["sweep", "--model", "."], "cannot load a model from .: it has no config.json"),
        (["sweep", "--model", "some/model"], "no model 'some/model'"),
        (["sweep", "--prompt", ""], "the prompt is empty"),
        (["sweep", "--max-rows", "1"], "--max-rows is 1"),
        (["sweep", "--prompts", "nowhere.jsonl"], "cannot read prompts from nowhere.jsonl"),
        (["sweep", "--skip-bad"], "--skip-bad leaves out prompts of a file"),
        (["sweep", "--max-rows", "few"], "invalid int value: 'few'"),
        (["sweep", "--imputation", "median"], "invalid choice: 'median'"),
        (["sweep", "--out", "/dev/null/out"], "cannot write to /dev/null/out"),
        (["heads", "--model", "./nowhere"], "cannot load a model from nowhere"),
        (["check"], "name an adapter"),
        (["--version", "sweep"], "ablation 0."),
    ],
)
def test_argument_errors_precede_heavy_imports(arguments: list[str], reason: str, tmp_path: Path) -> None:
    status, out, modules = modules_after(*arguments)
    assert reason in out and modules == set()
    assert status == (0 if arguments[0] == "--version" else 2)


def test_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "ablation"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: ablation" in done.stderr


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "code",
    [
        "import ablation; assert all(getattr(ablation, name) for name in [*ablation.__all__, '__version__'])\n"
        "import ablation.sweeps as module; assert ablation.sweep is module.sweep",
        "import ablation, sys; ablation.AblationError; assert 'torch' not in sys.modules",
    ],
)
def test_public_names_are_imported_lazily(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_chat_without_a_template_is_one_line(run: Run) -> None:
    assert run("--chat") == (2, "", "ablation: this model has no chat template: ask without chat\n")


@pytest.mark.filterwarnings("default")
def test_notes_go_to_standard_error(run: Run) -> None:
    status, out, err = run("--target", "Germany", "--imputation", "zero", "--json")
    assert status == 0 and json.loads(out)["clean"]["target"]["token"] == "Germany"
    assert re.fullmatch(
        "ablation: note: the target 'Germany' begins with probability .*, but ' Germany' with .*\n", err
    )


def test_encoder_is_refused_in_one_line(run: Run, folder: Path) -> None:  # noqa: F811
    shape: dict[str, Any] = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
    BertForMaskedLM(BertConfig(vocab_size=300, **shape)).save_pretrained(folder)
    status, out, err = run("--model", str(folder), "--prompt", "Berlin is the capital of")
    assert (status, out) == (2, "")
    assert re.fullmatch("ablation: BertLMHeadModel is bidirectional, not a causal language model: .*\n", err)
