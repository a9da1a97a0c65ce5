"""What replaces z, and where, as a person writes it: names with their meanings, `scale:0.5`, `0,3,-1`.

This module imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ablation.errors import InvalidAblation, shortened

IMPUTATIONS = {
    "zero": "0",
    "mean": "one number, the mean of the head's z over the tokens and channels of the prompt; not the mean over a data "
    "set, which the literature calls mean ablation",
    "channel-mean": "for each channel, the mean of the head's z over the tokens of the prompt",
    "reference-mean": "for each channel, the mean of the head's z over all tokens of reference prompts",
    "reference-mean-by-position": "for each channel and position, the mean of the head's z over reference prompts",
    "resample": "the z of the same head at the same position in another prompt of equal length",
    "scale:FACTOR": "z times a number: 0 is zero, 1 changes nothing",
    "values:FILE": "given numbers, of an .npz file with the arrays layer.0, layer.1, ... of [heads, head_dim] or "
    "[positions, heads, head_dim]",
}
"""{imputation: what z is replaced by}, for tooltips and `--help`."""
SCALE, VALUES, RESAMPLE = "scale", "values", "resample"
PROMPT = "prompt"
"""The positions of all tokens of the prompt, in a text that is generated: z is not replaced at new tokens."""
OF_REFERENCE = ("reference-mean", "reference-mean-by-position")
"""The imputations that need a reference."""
BY = {
    "target": ("target_probability", -1.0, "the fall of P(target)"),
    "logit-difference": ("logit_difference", -1.0, "the fall of the logit difference"),
    "correct": ("correct", -1.0, "the fall of the accuracy"),
    "margin": ("margin", -1.0, "the fall of the margin"),
    "kl": ("kl", 1.0, "the KL divergence"),
}
"""{ranking of heads: (metric, sign, in words)}: the first head is that whose mean change times the sign is largest."""
_POSITIONS = re.compile(r"\s*[+-]?\d+\s*(,\s*[+-]?\d+\s*)*")

Positions = str | tuple[int, ...]
"""Where an ablation acts: "all", "last", positions, or the name of a column with spans of characters."""


def meaning(name: str) -> str | None:
    """Return the meaning of an imputation by its name in a result, or None for a user's own imputation."""
    kind, colon, _ = name.partition(":")
    patterns = {pattern.partition(":")[0]: pattern for pattern in IMPUTATIONS}
    pattern = patterns.get(kind)
    return IMPUTATIONS[pattern] if pattern is not None and (":" in pattern) == bool(colon) else None


def imputation(text: str) -> str:
    """Return the name of an imputation on the command line. Raises argparse.ArgumentTypeError."""
    kind, colon, rest = text.partition(":")
    if kind == SCALE:
        return f"{SCALE}:{_factor(rest)}"
    if kind == VALUES:
        if not Path(rest).expanduser().is_file():
            raise argparse.ArgumentTypeError(f"{text!r} names no file: pass values:FILE, an .npz file")
        return text
    if colon or text not in IMPUTATIONS:
        meant = difflib.get_close_matches(text, IMPUTATIONS, n=1)
        hint = f"did you mean {meant[0]}? " if meant else ""
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} ({hint}choose from {', '.join(IMPUTATIONS)})")
    return text


def _factor(text: str) -> str:
    """Return a factor in its shortest form, so that equal factors have equal names."""
    try:
        factor = float(text) + 0.0  # not -0.0
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise argparse.ArgumentTypeError(f"'scale:{text}' names no finite number: pass scale:FACTOR, such as scale:0.5")
    return str(factor).removesuffix(".0")


def whole_number(least: int) -> Callable[[str], int]:
    """Return a type of argparse: whole numbers of at least `least`."""

    def parsed(text: str) -> int:
        if not re.fullmatch(r"\s*\+?\d+\s*", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"it is a whole number, at least {least}, not {text!r}")
        return int(text)

    return parsed


def parse_positions(text: str) -> Positions:
    """Return positions, or the name of a column. text: such as "0,3,-1". Raises InvalidAblation."""
    text = text.strip()
    if _POSITIONS.fullmatch(text):
        return tuple(dict.fromkeys(map(int, text.split(","))))
    if re.fullmatch(r"[\d\s,;.:+-]*", text):
        raise InvalidAblation(
            f"{text!r} names no positions: pass all, last, integers such as 0,3,-1, or the name of a column"
        )
    return text


def label(positions: Positions) -> str:
    """Return positions as text, as results name them: "all", "last", "0,3,-1" or a column."""
    if isinstance(positions, str):
        return positions
    return "last" if positions == (-1,) else ",".join(map(str, positions))


def parse_ks(text: str, heads: int | None) -> list[int]:
    """Return the sizes of sets. text: such as "1,2,4,8", or "1,2,4,..." to go on up to all heads.

    heads: their number; None if it is not known yet: the text is then checked, and does not go on.

    Three dots continue the factor of the last two sizes, rounded down, but their difference if the last three have no
    common factor. Raises InvalidAblation.
    """
    parts = [part.strip() for part in text.split(",")]
    going_on = parts[-1] in ("...", "…")
    parts = parts[:-1] if going_on else parts
    if not parts or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts) or (going_on and len(parts) < 2):
        raise InvalidAblation(f"--k is a list of sizes, such as 1,2,4,8 or 1,2,4,..., not {shortened(text, 80)!r}")
    ks = [int(part) for part in parts]
    if going_on:
        before, last = ks[-2:]
        geometric = before > 0 and (len(ks) < 3 or last * ks[-3] == before**2)
        if last <= before:
            raise InvalidAblation(f"--k {text!r} does not grow, so it cannot go on")
        if heads is not None:
            while (following := ks[-1] * last // before if geometric else ks[-1] + last - before) < heads:
                ks.append(following)
            ks = [*(k for k in ks if k < heads), heads]
    return check_ks(ks, heads)


def check_ks(ks: Iterable[int], heads: int | None) -> list[int]:
    """Return sizes of sets, sorted, each once.

    Raises InvalidAblation unless all are from 1 to the number of heads; None for a number that is not known yet.
    """
    try:
        found = sorted({operator.index(k) for k in ks})
    except TypeError:
        raise InvalidAblation("the sizes of the sets are a list of integers") from None
    if not found or found[0] < 1:
        raise InvalidAblation("name at least one size of the sets, and none below 1")
    if heads is not None and found[-1] > heads:
        raise InvalidAblation(f"there is no set of {found[-1]} heads: {heads} heads are ranked")
    return found
