"""What was found for every head of a model, in lines of text: which heads are wrong, and what that does to results."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from ablation.checks.on_model.every_head import EveryHead, Outcome
from ablation.checks.on_model.own_model import NOISE_FACTOR, OwnModel
from ablation.units import pair_label

SHOWN = 3
"""Heads in a message of a failure."""
LISTED = 40
"""Heads and layers in the list of wrong heads."""
STRONGEST = 10


def findings(own: OwnModel, found: EveryHead) -> Iterator[str]:
    """Yield lines for each imputation: heads that are wrong, and conclusions with theirs and with the right numbers."""
    *most, last = [str(len(row)) for row in found.case.rows]
    left_out = own.left_out + len(own.rows) - found.prompts
    rows = f"{len(most) + 1} rows of {', '.join(most)} and {last} tokens" if most else f"one row of {last} tokens"
    yield (
        f"every head of {own.family}, one at a time, on {rows}; logits count as equal within {own.tolerance:.1e} "
        f"({NOISE_FACTOR:g} times the noise of the model)" + (f"; {left_out} prompts were left out" if left_out else "")
    )
    for name, outcomes in found.outcomes.items():
        if outcomes:
            yield from _of_imputation(own, found, name, outcomes)
    for name, layers in found.left_out.items():
        shown = ", ".join(f"L{layer}" for layer in layers)
        yield f"{name}: no time was left for {len(layers)} layers: {shown} (--minutes)"


def _of_imputation(own: OwnModel, found: EveryHead, name: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    if not found.has_logits(name):
        bad = [each for each in outcomes if each.z_problem or each.raised]
        right = f"the z of {len(outcomes) - len(bad)} of {len(outcomes)} heads is as required; logits are not compared"
        yield f"{name}: {right}" + (f"; wrong: {listed(bad, own)}" if bad else "")
        return
    wrong = found.wrong(name, own.tolerance)
    small = found.too_small(name, own.tolerance)
    line = f"{name}: {len(outcomes) - len(wrong)} of {len(outcomes)} heads have the right logits"
    if wrong:
        line += f"; wrong: {listed(wrong, own)}"
    if small:
        line += f"; {len(small)} heads have no effect above rounding, so their logits prove nothing"
    yield line
    ran = [each for each in wrong if not each.raised]
    if ran:
        yield f"  largest errors: {', '.join(map(_error, ran[:SHOWN]))}"
    for each in [each for each in wrong if each.raised][:1]:
        yield f"  {pair_label(each.pair)} raised {each.raised}"
    if wrong:
        yield from _conclusions(found, [each for each in outcomes if not each.raised])


def _conclusions(found: EveryHead, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield what a study would report with the implementation, and with right ablations."""
    if not outcomes:
        return
    prompts = range(found.prompts)
    kept = sum(each.kept[prompt] for each in outcomes for prompt in prompts)
    right_kept = sum(each.right_kept[prompt] for each in outcomes for prompt in prompts)
    yield f"  the answer is kept in {kept} of {len(outcomes) * len(prompts)} runs; right: {right_kept}"
    mine = _strongest(outcomes, [sum(each.change[prompt] for prompt in prompts) for each in outcomes])
    correct = _strongest(outcomes, [sum(each.right_change[prompt] for prompt in prompts) for each in outcomes])
    common = len(set(mine) & set(correct))
    yield f"  strongest heads (by the probability of the answer): {' '.join(mine)}"
    yield f"  right:                                              {' '.join(correct)}; {common} in common"


def _strongest(outcomes: Sequence[Outcome], changes: Sequence[float]) -> list[str]:
    """Return the names of the heads with the largest changes."""
    order = sorted(range(len(outcomes)), key=lambda place: -abs(changes[place]))
    return [pair_label(outcomes[place].pair) for place in order[:STRONGEST]]


COLUMNS = (
    "imputation",
    "layer",
    "head",
    "effect",
    "error",
    "kept",
    "right_kept",
    "change",
    "right_change",
    "z_problem",
    "raised",
)


def table(found: EveryHead | None) -> str:
    """Return a row for each head and imputation, as CSV; see `every_head.Outcome`.

    kept, right_kept: the share of the prompts. change, right_change: the mean over the prompts. Columns about logits
    are empty if these were not compared.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    if found is None:
        return text.getvalue()
    for name, outcomes in found.outcomes.items():
        for each in outcomes:
            means = [
                sum(values[: found.prompts]) / found.prompts
                for values in (each.kept, each.right_kept, each.change, each.right_change)
            ]
            numbers = [each.effect, each.error, *means] if found.has_logits(name) and not each.raised else [""] * 6
            writer.writerow([name, *each.pair, *numbers, each.z_problem or "", each.raised or ""])
    return text.getvalue()


def wrong_logits(tolerance: float, found: EveryHead, name: str) -> str | None:
    """Return what is wrong with the logits under an imputation, in one sentence, or None. tolerance: in logits."""
    wrong, outcomes = found.wrong(name, tolerance), found.outcomes.get(name, [])
    if not wrong:
        return None
    if wrong[0].raised:
        first = f"ablating {pair_label(wrong[0].pair)} raised {wrong[0].raised}"
        return f"{len(wrong)} of {len(outcomes)} heads are wrong: {first}"
    shown, rest = wrong[:SHOWN], len(wrong) - SHOWN
    return (
        f"{len(wrong)} of {len(outcomes)} heads are wrong: {', '.join(map(_error, shown))}"
        f"{f' and {rest} more' if rest > 0 else ''} (tolerance {tolerance:.1e})"
    )


def wrong_z(found: EveryHead, name: str) -> str | None:
    """Return what is wrong with the inputs of the projections under an imputation, in one sentence, or None.

    A head whose ablation raised an error is wrong, too.
    """
    outcomes = found.outcomes.get(name, [])
    wrong = sorted((each for each in outcomes if each.z_problem or each.raised), key=lambda each: not each.raised)
    if not wrong:
        return None
    first = wrong[0].z_problem or f"ablating {pair_label(wrong[0].pair)} raised {wrong[0].raised}"
    return f"{len(wrong)} of {len(outcomes)} heads are wrong: {first}"


def listed(outcomes: Iterable[Outcome], own: OwnModel) -> str:
    """Return heads in short form: L9 for all heads of a layer, L* for all heads of the model."""
    pairs, every = {each.pair for each in outcomes}, own.heads()
    if len(pairs) == len(every):
        return "L* (all)"
    names = []
    for layer in sorted(dict(every)):
        here = [pair for pair in every if pair[0] == layer]
        wrong = [pair for pair in here if pair in pairs]
        names += [f"L{layer}"] if len(wrong) == len(here) else list(map(pair_label, wrong))
    rest = len(names) - LISTED
    return " ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _error(outcome: Outcome) -> str:
    return f"{pair_label(outcome.pair)} by {outcome.error:.3g} logits (its effect is {outcome.effect:.3g})"
