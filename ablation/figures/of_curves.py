"""The figure of a removal curve: what is left of the predictions as more heads are ablated. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ablation.figures.drawn import heading, names_of_imputations
from ablation.figures.labels import MINUS, NO_BREAK, STYLE, Floats, add_title, rounded, signed, width, wrapped
from ablation.figures.maps import ACCENT, add_legend
from ablation.results import Result
from ablation.studies.curves import BAND, METRICS, Curve, first_halving

DRAWN = {
    "correct": ("accuracy (%)", 100.0),
    "logit_difference": ("logit difference", 1.0),
    "kl": ("KL(clean || ablated) (nats)", 1.0),
}
"""{drawn metric: (its name, drawn units for each of its own)}"""
COLUMNS = 3
"""Panels side by side, at most."""
MARKED = 40
"""Up to so many sizes, each has a point."""
PANEL = 2.3, 1.5
"""Width and height of a panel in inches."""


class Look(NamedTuple):
    """How the random orders of a kind are drawn, and called. They differ in grey, too."""

    noun: str
    band: dict[str, Any]
    line: dict[str, Any]


LOOKS = {
    "uniform": Look(
        "random heads",
        {"facecolor": "0.84", "linewidth": 0},
        {"color": "0.45", "linestyle": "--", "linewidth": 1.0},
    ),
    "layers": Look(
        "random heads of the same layers",
        {"facecolor": "none", "edgecolor": ACCENT, "alpha": 0.45, "hatch": "/////", "linewidth": 0},
        {"color": ACCENT, "linestyle": "-.", "linewidth": 1.0},
    ),
}
ORDERED: dict[str, Any] = {"color": "black", "linewidth": 1.2, "marker": "o", "markersize": 3}
CLEAN: dict[str, Any] = {"color": "black", "linewidth": 0.6, "linestyle": ":"}


def draw_curve(result: Result, folder: Path | str, title: str) -> Path:
    """Draw the result of a removal curve as curve.png in an existing folder, and return its path.

    title: the model and the prompts. Raises OSError, and InvalidResult for any other result.
    """
    curve, prompts = Curve.of(result), len(result.prompts)
    names = names_of_imputations(result)
    by_column = 1 < len(names) <= COLUMNS  # imputations side by side, else the metrics
    path = Path(folder, "curve.png")
    with style.context(["default", STYLE]):
        rows, columns = (len(DRAWN), len(names)) if by_column else (len(names), len(DRAWN))
        size = 0.3 + columns * PANEL[0], 0.7 + rows * (PANEL[1] + 0.2)
        figure = Figure(figsize=size)
        panels = figure.subplots(rows, columns, sharex=True, sharey="row" if by_column else "col", squeeze=False)
        for i, name in enumerate(names):
            for axes, metric in zip(panels[:, i] if by_column else panels[i], DRAWN, strict=True):
                _panel(axes, curve, metric, i)
                words = DRAWN[metric][0] + (f", {name}" if names[1:] else "")
                axes.set_title("\n".join(wrapped(words, PANEL[0] - 0.35, 8)))
        for axes in panels[-1]:
            axes.set_xlabel("ablated heads")
        add_legend(figure, _legend(curve, prompts))
        add_title(figure, _finding(curve, names, prompts), heading(result, title))
        figure.savefig(path, backend="agg")
    return path


def _panel(axes: Axes, curve: Curve, metric: str, imputation: int) -> None:
    """Draw one metric with one imputation against the number of ablated heads."""
    factor, ks = DRAWN[metric][1], np.array(curve.ks, dtype=float)
    single = len(ks) == 1
    # The band of a single size would have no width.
    across = np.array([ks[0] - 0.3, ks[0] + 0.3]) if single else ks
    axes.axhline(factor * curve.clean[metric], **CLEAN)
    for kind in curve.random:
        mean, low, high = (np.broadcast_to(factor * of[imputation], across.shape) for of in curve.band(kind, metric))
        axes.fill_between(across, low, high, **LOOKS[kind].band)
        axes.plot(across, mean, **LOOKS[kind].line)
    low, high = (factor * of[metric][imputation] for of in (curve.low, curve.high))
    crowded = {"markersize": 0, "linewidth": 0.8} if len(ks) > MARKED else {}
    axes.vlines(ks, low, high, color="black", linewidth=0.3 if crowded else 0.8)
    axes.plot(ks, factor * curve.ordered[metric][imputation], **{**ORDERED, **crowded})
    axes.spines[["top", "right"]].set_visible(False)
    if metric == "correct":
        axes.set(ylim=(-5, 105), yticks=(0, 25, 50, 75, 100))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
    _scale(axes, ks)


def _scale(axes: Axes, ks: Floats) -> None:
    """Choose a logarithmic axis if its steps between sizes are more even than those of a linear one."""
    if len(ks) < 3 or _unevenness(np.log2(ks)) >= _unevenness(ks):
        axes.xaxis.set_major_locator(FixedLocator(ks.tolist()) if len(ks) < 3 else MaxNLocator(6, integer=True))
        room = 0.05 * np.ptp(ks) or 1.0
        axes.set_xlim(ks[0] - room, ks[-1] + room)
        return
    axes.set_xscale("log", base=2)
    axes.set_xlim(ks[0] / (ks[-1] / ks[0]) ** 0.05, ks[-1] * (ks[-1] / ks[0]) ** 0.05)
    places = (PANEL[0] - 0.5) * np.log(ks / ks[0]) / np.log(ks[-1] / ks[0])  # inches
    shown: list[int] = []
    for at in reversed(range(len(ks))):  # from the largest size, so that it has a label
        if not shown or places[shown[-1]] - places[at] > width(f"{ks[shown[-1]]:.0f}", 7) + 0.08:
            shown.append(at)
    axes.xaxis.set_major_locator(FixedLocator(ks[shown[::-1]].tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _unevenness(places: Floats) -> float:
    steps = np.diff(places)
    return float(steps.std() / steps.mean())


def _legend(curve: Curve, prompts: int) -> list[Line2D | Patch]:
    bars = f"; lines: 95% interval over {prompts} prompts" if prompts > 1 else ""
    handles: list[Line2D | Patch] = [Line2D([], [], label=f"heads in their order{bars}", **ORDERED)]
    for kind, values in curve.random.items():
        look, orders = LOOKS[kind], values[METRICS[0]].shape[1]
        which = f"{look.noun}: {'one order' if orders == 1 else f'mean of {orders} orders'}"
        handles.append(Line2D([], [], label=which, **look.line))
        if orders > 1:
            handles.append(Patch(label=f"their {BAND[0]:.0f}th to {BAND[1]:.0f}th percentile", **look.band))
    return [*handles, Line2D([], [], label="clean run, no head ablated", **CLEAN)]


# ---- the finding


def _finding(curve: Curve, names: list[str], prompts: int) -> str:
    """Return at which sizes the ordered heads, and random ones in the median, halve what the model can do, in words.

    That is the accuracy; or else, of one prompt or if no answer is correct, the logit difference.
    """
    metric, what = "logit_difference", f"the logit difference of {rounded(curve.clean['logit_difference'])}"
    start = "the model answers no prompt correctly; " if prompts > 1 else ""
    if prompts > 1 and curve.clean["correct"] > 0:
        metric, what, start = "correct", f"the accuracy of {100 * curve.clean['correct']:.0f}%", ""
    words = _halving(curve, metric, what, names) if curve.clean[metric] > 0 else _change(curve, metric, what)
    text = f"{start}under {names[0]}, {words}" if names[1:] else start + words
    return (text[0].upper() + text[1:]).replace(what, what.replace(" of ", f" of{NO_BREAK}"))


def _halving(curve: Curve, metric: str, what: str, names: list[str]) -> str:
    """Return which numbers of heads halve a metric that is positive in the clean run. what: the metric in words."""
    clean, ordered, most = curve.clean[metric], curve.ordered[metric], curve.ks[-1]
    first, *others = (first_halving(values, clean, curve.ks) for values in ordered)
    if first is None:
        at = max(np.flatnonzero(ordered[0] == ordered[0].min()))
        left = f"{100 * ordered[0, at]:.0f}%" if metric == "correct" else rounded(float(ordered[0, at]))
        words = f"{_first_heads(most, 'do', 'does')} not halve {what}: {left} is left"
        if curve.ks[at] != most:
            words += f", by {_first_heads(curve.ks[at])}"
    else:
        words = f"{_first_heads(first, 'halve', 'halves')} {what}"
    if others:
        sizes = (f"{name}: {'no number' if k is None else k}" for name, k in zip(names[1:], others, strict=True))
        words += f" ({', '.join(sizes)})"
    return words + _random_halving(curve, metric, first)


def _random_halving(curve: Curve, metric: str, first: int | None) -> str:
    """Return which numbers of random heads halve a metric, in words. first: how many of the ordered heads do."""
    do: list[tuple[str, int]] = []
    do_not: list[tuple[str, int]] = []
    orders = 0
    for kind, of in curve.random.items():
        orders = of[metric].shape[1]
        k = first_halving(np.median(of[metric][0], axis=0), curve.clean[metric], curve.ks)
        (do_not if k is None else do).append((kind, curve.ks[-1] if k is None else k))
    words = ""
    if do:
        verb = "do" if do[0][1] > 1 or do[1:] else "does"
        words += f"; {_random(*do)} {verb}" if first is None else f", as {verb} {_random(*do)}"
    if do_not and first is not None:
        words += f"; {_random(*do_not)} {'do' if curve.ks[-1] > 1 or do_not[1:] else 'does'} not"
    return f"{words} (median of {orders} orders)" if words and orders > 1 else words


def _change(curve: Curve, metric: str, what: str) -> str:
    """Return how much the largest sets change a metric that cannot be halved, in words."""
    k, clean = curve.ks[-1], curve.clean[metric]
    words = f"{_first_heads(k, 'change', 'changes')} {what} by {signed(float(curve.ordered[metric][0, -1]) - clean)}"
    for kind, of in curve.random.items():
        words += f"; {_random((kind, k))} by {signed(float(np.median(of[metric][0, :, -1])) - clean)}"
    return words


def _first_heads(k: int, plural: str = "", singular: str = "") -> str:
    """Return the name of the first k heads, with a verb."""
    return f"the first head {singular}".strip() if k == 1 else f"the first {k} heads {plural}".strip()


def _random(*sizes: tuple[str, int]) -> str:
    """Return the names of sets of random heads. sizes: the kind and the number of heads of each."""
    nouns = ((LOOKS[kind].noun, k) for kind, k in sizes)
    return " and ".join(
        f"{k} {noun.replace('heads', 'head').replace('layers', 'layer') if k == 1 else noun}" for noun, k in nouns
    )
