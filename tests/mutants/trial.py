"""How a mutant is tried: does a check reject it, and for a requirement rather than by accident?"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from hypothesis import Phase, settings

from ablation.checks import CHECKS, Check
from tests.mutants.mutant import Mutant


class Trial(NamedTuple):
    """The outcome of a check. crash: the error that the adapter or the model raised, if that is the reason."""

    rejected: bool
    reason: str = ""
    crash: BaseException | None = None


def try_check(check: Check, factory: Any) -> Trial | None:
    """Run one check. Returns None if the implementation does not support what the check needs."""
    if check.skip_reason(factory):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(factory)
    except AssertionError as error:  # a check raises it from any other error
        return Trial(True, str(error), error.__cause__)
    return Trial(False)


def assert_rejected(mutant: type[Mutant]) -> tuple[str, str]:
    """Return the id of the first check that rejects a mutant, and the reason.

    Raises AssertionError if the mutant survives, or if checks only reject it because something crashed.
    """
    crashes = []
    for check in sorted(CHECKS, key=lambda check: check.id != mutant.expected_check):
        trial = try_check(check, mutant)
        if trial is None or not trial.rejected:
            continue
        if trial.crash is None or (mutant.crashes and isinstance(trial.crash, mutant.crashes)):
            return check.id, trial.reason
        crashes.append(f"{check.id}: {trial.crash!r}")
    assert not crashes, f"{mutant.__name__} is only rejected by crashes: {'; '.join(crashes)}"
    raise AssertionError(f"{mutant.__name__} survives: {mutant.__doc__}")


def diagnosed(mutant: type[Mutant], id: str) -> tuple[bool, str | None]:
    """Return whether a check rejects a mutant, and the likely cause that it prints, if any."""
    trial = try_check(next(check for check in CHECKS if check.id == id), mutant)
    if trial is None or not trial.rejected:
        return False, None
    cause = re.search("^  likely cause: (.*)$", trial.reason, re.MULTILINE)
    return True, cause[1] if cause else None


@contextmanager
def few_examples(seeded: bool = False, examples: int = 15) -> Iterator[None]:
    """Load a profile without shrinking, with the same cases each time unless hypothesis was given a seed.

    The simplest cases are left out: most mutants would fail in them, and the drawn cases are to be tested.
    """
    profile = settings.get_current_profile_name()
    settings.register_profile(
        "few",
        settings.get_profile("ci"),
        max_examples=examples,
        phases=[Phase.generate],
        derandomize=not seeded,
        report_multiple_bugs=False,
    )
    settings.load_profile("few")
    try:
        yield
    finally:
        settings.load_profile(profile)
