"""The figure of the agreement of imputations: rank correlations, and the heads on which they disagree most."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ablation.figures.drawn import Change, Drawn
from ablation.figures.labels import MINUS, NAME, Flags, Floats, largest_cells, say_nothing, wrapped
from ablation.figures.maps import ACCENT, Drawing, add_legend, marks
from ablation.studies.agreement import disagree, findings, matters, rank_correlation

LISTED = 8
"""How many heads are listed."""


def agreement(drawn: Drawn) -> Drawing:
    """Draw how far imputations agree on the heads that change the target's probability (`ablation.studies.agreement`).

    Left: for two imputations the effect of each head under both, else a matrix of rank correlations. Right: the heads
    that matter under one imputation only, or with another sign, by the largest difference between two imputations.
    """
    change = drawn.change("target_probability")
    effects, names = change.mean, drawn.names
    cells, disputed = _disputed(effects, matters(effects, change.differs))
    several, count = len(names) > 2, len(names)
    side = max(1.9, 0.36 * count) if several else 2.1
    labels = 1.75 if several else 0.6
    rows = max(1, len(cells))
    height = max(side + (1.5 if several else 0.5), 0.6 + rows * (0.16 + 0.055 * count))
    figure = Figure(figsize=(labels + side + 3.6, height))
    left, right = figure.subplots(1, 2, width_ratios=[side, 2.9])
    if several:
        _matrix(left, effects, names)
    else:
        _scatter(left, effects, names, cells)
    _heads(right, change, names, cells)
    what = "heads on which they disagree most" if disputed else "heads whose effects differ most"
    right.set_title("\n".join(wrapped(what, 2.6, 8)))
    add_legend(figure, [Line2D([], [], **mark) for mark in marks(names)])
    return Drawing(figure, _finding(drawn, change))


def _disputed(effects: Floats, matter: Flags) -> tuple[list[tuple[int, ...]], bool]:
    """Return the heads to list, and whether any two imputations disagree on them; else they differ most in size."""
    pairs = [[i, j] for i in range(len(effects)) for j in range(i)]
    disputed = np.any([disagree(effects[pair], matter[pair]) for pair in pairs], axis=0)
    gap = effects.max(axis=0) - effects.min(axis=0)
    cells = largest_cells(np.where(disputed, gap, 0.0), LISTED)
    return (cells, True) if cells else (largest_cells(gap, LISTED), False)


def _matrix(axes: Axes, effects: Floats, names: list[str]) -> None:
    """Draw the rank correlation of each pair, below the diagonal."""
    count = len(names)
    values = np.full((count - 1, count - 1), np.nan)
    for row in range(1, count):
        for column in range(row):
            r = rank_correlation(effects[row], effects[column])
            values[row - 1, column] = np.nan if r is None else r
            text = "n/a" if r is None else _decimal(r)
            colour = "white" if r is not None and r > 0.6 else "black"
            frame = Rectangle((column - 0.5, row - 1.5), 1, 1, fill=False, edgecolor="0.7", linewidth=0.5)
            axes.add_patch(frame)
            axes.text(column, row - 1, text, ha="center", va="center", fontsize=7, color=colour, gid=NAME)
    axes.imshow(values, cmap="Greys", vmin=0, vmax=1.15, interpolation="nearest")
    axes.set_xticks(range(count - 1), ["\n".join(wrapped(name, 1.3, 7)) for name in names[:-1]], rotation=90)
    axes.set_yticks(range(count - 1), ["\n".join(wrapped(name, 1.3, 7)) for name in names[1:]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("rank correlation\nover heads")


def _scatter(axes: Axes, effects: Floats, names: list[str], listed: list[tuple[int, ...]]) -> None:
    """Draw the effects of all heads under two imputations, with rings around those that are listed."""
    if not np.nan_to_num(effects).any():
        say_nothing(axes, "no change")
        axes.set(xticks=[], yticks=[], box_aspect=1)
        return
    one, other = effects
    finite = effects[np.isfinite(effects)]
    ends = np.array([finite.min(), finite.max()]) + np.array([-0.06, 0.06]) * (np.ptp(finite) or 1.0)
    axes.plot(ends, ends, color="0.6", linewidth=0.8)
    axes.plot(one.ravel(), other.ravel(), ".", color="black", markersize=3, mew=0)
    if listed:
        at = tuple(np.array(listed).T)
        axes.plot(one[at], other[at], "o", mfc="none", mec=ACCENT, markersize=6, mew=0.9)
    axes.set(xlim=ends, ylim=ends, box_aspect=1)
    for axis, name in ((axes.xaxis, names[0]), (axes.yaxis, names[1])):
        axis.set_label_text("\n".join(wrapped(f"change under {name} (pp)", 2.0, 8)))
    axes.locator_params(nbins=4)
    r = rank_correlation(one, other)
    axes.set_title("no rank correlation" if r is None else f"rank correlation {_decimal(r)}")
    axes.spines[["top", "right"]].set_visible(False)


def _heads(axes: Axes, change: Change, names: list[str], cells: list[tuple[int, ...]]) -> None:
    """Draw the effect of some heads under each imputation, with its interval if there are several prompts."""
    axes.spines[["top", "right"]].set_visible(False)
    if not cells:
        say_nothing(axes, "no difference")
        axes.set(xticks=[], yticks=[])
        return
    count = len(names)
    for row, (layer, head) in enumerate(cells):
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="0.93", linewidth=0)
        for index, mark in enumerate(marks(names)):
            y = row + 0.76 * ((index + 0.5) / count - 0.5)
            if change.low is not None and change.high is not None:
                axes.hlines(
                    y, change.low[index, layer, head], change.high[index, layer, head], color="0.4", linewidth=0.7
                )
            value = change.mean[index, layer, head]
            axes.plot(value, y, **mark)
    axes.axvline(0, color="black", linewidth=0.5, linestyle=":")
    axes.set_yticks(range(len(cells)), [f"L{layer}H{head}" for layer, head in cells])
    interval = "" if change.low is None else ", with 95% interval"
    axes.set(ylim=(len(cells) - 0.5, -0.5), xlabel="\n".join(wrapped(f"change in P(target) (pp){interval}", 2.7, 8)))
    axes.locator_params(axis="x", nbins=5)


def _decimal(r: float) -> str:
    return f"{r:z.2f}".replace("-", MINUS)


def _finding(drawn: Drawn, change: Change) -> str:
    """Return which pair agrees least, and where, in words."""
    pairs = findings(drawn.imputations, change.mean, change.differs)
    least, shown = pairs[0], dict(zip(drawn.imputations, drawn.names, strict=True))
    names, r = " and ".join(shown[name] for name in least["imputations"]), least["rank_correlation"]
    if not np.nan_to_num(change.mean).any():
        return f"no ablation changes {drawn.probability}"
    if r is None:
        return f"{names} cannot be compared: all heads have the same effect under one of them"
    words = "agree least: rank correlation" if pairs[1:] else "have a rank correlation of"
    correlation = f"{names} {words} {_decimal(r)}"
    heads = least["disagreements"] or [least["largest_difference"]]
    layer, head = heads[0]["layer"], heads[0]["head"]
    amounts = (
        f"by {change.amount((drawn.imputations.index(name), layer, head), 'pp')} under {shown[name]}"
        for name in least["imputations"]
    )
    return f"{correlation}; L{layer}H{head} changes {drawn.probability} {' and '.join(amounts)}"
