"""The page of findings: its fields, its requirements, and the block that the command writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ablation.checks import CHECKS
from tests import findings
from tests.implementations import __main__ as implementations

PAGE = findings.PAGE.read_text(encoding="utf-8")
ENTRIES: dict[str, str] = dict(re.findall(r"^### (.*)\n((?:(?!#).*\n)*)", PAGE, re.M))
FIELDS = ["Commit", "Requirements", "Fact", "Verified", "Affected", "Later"]
IDS = {check.id for check in CHECKS}


def field(body: str, name: str) -> str:
    """Return the text of a field, on one line."""
    (found,) = re.findall(rf"- \*\*{name}:\*\* ((?:.+\n)(?:  .+\n)*)", body)
    return " ".join(found.split())


def test_page_has_entries_with_all_fields() -> None:
    assert len(ENTRIES) >= 8 and all(re.fullmatch(r"[\w.-]+/[\w.-]+", title) for title in ENTRIES)
    for body in ENTRIES.values():
        assert re.findall(r"^- \*\*(\w+):\*\*", body, re.M) == FIELDS
        assert re.fullmatch(r"`[0-9a-f]{40}` of \d{4}-\d\d-\d\d, `[\w./-]+`(, .*)?", field(body, "Commit"))
        assert all(len(field(body, name).split()) > 3 for name in ("Fact", "Verified", "Affected", "Later"))


def test_named_requirements_exist() -> None:
    for title, body in ENTRIES.items():
        listed = field(body, "Requirements")
        named = re.findall(r"`([\w.]+)`", listed)
        assert named and listed == ", ".join(f"`{name}`" for name in named), title
        assert set(named) <= IDS and len(named) == len(set(named)), title
    (block,) = findings.BLOCK.findall(PAGE)
    failed = re.findall(r"^- (\w+) fails `([\w.]+)`: .", block, re.M)
    assert {name for name, _ in failed} <= set(findings.PACKAGES) and {check for _, check in failed} <= IDS


def test_block_has_the_outcomes_of_the_implementations() -> None:
    (block,) = findings.BLOCK.findall(PAGE)
    failed = set(re.findall(r"^- (\w+) fails `([\w.]+)`: .", block, re.M))
    (table,) = implementations.BLOCK.findall(implementations.PAGE.read_text(encoding="utf-8"))
    header, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert failed == {
        (name, row[0].removesuffix(" (should)"))
        for row in rows
        for name, cell in zip(header[1:], row[1:], strict=True)
        if cell == "**fail**" and name in findings.PACKAGES
    }
    assert re.search(r"^Run on \d{4}-\d\d-\d\d with captum \d", block, re.M)


def test_command_replaces_the_block_of_libraries_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "findings.md"
    page.write_text("before\n<!-- libraries -->\nold\n<!-- /libraries -->\nafter\n")
    records = {"smoke": ["failed", "It breaks it\n  found: too much\n  in: gpt2"], "identity": ["passed", ""]}
    monkeypatch.setattr(findings, "PAGE", page)
    monkeypatch.setattr(findings, "PACKAGES", {"nnsight": "torch"})
    result: implementations.Result = {"unsupported": {"x": "no"}, "records": records}
    monkeypatch.setattr(implementations, "run_in_process", lambda name: result)
    findings.main()
    written = page.read_text()
    lines = "- nnsight fails `smoke`: too much\n- nnsight does not support `x`: no\n"
    assert written.startswith(f"before\n<!-- libraries -->\n{lines}")
    assert written.endswith(".\n<!-- /libraries -->\nafter\n") and "old" not in written and "with torch 2" in written
