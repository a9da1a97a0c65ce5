"""The hook for pre-commit, in a repository with an adapter: it runs in that project's environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ablation.cli import main
from tests.test_plugin import HOOK

ROOT = Path(__file__).parent.parent
(HOOKS,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))


def test_entry_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = HOOKS["entry"].split()
    assert program == "ablation" and main([*arguments, "--list"]) == 0
    assert "| `smoke` |" in capsys.readouterr().out


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with an adapter, and `ablation` on the PATH."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "ablation"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -P -m ablation "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my_hook.py").write_text(HOOK)
    (folder / "notes.txt").write_text("notes\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    return folder


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder."""
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.end_to_end
@pytest.mark.skipif(shutil.which("pre-commit") is None, reason="pre-commit is not installed")
def test_pre_commit_runs_the_check(repository: Path) -> None:
    hooks = repository.parent / "hooks"  # a repository of its own, since pre-commit copies uncommitted changes
    hooks.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    git(hooks, "init", "-q")
    git(hooks, "add", ".")
    git(hooks, "commit", "-qm", "hooks")
    head = git(hooks, "rev-parse", "HEAD")

    def run(*arguments: str, files: str, changed: str) -> tuple[int, str]:
        hook = {"id": HOOKS["id"], "args": list(arguments), "files": files}
        config = {"repos": [{"repo": str(hooks), "rev": head.strip(), "hooks": [hook]}]}
        (repository / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
        git(repository, "add", ".")
        command = ["pre-commit", "run", "--verbose", "--color=never", "--files", changed]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    status, output = run("my_hook:KnockOut", "-k", "smoke", files="my_hook", changed="my_hook.py")
    assert status == 0 and "1 of 1 requirements hold" in output, output
    status, output = run("my_hook:Silent", "-k", "smoke", files="my_hook", changed="my_hook.py")
    assert status == 1 and "broken: smoke" in output, output
    status, output = run("my_hook:Silent", files="my_hook", changed="notes.txt")
    assert status == 0 and "(no files to check)Skipped" in output, output
    status, output = run(files="my_hook", changed="my_hook.py")
    assert status == 1 and "name an adapter" in output, output
