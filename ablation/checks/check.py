"""One requirement of the specification: how it is declared, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import FlakyFailure

from ablation.checks.cases import Case, CaseSpec
from ablation.checks.decoders import DTYPES, FAMILIES
from ablation.checks.protocol import FEATURES, Factory

Function = Callable[[Factory, Case], None]
"""Raises AssertionError if an implementation breaks the requirement in one case."""


@dataclass(frozen=True)
class Check:
    """One requirement of the specification, made by the decorator `check`.

    Calling a check with an adapter class runs it. cases: how its cases are drawn. needs: features without which the
    check is skipped. level: MUST, or SHOULD if good implementations may differ.
    """

    id: str
    requirement: str
    function: Function
    cases: CaseSpec
    needs: tuple[str, ...] = ()
    level: Literal["MUST", "SHOULD"] = "MUST"

    def skip_reason(self, factory: Factory) -> str | None:
        """Return why the check cannot be tried on an implementation, or None if it can be tried."""
        unsupported = unsupported_features(factory)
        needed = [feature for feature in self.needs if feature in unsupported]
        left = self.cases.restrict_to(unsupported)
        if not needed and not (left.imputations and left.families and left.dtypes):
            drawn = (*self.cases.imputations, *self.cases.families, *self.cases.dtypes)
            needed = [name for name in drawn if name in unsupported]
        return "; ".join(f"does not support {name!r}: {unsupported[name]}" for name in needed) or None

    def __call__(self, factory: Factory) -> None:
        """Run the check on the cases that hypothesis draws, under its current profile. Raises AssertionError."""
        __tracebackhide__ = True
        cases = self.cases.restrict_to(unsupported_features(factory))

        # Decorated here, not at import, so that the caller's profile applies.
        @hypothesis.settings(
            deadline=None,
            max_examples=max_examples(),
            phases=[phase for phase in settings().phases if phase is not Phase.explain],
            print_blob=False,  # the message shows how to reproduce the failure
            report_multiple_bugs=False,  # one failure is reported, not a group of them
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(cases.strategy())
        def run(case: Case) -> None:
            __tracebackhide__ = True
            self.run_case(factory, case)

        for case in reversed(list(cases.simplest())):  # hypothesis tries the example that is added last first
            run = hypothesis.example(case)(run)
        with isolated_process_state():
            try:
                run()
            except FlakyFailure as error:
                (first, *_) = error.exceptions
                flaky = "the same case passed when it was run again, so the implementation is not deterministic"
                raise AssertionError(f"{first}\n  flaky: {flaky}") from first.__cause__

    def run_case(self, factory: Factory, case: Case) -> None:
        """Run the check on one case. Raises AssertionError with a message that makes sense on its own."""
        __tracebackhide__ = True
        try:
            self.function(factory, case)
        except Exception as error:
            raise self.failure(factory, case, error) from (None if isinstance(error, AssertionError) else error)

    def failure(self, factory: Factory, case: Case, error: Exception) -> AssertionError:
        """Return an AssertionError that says what is wrong and in which case, and how to reproduce the failure."""
        name = getattr(factory, "__qualname__", repr(factory))
        found = str(error) if isinstance(error, AssertionError) else f"it raised {type(error).__name__}: {error}"
        return AssertionError(
            f"{name} breaks {self.id} ({self.level}): {self.requirement}\n"
            f"  found: {found}\n"
            f"  in: {case}\n"
            "  reproduce: from ablation.checks import Case, Decoder, reproduce\n"
            f"  reproduce({self.id!r}, {name}, {case!r})"
        )


def check(
    id: str,
    requirement: str,
    *,
    cases: CaseSpec | None = None,
    needs: tuple[str, ...] = (),
    level: Literal["MUST", "SHOULD"] = "MUST",
) -> Callable[[Function], Check]:
    """Return a decorator that makes a function into a `Check`.

    The specification consists of the checks of all chapters, in the order in which they are defined.
    """
    return lambda function: Check(id, requirement, function, cases or CaseSpec(), needs, level)


def max_examples() -> int:
    """Return the number of cases per check: that of the current profile, or 20 if it is hypothesis's default, 100."""
    count = settings().max_examples
    return 20 if count == 100 else count


@contextmanager
def isolated_process_state() -> Iterator[None]:
    """Context manager: on exit, restore the state of torch that an implementation or a check may have changed.

    Inside, torch uses one thread. Small models are no slower on it, other processes disturb its speed less, and results
    do not depend on the number of cores.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def unsupported_features(factory: Factory) -> Mapping[str, str]:
    """Return {name: reason} of what an adapter declares as unsupported. Raises ValueError for an unknown name."""
    unsupported: Mapping[str, str] = getattr(factory, "unsupported", {})
    known = (*FEATURES, *FAMILIES, *DTYPES)
    if unknown := [name for name in unsupported if name not in known]:
        raise ValueError(f"`unsupported` names {unknown[0]!r}, which is none of {', '.join(known)}")
    return unsupported
