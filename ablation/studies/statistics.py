"""Means over prompts, with intervals: which heads matter for a data set. Needs scipy, and does not import torch.

Intervals are of 95 %. They describe prompts drawn from the population of which the given prompts are a sample; they say
nothing about other kinds of prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ablation.errors import InvalidResult
from ablation.results import Result

CONFIDENCE = 0.95
RESAMPLES = 1999
"""Bootstrap samples; their number + 1 is divisible by 40, as a percentile interval of 95 % needs."""
BATCH = 200
"""Bootstrap samples that are drawn at once."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Effects:
    """The mean change of a metric over prompts, for each ablation.

    metric: its name. prompts: their number. clean: the mean of the metric in the clean runs. mean: of the change, [A].
    low, high: its bootstrap interval, [A]; NaN for a single prompt. adjusted_p: two-sided p value of a one-sample
    t-test that the mean change is 0, adjusted for the number of ablations (Benjamini and Hochberg, 1995), [A]; NaN for
    a single prompt.
    """

    metric: str
    prompts: int
    clean: float
    mean: Floats
    low: Floats
    high: Floats
    adjusted_p: Floats

    @property
    def excludes_zero(self) -> NDArray[np.bool_]:
        """[A] whether the interval excludes 0; False for a single prompt."""
        return (self.low > 0) | (self.high < 0)

    @property
    def differs(self) -> NDArray[np.bool_]:
        """[A] whether the mean change differs from 0 at a false discovery rate of 5 %."""
        return self.adjusted_p < 1 - CONFIDENCE


@dataclass(frozen=True)
class Share:
    """How many of some runs have a property, with a Wilson interval for the share."""

    count: int
    of: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The share, in [0, 1]."""
        return self.count / self.of


def effects(result: Result, metric: str, prompts: Sequence[int] | None = None) -> Effects:
    """Return the mean change of a metric over prompts. prompts: their indices; by default all.

    The intervals are those of `scipy.stats.bootstrap` (percentile method, `RESAMPLES` samples, a fixed seed); the
    prompts are drawn together for all ablations. Raises InvalidResult for an unknown metric, for token ids, and for
    no prompts.
    """
    if metric not in result.clean or metric == "argmax":
        known = ", ".join(name for name in result.clean if name != "argmax")
        raise InvalidResult(f"{metric!r} is no metric of the result with a change: it has {known}")
    chosen = slice(None) if prompts is None else list(prompts)
    if not len(result.clean[metric][chosen]):
        raise InvalidResult("there are no prompts to take a mean over")
    change, clean = result.change(metric)[chosen], result.clean[metric][chosen]
    low, high = bootstrap_interval(change)
    return Effects(metric, len(change), float(clean.mean()), change.mean(axis=0), low, high, _adjusted_p_values(change))


def groups(result: Result) -> dict[str, list[int]]:
    """Return {group: indices of its prompts}, in the order of the prompts; empty if no prompt has a group."""
    found: dict[str, list[int]] = {}
    for index, prompt in enumerate(result.prompts):
        if prompt.group is not None:
            found.setdefault(prompt.group, []).append(index)
    return found


def share(flags: NDArray[np.bool_]) -> Share:
    """Return the share of true flags. flags: of any shape. Raises InvalidResult unless they are at least one bool."""
    flags = np.asarray(flags)
    if flags.dtype != np.bool_ or not flags.size:
        raise InvalidResult(f"a share is one of at least one bool, not of {flags.size} values of {flags.dtype}")
    count, of = int(flags.sum()), int(flags.size)
    interval = stats.binomtest(count, of).proportion_ci(CONFIDENCE, method="wilson")
    return Share(count, of, float(interval.low), float(interval.high))


def bootstrap_interval(change: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the bootstrap interval of the mean over prompts. change: [P, A] -> [A], [A]; NaN if P is 1."""
    if len(change) < 2:
        nothing = np.full(change.shape[1], np.nan)
        return nothing, nothing
    prompts = len(change)

    def means(drawn: NDArray[np.int64], axis: int) -> Floats:
        """The mean of each ablation over the drawn prompts: [samples, P] -> [A, samples]."""
        drawn = np.atleast_2d(drawn)
        places = drawn + prompts * np.arange(len(drawn))[:, None]
        counts = np.bincount(places.ravel(), minlength=drawn.size).reshape(len(drawn), prompts)
        return (counts @ change / prompts).T

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ablations that do the same to every prompt: their interval is a point
        interval: Any = stats.bootstrap(
            (np.arange(prompts),),
            means,
            n_resamples=RESAMPLES,
            batch=BATCH,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return interval.low, interval.high


def _adjusted_p_values(change: Floats) -> Floats:
    """Adjusted p values of the hypothesis that the mean over the first axis is 0, [A]."""
    if len(change) < 2:
        return np.full(change.shape[1], np.nan)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore")  # of values that do not vary
        p = stats.ttest_1samp(change, 0.0, axis=0).pvalue
    constant = np.ptp(change, axis=0) == 0
    p = np.where(constant, np.where(change[0] == 0, 1.0, 0.0), p)
    known = np.isfinite(p)  # NaN where a metric of one's own is NaN
    p[known] = stats.false_discovery_control(p[known])
    return p
