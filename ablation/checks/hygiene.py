"""What an implementation leaves behind, whatever happened; and what it refuses."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch

from ablation.checks.behaviour import other_ids
from ablation.checks.cases import Case, CaseSpec, run, same
from ablation.checks.check import Check, Factory, declared
from ablation.checks.observe import assert_as_it_was, assert_none, changes, hooks, state
from ablation.checks.oracles import ablated_logits


def closed(make: Factory, case: Case) -> None:
    """After close, the model is what it was: hooks, weights, flags, configuration; whether it was run or not.

    Taken again, it is ablated as a model that never was.
    """
    model, inputs = case.model(), case.inputs()
    model.config.use_cache = False  # nothing is as it would be by default
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(number % 2 == 0)
    for ablations, runs in ((1, 1), (2, 1), (1, 0)):
        with torch.no_grad():
            for parameter in model.parameters():  # as if trained in between, and no longer exact in a shorter type
                parameter.mul_(0.9)
        want = ablated_logits(make, case, copy.deepcopy(model))
        before = state(model)
        implementation = make(model)
        for _ in range(ablations):
            implementation.ablate(list(case.heads), case.imputation)
        for _ in range(runs):
            same(implementation.run(**inputs), want, "the logits, against those of a model that was never ablated,")
        implementation.close()
        assert_as_it_was(model, before)


def foreign_hooks(make: Factory, case: Case) -> None:
    """Hooks that the user has on any module stay, in their order, and fire once a forward, until he removes them."""
    model, inputs = case.model(), case.inputs()
    fired: list[str] = []
    handles = []
    for count, (place, module) in enumerate(model.named_modules()):
        kind = {"with_kwargs": bool(count % 2)}
        for when in ("before", "after"):
            # Called `hook`, as most people call theirs: nobody is to go by the name.
            def hook(*_: Any, name: str = f"{when} {place or 'the model'}") -> None:
                fired.append(name)

            register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
            handles.append(register(hook, **kind))
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
    for handle in handles:
        handle.remove()
    fired.clear()
    run(model, inputs)
    assert not fired, f"the user's hook {fired[0]} fires, though its handle has removed it"


def process_untouched(make: Factory, case: Case) -> None:
    """What belongs to the process or to the caller stays: gradients, default dtype, random numbers, arguments."""
    inputs, heads = case.inputs(), list(case.heads)
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), other_ids(case))  # pad as you like
    passed = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            model = case.model()
            random.random(), np.random.random()  # noqa: S311 (hypothesis has seeded them by 0, as somebody else may)
            before = _process()
            implementation = make(model)
            try:
                implementation.ablate(heads, case.imputation)
                implementation.run(**inputs)
            finally:
                implementation.close()
            for what, value in _process().items():
                assert value == before[what], f"{what} of the process: not as before"
    assert heads == list(case.heads), f"the list of heads that was passed in, {list(case.heads)}, is now {heads}"
    for name, tensor in passed.items():
        same(inputs[name], tensor, f"the {name} that were passed in")


def _process() -> dict[str, Any]:
    """What belongs to the process."""
    tables = {
        name: list(table)
        for name, table in vars(torch.nn.modules.module).items()
        if name.startswith("_global_") and isinstance(table, dict)
    }
    return {
        "gradients": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the random numbers (torch)": torch.get_rng_state().tolist(),
        "the random numbers (numpy)": repr(np.random.get_state()),
        "the random numbers (Python)": random.getstate(),
        "the hooks on all modules": tables,
    }


BAD_HEADS: dict[str, Any] = {
    "head too large": lambda d: (0, d.num_heads),
    "head negative": lambda d: (0, -1),
    "layer too large": lambda d: (d.num_layers, 0),
    "layer negative": lambda d: (-1, 0),
}
UNKNOWN: tuple[Any, ...] = ("median", "", "Zero", "zer", None)
BAD_TYPES: dict[str, Any] = {
    "head True": lambda d: (0, True),
    "layer False": lambda d: (False, 0),
    "head 0.0": lambda d: (0, 0.0),
    "layer '0'": lambda d: ("0", 0),
}


def refuses_heads(make: Factory, case: Case) -> None:
    """A head that is not there is an error, not another head and not nothing; also before or behind one that is."""
    good = list(case.heads) if "multiple_heads" not in declared(make) else []
    before, behind = {0: ([], []), 1: (good, []), 2: ([], good)}[case.rows[0][0] % 3]
    for what, bad in BAD_HEADS.items():
        _refused(make, case, [*before, bad(case.decoder), *behind], case.imputation, what)


def refuses_types(make: Factory, case: Case) -> None:
    """A pair that is not of two integers is an error."""
    for what, bad in BAD_TYPES.items():
        _refused(make, case, [bad(case.decoder)], case.imputation, what)


def refuses_imputation(make: Factory, case: Case) -> None:
    """An imputation that is not known is an error."""
    for imputation in UNKNOWN:
        _refused(make, case, list(case.heads), imputation, f"the imputation {imputation!r}")


def refusal_forgotten(make: Factory, case: Case) -> None:
    """Where `ablate` refuses, the set before stays in force; in any case, the next is taken as ever."""
    good, inputs = list(case.heads), case.inputs()
    beside = [] if "multiple_heads" in declared(make) else [case.another()]
    refused: dict[str, Any] = {what: ([*beside, bad(case.decoder)], case.imputation) for what, bad in BAD_HEADS.items()}
    imputations = [i for i in ("zero", "mean") if i != case.imputation and i not in declared(make)]
    for other in imputations:
        refused[f"a head too large, by {other},"] = ([*beside, BAD_HEADS["head too large"](case.decoder)], other)
    refused["the imputation 'median'"] = (beside or good, "median")
    implementation = make(case.model())
    try:
        implementation.ablate(good, case.imputation)
        want = implementation.run(**inputs).clone()
        for what, bad in refused.items():
            try:
                implementation.ablate(*bad)
            except Exception:
                same(implementation.run(**inputs), want, f"the logits with the set before {what}, which was refused,")
            try:
                implementation.ablate(good, case.imputation)
            except Exception as error:
                raise AssertionError(f"after {what}, {good} was refused, too: {error}") from None
            same(implementation.run(**inputs), want, f"the logits with the set after {what}, which was refused,")
    finally:
        implementation.close()


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
        id="hygiene.restored",
        requirement="After close, the model is as it was found, and can be taken again.",
        function=closed,
        cases=CaseSpec(heads=4),
        needs=("restores",),
    ),
    Check(
        id="hygiene.user_hooks",
        requirement="The user's own hooks stay, in their order, and fire once a forward.",
        function=foreign_hooks,
        cases=CaseSpec(dtypes=("float32",)),
        needs=("observable", "single_forward"),
    ),
    Check(
        id="hygiene.global_state",
        requirement="Gradient mode, default dtype, random numbers and what is passed in are left alone.",
        function=process_untouched,
        cases=CaseSpec(rows=3, ragged=True, heads=4),
    ),
    Check(
        id="refusal.head",
        requirement="A layer or head that is not there is refused, with a reason, before any forward.",
        function=refuses_heads,
        cases=CaseSpec(dtypes=("float32",)),
        needs=("validation",),
        level="SHOULD",
    ),
    Check(
        id="refusal.type",
        requirement="A layer or head that is not an integer is refused, with a reason, before any forward.",
        function=refuses_types,
        cases=CaseSpec(dtypes=("float32",)),
        needs=("validation",),
        level="SHOULD",
    ),
    Check(
        id="refusal.imputation",
        requirement="An unknown imputation is refused, with a reason, before any forward.",
        function=refuses_imputation,
        cases=CaseSpec(dtypes=("float32",)),
        needs=("validation",),
        level="SHOULD",
    ),
    Check(
        id="refusal.no_side_effect",
        requirement="What was refused leaves the set before in force, and the next is taken as ever.",
        function=refusal_forgotten,
        cases=CaseSpec(heads=4, dtypes=("float32",)),
        needs=("validation",),
        level="SHOULD",
    ),
]
