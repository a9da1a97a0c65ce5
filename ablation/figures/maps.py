"""Maps of all heads: their arrangement, cells, marks, colour scales and legends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ablation.figures.drawn import CHANCE
from ablation.figures.labels import (
    LARGEST_CELL,
    MINUS,
    RIM,
    Flags,
    Floats,
    largest_magnitude,
    rounded,
    say_nothing,
    tick_label,
    tick_step,
    wrapped,
)

DIVERGING, SEQUENTIAL = "RdBu_r", "Greys"  # distinguishable by the colour-blind; white is 0
ABSENT: dict[str, Any] = {"facecolor": "0.85", "edgecolor": "0.55", "hatch": "/////", "linewidth": 0}
RING: dict[str, Any] = {"marker": "o", "mfc": "none", "mec": "black", "linestyle": "none", "mew": 0.8}
DASH: dict[str, Any] = {"marker": "_", "linestyle": "none", "mew": 0.5}
DOT: dict[str, Any] = {"marker": "o", "mec": "white", "mew": 0.25, "color": "black", "linestyle": "none"}
ACCENT = "#D55E00"
NARROWEST = 4.2
"""Width of a figure in inches, at least."""
PAGE = 7.2, 9.0
"""Width and height of a figure in inches, at most if its maps can be that small."""
NARROWEST_MAP = 1.1
"""Width of a map in inches, at least, so that a title fits above it."""


MARKS = (
    *(("o", "white"), ("s", "black"), ("^", "white"), ("D", "black"), ("v", "white"), ("X", "0.55"), ("P", "0.55")),
    *(("o", "black"), ("s", "white"), ("^", "black"), ("D", "white"), ("v", "black")),
)
"""Marker and colour of each imputation, which differ in grey, too."""


class Panel(NamedTuple):
    """One map of all heads.

    values: [layer, head]. title: lines. flipped: [layer, head], the heads to mark by a ring because their ablation
    changes the argmax. certain: [layer, head], the heads to mark by a dot because their mean differs from 0, corrected
    for the number of ablations. None: without such marks.
    """

    values: Floats
    title: Sequence[str]
    flipped: Flags | None = None
    certain: Flags | None = None


class Group(NamedTuple):
    """Maps with one colour scale and one colour bar.

    label: of the bar. nothing: words that stand for the bar if all values are 0. shares: whether the scale starts at 0.
    """

    panels: Sequence[Panel]
    label: str
    nothing: str = "no change"
    shares: bool = False


@dataclass
class Drawing:
    """A figure, the finding for its title, and its maps whose strongest heads are to be named."""

    figure: Figure
    finding: str
    maps: list[tuple[Axes, Panel]] = field(default_factory=list)


class Arrangement(NamedTuple):
    """Where maps are in a figure. cell: its side, in inches. places: the row and column of each map of each group."""

    cell: float
    rows: int
    columns: int
    bars: int
    places: Sequence[Sequence[tuple[int, int]]]


def arranged(layers: int, heads: int, sizes: Sequence[int]) -> Arrangement:
    """Return the arrangement closest to a square, of those in which cells are nearly as large as possible.

    sizes: the number of maps in each group. Groups are blocks of as many columns, one below the other or side by side.
    """
    found = []
    for columns in range(1, max(sizes) + 1):
        for stacked in (True, False) if len(sizes) > 1 else (True,):
            places, down, across = [], 0, 0
            for size in sizes:
                places.append([(down + i // columns, across + i % columns) for i in range(size)])
                down, across = (down - (-size // columns), 0) if stacked else (0, across + min(columns, size))
            rows, wide = (1 + max(place[axis] for group in places for place in group) for axis in (0, 1))
            bars = 1 if stacked else len(sizes)
            room_across, room_down = PAGE[0] - 0.6 - 0.75 * bars - 0.15 * wide, PAGE[1] - 1.2 - 0.45 * rows
            if wide > 1 and room_across < wide * NARROWEST_MAP:
                continue
            cell = min(LARGEST_CELL, room_across / (heads * wide), max(room_down, 0.5) / (layers * rows))
            found.append(Arrangement(cell, rows, wide, bars, places))

    def stretch(of: Arrangement) -> tuple[float, int]:
        return round(
            abs(np.log(of.columns * max(heads * of.cell, NARROWEST_MAP) / (of.rows * layers * of.cell))), 2
        ), of.rows

    largest = max(of.cell for of in found)
    return min((of for of in found if of.cell > 0.7 * largest), key=stretch)


def maps(has_head: Flags, groups: Sequence[Group], finding: str, argmax: str = "") -> Drawing:
    """Draw groups of maps, arranged by `arranged`. Each colour scale is symmetric about 0.

    has_head: [layer, head]. argmax: the clean one, as text, for the legend of flips.
    """
    layers, heads = has_head.shape
    cell, rows, columns, bars, places = arranged(layers, heads, [len(group.panels) for group in groups])
    across = max(heads * cell, NARROWEST_MAP, (NARROWEST - 0.6 - 0.75 * bars) / columns - 0.15)  # inches
    down = max(layers * cell, 0.65)
    panels = [panel for group in groups for panel in group.panels]
    titles = {id(panel): [line for part in panel.title for line in wrapped(part, across, 8)] for panel in panels}
    room = 0.2 + 0.13 * max(map(len, titles.values()))  # above a row
    figure = Figure(figsize=(0.6 + columns * (across + 0.15) + 0.75 * bars, 0.9 + rows * (down + room)))
    grid = figure.add_gridspec(rows, columns)
    taken = {place for group in places for place in group}
    drawing = Drawing(figure, finding)
    legend = missing_heads_legend(panels[0].values)
    dashes: list[Line2D | Patch] = []
    for group, own_places in zip(groups, places, strict=True):
        values = np.stack([panel.values for panel in group.panels])
        end = largest_magnitude(values)
        low = 0.0 if group.shares else -end
        own = []
        for panel, (row, column) in zip(group.panels, own_places, strict=True):
            axes = figure.add_subplot(grid[row, column])
            image = heat_map(axes, panel, (low, end), across / heads, down / layers)
            axes.set_title("\n".join(titles[id(panel)]))
            if (row + 1, column) in taken:
                axes.set_xlabel("")
                axes.tick_params(labelbottom=False)
            if column:
                axes.set_ylabel("")
                axes.tick_params(labelleft=False)
            own.append(axes)
            drawing.maps.append((axes, panel))
        if not np.nan_to_num(values).any():
            for axes in own:
                say_nothing(axes, group.nothing)
            continue
        height = down * len({row for row, _ in own_places})
        shape: dict[str, Any] = {"aspect": max(20.0, height / 0.11), "fraction": 0.05, "pad": 0.02}
        bar = figure.colorbar(image, ax=own, format=FuncFormatter(tick_label), **shape)
        bar.locator = MaxNLocator(4)
        bar.set_label("\n".join(wrapped(group.label, max(1.2, height), 8)))
        dashes = dashes or negative_legend(values, low, None if len(groups) == 1 else "20% of the scale")
    if any(panel.flipped is not None and panel.flipped.any() for panel in panels):
        legend.append(Line2D([], [], markersize=6, label=f"the argmax is not {argmax}", **RING))
    if any(panel.certain is not None and panel.certain.any() for panel in panels):
        legend.append(Line2D([], [], markersize=3, label=f"the mean differs from 0 ({CHANCE})", **DOT))
    add_legend(figure, [*legend, *dashes])
    return drawing


def heat_map(axes: Axes, panel: Panel, scale: tuple[float, float], across: float, down: float) -> Any:
    """Draw one map. scale: the values at both ends of the colour scale. across, down: sides of a cell in inches.

    A dash marks clearly negative cells, which would look like positive ones in a grey print.
    """
    low, high = scale
    layers, heads = panel.values.shape
    colours = DIVERGING if low < 0 else SEQUENTIAL
    image = axes.imshow(panel.values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    if missing_heads_legend(panel.values):
        axes.patch.set(**ABSENT)  # shows where there is no head
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(range(0, heads, tick_step(across, 0.18)))
    axes.set_yticks(range(0, layers, tick_step(down, 0.14)))
    side = 72 * min(across, down, LARGEST_CELL)  # points
    for colour, dark in (("black", False), ("white", True)):
        y, x = np.nonzero((panel.values < low / 5) & ((panel.values < low / 2) == dark))
        axes.plot(x, y, markersize=0.4 * side, color=colour, **DASH)
    if panel.certain is not None:
        y, x = np.nonzero(panel.certain)
        beside = 0.28 * (panel.values[y, x] < low / 5)  # of a dash
        axes.plot(x + beside, y + beside, markersize=min(3.0, max(1.3, 0.18 * side)), **DOT)
    if panel.flipped is not None:
        y, x = np.nonzero(panel.flipped)
        axes.plot(x, y, markersize=0.65 * side, path_effects=RIM, **RING)
    return image


# ---- legends


def marks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return how the points of each imputation are drawn: arguments of Line2D."""
    return [
        {
            "marker": marker,
            "mfc": colour,
            "mec": "black",
            "markersize": 4.5,
            "mew": 0.7,
            "linestyle": "none",
            "label": name,
        }
        for name, (marker, colour) in zip(names, itertools.cycle(MARKS))
    ]


def add_legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """Add a legend below the panels, with as many columns as fit; a figure that is too narrow becomes wider."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1)
        inches = legend.get_window_extent().width / figure.dpi
        if inches <= figure.get_figwidth():
            figure.set_figheight(figure.get_figheight() + 0.13 * -(-len(handles) // columns))
            return
        if columns > 1:
            legend.remove()
        else:
            figure.set_figwidth(inches)


def negative_legend(values: Floats, low: float, fifth: str | None = None) -> list[Line2D | Patch]:
    """Return the legend of the dashes in clearly negative cells, if there are any.

    low: the end of the scale. fifth: the name of a fifth of it; by default its value.
    """
    if not (values < low / 5).any():
        return []
    label = f"negative: below {MINUS}{fifth or rounded(-low / 5)}"
    return [Line2D([], [], markersize=4, label=label, color="black", **DASH)]


def missing_heads_legend(values: Floats) -> list[Line2D | Patch]:
    """Return the legend for cells without a head: one entry, or none if no value [layer, head] is NaN."""
    missing = np.isnan(values)
    label = "no heads" if missing.all(axis=1).any() else "no such head"
    return [Patch(label=label, **ABSENT)] if missing.any() else []
