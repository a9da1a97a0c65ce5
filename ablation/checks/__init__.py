"""The specification of head ablation, as checks that any implementation can be run against.

The checks call an implementation through an adapter, a class with the methods in `ablation.checks.protocol`. Each check
is a function with an id and a requirement of one sentence. Hypothesis draws the cases of a check: random decoders,
prompts and heads.

`check_implementation(Adapter)` runs all checks and returns a record of each; `verdict` sums the records up.
`@parametrize_with_checks(Adapter)` runs each check as a pytest test. On the command line, `ablation check MODULE:CLASS`
runs the checks, and so does `pytest --ablation-implementation MODULE:CLASS`. The public names are
imported on first use, so that loading the pytest plugin takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablation.checks.adapters import adapter_from_context, adapter_from_function
    from ablation.checks.cases import Case
    from ablation.checks.check import Check
    from ablation.checks.decoders import Decoder
    from ablation.checks.protocol import Implementation
    from ablation.checks.runner import CHECKS, Record, check_implementation, parametrize_with_checks, reproduce
    from ablation.checks.summary import verdict

__all__ = [
    "CHECKS",
    "Case",
    "Check",
    "Decoder",
    "Implementation",
    "Record",
    "adapter_from_context",
    "adapter_from_function",
    "check_implementation",
    "parametrize_with_checks",
    "reproduce",
    "verdict",
]

_MODULES = {
    "Case": "cases",
    "Check": "check",
    "Decoder": "decoders",
    "Implementation": "protocol",
    "adapter_from_context": "adapters",
    "adapter_from_function": "adapters",
    "verdict": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ablation.checks.{_MODULES.get(name, 'runner')}"), name)
