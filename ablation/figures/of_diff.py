"""The figure of `ablation diff`: the effects of two results against each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from ablation.errors import shortened
from ablation.figures.labels import STYLE, add_title, name_points, printable, rounded
from ablation.figures.maps import add_legend, marks
from ablation.reports.diff import Pair, effects

LABELLED = 5
"""How many of the ablations that moved most are named."""


def draw(pair: Pair, found: Mapping[str, Any], path: Path, names: tuple[str, str]) -> None:
    """Draw the mean change by each ablation, in the one result against the other, as a PNG file; see `diff.effects`.

    found: the result of `diff.findings`. names: of the two results. Raises OSError.
    """
    metric, one, other = effects(pair)
    first, second = (printable(shortened(name, 40)) for name in names)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(4.6, 4.4))
        axes = figure.subplots()
        ends = np.array([min(one.min(), other.min()), max(one.max(), other.max())])
        ends += np.array([-0.08, 0.08]) * (np.ptp(ends) or 1.0)
        (line,) = axes.plot(ends, ends, color="0.6", linewidth=0.8, label="equal")
        handles = [line]
        for imputation, mark in zip(pair.one.imputations, marks(pair.one.imputations), strict=True):
            own = [key.imputation == imputation for key in pair.one.ablations]
            axes.plot(one[own], other[own], **{**mark, "markersize": 3, "mew": 0.5})
            handles += axes.plot([], [], **mark)
        axes.set(xlim=ends, ylim=ends, box_aspect=1)
        axes.locator_params(nbins=5)
        axes.set_xlabel(f"first: {first}")
        axes.set_ylabel(f"second: {second}")
        axes.spines[["top", "right"]].set_visible(False)
        add_legend(figure, handles)
        what = f"mean change of {metric} by each ablation, in nats"
        add_title(figure, _finding(found), what)
        worst = np.argsort(-np.abs(other - one), kind="stable")[:LABELLED]
        labels = [pair.one.ablations[i].label for i in worst]
        moved = np.abs(other - one)[worst] > 0
        name_points(
            axes, np.stack([one, other], axis=1)[worst][moved], [of for of, m in zip(labels, moved, strict=True) if m]
        )
        figure.savefig(path, backend="agg")


def _finding(found: Mapping[str, Any]) -> str:
    """Return the verdict, in words."""
    bound = rounded(found["tolerance"]["largest"])
    if not found["differs"]:
        return f"The results agree: no log-probability moved by more than {bound} nats"
    moved = f"{found['moved']} of {found['of']} ablated runs moved by more than {bound} nats"
    worst = found["worst"][:1]
    most = (
        f", {worst[0]['heads']} ({printable(worst[0]['imputation'])}) by {rounded(worst[0]['difference'])}"
        if worst
        else ""
    )
    flips = len(found["flips"])
    return f"The results differ: {moved}{most}; {flips} prediction{' differs' if flips == 1 else 's differ'}"
