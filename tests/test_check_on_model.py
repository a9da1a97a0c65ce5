"""`ablation check --model`: the command, its options, and the files that it writes."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ablation.checks.decoders import VOCABULARY, Decoder
from ablation.checks.on_model.every_head import try_every_head
from ablation.checks.on_model.report import findings
from ablation.checks.on_model.run import load_own_model
from ablation.cli import main
from ablation.errors import InvalidPrompt, ModelUnavailable
from tests.implementations.ours import Ours

ROOT = Path(__file__).parent.parent


HOOK = '''
from contextlib import contextmanager

from ablation import find_heads
from ablation.checks import adapter_from_context


def edited(model, heads, width, site):
    """Zero channels of the input of the projection, or of its output."""
    def before(layer, module, args):
        z = args[0].clone()
        for l, h in heads:
            if l == layer.index:
                z[..., h * width(layer) : (h + 1) * width(layer)] = 0
        return (z,)

    def after(layer, module, args, output):
        return before(layer, module, (output,))[0]

    for layer in find_heads(model).layers:
        if site == "before":
            yield layer.projection.register_forward_pre_hook(lambda m, a, layer=layer: before(layer, m, a))
        else:
            yield layer.projection.register_forward_hook(lambda m, a, o, layer=layer: after(layer, m, a, o))


def hook(width, site="before", shift=0):
    @contextmanager
    def ablated(model, heads):
        handles = list(edited(model, [(l, h + shift) for l, h in heads], width, site))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return ablated


Right = adapter_from_context(hook(lambda layer: layer.head_dim), imputations=["zero"])
After = adapter_from_context(hook(lambda layer: layer.head_dim, "after"), imputations=["zero"])
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a hook, its adapters, a small model with a tokenizer of words, and prompts."""
    place = tmp_path_factory.mktemp("user")
    (place / "hooks.py").write_text(HOOK)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    Decoder("llama", num_layers=2, num_heads=3, head_dim=8).fresh().save_pretrained(place / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(place / "model")
    (place / "prompts.jsonl").write_text('{"prompt": "w3 w14 w15 w9"}\n{"prompt": "w2 w6 w5 w3 w5 w8"}\n')
    (place / "short.csv").write_text("prompt\nw3 w4\n")
    return place


@pytest.mark.parametrize("option", ["--prompts", "--minutes", "--device", "--dtype", "--table"])
def test_options_of_a_model_need_a_model(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = {"--minutes": "1", "--dtype": "bfloat16"}.get(option, "x")
    assert main(["check", "my_hook:Mine", option, value]) == 2
    assert f"{option} needs --model" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_minutes_are_a_positive_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["check", "my_hook:Mine", "--model", "capitals", "--minutes", value])
    assert exit.value.code == 2
    assert f"'{value}' is not a positive number of minutes" in capsys.readouterr().err


def test_model_is_loaded_with_its_prompts(folder: Path) -> None:
    mine = load_own_model(str(folder / "model"), str(folder / "prompts.jsonl"), device="cpu", dtype="bfloat16")
    assert mine.rows == ((3, 14, 15, 9), (2, 6, 5, 3, 5, 8))
    assert mine.left_out == 0
    assert mine.dtype == "bfloat16" and mine.model_type == "llama" and mine.device == torch.device("cpu")


def test_prompts_after_the_eighth_are_left_out(folder: Path) -> None:
    file = folder / "many.csv"
    file.write_text("prompt\n" + "".join(f"w{number} w1 w2\n" for number in range(3, 14)))
    mine = load_own_model(str(folder / "model"), str(file), device="cpu")
    assert len(mine.rows) == 8 and mine.left_out == 3
    found = try_every_head(type("Zero", (Ours,), {"imputations": ("zero",)}), mine)
    assert next(findings(mine, found)).endswith("times the noise of the model); 3 prompts were left out")


@pytest.mark.parametrize(
    ("model", "prompts", "error", "message"),
    [
        ("model", "short.csv", InvalidPrompt, "'w3 w4' has 2 tokens, but 3 are needed"),
        ("model", None, InvalidPrompt, "no token for .* in the prompt"),
        ("model", "missing.csv", InvalidPrompt, "cannot read prompts"),
        ("elsewhere", "prompts.jsonl", ModelUnavailable, "elsewhere"),
    ],
)
def test_unusable_models_and_prompts_are_refused(
    folder: Path, model: str, prompts: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_own_model(str(folder / model), prompts and str(folder / prompts), device="cpu")


def check(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run the command in a new process; return its status and output."""
    command = [sys.executable, "-m", "ablation", "check", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.end_to_end
def test_command_passes_a_right_hook(folder: Path) -> None:
    status, output = check(folder, "hooks:Right", "--model", "model", "--prompts", "prompts.jsonl", "--device", "cpu")
    assert status == 0, output
    assert "zero: 6 of 6 heads have the right logits\n" in output
    assert "2 rows of 4 and 6 tokens" in output and "Loading weights" not in output


@pytest.mark.end_to_end
def test_command_names_the_heads_of_a_wrong_hook(folder: Path) -> None:
    arguments = ["--model", "model", "--prompts", "prompts.jsonl", "--table", "heads.csv", "--summary", "summary.md"]
    status, output = check(folder, "hooks:After", *arguments, "-k", "smoke or oracle.zero or locality")
    assert status == 1
    assert "found: 6 of 6 heads are wrong: L" in output
    assert re.search(r"L\dH\d by \d.* logits \(its effect is ", output)
    assert "zero: 0 of 6 heads have the right logits; wrong: L* (all)" in output
    assert "the answer is kept in" in output and "strongest heads" in output
    with (folder / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["head"]) for row in rows] == [(str(la), str(h)) for la in range(2) for h in range(3)]
    assert all(float(row["error"]) > 0 and float(row["effect"]) > 0 and row["z_problem"] for row in rows)
    summary = (folder / "summary.md").read_text()
    assert "- zero: 0 of 6 heads have the right logits; wrong: L&#42; (all)" in summary


def test_unknown_folder_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "hooks:Right", "--model", "nowhere/"]) == 2
    assert "cannot load a model from nowhere: it does not exist" in capsys.readouterr().err


@pytest.mark.end_to_end
def test_shown_findings_are_what_is_printed(tmp_path: Path) -> None:
    """Numbers may differ by rounding; counts and heads may not."""
    page, readme = ((ROOT / file).read_text(encoding="utf-8") for file in ("docs/checking.md", "README.md"))
    (hook,) = re.findall(r"```python\n(# my_hook.py\n.*?)```", readme, re.DOTALL)
    (tmp_path / "my_hook.py").write_text(hook)
    ((arguments, shown),) = re.findall(
        r"\$ ablation check ([^\n]* --model capitals [^\n]*)\n```\n\n```\n(every head .*?)```", page, re.DOTALL
    )
    status, output = check(tmp_path, *arguments.split())
    assert status == 1

    def rounded(text: str) -> str:
        return re.sub(r"\d+\.\d+(e-\d+)?", lambda number: f"{float(number[0]):.0e}", text)

    assert rounded(shown) in rounded(output)
