"""What figures show of several prompts: means, intervals, shares, single prompts; and the texts within figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ablation import figures, statistics
from ablation.figures_of_prompts import Drawn, add_title, strongest, width, wrapped
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
    figure = drawing_of("margins", result).figure
    shares = 100 * (1 - result.grid(result.kept).mean(axis=0))
    for axes, values in zip(figure.axes[2:4], shares, strict=True):
        assert np.allclose(np.asarray(axes.images[0].get_array()), values)
        low, high = axes.images[0].get_clim()
        assert low == 0 and high == pytest.approx(shares.max())
    assert "the argmax is not" not in " ".join(legend_of(figure))


@pytest.mark.parametrize(("noise", "marked"), [(0.0, "includes"), (1.0, "excludes")])
def test_dots_mark_intervals_on_one_side_of_zero(noise: float, marked: str) -> None:
    """With little noise, few intervals include 0; with much, few exclude it. The fewer get a dot."""
    result = random_result(12, 12, prompts=20)
    rng = np.random.RandomState(1)
    shape = result.kept.shape
    for name in ("target", "control"):
        change = (0.01 + noise * rng.randn(*shape)) * np.ones(shape)
        if noise == 0:
            change = change + 1e-3 * rng.randn(*shape)
            change[:, :3] = 0.01 * rng.randn(20, 3)
        result = replace(result, ablated={**result.ablated, f"{name}_probability": 0.3 + change})
        result.clean[f"{name}_probability"][:] = 0.3
    figure = drawing_of("sensitivity", result).figure
    assert [label for label in legend_of(figure) if "interval" in label] == [f"95% interval {marked} 0"]
    excludes = [
        result.grid(statistics.effects(result, f"{name}_probability").excludes_zero) for name in ("target", "control")
    ]
    expected = np.concatenate(excludes) == (marked == "excludes")
    for axes, cells in zip(figure.axes[:4], expected, strict=True):
        dots: Any = [line.get_xydata() for line in axes.lines if line.get_marker() == "o"]
        found = {(round(y - 0.01), round(x - 0.01)) for xy in dots for x, y in xy}
        assert found == {tuple(cell) for cell in np.argwhere(cells)}
    assert 0 < expected.sum() <= expected.size / 2


def test_strongest_shows_ten_heads_with_all_prompts() -> None:
    result = random_result(12, 12, prompts=5)
    effects = statistics.effects(result, "target_probability")
    figure, finding = strongest(Drawn(result, decode))
    for axes, imputation in zip(figure.axes, ("zero", "mean"), strict=True):
        own = [i for i, key in enumerate(result.ablations) if key.imputation == imputation]
        order = sorted(own, key=lambda i: -abs(effects.mean[i]))[:10]
        assert [label.get_text() for label in axes.get_yticklabels()] == [result.ablations[i].label for i in order]
        *single, means = [line for line in axes.lines if line.get_marker() in ("o", "D")]
        assert np.allclose(np.asarray(means.get_xdata()), 100 * effects.mean[order])
        for line, index in zip(single, order, strict=True):
            assert np.allclose(np.asarray(line.get_xdata()), 100 * result.change("target_probability")[:, index])
        segments: Any = axes.collections[0].get_segments()  # type: ignore[attr-defined]
        assert np.allclose([s[:, 0] for s in segments], 100 * np.stack([effects.low, effects.high], -1)[order])
    best = int(np.argmax(np.abs(effects.mean)))
    verb = "raises" if effects.mean[best] > 0 else "lowers"
    assert finding.startswith(f"{result.ablations[best].label} ({result.ablations[best].imputation}) {verb} P(target)")


def test_title_of_several_prompts_counts_them(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    figures.draw(random_result(3, 4, prompts=5), tmp_path, title="capitals: ", decode=decode)
    assert len(drawn) == 6 and all(title_of(figure)[-1] == "capitals: 5 prompts" for figure in drawn)


@pytest.mark.parametrize("grid", [(3, 4), (12, 12), (2, 32), (40, 2), (32, 32)])
def test_strongest_cells_are_named_where_they_are(grid: tuple[int, int]) -> None:
    with figures.style.context(["default", figures.STYLE]):
        drawing = drawing_of("sensitivity", random_result(*grid))
        add_title(drawing.figure, drawing.finding, TITLE)
        for axes, panel in drawing.maps:
            figures.name_heads(axes, panel.values, panel.flipped)
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
