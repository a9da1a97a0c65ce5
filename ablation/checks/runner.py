"""The list of checks, and the ways to run them: one, all, or as pytest tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ablation.checks import behaviour, hygiene, life, oracles, smoke
from ablation.checks.cases import Case
from ablation.checks.check import Check, Factory

CHECKS: tuple[Check, ...] = (*smoke.CHECKS, *behaviour.CHECKS, *oracles.CHECKS, *hygiene.CHECKS, *life.CHECKS)
"""The specification, in the order in which it reads."""


@dataclass(frozen=True)
class Record:
    """The outcome of one check. reason: of a failure its message, of a skip or an expected failure why."""

    id: str
    outcome: Literal["passed", "failed", "skipped", "expected failure", "unexpected pass"]
    reason: str = ""


def check_implementation(make: Factory, *, expected_failures: Mapping[str, str] | None = None) -> list[Record]:
    """Run every check; nothing is raised. expected_failures: check id -> reason."""
    return [_record(check, make, expected_failures or {}) for check in CHECKS]


def _record(check: Check, make: Factory, expected: Mapping[str, str]) -> Record:
    if reason := check.missing(make):
        return Record(check.id, "skipped", reason)
    try:
        with _quiet():
            check(make)
    except AssertionError as error:
        if check.id in expected:
            return Record(check.id, "expected failure", expected[check.id])
        return Record(check.id, "failed", str(error))
    return (
        Record(check.id, "unexpected pass", expected[check.id]) if check.id in expected else Record(check.id, "passed")
    )


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reproduce(check_id: str, make: Factory, case: Case) -> None:
    """Run one check on one case, as a failure prints it. Raises AssertionError, or KeyError for an unknown check."""
    {check.id: check for check in CHECKS}[check_id].on(make, case)


def parametrize_with_checks(*factories: Factory, expected_failures: Mapping[str, str] | None = None) -> Any:
    """Make a pytest test of every check of these implementations; the test takes `check` and calls it.

    @parametrize_with_checks(Mine, expected_failures={"cache": "see issue 12"})
    def test_head_ablation(check):
        check()
    """
    import pytest

    expected = expected_failures or {}
    unknown = set(expected) - {check.id for check in CHECKS}
    if unknown:
        raise ValueError(f"expected_failures names no check: {', '.join(sorted(unknown))}")

    def bound(check: Check, make: Factory) -> Callable[[], None]:
        def run() -> None:
            __tracebackhide__ = True
            if reason := check.missing(make):
                pytest.skip(reason)
            check(make)

        return run

    def parameters() -> Sequence[Any]:
        several = len(factories) > 1
        return [
            pytest.param(
                bound(check, make),
                id=f"{getattr(make, '__name__', i)}-{check.id}" if several else check.id,
                marks=[pytest.mark.xfail(reason=expected[check.id], raises=AssertionError, strict=True)]
                if check.id in expected
                else [],
            )
            for i, make in enumerate(factories)
            for check in CHECKS
        ]

    return pytest.mark.parametrize("check", parameters())
