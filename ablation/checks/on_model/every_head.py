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
from ablation.checks.check import inputs_for, offered_imputations, unsupported_features
from ablation.checks.driving import ablate, made, run
from ablation.checks.imputed import Pair, frozen_values
from ablation.checks.locality import assert_replaced
from ablation.checks.observe import recorded_inputs
from ablation.checks.on_model.own_model import OwnModel, shorter
from ablation.checks.oracles import row_means, surgery_logits
from ablation.checks.protocol import IMPUTATIONS, Factory, Implementation
from ablation.errors import one_line
from ablation.heads import find_heads

Progress = Callable[[str, int, int], object]
"""Called with the imputation, the number of heads that were tried, and the number of all heads."""


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

    has_logits: imputations that surgery knows; for those of the implementation's own, z alone is compared. left_out:
    imputation -> layers for which there was no time.
    """

    case: Case
    prompts: int
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def has_logits(self, imputation: str) -> bool:
        """Whether the logits were compared."""
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
    with torch.no_grad():
        look = _Look(factory, own, found.case)
        for name in offered_imputations(factory) if imputations is None else imputations:
            outcomes, left = found.outcomes.setdefault(name, []), list[int]()
            for layer in _spread(sorted(dict(heads))):
                if time.monotonic() > deadline:
                    left.append(layer)
                    continue
                pairs = [pair for pair in heads if pair[0] == layer]
                outcomes += look.at(replace(found.case, imputation=with_factor(name)), pairs)
                if progress is not None:
                    progress(name, len(outcomes), len(heads))
            outcomes.sort(key=lambda each: each.pair)
            if left:
                found.left_out[name] = sorted(left)
    return found


def _spread(layers: Sequence[int]) -> list[int]:
    """Return layers in an order in which any first part of them is spread over the model."""
    order = sorted(range(len(layers)), key=lambda place: f"{place:020b}"[::-1])
    return [layers[place] for place in order]


class _Look:
    """Compares the heads of one layer at a time, with the clean run of one batch."""

    def __init__(self, factory: Factory, own: OwnModel, base: Case) -> None:
        self.factory, self.own = factory, own
        self.observable = not {"observable", "single_forward"} & set(unsupported_features(factory))
        self.inputs, self.real = inputs_for(factory, base), base.replaced()
        model = own.fresh()
        with recorded_inputs(model) as calls:
            logits = run(model, self.inputs)
            self.clean_z = [layer.pop() for layer in calls.values()]
        self.layers = find_heads(model).layers
        self.clean = logits[self.real]  # [real tokens, vocabulary]
        ends = self.real.sum(dim=1).cumsum(dim=0) - 1  # of each row, in the list of real tokens
        self.last = ends
        self.answer = self.clean[ends].argmax(dim=-1)  # [rows]

    def at(self, case: Case, pairs: Sequence[Pair]) -> Iterator[Outcome]:
        """Yield the outcomes of some heads of one layer. case: with the imputation."""
        values = self._values(case, pairs)
        known = case.kind in IMPUTATIONS
        cases = [replace(case, heads=(pair,)) for pair in pairs]
        right = [surgery_logits(each, values)[self.real] if known else self.clean for each in cases]
        frozen = {} if case.kind in ("zero", "scale") or case.reads_row else values
        model, calls = self.own.fresh(), dict[int, list[Tensor]]()
        with ExitStack() as stack:
            implementation: Implementation | None = None
            if self.observable:  # a copy of the model would copy the recorder, too
                calls = stack.enter_context(recorded_inputs(model))
            for each, want in zip(cases, right, strict=True):
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
                    yield Outcome(each.heads[0], raised=one_line(f"{type(error).__name__}: {error}"))
                    continue
                problem = self._z_problem(each, list(calls.values()), frozen, logits) if self.observable else None
                yield self._outcome(each.heads[0], logits, want, problem, known)

    def _values(self, case: Case, pairs: Sequence[Pair]) -> Mapping[Pair, Tensor]:
        """Return what replaces z in each head, float64 [rows, tokens, head_dim]; empty if surgery needs no values."""
        if case.reads_row:
            z = dict(zip((layer.index for layer in self.layers), self.clean_z, strict=True))[pairs[0][0]]
            of_heads = z.unflatten(-1, (-1, self.own.head_dim))
            return {pair: row_means(case, of_heads[:, :, pair[1]]) for pair in pairs}
        return frozen_values(replace(case, heads=tuple(pairs)), self.own.fresh())

    def _z_problem(
        self, case: Case, calls: Sequence[Sequence[Tensor]], frozen: Mapping[Pair, Tensor], logits: Tensor
    ) -> str | None:
        moved = bool((logits != self.clean).any()) if logits.shape == self.clean.shape else True
        try:
            assert_replaced(case, self.layers, self.clean_z, calls, frozen, logits_moved=moved)
        except AssertionError as error:
            return str(error)
        return None

    def _outcome(self, pair: Pair, logits: Tensor, want: Tensor, problem: str | None, known: bool) -> Outcome:
        if logits.shape != want.shape:
            return Outcome(pair, raised=f"run returned logits of shape {tuple(logits.shape)}, not {tuple(want.shape)}")
        theirs, right, clean = (
            each[self.last].float().softmax(dim=-1).gather(1, self.answer[:, None])[:, 0]
            for each in (logits, want, self.clean)
        )

        def kept(each: Tensor) -> tuple[bool, ...]:
            return tuple((each[self.last].argmax(dim=-1) == self.answer).tolist())

        return Outcome(
            pair,
            effect=_largest(want - self.clean),
            error=_largest(logits - want) if known else 0.0,
            kept=kept(logits),
            right_kept=kept(want),
            change=tuple((theirs - clean).tolist()),
            right_change=tuple((right - clean).tolist()),
            z_problem=problem,
        )


def _largest(difference: Any) -> float:
    """Return the largest absolute value; infinity if there is NaN."""
    found = float(difference.abs().max())
    return found if found == found else float("inf")
