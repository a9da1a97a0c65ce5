"""The list of checks, and the one way to an outcome: for plain calls, for pytest, and for `ablation check`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import pytest

from ablation.checks import (
    gradients,
    hygiene,
    identity,
    independence,
    layouts,
    locality,
    masks,
    oracles,
    refusal,
    smoke,
)
from ablation.checks.cases import Case
from ablation.checks.check import Check, isolated_process_state, unsupported_features
from ablation.checks.protocol import Factory
from ablation.checks.signature import signature_problem

CHAPTERS = (smoke, identity, locality, independence, masks, oracles, layouts, gradients, hygiene, refusal)

CHECKS: tuple[Check, ...] = tuple(
    found for chapter in CHAPTERS for found in vars(chapter).values() if isinstance(found, Check)
)
"""The specification, in reading order."""

NOTHING_TRIED = "no check was tried, so this run fails: the adapter supports nothing that they need"

Outcome = Literal["passed", "failed", "skipped", "expected failure", "unexpected pass"]


@dataclass(frozen=True)
class Record:
    """What a check found. reason: the message of a failure; why a check was skipped, or was expected to fail."""

    id: str
    outcome: Outcome
    reason: str = ""


def run_check(check: Check, factory: Factory, expected_failures: Mapping[str, str] | None = None) -> Record:
    """Run one check on an implementation. Raises ValueError for a wrong declaration only.

    If an implementation supports so little that no check can be tried, the first check fails.

    expected_failures: check id -> reason.
    """
    if reason := check.skip_reason(factory):
        if check is CHECKS[0] and all(other.skip_reason(factory) for other in CHECKS):
            return Record(check.id, "failed", NOTHING_TRIED)
        return Record(check.id, "skipped", reason)
    expected = (expected_failures or {}).get(check.id)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(factory)
    except AssertionError as error:
        return (
            Record(check.id, "failed", str(error))
            if expected is None
            else Record(check.id, "expected failure", expected)
        )
    except Exception as error:  # of hypothesis, not of the implementation
        return Record(check.id, "failed", f"{check.id} could not be run: {type(error).__name__}: {error}")
    return Record(check.id, "passed") if expected is None else Record(check.id, "unexpected pass", expected)


def check_implementation(factory: Factory, *, expected_failures: Mapping[str, str] | None = None) -> list[Record]:
    """Run every check, and return a record of each. expected_failures: check id -> reason.

    Raises ValueError if `unsupported` or `expected_failures` names something that does not exist, and nothing else.
    """
    unsupported_features(factory)
    validate_ids(expected_failures or {})
    return [run_check(check, factory, expected_failures) for check in CHECKS]


def parametrize_with_checks(
    *factories: Factory, expected_failures: Mapping[str, str] | None = None
) -> pytest.MarkDecorator:
    """Make a pytest test of every check of these implementations. The test takes `check` and calls it.

    @parametrize_with_checks(Mine, expected_failures={"independence.cache": "see issue 12"})
    def test_head_ablation(check):
        check()

    Raises ValueError if `unsupported` or `expected_failures` names something that does not exist, or if an adapter
    cannot be called as the checks call it.
    """
    validate_ids(expected_failures or {})
    for factory in factories:
        if problem := signature_problem(factory):
            raise ValueError(f"{getattr(factory, '__qualname__', repr(factory))}: {problem}")

    def bound(check: Check, factory: Factory) -> Callable[[], None]:
        def run() -> None:
            __tracebackhide__ = True
            report_to_pytest(run_check(check, factory, expected_failures))

        return run

    several = len(factories) > 1
    parameters = [
        pytest.param(
            bound(check, factory),
            id=f"{getattr(factory, '__name__', number)}-{check.id}" if several else check.id,
        )
        for number, factory in enumerate(factories)
        for check in CHECKS
    ]
    return pytest.mark.parametrize("check", parameters)


def report_to_pytest(record: Record) -> None:
    """End a pytest test with the outcome of a record."""
    __tracebackhide__ = True
    match record.outcome:
        case "failed":
            pytest.fail(record.reason, pytrace=False)
        case "unexpected pass":
            pytest.fail(f"{record.id} passes, but is expected to fail: {record.reason}", pytrace=False)
        case "skipped":
            pytest.skip(record.reason)
        case "expected failure":
            pytest.xfail(record.reason)


def reproduce(check_id: str, factory: Factory, case: Case) -> None:
    """Run one check on one case, as a failure prints it. Raises AssertionError, or KeyError for an unknown id."""
    with isolated_process_state():
        {check.id: check for check in CHECKS}[check_id].run_case(factory, case)


def validate_ids(ids: Mapping[str, str]) -> None:
    """Raise ValueError if a name is not the id of a check."""
    known = {check.id for check in CHECKS}
    if unknown := sorted(set(ids) - known):
        raise ValueError(f"expected_failures names no check: {', '.join(unknown)}")


def requirements_table() -> str:
    """Return the specification as a Markdown table: a row for each check."""
    rows = ["| check | requirement |", "|---|---|"]
    rows += [f"| `{check.id}`{' (should)' * (check.level == 'SHOULD')} | {check.requirement} |" for check in CHECKS]
    return "\n".join(rows) + "\n"
