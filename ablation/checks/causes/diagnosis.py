"""The likely cause of a failure: one sentence that names the mistake, found by experiments on the failing case.

No experiment finds a cause for certain, so nothing is said unless exactly one known mistake explains what is observed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ablation.checks.cases import Case
from ablation.checks.causes import findings, histories, passed_inputs, side_effects, surroundings
from ablation.checks.causes.conditions import no_effect
from ablation.checks.causes.histories import History
from ablation.checks.causes.simulation import NOTHING, RIGHT, Attempt, Mistake, Outcome, Setting, observed, simulated
from ablation.checks.causes.wrong_heads import WRONG_HEADS
from ablation.checks.causes.wrong_places import WRONG_PLACES
from ablation.checks.causes.wrong_values import WRONG_VALUES
from ablation.checks.check import message_of, unsupported_features
from ablation.checks.decoders import GROUPED, Decoder, Subject
from ablation.checks.independence import with_many_rows
from ablation.checks.masks import MASK_DTYPES, forms_of_row, with_empty_row
from ablation.checks.oracles import with_long_prompt
from ablation.checks.protocol import IMPUTATIONS, Factory

if TYPE_CHECKING:
    from ablation.checks.check import Check

MISTAKES = (*WRONG_HEADS, *WRONG_PLACES, *WRONG_VALUES)
NEED_COPIES = (side_effects.residue, surroundings.differentiated, surroundings.other_models)
"""Experiments that change the weights, gradients or configuration of a model, or need two models: only for random
decoders, which each experiment gets as new copies. There is only one copy of the user's own model."""


def diagnosis(factory: Factory, check: Check, case: Case, error: BaseException | None = None) -> str | None:
    """Return a sentence that names the mistake of an implementation that fails a check in a case, or None.

    error: what the check raised. An experiment that fails is no diagnosis; a KeyboardInterrupt propagates. The user's
    own model is left as it was found.
    """
    with ExitStack() as at_end, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not isinstance(case.decoder, Decoder):
            at_end.callback(case.model)
        for experiment in _experiments(factory, check, case, error):
            with Attempt():
                if cause := experiment():
                    return cause
    return None


def _experiments(
    factory: Factory, check: Check, case: Case, error: BaseException | None
) -> Iterator[Callable[[], str | None]]:
    """Yield the experiments, the most telling first."""
    if case.heads and not case.steps:
        yield lambda: _wrong_ablation(factory, check, case)
        yield lambda: no_effect(factory, case)
    for module in (histories, passed_inputs, surroundings, side_effects):
        for experiment in module.EXPERIMENTS.get(check.id, ()):
            if isinstance(case.decoder, Decoder) or experiment not in NEED_COPIES:
                yield partial(experiment, History(factory, case))
    if error is not None and not isinstance(error, AssertionError):
        yield lambda: _in_default_dtype(factory, check, case) if "dtype" in str(error) else None
    if isinstance(error, AssertionError):
        yield lambda: next(
            filter(None, findings.from_finding(History(factory, case), check.id, message_of(error))), None
        )


def _wrong_ablation(factory: Factory, check: Check, case: Case) -> str | None:
    """Return the one known mistake that gives what the implementation gives, in the case and in similar ones."""
    if case.kind not in IMPUTATIONS:
        return None
    for when, failing, inputs in _tried(factory, check, case):
        setting = Setting(failing, failing.model(), inputs(failing))
        got = observed(factory, failing, inputs(failing))
        if got.fits(simulated(setting, RIGHT)):
            continue
        found = _explanations(got, setting, tuple(mistake for mistake in MISTAKES if mistake.needs(failing)))
        # If nothing at all is ablated, a mistake has to be seen in a case in which it ablates something.
        confirmed = set(found) if not got.fits(simulated(setting, NOTHING)) else set()
        for other in _similar(factory, failing):
            if not found:
                break
            with Attempt():
                setting = Setting(other, other.model(), inputs(other))
                got = observed(factory, other, inputs(other))
                found = _explanations(got, setting, found)
                if not got.fits(simulated(setting, NOTHING)):
                    confirmed |= set(found)
        causes = {mistake.cause for mistake in found}
        if causes == {mistake.cause for mistake in found if mistake in confirmed}:
            if len(general := {cause.partition(": ")[0] for cause in causes}) < len(causes):
                causes = general  # what variants of one mistake have in common
            if 0 < len(causes) <= _allowed(case):
                return when + "; or ".join(sorted(causes))
    return None


def _allowed(case: Case) -> int:
    """Return how many causes are named if they cannot be told apart: two for the user's own model, which is fixed."""
    return 1 if isinstance(case.decoder, Decoder) else 2


def _in_default_dtype(factory: Factory, check: Check, case: Case) -> str | None:
    in_float32 = replace(case, decoder=case.random_decoder._replace(dtype="float32"))
    if case.decoder.dtype == "float32" or not check.passes(factory, in_float32):
        return None
    return "a tensor is made in float32, torch's default dtype, whatever the dtype of z"


def _explanations(got: Outcome, setting: Setting, mistakes: tuple[Mistake, ...]) -> tuple[Mistake, ...]:
    """Return the mistakes that give an outcome."""
    found = []
    for mistake in mistakes:
        with Attempt():  # of a simulation that differs, or of a mistake that this model does not allow
            if got.fits(simulated(setting, mistake, got)):
                found.append(mistake)
    return tuple(found)


Inputs = Callable[[Case], dict[str, Any]]


def _tried(factory: Factory, check: Check, case: Case) -> Iterator[tuple[str, Case, Inputs]]:
    """Yield the cases that a check makes of one, and their inputs.

    The first item is what a message says about inputs that are not the usual ones.
    """
    match check.id:
        case "oracle.zero_deep":
            yield "", case, Case.inputs
            yield "", replace(case, heads=((case.decoder.num_layers - 1, case.decoder.num_heads - 1),)), Case.inputs
        case "oracle.scale":
            yield "", case, Case.inputs
            yield "", replace(case, imputation="scale:0"), Case.inputs
        case "oracle.long_prompt":
            yield "", with_long_prompt(case), Case.inputs
        case "independence.many_rows":
            yield "", with_many_rows(case), Case.inputs
        case "independence.rows" | "independence.padding":
            yield "", case, Case.inputs
            if not case.is_padded:
                yield "in a run without an attention mask, ", case, _without_mask
        case "masks.dtype":
            for dtype in MASK_DTYPES:
                yield f"with an attention mask of {dtype}, ", case, partial(_with_mask_of, dtype)
        case "masks.single_row":
            for form, _ in forms_of_row(case, "position_ids" not in unsupported_features(factory)):
                yield f"in one row {form}, ", case, partial(_in_form, form)
        case "masks.empty_row":
            for first in (True, False):
                yield "with a row of padding only, ", case, partial(_with_empty_row, first)
        case _:
            yield "", case, Case.inputs


def _without_mask(case: Case) -> dict[str, Any]:
    return {"input_ids": case.inputs()["input_ids"], "use_cache": False}


def _with_mask_of(dtype: torch.dtype, case: Case) -> dict[str, Any]:
    inputs = case.inputs()
    return {**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}


def _in_form(name: str, case: Case) -> dict[str, Any]:
    return dict(forms_of_row(case))[name]


def _with_empty_row(first: bool, case: Case) -> dict[str, Any]:
    return {name: with_empty_row(given, first) for name, given in case.inputs().items()}


def _with_longer_rows(case: Case) -> Case:
    """Return a case whose rows begin as before, and have four more tokens."""
    size = case.decoder.vocabulary

    def longer(row: tuple[int, ...]) -> tuple[int, ...]:
        return tuple((row[at % len(row)] + at // len(row) * (3 * at + 1)) % size for at in range(len(row) + 4))

    return replace(case, rows=tuple(map(longer, case.rows)))


def _with_three_rows(case: Case) -> Case:
    """Return a case of three rows, the first ones as before."""
    rows, size = case.rows, case.decoder.vocabulary
    every = (tuple((token + at // len(rows)) % size for token in rows[at % len(rows)]) for at in range(3))
    return replace(case, rows=tuple(every))


def _similar(factory: Factory, case: Case) -> Iterator[Case]:
    """Yield cases in which mistakes differ that give the same in one case: other heads, more heads, rows and tokens."""
    unsupported = unsupported_features(factory)
    decoder = case.decoder
    yield replace(case, heads=tuple((layer, (head + 1) % decoder.num_heads) for layer, head in case.heads))
    yield replace(case, heads=_moved(case, decoder))
    if case.kind == "scale":
        yield replace(case, imputation="scale:0.25")
    yield _with_longer_rows(case)
    if len(case.rows) > 1:
        yield replace(case, rows=case.rows[:1])
    if "batch" not in unsupported and len(case.rows) < 3:
        yield _with_three_rows(case)
    if case.is_padded and "position_ids" not in unsupported:
        yield replace(case, side="both" if case.side != "both" else "left")
    if not isinstance(decoder, Decoder) or decoder.num_layers > 8:
        return
    group = 2 if decoder.family in GROUPED else 1
    heads = group * (5 if decoder.num_heads == 3 * group else 3)
    larger = decoder._replace(num_layers=max(4, decoder.num_layers), num_heads=heads, num_key_value_groups=group)
    several = "multiple_heads" not in unsupported
    yield replace(case, decoder=larger, heads=_several(larger) if several else _moved(case, larger))


def _several(decoder: Decoder) -> tuple[tuple[int, int], ...]:
    """Return several heads of an inner layer, neither in order nor neighbours, and one of another layer."""
    layers = sorted(dict(decoder.heads()))
    return (layers[-2], decoder.num_heads - 1), (layers[-2], 0), (layers[-1], 1)


def _moved(case: Case, decoder: Subject) -> tuple[tuple[int, int], ...]:
    """Return other heads than those of a case, as many, each in the layer after its own."""
    every, layers = decoder.heads(), sorted(dict(decoder.heads()))
    after = dict(zip(layers, [*layers[1:], layers[0]], strict=True))
    moved = [(after.get(layer, layers[-1]), (head + 1) % decoder.num_heads) for layer, head in case.heads]
    return tuple(pair if pair in every else every[-1] for pair in moved)
