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
from ablation.checks.decoders import DTYPES, FAMILIES, LAYOUTS
from ablation.checks.driving import returns_gradients
from ablation.checks.protocol import FEATURES, Factory

Function = Callable[[Factory, Case], None]
"""Raises AssertionError if an implementation breaks the requirement in one case."""


@dataclass(frozen=True)
class Check:
    """One requirement. It is made by the decorator `check`, and called with the class of an adapter.

    cases: how its cases are drawn. needs: features without which it cannot be tried. level: MUST, or SHOULD if good
    implementations may differ.
    """

    id: str
    requirement: str
    function: Function
    cases: CaseSpec
    needs: tuple[str, ...] = ()
    level: Literal["MUST", "SHOULD"] = "MUST"

    def skip_reason(self, factory: Factory) -> str | None:
        """Return why the check cannot be tried on an implementation, or None."""
        unsupported = unsupported_features(factory)
        needed = [feature for feature in self.needs if feature in unsupported]
        left = self.cases.restrict_to(unsupported)
        if not needed and not (left.imputations and left.families and left.dtypes):
            drawn = (*self.cases.imputations, *self.cases.families, *self.cases.dtypes)
            needed = [name for name in drawn if name in unsupported]
        if not needed and "gradients" in self.needs:
            with isolated_process_state():
                if not returns_gradients(factory, left.families[0]):
                    return "does not support 'gradients': the logits that run returns do not require gradients"
        return "; ".join(f"does not support {name!r}: {unsupported[name]}" for name in needed) or None

    def __call__(self, factory: Factory) -> None:
        """Run the check on drawn cases, under the current hypothesis profile. Raises AssertionError."""
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
        """Run the check on one case. Raises AssertionError, whose text needs no knowledge of the specification."""
        __tracebackhide__ = True
        try:
            self.function(factory, case)
        except Exception as error:
            raise self.failure(factory, case, error) from (None if isinstance(error, AssertionError) else error)

    def failure(self, factory: Factory, case: Case, error: Exception) -> AssertionError:
        """Return the error that says what is wrong, in which case, and how to reproduce it."""
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
    """Make a `Check` of a function. The specification holds the checks of all chapters, in the order of definition."""
    return lambda function: Check(id, requirement, function, cases or CaseSpec(), needs, level)


def max_examples() -> int:
    """Cases for each check: as the current profile says, or 20 if that is hypothesis's default of 100."""
    count = settings().max_examples
    return 20 if count == 100 else count


@contextmanager
def isolated_process_state() -> Iterator[None]:
    """Restore the state of torch that an implementation or a check may change.

    Checks run on one thread: as fast on small models, steady under load, and with the same bits everywhere.
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
    """Return what an adapter declares as unsupported. Raises ValueError for a name that no check asks for."""
    unsupported: Mapping[str, str] = getattr(factory, "unsupported", {})
    known = (*FEATURES, *FAMILIES, *LAYOUTS, *DTYPES)
    if unknown := [name for name in unsupported if name not in known]:
        raise ValueError(f"`unsupported` names {unknown[0]!r}, which is none of {', '.join(known)}")
    return unsupported
