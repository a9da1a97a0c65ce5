"""The README and the documentation show what the programs really print, and every command of the README is run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ablation.capitals.data import CAPITALS
from ablation.cli import main
from ablation.errors import ModelUnavailable
from ablation.sources import NAMED_MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = re.findall(
    r"^\$ (.+)\n((?:[^$`\n].*\n|\n)*)", "\n".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL)), re.M
)
"""Each command of the README, and the output that it shows."""

INSTALLATIONS = [command for command, _ in SHOWN if command.startswith("pip install torch==")]
COMMANDS = {command: output for command, output in SHOWN if command not in INSTALLATIONS}


def test_readme_has_one_page() -> None:
    assert len(README.splitlines()) <= 155


def test_every_command_of_the_readme_is_run() -> None:
    """CI runs the two installations in new environments, where the tests below run the other commands."""
    assert len(INSTALLATIONS) == 2 and INSTALLATIONS[1].endswith(" && pytest")
    assert r"sed -n 's/^\$ \(pip install torch==.*\)/\1/p' README.md" in (ROOT / "scripts" / "ci").read_text()
    assert [shlex.split(command)[:2] for command in COMMANDS] == [["ablation", "sweep"], ["ablation", "check"]]


@pytest.mark.end_to_end
def test_shown_sweep_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        NAMED_MODELS["smollm2"].locate()
    except ModelUnavailable as error:
        pytest.skip(str(error))
    (command,) = (command for command in COMMANDS if " sweep " in command)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    printed, _, _ = capsys.readouterr().out.rpartition("\nArrays")
    assert printed.strip() == COMMANDS[command].strip()


@pytest.mark.end_to_end
@pytest.mark.parametrize(("page", "commands"), [("studies", 6), ("generation", 3), ("sets", 7)])
def test_shown_commands_print_what_is_shown(
    page: str, commands: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of a page, in one folder; a line of three dots stands for lines that are not shown."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL))
    shown = re.findall(r"^\$ (.+)\n((?:[^$\n].*\n|\n)*)", blocks, re.M)
    assert len(shown) == commands
    try:
        NAMED_MODELS["smollm2"].locate()
    except ModelUnavailable as error:
        if any("--model smollm2" in command for command, _ in shown):
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "berlin.txt").write_text(" ".join(f"{city} is the capital of {land}." for city, land in CAPITALS))
    for file in re.findall(r"```\n(city readers: .*?)```", text, re.DOTALL):
        (tmp_path / "circuits.txt").write_text(file)
    for command, output in shown:
        assert main(shlex.split(command)[1:]) == 0, command
        printed, _, _ = capsys.readouterr().out.partition("\nArrays, table")
        pattern = ".*".join(re.escape(part.strip()) for part in re.split(r"^\.\.\.$", output, flags=re.M))
        assert re.fullmatch(pattern, printed.strip(), re.DOTALL), f"{command} prints\n{printed}"


@pytest.mark.end_to_end
def test_shown_check_is_what_is_printed(tmp_path: Path) -> None:
    (command,) = (command for command in COMMANDS if " check " in command)
    (hook,) = re.findall(r"```python\n(# my_hook.py\n.*?)```", README, re.DOTALL)
    (tmp_path / "my_hook.py").write_text(hook)
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stderr
    *printed, last = done.stdout.splitlines()  # the last line says how long it took
    assert printed == COMMANDS[command].splitlines() and last.startswith("1 failed, 1 passed")


@pytest.mark.parametrize(
    ("page", "examples"),
    [
        ("README.md", 1),
        ("docs/python.md", 8),
        ("docs/imputations.md", 2),
        ("docs/generation.md", 1),
        ("docs/sets.md", 3),
    ],
)
def test_shown_python_prints_what_is_shown(page: str, examples: int) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(r"```python\n([^`]*?)```\s*```\n(.*?)```", text, re.DOTALL)
    assert len(shown) == examples
    names: dict[str, object] = {}
    for code, output in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)  # noqa: S102 (our own documentation)
        assert printed.getvalue() == output


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_to_existing_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
