"""Loading of models with their tokenizers, from safetensors and GGUF files only.

Code that comes with a model, from a folder or from the hub, is never run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from platformdirs import user_cache_path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ablation.errors import ModelUnavailable
from ablation.sources import NAMED_MODELS, Source, resolve

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode, and its tokenizer.

    name: as in results. revision: the commit of a model from the hub; None for other models. ignored_weights: names of
    weights in its files that the model does not use, such as those of a classifier's head.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    revision: str | None = None
    ignored_weights: tuple[str, ...] = ()

    def decode(self, token: int) -> str:
        """Return the text of one token."""
        return str(self.tokenizer.decode([token]))


def load(
    name: str, *, download: bool = True, device: str | None = None, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a model and its tokenizer.

    name: a name in NAMED_MODELS, NAME=FOLDER (a named model whose files are in a folder), a folder, a .gguf file or a
    hub id. download: whether a model that is missing in the hub's cache is downloaded; a cached model is never updated.
    device: "cpu", "cuda", "cuda:1", "mps", ..., or "auto", which spreads the model over all devices and needs the
    package accelerate; by default a GPU if there is one, or else the CPU. dtype: of the weights. Raises
    ModelUnavailable if the model is unknown, missing or damaged, if weights do not fit the configuration, or if there
    is no such device.
    """
    load_from = partial(_load, device=_device(device), dtype=dtype)
    source = resolve(name)
    if source.name == "smollm2" and source.gguf:
        source = _converted(source)
    return _from_hub(source, load_from, download) if source.is_hub else load_from(source, local_files_only=True)


def architecture(name: str) -> PreTrainedModel:
    """Build a model on the meta device from its configuration alone, without loading weights.

    name: see `load`. Raises ModelUnavailable.
    """
    source = resolve(name)
    return _from_hub(source, _build, download=True) if source.is_hub else _build(source, local_files_only=True)


def _device(name: str | None) -> str:
    """Return the device of that name, by default a GPU if there is one. Raises ModelUnavailable."""
    if name is None:
        gpu = torch.accelerator.current_accelerator(check_available=True)
        return gpu.type if gpu else "cpu"
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except Exception as error:  # each kind of device raises its own type of error
            raise ModelUnavailable(f"no device {name!r} here: {_first_line(error)}") from error
    return name


def _load(source: Source, *, local_files_only: bool, device: str, dtype: torch.dtype) -> LoadedModel:
    """Load a model and its tokenizer from one place. Raises ModelUnavailable."""
    spread = {"device_map": "auto"} if device == "auto" else {}
    where = _place_arguments(source, local_files_only)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.place,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **spread,
            **where,
            **(_dequantisation(source.gguf) if source.gguf else {}),
        )
        model, info = loaded
        has_tokenizer = source.adapter is not None and Path(source.adapter, "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(source.adapter if has_tokenizer else source.place, **where)
        if source.adapter is not None:
            model = _with_adapter(model, source.adapter)
    except Exception as error:  # for a damaged file, the libraries raise anything
        raise ModelUnavailable(f"cannot load {source.name}: {_first_line(error)}") from error
    # Without this check, transformers would fill missing weights with random numbers.
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ModelUnavailable(
            f"cannot load {source.name}: {len(wrong)} weights are missing or misshapen, such as {wrong[0]}"
        )
    if not tokenizer.vocab_size:  # transformers makes an empty tokenizer if its files are missing
        raise ModelUnavailable(f"cannot load {source.name}: it has no tokenizer")
    model = model.eval() if spread else model.eval().to(device)
    revision = _revision(source) if source.is_hub else None
    return LoadedModel(source.name, model, tokenizer, revision, tuple(sorted(info["unexpected_keys"])))


def _with_adapter(model: PreTrainedModel, folder: str) -> Any:
    """Return the PeftModel of a model and an adapter. Raises whatever peft raises, also if weights are missing."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, folder, local_files_only=True, use_safetensors=True)


def _build(source: Source, *, local_files_only: bool) -> PreTrainedModel:
    """Build a model from the configuration in one place. Raises ModelUnavailable."""
    try:
        config = AutoConfig.from_pretrained(source.place, **_place_arguments(source, local_files_only))
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # for a damaged file, the libraries raise anything
        raise ModelUnavailable(f"cannot build {source.name}: {_first_line(error)}") from error
    return model


def _place_arguments(source: Source, local_files_only: bool) -> dict[str, Any]:
    """Return the arguments of from_pretrained that say where to look, and that forbid running code from there."""
    gguf = {"gguf_file": source.gguf} if source.gguf else {}
    return {"local_files_only": local_files_only, "trust_remote_code": False, **gguf}


def _from_hub(source: Source, load_from: Callable[..., T], download: bool) -> T:
    """Load from the hub's cache or, if the model is not there and `download` is true, from the hub.

    load_from: `_load` or `_build`. Raises ModelUnavailable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return load_from(source, local_files_only=True)
    except ModelUnavailable as error:
        if not isinstance(error.__cause__, OSError | HFValidationError):
            raise
    reason = "not on this machine"
    if download:
        try:
            HfApi().model_info(source.place, timeout=10)  # fails at once, while from_pretrained retries for long
            return load_from(source, local_files_only=False)
        except (RepositoryNotFoundError, HFValidationError):
            reason = "not on the hub under this name"
        except ModelUnavailable:
            raise
        except Exception as error:  # any error of the network
            reason = f"not on this machine, and the hub cannot be reached ({_first_line(error)})"
    name = source.place if source.adapter else source.name  # of an adapter, the base model is missing
    raise ModelUnavailable(
        f"no model {name!r}: it is {reason}. Use {', '.join(NAMED_MODELS)}, a folder, a .gguf file or a hub id."
    )


def _revision(source: Source) -> str | None:
    """Return the commit of a model in the hub's cache, or None if the model is not there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.place, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None  # .../snapshots/COMMIT/config.json


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


# ---- GGUF


def _dequantisation(gguf: str) -> dict[str, Any]:
    """Return the arguments of from_pretrained that make it dequantise a .gguf file into plain float modules."""
    try:
        from transformers import GgufConfig
    except ImportError:  # an older transformers, which always dequantises
        return {}
    return {"quantization_config": GgufConfig(gguf_file=gguf, dequantize=True)}


CHECKSUMS = "sha256.json"


def _converted(source: Source) -> Source:
    """Return the source of a cache folder that holds SmolLM2's .gguf file, converted to safetensors.

    The cache saves the 20 s that dequantising the file takes.
    """
    assert source.gguf is not None
    versions = "-".join(f"{name}-{importlib.metadata.version(name)}" for name in ("transformers", "gguf"))
    cache = user_cache_path("head-ablation")
    folder = cache / f"smollm2-{_sha256(Path(source.place, source.gguf))[:16]}-{versions}"
    if not _is_intact(folder):
        loaded = _load(source, local_files_only=True, device="cpu", dtype=torch.float32)
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
            (draft / CHECKSUMS).write_text(json.dumps(sums, indent=2))
            draft.rename(folder)
    return replace(source, place=str(folder), gguf=None)


def _is_intact(folder: Path) -> bool:
    """Whether the files of a cache folder have the checksums that were stored when they were written."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        return all(_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
