"""The table of implementations: complete, and made by its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ablation.checks.libraries
from ablation.checks import CHECKS
from tests.implementations import __main__ as command

LIBRARIES = Path(ablation.checks.libraries.__file__).parent
NOT_IN_THE_TABLE = {"hooked_transformer", "baukit"}
"""One needs older versions than the others, one is on no package index."""


def modules(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.py")} - {"__init__", "__main__", "shared"}


def test_page_has_every_check_and_implementation() -> None:
    (block,) = command.BLOCK.findall(command.PAGE.read_text(encoding="utf-8"))
    header, _, *rows = [line.strip("| ").split(" | ") for line in block.splitlines() if line.startswith("|")]
    assert header[1:] == list(command.NAMES)
    assert set(command.OWN) == modules(Path(command.__file__).parent)
    assert set(command.NAMES) == set(command.OWN) | modules(LIBRARIES) - NOT_IN_THE_TABLE
    assert [row[0].removesuffix(" (should)") for row in rows] == [check.id for check in CHECKS]
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    assert {cell for name in command.NAMES for cell in columns[name]} <= set(command.CELLS.values())
    assert set(columns["ours"]) == {"pass"}
    assert "**fail**" not in columns["surgery"]


def test_unsupported_features_have_reasons() -> None:
    for name in command.OWN:
        assert all(reason for reason in command.adapter(name).unsupported.values())


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page to write to, and invented outcomes: the second check is skipped, the third fails."""
    file = tmp_path / "implementations.md"
    file.write_text("before\n<!-- implementations -->\nold\n<!-- /implementations -->\nafter\n")
    records = {check.id: ["passed", ""] for check in CHECKS}
    records[CHECKS[1].id] = ["skipped", "does not support 'x': never tried"]
    records[CHECKS[2].id] = ["failed", "It breaks it\n  found: too much\n  in: gpt2"]
    result: dict[str, Any] = {"unsupported": {"x": "never tried"}, "records": records}
    monkeypatch.setattr(command, "PAGE", file)
    monkeypatch.setattr(command, "LIBRARIES", {"torch"})
    monkeypatch.setattr(command, "run_in_process", lambda name: result)
    return file


def test_command_writes_the_table_and_detects_an_old_one(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["implementations", "--check"])
    with pytest.raises(SystemExit, match="implementations.md shows other outcomes"):
        command.main()
    monkeypatch.setattr("sys.argv", ["implementations", "--write"])
    command.main()
    written = page.read_text()
    assert written.startswith("before\n<!-- implementations -->\n| check | ours |")
    assert written.endswith(".\n<!-- /implementations -->\nafter\n") and "old" not in written
    assert f"| {CHECKS[1].id} | - | -" in written and f"| {CHECKS[2].id} | **fail** |" in written
    printed = capsys.readouterr().out
    assert f"- ours fails `{CHECKS[2].id}`: too much\n- ours does not support `x`: never tried\n" in printed
    monkeypatch.setattr("sys.argv", ["implementations", "--check"])
    command.main()
