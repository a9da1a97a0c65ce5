"""The GitHub action: its steps, run as a runner would run them, on a right and on a wrong adapter."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_plugin import HOOK

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".github" / "actions" / "check"
ACTION: dict[str, Any] = yaml.safe_load((FOLDER / "action.yml").read_text(encoding="utf-8"))
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
JOB_STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
SHELL = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
"""What GitHub calls for `shell: bash`."""


# ---- the file itself


def test_scripts_hold_no_expression() -> None:
    scripts = [step["run"] for step in STEPS if "run" in step]
    assert len(scripts) == 3 and not [script for script in scripts if "${{" in script]


def test_every_input_is_used_and_exists() -> None:
    assert set(re.findall(r"inputs\.([\w-]+)", str(ACTION["runs"]))) == set(ACTION["inputs"])


def test_only_the_adapter_is_required() -> None:
    assert [name for name, given in ACTION["inputs"].items() if "default" not in given] == ["implementation"]


def test_action_and_workflow_pin_the_same_versions() -> None:
    in_action, in_workflow = (
        dict(step["uses"].split("@") for step in steps if "@" in step.get("uses", "")) for steps in (STEPS, JOB_STEPS)
    )
    assert set(in_action) == {"actions/setup-python", "actions/upload-artifact"}
    assert in_action.items() <= in_workflow.items()


def test_workflow_uses_the_action_with_known_inputs() -> None:
    (step,) = (step for step in JOB_STEPS if step.get("uses") == f"./{FOLDER.relative_to(ROOT)}")
    assert set(step["with"]) <= set(ACTION["inputs"])


def test_documented_step_has_known_inputs() -> None:
    chapter = (ROOT / "docs" / "checking.md").read_text(encoding="utf-8").partition("## In CI\n")[2]
    (block,) = re.findall(r"```yaml\n(  head-ablation:\n.*?)```", chapter, re.S)
    *others, step = yaml.safe_load(block)["head-ablation"]["steps"]
    assert step["uses"] == f"OWNER/head-ablation/{FOLDER.relative_to(ROOT)}@COMMIT"
    assert set(step["with"]) <= set(ACTION["inputs"])
    named = re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| (`.*?) \|", chapter, re.M)))
    assert set(named) == set(ACTION["inputs"])
    assert {step["uses"] for step in others if "uses" in step} <= {step.get("uses") for step in JOB_STEPS}


# ---- its steps


class Runner:
    """Runs the scripts of the action in order, as GitHub does, with the Python of a new environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temp = folder, folder / "runner temp"
        self.summary, self.python = self.temp / "summary.md", folder / "environment" / "bin" / "python"
        for path in (self.temp, folder / "work dir"):
            path.mkdir()
        venv.create(folder / "environment", with_pip=True)
        (self.site,) = (folder / "environment").glob("lib/python*/site-packages")
        packages = {path for path in sys.path if path in site.getsitepackages()}
        (self.site / "job.pth").write_text("\n".join(packages))  # what the job has installed

    def versions(self) -> str:
        """Return what is installed, apart from this package and from tools that build packages."""
        others = [f"--exclude={name}" for name in ("head-ablation", "pip", "setuptools", "wheel")]
        command = [str(self.python), "-m", "pip", "--isolated", "list", "--format=freeze", *others]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def evaluated(self, text: str, inputs: dict[str, str]) -> str:
        """Return a text with the values of its expressions."""
        defaults = {name: given.get("default", "") for name, given in ACTION["inputs"].items()}
        values = {f"inputs.{name}": value for name, value in (defaults | inputs).items()}
        values |= {f"steps.files.outputs.{name}": value for name, value in self.outputs.items()}
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: values[found[1]], text)

    def __call__(self, *, install: bool = True, **inputs: str) -> tuple[int, str]:
        """Run the scripts up to the first that fails. Returns its exit status, and what all of them have printed."""
        inputs = {"working-directory": "work dir"} | {name.replace("_", "-"): value for name, value in inputs.items()}
        self.outputs: dict[str, str] = {}
        self.summary.write_text("")
        printed = ""
        for step in (step for step in STEPS if "run" in step):
            if step["name"] == "Install the specification" and not install:
                continue
            output, script = self.temp / "output", self.temp / "script.sh"
            output.write_text("")
            script.write_text(step["run"])
            done = subprocess.run(
                [*SHELL, script],
                cwd=self.folder / self.evaluated(step.get("working-directory", "."), inputs),
                env={
                    **{key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CI")},
                    "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
                    "RUNNER_TEMP": str(self.temp),
                    "GITHUB_ACTION_PATH": str(FOLDER),
                    "GITHUB_OUTPUT": str(output),
                    "GITHUB_STEP_SUMMARY": str(self.summary),
                    **{name: self.evaluated(value, inputs) for name, value in step.get("env", {}).items()},
                },
                capture_output=True,
                text=True,
            )
            printed += done.stdout + done.stderr
            self.outputs |= dict(line.split("=", 1) for line in output.read_text().splitlines())
            if done.returncode:
                return done.returncode, printed
        return 0, printed


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """One environment, since it takes seconds to make."""
    made = Runner(tmp_path_factory.mktemp("job"))
    (made.folder / "work dir" / "my_hook.py").write_text(HOOK)
    return made


def skip_without_index(printed: str) -> None:
    """Skip the test if pip could not get what builds the package."""
    if "No matching distribution found for hatchling" in printed:
        pytest.skip("no package index can be reached")


@pytest.mark.end_to_end
def test_steps_check_right_and_wrong_adapters(runner: Runner) -> None:
    before = runner.versions()
    (runner.folder / "work dir" / "known failures.txt").write_text("hygiene.exception issue 7\n")
    status, printed = runner(
        implementation="my_hook:KnockOut",
        select="smoke or hygiene.exception",
        expected_failures="known failures.txt",
        badge="my badge.json",
    )
    skip_without_index(printed)
    assert status == 0, printed
    assert runner.versions() == before
    summary = runner.summary.read_text()
    assert "| known to be broken | `hygiene.exception` | issue 7 |\n| holds | `smoke` |" in summary
    badge = Path(runner.outputs["badge"])
    assert badge == runner.folder / "work dir" / "my badge.json" and json.loads(badge.read_text())["color"] == "yellow"
    first = runner.outputs["report"]
    assert 'failures="0" skipped="1" tests="2"' in Path(first).read_text()

    status, printed = runner(install=False, implementation="my_hook:KnockOut", select="smoke or hygiene.exception")
    assert status == 1 and "broken: hygiene.exception" in printed
    assert "| broken | `hygiene.exception`: " in runner.summary.read_text()
    assert runner.outputs["badge"] == "" and runner.outputs["report"] != first
    assert 'failures="1" skipped="0" tests="2"' in Path(runner.outputs["report"]).read_text()


@pytest.mark.end_to_end
@pytest.mark.parametrize("quiet", ["0", "1"])
def test_packages_of_the_job_are_never_changed(runner: Runner, quiet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification needs a newer pytest than this job has."""
    monkeypatch.setenv("PIP_QUIET", quiet)
    info = runner.site / "pytest-7.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pytest\nVersion: 7.0.0\n")
    (info / "RECORD").write_text("")
    before = runner.versions()
    status, printed = runner(implementation="my_hook:KnockOut")
    after = runner.versions()
    shutil.rmtree(info)
    skip_without_index(printed)
    assert status == 1 and "these package versions have conflicting dependencies" in printed, printed
    assert after == before and "pytest==7.0.0" in before


ODD = """my_hook:KnockOut"; touch harmed; $(touch harmed) `touch harmed` '"""


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("inputs", "status"),
    [
        ({"implementation": ODD}, 4),
        ({"implementation": "my_hook:KnockOut", "select": ODD}, 4),
        ({"implementation": "my_hook:KnockOut", "expected_failures": ODD}, 4),
        ({"implementation": "my_hook:KnockOut", "badge": f"nowhere/{ODD}"}, 4),
        ({"implementation": "my_hook:KnockOut", "badge": "a\nreport=b"}, 1),
        ({"implementation": "--list"}, 4),
        ({"implementation": ""}, 2),
    ],
)
def test_odd_input_is_refused_and_runs_no_code(inputs: dict[str, str], status: int, runner: Runner) -> None:
    (runner.site / "checkout.pth").write_text(str(ROOT))  # in place of an installation
    found, printed = runner(install=False, **inputs)
    assert found == status, printed
    assert not list(runner.folder.rglob("harmed")) and runner.summary.read_text() == ""
    assert "Traceback" not in printed
