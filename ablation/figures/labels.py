"""Texts and sizes in figures: what fits where, in the font of all figures."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ft2font import LoadFlags
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from ablation.errors import shortened

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

FONT = "DejaVu Sans"  # ships with matplotlib, so figures look the same everywhere
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
MINUS, NO_BREAK = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
NAME = "name of a head"
"""The gid of the texts within panels."""
NAMED, NAME_SIZE, TITLE_SIZE = 3, 6, 9
"""How many heads a map names, and font sizes in points."""
NEAR = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Places of a name around a cell, the best first."""
RIM = [withStroke(linewidth=1.6, foreground="white")]  # makes a mark visible on a dark cell
LARGEST_CELL = 0.32
"""Side of a cell in inches, at most."""


def largest_cells(values: Floats, count: int) -> list[tuple[int, ...]]:
    """Return the indices of the values with the largest magnitude, in descending order; zeros and NaN are left out."""
    size = np.nan_to_num(np.abs(values))
    order = np.argsort(-size, axis=None, kind="stable")[:count]
    return [tuple(map(int, np.unravel_index(i, values.shape))) for i in order if size.flat[i] > 0]


def rounded(value: float) -> str:
    """Return a number with two digits, or all of its integer ones, and a proper minus sign."""
    text = f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"
    return text.replace("-", MINUS)


def signed(value: float) -> str:
    """Return a rounded number with its sign, also if it is positive."""
    return ("+" if value > 0 else "") + rounded(value)


def printable(text: str) -> str:
    """Replace characters that the font cannot draw by their Python escapes."""
    return "".join(c if c.isprintable() and _glyphs().get_char_index(ord(c)) else ascii(c)[1:-1] for c in text)


def width(text: str, size: float) -> float:
    """Return the width of a printable text in inches. size: of the font, in points."""
    return sum(map(_advance, text)) * size / 72


def wrapped(text: str, inches: float, size: float) -> list[str]:
    """Break a printable text into lines of at most that width: between words, or else after hyphens, or anywhere."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if width(longer, size) <= inches:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for part in [word] if width(word, size) <= inches else re.findall("[^-]+-?|-", word):
            if width(lines[-1] + part, size) > inches and lines[-1]:
                lines.append("")
            for letter in part:
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
    """Add the title, in room of its own: the finding, then the heading in at most two lines. Fix the layout.

    finding: a printable text; no line is broken at a no-break space.
    """
    if finding.startswith("no "):
        finding = f"N{finding[1:]}"
    inches = figure.get_figwidth() - 0.2

    def lines_of(longest: int) -> list[str]:
        return wrapped(printable(shortened(heading, longest)), inches, TITLE_SIZE)

    # The longest heading that fits.
    fitting = bisect_right(range(2, max(3, min(len(heading), 400)) + 1), 2, key=lambda n: len(lines_of(n)))
    lines = [*wrapped(finding, inches, TITLE_SIZE), *lines_of(max(2, fitting + 1))]
    figure.set_figheight(figure.get_figheight() + 0.15 * len(lines) + 0.1)
    figure.suptitle("\n".join(lines), x=0.1 / figure.get_figwidth(), ha="left", fontsize=TITLE_SIZE)
    layout = figure.get_layout_engine()
    assert layout is not None
    before: Any = np.inf
    for _ in range(8):  # tick labels, and panels of a fixed shape, depend on the sizes of panels
        layout.execute(figure)
        bounds = np.array([axes.get_position(original=True).bounds for axes in figure.axes])
        if np.abs(bounds - before).max() < 5e-4:
            break
        before = bounds
    with rc_context({"figure.constrained_layout.use": False}):
        figure.set_layout_engine(None)
    for axes in figure.axes:
        axes.apply_aspect()  # as when it is drawn: names are placed in panels of a fixed shape


def _head(layer: int, head: int) -> str:
    return f"L{layer}H{head}"


def name_heads(axes: Axes, values: Floats, flipped: Flags | None, names: Callable[[int, int], str] = _head) -> None:
    """Name the strongest heads of a map: in their cells or next to them, with no overlap; else not at all.

    The layout of the figure must be final. names: returns the name of a cell, given its row and column.
    """
    box, (layers, heads) = axes.get_window_extent(), values.shape
    pixels = axes.figure.dpi
    w, h = box.width / heads, box.height / layers
    cells = largest_cells(values, NAMED)
    taken: list[Bbox] = []
    avoided = [(y, x) for y, x in cells] + ([] if flipped is None else [tuple(c) for c in np.argwhere(flipped)])
    rectangles = {(y, x): Bbox.from_bounds(box.x0 + x * w, box.y1 - (y + 1) * h, w, h) for y, x in avoided}
    for y, x in cells:
        name = names(y, x)
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


def name_points(axes: Axes, points: Floats, names: list[str]) -> None:
    """Name points next to them, with a line to names that are further away, so that no name overlaps another."""
    box, pixels = axes.get_window_extent(), axes.figure.dpi
    taken: list[Bbox] = []
    for point, name in zip(axes.transData.transform(points), names, strict=True):
        across, down = pixels * width(name, NAME_SIZE) + 4, 1.4 * pixels * NAME_SIZE / 72
        for distance in np.arange(0.6, 12, 0.6) * down:
            corners = [(point[0] + x * distance, point[1] + y * distance) for x in (1, -1) for y in (1, -1, 0)]
            places = [Bbox.from_bounds(x - across * (x < point[0]), y - down / 2, across, down) for x, y in corners]
            free = [
                at
                for at in places
                if at.x0 >= box.x0
                and at.x1 <= box.x1
                and at.y0 >= box.y0
                and at.y1 <= box.y1
                and not any(at.overlaps(other) for other in taken)
            ]
            if free:
                taken.append(free[0])
                centre = (free[0].x0 + free[0].x1) / 2, (free[0].y0 + free[0].y1) / 2
                place, end = axes.transData.inverted().transform([centre, point])
                if distance > down:
                    side = free[0].x1 if centre[0] < point[0] else free[0].x0
                    near = axes.transData.inverted().transform((side, centre[1]))
                    axes.plot(*np.stack([near, end], axis=1), color="0.5", linewidth=0.4)
                axes.text(place[0], place[1], name, fontsize=NAME_SIZE, ha="center", va="center", gid=NAME)
                break


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
