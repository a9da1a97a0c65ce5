"""Figures of a sweep. They stay legible at the size of a paper, for colour-blind readers, and printed in grey.

The first watched token is called the target and the second the control; any further ones are called tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ablation.report import token_labels, trend
from ablation.results import SweepResult

Floats = NDArray[np.float64]

FONT = "DejaVu Sans"  # ships with matplotlib, so figures look the same everywhere
STYLE: dict[Any, Any] = {
    "font.family": FONT,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.07,
    "text.parse_math": False,  # a token may contain $
    "figure.dpi": 200,
}
DIVERGING, SEQUENTIAL = "RdBu_r", "cividis"  # distinguishable by the colour-blind; white is 0
ACCENT = "#D55E00"
ABSENT: dict[str, Any] = {"facecolor": "0.85", "edgecolor": "0.55", "hatch": "/////", "linewidth": 0}
MINUS = "\N{MINUS SIGN}"
RING: dict[str, Any] = {"marker": "o", "mfc": "none", "mec": "black", "linestyle": "none", "mew": 0.8}
DASH: dict[str, Any] = {"marker": "_", "linestyle": "none", "mew": 0.5}
RIM = [withStroke(linewidth=2, foreground="white")]  # makes a ring visible on a dark cell
INCHES_PER_LETTER = 0.066


class Panel(NamedTuple):
    """One map of all heads.

    values: [layer, head]. title: lines. flipped: [layer, head], the heads to mark by a ring because their ablation
    changes the argmax; None for a map without rings.
    """

    values: Floats
    title: Sequence[str]
    flipped: NDArray[np.bool_] | None = None


def draw(sweep: SweepResult, folder: Path | str, *, title: str, token_texts: Mapping[int, str]) -> list[Path]:
    """Draw a sweep as PNG files in an existing folder, and return their paths. Raises OSError.

    title: the title of every figure, such as the model and the prompt. token_texts: {token id: text}, for the watched
    tokens and the clean argmax.
    """
    texts = token_labels(token_texts, quoted)
    drawings: list[Callable[[SweepResult, Mapping[int, str]], Figure]]
    drawings = [sensitivity, *([difference] if len(sweep.imputations) > 1 else []), histograms, head_means, margins]
    paths = []
    with style.context(["default", STYLE]):  # ignores matplotlib settings of the user, and leaves them unchanged
        for drawing in drawings:
            figure = drawing(sweep, texts)
            figure.suptitle(
                truncate(escape_undrawable(title), int(figure.get_figwidth() / INCHES_PER_LETTER / 1.3)), fontsize=9
            )
            paths.append(Path(folder, f"{drawing.__name__}.png"))
            figure.savefig(paths[-1], backend="agg")
    return paths


def sensitivity(sweep: SweepResult, texts: Mapping[int, str]) -> Figure:
    """Draw maps of the change in probability, in percentage points: a row per watched token, a column per imputation.

    texts, here and below: {token id: quoted text}.
    """
    panels = [
        [
            Panel(100 * changes[i], [f"{role}, {name}", kept_label(sweep, i, texts)], sweep.flipped[i])
            for i, name in enumerate(sweep.imputations)
        ]
        for role, changes in zip(roles(sweep, texts), sweep.probability_change, strict=True)
    ]
    return maps(panels, "change in probability (percentage points)", texts[sweep.clean_argmax])


def difference(sweep: SweepResult, texts: Mapping[int, str]) -> Figure:
    """Draw a map per watched token: the change in probability under the second imputation minus that under the first.

    Changes are in percentage points.
    """
    first, second = sweep.imputations[:2]
    change = 100 * (sweep.probability_change[:, 1] - sweep.probability_change[:, 0])
    panels = [
        Panel(values, [role, f"{second} {MINUS} {first}"])
        for role, values in zip(roles(sweep, texts), change, strict=True)
    ]
    return maps([panels], "difference in probability (percentage points)")


def margins(sweep: SweepResult, texts: Mapping[int, str]) -> Figure:
    """Draw a map per imputation: the margin in logits, with a minus sign if the ablation changes the argmax."""
    signed = np.where(sweep.kept, sweep.margin, -sweep.margin)
    panels = [
        Panel(values, [name, kept_label(sweep, i, texts)], sweep.flipped[i])
        for i, (name, values) in enumerate(zip(sweep.imputations, signed, strict=True))
    ]
    argmax = texts[sweep.clean_argmax]
    label = f"top-1 - top-2 logit, negative where top-1 is not {argmax} ({sweep.clean_margin:.2f} in the clean run)"
    return maps([panels], label, argmax)


def histograms(sweep: SweepResult, texts: Mapping[int, str]) -> Figure:
    """Draw histograms of the change in probability, in percentage points. Each tick below the axis is one head."""
    change = 100 * sweep.probability_change  # [watched, imputation, layer, head]
    bins = np.linspace(-largest_magnitude(change), largest_magnitude(change), 42)  # 41 bins: one is centred on 0
    watched, imputations = change.shape[:2]
    figure = Figure(figsize=(0.6 + 2.5 * imputations, 0.8 + 1.5 * watched))
    grid = figure.subplots(watched, imputations, sharex=True, sharey="row", squeeze=False)
    for row, role, changes in zip(grid, roles(sweep, texts), change, strict=True):
        for axes, name, values in zip(row, sweep.imputations, changes, strict=True):
            heads = values[np.isfinite(values)]
            counts, *_ = axes.hist(heads, bins=bins, color="0.5")
            axes.plot(heads, np.full_like(heads, -0.07 * counts.max()), "|", color="black", markersize=4, mew=0.4)
            axes.set_title(f"{role}, {name}\nstandard deviation {heads.std():.2g}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("change in probability (percentage points)", fontsize=8)
    figure.supylabel("heads", fontsize=8)
    return figure


def head_means(sweep: SweepResult, texts: Mapping[int, str]) -> Figure:
    """Draw the mean of each head's z in the clean run: as a map, and over depth with a least-squares line."""
    means, bound = sweep.head_mean, 1.05 * largest_magnitude(sweep.head_mean)
    layers, heads = means.shape
    cell = cell_size(layers, 2 * heads)
    across = max(heads * cell, 1.2)
    figure = Figure(figsize=(1.6 + across + 2.4, 1.2 + max(layers * cell, 1.2)))
    left, right = figure.subplots(1, 2, width_ratios=[across, 2.4], sharey=True)
    image = heat_map(left, Panel(means, ""), (-bound, bound), cell)
    depth = np.arange(layers)
    slope, _, r_squared = trend(means)
    right.axvline(0, color="black", linewidth=0.5, linestyle=":")
    right.plot(means, depth, ".", color="0.6", markersize=3)
    there = np.isfinite(means)
    some = there.any(axis=1)  # layers that have heads
    # NaN where a layer has no heads, so that no line is drawn through it.
    averages = [layer[head].mean() if head.any() else np.nan for layer, head in zip(means, there, strict=True)]
    right.plot(averages, depth, "o-", color="black", markersize=3, linewidth=0.8)
    runs = np.split(depth[some], np.flatnonzero(np.diff(depth[some]) > 1) + 1)
    along = np.concatenate([[run[0] - 0.5, run[-1] + 0.5, np.nan] for run in runs])
    centre = np.nonzero(there)[0].mean()
    right.plot(means[there].mean() + slope * (along - centre), along, "--", color=ACCENT)
    right.set(xlim=(-bound, bound), xlabel="mean of z")
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.tick_params(labelleft=False)
    figure.colorbar(image, ax=right, label="mean of z", aspect=30, fraction=0.05, pad=0.03)
    label = f"trend {slope:+.2g} per layer (r² {r_squared:.2f})".replace("-", MINUS)
    handles = [
        Line2D([], [], marker=".", color="0.6", linestyle="none", label="head"),
        Line2D([], [], marker="o", color="black", markersize=3, linewidth=0.8, label="layer average"),
        Line2D([], [], linestyle="--", color=ACCENT, label=label),
        *missing_heads_legend(means),
        *negative_legend(means, -bound),
    ]
    add_legend(figure, handles)
    return figure


def maps(panels: Sequence[Sequence[Panel]], label: str, argmax: str | None = None) -> Figure:
    """Draw a grid of maps with one colour scale.

    panels: rows of the grid. The scale is symmetric about 0, or starts at 0 if no value is negative. label: of the
    scale. argmax: the text of the clean argmax, for the legend of the rings; None for maps without rings.
    """
    layers, heads = panels[0][0].values.shape
    if layers > 1.5 * heads:  # tall grids side by side
        panels = [[panel for row in panels for panel in row]]
    flat = [panel for row in panels for panel in row]
    values = np.stack([panel.values for panel in flat])
    low = -largest_magnitude(values) if (values < 0).any() or not values.any() else 0.0
    rows, columns = len(panels), len(panels[0])
    cell = cell_size(layers * rows, heads * columns)
    across, down = max(heads * cell, 1.15), max(layers * cell, 0.9)  # inches; room for the titles and the colour bar
    titles = [
        [line for part in p.title for line in fill(part, int(across / INCHES_PER_LETTER)).splitlines()] for p in flat
    ]
    lines = max(map(len, titles))
    size = (1.35 + columns * (across + 0.15), 1.25 + rows * (down + 0.2 + 0.13 * lines))
    figure = Figure(figsize=size)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, panel, title in zip(grid.flat, flat, titles, strict=True):
        image = heat_map(axes, panel, (low, largest_magnitude(values)), cell)
        axes.set_title("\n".join(title))
        axes.label_outer()
    bar = figure.colorbar(image, ax=grid, aspect=30, fraction=0.05, pad=0.02)
    bar.set_label(fill(label, max(18, int(rows * down / INCHES_PER_LETTER))))
    handles: list[Line2D | Patch] = missing_heads_legend(values[0])
    if argmax is not None and any(panel.flipped is not None and panel.flipped.any() for panel in flat):
        handles.append(Line2D([], [], markersize=6, label=f"the argmax is not {argmax}", **RING))
    add_legend(figure, [*handles, *negative_legend(values, low)])
    return figure


def add_legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """Add a legend below the panels, with as many columns as fit; a figure that is too narrow becomes wider."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1)
        inches = legend.get_window_extent().width / figure.dpi
        if inches <= figure.get_figwidth():
            return
        if columns > 1:
            legend.remove()
        else:
            figure.set_figwidth(inches)


def heat_map(axes: Axes, panel: Panel, scale: tuple[float, float], cell: float) -> Any:
    """Draw one map. scale: the values at both ends of the colour scale. cell: the side of a cell in inches.

    A dash marks clearly negative cells, which would look like positive ones in a grey print.
    """
    low, high = scale
    layers, heads = panel.values.shape
    colours = DIVERGING if low < 0 else SEQUENTIAL
    image = axes.imshow(panel.values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    if missing_heads_legend(panel.values):
        axes.patch.set(**ABSENT)  # shows where there is no head
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(range(0, heads, tick_step(cell, 0.18)))
    axes.set_yticks(range(0, layers, tick_step(cell, 0.14)))
    side = 72 * cell  # points
    for colour, dark in (("black", False), ("white", True)):
        y, x = np.nonzero((panel.values < low / 5) & ((panel.values < low / 2) == dark))
        axes.plot(x, y, markersize=0.4 * side, color=colour, **DASH)
    if panel.flipped is not None:
        y, x = np.nonzero(panel.flipped)
        axes.plot(x, y, markersize=0.65 * side, path_effects=RIM, **RING)
    return image


def negative_legend(values: Floats, low: float) -> list[Line2D | Patch]:
    """Return the legend of the dashes in clearly negative cells, if there are any. low: the end of the scale."""
    if not (values < low / 5).any():
        return []
    return [Line2D([], [], markersize=4, label=f"below {MINUS}{-low / 5:.2g}", color="black", **DASH)]


def missing_heads_legend(values: Floats) -> list[Line2D | Patch]:
    """Return the legend for cells without a head: one entry, or none if no value [layer, head] is NaN."""
    missing = np.isnan(values)
    if not missing.any():
        return []
    return [Patch(label="no heads" if missing.all(axis=1).any() else "no such head", **ABSENT)]


def tick_step(cell: float, inches: float) -> int:
    """Return the smallest step between tick labels at which they do not overlap. inches: the size of a label."""
    return next(step for step in (1, 2, 4, 8, 16, 32, 64) if step * cell >= inches or step == 64)


def cell_size(layers: int, heads: int) -> float:
    """Return the side of a cell in inches: small enough for all cells to fit on a page."""
    return min(0.22, 6.5 / layers, 5.2 / heads)


def largest_magnitude(values: Floats) -> float:
    """Return the largest magnitude of the finite values, or 1 if it is 0 or there are none, for use as a scale."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.any() else 1.0


def roles(sweep: SweepResult, texts: Mapping[int, str]) -> list[str]:
    """Return the role (target, control or token) and the text of each watched token."""
    names = ["target", "control", *["token"] * len(sweep.watched)]
    return [f"{name} {texts[int(token)]}" for name, token in zip(names, sweep.watched, strict=False)]


def kept_label(sweep: SweepResult, imputation: int, texts: Mapping[int, str]) -> str:
    """Return a title line that says how many ablations keep the clean argmax. imputation: its index."""
    return f"{sweep.kept[imputation].sum()} of {sweep.has_head.sum()} keep {texts[sweep.clean_argmax]}"


def quoted(token: str) -> str:
    """Return a token in quotes, shortened if need be, with visible spaces."""
    return f"“{truncate(escape_undrawable(token).replace(' ', '␣'), 20)}”"


def truncate(text: str, letters: int) -> str:
    """Return a text, shortened to at most that many characters."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def escape_undrawable(text: str) -> str:
    """Replace characters that the font cannot draw by their Python escapes."""
    return "".join(c if c.isprintable() and _glyphs().get_char_index(ord(c)) else ascii(c)[1:-1] for c in text)


@cache
def _glyphs() -> Any:
    return get_font(findfont(FONT))
