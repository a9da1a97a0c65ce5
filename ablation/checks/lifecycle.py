"""The lifecycle of an implementation: a state machine whose every step is followed by a run that is compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, cast

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ablation.checks.assertions import assert_close, assert_identical
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import Check, isolated_process_state, max_examples, unsupported_features
from ablation.checks.decoders import Decoder
from ablation.checks.driving import ablated_logits, other_ids, run
from ablation.checks.observe import assert_unchanged, changes, hooks, state
from ablation.checks.oracles import expected_logits
from ablation.checks.protocol import Factory
from ablation.heads import AttentionLayer, find_heads

Pair = tuple[int, int]
Steps = tuple[tuple[Any, ...], ...]
"""Method names of the machine, each with its arguments."""


class Place(StrEnum):
    """Where a hook or an error is, relative to a layer. The values are read in messages."""

    BEFORE = "before"
    AFTER_PROJECTION = "after the projection of"
    AFTER = "after"
    REGISTERING = "while hooks are registered in"


class ForwardError(Exception):
    """Raised in the middle of a forward pass."""


class InapplicableStep(Exception):
    """A step that needs an implementation on the model, or a model without one."""


ERRORS: dict[str, type[BaseException]] = {e.__name__: e for e in (ForwardError, KeyboardInterrupt, GeneratorExit)}


def from_machine(strategy: Any) -> Any:
    """Return a strategy that depends on the machine, which knows its model only when it runs."""
    return st.runner().flatmap(strategy)


sets = from_machine(
    lambda machine: st.lists(st.sampled_from(machine.pairs), min_size=1, max_size=machine.max_heads, unique=True)
).map(tuple)
pairs = from_machine(lambda machine: st.sampled_from(machine.pairs))
layers = from_machine(lambda machine: st.sampled_from(range(len(machine.layers))))


@contextmanager
def _raising(layer: AttentionLayer, place: Place, error: type[BaseException]) -> Iterator[None]:
    """Raise an error at this place of a layer in every forward pass, or whenever a hook is registered in the layer."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with ExitStack() as undo:
        match place:
            case Place.BEFORE:
                undo.callback(layer.block.register_forward_pre_hook(fail).remove)
            case Place.AFTER_PROJECTION:
                undo.callback(layer.projection.register_forward_hook(fail).remove)
            case Place.AFTER:
                undo.callback(layer.block.register_forward_hook(fail).remove)
            case Place.REGISTERING:
                for module in layer.block.modules():  # an attribute of the instance hides the method of its class
                    hidden = dict.fromkeys(("register_forward_pre_hook", "register_forward_hook"), fail)
                    vars(module).update(hidden)
                    for name in hidden:
                        undo.callback(vars(module).pop, name)
        yield


class LifecycleMachine(RuleBasedStateMachine):
    """Opens, ablates, clears, nests, replaces and closes implementations in any order, and registers user hooks.

    After each step, a run is compared with the bare model, or with surgery on the weights. inject_errors: errors strike
    in forward passes and while hooks are registered, and the steps that another check covers are left out.
    Hypothesis draws the steps; `replay` repeats those of a case.
    """

    def __init__(self, factory: Factory, spec: CaseSpec, inject_errors: bool) -> None:
        super().__init__()
        self.factory, self.spec, self.inject_errors = factory, spec, inject_errors
        # An implementation that measures means in an earlier forward pass gets other means for a set of heads.
        self.max_heads = 1 if "single_forward" in unsupported_features(factory) else spec.max_heads
        self.implementation: Any = None
        self.ablated: Case | None = None
        """The case whose logits a run should give; None if nothing is ablated."""
        self.user_hooks: list[Any] = []
        self.hook_calls = 0

    @initialize(family=from_machine(lambda machine: st.sampled_from(machine.spec.families)))
    def start(self, family: str) -> None:
        """Begin with a bare model. Its shape and prompt are fixed, since the search is for an order of steps."""
        self.begin(lifecycle_case(family))

    def begin(self, case: Case) -> None:
        """Build the model of a case, and note what it is and gives before anything is done to it."""
        self.case, self.model, self.inputs = replace(case, steps=()), case.model(), case.inputs()
        heads = find_heads(self.model)  # now, before an implementation may replace modules
        self.layers, self.pairs, self.before = heads.layers, list(heads), state(self.model)
        self.bare = run(self.model, self.inputs)
        # An implementation may round differently from the bare model, and may change the model permanently: other
        # checks report that, so here a fresh implementation is the standard.
        spare = case.model()
        before = state(spare)
        self.clean = ablated_logits(self.factory, case, spare)
        self.residue = changes(spare, before)

    def replay(self, case: Case) -> None:
        """Repeat the steps of a case. Raises InapplicableStep for a step that is impossible at its place."""
        self.begin(case)
        try:
            for step, *arguments in case.steps:
                if step not in ("fail", "hook") and (step == "open") != (self.implementation is None):
                    raise InapplicableStep(step)
                getattr(self, step)(*arguments)
                self.gives_the_expected_logits()
        except Exception:
            with suppress(Exception):  # the first error is the one to report
                self.teardown()
            raise
        self.teardown()

    def _note(self, *step: Any) -> None:
        self.case = replace(self.case, steps=(*self.case.steps, step))

    @precondition(lambda self: self.implementation is None)
    @rule()
    def open(self) -> None:
        """Make the implementation."""
        self._note("open")
        self.implementation = self.factory(self.model)

    @precondition(lambda self: self.implementation is not None)
    @rule(heads=sets, imputation=from_machine(lambda machine: st.sampled_from(machine.spec.imputations)))
    def ablate(self, heads: tuple[Pair, ...], imputation: str) -> None:
        """Ablate some heads in place of the previous ones."""
        self._note("ablate", heads, imputation)
        self.implementation.ablate(list(heads), imputation)
        self.ablated = replace(self.case, heads=heads, imputation=imputation, steps=())

    @precondition(lambda self: self.implementation is not None and not self.inject_errors)
    @rule()
    def clear(self) -> None:
        """Ablate nothing."""
        self._note("clear")
        self.implementation.clear()
        self.ablated = None

    @precondition(lambda self: self.inject_errors)
    @rule(place=st.sampled_from([str(place) for place in Place]), layer=layers, error=st.sampled_from(sorted(ERRORS)))
    def fail(self, place: str, layer: int, error: str) -> None:
        """Run, and first open if necessary, while an error strikes in a layer."""
        self._note("fail", place, layer, error)
        raised, observable = False, "observable" not in unsupported_features(self.factory)
        before = hooks(self.model) if self.implementation is not None else None
        if self.implementation is None and not observable:  # a copy made inside the block would keep the failing hook
            self.implementation = self.factory(self.model)
        with _raising(self.layers[layer], Place(place), ERRORS[error]):
            try:
                if self.implementation is None:
                    self.implementation = self.factory(self.model)
                elif place == Place.REGISTERING:  # an implementation may register its hooks when heads are named
                    self._ablate_again()
                self.implementation.run(**self.inputs | {"input_ids": other_ids(self.case)})
            except ERRORS[error]:
                raised = True
        if raised and place == Place.REGISTERING and self.implementation is not None:
            self._ablate_again()
        where = f"the {error} raised {place} layer {layer}"
        assert torch.is_grad_enabled(), f"{where} left gradients disabled"
        if before is not None:
            left = [name for name, table in hooks(self.model).items() if len(table) > len(before.get(name, ()))]
            assert not left, f"{where} left a hook: {left[0]}"
        # An implementation may run a copy of the model, and may need no hooks.
        if place != Place.REGISTERING and observable:
            assert raised, f"{where} was swallowed"

    def _ablate_again(self) -> None:
        if self.ablated is not None:
            self.implementation.ablate(list(self.ablated.heads), self.ablated.imputation)

    @precondition(lambda self: not self.inject_errors)
    @rule(layer=layers, place=st.sampled_from([str(Place.BEFORE), str(Place.AFTER)]))
    def hook(self, layer: int, place: str) -> None:
        """Register a user hook on a projection that counts its calls."""
        self._note("hook", layer, place)

        def count(*_: Any) -> None:
            self.hook_calls += 1

        projection = self.layers[layer].projection
        register = projection.register_forward_pre_hook if place == Place.BEFORE else projection.register_forward_hook
        self.user_hooks.append(register(count))

    @precondition(lambda self: self.implementation is not None and not self.inject_errors)
    @rule(pair=pairs)
    def nest(self, pair: Pair) -> None:
        """Make, use and close a second implementation."""
        self._note("nest", pair)
        if (other := self._second()) is not None:
            other.ablate([pair], self.spec.imputations[0])
            other.run(**self.inputs)
            other.close()

    @precondition(lambda self: self.implementation is not None and not self.inject_errors)
    @rule(pair=pairs)
    def replace_implementation(self, pair: Pair) -> None:
        """Make a second implementation, and close the first."""
        self._note("replace_implementation", pair)
        if (other := self._second()) is not None:
            imputation = self.spec.imputations[0]
            other.ablate([pair], imputation)
            self.implementation.close()
            self.implementation = other
            self.ablated = replace(self.case, heads=(pair,), imputation=imputation, steps=())

    def _second(self) -> Any:
        """Return a second implementation, or None if it is refused; the first one then has to work as before."""
        try:
            return self.factory(self.model)
        except Exception:
            return None

    @precondition(lambda self: self.implementation is not None)
    @rule()
    def close(self) -> None:
        """Close the implementation."""
        self._note("close")
        self.implementation.close()
        self.implementation, self.ablated = None, None

    @invariant()
    def gives_the_expected_logits(self) -> None:
        """After every step, a run gives the clean logits or those of surgery, and each user hook fires once."""
        self.hook_calls = 0
        if self.implementation is None:
            assert_identical(run(self.model, self.inputs), self.bare, "the logits of the model without implementation")
        else:
            got = self.implementation.run(**self.inputs)
            if self.ablated is None:
                assert_identical(got, self.clean, "the logits with nothing ablated")
            else:
                heads = ", ".join(f"layer {layer} head {head}" for layer, head in self.ablated.heads)
                what = f"the logits with {heads} ablated by {self.ablated.imputation}"
                assert_close(got, expected_logits(self.ablated), what)
        if self.implementation is None or not {"observable", "single_forward"} & set(
            unsupported_features(self.factory)
        ):
            count = len(self.user_hooks)
            assert self.hook_calls == count, f"the user's {count} hooks fired {self.hook_calls} times"

    def teardown(self) -> None:
        """At the end, however it came about, the model is as it was found."""
        if self.implementation is not None:
            self.implementation.close()
        for handle in self.user_hooks:
            handle.remove()
        if hasattr(self, "before"):  # `begin` has built a model
            assert_unchanged([name for name in changes(self.model, self.before) if name not in self.residue])


def lifecycle_case(family: str, steps: Steps = ()) -> Case:
    """Return the case of a lifecycle: the model and the prompt are always these."""
    return Case(Decoder(family, num_layers=2, num_heads=3, head_dim=8), rows=((3, 1, 4),), heads=(), steps=steps)


@dataclass(frozen=True)
class LifecycleCheck(Check):
    """A check whose cases the state machine draws, step by step. explicit_sequences: steps that are tried first."""

    inject_errors: bool = False
    explicit_sequences: tuple[Steps, ...] = ()

    def __call__(self, factory: Factory) -> None:
        """Run the machine under the current hypothesis profile. Raises AssertionError."""
        __tracebackhide__ = True
        machines: list[LifecycleMachine] = []
        spec = self.cases.restrict_to(unsupported_features(factory))

        def new_machine() -> LifecycleMachine:
            machines[:] = [LifecycleMachine(factory, spec, self.inject_errors)]
            return machines[0]

        # Hypothesis needs minutes to shrink a sequence; `_shortest` needs a second.
        phases = [phase for phase in settings().phases if phase is not Phase.shrink]
        profile = settings(
            deadline=None,
            max_examples=max_examples(),
            stateful_step_count=12,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow],
        )
        with isolated_process_state():
            try:
                for steps in self.explicit_sequences:
                    machine = new_machine()
                    machine.replay(lifecycle_case(spec.families[0], _supported(steps, machine)))
                # It accepts any callable that returns a machine, though its annotation says a class.
                run_state_machine_as_test(cast(Any, new_machine), settings=profile)
            except Exception as error:
                case, left = self._shortest(factory, machines[0].case, error)
                raise self.failure(factory, case, left) from (None if isinstance(left, AssertionError) else left)

    def _shortest(self, factory: Factory, case: Case, error: Exception) -> tuple[Case, Exception]:
        """Return the failing case without the steps that it does not need, and its error."""
        for span in (2, 1):  # an opening is removed together with its closing
            for index in reversed(range(len(case.steps) - span + 1)):
                shorter = replace(case, steps=case.steps[:index] + case.steps[index + span :])
                try:
                    self.function(factory, shorter)
                except InapplicableStep:
                    continue
                except Exception as still:
                    case, error = shorter, still
        return case, error


def _supported(steps: Steps, machine: LifecycleMachine) -> Steps:
    """Return the same steps with as many heads, and the imputation, that the implementation supports."""
    heads, imputation = machine.max_heads, machine.spec.imputations[0]
    return tuple(("ablate", step[1][:heads], imputation) if step[0] == "ablate" else step for step in steps)


def replay(factory: Factory, case: Case) -> None:
    """Repeat the steps of a case: the function of a lifecycle check."""
    LifecycleMachine(factory, CaseSpec().restrict_to(unsupported_features(factory)), inject_errors=False).replay(case)
