"""The kill matrix, every check against every mutant: `python -m tests.kill_matrix` writes docs/mutants.md.

With `--missing`, only mutants and checks that the page lacks are tried, and the page says so.
"""

from __future__ import annotations

import datetime
import re
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


def measured(known: Mapping[str, Mapping[str, str]]) -> dict[type[Mutant], dict[str, str]]:
    """Try every check on every mutant, in one process per processor. known: marks that are not measured again."""
    matrix: dict[type[Mutant], dict[str, str]] = {}
    with ProcessPoolExecutor() as pool:
        found = pool.map(_marks, MUTANTS, [known.get(mutant.__name__, {}) for mutant in MUTANTS])
        for mutant, marks in zip(MUTANTS, found, strict=True):
            matrix[mutant] = marks
            print(f"{len(matrix)} of {len(MUTANTS)}: {mutant.__name__}", file=sys.stderr)
    return matrix


def _marks(mutant: type[Mutant], known: Mapping[str, str]) -> dict[str, str]:
    """Try every check on one mutant."""
    with few_examples(examples=EXAMPLES):
        return {check.id: known[check.id] if check.id in known else _mark(try_check(check, mutant)) for check in CHECKS}


def on_page(text: str) -> dict[str, dict[str, str]]:
    """Return the marks of a page, {mutant: {check id: mark}}."""
    checks = re.findall(r"^\| \d+ \| `(.+?)` \|", text, re.MULTILINE)
    matrix, _, _ = text.partition("\n## The matrix")[2].partition("\n## Outside the protocol")
    rows = [row.removesuffix("|").split("|")[1:] for row in re.findall(r"^\| [A-Z].*$", matrix, re.MULTILINE)]
    return {row[0].strip(): dict(zip(checks, map(str.strip, row[-len(checks) :]), strict=True)) for row in rows}


def _mark(trial: Any) -> str:
    if trial is None:
        return NOT_TRIED
    return SURVIVED if not trial.rejected else KILLED if trial.crash is None else CRASHED


def killers(marks: Mapping[str, str]) -> list[str]:
    """Return the checks that reject a mutant for a requirement; if there are none, those in which it crashes."""
    return [check for check, mark in marks.items() if mark == KILLED] or [
        check for check, mark in marks.items() if mark == CRASHED
    ]


def page(matrix: Matrix, made: str) -> str:
    """Return the page: the matrix and what follows from it, as Markdown. made: when and with what."""
    return "\n".join([*_head(made), *_findings(matrix), *_matrix(matrix), *_outside_protocol()]) + "\n"


def _head(made: str) -> Iterator[str]:
    yield "# Mutants: what the specification rejects"
    yield ""
    yield (
        f"{len(MUTANTS)} wrong implementations, each with one bug, and the checks that reject them. Made by "
        f"`python -m tests.kill_matrix` with {EXAMPLES} examples for each check, {made}. "
        "`pytest -m mutants` asserts that every mutant is rejected, and that correct implementations are accepted."
    )


def _findings(matrix: Matrix) -> Iterator[str]:
    alone = {mutant: killers(marks) for mutant, marks in matrix.items() if len(killers(marks)) == 1}
    none = [mutant for mutant, marks in matrix.items() if not killers(marks)]
    yield from ("", "## Thin places", "")
    yield "These mutants are rejected by one check only. With more examples, other checks reject some of them, too."
    yield ""
    yield from (f"- {mutant.__name__}: `{check}`" for mutant, (check,) in alone.items())
    yield from (
        f"- {mutant.__name__}: `{mutant.expected_check}`, but only with more examples than here" for mutant in none
    )
    yield from (
        "",
        "## The checks",
        "",
        "For each check: the number of mutants that it rejects, and the mutants that it alone rejects.",
        "",
    )
    yield from ("| # | check | rejects | alone |", "|---|---|---|---|")
    for number, check in enumerate(CHECKS, start=1):
        rejects = sum(check.id in killers(marks) for marks in matrix.values())
        only = ", ".join(mutant.__name__ for mutant, (single,) in alone.items() if single == check.id)
        yield f"| {number} | `{check.id}` | {rejects} | {only} |"
    idle = [check.id for check in CHECKS if [check.id] not in alone.values()]
    yield from ("", "### Checks that no mutant needs", "")
    yield "Every mutant that one of these checks rejects is also rejected by another check. The reasons to keep them:"
    yield ""
    yield from (f"- `{check}`: {WHY_KEPT.get(check, 'its message is clearer')}." for check in idle)


WHY_KEPT = {
    "smoke": "it runs first, and tells a bad adapter from a bad implementation",
    "identity": "the only check of an implementation without ablated heads in bfloat16",
    "identity.padded": "the only check that compares a clean padded batch with the bare model",
    "locality": "it gives the clearest message for the most frequent bugs, and needs only one row and one head",
    "locality.padded": "the only check of the mean itself; `independence.padding` sees only the logits",
    "locality.sets": "for implementations that do not support padding, the only check of several heads in a batch",
    "independence.other_models": "the only check that ablates two models at once",
    "independence.rows": "it is for implementations that do not support padding",
    "independence.padding": "it is for implementations whose projections cannot be observed",
    "independence.cache_padded": "the only check that decodes after padding",
    "independence.later_tokens": "no reason is left: the oracles detect the same bugs, so it could be deleted",
    "oracle.zero": "it is for implementations that ablate one head at a time and whose projections cannot be observed",
    "oracle.zero_sets": "it is for implementations whose projections cannot be observed",
    "oracle.mean": "it is for implementations that ablate one head at a time and whose projections cannot be observed",
    "oracle.mean_sets": "the only check of means of heads that are above another ablated head",
    "oracle.numpy": "the only check that shares no code with transformers and does not use `find_heads`",
    "oracle.unread_head": "it compares bit for bit, while the oracles allow for rounding",
    "oracle.permuted_heads": "it needs no definition of z; but `oracle.numpy` is stricter, so it could be deleted",
    "independence.earlier_runs": "the only check that runs several prompts and sets of heads on one implementation",
    "independence.earlier_masks": "the only check that runs with one mask, with another, and then without a mask",
    "hygiene.global_state": "the only check of anything outside the model",
    "refusal.no_side_effect": "the only check that continues after a refusal",
    "refusal.type": "it is separate from `refusal.head`, since implementations differ in it",
    "hygiene.lifecycle": "it tries orders of steps that no other check tries",
}


def _matrix(matrix: Matrix) -> Iterator[str]:
    yield from ("", "## The matrix", "")
    yield (
        "The numbered columns are the checks in the table above. x: the mutant breaks the requirement; !: the check "
        "fails because the mutant raises an error; -: the check is skipped, since the mutant does not support what it "
        "needs; empty: the mutant passes the check."
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


def main() -> None:
    """Write the page."""
    versions = ", ".join(f"{key} {value}" for key, value in provenance.environment().items())
    made = f"on {datetime.datetime.now(tz=datetime.UTC).date().isoformat()} with {versions}"
    known: dict[str, dict[str, str]] = {}
    if sys.argv[1:] == ["--missing"]:
        before = PAGE.read_text(encoding="utf-8")
        (earlier,) = re.findall(r"examples for each check, (.*?)\. `pytest", before)
        made, known = f"{earlier}; mutants and checks that were new, {made}", on_page(before)
    text = page(measured(known), made)
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
