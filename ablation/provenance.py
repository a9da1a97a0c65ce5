"""What a result was made with: versions, settings and weights, to explain why two results differ."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import numpy
import torch
import transformers
from transformers import PreTrainedModel

from ablation.errors import one_line


def environment() -> dict[str, Any]:
    """Return the versions and settings on which float results depend, at least in their last bits."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


def of_model(model: PreTrainedModel) -> dict[str, Any]:
    """Return the class, dtype, attention implementation and device of a model, and the dtype of torch.autocast or None.

    A model that is spread over several devices has all of them under `device`. quantisation: its quantisation
    configuration, or None. autocast: the dtype that torch.autocast imposes, or None.
    """
    spread: dict[str, Any] = getattr(model, "hf_device_map", {})
    device = model.device.type
    quantisation: Any = getattr(model.config, "quantization_config", None)
    if hasattr(quantisation, "to_dict"):
        quantisation = quantisation.to_dict()
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantisation": json.loads(json.dumps(quantisation, default=str)),
        "autocast": str(torch.get_autocast_dtype(device)).removeprefix("torch.") if cast else None,
        "attention": model.config._attn_implementation,
        "device": ", ".join(sorted({str(device) for device in spread.values()})) or str(model.device),
    }


def weights_digest(model: torch.nn.Module) -> dict[str, str | None]:
    """Return `weights_sha256` for a provenance; None with the reason for weights that have no plain bytes."""
    try:
        return {"weights_sha256": weights_sha256(model)}
    except Exception as error:  # each kind of sharded or quantised tensor raises another one
        return {"weights_sha256": None, "weights_sha256_missing": one_line(error)}


def weights_sha256(model: torch.nn.Module) -> str:
    """Return a SHA-256 of the names, dtypes, shapes and bytes of the state dict; file formats do not change it."""
    digest = hashlib.sha256()
    weights = model.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):  # accelerate loads some when they are needed
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        weights = get_state_dict_offloaded_model(model)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
