"""Chapter 10, refusal: invalid heads and imputations are refused before any forward pass, without side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ablation.checks.assertions import assert_identical
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check, unsupported_features
from ablation.checks.decoders import Decoder
from ablation.checks.driving import made, run
from ablation.checks.observe import assert_state_equals, state
from ablation.checks.protocol import Factory

MISSING_HEADS: dict[str, Callable[[Decoder], Any]] = {
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
UNKNOWN_IMPUTATIONS: tuple[Any, ...] = ("median", "", "Zero", "zer", None)


@check(
    "refusal.head",
    "A layer or head that does not exist is refused with a reason, before any forward pass.",
    cases=CaseSpec(dtypes=("float32",)),
    needs=("validation",),
    level="SHOULD",
)
def head(factory: Factory, case: Case) -> None:
    """A missing head may be the only one, or come after or before one that exists."""
    good = list(case.heads) if "multiple_heads" not in unsupported_features(factory) else []
    before, after = {0: ([], []), 1: (good, []), 2: ([], good)}[case.rows[0][0] % 3]
    for what, missing in MISSING_HEADS.items():
        _assert_refused(factory, case, [*before, missing(case.decoder), *after], case.imputation, what)


@check(
    "refusal.type",
    "A layer or head that is not an integer is refused with a reason, before any forward pass.",
    cases=CaseSpec(dtypes=("float32",)),
    needs=("validation",),
    level="SHOULD",
)
def type_(factory: Factory, case: Case) -> None:
    for what, pair in WRONG_TYPES.items():
        _assert_refused(factory, case, [pair], case.imputation, what)


@check(
    "refusal.imputation",
    "An unknown imputation is refused with a reason, before any forward pass.",
    cases=CaseSpec(dtypes=("float32",)),
    needs=("validation",),
    level="SHOULD",
)
def imputation(factory: Factory, case: Case) -> None:
    for unknown in UNKNOWN_IMPUTATIONS:
        _assert_refused(factory, case, list(case.heads), unknown, f"the imputation {unknown!r}")


def _assert_refused(factory: Factory, case: Case, heads: list[Any], imputation: Any, what: str) -> None:
    model, inputs = case.model(), case.inputs()
    before, bare = state(model), run(model, inputs)
    forwards: list[object] = []
    refusal: Exception | None = None
    with made(factory, model) as implementation:
        handle = model.register_forward_pre_hook(lambda *_: forwards.append(None))
        try:
            implementation.ablate(heads, imputation)
            implementation.run(**inputs)
        except Exception as error:
            refusal = error
        finally:
            handle.remove()
        assert refusal is not None, f"{what}: {heads} with imputation {imputation!r} was accepted"
        assert not forwards, f"{what}: {heads} was refused only after a forward pass had begun"
        assert str(refusal), f"{what}: refused by a {type(refusal).__name__} without a reason"
    assert_state_equals(model, before)
    assert_identical(run(model, inputs), bare, f"the logits of the model after {what} was refused")


@check(
    "refusal.no_side_effect",
    "A rejected call leaves the previous heads in force, and the next valid call is accepted.",
    cases=CaseSpec(max_heads=4, dtypes=("float32",)),
    needs=("validation",),
    level="SHOULD",
)
def no_side_effect(factory: Factory, case: Case) -> None:
    good, inputs = list(case.heads), case.inputs()
    unsupported = unsupported_features(factory)
    beside = [] if "multiple_heads" in unsupported else [case.another_head()]
    rejected: dict[str, Any] = {
        what: ([*beside, missing(case.decoder)], case.imputation) for what, missing in MISSING_HEADS.items()
    }
    too_large = MISSING_HEADS["head too large"](case.decoder)
    for other in [name for name in ("zero", "mean") if name != case.imputation and name not in unsupported]:
        rejected[f"a head too large, with {other},"] = ([*beside, too_large], other)
    rejected["the imputation 'median'"] = (beside or good, "median")
    with made(factory, case.model()) as implementation:
        implementation.ablate(good, case.imputation)
        want = implementation.run(**inputs).clone()
        for what, call in rejected.items():
            try:
                implementation.ablate(*call)
            except Exception:
                message = f"the logits with the heads that were in force before {what} was rejected"
                assert_identical(implementation.run(**inputs), want, message)
            try:
                implementation.ablate(good, case.imputation)
            except Exception as error:
                raise AssertionError(
                    f"after {what} was rejected, the valid {good} was rejected, too: {error}"
                ) from None
            message = f"the logits with the heads that were set after {what} was rejected"
            assert_identical(implementation.run(**inputs), want, message)
