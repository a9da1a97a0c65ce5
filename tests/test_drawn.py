"""What figures show of several prompts: means, intervals, shares, single prompts; and the texts within figures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ablation.figures import of_sweeps
from ablation.figures.drawn import Drawn
from ablation.figures.labels import MINUS, NO_BREAK, STYLE, add_title, name_heads, width, wrapped
from ablation.reports import summary
from ablation.studies import statistics
from tests.test_figures import (  # noqa: F401 (fixture)
    TITLE,
    decode,
    drawing_of,
    drawn,
    legend_of,
    random_result,
    title_of,
)


def test_continuation_of_several_tokens_is_named() -> None:
    result = random_result(3, 4)
    several = replace(result.prompts[0], target=(0, 1), target_text=" Ger many")
    assert Drawn(replace(result, prompts=(several,)), decode).target == "target “␣Ger␣many”"
    assert Drawn(replace(result, prompts=(replace(several, target_text=None),)), decode).target == (
        "target “␣Germany␣the”"
    )


def test_share_of_prompts_that_flip_is_drawn() -> None:
    result = random_result(12, 12, prompts=5)
    drawing = drawing_of("margins", result)
    shares = 100 * (1 - result.grid(result.kept).mean(axis=0))
    for (axes, _), values in zip(drawing.maps[2:], shares, strict=True):
        assert np.allclose(np.asarray(axes.images[0].get_array()), values)
        low, high = axes.images[0].get_clim()
        assert low == 0 and high == pytest.approx(shares.max())
    assert "the argmax is not" not in " ".join(legend_of(drawing.figure))


def test_dots_mark_the_heads_that_the_report_counts() -> None:
    """More intervals exclude 0 than means differ from 0: intervals are not corrected for the number of heads."""
    result = random_result(12, 12, prompts=20)
    drawing = drawing_of("sensitivity", result)
    effects = [statistics.effects(result, f"{name}_probability") for name in ("target", "control")]
    assert effects[0].excludes_zero.sum() > effects[0].differs.sum() > 0
    expected = np.concatenate([result.grid(of.differs) for of in effects])
    for (axes, _), cells in zip(drawing.maps, expected, strict=True):
        dots: Any = [line.get_xydata() for line in axes.lines if line.get_marker() == "o"]
        found = {(round(y - 0.01), round(x - 0.01)) for xy in dots for x, y in xy}
        assert found == {tuple(cell) for cell in np.argwhere(cells)}
    assert "the mean differs from 0 (false discovery rate 5%)" in legend_of(drawing.figure)
    counted = summary.findings(result)["imputations"]
    assert [int(cells.sum()) for cells in expected[:2]] == [of["heads_that_differ"] for of in counted.values()]


def test_finding_names_a_head_that_differs_from_zero() -> None:
    """The largest mean may come from one prompt; the finding names the largest one that is beyond chance."""
    result = random_result(3, 4, prompts=20)
    target = result.ablated["target_probability"]
    target[:] = 0.5 + 1e-3 * np.random.RandomState(1).randn(*target.shape)
    target[:, 5] += 0.1
    target[0, 7] += 10
    line = Drawn(result, decode).strongest_line()
    assert line.startswith("L1H1 (zero) changes P(target) most, by +10") and line.endswith(" on average")
    target[:, 5] -= 0.1
    assert "beyond chance" in Drawn(result, decode).strongest_line()


def test_intervals_have_signs_and_are_not_broken() -> None:
    result = random_result(3, 4, prompts=20)
    result.ablated["target_probability"][:, 5] -= 0.2
    with of_sweeps.style.context(["default", STYLE]):
        drawings = [drawing_of(name, result) for name in ("sensitivity", "agreement")]
        for drawing in drawings:
            add_title(drawing.figure, drawing.finding, TITLE)
    for figure in (drawing.figure for drawing in drawings):
        assert re.search(
            rf"by {MINUS}\d+ pp \[{MINUS}\d+, {MINUS}\d+\]",
            figure.get_suptitle().replace(NO_BREAK, " ").replace("\n", " "),
        )
        assert all(line.count("[") == line.count("]") for line in title_of(figure))


def test_margins_have_no_shares_if_nothing_flips() -> None:
    assert len(drawing_of("margins", random_result(3, 4, prompts=5, flips=0.0)).maps) == 2
    assert len(drawing_of("margins", random_result(3, 4, prompts=5)).maps) == 4


@pytest.mark.end_to_end
def test_positions_are_in_the_title(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    result = random_result(3, 4)
    keys = tuple(key._replace(positions="-1") for key in result.ablations)
    of_sweeps.draw(replace(result, ablations=keys), tmp_path, title=TITLE, decode=decode)
    for figure in drawn:
        assert " ".join(title_of(figure)).endswith("Berlin is the capital of; heads ablated at the last token")


def test_strongest_shows_ten_heads_with_all_prompts() -> None:
    result = random_result(12, 12, prompts=5)
    effects = statistics.effects(result, "target_probability")
    drawing = drawing_of("strongest", result)
    figure, finding = drawing.figure, drawing.finding
    for axes, imputation in zip(figure.axes, ("zero", "mean"), strict=True):
        own = [i for i, key in enumerate(result.ablations) if key.imputation == imputation]
        order = sorted(own, key=lambda i: -abs(effects.mean[i]))[:10]
        assert [label.get_text() for label in axes.get_yticklabels()] == [result.ablations[i].label for i in order]
        single = [line for line in axes.lines if line.get_marker() == "o"]
        for line in (line for line in axes.lines if line.get_marker() == "D"):
            of = [order[row] for row in np.asarray(line.get_ydata())]
            assert np.allclose(np.asarray(line.get_xdata()), 100 * effects.mean[of])
            assert all(effects.differs[of] == (line.get_markerfacecolor() == "black")), "filled if it differs from 0"
        for line, index in zip(single, order, strict=True):
            assert np.allclose(np.asarray(line.get_xdata()), 100 * result.change("target_probability")[:, index])
        segments: Any = axes.collections[0].get_segments()  # type: ignore[attr-defined]
        assert np.allclose([s[:, 0] for s in segments], 100 * np.stack([effects.low, effects.high], -1)[order])
    best = int(np.argmax(np.abs(effects.mean)))
    name = f"{result.ablations[best].label} ({result.ablations[best].imputation})"
    assert finding.startswith(f"{name} changes P(target) most") and effects.differs[best]
    assert f"{effects.differs.sum()} of 288 ablations change it on average" in finding


@pytest.mark.end_to_end
def test_title_of_several_prompts_counts_them(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    of_sweeps.draw(random_result(3, 4, prompts=5), tmp_path, title="capitals: ", decode=decode)
    assert len(drawn) == 6 and all(title_of(figure)[-1] == "capitals: 5 prompts" for figure in drawn)


@pytest.mark.parametrize(
    "grid",
    [(3, 4), *(pytest.param(grid, marks=pytest.mark.end_to_end) for grid in ((12, 12), (2, 32), (40, 2), (32, 32)))],
)
def test_strongest_cells_are_named_where_they_are(grid: tuple[int, int]) -> None:
    with of_sweeps.style.context(["default", STYLE]):
        drawing = drawing_of("sensitivity", random_result(*grid))
        add_title(drawing.figure, drawing.finding, TITLE)
        for axes, panel in drawing.maps:
            name_heads(axes, panel.values, panel.flipped)
            order = np.argsort(-np.abs(panel.values), axis=None)[:3]
            cells = [np.unravel_index(i, panel.values.shape) for i in order]
            names = {text.get_text(): text for text in axes.texts}
            assert list(names) == [f"L{layer}H{head}" for layer, head in cells]
            frames = [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle)]
            assert frames == [(head - 0.5, layer - 0.5) for layer, head in cells]
            for (layer, head), text in zip(cells, names.values(), strict=True):
                cell = axes.transData.transform([(head - 0.5, layer + 0.5), (head + 0.5, layer - 0.5)])
                box = text.get_window_extent()
                assert box.x0 <= cell[1, 0] + 6 and box.x1 >= cell[0, 0] - 6, "next to its cell"
                assert box.y0 <= cell[1, 1] + 6 and box.y1 >= cell[0, 1] - 6, "next to its cell"


def test_lines_are_broken_at_their_width() -> None:
    lines = wrapped("a few words and " + "W" * 100, 1.0, 8)
    assert all(width(line, 8) <= 1.0 for line in lines)
    assert " ".join(lines).replace("W W", "WW").startswith("a few words and W") and "".join(lines).count("W") == 100
