"""Figures: complete, with no text cut off or overlapping, for any grid and any tokens."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from ablation.figures import maps, of_sweeps
from ablation.figures.drawn import Drawn
from ablation.figures.labels import NAME, STYLE, rounded
from ablation.results import METRICS, AblationKey, PromptRecord, Result

IMPUTATIONS = ["zero", "mean", "channel-mean", "reference-mean", "reference-mean-by-position", "resample", "scale:0.5"]
GRIDS = [(12, 12), (30, 9), (2, 4), (1, 1), (48, 32), (6, 64), (2, 32), (40, 2)]
SMALL = [(3, 4), (2, 2), (1, 1), (12, 12)]
TEXTS = {0: " Germany", 1: " the", 2: " France"}
HOLES = (1, 2, 4)
FILES = ["sensitivity.png", "agreement.png", "histograms.png", "head_means.png", "margins.png"]
TITLE = "capitals: Berlin is the capital of"
MINUS = "\N{MINUS SIGN}"


def random_result(
    layers: int, heads: int, prompts: int = 1, imputations: int = 2, *, holes: Sequence[int] = (), flips: float = 0.1
) -> Result:
    """A result of the target 0, which is also predicted, and the control 2. Layers in `holes` have no heads."""
    rng = np.random.RandomState(0)
    ablations = tuple(
        AblationKey(((layer, head),), name)
        for name in IMPUTATIONS[:imputations]
        for layer in range(layers)
        if layer not in holes
        for head in range(heads)
    )
    runs = (prompts, len(ablations))
    shared = rng.randn(len(ablations))  # what a head does to every prompt
    clean = {name: np.zeros(prompts) for name in METRICS} | {"argmax": np.zeros(prompts, dtype=np.int64)}
    ablated = {name: np.zeros(runs) for name in METRICS}
    for name, before, size in (("target", 0.5, 0.02), ("control", 0.01, 0.0003)):
        clean[f"{name}_probability"] += before
        noise = rng.randn(*runs) * (prompts > 1)
        ablated[f"{name}_probability"] = before + size * (shared + noise)
    clean["margin"] += 0.7
    ablated["margin"] = rng.rand(*runs)
    ablated["argmax"] = np.where(rng.rand(*runs) < flips, 1, 0).astype(np.int64)
    head_mean = 0.05 * rng.randn(prompts, layers, heads)
    head_mean[:, list(holes)] = np.nan
    ones = np.ones(runs, dtype=np.int64)
    record = PromptRecord((5, 6, 7), target=(0,), control=(2,))
    return Result(ablations, (record,) * prompts, clean, ablated, head_mean, ones, ones, ones)


def without_changes(result: Result) -> Result:
    """The result of ablations that change nothing, of a model whose means of z are all 0."""
    ablated = {name: np.repeat(values[:, None], result.kept.shape[1], axis=1) for name, values in result.clean.items()}
    return replace(result, ablated=ablated, head_mean=0 * result.head_mean)


def decode(*tokens: int) -> str:
    return "".join(TEXTS[token] for token in tokens)


def drawing_of(name: str, result: Result) -> maps.Drawing:
    """A drawing before its title is added."""
    with of_sweeps.style.context(["default", STYLE]):
        drawing: maps.Drawing = getattr(of_sweeps, name)(Drawn(result, decode))
    return drawing


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that `draw` saves."""
    saved: list[Figure] = []
    save = Figure.savefig

    def spy(self: Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        as_saved = np.array([axes.get_position().bounds for axes in self.axes])
        self.set_layout_engine("constrained", h_pad=STYLE["figure.constrained_layout.h_pad"])
        for name in names_of_heads(self):
            name.set_in_layout(False)
        self.draw_without_rendering()
        moved = np.abs(np.array([axes.get_position().bounds for axes in self.axes]) - as_saved).max()
        assert moved < 0.001, f"the layout had not settled, by {moved:.1%} of the figure"
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def names_of_heads(figure: Figure) -> list[Text]:
    """The texts within panels."""
    return [text for text in figure.findobj(Text) if text.get_gid() == NAME]


def texts_of(figure: Figure) -> Iterator[Text]:
    """Yield every visible text except tick labels and the texts within panels."""
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels(which="both")
    }
    texts = (text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in ticks)
    return (text for text in texts if text.get_gid() != NAME)


def assert_composed(figure: Figure) -> None:
    """Assert that no text is cut off, or overlaps another text or a panel, and that tick labels are apart."""
    width, height = figure.canvas.get_width_height()
    boxes = [(text, text.get_window_extent()) for text in texts_of(figure)]
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text.get_text()!r} is cut off"
    within = [(text, text.get_window_extent()) for text in names_of_heads(figure)]
    for (one, a), (other, b) in itertools.chain(itertools.combinations(boxes, 2), itertools.combinations(within, 2)):
        separate = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert separate, f"{one.get_text()!r} overlaps {other.get_text()!r}"
    for axes, (text, box) in itertools.product(figure.axes, boxes):
        panel = axes.get_window_extent()
        separate = panel.x1 <= box.x0 or box.x1 <= panel.x0 or panel.y1 <= box.y0 + 1 or box.y1 <= panel.y0 + 1
        assert separate, f"{text.get_text()!r} overlaps a panel"
    for text, box in within:
        panel = text.axes.get_window_extent()  # type: ignore[union-attr]
        inside = panel.x0 - 2 <= box.x0 and box.x1 <= panel.x1 + 2 and panel.y0 - 2 <= box.y0 and box.y1 <= panel.y1 + 2
        assert inside, f"{text.get_text()!r} leaves its panel"
    for axes in figure.axes:
        assert_ticks_apart(axes)


def assert_ticks_apart(axes: Axes) -> None:
    """Assert that neighbouring tick labels of an axis do not overlap, and that a map has ticks on both axes."""
    for axis, low, high in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
        labels = [label for label in axis.get_ticklabels() if label.get_visible() and label.get_text()]
        ends = sorted((getattr(box, low), getattr(box, high)) for box in (t.get_window_extent() for t in labels))
        assert all(a[1] <= b[0] + 1 for a, b in itertools.pairwise(ends)), [t.get_text() for t in labels]
        if axes.images:
            assert len(axis.get_ticklocs()) >= 1


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.findobj(Legend) for text in legend.get_texts()]


def title_of(figure: Figure) -> list[str]:
    return figure.get_suptitle().split("\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "heads", "prompts"),
    [
        (12, 12, 1),
        *(pytest.param(*grid, 1, marks=pytest.mark.end_to_end) for grid in GRIDS if grid != (12, 12)),
        *(pytest.param(*sizes, marks=pytest.mark.end_to_end) for sizes in ((12, 12, 20), (2, 32, 2), (40, 2, 20))),
    ],
)
def test_figures_of_every_grid_have_no_overlaps(
    layers: int, heads: int, prompts: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    paths = of_sweeps.draw(random_result(layers, heads, prompts), tmp_path, title=TITLE, decode=decode)
    assert [p.name for p in paths] == [*FILES, *(["strongest.png"] if prompts > 1 else [])]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    for figure in drawn:
        assert_composed(figure)


@pytest.mark.end_to_end
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("kind", ["nothing changes", "everything flips", "no heads in some layers"])
def test_figures_of_extreme_results_have_no_overlaps(
    kind: str, prompts: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    result = {
        "nothing changes": without_changes(random_result(6, 8, prompts)),
        "everything flips": random_result(6, 8, prompts, flips=1.0),
        "no heads in some layers": random_result(6, 4, prompts, holes=HOLES),
    }[kind]
    of_sweeps.draw(result, tmp_path, title=TITLE, decode=decode)
    assert len(drawn) == 5 + (prompts > 1)
    for figure in drawn:
        assert_composed(figure)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "result",
    [*(random_result(*grid, imputations=1) for grid in SMALL), random_result(6, 4, imputations=1, holes=HOLES)],
)
def test_legends_of_small_figures_are_inside(result: Result, tmp_path: Path, drawn: list[Figure]) -> None:
    of_sweeps.draw(result, tmp_path, title=TITLE, decode=decode)
    for figure in drawn:
        width, height = figure.canvas.get_width_height()
        for legend in figure.findobj(Legend):
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height
        assert_composed(figure)


def test_lines_of_head_means_skip_layers_without_heads() -> None:
    def with_trend(result: Result) -> Result:
        return replace(result, head_mean=result.head_mean + 0.1 * np.arange(6)[:, None])

    result = with_trend(random_result(6, 4, holes=HOLES))
    figure = drawing_of("head_means", result).figure
    lines = {line.get_linestyle(): line.get_xydata() for line in figure.axes[1].lines if line.get_linestyle() != ":"}
    averages, trend = np.asarray(lines["-"]), np.asarray(lines["--"])
    assert np.isnan(averages[[1, 2, 4], 0]).all() and np.isfinite(averages[[0, 3, 5]]).all()
    assert trend[:, 1][np.isfinite(trend[:, 1])].tolist() == [-0.5, 0.5, 2.5, 3.5, 4.5, 5.5]
    assert np.isnan(trend[[2, 5, 8], 1]).all()
    whole = drawing_of("head_means", with_trend(random_result(6, 4))).figure
    assert np.asarray(whole.axes[1].lines[-1].get_xydata())[:2, 1].tolist() == [-0.5, 5.5]
    slope, _, r_squared = of_sweeps.trend(with_trend(random_result(6, 4)).head_mean[0])
    assert f"trend {slope:+.2g} per layer (r² {r_squared:.2f})" in legend_of(whole)


def test_trend_line_is_left_out_where_depth_explains_little() -> None:
    result = random_result(12, 12)
    assert of_sweeps.trend(result.head_mean[0]).r_squared < of_sweeps.TREND_FROM
    drawing = drawing_of("head_means", result)
    assert not [line for line in drawing.figure.axes[1].lines if line.get_linestyle() == "--"]
    assert not any("trend" in label for label in legend_of(drawing.figure))
    assert drawing.finding.endswith("% of the variance") and "depth explains " in drawing.finding


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_have_no_trend_line(layers: int) -> None:
    result = random_result(layers, 6)
    drawing = drawing_of("head_means", replace(result, head_mean=result.head_mean + np.arange(layers)[:, None]))
    assert not [line for line in drawing.figure.axes[1].lines if line.get_linestyle() == "--"]
    assert drawing.finding.endswith("too few layers for a trend")


@pytest.mark.end_to_end
def test_tokens_of_one_text_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    of_sweeps.draw(random_result(2, 3), tmp_path, title="x", decode=lambda *_: "\ufffd")
    words = " ".join(text.get_text().replace("\n", " ") for text in texts_of(saved[0]))
    assert "(token 0)" in words and "(token 2)" in words


def test_dashes_of_head_means_are_explained() -> None:
    legend = legend_of(drawing_of("head_means", random_result(3, 4)).figure)
    assert any(label.startswith(f"negative: below {MINUS}0.0") for label in legend)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_any_token_and_title_can_be_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    texts = {0: "$\\frac{1}$\n incomprehensibilities", 1: "\t", 2: "日本"}
    of_sweeps.draw(
        random_result(12, 12), tmp_path, title="x" * 300 + "$y$", decode=lambda *ids: "".join(texts[i] for i in ids)
    )
    for figure in drawn:
        assert_composed(figure)
    words = {text.get_text() for figure in drawn for text in texts_of(figure)}
    assert any("“$\\frac{1}$\\n␣incomp…”" in word for word in words)
    assert any("“\\u65e5\\u672c”" in word for word in words)
    assert all(title_of(figure)[-1].endswith("x$y$") for figure in drawn)


def test_one_imputation_has_no_figure_of_agreement(tmp_path: Path) -> None:
    paths = of_sweeps.draw(random_result(3, 4, imputations=1), tmp_path, title="x", decode=decode)
    assert [path.name for path in paths] == ["sensitivity.png", "histograms.png", "head_means.png", "margins.png"]


@pytest.mark.parametrize("prompts", [1, 5])
def test_target_and_control_have_a_scale_each(prompts: int) -> None:
    result = random_result(12, 12, prompts)
    drawing = drawing_of("sensitivity", result)
    images = [axes.images[0] for axes, _ in drawing.maps]
    changes = [100 * result.grid(result.change(f"{name}_probability")).mean(axis=0) for name in ("target", "control")]
    for image, change in zip(images, np.concatenate(changes), strict=True):
        assert np.allclose(np.asarray(image.get_array()), change, atol=1e-12)  # row: layer, column: head
    for pair, change in zip((images[:2], images[2:]), changes, strict=True):
        (scale,) = {image.get_clim() for image in pair}
        assert -scale[0] == scale[1] == pytest.approx(np.abs(change).max())
    panels = {axes for axes, _ in drawing.maps}
    bars = [axes.get_ylabel().replace("\n", " ") for axes in drawing.figure.axes if axes not in panels]
    labels = ["mean change in P(target) (pp)", "mean change in P(control) (pp)"]
    if prompts == 1:
        labels = ["change in P(target “␣Germany”) (pp)", "change in P(control “␣France”) (pp)"]
    assert bars == labels


def test_rings_mark_flipped_heads() -> None:
    result = random_result(12, 12)
    kept = result.grid(result.kept)[0]
    drawing = drawing_of("margins", result)
    for index, (axes, _) in enumerate(drawing.maps):
        rings: Any = axes.lines[-1].get_xydata()  # x: head, y: layer
        assert [tuple(reversed(xy)) for xy in rings] == [tuple(cell) for cell in np.argwhere(~kept[index])]
        assert f"{kept[index].sum()} of 144 kept" in axes.get_title(loc="left")
    assert "the argmax is not “␣Germany”" in legend_of(drawing.figure)


@pytest.mark.parametrize("imputations", [1, 2, 3, 7])
@pytest.mark.parametrize("grid", [(1, 1), (12, 12), (30, 9), (2, 64), (80, 64)])
def test_maps_are_arranged_on_a_page(grid: tuple[int, int], imputations: int) -> None:
    for sizes in ([imputations], [imputations] * 2):
        found = maps.arranged(*grid, sizes)
        places = [place for group in found.places for place in group]
        assert len(set(places)) == len(places) == sum(sizes), "no two maps share a place"
        assert {row for row, _ in places} == set(range(found.rows)), "no row is empty"
        assert {column for _, column in places} == set(range(found.columns)), "no column is empty"
        assert found.cell * grid[1] * found.columns <= maps.PAGE[0]
        assert found.cell * grid[0] * found.rows <= maps.PAGE[1]
        assert found.columns == 1 or found.columns * maps.NARROWEST_MAP <= maps.PAGE[0]


@pytest.mark.parametrize("flips", [0.0, 0.01, 1.0])
def test_margins_show_the_change_in_one_colour_map(flips: float) -> None:
    result = random_result(12, 12, flips=flips)
    drawing = drawing_of("margins", result)
    margin = result.grid(np.where(result.kept, result.ablated["margin"], -result.ablated["margin"]))[0]
    for (axes, _), values in zip(drawing.maps, margin - 0.7, strict=True):
        image = axes.images[0]
        assert np.allclose(np.asarray(image.get_array()), values) and image.get_cmap().name == maps.DIVERGING
        low, high = image.get_clim()
        assert low == -high


# ---- words


@pytest.mark.end_to_end
def test_title_says_the_finding_and_keeps_both_ends_of_prompt(tmp_path: Path, drawn: list[Figure]) -> None:
    result = random_result(3, 4, flips=0.0)
    result.ablated["target_probability"][0, 5] = 0.5 - 0.12
    result.ablated["argmax"][0, 7] = 1
    of_sweeps.draw(result, tmp_path, title="capitals: " + "word " * 60 + "the last words", decode=decode)
    title = " ".join(title_of(drawn[0])).replace("\N{NO-BREAK SPACE}", " ")
    assert title.startswith(
        f"23 of 24 ablations keep “␣Germany”; L1H1 (zero) changes P(“␣Germany”) most, by {MINUS}12 pp "
    )
    for figure in drawn:
        finding, _, heading = " ".join(title_of(figure)).partition("capitals: ")
        assert len(finding) > 20 and " ... " in heading and heading.endswith("the last words")


def test_axes_choose_their_own_steps() -> None:
    wide, tall = (drawing_of("head_means", random_result(*grid)).figure.axes[0] for grid in ((2, 32), (40, 2)))
    assert wide.get_yticks().tolist() == [0, 1] and len(wide.get_xticks()) > 4
    assert tall.get_xticks().tolist() == [0, 1] and len(tall.get_yticks()) > 10


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.end_to_end
def test_nothing_changes_is_said_in_words_without_a_scale(prompts: int, tmp_path: Path, drawn: list[Figure]) -> None:
    of_sweeps.draw(without_changes(random_result(6, 8, prompts)), tmp_path, title=TITLE, decode=decode)
    words = {"sensitivity": "no change", "agreement": "no difference", "histograms": "no change"}
    words |= {"head_means": "all 0", "margins": "no change", "strongest": "no change"}
    for figure, (name, said) in zip(drawn, words.items(), strict=False):
        assert said in {text.get_text() for text in names_of_heads(figure)}
        assert "colorbar" not in str([axes.get_label() for axes in figure.axes])
        if name in ("histograms", "strongest"):
            assert all(len(axes.get_xticks()) == 0 for axes in figure.axes)
    assert "no ablation changes" in " ".join(title_of(drawn[0]))


@pytest.mark.parametrize("prompts", [1, 3])
def test_statistic_of_histograms_has_a_unit(prompts: int) -> None:
    result = random_result(3, 4, prompts)
    figure = drawing_of("histograms", result).figure
    change = 100 * result.grid(result.change("target_probability")).mean(axis=0)
    assert f"standard deviation {rounded(change[0].std())} pp" in figure.axes[0].get_title(loc="left")
    scales = [axes.get_xlim() for axes in figure.axes]
    assert scales[0] == scales[2] and scales[1] == scales[3] and scales[0][1] > 10 * scales[1][1]


def test_importing_figures_does_not_import_torch() -> None:
    program = "import sys; import ablation.figures.of_sweeps; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.end_to_end
def test_user_settings_are_neither_used_nor_changed(tmp_path: Path) -> None:
    with matplotlib.rc_context({"image.origin": "lower", "font.size": 40}):
        before = dict(matplotlib.rcParams)
        (first, *_) = of_sweeps.draw(random_result(3, 4), tmp_path, title="x", decode=decode)
        bold = first.read_bytes()
        assert dict(matplotlib.rcParams) == before
    (first, *_) = of_sweeps.draw(random_result(3, 4), tmp_path, title="x", decode=decode)
    assert first.read_bytes() == bold
