"""The specification of head ablation, as checks that any implementation can be run against.

An implementation is driven through a small protocol (`ablation.checks.protocol`). Each check is a plain function with
an id and a one-sentence requirement; hypothesis draws its cases: random decoders, prompts and heads.

>>> from ablation.checks import check_implementation, parametrize_with_checks

`check_implementation(Adapter)` runs all and returns records; `@parametrize_with_checks(Adapter)` makes a pytest test of each. Neither needs
this project's own tests.
"""

from ablation.checks.cases import Case
from ablation.checks.check import Check
from ablation.checks.decoders import Decoder
from ablation.checks.protocol import Implementation
from ablation.checks.runner import CHECKS, Record, check_implementation, parametrize_with_checks, reproduce

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
]
