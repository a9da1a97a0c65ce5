"""One requirement of the specification: how it is declared, and how it is run."""

from __future__ import annotations

import difflib
import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings

from ablation.checks.cases import Case, CaseSpec
from ablation.checks.decoders import ALL_FAMILIES, FAMILIES, Decoder
from ablation.checks.driving import returns_gradients
from ablation.checks.protocol import DEFAULT_IMPUTATIONS, FEATURES, IMPUTATIONS, Factory
from ablation.checks.remarks import remarks
from ablation.errors import InvalidDeclaration
from ablation.sources import MODEL_DTYPES

Function = Callable[[Factory, Case], None]
"""Raises AssertionError if an implementation breaks the requirement in one case."""

ADAPTER_HELPERS = ("adapter_from_context", "adapter_from_function")

LONGEST_FINDING = 1000
"""Characters of what was found, in a message: exceptions may print whole tensors."""


LIKELY_CAUSE = "  likely cause: "
"""Begins the line of a message that names the cause."""
NOT_DETERMINISTIC = "the same case passed when it was run again, so the implementation is not deterministic"


class CheckFailure(AssertionError):
    """An implementation breaks a requirement. The text needs no knowledge of the specification.

    case: in which case. error: what the function of the check raised.
    """

    def __init__(self, message: str, case: Case, error: BaseException) -> None:
        super().__init__(message)
        self.case, self.error = case, error


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
        unsupported, left = unsupported_features(factory), self.cases_for(factory)
        needed = [feature for feature in self.needs if feature in unsupported]
        needs = ""
        if not needed:
            for names, usable in (
                (self.cases.imputations or DEFAULT_IMPUTATIONS, left.imputations),
                (self.cases.families, left.families),
                (self.cases.dtypes, left.dtypes),
            ):
                needed += [name for name in names if name in unsupported and not usable]
            if not left.families and self.cases.families != FAMILIES:
                needs = f"needs {' or '.join(self.cases.families)}; "
        if not needed and "gradients" in self.needs:
            with isolated_process_state():
                if not returns_gradients(factory, left.families[0]):
                    return "does not support 'gradients': the logits that run returns do not require gradients"
        return needs + "; ".join(reasons(factory, needed)) or None

    def cases_for(self, factory: Factory) -> CaseSpec:
        """Return how the cases are drawn for an adapter: without what it does not support."""
        return self.cases.restrict_to(unsupported_features(factory), offered_imputations(factory))

    def __call__(self, factory: Factory, *, quick: bool = False) -> None:
        """Run the check on the cases that hypothesis draws, under its current profile. Raises CheckFailure.

        quick: with few examples, and without shrinking a failure.
        """
        __tracebackhide__ = True
        cases = self.cases_for(factory)

        # Decorated here, not at import, so that the caller's profile applies.
        @search_settings(quick)
        @given(cases.strategy())
        def run(case: Case) -> None:
            __tracebackhide__ = True
            self.run_case(factory, case)

        for case in reversed(list(cases.simplest())):  # hypothesis tries the example that is added last first
            run = hypothesis.example(case)(run)
        with isolated_process_state():
            try:
                run()
            except (CheckFailure, BaseExceptionGroup) as error:
                failure = first_error(error)
                if not isinstance(failure, CheckFailure):
                    raise
                if quick:
                    raise failure from failure.__cause__
                raise self.explained(factory, failure, is_flaky=failure is not error) from failure.__cause__

    def run_case(self, factory: Factory, case: Case) -> None:
        """Run the check on one case. Raises CheckFailure, whose message makes sense on its own.

        A KeyboardInterrupt propagates, since it is the user's.
        """
        __tracebackhide__ = True
        try:
            self.function(factory, case)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self.failure(factory, case, error) from (None if isinstance(error, AssertionError) else error)

    def passes(self, factory: Factory, case: Case) -> bool:
        """Return whether the check passes in one case. The implementation's warnings are not shown."""
        try:
            with warnings.catch_warnings(), isolated_process_state():
                warnings.simplefilter("ignore")
                self.run_case(factory, case)
        except CheckFailure:
            return False
        return True

    def failure(
        self, factory: Factory, case: Case, error: BaseException, notes: Iterable[str] = (), cause: str | None = None
    ) -> CheckFailure:
        """Return a CheckFailure that says what is wrong and in which case, and how to reproduce the failure.

        cause: the diagnosis, if there is one.
        """
        name, expression = adapter_name(factory), adapter_expression(factory)
        helper = [name for name in ADAPTER_HELPERS if expression.startswith(f"{name}(")]
        return CheckFailure(
            f"{name} breaks {self.id} ({self.level}): {self.requirement}\n"
            f"{f'{LIKELY_CAUSE}{cause}{chr(10)}' if cause else ''}"
            f"  found: {finding(error)}\n"
            f"  in: {case}\n"
            f"{''.join(f'  note: {note}{chr(10)}' for note in notes)}"
            f"{self._reproduction(expression, helper, case)}",
            case,
            error,
        )

    def _reproduction(self, expression: str, helpers: Iterable[str], case: Case) -> str:
        """Return the lines that repeat a failure."""
        if not isinstance(case.decoder, Decoder):  # a model cannot be written down
            return f"  repeat: the same command with -k {self.id}"
        return (
            f"  reproduce: from ablation.checks import {', '.join(('Case', 'Decoder', *helpers, 'reproduce'))}\n"
            f"  reproduce({self.id!r}, {expression}, {case!r})"
        )

    def explained(self, factory: Factory, failure: CheckFailure, *, is_flaky: bool = False) -> CheckFailure:
        """Return a failure with its diagnosis and with remarks, for which the check runs on similar cases."""
        from ablation.checks.causes.diagnosis import diagnosis  # here, since its experiments use what needs checks

        if is_flaky:
            return self.failure(factory, failure.case, failure.error, [NOT_DETERMINISTIC])
        cause = diagnosis(factory, self, failure.case, failure.error)
        notes = remarks(partial(self.passes, factory), failure.case)
        return self.failure(factory, failure.case, failure.error, notes, cause)


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


def first_error(error: BaseException) -> BaseException:
    """Return the first error of a group, such as hypothesis raises for a failure that is not deterministic."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def message_of(error: BaseException) -> str:
    """Return the text of an error, without the assertion that pytest appends in packages that have a plugin."""
    return str(error).partition("\nassert ")[0]


def finding(error: BaseException) -> str:
    """Return what an error says, in one short paragraph."""
    try:
        text = message_of(error)
    except Exception:  # of the implementation's own class of exceptions
        text = ""
    if not isinstance(error, AssertionError) or not text:
        text = f"it raised {type(error).__name__}" + (f": {text}" if text else "")
    return textwrap.shorten(text, LONGEST_FINDING, placeholder=" ...")


QUICK_EXAMPLES = 4


def search_settings(quick: bool = False, **changes: Any) -> settings:
    """Return the hypothesis settings of a check: the current profile, without what would lengthen its report."""
    count = settings().max_examples
    phases = [phase for phase in settings().phases if phase is not Phase.explain]
    if quick:
        phases = [phase for phase in phases if phase not in (Phase.shrink, Phase.reuse)]
        changes |= {"derandomize": True, "database": None}
    count = 20 if count == 100 else count  # 100 is hypothesis's own default
    return settings(
        deadline=None,
        max_examples=min(count, QUICK_EXAMPLES) if quick else count,
        print_blob=False,  # the message shows how to reproduce the failure
        report_multiple_bugs=False,  # one failure is reported, not a group of them
        suppress_health_check=list(HealthCheck),
        **{"phases": phases} | changes,
    )


@contextmanager
def isolated_process_state(*, one_thread: bool = True) -> Iterator[None]:
    """Context manager: gradients are enabled inside. On exit, restore what an implementation may have changed.

    Restored are torch's gradient mode, default dtype, number of threads, and random number generator of the CPU;
    nothing else, such as deterministic mode, which `hygiene.global_state` reports.

    one_thread: torch uses one thread inside. Small models are no slower on it, other processes disturb its speed less,
    and results do not depend on the number of cores.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    if one_thread:
        torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def adapter_name(factory: Factory) -> str:
    """Return the name of an adapter, as messages give it: that of its variable, or else that of its class.

    A helper names the class that it makes after the user's function, and another class may have the same name.
    """
    return _variable(factory) or str(getattr(factory, "__qualname__", repr(factory)))


def adapter_expression(factory: Factory) -> str:
    """Return Python that gives the adapter, for `reproduce`. The class that a helper makes may be in no variable."""
    return _variable(factory) or str(getattr(factory, "expression", adapter_name(factory)))


def _variable(factory: Factory) -> str | None:
    """Return the name of the variable of its module that holds an adapter, or None."""
    module = sys.modules.get(str(getattr(factory, "__module__", None)))
    return next((name for name, value in vars(module).items() if value is factory), None) if module else None


def unsupported_features(factory: Factory) -> Mapping[str, str]:
    """Return {name: reason} of what an adapter does not support: what it declares, and what it lacks.

    Raises InvalidDeclaration for a name that does not exist, and for `imputations` that are no names.
    """
    return {**_declared(factory), **_lacking(factory)}


def _declared(factory: Factory) -> Mapping[str, str]:
    declared: Mapping[str, str] = getattr(factory, "unsupported", {})
    if not isinstance(declared, Mapping):
        raise InvalidDeclaration(f"`unsupported` is a {type(declared).__name__}, but should be a dict, name: reason")
    known = (*FEATURES, *ALL_FAMILIES, *MODEL_DTYPES)
    for name in declared:
        if name not in known:
            otherwise = f"there are {', '.join(known)}"
            raise InvalidDeclaration(f"`unsupported` names {name!r}, {instead(name, known, otherwise)}")
    return declared


def reasons(factory: Factory, names: Iterable[str]) -> list[str]:
    """Return why an adapter does not support these features, each reason once. Each has to be unsupported."""
    lacking, declared = _lacking(factory), _declared(factory)
    names_of: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        names_of.setdefault(lacking.get(name) or declared[name], []).append(name)
    return [
        reason if found[0] in lacking else f"does not support {', '.join(map(repr, found))}: {reason}"
        for reason, found in names_of.items()
    ]


def _lacking(factory: Factory) -> dict[str, str]:
    """Return {name: reason} of the imputations, families and positions that an adapter lacks without a declaration."""
    declared, named, families = _declared(factory), _named_imputations(factory), _named_families(factory)
    lacking = {name: f"offers only {', '.join(named) or 'no imputation'}" for name in IMPUTATIONS if name not in named}
    lacking |= {name: f"supports only {', '.join(families)}" for name in ALL_FAMILIES if name not in families}
    if not takes_positions(factory):
        lacking["positions"] = "`ablate` has no parameter `positions`"
    return {name: reason for name, reason in lacking.items() if name not in declared}


def offered_imputations(factory: Factory) -> tuple[str, ...]:
    """Return the names of the imputations that an adapter offers. Raises InvalidDeclaration."""
    unsupported = unsupported_features(factory)
    return tuple(name for name in _named_imputations(factory) if name not in unsupported)


def _named_imputations(factory: Factory) -> tuple[str, ...]:
    names = getattr(factory, "imputations", DEFAULT_IMPUTATIONS)
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise InvalidDeclaration(f"`imputations` is {names!r}, but should be a tuple of names")
    if len(set(names)) < len(names):
        raise InvalidDeclaration("`imputations` names an imputation twice")
    for name in names:
        meant = name.lower().replace("_", "-").partition(":")[0]
        if name not in IMPUTATIONS and (close := difflib.get_close_matches(meant, IMPUTATIONS, n=1, cutoff=0.85)):
            raise InvalidDeclaration(f"`imputations` names {name!r}, which does not exist; did you mean {close[0]!r}?")
    return tuple(names)


def _named_families(factory: Factory) -> tuple[str, ...]:
    names = getattr(factory, "families", ALL_FAMILIES)
    if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
        raise InvalidDeclaration(f"`families` is {names!r}, but should be a tuple of names")
    for name in names:
        if name not in ALL_FAMILIES:
            otherwise = f"there are {', '.join(ALL_FAMILIES)}"
            raise InvalidDeclaration(f"`families` names {name!r}, {instead(name, ALL_FAMILIES, otherwise)}")
    return tuple(names)


def takes_positions(factory: Factory) -> bool:
    """Return whether `ablate` has a parameter `positions`. factory: a class, or a partial of one."""
    while isinstance(factory, partial):
        factory = factory.func
    try:
        return "positions" in inspect.signature(factory.ablate).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):  # methods of the instance, or written in C
        return False


def inputs_for(factory: Factory, case: Case) -> dict[str, Any]:
    """Return the inputs of a case, without positions if the implementation does not pass them on.

    Then all padding is on the right, and only the padding itself has other positions without them.
    """
    lacking = {"position_ids"} & unsupported_features(factory).keys()
    return {name: value for name, value in case.inputs().items() if name not in lacking}


def instead(name: object, known: Iterable[str], otherwise: str) -> str:
    """Say that a name does not exist, and which one may have been meant; if none is similar, what else to do."""
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f"which does not exist; {f'did you mean {close[0]!r}?' if close else otherwise}"
