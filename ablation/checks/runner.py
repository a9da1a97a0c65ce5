"""The list of checks, and how they are run: by a call, as pytest tests, and by `ablation check`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis.errors import Flaky

from ablation.checks import (
    gradients,
    hygiene,
    identity,
    independence,
    layouts,
    locality,
    masks,
    numpy_oracle,
    oracles,
    positions,
    reference,
    refusal,
    smoke,
)
from ablation.checks.cases import Case
from ablation.checks.check import (
    NOT_DETERMINISTIC,
    Check,
    CheckFailure,
    adapter_name,
    first_error,
    instead,
    isolated_process_state,
)
from ablation.checks.protocol import IMPUTATIONS, Factory
from ablation.checks.signature import adapter_problem
from ablation.errors import InvalidDeclaration, one_line

CHAPTERS = (
    smoke,
    identity,
    locality,
    independence,
    masks,
    oracles,
    numpy_oracle,
    reference,
    positions,
    layouts,
    gradients,
    hygiene,
    refusal,
)

CHECKS: tuple[Check, ...] = tuple(
    found for chapter in CHAPTERS for found in vars(chapter).values() if isinstance(found, Check)
)
"""The specification, in reading order."""

NOTHING_TRIED = "no check was tried, so this run fails: the adapter supports nothing that they need"
STOPPED = "not tried, since the adapter works with no model: `smoke` fails in its simplest case with each family"
UNUSABLE = "not tried, since the checks cannot use the adapter"

KNOWN_IMPUTATIONS = "\n".join(f"- {name}: {text}." for name, text in IMPUTATIONS.items())
TERMS = "\n\n".join(
    (
        """\
The checks call an implementation of head ablation through an adapter (docs/checking.md). The z of an attention head is
its output before the attention output projection (W_O), a linear layer whose input holds the z of all heads of a layer,
one slice per head. To ablate a head is to replace its z, at all tokens or at some positions. Real tokens are those that
are not padding; the position of a token is the number of real tokens before it in its row. The bare model is the model
without an implementation on it. A clean run is a run with no head ablated. "Bit for bit" means that dtypes and values
are equal; +0 equals -0, and NaN equals NaN. "Up to rounding" means within the tolerance in
`ablation/checks/assertions.py`. A requirement is obligatory unless it is marked (should), or the adapter does not offer
or declares that it does not support what the requirement needs.

An imputation is what replaces z. The requirements that do not name one hold for any, also for those of the adapter's
own. The known imputations are:""",
        KNOWN_IMPUTATIONS,
        """\
Some requirements refer to an ablation that is written into the weights. For zero imputation, the weights of W_O that
read the head are set to 0; for scale, they are multiplied by the factor. For imputations with the same values at all
tokens, the product of these values and the weights is added to the bias first. For others, it is added to the output
of the projection at each token.
""",
    )
)

NO_TIME = "no time was left"
"""Begins the reason of a check that was tried in part, or not at all, since its time was over."""

Outcome = Literal["passed", "failed", "skipped", "expected failure", "unexpected pass"]


@dataclass(frozen=True)
class Record:
    """The outcome of one check.

    reason: the message of a failure, or why the check was skipped or was expected to fail; empty if it passed. case:
    the case of a failure.
    """

    id: str
    outcome: Outcome
    reason: str = ""
    case: Case | None = field(default=None, compare=False, repr=False)


def run_check(
    check: Check, factory: Factory, expected_failures: Mapping[str, str] | None = None, *, quick: bool = False
) -> Record:
    """Run one check on an implementation.

    If the implementation supports so little that every check would be skipped, the first check fails instead.

    expected_failures: {check id: reason}. quick: as in `Check.__call__`. Raises InvalidDeclaration if `unsupported`
    names something that does not exist. A KeyboardInterrupt propagates.
    """
    if reason := check.skip_reason(factory):
        if check is CHECKS[0] and tries_nothing(factory):
            return Record(check.id, "failed", NOTHING_TRIED)
        return Record(check.id, "skipped", reason)
    expected = (expected_failures or {}).get(check.id)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(factory, quick=quick)
    except CheckFailure as error:
        if expected is not None:
            return Record(check.id, "expected failure", expected)
        return Record(check.id, "failed", str(error), error.case)
    except BaseException as error:  # of hypothesis, not of the implementation
        cause = first_error(error)
        if isinstance(cause, KeyboardInterrupt):
            raise
        problem = NOT_DETERMINISTIC if isinstance(cause, Flaky) else one_line(cause)
        return Record(check.id, "failed", f"{check.id} could not be run: {problem}")
    return Record(check.id, "passed") if expected is None else Record(check.id, "unexpected pass", expected)


class CheckRun:
    """Runs checks on one implementation, one after the other.

    When the first check fails, `smoke` is tried with each family; if it always fails, no other check is tried, unless
    `smoke` is expected to fail. Raises InvalidDeclaration if `expected_failures` names something that does not exist.
    """

    checks = CHECKS

    def __init__(self, factory: Factory, expected_failures: Mapping[str, str] | None = None) -> None:
        self.factory, self.expected_failures = factory, expected_failures or {}
        validate_ids(self.expected_failures)
        self._stopped = False
        self._may_be_broken = CHECKS[0].id not in self.expected_failures

    def findings(self) -> list[str]:
        """Return lines about the whole run: none, since the records say everything."""
        return []

    def table(self) -> str:
        """Return a table of every head of a model: none."""
        return ""

    def __call__(self, check: Check) -> Record:
        """Run one check."""
        if self._stopped:
            return Record(check.id, "skipped", STOPPED)
        record = run_check(check, self.factory, self.expected_failures)
        if record.case is not None and self._may_be_broken:
            self._may_be_broken = False
            self._stopped = not works_with_some_model(self.factory)
        return record


def tries_nothing(factory: Factory) -> bool:
    """Return whether an implementation supports so little that no check can be tried."""
    return all(check.skip_reason(factory) for check in CHECKS)


def works_with_some_model(factory: Factory) -> bool:
    """Return whether the simplest case of the first check passes with any family and imputation."""
    first = CHECKS[0]
    cases = first.cases_for(factory)
    return any(
        first.passes(factory, case)
        for family in cases.families
        for case in replace(cases, families=(family,)).simplest()
    )


def check_implementation(
    factory: Factory,
    *,
    expected_failures: Mapping[str, str] | None = None,
    progress: Callable[[Record], object] | None = None,
) -> list[Record]:
    """Run every check, and return a record of each; `verdict` makes a summary of them.

    If the checks cannot use the adapter, the first record says why, and the others are skipped.

    expected_failures: check id -> reason. progress: called with each record as soon as it is made. Raises
    InvalidDeclaration if `expected_failures` names something that does not exist; a KeyboardInterrupt propagates.
    Nothing else is raised.
    """
    run, problem = CheckRun(factory, expected_failures), adapter_problem(factory)
    records: list[Record] = []
    for check in CHECKS:
        if not problem:
            record = run(check)
        elif records:
            record = Record(check.id, "skipped", UNUSABLE)
        else:
            record = Record(check.id, "failed", f"{adapter_name(factory)}: {problem}")
        records.append(record)
        if progress is not None:
            progress(record)
    return records


def parametrize_with_checks(
    *factories: Factory, expected_failures: Mapping[str, str] | None = None
) -> pytest.MarkDecorator:
    """Parametrize a pytest test with every check of one or several implementations. The test calls its `check`.

    @parametrize_with_checks(Mine, expected_failures={"independence.cache": "see issue 12"})
    def test_head_ablation(check):
        check()

    Raises InvalidDeclaration if `unsupported` or `expected_failures` names something that does not exist, if an adapter
    cannot be called as the checks call it, or if it supports so little that no check can be tried.
    """
    runs = [CheckRun(factory, expected_failures) for factory in factories]
    for factory in factories:
        if problem := adapter_problem(factory):
            raise InvalidDeclaration(f"{adapter_name(factory)}: {problem}")
        if tries_nothing(factory):
            raise InvalidDeclaration(f"{adapter_name(factory)}: {NOTHING_TRIED}")

    def bound(check: Check, run: CheckRun) -> Callable[[], None]:
        def call() -> None:
            __tracebackhide__ = True
            report_to_pytest(run(check))

        return call

    several = len(factories) > 1
    parameters = [
        pytest.param(
            bound(check, run),
            id=f"{adapter_name(run.factory)}-{check.id}" if several else check.id,
        )
        for run in runs
        for check in CHECKS
    ]
    return pytest.mark.parametrize("check", parameters)


def report_to_pytest(record: Record) -> None:
    """Let the current pytest test fail, skip, xfail or pass, as the record says."""
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
    """Run one check on one case. The message of a failure prints the call of this function that repeats the failure.

    Raises AssertionError if the check fails, and KeyError for an unknown id.
    """
    check = {check.id: check for check in CHECKS}[check_id]
    with isolated_process_state():
        try:
            check.run_case(factory, case)
        except CheckFailure as failure:
            raise check.explained(factory, failure) from failure.__cause__


def validate_ids(ids: Mapping[str, str]) -> None:
    """Raise InvalidDeclaration if a name is not the id of a check."""
    known = [check.id for check in CHECKS]
    for name in ids:
        if name not in known:
            otherwise = "`ablation check --list` lists the checks"
            raise InvalidDeclaration(f"the expected failures name {name!r}, {instead(name, known, otherwise)}")


def requirements_table() -> str:
    """Return the specification in Markdown: the terms, and a table with one row for each check."""
    rows = [TERMS, "| check | requirement |", "|---|---|"]
    rows += [f"| `{check.id}`{' (should)' * (check.level == 'SHOULD')} | {check.requirement} |" for check in CHECKS]
    return "\n".join(rows) + "\n"
