"""Folders from elsewhere: their code is never run, and a famous name is given only to the model that has it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from ablation import models, sources
from ablation.cli import main
from ablation.errors import ModelUnavailable
from ablation.models import load
from tests.benchmark.ways import SMOLLM2
from tests.families.configurations import config_of
from tests.test_models import folder  # noqa: F401 (fixture)

CODE = "from pathlib import Path\nPath(__file__, '..', 'it-ran').resolve().touch()\nclass Config: ...\n" * 2


def configure(place: Path, **values: Any) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | values))


def unknown_architecture(place: Path) -> str:
    """A model type that only the code of the folder knows."""
    configure(
        place,
        model_type="homemade",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": "code.Tok"},
    )
    return "custom code"


def no_language_model(place: Path) -> str:
    """A model type that transformers knows, but not as a language model."""
    configure(place, model_type="vit", auto_map={"AutoModelForCausalLM": "code.Model"})
    return "custom code"


def own_tokenizer(place: Path) -> str:
    for file in place.glob("tokenizer*"):
        file.unlink()
    tokenizer = {"tokenizer_class": "Homemade", "auto_map": {"AutoTokenizer": ["code.Tok", "code.Tok"]}}
    (place / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return ""  # `heads` needs no tokenizer


def attention_from_the_hub(place: Path) -> str:
    configure(place, attn_implementation="somebody/kernel")
    return "code from the hub"


def own_generation(place: Path) -> str:
    (place / "custom_generate").mkdir()
    shutil.copy(place / "code.py", place / "custom_generate" / "generate.py")
    return ""  # the model is loaded, without it


CASES = [unknown_architecture, no_language_model, own_tokenizer, attention_from_the_hub, own_generation]


@pytest.mark.end_to_end
def test_code_of_a_folder_is_neither_run_nor_offered(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """In a new process, with "y" on standard input, as the answer to any question."""
    reasons = {}
    for case in CASES:
        place = tmp_path / case.__name__
        shutil.copytree(folder, place)
        (place / "code.py").write_text(CODE)
        reasons[place.name] = case(place)
    code = (
        "import json, sys\nfrom ablation.cli import main\n"
        "def run(*arguments):\n"
        "    print('->', *arguments[:3], file=sys.stderr, flush=True)\n"
        "    return main([*arguments])\n"
        "for name in sys.argv[1:]:\n"
        "    options = ['--prompt', 'Berlin is', '--imputation', 'zero', '--out', name + '/out']\n"
        "    sweep = run('sweep', '--model', name, *options)\n"
        "    print(json.dumps([name, sweep, run('heads', '--model', name)]), flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / name) for name in reasons)],
        cwd=tmp_path,
        input="y\n" * 20,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("it-ran")) and "[y/N]" not in done.stdout + done.stderr
    statuses = {Path(name).name: status for name, *status in map(json.loads, _json_lines(done.stdout))}
    assert statuses == {
        "unknown_architecture": [2, 2],
        "no_language_model": [2, 2],
        "own_tokenizer": [2, 0],
        "attention_from_the_hub": [2, 2],
        "own_generation": [0, 0],
    }
    for part in done.stderr.split("-> ")[1:]:
        command, *lines = part.splitlines()
        name = Path(command.split()[-1]).name
        if statuses[name][command.startswith("heads")] == 2:
            (line,) = lines
            assert line.startswith("ablation: ") and reasons[name] in line
        else:
            assert lines == []


def _json_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("[")]


def test_code_is_not_offered_for_a_configuration_alone(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "code.py").write_text(CODE)
    no_language_model(folder)
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asks"))
    assert main(["heads", "--model", str(folder)]) == 2
    assert "custom code" in capsys.readouterr().err and not list(folder.rglob("it-ran"))


def write_config(place: Path, config: PretrainedConfig) -> Path:
    config.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("gpt2", GPT2Config(n_layer=24, n_head=16, n_embd=1024), "num_hidden_layers is 24, not 12"),
        ("gpt2", GPT2Config(n_head=8), "num_attention_heads is 8, not 12"),
        ("gpt2", GPT2Config(n_embd=96), "hidden_size is 96, not 768"),
        ("gpt2", GPT2Config(vocab_size=50304), "vocab_size is 50304, not 50257"),
        ("gpt2", LlamaConfig(num_hidden_layers=1), "model_type is llama, not gpt2"),
        ("smollm2", GPT2Config(), "model_type is gpt2, not llama"),
        ("smollm2", LlamaConfig(num_hidden_layers=30), "num_attention_heads is 32, not 9"),
        ("capitals", GPT2Config(), "hidden_size is 768, not 96"),
        ("gpt2", GPT2Config(), None),
        ("smollm2", SMOLLM2, None),
    ],
)
def test_famous_name_needs_the_shape_of_its_model(
    tmp_path: Path, name: str, config: PretrainedConfig, reason: str | None
) -> None:
    place = write_config(tmp_path / "model", config)
    if reason is None:
        assert models.architecture(f"{name}={place}").config.model_type == config.model_type
        return
    for load_it in (models.architecture, load):
        with pytest.raises(ModelUnavailable, match=f"{place} is not {name}: {reason}; load it without that name"):
            load_it(f"{name}={place}")


def test_gpt2_needs_the_published_tokens(folder: Path) -> None:  # noqa: F811
    """A model of the right shape, with another tokenizer: its numbers would not be those of the publication."""
    tokenizer = load(str(folder)).tokenizer
    source = sources.resolve(f"capitals={folder}")
    with pytest.raises(ModelUnavailable, match="is not gpt2: its tokens of 'Berlin is the capital of' are "):
        models._check_tokenizer(replace(source, name="gpt2"), tokenizer)
    published = list(sources.NAMED_MODELS["gpt2"].prompt_ids or ())
    assert published == [24814, 2815, 318, 262, 3139, 286]
    tokenizer.__class__ = type("Published", (type(tokenizer),), {"__call__": lambda *_: {"input_ids": published}})
    models._check_tokenizer(replace(source, name="gpt2"), tokenizer)


def test_folder_called_gpt2_has_no_famous_name(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    place = folder.rename(tmp_path / "gpt2")
    assert load(str(place)).name == "./gpt2"


def test_own_model_has_its_name() -> None:
    place = Path(models.__file__).parent / "capitals"
    assert load(f"capitals={place}").name == "capitals"


@pytest.mark.parametrize("key", ["n_head", "n_layer", "n_embd", "vocab_size"])
@pytest.mark.parametrize("value", [-4, -3, 0])
def test_impossible_configuration_is_one_line(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: int,
) -> None:
    configure(folder, **{key: value})
    for command in (["heads"], ["sweep", "--prompt", "Berlin is", "--out", str(folder / "out")]):
        assert main([*command, "--model", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and f"is {value}" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("dory", "layers.1.self_attn.o_proj was called 2 times in one forward, not once"),  # it runs layers in a loop
        ("cpmant", "layers.0.self_att.self_attention.attention_out received (1, 34, 64)"),  # it prepends 32 tokens
        ("prophetnet", "layers.0.self_attn.out_proj was called 2 times"),  # it has two streams
    ],
)
def test_heads_refuses_models_whose_sweep_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, reason: str
) -> None:
    write_config(tmp_path / "model", config_of(family))
    assert main(["heads", "--model", str(tmp_path / "model")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and reason in err and err.count("\n") == 1


@pytest.mark.parametrize("family", ["llama", "mixtral", "bloom", "opt", "qwen3_next", "deepseek_v3", "gpt_oss"])
def test_heads_shows_models_that_are_swept(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    write_config(tmp_path / "model", config_of(family))
    assert main(["heads", "--model", str(tmp_path / "model")]) == 0
    out, err = capsys.readouterr()
    assert "heads in 3 layers" in out and err == ""


def test_small_gpt2_is_not_gpt2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["sweep", "--model", f"gpt2={folder}", "--out", str(folder / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "is not gpt2: num_hidden_layers is 2, not 12" in err and err.count("\n") == 1
