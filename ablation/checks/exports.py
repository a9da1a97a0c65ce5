"""Files about a run for a CI service: a Markdown table for the summary of a job, and the data of a badge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ablation.checks.check import LIKELY_CAUSE
from ablation.checks.runner import CHECKS, NO_TIME, Record
from ablation.checks.summary import LABELS, held, how_many_hold
from ablation.errors import one_line

ENTITIES = str.maketrans({character: f"&#{ord(character)};" for character in "\\`*[]<>|~$&#"})
"""For each ASCII character that means something to Markdown or HTML within a line, a reference that shows it."""
EDGE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
"""An underscore that may begin or end emphasis, since it is not within a word."""
REQUIREMENTS = {check.id: check.requirement for check in CHECKS}


def markdown(
    name: str, records: Sequence[Record], total: int, cause: Iterable[str] = (), findings: Iterable[str] = ()
) -> str:
    """Return the summary of a run in Markdown: a heading, a table of requirements, and a list of findings.

    name: of the implementation. total: the number of checks that could be run. cause: as `shared_cause` returns it.
    findings: lines about the whole run; an indented line belongs to the line before it.
    """
    return "\n".join(
        (
            "",  # the file may end with an unfinished line
            f"### Head ablation by {escaped(name)}",
            "",
            f"**{how_many_hold(records, total)}**",
            *(f"\n{escaped(line)}" for line in cause),
            "",
            "| outcome | requirement | reason |",
            "|---|---|---|",
            *_rows(records),
            "",
            *(f"{'  ' if line.startswith(' ') else ''}- {escaped(line)}" for line in findings),
            "",
        )
    )


def _rows(records: Sequence[Record]) -> Iterator[str]:
    """Yield a row for each broken requirement, and one for all others with the same outcome and reason."""
    for outcome, label in {**LABELS, "passed": "holds"}.items():
        found = [record for record in records if record.outcome == outcome]
        if outcome == "failed":
            for record in found:
                yield f"| {label} | `{record.id}`: {escaped(REQUIREMENTS[record.id])} | {escaped(headline(record))} |"
            continue
        for reason in dict.fromkeys(record.reason for record in found):
            ids = ", ".join(f"`{record.id}`" for record in found if record.reason == reason)
            yield f"| {label} | {ids} | {escaped(reason)} |"


def headline(record: Record) -> str:
    """Return the line of a failure that helps most: the likely cause, or else the finding, or else its first line."""
    lines = record.reason.split("\n")
    for start in (LIKELY_CAUSE, "  found: "):
        if found := next((line for line in lines if line.startswith(start)), None):
            return found.strip()
    return lines[0]


def escaped(text: str) -> str:
    """Return any text as one line of Markdown that shows it literally, also in a table."""
    line = " ".join(one_line(text).split())
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return EDGE_UNDERSCORE.sub("&#95;", shown.translate(ENTITIES))


def badge(records: Sequence[Record], total: int, *, run_fails: bool) -> dict[str, Any]:
    """Return the data of an endpoint badge of shields.io (https://shields.io/badges/endpoint-badge).

    It is red if the run fails, yellow if a failure is known or not all checks were run, and green otherwise.
    """
    is_whole = len(records) == total and held(records) > 0
    is_whole &= not any(record.reason.startswith(NO_TIME) for record in records)
    has_known_failures = any(record.outcome == "expected failure" for record in records)
    return {
        "schemaVersion": 1,
        "label": "head ablation",
        "message": f"{held(records)} of {total}",
        "color": "red" if run_fails else "brightgreen" if is_whole and not has_known_failures else "yellow",
    }
