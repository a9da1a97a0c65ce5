"""The kill matrix, every check against every mutant: `python -m tests.kill_matrix` writes tests/mutants.md."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ablation import provenance
from ablation.checks import CHECKS
from tests.mutants import ELSEWHERE, GROUPS, MUTANTS, Mutant
from tests.mutants.trial import few_examples, tried

PAGE = Path(__file__).parent / "mutants.md"
EXAMPLES = 4
KILLED, CRASHED, SURVIVED, NOT_TRIED = "x", "!", "", "-"

Matrix = Mapping[type[Mutant], Mapping[str, str]]
"""mutant -> check id -> KILLED, CRASHED, SURVIVED or NOT_TRIED."""


def measured() -> dict[type[Mutant], dict[str, str]]:
    """Try every check on every mutant."""
    matrix: dict[type[Mutant], dict[str, str]] = {}
    with few_examples(examples=EXAMPLES):
        for mutant in MUTANTS:
            print(f"{len(matrix) + 1} of {len(MUTANTS)}: {mutant.__name__}", file=sys.stderr)
            matrix[mutant] = {check.id: _mark(tried(check, mutant)) for check in CHECKS}
    return matrix


def _mark(trial: Any) -> str:
    if trial is None:
        return NOT_TRIED
    return SURVIVED if not trial.rejected else KILLED if trial.crash is None else CRASHED


def killers(marks: Mapping[str, str]) -> list[str]:
    """The checks that reject a mutant for a requirement, or, where its bug is a crash, at all."""
    return [check for check, mark in marks.items() if mark == KILLED] or [
        check for check, mark in marks.items() if mark == CRASHED
    ]


def page(matrix: Matrix, made_with: Mapping[str, Any], date: str) -> str:
    """The matrix and what follows from it, as Markdown."""
    return "\n".join([*_head(made_with, date), *_findings(matrix), *_matrix(matrix), *_elsewhere()]) + "\n"


def _head(made_with: Mapping[str, Any], date: str) -> Iterator[str]:
    versions = ", ".join(f"{key} {value}" for key, value in made_with.items())
    yield "# Mutants: what the specification rejects"
    yield ""
    yield (
        f"{len(MUTANTS)} wrong implementations, each with one bug, and the checks that reject them. Made by "
        f"`python -m tests.kill_matrix` on {date}, with {EXAMPLES} examples a check; {versions}. "
        "`pytest -m mutants` asserts that every mutant dies, and that no right implementation is rejected."
    )


def _findings(matrix: Matrix) -> Iterator[str]:
    alone = {mutant: killers(marks) for mutant, marks in matrix.items() if len(killers(marks)) == 1}
    none = [mutant for mutant, marks in matrix.items() if not killers(marks)]
    yield from ("", "## Thin places", "")
    yield "Mutants that a single check rejects, some by chance: with more examples, other checks meet them, too."
    yield ""
    yield from (f"- {mutant.__name__}: `{check}`" for mutant, (check,) in alone.items())
    yield from (f"- {mutant.__name__}: `{mutant.killer}`, but only with more examples than here" for mutant in none)
    yield from ("", "## The checks", "", "What each rejects, and what no other does.", "")
    yield from ("| # | check | rejects | alone |", "|---|---|---|---|")
    for number, check in enumerate(CHECKS, start=1):
        rejects = sum(check.id in killers(marks) for marks in matrix.values())
        only = ", ".join(mutant.__name__ for mutant, (single,) in alone.items() if single == check.id)
        yield f"| {number} | `{check.id}` | {rejects} | {only} |"
    idle = [check.id for check in CHECKS if [check.id] not in alone.values()]
    yield from ("", "### Checks that reject nothing alone", "")
    yield "Every mutant that they reject is rejected by another check, too: candidates to remove, and what is for each."
    yield ""
    yield from (f"- `{check}`: {FOR_IT.get(check, 'it says more plainly what is wrong')}." for check in idle)


FOR_IT = {
    "smoke": "it comes first, and tells a bad adapter from a bad implementation",
    "identity": "the only one that is about doing nothing, in bfloat16 as well",
    "identity.padded": "the only one to compare a clean padded batch with the bare model",
    "locality": "the plainest words for the commonest bugs; it asks for a single row and a single head only",
    "locality.padded": "the only one to look at what a row's mean is made of; `independence.padding` sees it in the logits",
    "locality.sets": "for those that claim no padding, the only one to look at sets in a batch",
    "independence.other_models": "the only one to ablate two models at once",
    "independence.rows": "for those that claim no padding",
    "independence.padding": "for those whose projections cannot be observed",
    "independence.cache_padded": "the only one to decode behind padding",
    "independence.later_tokens": "nothing: what it sees the oracles see. It could go",
    "oracle.zero": "for those whose projections cannot be observed, and that claim no sets",
    "oracle.zero_sets": "for those whose projections cannot be observed",
    "oracle.mean": "for those whose projections cannot be observed, and that claim no sets",
    "oracle.mean_sets": "the only one to look at means above another ablated head",
    "oracle.numpy": "the only one that shares no code with transformers, and does not ask where heads are",
    "oracle.unread_head": "to the last bit, where the oracles allow for rounding",
    "oracle.permuted_heads": "it needs no account of what z is, but `oracle.numpy` asks for more. It could go",
    "independence.earlier_runs": "the only one to run several prompts and sets on one implementation",
    "independence.earlier_masks": "the only one to run with a mask, then with another, and then without",
    "hygiene.global_state": "the only one to look beyond the model",
    "refusal.no_side_effect": "the only one to go on after a refusal",
    "refusal.type": "separate from `refusal.head`, since implementations differ in it",
    "hygiene.lifecycle": "orders of steps that nobody has thought of",
}


def _matrix(matrix: Matrix) -> Iterator[str]:
    yield from ("", "## The matrix", "")
    yield (
        "Columns are the checks by their numbers above. x: rejected for the requirement; !: rejected because something "
        "was raised; -: not tried, since the mutant does not claim what the check needs."
    )
    for group in GROUPS:
        title, _, about = (group.__doc__ or "").strip().partition(": ")
        yield from ("", f"### {title}", "", about[0].upper() + about[1:], "")
        yield "| mutant | cause | source | " + " | ".join(str(i) for i, _ in enumerate(CHECKS, start=1)) + " |"
        yield "|---|---|---|" + "---|" * len(CHECKS)
        for mutant, marks in matrix.items():
            if mutant.__module__ == group.__name__:
                cause = (mutant.__doc__ or "").splitlines()[0]
                yield f"| {mutant.__name__} | {cause} | {mutant.source} | {' | '.join(marks.values())} |"


def _elsewhere() -> Iterator[str]:
    yield from ("", "## Elsewhere", "", "Bugs outside of the protocol, and the test that fails for each.", "")
    yield from ("| bug | cause | source | test |", "|---|---|---|---|")
    for bug in ELSEWHERE:
        yield f"| {bug.name} | {bug.cause} | {bug.source} | `{bug.test}` |"


if __name__ == "__main__":
    text = page(measured(), provenance.environment(), datetime.datetime.now(tz=datetime.UTC).date().isoformat())
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}")
