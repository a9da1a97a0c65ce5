"""The figure of named sets of heads: its points, the finding in its title, and no overlapping texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ablation.errors import InvalidResult
from ablation.figures.labels import MINUS, NO_BREAK
from ablation.figures.of_pairs import draw_pairs
from ablation.figures.of_sets import LABEL, draw_sets
from ablation.results import LOSS, AblationKey, Result
from ablation.studies import statistics
from tests.synthetic import synthetic_sets
from tests.test_figures import assert_composed, decode, drawn, legend_of, names_of_heads, title_of  # noqa: F401 (fixture)

SEVEN = ("zero", "mean", "channel-mean", "reference-mean", "reference-mean-by-position", "resample", "scale:0.5")


def sets_result(
    names: Sequence[str], prompts: int = 1, imputations: Sequence[str] = ("zero",), **arrays: Any
) -> Result:
    """A result of sets; the first has one head, the next has two."""
    heads = [tuple((layer, layer) for layer in range(number + 1)) for number in range(len(names))]
    keys = [
        AblationKey(of if name else (), imputation, name=name)
        for imputation in imputations
        for name, of in zip(names, heads, strict=True)
    ]
    return synthetic_sets(keys, prompts, **arrays)


def title(figure: Figure) -> str:
    return " ".join(title_of(figure)).replace(NO_BREAK, " ")


def test_sets_are_points_with_intervals(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811 (fixture)
    flips = np.array([[0, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]])
    result = sets_result(["L9H6", "L9", ""], prompts=4, argmax=flips)
    assert draw_sets(result, tmp_path, "gpt2", decode) == tmp_path / "sets.png"
    (figure,) = drawn
    assert_composed(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["L9H6", "L9", "no head"]
    for axes, metric, factor in zip(figure.axes, ("target_probability", "kl"), (100, 1), strict=False):
        change = factor * result.change(metric)
        assert np.allclose(np.asarray(axes.lines[-1].get_xdata()), change.mean(axis=0))
        ends = np.array([path.vertices[:, 0] for path in axes.collections[0].get_paths()])
        assert np.allclose(ends, np.stack(statistics.bootstrap_interval(change), axis=1))
    assert np.asarray(figure.axes[2].lines[-1].get_xdata()).tolist() == [0, 2, 1]
    assert figure.axes[2].get_xlabel() == "changed predictions, of 4"
    assert legend_of(figure) == ["95% interval over 4 prompts, not corrected"]
    assert "2 of 3 sets change the prediction of at least one of 4 prompts" in title(figure)


@pytest.mark.end_to_end
def test_other_predictions_of_one_prompt_are_written(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    result = sets_result(
        ["L0", "L1", "L2", "L3"],
        imputations=("zero", "mean"),
        argmax=[[0, 1, 2, 1, 0, 0, 2, 2]],
        target_probability=[[0.3, 0.3, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]],
        kl=0.5,
    )
    draw_sets(result, tmp_path, "gpt2", decode)
    assert [text.get_text() for text in names_of_heads(drawn[0])] == [
        "",
        "“␣the” (zero)",
        "“␣France”",
        "“␣the” (zero), “␣France” (mean)",
    ]
    assert title(drawn[0]) == (
        f"L2 (zero) changes P(“␣Germany”) most, by {MINUS}10 pp, and KL is 0.5 nats; 5 of 8 ablations change the "
        "prediction “␣Germany” gpt2"
    )
    assert_composed(drawn[0])


@pytest.mark.end_to_end
def test_title_of_sets_that_change_nothing(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811 (fixture)
    for names, said in (([""], "the only set keeps the prediction"), (["a", ""], "0 of 2 sets change the prediction")):
        draw_sets(sets_result(names, target_probability=0.3, kl=0, argmax=0), tmp_path, "gpt2", decode)
        assert title(drawn[-1]) == f"No set changes P(“␣Germany”); {said} “␣Germany” gpt2"
        assert [text.get_text() for text in names_of_heads(drawn[-1])] == ["no change"] * 2
        assert_composed(drawn[-1])


@pytest.mark.end_to_end
def test_sets_at_several_positions_are_told_apart(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811 (fixture)
    result = sets_result(["L9", "L9"])
    keys = tuple(key._replace(positions=at) for key, at in zip(result.ablations, ("all", "-1"), strict=True))
    draw_sets(replace(result, ablations=keys), tmp_path, "gpt2", decode)
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["L9 at all", "L9 at -1"]


@pytest.mark.end_to_end
def test_set_without_an_imputation_has_no_point(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811 (fixture)
    result = sets_result(["L1", "L2"], imputations=("zero", "mean"))
    columns = {name: values[:, :3] for name, values in result.ablated.items()}
    draw_sets(replace(result, ablations=result.ablations[:3], ablated=columns), tmp_path, "gpt2", decode)
    assert np.isnan(np.asarray(drawn[0].axes[0].lines[-1].get_xdata(), dtype=float)).tolist() == [False, True]


SIZES: dict[str, dict[str, Any]] = {
    "one set": {"names": ["L9H6 L9H9"]},
    "one set, prompts": {"names": ["L9H6 L9H9"], "prompts": 2, "argmax": 1},
    "long names": {
        "names": [" ".join(f"L{n}H{n}" for n in range(40)), "日本語 " * 12, "ελληνικά", "", "x$y$"],
        "imputations": SEVEN,
        "prompts": 3,
    },
    "tokens": {"names": [f"L{n}" for n in range(12)], "imputations": SEVEN, "argmax": [n % 5 % 3 for n in range(84)]},
    "60 sets": {"names": [f"L{n}" for n in range(60)], "imputations": SEVEN, "prompts": 55},
    "60 sets, one prompt": {"names": [f"L{n}" for n in range(60)]},
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", SIZES)
def test_sets_of_every_size_have_no_overlaps(name: str, tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    draw_sets(sets_result(**SIZES[name]), tmp_path, "gpt2 $x$ 日本: " + "word " * 60, decode)
    assert_composed(drawn[0])
    names = drawn[0].axes[0].get_yticklabels()
    assert all(label.get_window_extent().width <= (LABEL + 0.05) * drawn[0].dpi for label in names)


@pytest.mark.parametrize("draw", [draw_sets, draw_pairs])
def test_texts_have_no_figure_of_sets(draw: Any, tmp_path: Path) -> None:
    result = sets_result(["a"])
    text = replace(result, clean={LOSS: np.zeros(1)}, ablated={LOSS: np.zeros((1, 1))})
    with pytest.raises(InvalidResult):
        draw(text, tmp_path, "x", decode)
    assert not list(tmp_path.iterdir())
