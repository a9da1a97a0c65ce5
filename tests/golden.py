"""Golden arrays: what is pinned, with which tolerance, and how a mismatch reads. A sweep here has one prompt."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablation.reports.report import trend
from ablation.results import Result

FOLDER = Path(__file__).parent.parent / "golden"
SHOWN = 10
"""The number of cells that a mismatch lists, the worst first."""


def sensitivity_arrays(sweep: Result, name: str) -> dict[str, Any]:
    """Return what every ablation does to the target or the control. name: target or control."""
    maps = {metric: sweep.grid(sweep.change(f"{name}_{metric}")[0]) for metric in ("probability", "log_probability")}
    return {
        f"{name}_clean_probability": sweep.clean[f"{name}_probability"][0],
        f"{name}_probability_change": maps["probability"],
        f"{name}_log_probability_change": maps["log_probability"],
    }


def robustness_arrays(sweep: Result, noise: float) -> dict[str, Any]:
    """Return what every ablation does to the prediction. noise: the tolerance of a margin.

    If the margin is within the noise of both logits, rounding decides the argmax, which is then pinned as -1.
    """
    margin, argmax = (sweep.grid(sweep.ablated[name][0]) for name in ("margin", "argmax"))
    decided = margin > 2 * noise
    return {
        "clean_argmax": sweep.clean["argmax"][0],
        "clean_margin": sweep.clean["margin"][0],
        "argmax": np.where(decided, argmax, -1),
        "margin": margin,
        "kept": (sweep.grid(sweep.kept[0]) & decided).sum(axis=(1, 2)),  # [imputation]
        "near_ties": (sweep.has_head & ~decided).sum(axis=(1, 2)),  # [imputation]
    }


def agreement_arrays(sweep: Result) -> dict[str, Any]:
    """Return the effect of mean minus that of zero imputation, [target and control, layer, head]."""
    zero, mean = (sweep.imputations.index(name) for name in ("zero", "mean"))
    change = probability_change(sweep)
    return {"mean_minus_zero": change[:, mean] - change[:, zero]}


def probability_change(sweep: Result) -> NDArray[np.float64]:
    """Return the changes of the probabilities of target and control, [2, imputation, layer, head]."""
    return np.stack([sweep.grid(sweep.change(f"{name}_probability")[0]) for name in ("target", "control")])


def made_with(sweep: Result) -> dict[str, Any]:
    """Return what the arrays of a sweep were made with, for golden/MODEL/NAME.json."""
    (prompt,) = sweep.prompts
    watched = [prompt.target_text, prompt.control_text]
    return {**sweep.provenance, "prompt": prompt.prompt, "watched": watched, "token_ids": list(prompt.token_ids)}


def head_mean_arrays(sweep: Result) -> dict[str, Any]:
    """Return the head means, and their trend with depth."""
    (head_mean,) = sweep.head_mean
    return {"head_mean": head_mean, "trend_slope": trend(head_mean).slope}


@cache
def tolerances() -> dict[str, dict[str, Any]]:
    """Return the tolerances, {model: {array: atol}}; golden/tolerances.toml holds the noise that justifies them."""
    table = tomllib.loads((FOLDER / "tolerances.toml").read_text())
    return {model: {name: row["atol"] for name, row in entry["arrays"].items()} for model, entry in table.items()}


@dataclass(frozen=True)
class Golden:
    """Compares arrays with golden/MODEL/NAME.npz, or writes it under `pytest --force-regen`, and only then.

    In addition to pytest-regressions, it refuses a changed dtype, values that are not finite, and relative tolerances;
    it keeps what the arrays were made with in golden/MODEL/NAME.json, and names the cells that moved. A float array is
    compared within its tolerance in golden/tolerances.toml, any other array exactly.
    """

    compare: Callable[..., None]
    """`check` of pytest-regressions' ndarrays_regression."""
    regenerate: bool

    def __call__(self, model: str, name: str, arrays: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
        """Compare. arrays: name -> array or number. made_with: provenance. Raises AssertionError."""
        __tracebackhide__ = True
        obtained = {key: np.asarray(value) for key, value in arrays.items()}
        for key, array in obtained.items():
            finite = bool(np.isfinite(array).all())
            assert finite, f"{model}/{name}: {key} holds values that are not finite"
        atol = {key: atol_of(model, key) if array.dtype.kind == "f" else 0.0 for key, array in obtained.items()}
        path = FOLDER / model / f"{name}.npz"
        before = path.read_bytes() if path.exists() else None
        if not self.regenerate:
            missing = f"golden/{model}/{name}.npz does not exist: `pytest --force-regen` makes it"
            assert before is not None, missing
            with np.load(path, allow_pickle=False) as expected:
                moved = differences({key: expected[key] for key in expected}, obtained, atol)
            if moved:
                raise AssertionError(_message(model, name, moved, made_with))
        try:
            exactly = {key: {"atol": atol[key], "rtol": 0.0} for key in obtained}
            self.compare(dict(obtained), basename=f"{model}/{name}", tolerances=exactly)
        finally:
            if path.exists() and path.read_bytes() != before:
                path.with_suffix(".json").write_text(json.dumps(made_with, indent=2, ensure_ascii=False) + "\n")


def atol_of(model: str, array: str) -> float:
    """Return the absolute tolerance of a float array."""
    try:
        return float(tolerances()[model][array])
    except KeyError:
        raise AssertionError(
            f"there is no tolerance for {array} of {model}: python -m tests.noise {model} measures it"
        ) from None


def differences(
    expected: Mapping[str, NDArray[Any]], obtained: Mapping[str, NDArray[Any]], atol: Mapping[str, float]
) -> list[str]:
    """Describe what moved (arrays, dtypes, shapes, cells), one per line; empty if nothing did."""
    lines = [f"{key}: the golden file has it, this run does not" for key in expected.keys() - obtained.keys()]
    lines += [f"{key}: this run has it, the golden file does not" for key in obtained.keys() - expected.keys()]
    for key in sorted(expected.keys() & obtained.keys()):
        was, now = expected[key], obtained[key]
        if was.dtype != now.dtype or was.shape != now.shape:
            lines.append(f"{key}: {now.dtype} {now.shape}, golden has {was.dtype} {was.shape}")
            continue
        change = now.astype(float) - was.astype(float)
        over = np.abs(change) > atol[key]
        if not over.any():
            continue
        lines.append(f"{key}: {over.sum()} of {over.size} cells moved by more than {atol[key]:.3g}")
        worst = sorted(map(tuple, np.argwhere(over)), key=lambda cell: -abs(change[cell]))
        lines += [f"  {_place(cell)} {change[cell]:+.3g}: {was[cell]:.9g} -> {now[cell]:.9g}" for cell in worst[:SHOWN]]
        if len(worst) > SHOWN:
            lines.append(f"  and {len(worst) - SHOWN} more")
    return lines


def _place(cell: tuple[Any, ...]) -> str:
    """Return an index [..., layer, head] as the field writes it: L9H6, after the other indices."""
    if len(cell) < 2:
        return str([int(i) for i in cell])
    *first, layer, head = map(int, cell)
    return "".join(f"[{i}]" for i in first) + f"L{layer}H{head}"


def _message(model: str, name: str, moved: list[str], made_with: Mapping[str, Any]) -> str:
    card = FOLDER / model / f"{name}.json"
    was = json.loads(card.read_text()) if card.exists() else {}
    changed = {key: (old, made_with.get(key)) for key, old in was.items() if old != made_with.get(key)}
    provenance = [f"  {key}: {old} -> {new}" for key, (old, new) in changed.items()] or [
        "  the same in everything that is recorded"
    ]
    return "\n".join(
        [
            f"golden/{model}/{name}.npz differs from this run:",
            *moved,
            "made with, golden -> this run:",
            *provenance,
            "If the change is intended: pytest --force-regen, and say in the commit why it moved.",
        ]
    )
