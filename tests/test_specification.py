"""The specification on our own hook."""

from __future__ import annotations

from typing import Any

from ablation.checks import parametrize_with_checks
from tests.implementations.ours import Ours


@parametrize_with_checks(Ours)
def test_requirement(check: Any) -> None:
    check()
