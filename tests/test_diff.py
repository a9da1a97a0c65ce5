"""`ablation diff`: what moved between two results, and the exit status that a CI uses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.cli import main
from ablation.errors import InvalidResult
from ablation.reports import diff
from ablation.results import Result
from tests.synthetic import synthetic


def result_of(prompts: int = 3, rounding: float | None = 1e-4) -> Result:
    """A result of 3 x 4 heads, in which no prediction is close."""
    result = synthetic(3, 4, prompts=prompts)
    clear = {"margin": np.full(prompts, 5.0)}, {"margin": np.full((prompts, len(result.ablations)), 5.0)}
    return replace(
        result,
        clean={**result.clean, **clear[0]},
        ablated={**result.ablated, **clear[1]},
        provenance={} if rounding is None else {"rounding": rounding, "torch": "1"},
    )


def moved(result: Result, metric: str, by: float, prompt: int = 1, ablation: int = 5) -> Result:
    """The result with one value of an ablated run changed."""
    values = result.ablated[metric].copy()
    values[prompt, ablation] += np.asarray(by).astype(values.dtype)
    return replace(result, ablated={**result.ablated, metric: values})


def found(one: Result, other: Result, **options: Any) -> dict[str, Any]:
    return diff.findings(diff.matched(one, other), **options)


def test_result_agrees_with_itself() -> None:
    same = found(result_of(), result_of())
    assert not same["differs"] and same["moved"] == same["clean_moved"] == 0 and not same["flips"]
    assert same["correlation"] == pytest.approx(1) and same["made_with"] == {}


@pytest.mark.parametrize("metric", diff.IN_NATS[:2])
def test_log_probability_that_moves_beyond_rounding_differs(metric: str) -> None:
    one = result_of()
    assert not found(one, moved(one, metric, 1.9e-4))["differs"]  # both results have been rounded
    far = found(one, moved(one, metric, 2.1e-4))
    assert far["differs"] and far["moved"] == 1
    place, key = far["worst"][0], one.ablations[5]
    assert (place["prompt"], place["heads"], place["imputation"]) == ("prompt 1", key.label, key.imputation)
    assert not found(one, moved(one, metric, 2.1e-4), tolerance=1e-3)["differs"]


def test_rounding_grows_with_the_tokens_of_a_continuation() -> None:
    one = result_of()
    longer = replace(one, prompts=tuple(replace(p, target=(1, 2, 3)) for p in one.prompts))
    assert not found(longer, moved(longer, "target_log_probability", 5e-4))["differs"]
    assert found(longer, moved(longer, "target_log_probability", 7e-4))["differs"]


def test_differing_prediction_counts_unless_rounding_decides() -> None:
    one = result_of()
    other = moved(one, "argmax", 7)
    flips = found(one, other)["flips"]
    assert len(flips) == 1 and flips[0]["second"] == flips[0]["first"] + 7
    near = {"margin": np.full_like(one.ablated["margin"], 0.9e-4)}
    tied = [replace(result, ablated={**result.ablated, **near}) for result in (one, other)]
    assert not found(*tied)["flips"]


def test_only_common_prompts_and_ablations_are_compared() -> None:
    one = result_of(4)
    order = [2, 0, 3]
    parts = [one.of_prompt(i) for i in order]
    pair = diff.matched(one, Result.joined(parts))
    assert (
        [p.prompt for p in pair.one.prompts]
        == [p.prompt for p in pair.other.prompts]
        == ["prompt 0", "prompt 2", "prompt 3"]
    )
    assert pair.only_one == (1, 0) and pair.only_other == (0, 0)
    assert not diff.findings(pair)["differs"]
    with pytest.raises(InvalidResult, match="no prompt in common"):
        diff.matched(one, replace(one, prompts=tuple(replace(p, prompt="other") for p in one.prompts)))


def test_what_differs_in_the_provenance_is_named() -> None:
    one = result_of()
    other = replace(one, provenance={**one.provenance, "torch": "2", "rounding": 2e-4})
    assert found(one, other)["made_with"] == {"torch": ["1", "2"]}


def test_command_exits_with_one_if_results_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = result_of()
    one.save(tmp_path / "one")
    moved(one, "target_log_probability", 0.5).save(tmp_path / "other")
    folders = [str(tmp_path / "one"), str(tmp_path / "other")]
    assert main(["diff", folders[0], folders[0]]) == 0
    assert capsys.readouterr().out.endswith("The results agree, in 24 ablations of 3 prompts.\n")
    assert main(["diff", *folders]) == 1
    assert "0.5" in capsys.readouterr().out
    assert main(["diff", *folders, "--tolerance", "0.6"]) == 0
    capsys.readouterr()
    assert main(["diff", *folders, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["moved"] == 1
    assert main(["diff", folders[0], str(tmp_path / "nothing")]) == 2


def test_result_without_rounding_needs_a_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result_of(rounding=None).save(tmp_path)
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "pass --tolerance" in capsys.readouterr().err
    assert main(["diff", str(tmp_path), str(tmp_path), "--tolerance", "0"]) == 0


@pytest.mark.parametrize("tolerance", ["-1", "nan", "inf", "much"])
def test_impossible_tolerance_is_refused(tolerance: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["diff", "a", "b", "--tolerance", tolerance])
    assert "it is a number of nats, at least 0" in capsys.readouterr().err


def test_figure_is_drawn_to_a_new_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = result_of()
    one.save(tmp_path / "one")
    moved(one, "target_log_probability", 0.5).save(tmp_path / "other")
    arguments = ["diff", str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(tmp_path / "diff.png")]
    assert main(arguments) == 1
    drawn = (tmp_path / "diff.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(arguments) == 2 and "it exists already" in capsys.readouterr().err
    assert (tmp_path / "diff.png").read_bytes() == drawn
    assert main([*arguments[:-1], str(tmp_path / "diff.txt")]) == 2
    assert "does not end with .png" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "nowhere" / "diff.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_diff_does_not_import_torch(tmp_path: Path) -> None:
    result_of().save(tmp_path)
    code = (
        "import sys; from ablation.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "diff", str(tmp_path), str(tmp_path)], check=True)


def test_losses_on_a_text_are_compared() -> None:
    one = result_of()
    text = replace(one, clean={"loss": np.full(3, 2.0)}, ablated={"loss": np.full((3, len(one.ablations)), 2.1)})
    assert not found(text, text)["differs"] and found(text, text)["compared"] == "loss"
    assert found(text, moved(text, "loss", 2.1e-4))["moved"] == 1
    with pytest.raises(InvalidResult, match="one result is of a text"):
        found(text, one)


def test_ablations_at_other_positions_are_others() -> None:
    one = synthetic(2, 3)
    last = replace(one, ablations=tuple(key._replace(positions="last") for key in one.ablations))
    with pytest.raises(InvalidResult, match="no ablation in common"):
        diff.matched(one, last)
    ablated = {name: values + (name == "target_log_probability") for name, values in last.ablated.items()}
    found = diff.findings(diff.matched(last, replace(last, ablated=ablated)), 0.1)
    assert found["moved"] == 12 and {cell["positions"] for cell in found["worst"]} == {"last"}
    assert "L0H0, zero at last, 'prompt 0'" in diff.render(found, "one", "other")


def test_counts_of_one_are_singular() -> None:
    one = synthetic(1, 1, imputations=["zero"])
    text = diff.render(diff.findings(diff.matched(one, one), 0.1), "one", "other")
    assert "0 of 1 ablated run, and 0 of 1 clean run, moved" in text and "in 1 ablation of 1 prompt." in text
