"""The figure of pairs of heads: how far the effects of two heads do not add up. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ablation.figures.drawn import FACTORS, heading, names_of_imputations, roles
from ablation.figures.labels import (
    NAMED,
    NO_BREAK,
    STYLE,
    Flags,
    Floats,
    add_title,
    largest_cells,
    largest_magnitude,
    name_heads,
    name_points,
    say_nothing,
    signed,
    tick_label,
    width,
    wrapped,
)
from ablation.figures.maps import ABSENT, RING, Panel, add_legend, heat_map, negative_legend
from ablation.results import Result
from ablation.studies import statistics
from ablation.studies.pairs import Pairs
from ablation.units import pair_label

METRIC = "target_probability"
MAP = 2.4, 4.0
"""Side of a map in inches, at least and at most."""
SIDE = 0.155
"""Side of a cell in inches in which a head has a label of its own; larger only in a map of the smallest size."""
CROWD = 1000
"""From so many pairs, the points of a scatter plot are smaller."""
SCATTER = 1.9
"""Side of a scatter plot in inches."""


class _Shown:
    """The pairs of one imputation, in percentage points: means over the prompts.

    Dimensions: N pairs, H heads of the pairs.
    """

    def __init__(self, result: Result, imputation: str, name: str) -> None:
        self.pairs, self.name = Pairs.of(result, imputation), name
        self.compensating = self.pairs.compensates.any(axis=0)  # [N]; raises InvalidResult for a result of a text
        lower, upper = self.pairs.alone(METRIC)
        self.alone = FACTORS[METRIC] * np.stack([lower, upper]).mean(axis=1)  # [2, N]
        self.together = FACTORS[METRIC] * self.pairs.effect(METRIC).mean(axis=0)  # [N]
        self.interaction = self.together - self.alone.sum(axis=0)  # [N]
        self.interaction[np.abs(self.interaction) < 1e-10] = 0.0  # rounding of the sum

    @cached_property
    def labels(self) -> list[str]:
        """[H] the names of the heads."""
        return list(map(pair_label, self.pairs.heads))

    def cell(self, row: int, column: int) -> str:
        """The name of the pair of a cell of the map."""
        return f"{self.labels[row]}+{self.labels[column]}"

    @cached_property
    def upper(self) -> Floats:
        """[H, H] the interactions, above the diagonal; NaN elsewhere, and where there is no pair."""
        values = self.pairs.map_of(self.interaction)
        values[np.tril_indices(len(values))] = np.nan
        return values

    @cached_property
    def lower(self) -> Floats:
        """[H, H] the effects of both heads below the diagonal, and of each head alone on it; NaN elsewhere."""
        values = self.pairs.map_of(self.together)
        values[np.triu_indices(len(values))] = np.nan
        index = {head: number for number, head in enumerate(self.pairs.heads)}
        for pair, effects in zip(self.pairs.pairs, self.alone.T, strict=True):
            for head, effect in zip(pair, effects, strict=True):
                values[index[head], index[head]] = effect
        return values

    @cached_property
    def marked(self) -> Flags:
        """[H, H] the pairs that change a prediction which neither head changes alone, above the diagonal."""
        return np.triu(self.pairs.map_of(self.compensating.astype(float)) == 1, 1)

    @cached_property
    def strongest(self) -> list[int]:
        """The pairs with the strongest interactions, at most `NAMED`."""
        return [number for (number,) in largest_cells(self.interaction, NAMED)]


def draw_pairs(result: Result, folder: Path | str, title: str, decode: Callable[..., str]) -> Path:
    """Draw a result of pairs of heads as interactions.png in an existing folder, and return its path.

    title: the model and the prompt; for several prompts, the model. decode: returns the text of token ids. Raises
    OSError, and InvalidResult if there are no pairs, a head alone is missing, or the result is of a text.
    """
    names = names_of_imputations(result)
    shown = [_Shown(result, *both) for both in zip(result.imputations, names, strict=True)]
    probability = roles(result, decode)[2]
    path = Path(folder, "interactions.png")
    with style.context(["default", STYLE]):
        side = min(MAP[1], max(MAP[0], SIDE * max(len(of.labels) for of in shown)))
        labels = 0.3 if any(side / len(of.labels) >= SIDE for of in shown) else 0.0
        figure = Figure(figsize=(side + SCATTER + labels + 2.6, 0.4 + len(shown) * (side + labels + 0.45)))
        panels = figure.subplots(len(shown), 2, width_ratios=[side, SCATTER], squeeze=False)
        for (left, right), of in zip(panels, shown, strict=True):
            several = f"{of.name}: " if shown[1:] else ""
            _map(figure, left, of, side)
            left.set_title("\n".join(wrapped(f"{several}pairs of {len(of.labels)} heads", side, 8)))
            _scatter(right, of)
            right.set_title("\n".join(wrapped(f"{several}{_pairs(len(of.together))}", SCATTER, 8)))
        add_legend(figure, _legend(shown))
        add_title(figure, _finding(shown, probability), heading(result, title))
        for (left, right), of in zip(panels, shown, strict=True):
            name_heads(left, of.upper, of.marked, of.cell)
            points = np.stack([of.alone.sum(axis=0), of.together], axis=1)[of.strongest]
            name_points(right, points, ["+".join(map(pair_label, of.pairs.pairs[n])) for n in of.strongest])
        figure.savefig(path, backend="agg")
    return path


def _map(figure: Figure, axes: Axes, of: _Shown, side: float) -> None:
    """Draw the interactions above the diagonal, and the effects of both heads below it, on a scale each."""
    cell = side / len(of.labels)
    bars = (
        (Panel(of.lower, ""), "diagonal: one head; below: both heads"),
        (Panel(of.upper, "", of.marked), "above: interaction of two heads"),
    )
    for panel, label in bars:
        end = largest_magnitude(panel.values)
        image = heat_map(axes, panel, (-end, end), cell, cell)
        if not np.nan_to_num(panel.values).any():
            continue
        bar = figure.colorbar(image, ax=axes, format=FuncFormatter(tick_label), aspect=30, fraction=0.05, pad=0.02)
        bar.locator = MaxNLocator(4)
        bar.set_label("\n".join(wrapped(f"{label} (pp)", side, 8)))
    axes.set(xlabel="", ylabel="", box_aspect=1, anchor="N")
    layers = [layer for layer, _ in of.pairs.heads]
    for edge in np.flatnonzero(np.diff(layers)) + 0.5:
        axes.axhline(edge, color="0.5", linewidth=0.3)
        axes.axvline(edge, color="0.5", linewidth=0.3)
    axes.plot([-0.5, len(layers) - 0.5], [-0.5, len(layers) - 0.5], color="0.5", linewidth=0.3)
    if cell >= SIDE:
        axes.set_xticks(range(len(layers)), of.labels, rotation=90)
        axes.set_yticks(range(len(layers)), of.labels)
        return
    places = _layer_labels(layers, cell)
    axes.set_xticks(list(places), [f"L{layer}" for layer in places.values()])
    axes.set_yticks(list(places), [f"L{layer}" for layer in places.values()])


def _layer_labels(layers: list[int], cell: float) -> dict[float, int]:
    """Return {place: layer} for layers whose labels do not overlap, in the middle of their heads."""
    found: dict[float, int] = {}
    for layer in dict.fromkeys(layers):
        at = float(np.mean([number for number, of in enumerate(layers) if of == layer]))
        if not found or (at - max(found)) * cell > width(f"L{layer}", 7) + 0.05:
            found[at] = layer
    return found


def _scatter(axes: Axes, of: _Shown) -> None:
    """Draw the effect of both heads against the sum of their effects."""
    total = of.alone.sum(axis=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(
        box_aspect=1,
        anchor="N",
        xlabel="sum of the effects of\neach head alone (pp)",
        ylabel="effect of both heads (pp)",
    )
    both = np.concatenate([total, of.together])
    if not both.any():
        say_nothing(axes, "no change")
        axes.set(xticks=[], yticks=[])
        return
    ends = np.array([both.min(), both.max()]) + np.array([-0.08, 0.08]) * (np.ptp(both) or 1.0)
    axes.plot(ends, ends, color="0.5", linewidth=0.8)
    axes.plot(total, of.together, ".", color="black", markersize=2.5 if len(total) < CROWD else 1.5, mew=0)
    axes.plot(total[of.compensating], of.together[of.compensating], markersize=4.5, **{**RING, "mew": 0.5})
    axes.set(xlim=ends, ylim=ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(tick_label))


def _legend(shown: list[_Shown]) -> list[Line2D | Patch]:
    many = len(shown[0].pairs.result.prompts) > 1
    handles: list[Line2D | Patch] = [Line2D([], [], color="0.5", linewidth=0.8, label="effects that add up")]
    if any(of.compensating.any() for of in shown):
        words = "both heads change the prediction, neither does alone" + (", for some prompt" if many else "")
        handles.append(Line2D([], [], markersize=5, label=words, **RING))
    if any(len(of.pairs.pairs) < len(of.labels) * (len(of.labels) - 1) // 2 for of in shown):
        handles.append(Patch(label="pair not measured", **ABSENT))
    scales = [(values, -largest_magnitude(values)) for of in shown for values in (of.lower, of.upper)]
    dashes = [handle for scale in scales for handle in negative_legend(*scale, "20% of the scale")]
    return handles + dashes[:1]


def _finding(shown: list[_Shown], probability: str) -> str:
    """Return the strongest interaction, and how many pairs change a prediction that neither head changes, in words."""
    of = max(shown, key=lambda one: np.abs(one.interaction).max())
    prompts, runs = of.pairs.both_kept_alone.shape
    under = f" ({of.name})" if shown[1:] else ""
    count = int(of.compensating.sum())
    some = f"{f'{count:,}' if count else 'none'} of {_pairs(runs)}"
    together = f"{some} {'change' if count > 1 else 'changes'} a prediction that neither head changes alone"
    if not of.strongest:
        return f"no two heads interact: all their effects on {probability} add up; {together}"
    number = of.strongest[0]
    pair = " and ".join(map(pair_label, of.pairs.pairs[number]))
    value = float(of.interaction[number])
    amount = f"{signed(value)} pp"
    if prompts > 1:
        ends = statistics.bootstrap_interval(FACTORS[METRIC] * of.pairs.interaction(METRIC)[:, [number]])
        amount += f" [{', '.join(signed(float(end[0])) for end in ends)}]"
    both, total = (f"{signed(float(change))} pp" for change in (of.together[number], of.alone[:, number].sum()))
    words = f"{pair}{under} interact most, by {amount}: both change {probability} by {both}, "
    words += f"{'below' if value < 0 else 'above'} the sum of their effects, {total}"
    return f"{words.replace(' pp', f'{NO_BREAK}pp')}; {together}"


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count:,} pairs"
