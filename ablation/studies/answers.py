"""Whether generated texts hold the right answers, before and after an ablation. Does not import torch."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ablation.studies.statistics import Share, share

MEASURES = ("exact", "contains")
"""Whether a text is the target, and whether it contains the target: see `is_exact`, `contains_answer`."""


class Change(NamedTuple):
    """How many texts hold the answer, before and after an ablation.

    clean, ablated: shares of the prompts with a target. lost, gained: prompts whose clean text alone holds the answer,
    and whose ablated text alone does. p: two-sided, of McNemar's exact test that both are equally frequent.
    """

    clean: Share
    ablated: Share
    lost: int
    gained: int
    p: float


def is_exact(text: str, target: str) -> bool:
    """Whether a text equals the target, without the white space around the two."""
    return text.strip() == target.strip()


def contains_answer(text: str, target: str) -> bool:
    """Whether a text contains the target as words of its own. Case and the white space around the target do not count.

    A letter or digit beside the target makes it a part of another word. In scripts without case (Chinese, Thai,
    Arabic), words are not told apart, and the target may be anywhere.
    """
    text, target = (unicodedata.normalize("NFKC", part).casefold() for part in (text, target.strip()))
    start = text.find(target)
    while target and start >= 0:
        end = start + len(target)
        if not (_joins(text[:start][-1:], target[0]) or _joins(target[-1], text[end : end + 1])):
            return True
        start = text.find(target, start + 1)
    return False


def _joins(left: str, right: str) -> bool:
    """Whether two neighbouring characters, or one and the end of the text, are in one word."""
    return all(char.isalnum() and unicodedata.category(char) != "Lo" if char else False for char in (left, right))


def change(pairs: Sequence[tuple[bool, bool]]) -> Change:
    """Return how often the answer is there before and after. pairs: for each prompt; at least one."""
    before, after = np.array(pairs, dtype=np.bool_).T
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return Change(share(before), share(after), lost, gained, p)


def flags(target: str | None, clean: str, ablated: str) -> dict[str, bool | None]:
    """Return {clean_exact, ablated_exact, clean_contains, ablated_contains}; None without a target."""
    checks = dict(zip(MEASURES, (is_exact, contains_answer), strict=True))
    texts = {"clean": clean, "ablated": ablated}
    return {
        f"{run}_{name}": None if target is None else check(text, target)
        for name, check in checks.items()
        for run, text in texts.items()
    }


def changes(found: Sequence[dict[str, Any]]) -> dict[str, Change]:
    """Return {measure: change}; empty if no prompt has a target. found: for each prompt, what `flags` returns."""
    return {
        name: change(pairs)
        for name in MEASURES
        if (pairs := [(of[f"clean_{name}"], of[f"ablated_{name}"]) for of in found if of[f"clean_{name}"] is not None])
    }


def as_json(found: Change) -> dict[str, Any]:
    """Return a change as values that JSON can hold."""
    shares = {
        run: {**dataclasses.asdict(value), "share": value.share}
        for run, value in (("clean", found.clean), ("ablated", found.ablated))
    }
    return {**shares, "lost": found.lost, "gained": found.gained, "p": found.p}
