"""How a mutant is tried: does a check reject it, and for a requirement rather than by accident?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from hypothesis import Phase, settings

from ablation.checks import CHECKS, Check
from tests.mutants.mutant import Mutant


class Trial(NamedTuple):
    """What a check makes of an implementation. A crash is what the adapter or the model raised, where it did."""

    rejected: bool
    reason: str = ""
    crash: BaseException | None = None


def tried(check: Check, make: Any) -> Trial | None:
    """Run one check; None where the implementation does not claim what it needs."""
    if check.missing(make):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(make)
    except AssertionError as error:  # a check that meets another exception says so by its cause
        return Trial(True, str(error), error.__cause__)
    return Trial(False)


def death(mutant: type[Mutant]) -> tuple[str, str]:
    """The id of the first check that rejects it, and why. Raises AssertionError for a survivor, or for an accident."""
    crashes = []
    for check in sorted(CHECKS, key=lambda check: check.id != mutant.killer):
        trial = tried(check, mutant)
        if trial is None or not trial.rejected:
            continue
        if trial.crash is None or (mutant.crashes and isinstance(trial.crash, mutant.crashes)):
            return check.id, trial.reason
        crashes.append(f"{check.id}: {trial.crash!r}")
    assert not crashes, f"{mutant.__name__} is killed by accident only: {'; '.join(crashes)}"
    raise AssertionError(f"{mutant.__name__} survives: {mutant.__doc__}")


@contextmanager
def few_examples(seeded: bool = False, examples: int = 15) -> Iterator[None]:
    """A profile without shrinking; the same cases each time, unless hypothesis was given a seed."""
    profile = settings.get_current_profile_name()
    settings.register_profile(
        "few",
        settings.get_profile("ci"),
        max_examples=examples,
        phases=[Phase.generate],  # no plain case, which most would fail: drawn ones have to do it
        derandomize=not seeded,
        report_multiple_bugs=False,
    )
    settings.load_profile("few")
    try:
        yield
    finally:
        settings.load_profile(profile)
