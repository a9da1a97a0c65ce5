"""The files about a run for a CI service: they are right, and no text of an adapter breaks them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablation.checks import CHECKS, Record
from ablation.checks.exports import badge, escaped, markdown
from tests.test_plugin import run_plugin, run_pytest, user_folder  # noqa: F401 (fixtures)

FAILURE = (
    "Mine breaks locality.sets (MUST): Several heads are replaced.\n"
    "{cause}"
    "  found: the z of head 1 is unchanged\n"
    "  in: gpt2, layer 1 head 0\n"
)
ODD = (
    "a | b `c` <b>d</b> <!-- [e](http://f) ![g](h) *i* __j__ ~~k~~ $l$ &lt; "
    "\\| \\\nm\r\n# n\u2028o\x00\ud800\u202e &#124;"
)
MARKS = re.compile(r"[\\`*\[\]<>|~$\n\r\u2028\x00\ud800\u202e]|&(?!#\d+;)")
"""What the text of a cell must not hold as it is."""


def rows(text: str) -> list[list[str]]:
    """The cells of a table in Markdown, without its head."""
    lines = [line for line in text.split("\n") if line.startswith("|")]
    assert lines[:2] == ["| outcome | requirement | reason |", "|---|---|---|"]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_summary_has_a_row_for_each_outcome() -> None:
    records = [
        Record("smoke", "passed"),
        Record("identity", "passed"),
        Record("locality", "failed", FAILURE.format(cause="")),
        Record("locality.sets", "failed", FAILURE.format(cause="  likely cause: the edit is downstream\n")),
        Record("oracle.mean", "skipped", "does not support 'mean': not yet"),
        Record("oracle.mean_sets", "skipped", "does not support 'mean': not yet"),
        Record("hygiene.exception", "expected failure", "issue 7"),
        Record("hygiene.restored", "unexpected pass", "issue 8"),
    ]
    text = markdown("my_adapter:Mine", records, 64, ["if you declare ..."], ["every head", "  L1H3 by 2"])
    assert text.startswith(
        "\n### Head ablation by my_adapter:Mine\n\n**3 of 8 requirements hold; 56 were not run**\n\n"
    )
    assert "\nif you declare ...\n\n|" in text
    assert text.endswith("|\n\n- every head\n  - L1H3 by 2\n")
    requirement = {check.id: check.requirement for check in CHECKS}
    assert [[html.unescape(cell) for cell in row] for row in rows(text)] == [
        ["broken", f"`locality`: {requirement['locality']}", "found: the z of head 1 is unchanged"],
        ["broken", f"`locality.sets`: {requirement['locality.sets']}", "likely cause: the edit is downstream"],
        ["known to be broken", "`hygiene.exception`", "issue 7"],
        ["no longer broken, so remove it from the expected failures", "`hygiene.restored`", "issue 8"],
        ["not tried", "`oracle.mean`, `oracle.mean_sets`", "does not support 'mean': not yet"],
        ["holds", "`smoke`, `identity`", ""],
    ]


@pytest.mark.parametrize("outcome", ["failed", "skipped", "expected failure", "unexpected pass"])
def test_odd_text_does_not_break_the_table(outcome: str) -> None:
    text = markdown(ODD, [Record("smoke", outcome, ODD)], 1, [ODD], [ODD])  # type: ignore[arg-type]
    ((_, _, reason),) = rows(text)
    heading, cause, finding = (line for line in text.split("\n") if "http" in line and not line.startswith("|"))
    assert finding.startswith("- ") and heading.startswith("### ")
    shown = reason, heading.removeprefix("### "), cause, finding.removeprefix("- ")
    assert not any(MARKS.search(part) for part in shown)
    assert html.unescape(cause).startswith("a | b `c` <b>d</b> <!-- [e](http://f)")
    text.encode("utf-8")


@given(st.text())
def test_escaped_text_is_one_line_that_shows_the_text(text: str) -> None:
    line = escaped(text)
    assert not MARKS.search(line) and line.isprintable()
    if len(text) < 500 and all(letter.isprintable() or letter.isspace() for letter in text):
        assert html.unescape(line).split() == text.split()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("my_hook.c_proj", "my_hook.c_proj"),
        ("__init__ a._b_", "&#95;&#95;init&#95;&#95; a.&#95;b&#95;"),
        ("_", "&#95;"),
        ("", ""),
        ("a\n\n  b", "a b"),
    ],
)
def test_underscores_are_escaped_outside_words(text: str, line: str) -> None:
    assert escaped(text) == line


def test_long_reason_is_shortened() -> None:
    ((_, _, reason),) = rows(markdown("m:M", [Record("smoke", "skipped", "word " * 10_000)], 1))
    assert len(reason) < 600


PASSED, FAILED, SKIPPED = Record("smoke", "passed"), Record("smoke", "failed", "x"), Record("smoke", "skipped", "x")
KNOWN, FIXED = Record("smoke", "expected failure", "x"), Record("smoke", "unexpected pass", "x")


@pytest.mark.parametrize(
    ("records", "total", "run_fails", "message", "color"),
    [
        ([PASSED, PASSED], 2, False, "2 of 2", "brightgreen"),
        ([PASSED, SKIPPED], 2, False, "1 of 2", "brightgreen"),
        ([PASSED, FAILED], 2, True, "1 of 2", "red"),
        ([PASSED, FIXED], 2, True, "2 of 2", "red"),
        ([PASSED, PASSED], 2, True, "2 of 2", "red"),  # an error outside the checks
        ([SKIPPED], 1, True, "0 of 1", "red"),
        ([SKIPPED], 1, False, "0 of 1", "yellow"),
        ([PASSED, KNOWN], 2, False, "1 of 2", "yellow"),
        ([PASSED], 64, False, "1 of 64", "yellow"),
    ],
)
def test_badge_is_green_only_if_nothing_fails(
    records: list[Record], total: int, run_fails: bool, message: str, color: str
) -> None:
    expected = {"schemaVersion": 1, "label": "head ablation", "message": message, "color": color}
    assert badge(records, total, run_fails=run_fails) == expected


# ---- as options

Run = Callable[..., pytest.RunResult]
FILES = ("--ablation-summary", "out/summary.md", "--ablation-badge", "out/badge.json")


@pytest.fixture
def out(user_folder: Path) -> Path:  # noqa: F811
    """The folder that the options name."""
    (user_folder / "out").mkdir()
    return user_folder / "out"


def test_options_write_files_also_if_checks_fail(out: Path, run_plugin: Run) -> None:  # noqa: F811
    (out / "summary.md").write_text("# Other steps")
    done = run_plugin("my_hook:KnockOut", "-k", "smoke or hygiene.exception", *FILES)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# Other steps\n### Head ablation by my_hook:KnockOut\n")
    assert [(row[0], row[1].partition(":")[0]) for row in rows(summary)] == [
        ("broken", "`hygiene.exception`"),
        ("holds", "`smoke`"),
    ]
    written = json.loads((out / "badge.json").read_text())
    assert written == {"schemaVersion": 1, "label": "head ablation", "message": "1 of 64", "color": "red"}


@pytest.mark.parametrize(
    "arguments", [("my_hook:Nowhere",), ("my_hook:KnockOut", "-k", "nonsense"), ("my_hook:KnockOut", "--collect-only")]
)
def test_nothing_is_written_if_nothing_ran(arguments: tuple[str, ...], out: Path, run_plugin: Run) -> None:  # noqa: F811
    (out / "summary.md").write_text("# Other steps")
    run_plugin(*arguments, *FILES)
    assert [path.name for path in out.iterdir()] == ["summary.md"]
    assert (out / "summary.md").read_text() == "# Other steps"


@pytest.mark.parametrize("option", ["summary", "badge"])
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("nowhere/x", "No such file or directory"),
        ("out", "Is a directory"),
        ("my_hook.py/x", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("", "Is a directory"),
    ],
)
def test_file_that_cannot_be_written_is_one_line(
    option: str,
    file: str,
    reason: str,
    out: Path,
    run_plugin: Run,  # noqa: F811
) -> None:
    done = run_plugin("my_hook:KnockOut", "-k", "smoke", f"--ablation-{option}", file)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert f"{option} {file}: {reason}" in done.stderr.str() and len(done.stderr.str().splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_file_that_fails_at_the_end_fails_the_run(run_plugin: Run) -> None:  # noqa: F811
    done = run_plugin("my_hook:KnockOut", "-k", "smoke", "--ablation-badge", "/dev/full")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert "badge /dev/full: No space left on device" in done.stdout.str()
