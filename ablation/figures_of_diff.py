"""The figure of `ablation diff`: the effects of two results against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from ablation.diff import Pair, effects
from ablation.errors import shortened
from ablation.figure_texts import STYLE
from ablation.maps import ACCENT

LABELLED = 5
"""How many of the ablations that moved most are named."""


def draw(pair: Pair, path: Path, names: tuple[str, str]) -> None:
    """Draw the mean change by each ablation, in the one result against the other, as a PNG file; see `diff.effects`.

    names: of the two results. Raises OSError.
    """
    metric, one, other = effects(pair)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(4.2, 4.2))
        axes = figure.subplots()
        ends = np.array([min(one.min(), other.min()), max(one.max(), other.max())])
        ends += np.array([-0.05, 0.05]) * (np.ptp(ends) or 1.0)
        axes.plot(ends, ends, color="0.6", linewidth=0.8, label="equal")
        for number, imputation in enumerate(pair.one.imputations):
            own = [key.imputation == imputation for key in pair.one.ablations]
            colour, marker = (("black", "."), (ACCENT, "x"))[number % 2]
            axes.plot(one[own], other[own], marker, color=colour, markersize=4, linestyle="none", label=imputation)
        worst = np.argsort(-np.abs(other - one))[:LABELLED]
        for index in worst[np.abs(other - one)[worst] > 0]:
            axes.annotate(
                pair.one.ablations[index].label,
                (one[index], other[index]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=6,
            )
        axes.set(xlim=ends, ylim=ends, aspect="equal")
        axes.set_xlabel(f"first: {shortened(names[0], 40)}")
        axes.set_ylabel(f"second: {shortened(names[1], 40)}")
        axes.set_title(f"change of {metric} by each ablation,\nin nats, averaged over the prompts")
        axes.legend(loc="upper left")
        figure.savefig(path, backend="agg")
