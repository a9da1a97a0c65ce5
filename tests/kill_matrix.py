"""The kill matrix, every check against every mutant: `python -m tests.kill_matrix` writes docs/mutants.md."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ablation import provenance
from ablation.checks import CHECKS
from tests.mutants import GROUPS, MUTANTS, OUTSIDE_PROTOCOL, Mutant
from tests.mutants.trial import few_examples, try_check

PAGE = Path(__file__).parent.parent / "docs" / "mutants.md"
EXAMPLES = 4
KILLED, CRASHED, SURVIVED, NOT_TRIED = "x", "!", "", "-"

Matrix = Mapping[type[Mutant], Mapping[str, str]]
"""mutant -> check id -> KILLED, CRASHED, SURVIVED or NOT_TRIED."""


def measured() -> dict[type[Mutant], dict[str, str]]:
    """Try every check on every mutant, in one process per processor."""
    matrix: dict[type[Mutant], dict[str, str]] = {}
    with ProcessPoolExecutor() as pool:
        for mutant, marks in zip(MUTANTS, pool.map(_marks, MUTANTS), strict=True):
            matrix[mutant] = marks
            print(f"{len(matrix)} of {len(MUTANTS)}: {mutant.__name__}", file=sys.stderr)
    return matrix


def _marks(mutant: type[Mutant]) -> dict[str, str]:
    """Try every check on one mutant."""
    with few_examples(examples=EXAMPLES):
        return {check.id: _mark(try_check(check, mutant)) for check in CHECKS}


def _mark(trial: Any) -> str:
    if trial is None:
        return NOT_TRIED
    return SURVIVED if not trial.rejected else KILLED if trial.crash is None else CRASHED


def killers(marks: Mapping[str, str]) -> list[str]:
    """Return the checks that reject a mutant for a requirement; if there are none, those in which it crashes."""
    return [check for check, mark in marks.items() if mark == KILLED] or [
        check for check, mark in marks.items() if mark == CRASHED
    ]


def page(matrix: Matrix, made_with: Mapping[str, Any], date: str) -> str:
    """Return the page: the matrix and what follows from it, as Markdown."""
    return "\n".join([*_head(made_with, date), *_findings(matrix), *_matrix(matrix), *_outside_protocol()]) + "\n"


def _head(made_with: Mapping[str, Any], date: str) -> Iterator[str]:
    versions = ", ".join(f"{key} {value}" for key, value in made_with.items())
    yield "# Mutants: what the specification rejects"
    yield ""
    yield (
        f"{len(MUTANTS)} wrong implementations, each with one bug, and the checks that reject them. Made by "
        f"`python -m tests.kill_matrix` on {date}, with {EXAMPLES} examples for each check; {versions}. "
        "`pytest -m mutants` asserts that every mutant is rejected, and that correct implementations are accepted."
    )


def _findings(matrix: Matrix) -> Iterator[str]:
    alone = {mutant: killers(marks) for mutant, marks in matrix.items() if len(killers(marks)) == 1}
    none = [mutant for mutant, marks in matrix.items() if not killers(marks)]
    yield from ("", "## Thin places", "")
    yield "Mutants that a single check rejects. With more examples, other checks reject some of them, too."
    yield ""
    yield from (f"- {mutant.__name__}: `{check}`" for mutant, (check,) in alone.items())
    yield from (
        f"- {mutant.__name__}: `{mutant.expected_check}`, but only with more examples than here" for mutant in none
    )
    yield from ("", "## The checks", "", "What each check rejects, and what no other check rejects.", "")
    yield from ("| # | check | rejects | alone |", "|---|---|---|---|")
    for number, check in enumerate(CHECKS, start=1):
        rejects = sum(check.id in killers(marks) for marks in matrix.values())
        only = ", ".join(mutant.__name__ for mutant, (single,) in alone.items() if single == check.id)
        yield f"| {number} | `{check.id}` | {rejects} | {only} |"
    idle = [check.id for check in CHECKS if [check.id] not in alone.values()]
    yield from ("", "### Checks that no mutant needs", "")
    yield "Another check rejects every mutant that these reject. Why they are kept:"
    yield ""
    yield from (f"- `{check}`: {WHY_KEPT.get(check, 'its message is clearer')}." for check in idle)


WHY_KEPT = {
    "smoke": "it comes first, and distinguishes a bad adapter from a bad implementation",
    "identity": "the only one about ablating nothing in bfloat16",
    "identity.padded": "the only one that compares a clean padded batch with the bare model",
    "locality": "the clearest message for the most frequent bugs; it needs only one row and one head",
    "locality.padded": "the only one that looks at the mean itself; `independence.padding` sees only the logits",
    "locality.sets": "for implementations without padding, the only one that looks at sets in a batch",
    "independence.other_models": "the only one that ablates two models at once",
    "independence.rows": "for implementations without padding",
    "independence.padding": "for implementations whose projections cannot be observed",
    "independence.cache_padded": "the only one that decodes after padding",
    "independence.later_tokens": "no other reason: the oracles see the same, so it could go",
    "oracle.zero": "for implementations whose projections cannot be observed, and that ablate one head at a time",
    "oracle.zero_sets": "for implementations whose projections cannot be observed",
    "oracle.mean": "for implementations whose projections cannot be observed, and that ablate one head at a time",
    "oracle.mean_sets": "the only one that looks at means above another ablated head",
    "oracle.numpy": "the only one that shares no code with transformers, nor asks where the heads are",
    "oracle.unread_head": "exact to the last bit, where the oracles allow for rounding",
    "oracle.permuted_heads": "it does not need to know what z is; but `oracle.numpy` is stricter, so it could go",
    "independence.earlier_runs": "the only one that runs several prompts and sets on one implementation",
    "independence.earlier_masks": "the only one that runs with a mask, then with another, and then without",
    "hygiene.global_state": "the only one that looks beyond the model",
    "refusal.no_side_effect": "the only one that continues after a refusal",
    "refusal.type": "separate from `refusal.head`, since implementations differ in it",
    "hygiene.lifecycle": "orders of steps that no one has thought of",
}


def _matrix(matrix: Matrix) -> Iterator[str]:
    yield from ("", "## The matrix", "")
    yield (
        "Columns are the checks by their numbers above. x: rejected for the requirement; !: rejected since an error "
        "was raised; -: not tried, since the mutant does not support what the check needs."
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


def _outside_protocol() -> Iterator[str]:
    yield from ("", "## Outside the protocol", "")
    yield from ("Bugs that no adapter can show, and the test that fails for each.", "")
    yield from ("| bug | cause | source | test |", "|---|---|---|---|")
    for bug in OUTSIDE_PROTOCOL:
        yield f"| {bug.name} | {bug.cause} | {bug.source} | `{bug.test}` |"


if __name__ == "__main__":
    text = page(measured(), provenance.environment(), datetime.datetime.now(tz=datetime.UTC).date().isoformat())
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}")
