"""Every head of one model: what an implementation gives, against surgery on the weights and against the clean run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ablation.checks.cases import Case, with_factor
from ablation.checks.check import inputs_for, message_of, offered_imputations, unsupported_features
from ablation.checks.driving import ablate, made, run
from ablation.checks.imputed import Pair, frozen_values
from ablation.checks.locality import assert_replaced
from ablation.checks.observe import recorded_inputs
from ablation.checks.on_model.own_model import OwnModel, shorter
from ablation.checks.oracles import row_means, surgery_logits
from ablation.checks.protocol import IMPUTATIONS, KEYWORDS, Factory, Implementation
from ablation.errors import one_line
from ablation.heads import find_heads

Progress = Callable[[int, int], object]
"""Called with the number of ablations that were tried, and the number of all."""


@dataclass(frozen=True)
class Outcome:
    """One head under one imputation.

    effect: the largest change of a logit by the ablation, as surgery gives it; error: the largest difference between
    the implementation and surgery; both in logits, at real tokens. kept, right_kept: for each prompt, whether the
    implementation and surgery keep the answer of the clean run. change, right_change: for each prompt, by how much its
    probability changes. z_problem: what is wrong with the inputs of the projections, if they can be observed. raised:
    the error of the implementation.
    """

    pair: Pair
    effect: float = 0.0
    error: float = 0.0
    kept: tuple[bool, ...] = ()
    right_kept: tuple[bool, ...] = ()
    change: tuple[float, ...] = ()
    right_change: tuple[float, ...] = ()
    z_problem: str | None = None
    raised: str | None = None


@dataclass
class EveryHead:
    """The outcomes of all heads, for each imputation.

    case: the batch. prompts: how many of its rows, the first ones, are the user's. left_out: imputation -> layers for
    which there was no time.
    """

    case: Case
    prompts: int
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def case_of(self, pairs: Sequence[Pair], imputation: str) -> Case:
        """Return the case of some heads of one layer. Values are given for each position in every second layer."""
        by_position = imputation == "values" and pairs[0][0] % 2 == 1
        return replace(self.case, heads=tuple(pairs), imputation=with_factor(imputation), by_position=by_position)

    def has_logits(self, imputation: str) -> bool:
        """Whether the logits were compared: for an imputation of the implementation's own, only z is."""
        return imputation in IMPUTATIONS

    def wrong(self, imputation: str, tolerance: float) -> list[Outcome]:
        """Return the outcomes with wrong logits or an error, those with the largest error first."""
        found = [each for each in self.outcomes[imputation] if each.raised or not each.error <= tolerance]
        return sorted(found, key=lambda each: (not each.raised, -each.error))

    def worst(self, imputation: str) -> Outcome:
        """Return an outcome with an error, or else that with a wrong z or the largest error."""
        return max(self.outcomes[imputation], key=lambda each: (bool(each.raised), each.error, bool(each.z_problem)))

    def too_small(self, imputation: str, tolerance: float) -> list[Outcome]:
        """Return the outcomes whose effect is no larger than rounding, so that a wrong ablation might not show."""
        return [each for each in self.outcomes[imputation] if not each.raised and each.effect <= tolerance]


def padded_case(factory: Factory, own: OwnModel) -> tuple[Case, int]:
    """Return the batch on which every head is tried, and how many of its rows are the user's prompts.

    It has two rows of different lengths at least, if the implementation supports that and the model does.
    """
    rows, unsupported = list(own.rows), unsupported_features(factory)
    if "batch" in unsupported:
        return own.case(rows[:1]), 1
    if "padding" in unsupported or not own.can_be_padded:
        rows = [row for row in rows if len(row) == len(rows[0])]
        return own.case(rows), len(rows)
    prompts = len(rows)
    if len(set(map(len, rows))) == 1:
        rows.append(shorter(rows[0]))
    return own.case(rows, side="right" if "position_ids" in unsupported else "left"), prompts


def try_every_head(
    factory: Factory,
    own: OwnModel,
    imputations: Iterable[str] | None = None,
    *,
    found: EveryHead | None = None,
    deadline: float = float("inf"),
    progress: Progress | None = None,
) -> EveryHead:
    """Ablate every head, one at a time, by imputations that an implementation offers: by default, by all of them.

    found: outcomes of other imputations, to which these are added. deadline: a time of `time.monotonic`, after which no
    further layer begins. Errors of the implementation are outcomes; a KeyboardInterrupt propagates.
    """
    found, heads = found or EveryHead(*padded_case(factory, own)), own.heads()
    names = list(offered_imputations(factory) if imputations is None else imputations)
    found.outcomes |= {name: [] for name in names}
    with torch.no_grad():
        look = _Look(factory, own, found)
        for number, layer in enumerate(layers := _spread(sorted(dict(heads)))):
            if time.monotonic() > deadline:
                found.left_out |= {name: sorted(layers[number:]) for name in names}
                break
            pairs = [pair for pair in heads if pair[0] == layer]
            for name, outcomes in look.at(names, pairs):
                found.outcomes[name] += outcomes
            if progress is not None:
                progress(sum(len(found.outcomes[name]) for name in names), len(heads) * len(names))
    for name in names:
        found.outcomes[name].sort(key=lambda each: each.pair)
    return found


def _spread(layers: Sequence[int]) -> list[int]:
    """Return layers in an order in which any first part of them is spread over the model."""
    order = sorted(range(len(layers)), key=lambda place: f"{place:020b}"[::-1])
    return [layers[place] for place in order]


class _Look:
    """Compares the heads of one layer at a time, with the clean run of one batch."""

    def __init__(self, factory: Factory, own: OwnModel, found: EveryHead) -> None:
        self.factory, self.own, self.found = factory, own, found
        self.observable = not {"observable", "single_forward"} & set(unsupported_features(factory))
        self.inputs, self.real = inputs_for(factory, found.case), found.case.replaced()
        model = own.fresh()
        with recorded_inputs(model) as calls:
            logits = run(model, self.inputs)
            self.clean_z = [layer.pop() for layer in calls.values()]
        self.layers = find_heads(model).layers
        self.clean = logits[self.real]  # [real tokens, vocabulary]
        self.last = self.real.sum(dim=1).cumsum(dim=0) - 1  # of each row, in the list of real tokens
        self.answer = self.clean[self.last].argmax(dim=-1)  # [rows]

    def at(self, names: Sequence[str], pairs: Sequence[Pair]) -> Iterator[tuple[str, list[Outcome]]]:
        """Yield the outcomes of some heads of one layer for each imputation."""
        cases = {name: self.found.case_of(pairs, name) for name in names}
        values = {name: self._values(case) for name, case in cases.items() if name in IMPUTATIONS}
        right = {pair: self._right(pair, values) for pair in pairs}
        for name, case in cases.items():
            frozen = values[name] if name in KEYWORDS else {}
            yield name, list(self._outcomes(name, case, frozen, right))

    def _values(self, case: Case) -> Mapping[Pair, Tensor]:
        """Return what replaces z in each head of a case, float64 [rows, tokens, head_dim]. The heads are of one layer.

        In their layer, their z is that of the clean run.
        """
        if case.kind in KEYWORDS:
            return frozen_values(case, self.own.fresh())
        number = [layer.index for layer in self.layers].index(case.heads[0][0])
        z = self.clean_z[number].unflatten(-1, (-1, self.own.head_dim)).double()
        of_heads = {pair: z[:, :, pair[1]] for pair in case.heads}
        if case.reads_row:
            return {pair: row_means(case, own) for pair, own in of_heads.items()}
        return {
            pair: own * float(case.factor or 0) for pair, own in of_heads.items()
        }  # scale; zero is without a factor

    def _right(self, pair: Pair, values: Mapping[str, Mapping[Pair, Tensor]]) -> dict[str, Tensor]:
        """Return the logits that each imputation of a head should give, {name: [real tokens, vocabulary]}.

        One forward pass has the rows of all imputations: a large model takes hardly longer for more rows.
        """
        if not values:
            return {}
        imputation = with_factor(next(iter(values))) if len(values) == 1 else "values"
        base = self.found.case
        case = replace(base, rows=base.rows * len(values), heads=(pair,), imputation=imputation)
        logits = surgery_logits(case, {pair: torch.cat([of_heads[pair] for of_heads in values.values()])})
        of_each = logits.unflatten(0, (len(values), -1))
        return {name: of_each[number][self.real] for number, name in enumerate(values)}

    def _outcomes(
        self, name: str, case: Case, frozen: Mapping[Pair, Tensor], right: Mapping[Pair, Mapping[str, Tensor]]
    ) -> Iterator[Outcome]:
        """Yield the outcome of each head of a case, by one implementation."""
        model, calls = self.own.fresh(), dict[int, list[Tensor]]()
        with ExitStack() as stack:
            implementation: Implementation | None = None
            if self.observable:  # a copy of the model would copy the recorder, too
                calls = stack.enter_context(recorded_inputs(model))
            for pair in case.heads:
                each, want = replace(case, heads=(pair,)), right[pair].get(name)
                try:
                    if implementation is None:
                        implementation = stack.enter_context(made(self.factory, model))
                    ablate(implementation, each)
                    for of_layer in calls.values():
                        of_layer.clear()  # of a reference
                    logits = implementation.run(**self.inputs)[self.real].detach()
                except KeyboardInterrupt:
                    raise
                except BaseException as error:
                    yield Outcome(pair, raised=one_line(f"{type(error).__name__}: {error}"))
                    continue
                problem = self._z_problem(each, list(calls.values()), frozen, logits) if self.observable else None
                yield self._outcome(pair, logits, want, problem)

    def _z_problem(
        self, case: Case, calls: Sequence[Sequence[Tensor]], frozen: Mapping[Pair, Tensor], logits: Tensor
    ) -> str | None:
        moved = bool((logits != self.clean).any()) if logits.shape == self.clean.shape else True
        try:
            assert_replaced(case, self.layers, self.clean_z, calls, frozen, logits_moved=moved)
        except AssertionError as error:
            return message_of(error)
        return None

    def _outcome(self, pair: Pair, logits: Tensor, want: Tensor | None, problem: str | None) -> Outcome:
        """Return the outcome of one head. want: the right logits, if they are known."""
        if logits.shape != self.clean.shape:
            shapes = f"{tuple(logits.shape)}, not {tuple(self.clean.shape)}"
            return Outcome(pair, raised=f"run returned logits of real tokens of shape {shapes}")
        right = logits if want is None else want

        def kept(each: Tensor) -> tuple[bool, ...]:
            return tuple((each[self.last].argmax(dim=-1) == self.answer).tolist())

        def change(each: Tensor) -> tuple[float, ...]:
            return tuple((self._probability(each) - self._probability(self.clean)).tolist())

        return Outcome(
            pair,
            effect=_largest(right - self.clean),
            error=_largest(logits - right),
            kept=kept(logits),
            right_kept=kept(right),
            change=change(logits),
            right_change=change(right),
            z_problem=problem,
        )

    def _probability(self, logits: Tensor) -> Tensor:
        """Return the probability of the answer of the clean run, [rows]."""
        return logits[self.last].float().softmax(dim=-1).gather(1, self.answer[:, None])[:, 0]


def _largest(difference: Any) -> float:
    """Return the largest absolute value; infinity if there is NaN."""
    found = float(difference.abs().max())
    return found if found == found else float("inf")
