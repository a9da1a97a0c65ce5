"""The life of an implementation on a model: a state machine, each of whose runs is compared with the bare model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ablation.checks.cases import Case, Cases, close, run, same
from ablation.checks.check import Check, Factory, declared, on_one_thread
from ablation.checks.decoders import Decoder
from ablation.checks.hygiene import Raised
from ablation.checks.observe import assert_as_it_was, state
from ablation.checks.oracles import ablated_logits, expected
from ablation.heads import find_heads

Pair = tuple[int, int]


def drawn(draw: Any) -> Any:
    """What can be drawn only when the machine knows its model."""
    return st.runner().flatmap(draw)


pairs = drawn(lambda life: st.sampled_from(list(find_heads(life.model))))
layers = drawn(lambda life: st.sampled_from(range(len(life.layers))))


class Life(RuleBasedStateMachine):
    """Opening, ablating, clearing, failing, nesting, closing and the user's hooking, in any order; runs after each.

    Hypothesis draws the rules; `play` takes the steps of a case again.
    """

    def __init__(self, make: Factory, cases: Cases) -> None:
        super().__init__()
        self.make, self.cases = make, cases
        self.implementation: Any = None
        self.ablated: Case | None = None  # the case that a run should give, None where nothing is ablated
        self.hooks: list[Any] = []
        self.fired = 0

    @initialize(family=drawn(lambda life: st.sampled_from(life.cases.families)))
    def start(self, family: str) -> None:
        """A bare model. Its shape and prompt are fixed: what is searched for is an order of steps."""
        self.begin(Case(Decoder(family, layers=2, heads=3, width=8), rows=((3, 1, 4),), heads=()))

    def begin(self, case: Case) -> None:
        """On the model of this case."""
        self.case, self.model, self.inputs = replace(case, steps=()), case.model(), case.inputs()
        self.layers, self.before = find_heads(self.model).layers, state(self.model)
        self.bare = run(self.model, self.inputs)
        self.clean = ablated_logits(self.make, case)  # no heads: what the implementation gives on another such model

    def play(self, case: Case) -> None:
        """Take the steps of a case."""
        self.begin(case)
        for step, *arguments in case.steps:
            getattr(self, step)(*arguments)
            self.runs_as_asked()
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
    @rule(pair=pairs, imputation=drawn(lambda life: st.sampled_from(life.cases.imputations)))
    def ablate(self, pair: Pair, imputation: str) -> None:
        """Ablate one head, in place of what was ablated."""
        self._note("ablate", pair, imputation)
        self.implementation.ablate([pair], imputation)
        self.ablated = replace(self.case, heads=(pair,), imputation=imputation, steps=())

    @precondition(lambda self: self.implementation is not None)
    @rule()
    def clear(self) -> None:
        """Ablate nothing."""
        self._note("clear")
        self.implementation.clear()
        self.ablated = None

    @precondition(lambda self: self.implementation is not None)
    @rule(layer=layers)
    def fail(self, layer: int) -> None:
        """Run, with an error that a layer raises."""
        self._note("fail", layer)

        def broken(*_: Any) -> None:
            raise Raised

        handle = self.layers[layer].block.register_forward_hook(broken)
        try:
            self.implementation.run(**self.inputs)
        except Raised:
            pass
        else:
            assert "observe" in declared(self.make), f"an error raised in layer {layer} was swallowed"
        finally:
            handle.remove()

    @rule(layer=layers)
    def hook(self, layer: int) -> None:
        """The user hooks a projection, to look on."""
        self._note("hook", layer)

        def look(*_: Any) -> None:
            self.fired += 1

        self.hooks.append(self.layers[layer].projection.register_forward_hook(look))

    @precondition(lambda self: self.implementation is not None)
    @rule(pair=pairs)
    def nest(self, pair: Pair) -> None:
        """A second implementation comes and goes."""
        self._note("nest", pair)
        try:
            other = self.make(self.model)
        except Exception:
            return  # a second one may be refused, if the first then works as before
        other.ablate([pair], self.cases.imputations[0])
        other.run(**self.inputs)
        other.close()

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
                ((layer, head),) = self.ablated.heads
                what = f"the logits with layer {layer} head {head} ablated by {self.ablated.imputation}"
                close(got, expected(self.ablated), what)
        if self.implementation is None or not {"observe", "once"} & set(declared(self.make)):
            assert self.fired == len(self.hooks), f"{len(self.hooks)} hooks of the user's fired {self.fired} times"

    def teardown(self) -> None:
        """At the end of every life, however it ended, the model is what it was."""
        if self.implementation is not None:
            self.implementation.close()
        for handle in self.hooks:
            handle.remove()
        if hasattr(self, "before"):
            assert_as_it_was(self.model, self.before)


class LifeCheck(Check):
    """The check whose cases are drawn by the state machine, step by step."""

    def __call__(self, make: Factory) -> None:
        """Run the machine, under the hypothesis profile in force. Raises AssertionError."""
        __tracebackhide__ = True
        lives: list[Life] = []

        def birth() -> Life:
            lives[:] = [Life(make, self.cases.without(declared(make)))]
            return lives[0]

        try:
            with on_one_thread():
                run_state_machine_as_test(  # takes any callable that gives a machine, whatever its annotation says
                    cast(Any, birth),
                    settings=settings(
                        deadline=None, stateful_step_count=12, suppress_health_check=[HealthCheck.too_slow]
                    ),
                )
        except Exception as error:
            raise self.failure(make, lives[0].case, error) from None


def live(make: Factory, case: Case) -> None:
    """Play the steps of a case."""
    Life(make, CASES).play(case)


CASES = Cases()
CHECKS = [
    LifeCheck(
        id="life",
        requirement="Opened, set, cleared, failed, nested and closed in any order, it does what was asked last.",
        function=live,
        cases=CASES,
    )
]
