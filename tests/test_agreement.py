"""How far imputations agree: each pair, in values, in text and in the figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from ablation.figures import of_sweeps
from ablation.figures.labels import NO_BREAK
from ablation.reports import report, summary
from ablation.studies import agreement, statistics
from tests.synthetic import CLEAN, WORDS, synthetic
from tests.test_figures import (  # noqa: F401 (fixture)
    IMPUTATIONS,
    assert_composed,
    decode,
    drawing_of,
    drawn,
    legend_of,
    random_result,
)

NAMES = ["zero", "mean", "scale:0.5"]


def pair_of(found: list[dict[str, Any]], *names: str) -> dict[str, Any]:
    (pair,) = (of for of in found if of["imputations"] == list(names))
    return pair


# ---- values


def test_every_pair_is_compared_and_the_worst_comes_first() -> None:
    result = synthetic(12, 4, NAMES)
    found = report.findings(result, WORDS.__getitem__)["agreement"]
    effects = result.grid(result.change("target_probability"))[0]
    assert [tuple(of["imputations"]) for of in sorted(found, key=lambda of: of["imputations"])] == [
        *(("mean", "scale:0.5"), ("zero", "mean"), ("zero", "scale:0.5")),
    ]
    for of in found:
        one, other = (effects[NAMES.index(name)] for name in of["imputations"])
        assert of["rank_correlation"] == pytest.approx(stats.spearmanr(one.ravel(), other.ravel()).statistic)
        layer, head = np.unravel_index(np.abs(other - one).argmax(), one.shape)
        assert (of["largest_difference"]["layer"], of["largest_difference"]["head"]) == (layer, head)
        assert list(of["largest_difference"]["changes"].values()) == [one[layer, head], other[layer, head]]
    assert [of["rank_correlation"] for of in found] == sorted(of["rank_correlation"] for of in found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def effects_of(*rows: list[float]) -> Any:
    """Effects of heads of one layer, [I, 1, H], among 20 heads."""
    return np.array([[[*row, *[1e-3] * (20 - len(row))]] for row in rows])


def test_head_is_disputed_if_it_is_strong_in_one_only() -> None:
    strong = [float(10 - i) for i in range(10)]  # the ten strongest are heads 0 to 9
    other = [*strong[:9], 0.0, 9.0]  # head 9 is not among them, head 10 is
    (pair,) = agreement.findings(["a", "b"], effects_of(strong, other))
    assert [of["head"] for of in pair["disagreements"]] == [10, 9], "the largest difference is first"


def test_head_is_disputed_if_signs_differ() -> None:
    (pair,) = agreement.findings(["a", "b"], effects_of([5.0, 4.0], [5.0, -4.0]))
    assert [of["head"] for of in pair["disagreements"]] == [1]
    assert pair["disagreements"][0]["changes"] == {"a": 4.0, "b": -4.0}


def test_heads_within_chance_do_not_matter() -> None:
    effects = effects_of([5.0, 4.0], [5.0, 4.0])
    differs = np.zeros(effects.shape, dtype=bool)
    differs[0, 0, :2] = True
    (pair,) = agreement.findings(["a", "b"], effects, differs)
    assert [of["head"] for of in pair["disagreements"]] == [0, 1]
    assert agreement.findings(["a", "b"], effects, ~differs & differs)[0]["disagreements"] == []


def test_pair_without_ranks_comes_last() -> None:
    effects = effects_of([5.0, 4.0], [0.0], [3.0, 4.0])
    effects[1] = 0
    found = agreement.findings(["a", "b", "c"], effects)
    assert [of["rank_correlation"] is None for of in found] == [False, True, True]
    assert agreement.lines(found, agreement.points)[0].startswith("agreement  least between a and c")


def test_missing_head_is_never_the_largest_difference() -> None:
    means = np.zeros((2, 3))
    means[0] = np.nan
    result = synthetic(2, 3, head_mean=means, target_probability=CLEAN["target_probability"])
    (pair,) = report.findings(result, WORDS.__getitem__)["agreement"]
    assert pair["largest_difference"] == {"layer": 1, "head": 0, "changes": {"zero": 0.0, "mean": 0.0}}
    assert pair["rank_correlation"] is None and pair["disagreements"] == []


def test_agreement_of_prompts_is_of_means_beyond_chance() -> None:
    result = synthetic(3, 4, NAMES, prompts=6)
    effects = statistics.effects(result, "target_probability")
    found = summary.findings(result)["agreement"]
    assert found == agreement.findings(NAMES, result.grid(effects.mean), result.grid(effects.differs))
    assert found != agreement.findings(NAMES, result.grid(effects.mean)), "chance makes a difference here"


# ---- text


def test_text_says_the_pair_that_agrees_least() -> None:
    result = synthetic(12, 4, NAMES)
    found = report.findings(result, WORDS.__getitem__)
    least, most = found["agreement"][0], found["agreement"][-1]
    text = report.render(found)
    assert f"agreement  least between {' and '.join(least['imputations'])} (rank correlation " in text
    assert f"most between {' and '.join(most['imputations'])} (rank correlation " in text
    far = least["largest_difference"]
    assert f"  L{far['layer']}H{far['head']} differs most: {least['imputations'][0]} " in text
    heads = least["disagreements"]
    assert f"; they disagree on {len(heads)} heads: L{heads[0]['layer']}H{heads[0]['head']}, " in text
    assert text.count("agreement  ") == 1


def test_one_imputation_has_nothing_to_agree_with() -> None:
    found = report.findings(synthetic(2, 3, ["zero"]), WORDS.__getitem__)
    assert found["agreement"] == [] and "agreement" not in report.render(found)


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ("all", "at every token"),
        ("last", "at the last token"),
        ("-1", "at the last token"),
        ("0", "at token 0"),
        ("0,3,-1", "at tokens 0, 3 and -1"),
        ("subject", "at the tokens of 'subject'"),
    ],
)
def test_reports_say_where_heads_are_ablated(positions: str, said: str) -> None:
    for prompts, findings in ((1, lambda r: report.findings(r, WORDS.__getitem__)), (3, summary.findings)):
        result = synthetic(2, 3, prompts=prompts)
        keys = tuple(key._replace(positions=positions) for key in result.ablations)
        placed = replace(result, ablations=keys)
        found = findings(placed)
        text = (report if prompts == 1 else summary).render(found)
        assert found["ablated"] == report.where(placed) == said
        assert (f"\nablated    {said}\n" in text) == (positions != "all")


# ---- figure


@pytest.mark.parametrize(
    ("grid", "prompts", "imputations"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.end_to_end)
            for case in (
                ((3, 4), 1, 3),
                ((1, 1), 1, 7),
                ((3, 4), 3, 7),
                ((12, 12), 1, 3),
                ((2, 64), 3, 5),
                ((40, 2), 1, 4),
                ((80, 64), 1, 7),
            )
        ),
    ],
)
def test_figures_of_any_imputations_have_no_overlaps(
    grid: tuple[int, int],
    prompts: int,
    imputations: int,
    tmp_path: Path,
    drawn: list[Figure],  # noqa: F811
) -> None:
    paths = of_sweeps.draw(random_result(*grid, prompts, imputations), tmp_path, title="capitals", decode=decode)
    assert (tmp_path / "agreement.png") in paths
    for figure in drawn:
        assert_composed(figure)


def test_matrix_shows_the_correlation_of_each_pair() -> None:
    result = random_result(12, 12, imputations=4)
    figure = drawing_of("agreement", result).figure
    effects = result.grid(result.change("target_probability"))[0]
    for row in range(1, 4):
        for column in range(row):
            r = agreement.rank_correlation(effects[row], effects[column])
            (text,) = (of for of in figure.axes[0].texts if of.get_position() == (column, row - 1))
            assert text.get_text() == f"{r:z.2f}".replace("-", "\N{MINUS SIGN}")
    assert len(figure.axes[0].texts) == 6
    assert legend_of(figure) == IMPUTATIONS[:4]


def test_listed_heads_show_their_effects() -> None:
    result = random_result(12, 12, prompts=5, imputations=3)
    effects = statistics.effects(result, "target_probability")
    mean, low = (100 * result.grid(of) for of in (effects.mean, effects.low))
    axes = drawing_of("agreement", result).figure.axes[1]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert 0 < len(names) <= 8
    cells = [tuple(map(int, name[1:].split("H"))) for name in names]
    points = [float(np.asarray(line.get_xdata())[0]) for line in axes.lines if line.get_label() in result.imputations]
    assert np.allclose(points, [mean[index, *cell] for cell in cells for index in range(3)])
    starts: Any = [of.get_segments()[0][0, 0] for of in axes.collections]  # type: ignore[attr-defined]
    assert np.allclose(starts, [low[index, *cell] for cell in cells for index in range(3)])


def test_finding_is_the_pair_that_agrees_least() -> None:
    result = random_result(12, 12, imputations=3)
    least = report.findings(result, decode)["agreement"][0]
    title = drawing_of("agreement", result).finding.replace(NO_BREAK, " ")
    assert title.startswith(f"{' and '.join(least['imputations'])} agree least: rank correlation ")
    head = least["disagreements"][0]
    assert f"L{head['layer']}H{head['head']} changes P(“␣Germany”) by " in title
