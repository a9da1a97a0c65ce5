"""The specification of head ablation, as checks that any implementation can be run against.

An implementation is driven through a small protocol (`ablation.checks.protocol`). Each check is a function with an id
and a requirement of one sentence; hypothesis draws its cases: random decoders, prompts and heads.

`check_implementation(Adapter)` runs all checks and returns records, and `verdict` sums them up;
`@parametrize_with_checks(Adapter)` makes a pytest test of each check; `ablation check MODULE:CLASS`, and
`pytest -p ablation.checks.plugin --implementation MODULE:CLASS`, run them from the command line. The names below are
imported when they are used, so that the pytest plugin loads at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    "verdict": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ablation.checks.{_MODULES.get(name, 'runner')}"), name)
