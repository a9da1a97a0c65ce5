"""One requirement of the specification, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import FlakyFailure
from transformers import PreTrainedModel

from ablation.checks.cases import Case, CaseSpec
from ablation.checks.decoders import DTYPES, FAMILIES
from ablation.checks.protocol import FEATURES, Implementation

Factory = Callable[[PreTrainedModel], Implementation]


@dataclass(frozen=True)
class Check:
    """One requirement. function: raises AssertionError where an implementation breaks it, in one case.

    needs: features without which it cannot be tried. level: MUST, or SHOULD where good implementations may differ.
    """

    id: str
    requirement: str
    function: Callable[[Factory, Case], None]
    cases: CaseSpec
    needs: tuple[str, ...] = ()
    level: Literal["MUST", "SHOULD"] = "MUST"

    def missing(self, make: Factory) -> str | None:
        """Why this cannot be tried on an implementation, or None."""
        unsupported = declared(make)
        needs = [feature for feature in self.needs if feature in unsupported]
        left = self.cases.without(unsupported)
        if not needs and not (left.imputations and left.families and left.dtypes):
            drawn = (*self.cases.imputations, *self.cases.families, *self.cases.dtypes)
            needs = [name for name in drawn if name in unsupported]
        return "; ".join(f"does not support {name!r}: {unsupported[name]}" for name in needs) or None

    def __call__(self, make: Factory) -> None:
        """Run the check on drawn cases, under the hypothesis profile in force. Raises AssertionError."""
        __tracebackhide__ = True

        cases = self.cases.without(declared(make))

        # Decorated here, not at import, so that the profile is that of the caller.
        @hypothesis.settings(
            deadline=None,
            max_examples=examples(),
            phases=[phase for phase in settings().phases if phase is not Phase.explain],
            print_blob=False,  # a failure says itself how to see it again
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(cases.strategy())
        def check(case: Case) -> None:
            __tracebackhide__ = True
            self.on(make, case)

        for case in reversed(list(cases.plain())):  # the example that is added last is tried first
            check = hypothesis.example(case)(check)
        with apart():
            try:
                check()
            except FlakyFailure as error:  # of an implementation that is not deterministic
                (first, *_) = error.exceptions
                again = "the same case passed when it was run again: what is tested is not deterministic"
                raise AssertionError(f"{first}\n  flaky: {again}") from first.__cause__

    def on(self, make: Factory, case: Case) -> None:
        """Run the check on one case. Raises AssertionError, whose text needs no knowledge of the suite."""
        __tracebackhide__ = True
        try:
            self.function(make, case)
        except Exception as error:
            raise self.failure(make, case, error) from (None if isinstance(error, AssertionError) else error)

    def failure(self, make: Factory, case: Case, error: Exception) -> AssertionError:
        """The error that says what is wrong, where, and how to see it again."""
        name = getattr(make, "__qualname__", repr(make))
        what = str(error) if isinstance(error, AssertionError) else f"it raised {type(error).__name__}: {error}"
        return AssertionError(
            f"{name} breaks {self.id} ({self.level}): {self.requirement}\n"
            f"  found: {what}\n"
            f"  in: {case}\n"
            "  again: from ablation.checks import Case, Decoder, reproduce\n"
            f"  reproduce({self.id!r}, {name}, {case!r})"
        )


def examples() -> int:
    """Cases a check: as the profile in force has it, or 20 where that is hypothesis's own of 100."""
    count = settings().max_examples
    return 20 if count == 100 else count


@contextmanager
def apart() -> Iterator[None]:
    """What an implementation leaves in the process, or a check needs of it, is put back.

    On one thread: as fast on models so small, steady under load, and the same bits everywhere.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def declared(make: Factory) -> Mapping[str, str]:
    """What an implementation says that it cannot do. Raises ValueError for what nobody asks of it."""
    unsupported: Mapping[str, str] = getattr(make, "unsupported", {})
    known = (*FEATURES, *FAMILIES, *DTYPES)
    if unknown := [name for name in unsupported if name not in known]:
        raise ValueError(f"`unsupported` names {unknown[0]!r}, which is none of {', '.join(known)}")
    return unsupported
