"""The suite itself: golden arrays can fail, say why, and are never rewritten by accident; models are named honestly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ablation.sources import NAMED_MODELS
from tests import golden as golden_module
from tests.golden import Golden, agreement, differences, robustness
from tests.noise import FACTOR, as_toml
from tests.test_claims import as_published, changed
from tests.test_models import folder  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "golden"
CONFTEST = ROOT / "conftest.py"
NAMES = {"argmax_robustness", "target_sensitivity", "control_stability", "zero_mean_agreement", "head_means"}
MADE_WITH = {"torch": "1.0", "threads": 1}


@pytest.fixture(scope="session")
def original_datadir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden folder of our own."""
    return tmp_path_factory.mktemp("golden")


@pytest.fixture
def arrays(original_datadir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arrays that are golden as margins.npz of a made-up model, within 0.001."""
    monkeypatch.setattr(golden_module, "FOLDER", original_datadir)
    monkeypatch.setattr(golden_module, "tolerances", lambda: {"toy": {"margin": 1e-3}})
    (original_datadir / "toy").mkdir(exist_ok=True)
    arrays = {"margin": np.arange(24.0).reshape(2, 3, 4), "argmax": np.arange(24).reshape(2, 3, 4)}
    np.savez(original_datadir / "toy" / "margins.npz", **arrays)
    (original_datadir / "toy" / "margins.json").write_text(json.dumps({"torch": "0.9", "threads": 1}))
    return arrays


Check = Callable[..., None]


@pytest.fixture
def check(ndarrays_regression: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Compare with the golden margins; regenerate= as pytest --force-regen."""

    def check(arrays: dict[str, Any], regenerate: bool = False, made_with: dict[str, Any] = MADE_WITH) -> None:
        monkeypatch.setattr(request.config.option, "force_regen", regenerate)
        Golden(ndarrays_regression.check, regenerate)("toy", "margins", arrays, made_with)

    return check


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_passing_run_writes_nothing_into_golden(arrays: dict[str, Any], check: Check, original_datadir: Path) -> None:
    before = contents(original_datadir)
    check({**arrays, "margin": arrays["margin"] + 0.9e-3})
    assert contents(original_datadir) == before


def test_a_mismatch_names_the_cells_and_what_was_used_and_writes_nothing(
    arrays: dict[str, Any], check: Check, original_datadir: Path
) -> None:
    before = contents(original_datadir)
    moved = arrays["margin"].copy()
    moved[1, 2, 3] += 0.5
    moved[0, 0, 1] -= 0.25
    with pytest.raises(AssertionError) as error:
        check({**arrays, "margin": moved})
    lines = str(error.value).splitlines()
    assert lines == [
        "golden/toy/margins.npz does not hold:",
        "margin: 2 of 24 cells moved by more than 0.001",
        "  [1]L2H3 +0.5: 23 -> 23.5",
        "  [0]L0H1 -0.25: 1 -> 0.75",
        "made with, golden -> this run:",
        "  torch: 0.9 -> 1.0",
        "If the change is meant: pytest --force-regen, and say in the commit why it moved.",
    ]
    assert contents(original_datadir) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: {**a, "margin": a["margin"].astype(np.float32)}, r"margin: float32 \(2, 3, 4\), golden has float64"),
        (lambda a: {**a, "margin": a["margin"][:1]}, r"margin: float64 \(1, 3, 4\), golden has float64 \(2, 3, 4\)"),
        (lambda a: {**a, "argmax": a["argmax"] + (a["argmax"] == 5)}, r"argmax: 1 of 24 .*\n  \[0\]L1H1 \+1: 5 -> 6"),
        (lambda a: {**a, "margin": a["margin"] * np.nan}, "margins: margin holds values that are not finite"),
        (lambda a: {"margin": a["margin"]}, "argmax: golden has it, this run does not"),
        (lambda a: {**a, "more": np.ones(2, dtype=int)}, "more: this run has it, golden does not"),
        (lambda a: {**a, "more": np.ones(2)}, "no tolerance for more of toy"),
        # 1e-5 of 1e6 is 10: a relative tolerance would let it pass
        (lambda a: {**a, "margin": a["margin"] + 0.002}, "margin: 24 of 24 cells"),
    ],
    ids=["dtype", "shape", "integer", "nan", "fewer", "more", "no tolerance", "relative"],
)
def test_what_pytest_regressions_would_let_pass_is_refused(
    arrays: dict[str, Any], check: Check, change: Callable[[dict[str, Any]], dict[str, Any]], reason: str
) -> None:
    with pytest.raises(AssertionError, match=reason):
        check(change(arrays))


def test_force_regen_rewrites_what_moved_with_its_provenance_and_fails_once(
    arrays: dict[str, Any], check: Check, original_datadir: Path
) -> None:
    moved = {**arrays, "margin": arrays["margin"] + 1}
    with pytest.raises(pytest.fail.Exception, match="force-regen set"):
        check(moved, regenerate=True)
    assert np.array_equal(np.load(original_datadir / "toy" / "margins.npz")["margin"], moved["margin"])
    assert json.loads((original_datadir / "toy" / "margins.json").read_text()) == MADE_WITH


def test_force_regen_leaves_alone_what_did_not_move(
    arrays: dict[str, Any], check: Check, original_datadir: Path
) -> None:
    before = contents(original_datadir)
    check({**arrays, "margin": arrays["margin"] + 1e-4}, regenerate=True)
    assert contents(original_datadir) == before


def test_an_array_that_is_not_golden_yet_fails(check: Check, arrays: dict[str, Any], original_datadir: Path) -> None:
    (original_datadir / "toy" / "margins.npz").unlink()
    with pytest.raises(pytest.fail.Exception, match="File not found in data directory, created"):
        check(arrays)


def test_a_long_mismatch_shows_the_worst_cells() -> None:
    was = {"margin": np.zeros((1, 9, 9))}
    now = {"margin": np.arange(81.0).reshape(1, 9, 9)}
    lines = differences(was, now, {"margin": 0.5})
    assert lines[0] == "margin: 80 of 81 cells moved by more than 0.5"
    assert lines[1].startswith("  [0]L8H8 +80") and len(lines) == 12 and lines[-1] == "  and 70 more"


def test_a_near_tie_decides_nothing_and_is_counted() -> None:
    sweep = changed(as_published(), margin=((0, 7, 5), 1e-6))
    pinned = robustness(sweep, noise=1e-5)
    assert pinned["argmax"][0, 7, 5] == -1 and (pinned["argmax"] == -1).sum() == 1
    assert pinned["near_ties"].tolist() == [1, 0] and pinned["kept"].tolist() == [143, 144]
    assert robustness(sweep, noise=1e-7)["argmax"][0, 7, 5] == 1


# ---- what is in golden/


def golden_models() -> list[str]:
    return sorted({path.parent.name for path in GOLDEN.glob("*/*.npz")})


def test_golden_holds_what_is_tested_and_nothing_else() -> None:
    assert golden_models() == ["capitals", "smollm2"]
    expected = {
        GOLDEN / model / f"{name}{end}" for model in golden_models() for name in NAMES for end in (".npz", ".json")
    }
    expected |= {GOLDEN / "tolerances.toml", GOLDEN / "gpt2" / "claims.toml"}
    assert {path for path in GOLDEN.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("model", golden_models())
def test_golden_arrays_agree_with_each_other(model: str) -> None:
    """Laws that hold whatever the numbers are: a golden array made by a wrong run would break them."""
    load = {name: dict(np.load(GOLDEN / model / f"{name}.npz")) for name in NAMES}
    target, control, argmax = (load[n] for n in ("target_sensitivity", "control_stability", "argmax_robustness"))
    for name, pinned in (("target", target), ("control", control)):
        clean = pinned[f"{name}_clean_probability"]
        after = clean + pinned[f"{name}_probability_change"]
        assert (after >= 0).all() and (after <= 1).all()
        log_change = np.log(after) - np.log(clean)
        assert np.allclose(log_change, pinned[f"{name}_log_probability_change"], rtol=0, atol=1e-9)
    both = np.stack([target["target_probability_change"], control["control_probability_change"]])
    assert np.array_equal(load["zero_mean_agreement"]["mean_minus_zero"], both[:, 1] - both[:, 0])
    assert ((argmax["argmax"] == argmax["clean_argmax"]).sum(axis=(1, 2)) == argmax["kept"]).all()
    assert (argmax["margin"] > 0).all() and (argmax["near_ties"] == 0).all()
    assert argmax["margin"].shape == both.shape[1:] == (2, *load["head_means"]["head_mean"].shape)


@pytest.mark.parametrize("model", golden_models())
def test_every_tolerance_is_what_the_measured_noise_justifies(model: str) -> None:
    text = (GOLDEN / "tolerances.toml").read_text()
    table = tomllib.loads(text)
    assert as_toml(table) == text, "golden/tolerances.toml was not written by python -m tests.noise"
    for name, row in table[model]["arrays"].items():
        assert row["atol"] == pytest.approx(FACTOR * max(row["noise"].values()), rel=0.1), name
    assert set(table[model]["argmax_turned"].values()) == {0}
    # A tolerance must not hide an effect: it lies far below what an ablation typically does.
    change = np.load(GOLDEN / model / "target_sensitivity.npz")["target_probability_change"]
    assert table[model]["arrays"]["target_probability_change"]["atol"] < np.median(np.abs(change)) / 10


def test_agreement_is_mean_minus_zero() -> None:
    sweep = as_published()
    assert np.array_equal(
        agreement(sweep)["mean_minus_zero"], sweep.probability_change[:, 1] - sweep.probability_change[:, 0]
    )


# ---- the command line of pytest


def run_pytest(*arguments: str, **environment: str) -> tuple[int, str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("CI", "GITHUB_ACTIONS")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean | environment)
    return done.returncode, done.stdout + done.stderr


def configure(request: pytest.FixtureRequest, **given: Any) -> None:
    """What conftest.py does with the options of a run, in this process: a new one takes seconds to begin."""
    (conftest,) = (p for p in request.config.pluginmanager.get_plugins() if getattr(p, "__file__", "") == str(CONFTEST))
    options = dict.fromkeys(("--models", "--implementation", "--expected-failures", "force_regen", "regen_all")) | given
    conftest.pytest_configure(SimpleNamespace(getoption=options.get, invocation_params=SimpleNamespace(dir=ROOT)))


@pytest.mark.parametrize("option", ["force_regen", "regen_all"])
def test_rewriting_golden_arrays_is_refused_in_ci_and_only_there(
    option: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.UsageError, match="golden arrays are never rewritten in CI"):
        configure(request, **{option: True})
    monkeypatch.delenv("CI")
    configure(request, **{option: True})


def test_golden_arrays_are_never_rewritten_in_ci() -> None:
    before = contents(GOLDEN)
    status, output = run_pytest("tests/test_golden.py", "--force-regen", CI="true")
    assert status == pytest.ExitCode.USAGE_ERROR and "golden arrays are never rewritten in CI" in output
    assert contents(GOLDEN) == before


def test_an_unknown_model_is_a_usage_error(request: pytest.FixtureRequest) -> None:
    with pytest.raises(pytest.UsageError, match="no model 'gtp2'; there are capitals, smollm2, gpt2"):
        configure(request, **{"--models": "gtp2"})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"--implementation": "nowhere:X"}, "--implementation nowhere:X: No module named 'nowhere'"),
        ({"--implementation": "tests.implementations.ours:X"}, "has no attribute 'X'; it should be MODULE:CLASS"),
        ({"--expected-failures": "no.txt"}, "No such file or directory"),
        ({"--expected-failures": "bad.txt"}, "'zero' is no check's id, or has no reason"),
    ],
)
def test_a_bad_option_is_a_usage_error(
    options: dict[str, str],
    reason: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.txt").write_text("zero it is\n")
    with pytest.raises(pytest.UsageError, match=re.escape(reason)):
        configure(request, **options)


def test_a_model_asked_for_that_is_in_no_folder_is_a_usage_error(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with pytest.raises(pytest.UsageError, match="nowhere: it does not exist"):
        configure(request, **{"--models": f"gpt2={tmp_path / 'nowhere'}"})


def test_claims_are_tested_on_the_model_they_are_about_and_can_fail(folder: Path) -> None:  # noqa: F811
    """GPT-2's claims, on weights that are not GPT-2's: the first thing that differs is said in the claim's words."""
    status, output = run_pytest("tests/test_claims.py", "--models", f"gpt2={folder}", "-k", "published_claim")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "published: The clean argmax is ` Germany`. Found: the clean argmax is" in output
    assert "6 heads were ablated" in output
    assert f"models tested: gpt2={folder}" in output and "NOT tested: capitals: not asked for" in output


def test_the_report_says_which_models_were_tested_at_its_head_and_at_its_end() -> None:
    status, output = run_pytest("tests/test_golden.py", "--models", "capitals")
    assert status == pytest.ExitCode.OK
    assert output.count("models tested: capitals\n") == 2
    assert all(output.count(f"NOT tested: {name}: not asked for") == 2 for name in NAMED_MODELS if name != "capitals")
