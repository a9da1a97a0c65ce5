"""The figure of named sets of heads: what each set does to the probability of the target, and to the prediction.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ablation.errors import shortened
from ablation.figures.drawn import FACTORS, heading, names_of_imputations, quoted, roles
from ablation.figures.labels import (
    NAME,
    NO_BREAK,
    STYLE,
    Floats,
    add_title,
    largest_cells,
    printable,
    rounded,
    say_nothing,
    signed,
    tick_label,
    width,
)
from ablation.figures.maps import add_legend, marks
from ablation.reports.report import token_labels
from ablation.results import Result
from ablation.studies import statistics

LABEL = 2.0
"""Width of the name of a set in inches, at most."""
DRAWN = {"target_probability": FACTORS["target_probability"], "kl": 1.0}
"""{drawn metric: drawn units for each of its own}"""
WIDTHS = 1.9, 1.5
"""Widths of the panels of `DRAWN` in inches."""
COUNTS, TOKENS = 1.5, 1.3
"""Widths of the panel of changed predictions in inches: of several prompts; of one, for each of two imputations."""


class _Sets:
    """The sets of a result. Dimensions: P prompts, S sets, I imputations. Means are over the prompts.

    names: [S], each as wide as `LABEL` at most. columns: [S, I] the ablations of the result; -1 where there is none.
    mean, low, high: {metric: [S, I]} in drawn units; NaN where there is no ablation, and an interval of one prompt.
    """

    def __init__(self, result: Result) -> None:
        kept = result.kept  # raises InvalidResult for a result of a text
        self.result, self.imputations = result, names_of_imputations(result)
        sets = list(dict.fromkeys((key.title, key.heads, key.positions) for key in result.ablations))
        several = len({positions for *_, positions in sets}) > 1
        names = (f"{title or 'no head'}{f' at {positions}' if several else ''}" for title, _, positions in sets)
        self.names = [_fitted(printable(name), LABEL, 7) for name in names]
        self.columns = np.full((len(sets), len(result.imputations)), -1)
        rows = {of: number for number, of in enumerate(sets)}
        for number, key in enumerate(result.ablations):
            row = rows[key.title, key.heads, key.positions]
            self.columns[row, result.imputations.index(key.imputation)] = number
        self.mean, self.low, self.high = {}, {}, {}
        for metric, factor in DRAWN.items():
            change = factor * result.change(metric)
            values = (change.mean(axis=0), *statistics.bootstrap_interval(change))
            self.mean[metric], self.low[metric], self.high[metric] = map(self.arranged, values)
        self.flips = self.arranged((~kept).sum(axis=0).astype(float))
        """[S, I] the number of prompts whose prediction changes."""

    def arranged(self, values: Floats) -> Floats:
        """Arrange values of ablations, [A] -> [S, I]; NaN where there is none."""
        return np.where(self.columns < 0, np.nan, values[self.columns])

    @property
    def prompts(self) -> int:
        return len(self.result.prompts)


def draw_sets(result: Result, folder: Path | str, title: str, decode: Callable[..., str]) -> Path:
    """Draw a result of sets of heads as sets.png in an existing folder, and return its path.

    title: the model and the prompt; for several prompts, the model. decode: returns the text of token ids. Raises
    OSError, and InvalidResult for a result of a text.
    """
    sets = _Sets(result)
    _, _, probability, clean = roles(result, decode)
    several, flips = len(sets.imputations) > 1, bool(np.nansum(sets.flips))
    beside = COUNTS if sets.prompts > 1 else TOKENS * min(2, len(sets.imputations))
    widths = [*WIDTHS, beside] if flips else [*WIDTHS]
    row = 0.14 + 0.03 * len(sets.imputations)  # inches
    path = Path(folder, "sets.png")
    with style.context(["default", STYLE]):
        labels = max(width(name, 7) for name in sets.names)
        figure = Figure(figsize=(labels + sum(widths) + 0.3 * len(widths), 0.8 + row * max(2, len(sets.names))))
        panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False, sharey=True)[0]
        for axes, metric in zip(panels, DRAWN, strict=False):
            _changes(axes, sets, metric)
        averaged = "mean " if sets.prompts > 1 else ""
        panels[0].set_xlabel(f"{averaged}change in P(target) (pp)")
        panels[1].set_xlabel(f"{averaged}KL (nats)")
        for axes in panels[1:]:
            axes.tick_params(left=False)
        panels[0].set_yticks(range(len(sets.names)), sets.names)
        panels[0].set_ylim(len(sets.names) - 0.5, -0.5)
        if flips and sets.prompts > 1:
            _points(panels[2], sets, sets.flips)
            panels[2].set(xlim=(-0.04 * sets.prompts, 1.04 * sets.prompts))
            panels[2].set_xlabel(f"changed predictions, of {sets.prompts}")
            panels[2].xaxis.set_major_locator(MaxNLocator(4, integer=True))
        elif flips:
            _tokens(panels[2], sets, decode, beside)
        handles: list[Line2D | Patch] = [Line2D([], [], **mark) for mark in marks(sets.imputations) if several]
        if sets.prompts > 1:
            label = f"95% interval over {sets.prompts} prompts, not corrected"
            handles.append(Line2D([], [], color="0.4", linewidth=0.9, label=label))
        add_legend(figure, handles)
        add_title(figure, _finding(sets, probability, clean), heading(result, title))
        figure.savefig(path, backend="agg")
    return path


def _changes(axes: Axes, sets: _Sets, metric: str) -> None:
    """Draw the mean change of a metric by each set, with its interval."""
    if not np.nan_to_num(sets.mean[metric]).any():
        say_nothing(axes, "no change")
        axes.set_xticks([])
        axes.spines[["top", "right"]].set_visible(False)
        return
    axes.axvline(0, color="black", linewidth=0.5, linestyle=":")
    _points(axes, sets, sets.mean[metric], (sets.low[metric], sets.high[metric]))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(tick_label))


def _points(axes: Axes, sets: _Sets, values: Floats, interval: tuple[Floats, Floats] | None = None) -> None:
    """Draw a point for each set and imputation. values: [S, I]. interval: its ends."""
    rows, count = np.arange(len(values)), len(sets.imputations)
    for row in rows[1::2]:
        axes.axhspan(row - 0.5, row + 0.5, color="0.94", linewidth=0)
    for index, mark in enumerate(marks(sets.imputations)):
        y = rows + 0.76 * ((index + 0.5) / count - 0.5)
        if interval is not None:
            axes.hlines(y, interval[0][:, index], interval[1][:, index], color="0.4", linewidth=0.9)
        axes.plot(values[:, index], y, **{**mark, "markersize": 3.5 if count > 1 else 4.5})
    axes.spines[["top", "right"]].set_visible(False)


def _tokens(axes: Axes, sets: _Sets, decode: Callable[..., str], inches: float) -> None:
    """Write the other predictions for the only prompt, with the imputations if not all have one. inches: the width."""
    ids = sets.result.ablated["argmax"][0]
    labels = token_labels({int(token): decode(int(token)) for token in ids}, quoted)
    for row, columns in enumerate(sets.columns):
        made: dict[str, list[str]] = {}
        for name, column in zip(sets.imputations, columns, strict=True):
            if column >= 0 and not sets.result.kept[0, column]:
                made.setdefault(labels[int(ids[column])], []).append(name)
        everywhere = len(made) == 1 and sum(map(len, made.values())) == (columns >= 0).sum()
        words = ", ".join(made if everywhere else (f"{token} ({', '.join(names)})" for token, names in made.items()))
        axes.text(0.02, row, _fitted(words, inches - 0.2, 7), fontsize=7, va="center", gid=NAME)
    axes.set(xticks=[], xlabel="changed prediction", xlim=(0, 1))
    axes.spines[:].set_visible(False)


def _fitted(text: str, inches: float, size: float) -> str:
    """Return a printable text without its middle if it is wider than so many inches in the font of that size."""
    if width(text, size) <= inches:
        return text
    return next(short for n in range(len(text), 0, -1) if width(short := shortened(text, n), size) <= inches)


def _finding(sets: _Sets, probability: str, clean: str) -> str:
    """Return which set changes the target's probability most, and how many change the prediction, in words."""
    mean = sets.mean["target_probability"]
    found = largest_cells(mean, 1)
    flipping, total = int(np.nansum(sets.flips > 0)), int((sets.columns >= 0).sum())
    of = "the prediction" if sets.prompts > 1 else f"the prediction {clean}"
    what = "ablations" if sets.imputations[1:] else "sets"
    if total == 1:
        counted = f"{'it' if found else 'the only set'} {'changes' if flipping else 'keeps'} {of}"
    else:
        counted = f"{flipping} of {total} {what} change{'s' if flipping == 1 else ''} {of}"
    if sets.prompts > 1 and flipping:
        counted += f" of at least one of {sets.prompts} prompts"
    if not found:
        return f"no set changes {probability}; {counted}"
    row, column = at = found[0]
    name = f"{sets.names[row]} ({sets.imputations[column]})" if sets.imputations[1:] else sets.names[row]
    amount = f"{signed(mean[at])} pp"
    if sets.prompts > 1:
        ends = (sets.low, sets.high)
        amount += f" [{', '.join(signed(end['target_probability'][at]) for end in ends)}]"
    most = " most" if total > 1 else ""
    amount = amount.replace(" ", NO_BREAK)
    words = f"{name} changes {probability}{most}, by {amount}, and KL is {rounded(sets.mean['kl'][at])} nats"
    return f"{words}; {counted}"
