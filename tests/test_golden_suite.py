"""Golden arrays can fail, say why, and are never rewritten by accident."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import golden as golden_module
from tests.golden import Golden, agreement_arrays, differences, probability_change, robustness_arrays
from tests.golden_sets import KS
from tests.noise import FACTOR, as_toml
from tests.test_claims import as_published, changed

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "golden"
NAMES = {"argmax_robustness", "target_sensitivity", "control_stability", "zero_mean_agreement", "head_means"}
MADE_WITH = {"torch": "1.0", "threads": 1}


@pytest.fixture(scope="session")
def original_datadir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden folder for these tests."""
    return tmp_path_factory.mktemp("golden")


@pytest.fixture
def arrays(original_datadir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Golden arrays of an invented model, in margins.npz, with a tolerance of 0.001."""
    monkeypatch.setattr(golden_module, "FOLDER", original_datadir)
    monkeypatch.setattr(golden_module, "tolerances", lambda: {"toy": {"margin": 1e-3}})
    (original_datadir / "toy").mkdir(exist_ok=True)
    arrays: dict[str, Any] = {"margin": np.arange(24.0).reshape(2, 3, 4), "argmax": np.arange(24).reshape(2, 3, 4)}
    np.savez(original_datadir / "toy" / "margins.npz", **arrays)
    (original_datadir / "toy" / "margins.json").write_text(json.dumps({"torch": "0.9", "threads": 1}))
    return arrays


Check = Callable[..., None]


@pytest.fixture
def check(ndarrays_regression: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Compare with the golden margins. regenerate: as with pytest --force-regen."""

    def check(arrays: dict[str, Any], regenerate: bool = False, made_with: dict[str, Any] = MADE_WITH) -> None:
        monkeypatch.setattr(request.config.option, "force_regen", regenerate)
        Golden(ndarrays_regression.check, regenerate)("toy", "margins", arrays, made_with)

    return check


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_passing_run_writes_nothing(arrays: dict[str, Any], check: Check, original_datadir: Path) -> None:
    before = contents(original_datadir)
    check({**arrays, "margin": arrays["margin"] + 0.9e-3})
    assert contents(original_datadir) == before


def test_mismatch_names_cells_and_provenance(arrays: dict[str, Any], check: Check, original_datadir: Path) -> None:
    before = contents(original_datadir)
    moved = arrays["margin"].copy()
    moved[1, 2, 3] += 0.5
    moved[0, 0, 1] -= 0.25
    with pytest.raises(AssertionError) as error:
        check({**arrays, "margin": moved})
    lines = str(error.value).splitlines()
    assert lines == [
        "golden/toy/margins.npz differs from this run:",
        "margin: 2 of 24 cells moved by more than 0.001",
        "  [1]L2H3 +0.5: 23 -> 23.5",
        "  [0]L0H1 -0.25: 1 -> 0.75",
        "made with, golden -> this run:",
        "  torch: 0.9 -> 1.0",
        "If the change is intended: pytest --force-regen, and say in the commit why it moved.",
    ]
    assert contents(original_datadir) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: {**a, "margin": a["margin"].astype(np.float32)}, r"margin: float32 \(2, 3, 4\), golden has float64"),
        (lambda a: {**a, "margin": a["margin"][:1]}, r"margin: float64 \(1, 3, 4\), golden has float64 \(2, 3, 4\)"),
        (lambda a: {**a, "argmax": a["argmax"] + (a["argmax"] == 5)}, r"argmax: 1 of 24 .*\n  \[0\]L1H1 \+1: 5 -> 6"),
        (lambda a: {**a, "margin": a["margin"] * np.nan}, "margins: margin holds values that are not finite"),
        (lambda a: {"margin": a["margin"]}, "argmax: the golden file has it, this run does not"),
        (lambda a: {**a, "more": np.ones(2, dtype=int)}, "more: this run has it, the golden file does not"),
        (lambda a: {**a, "more": np.ones(2)}, "there is no tolerance for more of toy"),
        # 1e-5 of 1e6 is 10: a relative tolerance would let it pass
        (lambda a: {**a, "margin": a["margin"] + 0.002}, "margin: 24 of 24 cells"),
    ],
    ids=["dtype", "shape", "integer", "nan", "fewer", "more", "no tolerance", "relative"],
)
def test_comparison_is_stricter_than_pytest_regressions(
    arrays: dict[str, Any], check: Check, change: Callable[[dict[str, Any]], dict[str, Any]], reason: str
) -> None:
    with pytest.raises(AssertionError, match=reason):
        check(change(arrays))


def test_force_regen_rewrites_what_moved_and_fails_once(
    arrays: dict[str, Any], check: Check, original_datadir: Path
) -> None:
    moved = {**arrays, "margin": arrays["margin"] + 1}
    with pytest.raises(pytest.fail.Exception, match="force-regen set"):
        check(moved, regenerate=True)
    assert np.array_equal(np.load(original_datadir / "toy" / "margins.npz")["margin"], moved["margin"])
    assert json.loads((original_datadir / "toy" / "margins.json").read_text()) == MADE_WITH


def test_force_regen_keeps_what_did_not_move(arrays: dict[str, Any], check: Check, original_datadir: Path) -> None:
    before = contents(original_datadir)
    check({**arrays, "margin": arrays["margin"] + 1e-4}, regenerate=True)
    assert contents(original_datadir) == before


@pytest.mark.parametrize("what", ["one array file", "all files", "the folder"])
def test_missing_golden_file_is_an_error_and_stays_missing(
    what: str, check: Check, arrays: dict[str, Any], original_datadir: Path
) -> None:
    folder = original_datadir / "toy"
    for file in [folder / "margins.npz"] if what == "one array file" else list(folder.iterdir()):
        file.unlink()
    if what == "the folder":
        folder.rmdir()
    before = contents(original_datadir)
    with pytest.raises(AssertionError, match="golden/toy/margins.npz does not exist: `pytest --force-regen` makes it"):
        check(arrays)
    assert contents(original_datadir) == before and folder.exists() == (what != "the folder")


def test_force_regen_makes_a_missing_golden_file(check: Check, arrays: dict[str, Any], original_datadir: Path) -> None:
    for file in (original_datadir / "toy").iterdir():
        file.unlink()
    with pytest.raises(pytest.fail.Exception):  # once, so that nobody overlooks it
        check(arrays, regenerate=True)
    assert np.array_equal(np.load(original_datadir / "toy" / "margins.npz")["margin"], arrays["margin"])
    assert json.loads((original_datadir / "toy" / "margins.json").read_text()) == MADE_WITH


def test_long_mismatch_shows_the_worst_cells() -> None:
    was = {"margin": np.zeros((1, 9, 9))}
    now = {"margin": np.arange(81.0).reshape(1, 9, 9)}
    lines = differences(was, now, {"margin": 0.5})
    assert lines[0] == "margin: 80 of 81 cells moved by more than 0.5"
    assert lines[1].startswith("  [0]L8H8 +80") and len(lines) == 12 and lines[-1] == "  and 70 more"


def test_near_tie_is_counted_as_undecided() -> None:
    sweep = changed(as_published(), margin=((0, 7, 5), 1e-6))
    pinned = robustness_arrays(sweep, noise=1e-5)
    assert pinned["argmax"][0, 7, 5] == -1 and (pinned["argmax"] == -1).sum() == 1
    assert pinned["near_ties"].tolist() == [1, 0] and pinned["kept"].tolist() == [143, 144]
    assert robustness_arrays(sweep, noise=1e-7)["argmax"][0, 7, 5] == 1


# ---- what is in golden/


def golden_models() -> list[str]:
    return sorted({path.parent.name for path in GOLDEN.glob("*/*.npz")})


def test_golden_folder_holds_only_what_is_tested() -> None:
    assert golden_models() == ["capitals", "smollm2"]
    expected = {
        GOLDEN / model / f"{name}{end}"
        for model in golden_models()
        for name in (*NAMES, "all_capitals")
        for end in (".npz", ".json")
    }
    expected |= {GOLDEN / "capitals" / f"other_imputations{end}" for end in (".npz", ".json")}
    expected |= {GOLDEN / model / f"removal_curve{end}" for model in KS for end in (".npz", ".json")}
    expected |= {GOLDEN / "capitals" / f"pairs{end}" for end in (".npz", ".json")}
    expected |= {GOLDEN / "tolerances.toml", GOLDEN / "gpt2" / "claims.toml"}
    assert {path for path in GOLDEN.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("model", golden_models())
def test_golden_arrays_agree_with_each_other(model: str) -> None:
    """Laws that hold for any numbers: golden arrays from a wrong run would break them."""
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
def test_tolerances_follow_from_the_measured_noise(model: str) -> None:
    text = (GOLDEN / "tolerances.toml").read_text()
    table = tomllib.loads(text)
    assert as_toml(table) == text, "golden/tolerances.toml was not written by python -m tests.noise"
    for name, row in table[model]["arrays"].items():
        assert row["atol"] == pytest.approx(FACTOR * max(row["noise"].values()), rel=0.1), name
    assert set(table[model]["argmax_turned"].values()) == {0}
    # A tolerance must not hide an effect, so it is far below a typical one.
    change = np.load(GOLDEN / model / "target_sensitivity.npz")["target_probability_change"]
    assert table[model]["arrays"]["target_probability_change"]["atol"] < np.median(np.abs(change)) / 10


def test_agreement_is_mean_minus_zero() -> None:
    sweep = as_published()
    change = probability_change(sweep)
    assert np.array_equal(agreement_arrays(sweep)["mean_minus_zero"], change[:, 1] - change[:, 0])
