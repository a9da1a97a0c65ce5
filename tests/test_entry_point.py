"""pytest loads the plugin wherever the package is installed: it costs nothing until asked, and is there once."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_plugin import HOOK

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parent.parent
NAME = "ablation.checks.plugin"
HEAVY = ("torch", "transformers", "numpy", "hypothesis", "ablation.checks.runner")
USERS_TEST = f"""
import sys

def test_plugin_costs_nothing(pytestconfig):
    assert pytestconfig.pluginmanager.has_plugin({NAME!r})
    assert not [name for name in {HEAVY!r} if name in sys.modules]
    assert "ablation.errors" in sys.modules
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of another project, and the package as an installer leaves it: with its entry point and its files."""
    (group,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"].items()
    info = tmp_path / "site" / "head_ablation-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: head-ablation\nVersion: 0\n")
    lines = [f"[{group[0]}]", *(f"{name} = {module}" for name, module in group[1].items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    files = [path.relative_to(ROOT) for path in (ROOT / "ablation").rglob("*.py")]
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    (tmp_path / "site" / "ablation").symlink_to(ROOT / "ablation")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # of modules that pytest rewrites
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "test_mine.py").write_text(USERS_TEST)
    (folder / "my_hook.py").write_text(HOOK)
    monkeypatch.chdir(folder)
    return folder


def run_pytest(*arguments: str) -> tuple[int, str]:
    """Run pytest in a new process, in this folder."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "conftest"),
    [([], ""), (["-p", NAME], ""), ([], f"pytest_plugins = [{NAME!r}]"), (["-n", "1"], "")],
    ids=["entry point", "-p", "conftest", "xdist worker"],
)
def test_plugin_costs_nothing_until_asked(options: list[str], conftest: str, installed: Path) -> None:
    Path("conftest.py").write_text(conftest)
    status, output = run_pytest(*options)
    assert status == pytest.ExitCode.OK and "1 passed" in output, output


def test_plugin_can_be_blocked(installed: Path) -> None:
    assert "--ablation-implementation" in run_pytest("--help")[1]
    status, output = run_pytest("-p", f"no:{NAME}", "--ablation-implementation", "my_hook:KnockOut")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "unrecognized arguments: --ablation-implementation\n" in output


@pytest.mark.parametrize("options", [[], ["-n", "2"], ["-p", NAME, "--assert=plain"]], ids=["alone", "xdist", "plain"])
def test_run_is_whole_and_its_messages_are_the_same(options: list[str], installed: Path) -> None:
    """In packages with a plugin, pytest rewrites assertions; pytest-xdist would distribute the checks."""
    status, output = run_pytest(
        "--ablation-implementation", "my_hook:KnockOut", "-k", "smoke or hygiene.exception", *options
    )
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "1 of 2 requirements hold; 62 were not run\nbroken: hygiene.exception\n" in output
    finding = "  found: the model is not as it was found: transformer.h.0.attn.c_proj._forward_pre_hooks changed\n"
    assert finding in output, output
