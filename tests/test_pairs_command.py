"""`ablation pairs`: which pairs are run, and what is said about them."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import json

import numpy as np
import pytest

from ablation.results import Result
from ablation.studies.pairs import Pairs, strongest_heads
from tests.test_set_commands import Run, files, rows, run, swept_cities  # noqa: F401


def test_pairs_of_the_strongest_heads(run: Run, swept_cities: Result) -> None:
    arguments = ["pairs", "--prompts", "cities.jsonl", "--top", "3", "--by", "margin", "--pairs-of", "L5H5"]
    status, out, err = run(*arguments, "--out", "out")
    assert (status, err) == (0, "") and files("out") >= {"sweep.npz", "sweep.json", "pairs.csv", "figure.png"}
    pairs, top = Pairs.of(Result.load("out")), strongest_heads(swept_cities, 3, "margin")
    assert set(top) != set(strongest_heads(swept_cities, 3))
    assert set(pairs.heads) == {*top, (5, 5)} and all((5, 5) in pair for pair in pairs.pairs)
    assert out.startswith("capitals: 4 prompts\n") and "3 pairs of 4 heads" in out
    table = [row for row in rows("out/pairs.csv") if row["metric"] == "target_probability"]
    assert [float(row["interaction"]) for row in table] == pytest.approx(
        pairs.interaction("target_probability").mean(axis=0).tolist()
    )
    assert {(row["lower"], row["upper"]) for row in table} == {
        tuple(f"L{layer}H{head}" for layer, head in pair) for pair in pairs.pairs
    }


def test_pairs_prints_the_findings_as_json(run: Run) -> None:
    status, out, _ = run("pairs", "--pairs-of", "L0H8", "--json", "--out", "out")
    found, pairs = json.loads(out), Pairs.of(Result.load("out"))
    assert status == 0 and len(pairs.pairs) == 143
    of = found["imputations"]["zero"]
    assert (of["pairs"], of["heads"], len(of["strongest"])) == (143, 144, 10)
    mean = pairs.interaction("target_probability").mean(axis=0)
    best = int(np.abs(mean).argmax())
    assert of["strongest"][0]["interaction"]["mean"] == pytest.approx(mean[best])
    assert of["strongest"][0]["effect"] == pytest.approx(pairs.effect("target_probability")[0, best])
    assert (of["compensating"]["count"], of["restoring"]) == (pairs.compensates.sum(), pairs.restores.sum())
