"""Figures: complete, with no text cut off or overlapping, for any grid and any tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from ablation import figures
from ablation.results import SweepResult
from tests.test_claims import as_published

GRIDS = [(12, 12), (30, 9), (2, 4), (1, 1), (48, 32), (6, 64)]
SMALL = [(3, 4), (2, 2), (1, 1), (12, 12)]
TEXTS = {0: " Germany", 1: " the", 2: " France"}


def random_sweep(layers: int, heads: int, imputations: int = 2) -> SweepResult:
    rng = np.random.RandomState(0)
    grid = (imputations, layers, heads)
    template = as_published()
    return SweepResult(
        **{name: getattr(template, name) for name in ("watched", "clean_argmax", "clean_margin")},
        imputations=("zero", "mean")[:imputations],
        clean_probability=template.clean_probability,
        clean_log_probability=template.clean_log_probability,
        probability_change=rng.randn(2, *grid) * [[[[0.02]]], [[[0.0003]]]],
        log_probability_change=rng.randn(2, *grid),
        argmax=np.where(rng.rand(*grid) < 0.1, 1, 0),
        margin=rng.rand(*grid),
        head_mean=0.05 * rng.randn(layers, heads),
        calls=np.ones(grid, dtype=np.int64),
        replaced=np.ones(grid, dtype=np.int64),
        changed=np.ones(grid, dtype=np.int64),
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that `draw` saves."""
    saved: list[Figure] = []
    save = Figure.savefig

    def spy(self: Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        as_saved = np.array([axes.get_position().bounds for axes in self.axes])
        self.draw_without_rendering()
        moved = np.abs(np.array([axes.get_position().bounds for axes in self.axes]) - as_saved).max()
        assert moved < 0.001, f"the layout had not settled, by {moved:.1%} of the figure"
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def texts_of(figure: Figure) -> Iterator[Text]:
    """Yield every visible text except tick labels."""
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels(which="both")
    }
    return (text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in ticks)


def assert_composed(figure: Figure) -> None:
    """Assert that no text is cut off, or overlaps another text or a panel."""
    width, height = figure.canvas.get_width_height()
    boxes = [(text, text.get_window_extent()) for text in texts_of(figure)]
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text.get_text()!r} is cut off"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        separate = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert separate, f"{one.get_text()!r} overlaps {other.get_text()!r}"
    for axes, (text, box) in itertools.product(figure.axes, boxes):
        panel = axes.get_window_extent()
        separate = panel.x1 <= box.x0 or box.x1 <= panel.x0 or panel.y1 <= box.y0 + 1 or box.y1 <= panel.y0 + 1
        assert separate, f"{text.get_text()!r} overlaps a panel"


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "heads"), GRIDS)
def test_figures_of_every_grid_have_no_overlaps(layers: int, heads: int, tmp_path: Path, drawn: list[Figure]) -> None:
    paths = figures.draw(
        random_sweep(layers, heads), tmp_path, title="capitals: Berlin is the capital of", token_texts=TEXTS
    )
    assert [p.name for p in paths] == [
        "sensitivity.png",
        "difference.png",
        "histograms.png",
        "head_means.png",
        "margins.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    for figure in drawn:
        assert_composed(figure)


def with_holes(sweep: SweepResult) -> SweepResult:
    """The sweep of a model whose layers 1, 2 and 4 have no heads."""
    hole = np.zeros(sweep.head_mean.shape, dtype=bool)
    hole[[1, 2, 4]] = True
    names = ("probability_change", "log_probability_change", "margin", "head_mean")
    floats: dict[str, Any] = {name: np.where(hole, np.nan, getattr(sweep, name)) for name in names}
    return replace(sweep, **floats, argmax=np.where(hole, -1, sweep.argmax))


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [*(random_sweep(*grid, 1) for grid in SMALL), with_holes(random_sweep(6, 4, 1))])
def test_legends_of_small_figures_are_inside(sweep: SweepResult) -> None:
    with figures.style.context(["default", figures.STYLE]):
        for drawing in (figures.sensitivity, figures.head_means, figures.margins):
            figure = drawing(sweep, {0: "“␣Germany”", 1: "“␣the”", 2: "“␣France”"})
            figure.draw_without_rendering()
            width, height = figure.canvas.get_width_height()
            for legend in figure.findobj(Legend):
                box = legend.get_window_extent()
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height
            assert_composed(figure)


def test_lines_of_head_means_skip_layers_without_heads() -> None:
    sweep = with_holes(random_sweep(6, 4))
    figure = figures.head_means(sweep, {})
    lines = {line.get_linestyle(): line.get_xydata() for line in figure.axes[1].lines if line.get_linestyle() != ":"}
    averages, trend = np.asarray(lines["-"]), np.asarray(lines["--"])
    assert np.isnan(averages[[1, 2, 4], 0]).all() and np.isfinite(averages[[0, 3, 5]]).all()
    assert trend[:, 1][np.isfinite(trend[:, 1])].tolist() == [-0.5, 0.5, 2.5, 3.5, 4.5, 5.5]
    assert np.isnan(trend[[2, 5, 8], 1]).all()
    whole = np.asarray(figures.head_means(random_sweep(6, 4), {}).axes[1].lines[-1].get_xydata())
    assert whole[:2, 1].tolist() == [-0.5, 5.5]


def test_tokens_of_one_text_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    figures.draw(random_sweep(2, 3), tmp_path, title="x", token_texts={0: "\ufffd", 2: "\ufffd"})
    words = " ".join(text.get_text().replace("\n", " ") for text in texts_of(saved[0]))
    assert "(token 0)" in words and "(token 2)" in words


def test_dashes_of_head_means_are_explained() -> None:
    (legend,) = figures.head_means(random_sweep(3, 4), {}).findobj(Legend)
    assert any(text.get_text().startswith("below \N{MINUS SIGN}0.0") for text in legend.get_texts())


@pytest.mark.slow
def test_any_token_and_title_can_be_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    texts = {0: "$\\frac{1}$\n incomprehensibilities", 1: "\t", 2: "日本"}
    figures.draw(random_sweep(12, 12), tmp_path, title="x" * 300 + "$y$", token_texts=texts)
    for figure in drawn:
        assert_composed(figure)
    words = {text.get_text() for figure in drawn for text in texts_of(figure)}
    assert any("“$\\frac{1}$\\n␣incomp…”" in word for word in words)
    assert any("“\\u65e5\\u672c”" in word for word in words)


def test_one_imputation_has_no_difference_figure(tmp_path: Path) -> None:
    paths = figures.draw(random_sweep(3, 4, imputations=1), tmp_path, title="x", token_texts=TEXTS)
    assert [path.name for path in paths] == ["sensitivity.png", "histograms.png", "head_means.png", "margins.png"]


def test_sensitivity_maps_share_a_symmetric_scale_in_points() -> None:
    sweep = random_sweep(12, 12)
    figure = figures.sensitivity(sweep, {0: "a", 1: "b", 2: "c"})
    images = [axes.images[0] for axes in figure.axes[:4]]
    for image, change in zip(images, 100 * sweep.probability_change.reshape(4, 12, 12), strict=True):
        assert np.array_equal(np.asarray(image.get_array()), change)  # row: layer, column: head
    (scale,) = {image.get_clim() for image in images}
    assert scale == (-scale[1], 100 * np.abs(sweep.probability_change).max())


def test_rings_mark_flipped_heads() -> None:
    sweep = random_sweep(12, 12)
    figure = figures.margins(sweep, {0: "a", 1: "b", 2: "c"})
    for index, axes in enumerate(figure.axes[:2]):
        rings: Any = axes.lines[-1].get_xydata()  # x: head, y: layer
        assert [tuple(reversed(xy)) for xy in rings] == [tuple(cell) for cell in np.argwhere(~sweep.kept[index])]
        assert f"{sweep.kept[index].sum()} of 144 keep a" in axes.get_title()
    (legend,) = figure.findobj(Legend)
    assert "the argmax is not a" in [text.get_text() for text in legend.get_texts()]


def test_user_settings_are_neither_used_nor_changed(tmp_path: Path) -> None:
    with matplotlib.rc_context({"image.origin": "lower", "font.size": 40}):
        before = dict(matplotlib.rcParams)
        (first, *_) = figures.draw(random_sweep(3, 4), tmp_path, title="x", token_texts=TEXTS)
        bold = first.read_bytes()
        assert dict(matplotlib.rcParams) == before
    (first, *_) = figures.draw(random_sweep(3, 4), tmp_path, title="x", token_texts=TEXTS)
    assert first.read_bytes() == bold
