"""Figures of a sweep. They stay legible at the size of a paper, for colour-blind readers, and printed in grey.

Figures of several prompts show means over the prompts; `figures_of_prompts` computes the values that are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ablation.figures_of_prompts import (
    FONT,
    LARGEST_CELL,
    MINUS,
    RIM,
    Drawn,
    Flags,
    Floats,
    add_title,
    cell_size,
    largest_magnitude,
    name_heads,
    printable,
    rounded,
    say_nothing,
    strongest,
    tick_label,
    tick_step,
    wrapped,
)
from ablation.report import trend
from ablation.results import Result

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
DIVERGING, SEQUENTIAL = "RdBu_r", "Greys"  # distinguishable by the colour-blind; white is 0
ACCENT = "#D55E00"
ABSENT: dict[str, Any] = {"facecolor": "0.85", "edgecolor": "0.55", "hatch": "/////", "linewidth": 0}
RING: dict[str, Any] = {"marker": "o", "mfc": "none", "mec": "black", "linestyle": "none", "mew": 0.8}
DASH: dict[str, Any] = {"marker": "_", "linestyle": "none", "mew": 0.5}
DOT: dict[str, Any] = {"marker": "o", "mec": "white", "mew": 0.25, "color": "black", "linestyle": "none"}
NARROWEST = 4.2
"""Width of a figure in inches, at least."""
TREND_FROM = 0.1
"""The trend line is drawn if depth explains at least this share of the variance."""


class Panel(NamedTuple):
    """One map of all heads.

    values: [layer, head]. title: lines. flipped: [layer, head], the heads to mark by a ring because their ablation
    changes the argmax. certain: [layer, head], the heads whose interval excludes 0. None: without such marks.
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


def draw(result: Result, folder: Path | str, *, title: str, decode: Callable[..., str]) -> list[Path]:
    """Draw a result of one-head ablations as PNG files in an existing folder, and return their paths. Raises OSError.

    title: the model and the prompt; for several prompts, the model. decode: returns the text of token ids.
    """
    drawn = Drawn(result, decode)
    heading = f"{title.rstrip(': ')}: {drawn.prompts} prompts" if drawn.many else title
    drawings: dict[str, Callable[[Drawn], Drawing]] = {"sensitivity": sensitivity}
    if len(drawn.imputations) > 1:
        drawings["difference"] = difference
    drawings |= {"histograms": histograms, "head_means": head_means, "margins": margins}
    if drawn.many:
        drawings["strongest"] = lambda drawn: Drawing(*strongest(drawn))
    paths = []
    with style.context(["default", STYLE]):  # ignores matplotlib settings of the user, and leaves them unchanged
        for name, drawing in drawings.items():
            composed = drawing(drawn)
            add_title(composed.figure, composed.finding, heading)
            for axes, panel in composed.maps:
                name_heads(axes, panel.values, panel.flipped)
            paths.append(Path(folder, f"{name}.png"))
            composed.figure.savefig(paths[-1], backend="agg")
    return paths


def sensitivity(drawn: Drawn) -> Drawing:
    """Draw maps of the change in probability, in percentage points: of the target and of the control."""
    groups = []
    for role, metric in ((drawn.target, "target_probability"), (drawn.control, "control_probability")):
        change = drawn.change(metric)
        panels = [
            Panel(change.mean[i], [f"{role}, {printable(name)}", drawn.kept_line(i)], drawn.flips(i), change.certain(i))
            for i, name in enumerate(drawn.imputations)
        ]
        groups.append(Group(panels, f"{drawn.averaged}change in P({role.split()[0]}) (pp)"))
    return maps(drawn.has_head, groups, f"{drawn.kept_line()}; {drawn.strongest_line()}", drawn.argmax)


def difference(drawn: Drawn) -> Drawing:
    """Draw a map of the target and one of the control: the change under the second imputation - that under the first.

    Changes are of probabilities, in percentage points.
    """
    first, second = map(printable, drawn.imputations[:2])
    changes = [drawn.difference(metric) for metric in ("target_probability", "control_probability")]
    groups = [
        Group(
            [Panel(change.mean[0], [role, f"{second} {MINUS} {first}"], None, change.certain(0))],
            f"{drawn.averaged}difference in P({role.split()[0]}) (pp)",
            "no difference",
        )
        for role, change in zip((drawn.target, drawn.control), changes, strict=True)
    ]
    place = changes[0].strongest
    if place is None:
        return maps(drawn.has_head, groups, f"{second} and {first} change {drawn.probability} alike")
    _, layer, head = place
    more = "more" if changes[0].mean[place] > 0 else "less"
    finding = f"L{layer}H{head}: {drawn.probability} is {changes[0].amount(place, 'pp')} {more} under {second} than"
    return maps(drawn.has_head, groups, f"{finding} under {first}, the largest difference")


def margins(drawn: Drawn) -> Drawing:
    """Draw maps of the change of the margin in logits, and for several prompts of the share that an ablation flips.

    The margin, top-1 logit - top-2 logit, counts as negative if the ablation changes the argmax.
    """
    change = drawn.change("signed_margin")
    kept = [[printable(name), drawn.kept_line(i)] for i, name in enumerate(drawn.imputations)]
    panels = [Panel(change.mean[i], title, drawn.flips(i), change.certain(i)) for i, title in enumerate(kept)]
    clean = rounded(float(drawn.result.clean["margin"].mean()))
    label = f"{drawn.averaged}change of top-1 {MINUS} top-2 logit (clean {clean}; counts as negative if flipped)"
    groups = [Group(panels, label)]
    if drawn.many:
        shares = [
            Panel(of, [printable(n), "share flipped"]) for n, of in zip(drawn.imputations, drawn.flipped, strict=True)
        ]
        groups.append(Group(shares, "prompts whose argmax changes (%)", "no flips", True))
    place = change.strongest
    if place is None:
        return maps(drawn.has_head, groups, f"No ablation changes the margin of {clean} logits", drawn.argmax)
    verb = "raises" if change.mean[place] > 0 else "lowers"
    finding = f"{drawn.head(place)} {verb} the margin of {clean} logits most, by {change.amount(place, 'logits')}"
    return maps(drawn.has_head, groups, f"{finding}; {drawn.kept_line()}", drawn.argmax)


def histograms(drawn: Drawn) -> Drawing:
    """Draw histograms of the change in probability, in percentage points, of all heads."""
    columns = len(drawn.imputations)
    figure = Figure(figsize=(max(0.6 + 2.5 * columns, NARROWEST), 0.7 + 2 * 1.75))
    rows = ((drawn.target, "target_probability"), (drawn.control, "control_probability"))
    for row, (role, metric) in zip(
        figure.subplots(2, columns, sharex="row", sharey="row", squeeze=False), rows, strict=True
    ):
        change = drawn.change(metric).mean
        for axes, name, values in zip(row, drawn.imputations, change, strict=True):
            heads = values[np.isfinite(values)]
            title = wrapped(f"{role}, {printable(name)}", 2.3, 8)
            axes.set_title("\n".join([*title, f"standard deviation {rounded(heads.std())} pp"]))
            axes.spines[["top", "right"]].set_visible(False)
            if not change[np.isfinite(change)].any():
                say_nothing(axes, "no change")
                axes.set(xticks=[], yticks=[])
                continue
            end = largest_magnitude(change)
            counts, *_ = axes.hist(heads, bins=list(np.linspace(-end, end, 42)), color="0.5")  # one is centred on 0
            axes.plot(heads, np.full_like(heads, -0.07 * counts.max()), "|", color="black", markersize=4, mew=0.4)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(tick_label))
    figure.supxlabel(f"{drawn.averaged}change in probability (pp); each tick below is one head", fontsize=8)
    figure.supylabel("heads", fontsize=8)
    size = np.abs(drawn.change("target_probability").mean)
    half = rounded(float(np.median(size[np.isfinite(size)])))
    if not size[np.isfinite(size)].any():
        return Drawing(figure, drawn.strongest_line())
    spread = f"Half of the {drawn.total} ablations change {drawn.probability} by at most {half} pp"
    return Drawing(figure, f"{spread}; {drawn.strongest_line()}")


def head_means(drawn: Drawn) -> Drawing:
    """Draw the mean of each head's z in the clean run: as a map, and over depth.

    A least-squares line is drawn if depth explains at least `TREND_FROM` of the variance of at least three layers.
    """
    means = drawn.head_mean
    (layers, heads), there, bound = means.shape, np.isfinite(means), 1.05 * largest_magnitude(means)
    cell = cell_size(layers, 2 * heads)
    across, down = max(heads * cell, 1.2), max(layers * cell, 1.2)
    figure = Figure(figsize=(1.6 + across + 2.4, 1.2 + down))
    left, right = figure.subplots(1, 2, width_ratios=[across, 2.4], sharey=True)
    shown = Panel(means, "")
    image = heat_map(left, shown, (-bound, bound), across / heads, down / layers)
    depth = np.arange(layers)
    right.axvline(0, color="black", linewidth=0.5, linestyle=":")
    right.plot(means, depth, ".", color="0.6", markersize=3)
    # NaN where a layer has no heads, so that no line is drawn through it.
    averages = [layer[head].mean() if head.any() else np.nan for layer, head in zip(means, there, strict=True)]
    right.plot(averages, depth, "o-", color="black", markersize=3, linewidth=0.8)
    right.set(xlim=(-bound, bound), xlabel="mean of z")
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.tick_params(labelleft=False)
    handles: list[Line2D | Patch] = [
        Line2D([], [], marker=".", color="0.6", linestyle="none", label="head"),
        Line2D([], [], marker="o", color="black", markersize=3, linewidth=0.8, label="layer average"),
    ]
    slope, _, r_squared = trend(means)
    some = depth[there.any(axis=1)]  # layers that have heads
    words = f"depth explains {r_squared:.0%} of the variance"
    if len(some) < 3:
        words = "too few layers for a trend"
    elif r_squared >= TREND_FROM:
        runs = np.split(some, np.flatnonzero(np.diff(some) > 1) + 1)
        along = np.concatenate([[run[0] - 0.5, run[-1] + 0.5, np.nan] for run in runs])
        right.plot(means[there].mean() + slope * (along - np.nonzero(there)[0].mean()), along, "--", color=ACCENT)
        label = f"trend {slope:+.2g} per layer (r² {r_squared:.2f})".replace("-", MINUS)
        handles.append(Line2D([], [], linestyle="--", color=ACCENT, label=label))
    if not means[there].any():
        say_nothing(left, "all 0")
        right.set_xticks([])
        finding = "The mean of z is 0 for every head"
    else:
        figure.colorbar(image, ax=right, label="mean of z", aspect=30, fraction=0.05, pad=0.03)
        low, high = (np.unravel_index(of(means), means.shape) for of in (np.nanargmin, np.nanargmax))
        ends = [f"{rounded(float(means[at]))} (L{at[0]}H{at[1]})" for at in (low, high)]
        finding = f"The mean of z is between {ends[0]} and {ends[1]}; {words}"
    add_legend(figure, [*handles, *missing_heads_legend(means), *negative_legend(means, -bound)])
    return Drawing(figure, finding, [(left, shown)])


# ---- maps


def maps(has_head: Flags, groups: Sequence[Group], finding: str, argmax: str = "") -> Drawing:
    """Draw groups of maps, in the arrangement in which cells are largest. Each colour scale is symmetric about 0.

    has_head: [layer, head]. argmax: the clean one, as text, for the legend of flips.
    """
    layers, heads = has_head.shape
    numbered = [(index, panel) for index, group in enumerate(groups) for panel in group.panels]
    grids = [  # a row for each group, a row for all, a column for all
        [[cell for cell in numbered if cell[0] == index] for index in range(len(groups))],
        [numbered],
        [[cell] for cell in numbered],
    ]
    sizes = [cell_size(layers * len(grid), heads * len(grid[0])) for grid in grids]
    cell = max(sizes)
    grid = grids[sizes.index(cell)]
    rows, columns = len(grid), len(grid[0])
    bars = len({index for index, _ in grid[0]})  # side by side
    across = max(heads * cell, 1.15, (NARROWEST - 0.6 - 0.75 * bars) / columns - 0.15)  # inches
    down = max(layers * cell, 0.65)
    titles = [[line for part in panel.title for line in wrapped(part, across, 8)] for _, panel in numbered]
    room = 0.2 + 0.13 * max(map(len, titles))  # above a row
    figure = Figure(figsize=(0.6 + columns * (across + 0.15) + 0.75 * bars, 0.9 + rows * (down + room)))
    places = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    drawing = Drawing(figure, finding)
    legend = missing_heads_legend(numbered[0][1].values)
    dashes: list[Line2D | Patch] = []
    certain = [panel.certain for _, panel in numbered if panel.certain is not None]
    dotted = 2 * np.sum(certain) <= len(certain) * has_head.sum()  # those cells get a dot that are fewer
    for index, group in enumerate(groups):
        values = np.stack([panel.values for panel in group.panels])
        end = largest_magnitude(values)
        low = 0.0 if group.shares else -end
        own = []
        for (at, panel), axes, title in zip(numbered, places, titles, strict=True):
            if at == index:
                dots = None if panel.certain is None else (panel.certain == dotted) & has_head
                image = heat_map(axes, panel, (low, end), across / heads, down / layers, dots)
                axes.set_title("\n".join(title))
                axes.label_outer()
                own.append(axes)
                drawing.maps.append((axes, panel))
        if not np.nan_to_num(values).any():
            for axes in own:
                say_nothing(axes, group.nothing)
            continue
        bar = figure.colorbar(image, ax=own, aspect=30, fraction=0.05, pad=0.02, format=FuncFormatter(tick_label))
        bar.locator = MaxNLocator(4)
        bar.set_label("\n".join(wrapped(group.label, max(1.2, len(own) / columns * down if bars == 1 else down), 8)))
        dashes = dashes or negative_legend(values, low, None if len(groups) == 1 else "20% of the scale")
    if any(panel.flipped is not None and panel.flipped.any() for _, panel in numbered):
        legend.append(Line2D([], [], markersize=6, label=f"the argmax is not {argmax}", **RING))
    if any(of is not None and ((of == dotted) & has_head).any() for of in certain):
        words = "excludes" if dotted else "includes"
        legend.append(Line2D([], [], markersize=2.5, label=f"95% interval {words} 0", **DOT))
    add_legend(figure, [*legend, *dashes])
    return drawing


def heat_map(
    axes: Axes, panel: Panel, scale: tuple[float, float], across: float, down: float, dots: Flags | None = None
) -> Any:
    """Draw one map. scale: the values at both ends of the colour scale. across, down: sides of a cell in inches.

    dots: [layer, head], the cells to mark by a dot. A dash marks clearly negative cells, which would look like positive
    ones in a grey print.
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
    if dots is not None:
        y, x = np.nonzero(dots)
        beside = 0.28 * (panel.values[y, x] < low / 5)  # of a dash
        axes.plot(x + beside, y + beside, markersize=max(1.2, 0.14 * side), **DOT)
    if panel.flipped is not None:
        y, x = np.nonzero(panel.flipped)
        axes.plot(x, y, markersize=0.65 * side, path_effects=RIM, **RING)
    return image


# ---- parts of figures


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
    return [Line2D([], [], markersize=4, label=f"below {MINUS}{fifth or rounded(-low / 5)}", color="black", **DASH)]


def missing_heads_legend(values: Floats) -> list[Line2D | Patch]:
    """Return the legend for cells without a head: one entry, or none if no value [layer, head] is NaN."""
    missing = np.isnan(values)
    label = "no heads" if missing.all(axis=1).any() else "no such head"
    return [Patch(label=label, **ABSENT)] if missing.any() else []
