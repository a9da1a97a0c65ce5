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
    from ablation.heads import HeadMap, find_heads
    from ablation.hook import HeadAblation
    from ablation.imputation import Imputation, Values
    from ablation.models import LoadedModel, load
    from ablation.reference import Reference, record_z
    from ablation.results import Result
    from ablation.studies.curves import Curve, rank_heads
    from ablation.studies.experiment import sweep_prompts
    from ablation.studies.generation import Generation, generate
    from ablation.studies.pairs import Pairs, strongest_heads
    from ablation.studies.sampling import Sampling
    from ablation.studies.sets import greedy_order, removal_curve, sweep_pairs
    from ablation.sweeps import sweep, sweep_sequential

_MODULES = {
    "Ablation": "edits",
    "AblationError": "errors",
    "Curve": "studies.curves",
    "Generation": "studies.generation",
    "HeadAblation": "hook",
    "HeadMap": "heads",
    "Imputation": "imputation",
    "LoadedModel": "models",
    "Pairs": "studies.pairs",
    "Reference": "reference",
    "Result": "results",
    "Sampling": "studies.sampling",
    "Values": "imputation",
    "find_heads": "heads",
    "generate": "studies.generation",
    "greedy_order": "studies.sets",
    "load": "models",
    "rank_heads": "studies.curves",
    "record_z": "reference",
    "removal_curve": "studies.sets",
    "run": "engine",
    "run_sequential": "engine",
    "strongest_heads": "studies.pairs",
    "sweep": "sweeps",
    "sweep_pairs": "studies.sets",
    "sweep_prompts": "studies.experiment",
    "sweep_sequential": "sweeps",
}

__all__ = [
    "Ablation",
    "AblationError",
    "Curve",
    "Generation",
    "HeadAblation",
    "HeadMap",
    "Imputation",
    "LoadedModel",
    "Pairs",
    "Reference",
    "Result",
    "Sampling",
    "Values",
    "find_heads",
    "generate",
    "greedy_order",
    "load",
    "rank_heads",
    "record_z",
    "removal_curve",
    "run",
    "run_sequential",
    "strongest_heads",
    "sweep",
    "sweep_pairs",
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
