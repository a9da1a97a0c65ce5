"""Figures of a sweep. They stay legible at the size of a paper, for colour-blind readers, and printed in grey.

Figures of several prompts show means over the prompts; `drawn` computes the values that are drawn. In all of them, a
dot marks a mean that differs from 0 at a false discovery rate of 5 %, the heads that the report counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ablation.figures.drawn import CHANCE, Drawn, heading
from ablation.figures.labels import (
    MINUS,
    STYLE,
    add_title,
    cell_size,
    largest_magnitude,
    name_heads,
    rounded,
    say_nothing,
    tick_label,
    wrapped,
)
from ablation.figures.maps import (
    ACCENT,
    NARROWEST,
    Drawing,
    Group,
    Panel,
    add_legend,
    heat_map,
    maps,
    missing_heads_legend,
    negative_legend,
)
from ablation.figures.of_agreement import agreement
from ablation.reports.report import trend
from ablation.results import Result

TREND_FROM = 0.1
"""The trend line is drawn if depth explains at least this share of the variance."""
LISTED = 10
"""How many heads the figure of the strongest heads shows for each imputation."""


def draw(result: Result, folder: Path | str, *, title: str, decode: Callable[..., str]) -> list[Path]:
    """Draw a result of one-head ablations as PNG files in an existing folder, and return their paths. Raises OSError.

    title: the model and the prompt; for several prompts, the model. decode: returns the text of token ids.
    """
    drawn = Drawn(result, decode)
    drawings: dict[str, Callable[[Drawn], Drawing]] = {"sensitivity": sensitivity}
    if len(drawn.imputations) > 1:
        drawings["agreement"] = agreement
    drawings |= {"histograms": histograms, "head_means": head_means, "margins": margins}
    if drawn.many:
        drawings["strongest"] = strongest
    paths = []
    with style.context(["default", STYLE]):  # ignores matplotlib settings of the user, and leaves them unchanged
        for name, drawing in drawings.items():
            composed = drawing(drawn)
            add_title(composed.figure, composed.finding, heading(result, title))
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
        is_target = metric == "target_probability"
        panels = [
            Panel(
                change.mean[i],
                [f"{role.split()[0]}, {name}", *([drawn.kept_line(i)] if is_target else [])],
                drawn.flips(i),
                change.certain(i),
            )
            for i, name in enumerate(drawn.names)
        ]
        groups.append(Group(panels, f"{drawn.averaged}change in P({role}) (pp)"))
    return maps(drawn.has_head, groups, f"{drawn.kept_line()}; {drawn.strongest_line()}", drawn.argmax)


def margins(drawn: Drawn) -> Drawing:
    """Draw maps of the change of the margin in logits, and for several prompts of the share that an ablation flips.

    The margin, top-1 logit - top-2 logit, counts as negative if the ablation changes the argmax.
    """
    change = drawn.change("signed_margin")
    panels = [
        Panel(change.mean[i], [name, drawn.kept_line(i)], drawn.flips(i), change.certain(i))
        for i, name in enumerate(drawn.names)
    ]
    clean = rounded(float(drawn.result.clean["margin"].mean()))
    label = f"{drawn.averaged}change of top-1 {MINUS} top-2 logit (clean {clean}; counts as negative if flipped)"
    groups = [Group(panels, label)]
    if drawn.many and not drawn.kept.all(where=drawn.has_head):
        shares = [Panel(of, [name, "share flipped"]) for name, of in zip(drawn.names, drawn.flipped, strict=True)]
        groups.append(Group(shares, "prompts whose argmax changes (%)", shares=True))
    finding = drawn.largest_line(change, f"the margin of {clean} logits", "logits")
    return maps(drawn.has_head, groups, f"{finding}; {drawn.kept_line()}", drawn.argmax)


def histograms(drawn: Drawn) -> Drawing:
    """Draw histograms of the change in probability of all heads, in percentage points: a row for each imputation."""
    figure = Figure(figsize=(5.6, 0.7 + max(1.45, 1.75 - 0.1 * len(drawn.names)) * len(drawn.names)))
    columns = ((drawn.target, "target_probability"), (drawn.control, "control_probability"))
    panels = figure.subplots(len(drawn.names), 2, sharex="col", sharey="col", squeeze=False).T
    for column, (role, metric) in zip(panels, columns, strict=True):
        change = drawn.change(metric).mean
        for axes, name, values in zip(column, drawn.names, change, strict=True):
            heads = values[np.isfinite(values)]
            title = wrapped(f"{role}, {name}", 2.3, 8)
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


def strongest(drawn: Drawn) -> Drawing:
    """Draw the heads that change the target's probability most, with their intervals over the prompts, in pp."""
    change = drawn.change("target_probability")
    assert change.low is not None and change.high is not None and change.differs is not None  # as of several prompts
    listed = min(LISTED, int(drawn.has_head.sum()))
    columns = min(len(drawn.names), 3 if len(drawn.names) % 2 else 2)
    rows = -(-len(drawn.names) // columns)
    figure = Figure(
        figsize=(max(0.9 + (3.0 if columns < 3 else 2.1) * columns, NARROWEST), 0.8 + rows * (0.6 + 0.17 * listed))
    )
    panels = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axes in panels[len(drawn.names) :]:
        axes.remove()
    for index, name in enumerate(drawn.names):
        axes = panels[index]
        size = np.where(drawn.has_head, np.abs(change.mean[index]), -1.0)
        cells = [np.unravel_index(at, size.shape) for at in np.argsort(-size, axis=None, kind="stable")[:listed]]
        mean, low, high, differs = (
            np.array([of[index, *cell] for cell in cells])
            for of in (change.mean, change.low, change.high, change.differs)
        )
        axes.set_yticks(range(listed), [f"L{layer}H{head}" for layer, head in cells])
        axes.set(ylim=(listed - 0.5, -0.5), title="\n".join(wrapped(name, 1.7, 8)))
        lowest = index + columns >= len(drawn.names)
        axes.tick_params(labelbottom=lowest)
        axes.set_xlabel("change in P(target) (pp)" if lowest else "")
        axes.spines[["top", "right"]].set_visible(False)
        if not np.nanmax(np.abs(change.of_prompts)):
            say_nothing(axes, "no change")
            axes.set_xticks([])
            continue
        for row, cell in enumerate(cells):
            values = change.of_prompts[:, index, *cell]
            axes.plot(values, np.full(len(values), row), "o", color="0.55", alpha=0.4, mew=0, markersize=3)
        axes.hlines(range(listed), low, high, color="black", linewidth=1.5)
        for is_certain, face in ((True, "black"), (False, "white")):
            (at,) = np.nonzero(differs == is_certain)
            axes.plot(mean[at], at, "D", color="black", mfc=face, markersize=4.5, mew=1)
        axes.axvline(0, color="black", linewidth=0.5, linestyle=":")
        axes.locator_params(axis="x", nbins=5)
    mark: dict[str, Any] = {"marker": "D", "color": "black", "markersize": 4.5, "mew": 1}
    handles = [
        Line2D([], [], mfc="black", label=f"mean that differs from 0 ({CHANCE})", **mark),
        Line2D([], [], mfc="white", label="other mean; lines: 95% intervals, not corrected", **mark),
        Line2D([], [], marker="o", color="0.7", mew=0, markersize=3.5, linestyle="none", label="one prompt"),
    ]
    add_legend(figure, handles)
    certain = f"{int(change.differs.sum())} of {drawn.total} ablations change it on average ({CHANCE})"
    return Drawing(figure, f"{drawn.strongest_line()}; {certain}" if change.strongest else drawn.strongest_line())
