"""The text reports: labels of tokens and layers, and the findings of several prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.errors import InvalidResult
from ablation.reports import report, summary
from ablation.results import Result
from ablation.studies import statistics
from tests.synthetic import CLEAN, WORDS, synthetic, with_maps
from tests.test_cli import FILES, Run, run  # noqa: F401 (fixture)


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ({5: " a", 6: "a"}, ["' a'", "'a'"]),
        ({5: "\ufffd", 6: "a"}, ["'\ufffd' (token 5)", "'a'"]),
        ({5: "x\ufffd", 6: "x\ufffd"}, ["'x\ufffd' (token 5)", "'x\ufffd' (token 6)"]),
        ({5: "", 6: "\n"}, ["'' (token 5)", r"'\n'"]),
        ({5: "a", 6: "a", 7: "b"}, ["'a' (token 5)", "'a' (token 6)", "'b'"]),
    ],
)
def test_token_labels_tell_tokens_apart(texts: dict[int, str], labels: list[str]) -> None:
    assert list(report.token_labels(texts).values()) == labels


def test_ranges_join_consecutive_numbers() -> None:
    assert report._ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"


# ---- one prompt


def test_findings_of_one_prompt_are_those_of_its_maps() -> None:
    result = synthetic(3, 4)
    found = report.findings(result, WORDS.__getitem__)
    change, kept = result.grid(result.change("target_probability")[0]), result.grid(result.kept[0])
    assert found["clean"]["prediction"] == " Germany" and found["clean"]["target"]["ids"] == [0]
    assert found["clean"]["control"] == {"token": " France", "ids": [2], "probability": pytest.approx(0.01)}
    for index, name in enumerate(("zero", "mean")):
        of = found["imputations"][name]
        assert of["kept"] == kept[index].sum() == 12 - len(of["flips"])
        assert of["target_lowered"][0]["change"] == pytest.approx(change[index].min())
        assert of["target_raised"][0]["change"] == pytest.approx(change[index].max())
    assert json.loads(json.dumps(found)) == found


def test_target_of_several_tokens_is_named_by_its_text() -> None:
    result = synthetic(2, 3)
    prompt = replace(result.prompts[0], target=(0, 2), target_text=" Germany France")
    found = report.findings(replace(result, prompts=(prompt,)), WORDS.__getitem__)
    assert found["clean"]["target"]["token"] == " Germany France" and found["clean"]["target"]["ids"] == [0, 2]
    assert "P(' Germany France') = 30.0%, P(' France') = 1.0%" in report.render(found)
    unnamed = replace(prompt, target_text=None)
    found = report.findings(replace(result, prompts=(unnamed,)), WORDS.__getitem__)
    assert found["clean"]["target"]["token"] == " Germany France", "the texts of its tokens are joined"


# ---- several prompts


def of_several_prompts(prompts: int = 6) -> Result:
    """An invented result in which zero ablation of L1H2 lowers the target's probability by 20 pp in each prompt."""
    result = synthetic(2, 3, prompts=prompts)
    target = result.grid(result.ablated["target_probability"])
    target[:, 0, 1, 2] = CLEAN["target_probability"] - 0.2
    result = with_maps(result, target_probability=target)
    groups = ["one", "other"] * prompts
    named = [replace(prompt, group=name) for prompt, name in zip(result.prompts, groups, strict=False)]
    return replace(result, prompts=tuple(named))


def test_summary_ranks_heads_by_their_mean_change() -> None:
    result = of_several_prompts()
    found = summary.findings(result, strongest=4)
    zero = found["imputations"]["zero"]
    assert zero["strongest"][0]["head"] == "L1H2" and len(zero["strongest"]) == 4
    sizes = [abs(head["target_probability"]["mean"]) for head in zero["strongest"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == pytest.approx(0.2)
    index = [key.label for key in result.ablations].index("L1H2")
    for metric in summary.SHOWN:
        effects = statistics.effects(result, metric)
        shown = zero["strongest"][0][metric]
        assert (shown["mean"], shown["low"], shown["high"]) == (
            effects.mean[index],
            effects.low[index],
            effects.high[index],
        )
    assert zero["strongest"][0]["kept"]["count"] == result.kept[:, index].sum()


def test_summary_counts_runs_and_prompts() -> None:
    result = of_several_prompts()
    found = summary.findings(result)
    assert (found["prompts"], found["heads"], found["layers"]) == (6, 6, 2)
    assert found["clean"]["correct"]["count"] == 6 and found["clean"]["target_probability"] == pytest.approx(0.3)
    for index, name in enumerate(("zero", "mean")):
        of = found["imputations"][name]
        assert of["runs"] == 36 and of["kept"] == result.grid(result.kept)[:, index].sum()
        assert of["correct"] == result.grid(result.ablated["correct"])[:, index].sum()
    assert {name: of["prompts"] for name, of in found["groups"].items()} == {"one": 3, "other": 3}
    assert {of["strongest"]["zero"]["head"] for of in found["groups"].values()} == {"L1H2"}
    assert found["head_means"]["mean"] == pytest.approx(result.head_mean.mean())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_summary_of_a_hybrid_leaves_out_missing_heads() -> None:
    head_mean = np.full((2, 3), 0.1)
    head_mean[0, 1:] = np.nan
    found = summary.findings(synthetic(2, 3, prompts=3, head_mean=head_mean))
    assert found["heads"] == 4 and found["imputations"]["zero"]["runs"] == 12
    assert len(found["imputations"]["zero"]["strongest"]) == 4


def test_summary_is_rendered_with_intervals() -> None:
    text = summary.render(summary.findings(of_several_prompts()))
    assert "6 of 6 correct [61.0%, 100.0%]; on average P(target) = 30.0%, P(control) = 1.0%" in text
    assert re.search(r"^  L1H2 +-20\.00 \[-20\.00, -20\.00\] ", text, re.M)
    assert "  one    3 of 3 correct; zero L1H2 -20.00" in text
    assert text.endswith("With 6 prompts, bootstrap intervals are too short.")
    many = summary.render(summary.findings(synthetic(2, 3, prompts=10)))
    assert many.endswith("corrected for the number of heads; the false discovery rate is.")


def test_summary_of_groups_of_one_prompt_has_no_interval() -> None:
    found = summary.findings(of_several_prompts(prompts=2))
    strongest = found["groups"]["one"]["strongest"]["zero"]["target_probability"]
    assert strongest["low"] is strongest["high"] is strongest["adjusted_p"] is None
    assert "  one    1 of 1 correct; zero L1H2 -20.00" in summary.render(found)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_command_reports_several_prompts(run: Run, tmp_path: Path) -> None:  # noqa: F811
    cities = ("Berlin", "Paris", "Rome")
    records = [{"prompt": f"{city} is the capital of", "target": " Germany", "group": city[0]} for city in cities]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = ["--prompts", str(tmp_path / "p.jsonl"), "--out", "out"]
    status, out, err = run(*arguments)
    assert (status, err) == (0, "") and out.startswith("capitals: 3 prompts\n\nclean      1 of 3 correct [")
    assert "of 432 runs keep the prediction" in out and "are in out" in out
    assert {path.name for path in Path("out").iterdir()} == FILES
    found = json.loads(run(*arguments, "--json")[1])
    assert found["prompts"] == 3 and set(found["groups"]) == {"B", "P", "R"}
    assert found["provenance"]["asked"]["prompts"] == 3


def test_findings_of_a_result_of_the_wrong_kind_are_refused() -> None:
    one, two = synthetic(2, 3), synthetic(2, 3, prompts=2)
    text = replace(one, clean={"loss": np.ones(1)}, ablated={"loss": np.ones((1, 12))})
    cases: list[tuple[Result, Callable[[Result], Any], str]] = [
        (two, lambda of: report.findings(of, str), "of one prompt, not of 2 prompts"),
        (text, lambda of: report.findings(of, str), "of one prompt, not of a text"),
        (text, summary.findings, "this is a result of a text"),
        (two, summary.findings_of_text, "this is a result of prompts, not of a text"),
    ]
    for result, find, reason in cases:
        with pytest.raises(InvalidResult, match=reason):
            find(result)
