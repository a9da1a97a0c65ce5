"""Loading of models with their tokenizers, from safetensors and GGUF files only.

Code that comes with a model, from a folder or from the hub, is never run.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ablation.edits import Receipt, verify_called_once, verify_shape
from ablation.errors import ModelUnavailable, one_line
from ablation.heads import AttentionLayer, HeadMap
from ablation.memory import accelerator, num_accelerators
from ablation.output import sha256
from ablation.processes import Processes
from ablation.sources import NAMED_MODELS, Source, resolve

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode, and its tokenizer.

    name: what results call the model. model: a PeftModel if an adapter was loaded. revision: the commit of a model from
    the hub; None for other models. source: the argument `name` of `load`; a path is made absolute. ignored_weights:
    names of weights in its files that the model does not use, such as those of a classifier's head.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    revision: str | None = None
    source: str | None = None
    ignored_weights: tuple[str, ...] = ()

    def decode(self, *tokens: int) -> str:
        """Return the text of tokens; an empty text for an id that the tokenizer does not have."""
        try:
            return str(self.tokenizer.decode(list(tokens)))
        except (LookupError, TypeError, ValueError, OverflowError):  # the embedding may have more ids
            return ""


def load(
    name: str | os.PathLike[str],
    *,
    download: bool = True,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Load a model and its tokenizer.

    name: a name in NAMED_MODELS, NAME=FOLDER (a named model whose files are in a folder), a folder, a .gguf file or a
    hub id. download: whether a model that is missing in the hub's cache is downloaded; a cached model is never updated.
    device: "cpu", "cuda", "cuda:1", "mps", ..., or "auto", which spreads the model over all devices and needs the
    package accelerate; by default a GPU if there is one, or else the CPU. dtype: of the weights. Raises
    ModelUnavailable if the model is unknown, missing or damaged, if weights do not fit the configuration, if a
    NAME=FOLDER is not the named model, or if there is no such device.
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


def check_projections(model: PreTrainedModel, heads: HeadMap) -> None:
    """Raise AblationNotApplied or UnsupportedModel if a forward pass does not give each projection its z, once.

    model: of `architecture`. Families whose code needs values, which tensors on the meta device lack, are not checked.
    """
    receipt, received = Receipt(heads.num_layers), dict[AttentionLayer, Tensor]()

    def look(layer: AttentionLayer, projection: nn.Module, args: tuple[Tensor, ...]) -> None:
        receipt.calls[layer.index] += 1
        received[layer] = args[0]

    with ExitStack() as hooks:
        for layer in heads.layers:
            hooks.callback(layer.projection.register_forward_pre_hook(partial(look, layer)).remove)
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        hooks.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        try:
            # bfloat16 is the only dtype of grouped experts. In this mode transformers asks for no values of a mask.
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
                ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
                model.bfloat16()(ids, use_cache=False)
        except Exception:
            return
    for layer in heads.layers:
        verify_called_once(layer, receipt)
        verify_shape(layer, received[layer], *ids.shape)


def _device(name: str | None) -> str:
    """Return the device of that name, by default a GPU if there is one, of its own for each process of a launcher.

    Raises ModelUnavailable.
    """
    if name is None:
        gpu, processes = accelerator(), Processes.current()
        if gpu is None or processes.total == 1:
            return gpu.type if gpu else "cpu"
        return f"{gpu.type}:{processes.local_rank % num_accelerators()}"  # each process takes its own
    if name != "auto":
        try:
            torch.empty(0, device=name).cpu()  # from the meta device nothing can be copied
        except Exception as error:  # each kind of device raises its own type of error
            raise ModelUnavailable(f"no device {one_line(name)!r} here: {one_line(error)}") from error
    return name


def _load(source: Source, *, local_files_only: bool, device: str, dtype: torch.dtype) -> LoadedModel:
    """Load a model and its tokenizer from one place. Raises ModelUnavailable."""
    spread = {"device_map": "auto"} if device == "auto" else {}
    where = _place_arguments(source, local_files_only)
    try:
        _check_config(source, AutoConfig.from_pretrained(source.place, **where))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.place,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the name of the weight
            **_adapter_lookup(local_files_only),
            **spread,
            **where,
            **(_dequantisation(source.gguf) if source.gguf else {}),
        )
        model, info = loaded
        has_tokenizer = source.adapter is not None and Path(source.adapter, "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(source.adapter if has_tokenizer else source.place, **where)
        if source.gguf:
            _set_bos(tokenizer, Path(source.place, source.gguf))
        if source.adapter is not None:
            model = _with_adapter(model, source.adapter)
    except ModelUnavailable:
        raise
    except Exception as error:  # for a damaged file, the libraries raise anything
        reason = _only_pickles(source) or one_line(error)
        raise ModelUnavailable(f"cannot load {source.name}: {reason}") from error
    # Without this check, transformers would fill missing weights with random numbers.
    missing, misshapen = sorted(info["missing_keys"]), sorted(key for key, *_ in info["mismatched_keys"])
    if wrong := missing + misshapen:
        raise ModelUnavailable(
            f"cannot load {source.name}: {len(wrong)} weights are missing or misshapen, such as {wrong[0]}"
        )
    _check_tokenizer(source, tokenizer)
    try:
        model = model.eval() if spread else model.eval().to(device)
    except Exception as error:  # of the device: it lacks the memory, or the dtype
        raise ModelUnavailable(f"cannot move {source.name} to {device}: {one_line(error)}") from error
    return LoadedModel(
        source.name,
        model,
        tokenizer,
        revision=source.revision() if source.is_hub else None,
        source=source.full,
        ignored_weights=tuple(sorted(info["unexpected_keys"])),
    )


def _adapter_lookup(local_files_only: bool) -> dict[str, Any]:
    """Return the arguments of from_pretrained that keep its search for an adapter, with peft installed, off the hub.

    transformers 4 refuses them, and may ask the hub once for an adapter of a model in the hub's cache.
    """
    from transformers.integrations import peft

    known = hasattr(peft, "maybe_load_adapters")  # transformers 5
    return {"adapter_kwargs": {"local_files_only": local_files_only}} if known else {}


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
        _check_config(source, config)
        with torch.device("meta"):
            # Without the argument, transformers asks on standard input whether to run code of the folder.
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    except ModelUnavailable:
        raise
    except Exception as error:  # for a damaged file, the libraries raise anything
        raise ModelUnavailable(f"cannot build {source.name}: {one_line(error)}") from error
    return model


def _check_config(source: Source, config: PretrainedConfig) -> None:
    """Raise ModelUnavailable unless a configuration is possible, runs no foreign code, and is that of a named model."""
    text = config.get_text_config(decoder=True)
    attention = getattr(config, "_attn_implementation", None)
    if "/" in str(attention):
        raise ModelUnavailable(
            f"cannot load {source.name}: its configuration asks for the attention {attention!r}, which is code "
            "from the hub, and is not run: remove attn_implementation from its config.json"
        )
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value < 1:
            raise ModelUnavailable(f"cannot load {source.name}: its configuration says that {key} is {value}")
    if source.name in NAMED_MODELS:
        for key, expected in NAMED_MODELS[source.name].config.items():
            if (value := getattr(config, key, None)) != expected:
                raise _not_the_named_model(source, f"{key} is {one_line(value)}, not {expected}")


def _check_tokenizer(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelUnavailable unless a tokenizer has words, and those of a named model."""
    # If its files are missing, transformers makes a tokenizer of special tokens.
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not any(letter.isalnum() for word in words for letter in str(word)):
        raise ModelUnavailable(f"cannot load {source.name}: it has no tokenizer; copy its tokenizer files to the model")
    named = NAMED_MODELS.get(source.name)
    if named and named.prompt_ids:
        ids = tokenizer(named.question.prompt)["input_ids"]
        if ids != list(named.prompt_ids):
            raise _not_the_named_model(source, f"its tokens of {named.question.prompt!r} are {ids}")


def _not_the_named_model(source: Source, reason: str) -> ModelUnavailable:
    return ModelUnavailable(f"{source.place} is not {source.name}: {one_line(reason)}; load it without that name")


def _only_pickles(source: Source) -> str | None:
    """Say that a folder has pickled weights and no safetensors, and how to convert them, if this is so."""
    folder = Path(source.place)
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if source.is_hub or source.gguf or not pickles or any(folder.glob("*.safetensors")):
        return None
    return (
        f"its weights are in {pickles[0]}, and only safetensors are loaded, since a pickle can run code. If you trust "
        'it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
        f'M.from_pretrained({source.place!r}).save_pretrained({source.place!r})"'
    )


def _place_arguments(source: Source, local_files_only: bool) -> dict[str, Any]:
    """Return the arguments of from_pretrained that say where to look, and that forbid running code from there."""
    gguf = {"gguf_file": source.gguf} if source.gguf else {}
    return {"local_files_only": local_files_only, "trust_remote_code": False, **gguf}


def _from_hub(source: Source, load_from: Callable[..., T], download: bool) -> T:
    """Load from the hub's cache or, if the model is not there and `download` is true, from the hub.

    load_from: `_load` or `_build`. Raises ModelUnavailable.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        return load_from(source, local_files_only=True)
    except ModelUnavailable as error:
        if not isinstance(error.__cause__, OSError | HFValidationError):
            raise
    if not download:
        raise source.unknown("not on this machine")
    source.ask_hub()
    return load_from(source, local_files_only=False)


# ---- GGUF


def _dequantisation(gguf: str) -> dict[str, Any]:
    """Return the arguments of from_pretrained that make it dequantise a .gguf file into plain float modules."""
    try:
        from transformers import GgufConfig
    except ImportError:  # an older transformers, which always dequantises
        return {}
    return {"quantization_config": GgufConfig(gguf_file=gguf, dequantize=True)}


def _set_bos(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Let a tokenizer begin texts with its BOS token, or not, as the .gguf file says; transformers 4 ignores that."""
    from gguf import GGUFReader

    setting = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    if setting is not None and getattr(tokenizer, "add_bos_token", None) is (not setting.contents()):
        tokenizer.add_bos_token = setting.contents()


CHECKSUMS = "sha256.json"


def _converted(source: Source) -> Source:
    """Return the source of a cache folder that holds SmolLM2's .gguf file, converted to safetensors.

    The cache saves the 20 s that dequantising the file takes.
    """
    assert source.gguf is not None
    versions = "-".join(f"{name}-{importlib.metadata.version(name)}" for name in ("transformers", "gguf"))
    cache = user_cache_path("head-ablation")
    folder = cache / f"smollm2-{sha256(Path(source.place, source.gguf))[:16]}-{versions}"
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
            sums = {file.name: sha256(file) for file in sorted(draft.iterdir())}
            (draft / CHECKSUMS).write_text(json.dumps(sums, indent=2))
            draft.rename(folder)
    return replace(source, place=str(folder), gguf=None)


def _is_intact(folder: Path) -> bool:
    """Whether the files of a cache folder have the checksums that were stored when they were written."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        return all(sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False
