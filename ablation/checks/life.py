"""The life of an implementation on a model: a state machine, each of whose runs is compared with the bare model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
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

from ablation.checks.behaviour import other_ids
from ablation.checks.cases import Case, CaseSpec, close, run, same
from ablation.checks.check import Check, Factory, apart, declared, examples
from ablation.checks.decoders import Decoder
from ablation.checks.observe import assert_none, changes, hooks, state
from ablation.checks.oracles import ablated_logits, expected
from ablation.heads import AttentionLayer, find_heads

Pair = tuple[int, int]
Steps = tuple[tuple[Any, ...], ...]


def drawn(draw: Any) -> Any:
    """What can be drawn only when the machine knows its model."""
    return st.runner().flatmap(draw)


sets = drawn(lambda life: st.lists(st.sampled_from(life.pairs), min_size=1, max_size=life.most, unique=True).map(tuple))
pairs = drawn(lambda life: st.sampled_from(life.pairs))
layers = drawn(lambda life: st.sampled_from(range(len(life.layers))))


class Raised(Exception):
    """What the model raises in the middle of a forward."""


class Misplaced(Exception):
    """A step for which there would have to be an implementation on the model, or none."""


ERRORS: dict[str, type[BaseException]] = {e.__name__: e for e in (Raised, KeyboardInterrupt, GeneratorExit)}
WHERE = ("before", "behind the projection of", "behind", "registering hooks in")


@contextmanager
def _broken(layer: AttentionLayer, where: str, error: type[BaseException]) -> Iterator[None]:
    """Raise in a forward, at this layer; or where a hook is registered in it."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with ExitStack() as undo:
        match where:
            case "before":
                undo.callback(layer.block.register_forward_pre_hook(fail).remove)
            case "behind the projection of":
                undo.callback(layer.projection.register_forward_hook(fail).remove)
            case "behind":
                undo.callback(layer.block.register_forward_hook(fail).remove)
            case "registering hooks in":
                for module in layer.block.modules():  # what an instance has comes before its class's method
                    hidden = dict.fromkeys(("register_forward_pre_hook", "register_forward_hook"), fail)
                    vars(module).update(hidden)
                    for name in hidden:
                        undo.callback(vars(module).pop, name)
        yield


class LifecycleMachine(RuleBasedStateMachine):
    """Opening, ablating, clearing, nesting, replacing, closing and the user's hooking in any order; a run after each.

    failing: forwards and installs fail, too; what else may be wrong is then left to the other check.
    Hypothesis draws the rules; `play` takes the steps of a case again.
    """

    def __init__(self, make: Factory, cases: CaseSpec, failing: bool) -> None:
        super().__init__()
        self.make, self.cases, self.failing = make, cases, failing
        self.most = (
            1 if "single_forward" in declared(make) else cases.heads
        )  # measured beforehand, means of a set are others
        self.implementation: Any = None
        self.ablated: Case | None = None  # the case that a run should give, None where nothing is ablated
        self.hooks: list[Any] = []
        self.fired = 0

    @initialize(family=drawn(lambda life: st.sampled_from(life.cases.families)))
    def start(self, family: str) -> None:
        """A bare model. Its shape and prompt are fixed: what is searched for is an order of steps."""
        self.begin(of_a_life(family))

    def begin(self, case: Case) -> None:
        """On the model of this case."""
        self.case, self.model, self.inputs = replace(case, steps=()), case.model(), case.inputs()
        heads = find_heads(self.model)  # now, before an implementation puts modules of its own in their places
        self.layers, self.pairs, self.before = heads.layers, list(heads), state(self.model)
        self.bare = run(self.model, self.inputs)
        spare = case.model()
        before = state(spare)
        self.clean = ablated_logits(self.make, case, spare)  # it may round otherwise than the bare model,
        self.residue = changes(spare, before)  # and leave something behind in any case: other checks are for that

    def play(self, case: Case) -> None:
        """Take the steps of a case. Raises Misplaced for one that cannot be taken where it stands."""
        self.begin(case)
        try:
            for step, *arguments in case.steps:
                if step not in ("fail", "hook") and (step == "open") != (self.implementation is None):
                    raise Misplaced(step)
                getattr(self, step)(*arguments)
                self.runs_as_asked()
        except Exception:
            with suppress(Exception):  # the first is to be told
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
        self.implementation = self.make(self.model)

    @precondition(lambda self: self.implementation is not None)
    @rule(heads=sets, imputation=drawn(lambda life: st.sampled_from(life.cases.imputations)))
    def ablate(self, heads: tuple[Pair, ...], imputation: str) -> None:
        """Ablate some heads, in place of what was ablated."""
        self._note("ablate", heads, imputation)
        self.implementation.ablate(list(heads), imputation)
        self.ablated = replace(self.case, heads=heads, imputation=imputation, steps=())

    @precondition(lambda self: self.implementation is not None and not self.failing)
    @rule()
    def clear(self) -> None:
        """Ablate nothing."""
        self._note("clear")
        self.implementation.clear()
        self.ablated = None

    @precondition(lambda self: self.failing)
    @rule(where=st.sampled_from(WHERE), layer=layers, error=st.sampled_from(sorted(ERRORS)))
    def fail(self, where: str, layer: int, error: str) -> None:
        """Run, after opening if need be, with an error that strikes in a layer."""
        self._note("fail", where, layer, error)
        raised, observed = False, "observable" not in declared(self.make)
        before = hooks(self.model) if self.implementation is not None else None
        if self.implementation is None and not observed:  # a copy that is made now would keep what breaks it
            self.implementation = self.make(self.model)
        with _broken(self.layers[layer], where, ERRORS[error]):
            try:
                if self.implementation is None:
                    self.implementation = self.make(self.model)
                self.implementation.run(**self.inputs | {"input_ids": other_ids(self.case)})
            except ERRORS[error]:
                raised = True
        assert torch.is_grad_enabled(), f"the {error} raised {where} layer {layer} has left gradients switched off"
        if before is not None:
            left = [place for place, table in hooks(self.model).items() if len(table) > len(before.get(place, ()))]
            assert not left, f"the {error} raised {where} layer {layer} has left hooks behind: {left[0]}"
        # It may run a copy of the model, and may need no hook.
        if where != WHERE[-1] and observed:
            assert raised, f"the {error} raised {where} layer {layer} was swallowed"

    @precondition(lambda self: not self.failing)
    @rule(layer=layers, where=st.sampled_from(["before", "behind"]))
    def hook(self, layer: int, where: str) -> None:
        """The user hooks a projection, to look on."""
        self._note("hook", layer, where)

        def look(*_: Any) -> None:
            self.fired += 1

        projection = self.layers[layer].projection
        register = projection.register_forward_pre_hook if where == "before" else projection.register_forward_hook
        self.hooks.append(register(look))

    @precondition(lambda self: self.implementation is not None and not self.failing)
    @rule(pair=pairs)
    def nest(self, pair: Pair) -> None:
        """A second implementation comes and goes."""
        self._note("nest", pair)
        if (other := self._second()) is not None:
            other.ablate([pair], self.cases.imputations[0])
            other.run(**self.inputs)
            other.close()

    @precondition(lambda self: self.implementation is not None and not self.failing)
    @rule(pair=pairs)
    def succeed(self, pair: Pair) -> None:
        """A second implementation comes, and the first goes."""
        self._note("succeed", pair)
        if (other := self._second()) is not None:
            imputation = self.cases.imputations[0]
            other.ablate([pair], imputation)
            self.implementation.close()
            self.implementation = other
            self.ablated = replace(self.case, heads=(pair,), imputation=imputation, steps=())

    def _second(self) -> Any:
        """None where a second one is refused, as it may be, if the first then works as before."""
        try:
            return self.make(self.model)
        except Exception:
            return None

    @precondition(lambda self: self.implementation is not None)
    @rule()
    def close(self) -> None:
        """Nothing is on the model any more."""
        self._note("close")
        self.implementation.close()
        self.implementation, self.ablated = None, None

    @invariant()
    def runs_as_asked(self) -> None:
        """After every step a run gives what a clean run gives, or surgery on the weights; the user's hooks look on."""
        self.fired = 0
        if self.implementation is None:
            same(run(self.model, self.inputs), self.bare, "the logits of the model without an implementation")
        else:
            got = self.implementation.run(**self.inputs)
            if self.ablated is None:
                same(got, self.clean, "the logits with nothing ablated")
            else:
                heads = ", ".join(f"layer {layer} head {head}" for layer, head in self.ablated.heads)
                what = f"the logits with {heads} ablated by {self.ablated.imputation}"
                close(got, expected(self.ablated), what)
        if self.implementation is None or not {"observable", "single_forward"} & set(declared(self.make)):
            assert self.fired == len(self.hooks), f"{len(self.hooks)} hooks of the user's fired {self.fired} times"

    def teardown(self) -> None:
        """At the end of every life, however it ended, the model is what it was."""
        if self.implementation is not None:
            self.implementation.close()
        for handle in self.hooks:
            handle.remove()
        if hasattr(self, "before"):  # there is a model
            assert_none([place for place in changes(self.model, self.before) if place not in self.residue])


def of_a_life(family: str, steps: Steps = ()) -> Case:
    """The case of a life: its model and its prompt are always these."""
    return Case(Decoder(family, num_layers=2, num_heads=3, head_dim=8), rows=((3, 1, 4),), heads=(), steps=steps)


@dataclass(frozen=True)
class LifeCheck(Check):
    """A check whose cases are drawn by the state machine, step by step.

    always: lives that are played first, whatever is drawn.
    """

    failing: bool = False
    always: tuple[Steps, ...] = ()

    def __call__(self, make: Factory) -> None:
        """Run the machine, under the hypothesis profile in force. Raises AssertionError."""
        __tracebackhide__ = True
        lives: list[LifecycleMachine] = []
        cases = self.cases.without(declared(make))

        def birth() -> LifecycleMachine:
            lives[:] = [LifecycleMachine(make, cases, self.failing)]
            return lives[0]

        phases = [phase for phase in settings().phases if phase is not Phase.shrink]  # takes minutes: see `_shortest`
        how = settings(
            deadline=None,
            max_examples=examples(),
            stateful_step_count=12,
            phases=phases,
            suppress_health_check=[HealthCheck.too_slow],
        )
        with apart():
            try:
                for steps in self.always:
                    birth().play(of_a_life(cases.families[0], _by(cases.imputations[0], steps)))
                # It takes any callable that gives a machine, whatever its annotation says.
                run_state_machine_as_test(cast(Any, birth), settings=how)
            except Exception as error:
                case, left = self._shortest(make, lives[0].case, error)
                raise self.failure(make, case, left) from (None if isinstance(left, AssertionError) else left)

    def _shortest(self, make: Factory, case: Case, error: Exception) -> tuple[Case, Exception]:
        """The failing case without the steps that it does not need, and its error."""
        for span in (2, 1):  # an opening goes with its closing
            for index in reversed(range(len(case.steps) - span + 1)):
                shorter = replace(case, steps=case.steps[:index] + case.steps[index + span :])
                try:
                    self.function(make, shorter)
                except Misplaced:
                    continue
                except Exception as still:
                    case, error = shorter, still
        return case, error


def _by(imputation: str, steps: Steps) -> Steps:
    """The same steps, with this imputation."""
    return tuple((*step[:-1], imputation) if step[0] == "ablate" else step for step in steps)


def live(make: Factory, case: Case) -> None:
    """Play the steps of a case."""
    LifecycleMachine(make, CaseSpec().without(declared(make)), failing=False).play(case)


ABLATED: Steps = (("open",), ("ablate", ((0, 1),), "zero"))


CHECKS = [
    LifeCheck(
        id="hygiene.exception",
        requirement="An exception, in a forward or where hooks are registered, leaves nothing behind, and it goes on.",
        function=live,
        cases=CaseSpec(heads=2),
        failing=True,
        always=(
            (("fail", "registering hooks in", 1, "Raised"),),
            (("hook", 0, "before"), *ABLATED, ("fail", "before", 1, "Raised")),
        ),
    ),
    LifeCheck(
        id="hygiene.lifecycle",
        requirement="Opened, set, cleared, nested and closed in any order, it does what was asked last.",
        function=live,
        cases=CaseSpec(heads=2),
        always=(
            (*ABLATED, ("nest", (0, 0))),
            (*ABLATED, ("succeed", (1, 0)), ("close",)),
            (("open",), ("hook", 0, "before"), ("close",)),
        ),
    ),
]
