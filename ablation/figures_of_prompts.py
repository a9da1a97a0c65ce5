"""What figures show of a result: changes in the units that are drawn, on average over the prompts, and texts.

`strongest` is the figure that only results of several prompts have.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ft2font import LoadFlags
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from ablation.errors import shortened
from ablation.report import token_labels
from ablation.results import Result

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

FONT = "DejaVu Sans"  # ships with matplotlib, so figures look the same everywhere
MINUS = "\N{MINUS SIGN}"
NAME = "name of a head"
"""The gid of the texts within panels."""
NAMED, NAME_SIZE, TITLE_SIZE = 3, 6, 9
"""How many heads a map names, and font sizes in points."""
NEAR = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Places of a name around a cell, the best first."""
RIM = [withStroke(linewidth=1.6, foreground="white")]  # makes a mark visible on a dark cell
LARGEST_CELL = 0.32
"""Side of a cell in inches, at most."""
LISTED = 10
"""How many heads the figure of the strongest heads shows for each imputation."""
FACTORS = {"target_probability": 100.0, "control_probability": 100.0, "signed_margin": 1.0}
"""{drawn metric: drawn units for each of its own}: percentage points (pp), and logits."""


@dataclass(frozen=True)
class Change:
    """The changes of a metric, arranged as maps of all heads; NaN where there is no head.

    of_prompts: [P, I, L, H]. mean: over the prompts, [I, L, H]. low, high: the 95% interval of the mean, [I, L, H];
    None for a single prompt.
    """

    of_prompts: Floats
    mean: Floats
    low: Floats | None = None
    high: Floats | None = None

    @property
    def excludes_zero(self) -> Flags | None:
        """[I, L, H] whether the interval excludes 0; False where there is no head; None for a single prompt."""
        return None if self.low is None or self.high is None else (self.low > 0) | (self.high < 0)

    def certain(self, imputation: int) -> Flags | None:
        """Return `excludes_zero` of one imputation, [L, H]; None for a single prompt."""
        return None if self.excludes_zero is None else self.excludes_zero[imputation]

    @property
    def strongest(self) -> tuple[int, int, int] | None:
        """The imputation, layer and head of the mean change with the largest magnitude; None if all are 0."""
        found = largest_cells(self.mean, 1)
        return None if not found else (found[0][0], found[0][1], found[0][2])

    def amount(self, place: tuple[int, int, int], unit: str) -> str:
        """Return the magnitude of a mean change as text, with its interval."""
        size = rounded(abs(self.mean[place]))
        if self.low is None or self.high is None:
            return f"{size} {unit}"
        ends = sorted(np.sign(self.mean[place]) * np.array([self.low[place], self.high[place]]))
        return f"{size} {unit} [{rounded(ends[0])}, {rounded(ends[1])}]"


class Drawn:
    """A result of one-head ablations, and the changes that its figures show. Each change is computed once."""

    def __init__(self, result: Result, decode: Callable[..., str]) -> None:
        """decode: returns the text of token ids; see `_names`."""
        kept, margin = result.kept, result.ablated["margin"]
        self.result = replace(
            result,
            clean={**result.clean, "signed_margin": result.clean["margin"]},
            ablated={**result.ablated, "signed_margin": np.where(kept, margin, -margin)},
        )
        self.prompts, self.total = kept.shape
        self.imputations = result.imputations
        self.has_head = result.has_head
        self.kept = result.grid(kept)  # [P, I, L, H]
        self.target, self.control, self.probability, self.argmax = _names(result, decode)
        self.averaged = "mean " if self.many else ""
        self._changes: dict[str, Change] = {}

    @property
    def many(self) -> bool:
        """Whether there are several prompts."""
        return len(self.result.prompts) > 1

    @cached_property
    def flipped(self) -> Floats:
        """[I, L, H] the share of the prompts whose prediction an ablation changes, in percent; NaN without a head."""
        return np.where(self.has_head, 100 * (1 - self.kept.mean(axis=0)), np.nan)

    def flips(self, imputation: int) -> Flags | None:
        """Return which heads change the argmax, [L, H]; None for several prompts, whose shares are in `flipped`."""
        return None if self.many else self.has_head & ~self.kept[0, imputation]

    @cached_property
    def head_mean(self) -> Floats:
        """[L, H] the mean of z over tokens, channels and prompts; NaN where there is no head."""
        mean: Floats = self.result.head_mean.mean(axis=0)
        return mean

    def change(self, metric: str) -> Change:
        """Return the change of one of the metrics in `FACTORS`."""
        if metric not in self._changes:
            self._changes[metric] = _change(self.result, metric, FACTORS[metric])
        return self._changes[metric]

    def difference(self, metric: str) -> Change:
        """Return the change under the second imputation - that under the first, with I = 1."""
        second = [i for i, key in enumerate(self.result.ablations) if key.imputation == self.imputations[1]]
        index = {key: i for i, key in enumerate(self.result.ablations)}
        pairs = [(i, index.get(self.result.ablations[i]._replace(imputation=self.imputations[0]))) for i in second]
        both = [(i, j) for i, j in pairs if j is not None]
        after, before = ([pair[side] for pair in both] for side in (0, 1))
        values = self.result.ablated[metric]
        difference = replace(
            self.result,
            ablations=tuple(self.result.ablations[i] for i in after),
            clean={metric: np.zeros(self.prompts)},
            ablated={metric: values[:, after] - values[:, before]},
        )
        return _change(difference, metric, FACTORS[metric])

    def head(self, place: tuple[int, ...]) -> str:
        """Return the name of an imputation, layer and head, such as L9H6 (zero)."""
        imputation, layer, head = place
        return f"L{layer}H{head}" + (f" ({printable(self.imputations[imputation])})" if self.imputations[1:] else "")

    def kept_line(self, imputation: int | None = None) -> str:
        """Return how many ablations keep the argmax, in words: of one imputation, or of all."""
        kept, runs = self.kept[:, slice(None) if imputation is None else imputation], self.prompts * self.total
        if imputation is not None:
            runs = sum(key.imputation == self.imputations[imputation] for key in self.result.ablations) * self.prompts
        what = " runs" if self.many else " ablations" if imputation is None else ""
        return f"{kept.sum()} of {runs}{what} keep {self.argmax}"

    def strongest_line(self) -> str:
        """Return which ablation changes the target's probability most, in words."""
        change = self.change("target_probability")
        if change.strongest is None:
            return f"{self.probability} never changes"
        verb = "raises" if change.mean[change.strongest] > 0 else "lowers"
        size = change.amount(change.strongest, "pp") + (" on average" if self.many else "")
        return f"{self.head(change.strongest)} {verb} {self.probability} most, by {size}"


def _change(result: Result, metric: str, factor: float) -> Change:
    of_prompts = factor * result.grid(result.change(metric))
    if len(result.prompts) == 1:
        return Change(of_prompts, of_prompts[0])
    from ablation import statistics  # now, since scipy takes a while to import, and one prompt does not need it

    effects = statistics.effects(result, metric)
    return Change(of_prompts, *(factor * result.grid(values) for values in (effects.mean, effects.low, effects.high)))


def strongest(drawn: Drawn) -> tuple[Figure, str]:
    """Draw the heads that change the target's probability most, with their intervals over the prompts, in pp.

    Returns the figure and its finding.
    """
    change = drawn.change("target_probability")
    listed = min(LISTED, int(drawn.has_head.sum()))
    columns = len(drawn.imputations)
    figure = Figure(figsize=(0.9 + 3.0 * columns, 1.1 + 0.2 * listed))
    for index, axes in enumerate(figure.subplots(1, columns, sharex=True, squeeze=False)[0]):
        size = np.where(drawn.has_head, np.abs(change.mean[index]), -1.0)
        cells = [np.unravel_index(at, size.shape) for at in np.argsort(-size, axis=None, kind="stable")[:listed]]
        for row, cell in enumerate(cells):
            values = change.of_prompts[:, index, *cell]
            axes.plot(values, np.full(len(values), row), "o", color="0.55", alpha=0.4, mew=0, markersize=3)
        assert change.low is not None and change.high is not None
        mean, low, high = ([of[index, *cell] for cell in cells] for of in (change.mean, change.low, change.high))
        axes.hlines(range(listed), low, high, color="black", linewidth=1.5)
        axes.plot(mean, range(listed), "D", color="black", mfc="white", markersize=4.5, mew=1)
        axes.axvline(0, color="black", linewidth=0.5, linestyle=":")
        axes.set_yticks(range(listed), [f"L{layer}H{head}" for layer, head in cells])
        axes.set(
            ylim=(listed - 0.5, -0.5), title=printable(drawn.imputations[index]), xlabel="change in P(target) (pp)"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        if not np.nanmax(np.abs(change.of_prompts)):
            for mark in (*axes.lines, *axes.collections):
                mark.set_visible(False)
            say_nothing(axes, "no change")
            axes.set_xticks([])
    handles = [
        Line2D([], [], marker="D", color="black", mfc="white", markersize=4.5, label="mean, with its 95% interval"),
        Line2D([], [], marker="o", color="0.7", mew=0, markersize=3.5, linestyle="none", label="one prompt"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    assert change.excludes_zero is not None
    certain = int(change.excludes_zero.sum())
    return figure, f"{drawn.strongest_line()}; {certain} of {drawn.total} ablations have an interval without 0"


def largest_cells(values: Floats, count: int) -> list[tuple[int, ...]]:
    """Return the indices of the values with the largest magnitude, in descending order; zeros and NaN are left out."""
    size = np.nan_to_num(np.abs(values))
    order = np.argsort(-size, axis=None, kind="stable")[:count]
    return [tuple(map(int, np.unravel_index(i, values.shape))) for i in order if size.flat[i] > 0]


def rounded(value: float) -> str:
    """Return a number with two digits, or all of its integer ones, and a proper minus sign."""
    text = f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"
    return text.replace("-", MINUS)


# ---- texts


def _names(result: Result, decode: Callable[..., str]) -> tuple[str, str, str, str]:
    """How figures call the target and the control, the probability of the target, and the clean argmax.

    For one prompt with their texts in quotes, and the token id where the text is not enough.
    """
    if len(result.prompts) > 1:
        return "target", "control", "P(target)", "the argmax"
    (prompt,), argmax = result.prompts, int(result.clean["argmax"][0])
    texts: dict[tuple[int, ...], str] = {(argmax,): decode(argmax)}
    for tokens, text in ((prompt.target, prompt.target_text), (prompt.control, prompt.control_text)):
        texts[tokens] = decode(*tokens) if text is None else text
    labels = token_labels({tokens[0]: text for tokens, text in texts.items() if len(tokens) == 1}, _quoted)
    target, control = (
        labels[tokens[0]] if len(tokens) == 1 else _quoted(texts[tokens]) for tokens in (prompt.target, prompt.control)
    )
    return f"target {target}", f"control {control}", f"P({target})", labels[argmax]


def _quoted(text: str) -> str:
    """A token in quotes, shortened if it is long, with visible spaces."""
    shown = printable(text).replace(" ", "␣")
    return f"“{shown if len(shown) <= 20 else shown[:19] + '…'}”"


def printable(text: str) -> str:
    """Replace characters that the font cannot draw by their Python escapes."""
    return "".join(c if c.isprintable() and _glyphs().get_char_index(ord(c)) else ascii(c)[1:-1] for c in text)


def width(text: str, size: float) -> float:
    """Return the width of a printable text in inches. size: of the font, in points."""
    return sum(map(_advance, text)) * size / 72


def wrapped(text: str, inches: float, size: float) -> list[str]:
    """Break a printable text into lines of at most that width, between words where possible."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if width(longer, size) <= inches:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if width(lines[-1] + letter, size) > inches and lines[-1]:
                lines.append("")
            lines[-1] += letter
    return lines


@cache
def _glyphs() -> Any:
    return get_font(findfont(FONT))


@cache
def _advance(letter: str) -> float:
    """The width of a letter in the font, as a multiple of the size of the font."""
    font = _glyphs()
    font.set_size(100, 72)
    return float(font.load_char(ord(letter), flags=LoadFlags.NO_HINTING).linearHoriAdvance / 65536 / 100)


# ---- texts in figures


def add_title(figure: Figure, finding: str, heading: str) -> None:
    """Add the title, in room of its own: the finding, then the heading in at most two lines. Fix the layout."""
    inches = figure.get_figwidth() - 0.2

    def lines_of(longest: int) -> list[str]:
        return wrapped(printable(shortened(heading, longest)), inches, TITLE_SIZE)

    # The longest heading that fits.
    fitting = bisect_right(range(2, max(3, min(len(heading), 400)) + 1), 2, key=lambda n: len(lines_of(n)))
    lines = [*wrapped(printable(finding), inches, TITLE_SIZE), *lines_of(max(2, fitting + 1))]
    figure.set_figheight(figure.get_figheight() + 0.15 * len(lines) + 0.1)
    figure.suptitle("\n".join(lines), x=0.1 / figure.get_figwidth(), ha="left", fontsize=TITLE_SIZE)
    layout = figure.get_layout_engine()
    assert layout is not None
    for _ in range(2):  # the second time, it knows how many tick labels there are
        layout.execute(figure)
    with rc_context({"figure.constrained_layout.use": False}):
        figure.set_layout_engine(None)


def name_heads(axes: Axes, values: Floats, flipped: Flags | None) -> None:
    """Name the strongest heads of a map: in their cells or next to them, with no overlap; else not at all.

    The layout of the figure must be final.
    """
    box, (layers, heads) = axes.get_window_extent(), values.shape
    pixels = axes.figure.dpi
    w, h = box.width / heads, box.height / layers
    cells = largest_cells(values, NAMED)
    taken: list[Bbox] = []
    avoided = [(y, x) for y, x in cells] + ([] if flipped is None else [tuple(c) for c in np.argwhere(flipped)])
    rectangles = {(y, x): Bbox.from_bounds(box.x0 + x * w, box.y1 - (y + 1) * h, w, h) for y, x in avoided}
    for y, x in cells:
        name = f"L{y}H{x}"
        across, down = pixels * width(name, NAME_SIZE) + 2, 1.2 * pixels * NAME_SIZE / 72
        own = rectangles[y, x]
        centre_x, centre_y = (own.x0 + own.x1) / 2, (own.y0 + own.y1) / 2
        steps_x, steps_y = (w + across) / 2, (h + down) / 2
        centres = [(centre_x + i * steps_x, centre_y + j * steps_y) for i, j in NEAR]
        if across < w and (6 if flipped is not None and flipped[y, x] else 3) * down < h:
            centres.insert(0, (centre_x, own.y1 - 0.55 * down))  # in the cell, above its mark
        elif 2.4 * across < w and down < h:
            centres.insert(0, (own.x0 + 0.55 * across, centre_y))  # before its mark
        choices = []
        for px, py in centres:
            px = min(max(px, box.x0 + across / 2), box.x1 - across / 2)
            at = Bbox.from_bounds(px - across / 2, py - down / 2, across, down)
            inside = at.x0 > box.x0 - 1 and at.x1 < box.x1 + 1 and at.y0 > box.y0 and at.y1 < box.y1
            if inside and not any(_overlap(at, other) for other in taken):
                choices.append((sum(_overlap(at, r) for c, r in rectangles.items() if c != (y, x)), px, py, at))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, linewidth=0.6, edgecolor="black"))
        if choices:
            _, px, py, at = min(choices, key=lambda choice: choice[0])
            taken.append(at)
            place = axes.transData.inverted().transform((px, py))
            axes.text(
                place[0], place[1], name, fontsize=NAME_SIZE, ha="center", va="center", path_effects=RIM, gid=NAME
            )


def _overlap(one: Bbox, other: Bbox) -> bool:
    return bool(one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1)


def say_nothing(axes: Axes, words: str) -> None:
    """Write words into the middle of a panel that has nothing to show."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", style="italic", gid=NAME)


# ---- sizes


def tick_step(side: float, inches: float) -> int:
    """Return the smallest step between tick labels at which they do not overlap. Both sizes are in inches.

    side: of a cell along the axis. inches: of a label.
    """
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if step * side >= inches or step == 128)


def cell_size(layers: int, heads: int) -> float:
    """Return the side of a cell in inches: small enough for all cells to fit on a page."""
    return min(LARGEST_CELL, 6.5 / layers, 5.2 / heads)


def largest_magnitude(values: Floats) -> float:
    """Return the largest magnitude of the finite values, or 1 if it is 0 or there are none, for use as a scale."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.any() else 1.0


def tick_label(value: float, _: object = None) -> str:
    """Return the label of a tick, for a FuncFormatter."""
    return f"{value:.3g}".replace("-", MINUS)
