"""The lifecycle of an implementation, as a state machine of hypothesis.

A step makes, uses or closes an implementation, registers a hook, or raises an error in a forward pass. After each step,
the machine runs the model and compares the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, cast

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from ablation.checks.assertions import assert_identical
from ablation.checks.cases import Case, CaseSpec, with_factor
from ablation.checks.check import (
    Check,
    first_error,
    isolated_process_state,
    offered_imputations,
    search_settings,
    unsupported_features,
)
from ablation.checks.decoders import Decoder
from ablation.checks.driving import ablate, ablated_logits, other_ids, run
from ablation.checks.imputed import Pair
from ablation.checks.observe import assert_unchanged, changes, hooks, state
from ablation.checks.protocol import Factory
from ablation.heads import AttentionLayer, find_heads

Steps = tuple[tuple[Any, ...], ...]
"""Steps of the machine: for each, the name of a method of `LifecycleMachine` and the arguments."""


class Place(StrEnum):
    """Where a hook is registered or an error is raised, relative to a layer. The values are part of messages."""

    BEFORE = "before"
    AFTER_PROJECTION = "after the projection of"
    AFTER = "after"
    REGISTERING = "while hooks are registered in"


class ForwardError(Exception):
    """The error that a step of the machine raises in a forward pass or while hooks are registered."""


class InapplicableStep(Exception):
    """A step that is impossible: it needs an open implementation and there is none, or it needs that none is open."""


ERRORS: dict[str, type[BaseException]] = {e.__name__: e for e in (ForwardError, KeyboardInterrupt, GeneratorExit)}


def from_machine(strategy: Any) -> Any:
    """Return a strategy that is a function of the machine, since only a running machine knows its model.

    strategy: takes the machine and returns the strategy to draw from.
    """
    return st.runner().flatmap(strategy)


sets = from_machine(
    lambda machine: st.lists(st.sampled_from(machine.pairs), min_size=1, max_size=machine.max_heads, unique=True)
).map(tuple)
pairs = from_machine(lambda machine: st.sampled_from(machine.pairs))
layers = from_machine(lambda machine: st.sampled_from(range(len(machine.layers))))


@contextmanager
def _raising(layer: AttentionLayer, place: Place, error: type[BaseException]) -> Iterator[None]:
    """Context manager: raise an error at a place of a layer, in each forward pass or at each registration of a hook."""

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


def _when(
    *, is_open: bool | None = None, with_errors: bool | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the precondition of a step: whether an implementation is open, and whether errors are injected."""

    def holds(machine: Any) -> bool:  # no lambda: hypothesis 6.100 reads the source of one again at each step
        found = (machine.implementation is not None, machine.inject_errors)
        return all(want in (None, is_so) for want, is_so in zip((is_open, with_errors), found, strict=True))

    return precondition(holds)


class LifecycleMachine(RuleBasedStateMachine):
    """A state machine with one model and at most one current implementation. Hypothesis draws the order of its steps.

    The steps make, use, clear, replace and close the implementation, use a second one next to it, and register user
    hooks. After each step, the logits of a run are compared with those of the bare model, or of a fresh implementation
    on a fresh model; whether these are right is for other checks.

    inject_errors: errors are raised in forward passes and while hooks are registered; the steps that
    `hygiene.lifecycle` covers (clear, nest, replace, user hooks) are left out.
    """

    def __init__(self, factory: Factory, spec: CaseSpec, inject_errors: bool) -> None:
        super().__init__()
        self.imputations = [with_factor(name) for name in spec.imputations or ()]
        self.factory, self.spec, self.inject_errors = factory, spec, inject_errors
        self.max_heads = spec.max_heads
        self.implementation: Any = None
        self.ablated: Case | None = None
        """The heads and imputation in force, as the case whose logits a run should give; None if nothing is ablated."""
        self.fresh: Tensor
        """The logits of that case from a fresh implementation."""
        self.user_hooks: list[Any] = []
        self.hook_calls = 0

    @initialize(family=from_machine(lambda machine: st.sampled_from(machine.spec.families)))
    def start(self, family: str) -> None:
        """Begin with a bare model of a drawn family. Its shape and the prompt are fixed: the search is for an order."""
        self.begin(lifecycle_case(family))

    def begin(self, case: Case) -> None:
        """Build the model of a case, and record its state and its logits before anything is done to it."""
        self.case, self.model, self.inputs = replace(case, steps=()), case.model(), case.inputs()
        heads = find_heads(self.model)  # now, before an implementation may replace modules
        self.layers, self.pairs, self.before = heads.layers, list(heads), state(self.model)
        self.bare = run(self.model, self.inputs)
        # An implementation may round differently from the bare model, and may change the model permanently. Other
        # checks report both, so this one expects the logits and the changes of a new implementation on a spare model.
        spare = case.model()
        before = state(spare)
        self.clean = ablated_logits(self.factory, self._ablated((), self.imputations[0]), spare)
        self.residue = changes(spare, before)

    def replay(self, case: Case) -> None:
        """Repeat the steps of a case. Raises InapplicableStep for a step that is impossible when its turn comes."""
        self.begin(case)
        try:
            for step, *arguments in case.steps:
                if step not in ("fail", "hook") and (step == "open") != (self.implementation is None):
                    raise InapplicableStep(step)
                getattr(self, step)(*arguments)
                self.gives_the_expected_logits()
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                self.teardown()
            raise
        self.teardown()

    def _note(self, *step: Any) -> None:
        self.case = replace(self.case, steps=(*self.case.steps, step))

    @_when(is_open=False)
    @rule()
    def open(self) -> None:
        """Make the implementation on the model."""
        self._note("open")
        self.implementation = self.factory(self.model)

    @_when(is_open=True)
    @rule(heads=sets, imputation=from_machine(lambda machine: st.sampled_from(machine.imputations)))
    def ablate(self, heads: tuple[Pair, ...], imputation: str) -> None:
        """Ablate some heads instead of the previous ones."""
        self._note("ablate", heads, imputation)
        ablate(self.implementation, self._expect(heads, imputation))

    @_when(is_open=True, with_errors=False)
    @rule()
    def clear(self) -> None:
        """Ablate nothing."""
        self._note("clear")
        self.implementation.clear()
        self.ablated = None

    @_when(with_errors=True)
    @rule(place=st.sampled_from([str(place) for place in Place]), layer=layers, error=st.sampled_from(sorted(ERRORS)))
    def fail(self, place: str, layer: int, error: str) -> None:
        """Run the implementation while a layer raises an error. If none is open, it is made while the layer raises."""
        self._note("fail", place, layer, error)
        raised, observable = False, "observable" not in unsupported_features(self.factory)
        before = hooks(self.model) if self.implementation is not None else None
        if self.implementation is None and not observable:  # a copy made below would copy the failing hook, too
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
            ablate(self.implementation, self.ablated)

    @_when(with_errors=False)
    @rule(layer=layers, place=st.sampled_from([str(Place.BEFORE), str(Place.AFTER)]))
    def hook(self, layer: int, place: str) -> None:
        """Register a user hook on a projection; the hook counts its calls."""
        self._note("hook", layer, place)

        def count(*_: Any) -> None:
            self.hook_calls += 1

        projection = self.layers[layer].projection
        register = projection.register_forward_pre_hook if place == Place.BEFORE else projection.register_forward_hook
        self.user_hooks.append(register(count))

    @_when(is_open=True, with_errors=False)
    @rule(pair=pairs)
    def nest(self, pair: Pair) -> None:
        """Make, use and close a second implementation on the model while the first is open."""
        self._note("nest", pair)
        if (other := self._second()) is not None:
            ablate(other, self._ablated((pair,), self.imputations[0]))
            other.run(**self.inputs)
            other.close()

    @_when(is_open=True, with_errors=False)
    @rule(pair=pairs)
    def replace_implementation(self, pair: Pair) -> None:
        """Make a second implementation on the model, close the first, and continue with the second."""
        self._note("replace_implementation", pair)
        if (other := self._second()) is not None:
            ablate(other, self._expect((pair,), self.imputations[0]))
            self.implementation.close()
            self.implementation = other

    def _ablated(self, heads: tuple[Pair, ...], imputation: str) -> Case:
        return replace(self.case, heads=heads, imputation=imputation, steps=())

    def _expect(self, heads: tuple[Pair, ...], imputation: str) -> Case:
        """Note what the next runs should give: before the step, since what goes wrong in it may outlive it."""
        self.ablated = self._ablated(heads, imputation)
        self.fresh = ablated_logits(self.factory, self.ablated).clone()
        return self.ablated

    def _second(self) -> Any:
        """Return a second implementation, or None if it is refused; then the first has to work as before."""
        try:
            return self.factory(self.model)
        except Exception:
            return None

    @_when(is_open=True)
    @rule()
    def close(self) -> None:
        """Close the implementation."""
        self._note("close")
        self.implementation.close()
        self.implementation, self.ablated = None, None

    @invariant()
    def gives_the_expected_logits(self) -> None:
        """After each step, run, and assert that the logits are as expected and that each user hook fires once.

        They are expected to be those of the bare model, or of a fresh implementation.
        """
        self.hook_calls = 0
        if self.implementation is None:
            assert_identical(run(self.model, self.inputs), self.bare, "the logits of the model without implementation")
        else:
            got = self.implementation.run(**self.inputs)
            if self.ablated is None:
                assert_identical(got, self.clean, "the logits with nothing ablated")
            else:
                heads = ", ".join(f"layer {layer} head {head}" for layer, head in self.ablated.heads)
                what = f"the logits with {heads} ablated by {self.ablated.imputation}, against a fresh implementation,"
                assert_identical(got, self.fresh, what)
        if self.implementation is None or not {"observable", "single_forward"} & set(
            unsupported_features(self.factory)
        ):
            count = len(self.user_hooks)
            assert self.hook_calls == count, f"the user's {count} hooks fired {self.hook_calls} times"

    def teardown(self) -> None:
        """At the end, also after an error, close the implementation and assert that the model is as it was found."""
        if self.implementation is not None:
            self.implementation.close()
        for handle in self.user_hooks:
            handle.remove()
        if hasattr(self, "before"):  # `begin` has built a model
            assert_unchanged([name for name in changes(self.model, self.before) if name not in self.residue])


def lifecycle_case(family: str, steps: Steps = ()) -> Case:
    """Return a case of a lifecycle check: always the same shape of model and the same prompt."""
    return Case(Decoder(family, num_layers=2, num_heads=3, head_dim=8), rows=((3, 1, 4, 1),), heads=(), steps=steps)


@dataclass(frozen=True)
class LifecycleCheck(Check):
    """A check whose cases are sequences of steps, drawn by the state machine.

    inject_errors: see `LifecycleMachine`. explicit_sequences: sequences of steps that are tried first.
    """

    inject_errors: bool = False
    explicit_sequences: tuple[Steps, ...] = ()

    def __call__(self, factory: Factory, *, quick: bool = False) -> None:
        """Run the machine under the current hypothesis profile. Raises CheckFailure."""
        __tracebackhide__ = True
        machines: list[LifecycleMachine] = []
        spec = self.cases_for(factory)

        def new_machine() -> LifecycleMachine:
            machines[:] = [LifecycleMachine(factory, spec, self.inject_errors)]
            return machines[0]

        # Hypothesis would need minutes to shrink a sequence; `_shortest` needs a second.
        phases = [phase for phase in settings().phases if phase not in (Phase.shrink, Phase.explain)]
        profile = search_settings(quick, stateful_step_count=12, phases=phases)
        with isolated_process_state():
            try:
                for steps in self.explicit_sequences:
                    machine = new_machine()
                    machine.replay(lifecycle_case(spec.families[0], _supported(steps, machine)))
                # The annotation asks for a class, but any callable that returns a machine is accepted.
                run_state_machine_as_test(cast(Any, new_machine), settings=profile)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                case, left = self._shortest(factory, machines[0].case, first_error(error))
                cause = None if isinstance(left, AssertionError) else left
                failure = self.failure(factory, case, left)
                raise (failure if quick else self.explained(factory, failure)) from cause

    def _shortest(self, factory: Factory, case: Case, error: BaseException) -> tuple[Case, BaseException]:
        """Return the failing case without the steps that the failure does not need, and the error of that case."""
        for span in (2, 1):  # in pairs first, since an `open` can be removed only with its `close`
            for index in reversed(range(len(case.steps) - span + 1)):
                shorter = replace(case, steps=case.steps[:index] + case.steps[index + span :])
                try:
                    self.function(factory, shorter)
                except InapplicableStep:
                    continue
                except KeyboardInterrupt:
                    raise
                except BaseException as still:
                    case, error = shorter, still
        return case, error


def _supported(steps: Steps, machine: LifecycleMachine) -> Steps:
    """Return the steps with as many heads, and with the imputation, that the implementation supports."""
    heads, imputation = machine.max_heads, machine.imputations[0]
    return tuple(("ablate", step[1][:heads], imputation) if step[0] == "ablate" else step for step in steps)


def replay(factory: Factory, case: Case) -> None:
    """Repeat the steps of a case on a new machine. This is the `function` of every lifecycle check."""
    spec = CaseSpec().restrict_to(unsupported_features(factory), offered_imputations(factory))
    LifecycleMachine(factory, spec, inject_errors=False).replay(case)
