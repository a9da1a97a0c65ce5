"""`ablation curve`: where the order comes from, what is taken over from a result, and what is said about it."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ablation.commands.curve import _take_over
from ablation.edits import Ablation
from ablation.engine import run_sequential
from ablation.models import LoadedModel
from ablation.results import AblationKey, Result
from ablation.studies.curves import Curve, random_orders, rank_heads
from ablation.studies.sets import greedy_order
from tests.comparing import ATOL
from tests.test_checkpoint import assert_same_bits
from tests.test_set_commands import CITIES, RECORDS, Run, files, odd, result, rows, run, swept_cities, write_cities  # noqa: F401
from tests.test_study import ENVIRONMENT, launcher


def test_curve_takes_the_order_of_a_result(run: Run, result: str, swept_cities: Result) -> None:
    status, out, err = run("curve", result, "--by", "kl", "--k", "2,1", "--random", "2", "--seed", "3", "--out", "out")
    assert (status, err) == (0, "") and files("out") >= {"sweep.npz", "sweep.json", "curve.csv", "figure.png"}
    found, ranked = Result.load("out"), rank_heads(swept_cities, "kl")
    curve = Curve.of(found)
    assert (curve.ks, curve.imputations) == ((1, 2), ("zero",)) and curve.random["layers"]["kl"].shape == (1, 2, 2)
    assert [of.prompt for of in found.prompts] == [record["prompt"] for record in RECORDS]
    assert [of.target_text for of in found.prompts] == list(CITIES.values())
    sets = {key.name: key.heads for key in found.ablations}
    assert (sets["ordered 1"], sets["ordered 2"]) == (ranked[:1], ranked[:2])
    everyone = [key.heads[0] for key in swept_cities.ablations if key.imputation == "zero"]
    for of in random_orders(ranked[:2], everyone, 2, seed=3):
        assert sets[of.name(2)] == of.heads
    first = swept_cities.ablated["kl"][:, swept_cities.ablations.index(AblationKey(ranked[:1], "zero"))]
    assert curve.ordered["kl"][0, 0] == pytest.approx(first.mean(), abs=ATOL["float32"])
    assert "the KL divergence by zero imputation in swept, on 4 prompts" in out
    assert "ablated on the same 4 prompts, which flatters the order" in out
    table = [row for row in rows("out/curve.csv") if (row["metric"], row["order"]) == ("kl", "ordered")]
    assert [float(row["value"]) for row in table] == pytest.approx(curve.ordered["kl"][0].tolist())


def test_curve_takes_over_how_the_result_was_made(run: Run, capitals: LoadedModel) -> None:
    sweep = ["sweep", "--prompt", "Rome is the capital of", "--imputation", "mean", "--positions", "0,-1"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ablation.figures.of_sweeps.draw", lambda *_, **__: None)
        patched.setattr("ablation.reports.html_report.write_html", lambda _, path, **__: path.write_text(""))
        assert run(*sweep, "--dtype", "float64", "--out", "swept64")[0] == 0
    status, out, err = run("curve", "swept64", "--k", "1", "--random", "0", "--out", "out")
    assert (status, err) == (0, "") and "by mean imputation in swept64, on 1 prompt" in out
    found = Result.load("out")
    assert found.provenance["dtype"] == "float64" and found.imputations == ("mean",)
    assert {key.positions for key in found.ablations} == {"0,-1"} and found.prompts[0].target_text == " Italy"
    given = ["--positions", "last", "--imputation", "zero", "--dtype", "float32", "--prompts", "cities.jsonl"]
    status, out, err = run("curve", "swept64", *given, "--k", "1", "--random", "0", "--out", "other")
    other = Result.load("other")
    assert status == 0 and "ranked by a result of other weights than capitals" in err
    assert other.provenance["dtype"] == "float32" and other.imputations == ("zero",) and len(other.prompts) == 4
    assert {key.positions for key in other.ablations} == {"last"}
    assert "by mean imputation in swept64, on 1 prompt\n" in out, "the result has no other imputation"
    assert "ablated on 4 prompts, of which 1 is the same" in out


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["--prompt", "Quito is the capital of"], "ablated on 1 other prompt"),
        (["--prompt", "Rome is the capital of", "--target", "Italy"], "ablated on the same prompt, which flatters"),
        ([], "ablated on the same 4 prompts, which flatters"),
        (["--split", "0.5"], "ablated on 2 other prompts"),
        (["--split", "0.5", "--prompts", "cities.jsonl"], "ablated on 2 other prompts"),
    ],
)
def test_curve_says_on_which_prompts_heads_were_ranked(run: Run, result: str, prompts: list[str], message: str) -> None:
    status, out, _ = run("curve", result, *prompts, "--k", "1", "--random", "0")
    ranked = "on 2 prompts" if "--split" in prompts else "on 4 prompts"
    assert status == 0 and f"{message}" in out and f"in swept, {ranked}\n" in out


def test_curve_without_texts_does_not_claim_other_prompts(run: Run, odd: Path) -> None:
    status, out, _ = run("curve", str(odd / "without-texts"), "--prompts", "cities.jsonl", "--k", "1", "--random", "0")
    assert status == 0 and "ablated on 4 prompts; the result has no texts that tell" in out


@pytest.mark.parametrize("seed", ["0", "5"])
def test_split_ranks_and_ablates_on_different_prompts(run: Run, result: str, swept_cities: Result, seed: str) -> None:
    arguments = ["curve", result, "--split", "0.25", "--seed", seed, "--k", "12", "--random", "0", "--out", "out"]
    assert run(*arguments)[0] == 0
    found = Result.load("out")
    evaluated = [of.prompt for of in found.prompts]
    texts = [record["prompt"] for record in RECORDS]
    ranked = [number for number, text in enumerate(texts) if text not in evaluated]
    assert len(ranked) == 1 and len(evaluated) == 3
    assert found.ablations[0].heads == rank_heads(swept_cities, prompts=ranked)[:12] != rank_heads(swept_cities)[:12]


def test_curve_takes_the_order_of_a_file(run: Run) -> None:
    Path("order.txt").write_text("L5H3, L0H8\nL0H9 L5H3\n", encoding="utf-8-sig")
    status, out, err = run("curve", "order.txt", "--random", "1", "--out", "out")
    assert (status, err) == (0, "") and "order      3 heads of order.txt\n" in out and "flatters" not in out
    found = Result.load("out")
    ordered = [key.heads for key in found.ablations if key.name.startswith("ordered")]
    assert ordered == [((5, 3),), ((5, 3), (0, 8)), ((5, 3), (0, 8), (0, 9))]


def test_greedy_curve_is_the_greedy_order(run: Run, capitals: LoadedModel) -> None:
    arguments = ["curve", "--greedy", "--by", "logit-difference", "--k", "1,2", "--random", "1", "--out", "out"]
    status, out, err = run(*arguments)
    assert (status, err) == (0, "") and "ranked again at each head, on 1 prompt" in out
    question = {"prompt": "Berlin is the capital of", "target": " Germany", "control": " France"}
    order = greedy_order(capitals, [question], 2, by="logit-difference")
    ordered = [set(key.heads) for key in Result.load("out").ablations if key.name.startswith("ordered")]
    assert ordered == [set(order[:1]), set(order)]


def test_curve_prints_the_findings_as_json(run: Run, result: str) -> None:
    status, out, _ = run("curve", result, "--k", "1,144", "--random", "3", "--json", "--out", "out")
    found, curve = json.loads(out), Curve.of(Result.load("out"))
    assert status == 0 and found["ks"] == [1, 144] and found["prompts"] == 4
    of = found["imputations"]["zero"]
    assert of["metrics"]["kl"]["ordered"]["mean"] == curve.ordered["kl"][0].tolist()
    assert of["metrics"]["kl"]["uniform"]["as_harmful"][1] == 1 == of["metrics"]["kl"]["layers"]["as_harmful"][1]
    half = of["half"]["ordered"]
    assert half == next(k for k, value in zip((1, 144), curve.ordered["correct"][0], strict=True) if value <= 0.5)


def test_result_of_a_curve_can_be_compared(run: Run, result: str) -> None:
    for name in ("one", "two"):
        assert run("curve", result, "--k", "1,2", "--random", "1", "--out", name)[0] == 0
    assert_same_bits(Result.load("one"), Result.load("two"))
    status, out, err = run("diff", "one", "two")
    assert (status, err) == (0, "") and out
    for name, heads in (("three", "L0H8"), ("four", "L0H9")):
        assert run("set", heads, "L0", "--imputation", "zero", "--out", name)[0] == 0
    status, out, err = run("diff", "three", "four")
    assert status == 0 and out


def test_curve_takes_over_groups_and_chat_of_prompts(swept_cities: Result) -> None:
    """The model has no chat template, so only what is asked is looked at."""
    prompts = tuple(replace(of, group=of.prompt) for of in swept_cities.prompts)
    made = {**swept_cities.provenance, "chat": [True, False, False, True], "for_each_prompt": ["chat"]}
    result = replace(swept_cities, prompts=prompts, provenance=made)
    names = ("model", "dtype", "positions", "imputation", "prompt", "prompts", "target", "control")
    arguments = argparse.Namespace(**dict.fromkeys(names), chat=False, order="swept")
    rows = _take_over(arguments, result)
    assert [row.question.chat for row in rows] == [True, False, False, True]
    assert [row.question.group for row in rows] == [row.question.prompt for row in rows]
    assert [(row.question.target, row.question.control) for row in rows] == [
        (of.target_text, of.control_text) for of in prompts
    ]
    assert (arguments.model, arguments.imputation, arguments.positions) == ("capitals", ["zero"], "all")


def test_curve_of_targets_of_several_tokens_is_one_run_each(run: Run, capitals: LoadedModel) -> None:
    record = {"prompt": "Berlin is the capital of", "target": " the country", "control": " Germany"}
    Path("one.jsonl").write_text(json.dumps(record))
    Path("order.txt").write_text("L3H1 L0H8")
    arguments = ["curve", "order.txt", "--prompts", "one.jsonl", "--k", "1,2", "--random", "0", "--out", "out"]
    assert run(*arguments)[0] == 0
    found = Result.load("out")
    ids, target, control = (capitals.tokenizer.encode(record[name]) for name in ("prompt", "target", "control"))
    same = run_sequential(capitals.model, ids, [Ablation(key.heads) for key in found.ablations], target, control)
    assert len(target) == 2
    for metric in ("target_log_probability", "logit_difference", "kl"):
        np.testing.assert_allclose(found.ablated[metric], same.ablated[metric], rtol=0, atol=ATOL["float32"])


def test_greedy_split_ranks_on_the_other_prompts(run: Run, capitals: LoadedModel) -> None:
    arguments = ["curve", "--greedy", "--prompts", "cities.jsonl", "--split", "0.5", "--k", "1", "--random", "0"]
    status, out, _ = run(*arguments, "--out", "out")
    assert status == 0 and "on 2 prompts\n" in out and "ablated on 2 other prompts" in out
    found = Result.load("out")
    evaluated = {of.prompt for of in found.prompts}
    ranked = [record for record in RECORDS if record["prompt"] not in evaluated]
    assert len(ranked) == 2 and found.ablations[0].heads == greedy_order(capitals, ranked, 1)


@pytest.mark.end_to_end
def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    write_cities(tmp_path)
    (tmp_path / "order.txt").write_text("L0H8 L3H1 L0H9")
    arguments = ["-m", "ablation", "curve", "order.txt", "--prompts", "cities.jsonl", "--random", "2", "--out"]
    printed = []
    for out, start in (("alone", [sys.executable]), ("shared", launcher(2))):
        command = [*start, *arguments, out]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.replace(out, "out"))
    assert_same_bits(*(Result.load(tmp_path / out) for out in ("alone", "shared")))
    assert printed[0] == printed[1]
    assert (tmp_path / "alone/curve.csv").read_bytes() == (tmp_path / "shared/curve.csv").read_bytes()
