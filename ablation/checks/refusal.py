"""Chapter 12, refusal: invalid heads and imputations are refused before any forward pass, without side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ablation.checks.assertions import assert_identical
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check, message_of, unsupported_features
from ablation.checks.decoders import Subject
from ablation.checks.driving import ablate, discard, made, run
from ablation.checks.observe import assert_state_equals, state
from ablation.checks.protocol import Factory

MISSING_HEADS: dict[str, Callable[[Subject], Any]] = {
    "head too large": lambda decoder: (0, decoder.num_heads),
    "head negative": lambda decoder: (0, -1),
    "layer too large": lambda decoder: (decoder.num_layers, 0),
    "layer negative": lambda decoder: (-1, 0),
}
WRONG_TYPES: dict[str, Any] = {
    "head True": (0, True),
    "layer False": (False, 0),
    "head 0.0": (0, 0.0),
    "layer '0'": ("0", 0),
}
Calls = dict[str, tuple[list[Any], Any]]
"""What is wrong with a call of `ablate` -> its heads and its imputation."""
UNKNOWN_IMPUTATIONS: tuple[Any, ...] = ("median", "", "Zero", "zer", "scale:", "scale:much", None)


@check(
    "refusal.head",
    "A layer or head that does not exist is refused before any forward pass, by an error that states a reason.",
    cases=CaseSpec(dtypes=("float32",)),
    needs=("validation",),
    level="SHOULD",
)
def head(factory: Factory, case: Case) -> None:
    """Name a missing head alone, after heads that exist, or before them."""
    good = list(case.heads) if "multiple_heads" not in unsupported_features(factory) else []
    before, after = {0: ([], []), 1: (good, []), 2: ([], good)}[case.rows[0][0] % 3]
    calls = {
        what: ([*before, missing(case.decoder), *after], case.imputation) for what, missing in MISSING_HEADS.items()
    }
    _assert_each_refused(factory, case, calls)


@check(
    "refusal.type",
    "A layer or head that is not an integer is refused before any forward pass, by an error that states a reason.",
    cases=CaseSpec(dtypes=("float32",)),
    needs=("validation",),
    level="SHOULD",
)
def type_(factory: Factory, case: Case) -> None:
    calls = {what: ([pair], case.imputation) for what, pair in WRONG_TYPES.items()}
    _assert_each_refused(factory, case, calls)


@check(
    "refusal.imputation",
    "If several imputations are offered, an unknown one is refused before any forward pass, by an error that states a "
    "reason.",
    cases=CaseSpec(dtypes=("float32",)),
    needs=("validation", "zero", "mean"),  # the adapter of a single imputation may ignore the name
    level="SHOULD",
)
def imputation(factory: Factory, case: Case) -> None:
    calls = {f"imputation {unknown!r}": (list(case.heads), unknown) for unknown in UNKNOWN_IMPUTATIONS}
    _assert_each_refused(factory, case, calls)


def _assert_each_refused(factory: Factory, case: Case, calls: Calls) -> None:
    _assert_each(calls, lambda heads, imputation: _assert_refused(factory, case, heads, imputation))


def _keywords(case: Case, imputation: Any) -> dict[str, Any]:
    """Return the keyword arguments of a call: no imputation but that of the case needs any."""
    return case.keywords() if imputation == case.imputation else {}


def _assert_each(calls: Calls, assert_call: Callable[[list[Any], Any], None]) -> None:
    """Try all calls, and raise one AssertionError with what was found in each."""
    findings = []
    for what, call in calls.items():
        try:
            assert_call(*call)
        except AssertionError as error:
            findings.append(f"{what}: {message_of(error)}")
    assert not findings, "; ".join(findings)


def _assert_refused(factory: Factory, case: Case, heads: list[Any], imputation: Any) -> None:
    model, inputs = case.model(), case.inputs()
    before, bare = state(model), run(model, inputs)
    forwards: list[object] = []
    refusal: Exception | None = None
    with made(factory, model) as implementation:
        call: Callable[..., None] = implementation.ablate
        handle = model.register_forward_pre_hook(lambda *_: forwards.append(None))
        try:
            call(heads, imputation, **_keywords(case, imputation))
            implementation.run(**inputs)
        except Exception as error:
            refusal = error
        finally:
            handle.remove()
        assert refusal is not None, f"{heads} with imputation {imputation!r} was accepted"
        assert not forwards, f"{heads} was refused only after a forward pass had begun"
        assert str(refusal), f"{heads} was refused by a {type(refusal).__name__} without a reason"
    assert_state_equals(model, before)
    assert_identical(run(model, inputs), bare, f"the logits of the model after {heads} was refused")


@check(
    "refusal.no_side_effect",
    "If `ablate` rejects its arguments, the previous heads stay in force, and the next valid call is accepted.",
    cases=CaseSpec(max_heads=4, dtypes=("float32",)),
    needs=("validation",),
    level="SHOULD",
)
def no_side_effect(factory: Factory, case: Case) -> None:
    good, inputs = list(case.heads), case.inputs()
    unsupported = unsupported_features(factory)
    beside = [] if "multiple_heads" in unsupported else [case.another_head()]
    rejected: Calls = {
        what: ([*beside, missing(case.decoder)], case.imputation) for what, missing in MISSING_HEADS.items()
    }
    too_large = MISSING_HEADS["head too large"](case.decoder)
    for other in [name for name in ("zero", "mean") if name != case.imputation and name not in unsupported]:
        rejected[f"head too large, with {other}"] = ([*beside, too_large], other)
    rejected["imputation 'median'"] = (beside or good, "median")
    with made(factory, case.model()) as implementation:
        ablate(implementation, case)
        want = implementation.run(**inputs).clone()

        def assert_no_side_effect(heads: list[Any], imputation: Any) -> None:
            call: Callable[..., None] = implementation.ablate
            try:
                call(heads, imputation, **_keywords(case, imputation))
            except Exception:
                message = f"the logits with the heads that were in force before {heads} was rejected"
                assert_identical(implementation.run(**inputs), want, message)
            try:
                discard(ablate, implementation, case)
            except Exception as error:
                raise AssertionError(f"after {heads} was rejected, so was the valid {good}: {error}") from None
            message = f"the logits with the heads that were set after {heads} was rejected"
            assert_identical(implementation.run(**inputs), want, message)

        _assert_each(rejected, assert_no_side_effect)
