"""The options of this project's pytest runs: golden arrays are protected in CI, and tested models are named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ablation.errors import ModelUnavailable
from ablation.sources import NAMED_MODELS, Source
from tests.test_models import folder  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "golden"
CONFTEST = ROOT / "conftest.py"


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run_pytest(*arguments: str, root: Path = ROOT, **environment: str) -> tuple[int, str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("CI", "GITHUB_ACTIONS")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=clean | environment)
    return done.returncode, done.stdout + done.stderr


def conftest_of(request: pytest.FixtureRequest) -> Any:
    (conftest,) = (p for p in request.config.pluginmanager.get_plugins() if getattr(p, "__file__", "") == str(CONFTEST))
    return conftest


def configure(request: pytest.FixtureRequest, **given: Any) -> None:
    """Let conftest.py read options, in this process, since a new one takes seconds to start."""
    conftest = conftest_of(request)
    options = dict.fromkeys(("--models", "force_regen", "regen_all")) | given
    conftest.pytest_configure(SimpleNamespace(getoption=options.get))


@pytest.mark.parametrize("option", ["force_regen", "regen_all"])
def test_rewriting_golden_arrays_is_refused_only_in_ci(
    option: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.UsageError, match="golden arrays are never rewritten in CI"):
        configure(request, **{option: True})
    monkeypatch.delenv("CI")
    configure(request, **{option: True})


@pytest.mark.end_to_end
def test_golden_arrays_are_never_rewritten_in_ci() -> None:
    before = contents(GOLDEN)
    status, output = run_pytest("tests/test_golden.py", "--force-regen", CI="true")
    assert status == pytest.ExitCode.USAGE_ERROR and "golden arrays are never rewritten in CI" in output
    assert contents(GOLDEN) == before


def test_unknown_model_is_a_usage_error(request: pytest.FixtureRequest) -> None:
    with pytest.raises(pytest.UsageError, match="no model 'gtp2'; there are capitals, smollm2, gpt2"):
        configure(request, **{"--models": "gtp2"})


def test_model_in_a_missing_folder_is_a_usage_error(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with pytest.raises(pytest.UsageError, match="nowhere: it does not exist"):
        configure(request, **{"--models": f"gpt2={tmp_path / 'nowhere'}"})


def test_model_that_cannot_be_downloaded_is_one_usage_error(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests would otherwise fail one by one, each after its own attempt."""

    def missing(*_: Any) -> None:
        raise ModelUnavailable("the hub cannot be reached")

    monkeypatch.setattr(Source, "locate", missing)
    monkeypatch.setattr(conftest_of(request), "_loaded", missing)
    with pytest.raises(pytest.UsageError, match="--models: the hub cannot be reached"):
        configure(request, **{"--models": "gpt2"})


@pytest.mark.end_to_end
def test_plain_run_writes_nothing_and_misses_deleted_arrays(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "mutants", "ablation-*")
    shutil.copytree(ROOT, root, ignore=skipped)
    shutil.rmtree(root / "golden" / "capitals")
    before = contents(root)
    status, output = run_pytest("tests/test_golden.py", "--models", "capitals", root=root, PYTHONDONTWRITEBYTECODE="1")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "head_means.npz does not exist: `pytest --force-regen` makes it" in output
    after = {path: text for path, text in contents(root).items() if ".hypothesis" not in path.parts}
    assert after == before


@pytest.mark.end_to_end
def test_claims_run_on_their_own_model_and_can_fail(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """On weights that are not GPT-2's, each failure begins with the words of the claim."""
    (tmp_path / "small_gpt2.py").write_text(  # lets the small model pass for GPT-2
        "from dataclasses import replace\n"
        "from ablation.sources import NAMED_MODELS\n"
        "NAMED_MODELS['gpt2'] = replace(NAMED_MODELS['gpt2'], config={}, prompt_ids=None)\n"
    )
    arguments = ["tests/test_claims.py", "--models", f"gpt2={folder}", "-k", "published_claim", "-p", "small_gpt2"]
    status, output = run_pytest(*arguments, PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "published: The clean argmax is ` Germany`. Found: the clean argmax is" in output
    assert "6 heads were ablated" in output
    assert f"models tested: gpt2={folder}" in output and "NOT tested: capitals: not asked for" in output


@pytest.mark.end_to_end
def test_report_names_tested_models_at_both_ends() -> None:
    status, output = run_pytest("tests/test_golden.py", "--models", "capitals")
    assert status == pytest.ExitCode.OK
    assert output.count("models tested: capitals\n") == 2
    assert all(output.count(f"NOT tested: {name}: not asked for") == 2 for name in NAMED_MODELS if name != "capitals")
