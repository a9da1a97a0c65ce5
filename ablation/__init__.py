"""Switch off attention heads of a language model, and know that it was done right.

The public names are imported on first use, so that the command line starts without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablation.edits import Ablation
    from ablation.engine import run, run_sequential
    from ablation.errors import AblationError
    from ablation.experiment import sweep_prompts
    from ablation.generation import Generation, generate
    from ablation.heads import HeadMap, find_heads
    from ablation.hook import HeadAblation
    from ablation.imputation import Imputation, Values
    from ablation.models import LoadedModel, load
    from ablation.reference import Reference, record_z
    from ablation.results import Result
    from ablation.sampling import Sampling
    from ablation.sweeps import sweep, sweep_sequential

_MODULES = {
    "Ablation": "edits",
    "AblationError": "errors",
    "Generation": "generation",
    "HeadAblation": "hook",
    "HeadMap": "heads",
    "Imputation": "imputation",
    "LoadedModel": "models",
    "Reference": "reference",
    "Result": "results",
    "Sampling": "sampling",
    "Values": "imputation",
    "find_heads": "heads",
    "generate": "generation",
    "load": "models",
    "record_z": "reference",
    "run": "engine",
    "run_sequential": "engine",
    "sweep": "sweeps",
    "sweep_prompts": "experiment",
    "sweep_sequential": "sweeps",
}

__all__ = [
    "Ablation",
    "AblationError",
    "Generation",
    "HeadAblation",
    "HeadMap",
    "Imputation",
    "LoadedModel",
    "Reference",
    "Result",
    "Sampling",
    "Values",
    "find_heads",
    "generate",
    "load",
    "record_z",
    "run",
    "run_sequential",
    "sweep",
    "sweep_prompts",
    "sweep_sequential",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("head-ablation")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ablation.{_MODULES[name]}"), name)
