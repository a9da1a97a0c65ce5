"""Chapter 11, hygiene: an implementation has no side effects on the model or the process, even after an error."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ablation.checks.assertions import assert_close, assert_identical
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check
from ablation.checks.driving import ablate, ablated_logits, discard, made, other_ids, run
from ablation.checks.lifecycle import LifecycleCheck, Place, Steps, replay
from ablation.checks.observe import assert_state_equals, assert_unchanged, changes, hooks, state
from ablation.checks.oracles import apply_surgery
from ablation.checks.protocol import Factory
from ablation.heads import find_heads


@check(
    "hygiene.restored",
    "After `close`, with or without a run before it, the modules, weights, gradients, hooks and configuration of the "
    "model are as the implementation found them, and the model can be ablated again.",
    cases=CaseSpec(max_heads=4),
    needs=("restores",),
)
def restored(factory: Factory, case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    for ablations, runs in rounds(model):
        want = ablated_logits(factory, case, copy.deepcopy(model))
        before = state(model)
        implementation = factory(model)
        for _ in range(ablations):
            discard(ablate, implementation, case)
        for _ in range(runs):
            what = "the logits, against those of a model that was never ablated before,"
            assert_identical(implementation.run(**inputs), want, what)
        discard(implementation.close)
        assert_state_equals(model, before)


def rounds(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """Yield how often to call `ablate` and `run` before `close`, on a model in a state that no default has.

    A reset to defaults is thus noticed. Before each round, the weights change.
    """
    model.config.use_cache = False
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(number % 2 == 0)
    for ablations, runs in ((1, 1), (2, 1), (1, 0)):
        with torch.no_grad():
            for parameter in model.parameters():  # as if trained in between, so no longer exact in a shorter dtype
                parameter.mul_(0.9)
        yield ablations, runs


@check(
    "hygiene.user_hooks",
    "The user's hooks stay registered, fire in the same order and as often as in the bare model, and can be removed by "
    "their handles.",
    cases=CaseSpec(dtypes=("float32",)),
    needs=("observable", "single_forward"),
)
def user_hooks(factory: Factory, case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    fired: list[str] = []
    handles = register_everywhere(model, fired)
    before = hooks(model)
    run(model, inputs)
    expected = list(fired)
    with made(factory, model) as implementation:
        for step in ("ablated", "cleared"):
            if step == "ablated":
                ablate(implementation, case)
            else:
                implementation.clear()
            fired.clear()
            implementation.run(**inputs)
            found, due = fired, expected
            if step == "ablated":
                found, due = without_experts(fired), without_experts(expected)
            missing = [place for place in due if place not in found]
            assert not missing, f"with heads {step}, the user's hook {missing[0]} did not fire"
            assert found == due, f"with heads {step}, the user's hooks fired as {found}, not as {due}"
    assert_unchanged(changes(model, before, hooks))
    for handle in handles:
        handle.remove()
    fired.clear()
    run(model, inputs)
    assert not fired, f"the user's hook {fired[0]} still fires after its handle removed it"


def register_everywhere(model: nn.Module, fired: list[str]) -> list[Any]:
    """Register hooks before and after every module, which append when and where they fire. Returns the handles."""
    handles = []
    for count, (name, module) in enumerate(model.named_modules()):
        for when in ("before", "after"):
            # The function is called `hook`, as most are: an implementation must not recognise its own by that name.
            def hook(*_: Any, place: str = f"{when} {name or 'the model'}") -> None:
                fired.append(place)

            register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
            handles.append(register(hook, with_kwargs=bool(count % 2)))
    return handles


def without_experts(places: list[str]) -> list[str]:
    """Leave out single experts: transformers 4 runs those that tokens choose, and an ablation may change the choice."""
    return [place for place in places if ".experts." not in place]


@check(
    "hygiene.later_hooks",
    "Hooks that the user registers while heads are ablated take effect in each run, remain after close, and can be "
    "removed before or after it.",
    cases=CaseSpec(imputations=("zero",), dtypes=("float32",)),
    needs=("zero", "observable"),
)
def later_hooks(factory: Factory, case: Case) -> None:
    model, inputs, surgery = case.model(), case.inputs(), case.model()
    projections = [layer.projection for layer in find_heads(model).layers]
    bare, edited_bare = run(model, inputs), _run_with_edits(case.model(), inputs)
    tripled_bare = _run_with_edits(case.model(), inputs, doubled=False)
    apply_surgery(surgery, case.heads)
    with made(factory, model) as implementation:
        ablate(implementation, case)
        doubling, tripling = _edit(projections)
        want = _run_with_edits(copy.deepcopy(surgery), inputs)
        assert_close(implementation.run(**inputs), want, "the logits with hooks that the user registered later")
        implementation.clear()
        assert_close(implementation.run(**inputs), edited_bare, "the logits with these hooks, after clear()")
        ablate(implementation, case)
        for handle in doubling:
            handle.remove()
        want = _run_with_edits(surgery, inputs, doubled=False)
        assert_close(implementation.run(**inputs), want, "the logits after the user removed some of these hooks")
    assert_identical(run(model, inputs), tripled_bare, "the logits of the model with the user's hooks, after close(),")
    for handle in tripling:
        handle.remove()
    assert_identical(run(model, inputs), bare, "the logits of the model after the user removed all hooks")


def _run_with_edits(model: PreTrainedModel, inputs: dict[str, Any], *, doubled: bool = True) -> torch.Tensor:
    doubling, _ = _edit([layer.projection for layer in find_heads(model).layers])
    if not doubled:
        for handle in doubling:
            handle.remove()
    return run(model, inputs)


def _edit(projections: list[nn.Module]) -> tuple[list[Any], list[Any]]:
    """Register hooks that double the input of each projection, and hooks that triple its output."""
    doubling = [p.register_forward_pre_hook(lambda _, args: (2 * args[0],)) for p in projections]
    tripling = [p.register_forward_hook(lambda _, args, out: 3 * out) for p in projections]
    return doubling, tripling


@check(
    "hygiene.later_patch",
    "If the user replaces the `forward` method of a projection while heads are ablated, the user's method is called in "
    "each run and remains after `close`.",
    cases=CaseSpec(imputations=("zero",), dtypes=("float32",)),
    needs=("zero", "observable", "later_patches"),
)
def later_patch(factory: Factory, case: Case) -> None:
    model, inputs, surgery, patched = case.model(), case.inputs(), case.model(), case.model()
    projections = [layer.projection for layer in find_heads(model).layers]
    apply_surgery(surgery, case.heads)
    for other in (surgery, patched):
        _patch([layer.projection for layer in find_heads(other).layers])
    with made(factory, model) as implementation:
        ablate(implementation, case)
        _patch(projections)
        want = run(surgery, inputs)
        assert_close(implementation.run(**inputs), want, "the logits with a `forward` that the user replaced later")
    what = "the logits of the model with the `forward` that the user replaced, after close(),"
    assert_identical(run(model, inputs), run(patched, inputs), what)


def _patch(projections: list[nn.Module]) -> None:
    """Replace the `forward` of each projection by one that triples its output."""
    for projection in projections:

        def tripled(z: torch.Tensor, forward: Any = projection.forward) -> torch.Tensor:
            out: torch.Tensor = 3 * forward(z)
            return out

        projection.forward = tripled


@check(
    "hygiene.copies",
    "A copy of the model that is made while heads are ablated has no ablation, and the ablation of the model itself "
    "remains.",
    cases=CaseSpec(dtypes=("float32",), max_heads=2),
    needs=("copies",),
    level="SHOULD",
)
def copies(factory: Factory, case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    bare, want = run(model, inputs), ablated_logits(factory, case)
    with made(factory, model) as implementation:
        ablate(implementation, case)
        implementation.run(**inputs)
        copied = copy.deepcopy(model)
        assert_identical(run(copied, inputs), bare, "the logits of a copy that was made while heads were ablated")
        assert_identical(implementation.run(**inputs), want, "the ablated logits after the model was copied")
    assert_identical(run(copied, inputs), bare, "the logits of that copy after close()")


@check(
    "hygiene.global_state",
    "Making, using and closing an implementation leaves unchanged the caller's arguments, gradient mode, default "
    "dtype, deterministic mode, number of threads, random number generators and global hooks.",
    cases=CaseSpec(max_rows=3, ragged=True, max_heads=4),
)
def global_state(factory: Factory, case: Case) -> None:
    inputs, heads = case.inputs(), list(case.heads)
    # Any token may be used for padding.
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), other_ids(case))
    keywords = case.keywords()
    given = {**inputs, **{f"values of {pair}": value for pair, value in keywords.get("values", {}).items()}}
    for number, batch in enumerate(keywords.get("reference", [])):
        given |= {f"{name} of batch {number} of the reference": tensor for name, tensor in batch.items()}
    passed = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            model = case.model()
            # Hypothesis seeds both generators with 0, and an implementation may do the same: advance them first.
            random.random(), np.random.random()  # noqa: S311
            before = _global_state()
            with made(factory, model) as implementation:
                ablate(implementation, case, heads, **keywords)
                implementation.run(**inputs)
            for what, value in _global_state().items():
                assert value == before[what], f"{what} changed"
    assert heads == list(case.heads), f"the list of heads that was passed in, {list(case.heads)}, is now {heads}"
    for name, tensor in passed.items():
        assert_identical(given[name], tensor, f"the {name} that were passed in")


def _global_state() -> dict[str, Any]:
    tables = {
        name: list(table)
        for name, table in vars(torch.nn.modules.module).items()
        if name.startswith("_global_") and isinstance(table, dict)
    }
    return {
        "gradient mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "the use of deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's random number generator": torch.get_rng_state().tolist(),
        "numpy's random number generator": repr(np.random.get_state()),
        "Python's random number generator": random.getstate(),
        "the table of global hooks": tables,
    }


ABLATED: Steps = (("open",), ("ablate", ((0, 1),), "zero"))

ABLATED_TWICE: Steps = (("open",), ("ablate", ((0, 0), (1, 0)), "zero"))

exception = LifecycleCheck(
    "hygiene.exception",
    "After an exception in a forward pass or during hook registration, gradient mode is unchanged, no additional "
    "hook remains and the implementation still works; an exception in a forward pass reaches the caller.",
    replay,
    CaseSpec(max_heads=2),
    inject_errors=True,
    explicit_sequences=(
        (("fail", str(Place.REGISTERING), 1, "ForwardError"),),
        (("hook", 0, str(Place.BEFORE)), *ABLATED, ("fail", str(Place.BEFORE), 1, "ForwardError")),
        (*ABLATED_TWICE, ("fail", str(Place.REGISTERING), 1, "ForwardError")),
    ),
)

lifecycle = LifecycleCheck(
    "hygiene.lifecycle",
    "In whatever order implementations on one model are made, used, cleared and closed, each run gives the logits of "
    "the ablation in force, and each user hook fires once.",
    replay,
    CaseSpec(max_heads=2),
    explicit_sequences=(
        (*ABLATED, ("nest", (0, 0))),
        (*ABLATED, ("replace_implementation", (1, 0)), ("close",)),
        (("open",), ("hook", 0, str(Place.BEFORE)), ("close",)),
    ),
)
