"""What an implementation leaves behind, whatever happened; and what it refuses."""

from __future__ import annotations

from typing import Any

from ablation.checks.cases import Case, Cases, run, same
from ablation.checks.check import Check, Factory, declared
from ablation.checks.observe import assert_as_it_was, assert_none, changes, hooks, state
from ablation.heads import find_heads


def closed(make: Factory, case: Case) -> None:
    """After close, the model is what it was: hooks, weights, flags, configuration."""
    model, inputs = case.model(), case.inputs()
    before = state(model)
    for _ in range(2):  # the second time on what the first left behind
        implementation = make(model)
        implementation.ablate(list(case.heads), case.imputation)
        implementation.run(**inputs)
        implementation.close()
        assert_as_it_was(model, before)


def foreign_hooks(make: Factory, case: Case) -> None:
    """Hooks that the user has on the model stay, in their order, and fire once a forward all the while."""
    model, inputs = case.model(), case.inputs()
    fired: list[str] = []
    for layer in find_heads(model).layers:
        for place, module in (("projection", layer.projection), ("layer", layer.block)):
            name = f"{place} {layer.index}"
            module.register_forward_pre_hook(lambda *_, name=name: fired.append(f"before {name}"))
            module.register_forward_hook(lambda *_, name=name: fired.append(f"after {name}"))
    before = hooks(model)
    run(model, inputs)
    expected = list(fired)
    implementation = make(model)
    try:
        for step in ("ablated", "cleared"):
            if step == "ablated":
                implementation.ablate(list(case.heads), case.imputation)
            else:
                implementation.clear()
            fired.clear()
            implementation.run(**inputs)
            missing = [name for name in expected if name not in fired]
            assert not missing, f"with heads {step}, the user's hook {missing[0]} did not fire"
            assert fired == expected, f"with heads {step}, the user's hooks fired as {fired}, not as {expected}"
    finally:
        implementation.close()
    assert_none(changes(model, before, hooks))


BAD_HEADS: dict[str, Any] = {
    "head too large": lambda d: (0, d.heads),
    "head negative": lambda d: (0, -1),
    "layer too large": lambda d: (d.layers, 0),
    "layer negative": lambda d: (-1, 0),
}
BAD_TYPES: dict[str, Any] = {
    "head True": lambda d: (0, True),
    "layer False": lambda d: (False, 0),
    "head 0.0": lambda d: (0, 0.0),
    "layer '0'": lambda d: ("0", 0),
}


def refuses_heads(make: Factory, case: Case) -> None:
    """A head that is not there is an error, not another head and not nothing; also after one that is."""
    good = list(case.heads) if "sets" not in declared(make) and case.rows[0][0] % 2 else []
    for what, bad in BAD_HEADS.items():
        _refused(make, case, [*good, bad(case.decoder)], case.imputation, what)


def refuses_types(make: Factory, case: Case) -> None:
    """A pair that is not of two integers is an error."""
    for what, bad in BAD_TYPES.items():
        _refused(make, case, [bad(case.decoder)], case.imputation, what)


def refuses_imputation(make: Factory, case: Case) -> None:
    """An imputation that is not known is an error."""
    _refused(make, case, list(case.heads), "median", "the imputation 'median'")


def _refused(make: Factory, case: Case, heads: list[Any], imputation: str, what: str) -> None:
    model, inputs = case.model(), case.inputs()
    before, bare = state(model), run(model, inputs)
    forwards: list[object] = []
    implementation = make(model)
    try:
        handle = model.register_forward_pre_hook(lambda *_: forwards.append(None))
        try:
            implementation.ablate(heads, imputation)
            implementation.run(**inputs)
        except Exception as error:
            refusal: Exception | None = error
        else:
            refusal = None
        finally:
            handle.remove()
        assert refusal is not None, f"{what}: {heads} by {imputation!r} was accepted"
        assert not forwards, f"{what}: {heads} was refused only after a forward had begun"
        assert str(refusal), f"{what}: refused by {type(refusal).__name__} without a reason"
    finally:
        implementation.close()
    assert_as_it_was(model, before)
    same(run(model, inputs), bare, f"the logits of the model after {what} was refused")


CHECKS = [
    Check(
        id="hygiene.closed",
        requirement="After close the model is as it was found, and can be taken again.",
        function=closed,
        cases=Cases(),
        needs=("restore",),
    ),
    Check(
        id="hygiene.foreign",
        requirement="The user's own hooks stay, in their order, and fire once a forward.",
        function=foreign_hooks,
        cases=Cases(dtypes=("float32",)),
        needs=("observe", "once"),
    ),
    Check(
        id="refusal.head",
        requirement="A layer or head that is not there is refused, with a reason, before any forward.",
        function=refuses_heads,
        cases=Cases(dtypes=("float32",)),
        needs=("refusal",),
        level="SHOULD",
    ),
    Check(
        id="refusal.type",
        requirement="A layer or head that is not an integer is refused, with a reason, before any forward.",
        function=refuses_types,
        cases=Cases(dtypes=("float32",)),
        needs=("refusal",),
        level="SHOULD",
    ),
    Check(
        id="refusal.imputation",
        requirement="An unknown imputation is refused, with a reason, before any forward.",
        function=refuses_imputation,
        cases=Cases(dtypes=("float32",)),
        needs=("refusal",),
        level="SHOULD",
    ),
]
