"""Removal curves: heads are ablated cumulatively in an order, and compared with random orders. Does not import torch.

An order lists heads; its set of size k is its first k heads, so the sets of an order are nested. The random orders are
of two kinds: `uniform`, in which all heads are equally likely, and `layers`, whose set of each size has as many heads
of each layer as that of the order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ablation.choices import BY
from ablation.errors import InvalidAblation, InvalidResult
from ablation.results import Result
from ablation.studies import statistics
from ablation.studies.statistics import Floats
from ablation.units import MLP, Pair, pair_order

Heads = tuple[Pair, ...]

RANDOM = ("uniform", "layers")
"""The kinds of random orders; reports call them random heads, and random heads of the same layers."""
ORDERED = "ordered"
METRICS = ("correct", "target_probability", "logit_difference", "kl")
"""The metrics of a curve."""
BAND = (5.0, 95.0)
"""The percentiles of the random orders between which their band lies."""


class Series(NamedTuple):
    """One order of heads. kind: `ORDERED`, or one of `RANDOM`. draw: which random order, from 0."""

    kind: str
    draw: int
    heads: Heads

    def name(self, k: int) -> str:
        """The name of the set of the first k heads in a result."""
        return f"{self.kind} {k}" if self.kind == ORDERED else f"{self.kind} {k} #{self.draw}"


_NAME = re.compile(rf"({ORDERED}|{'|'.join(RANDOM)}) (\d+)(?: #(\d+))?")


def rank_heads(
    result: Result, by: str = "target", imputation: str | None = None, prompts: Sequence[int] | None = None
) -> Heads:
    """Return the heads of a sweep in the order of their effect, the most harmful first.

    by: a key of `choices.BY`. imputation: by default the first of the result. prompts: indices of those whose effects
    are averaged; by default all. Heads with equal effects keep their order in the result. Raises InvalidAblation for an
    unknown ranking, and InvalidResult unless the result is of single heads, with this imputation, metric and prompts.
    """
    if by not in BY:
        raise InvalidAblation(f"unknown ranking {by!r}: use one of {', '.join(BY)}")
    metric, sign, _ = BY[by]
    if not result.ablations:
        raise InvalidResult("the result has no ablations, so there is nothing to rank")
    name = result.imputations[0] if imputation is None else imputation
    if name not in result.imputations:
        raise InvalidResult(f"the result has no imputation {name!r}, only {', '.join(result.imputations)}")
    if any(len(key.heads) != 1 or key.heads[0][1] == MLP for key in result.ablations):
        raise InvalidResult(
            "heads are ranked by a sweep of single heads; this is a result of sets of heads, or of MLPs"
        )
    if metric not in result.clean:
        raise InvalidResult(f"the result has no {metric}: heads are ranked by a sweep of prompts")
    count = len(result.prompts)
    chosen = list(range(count) if prompts is None else prompts)
    if not chosen:
        raise InvalidResult("there are no prompts to rank heads by")
    if unknown := [index for index in chosen if not 0 <= index < count]:
        raise InvalidResult(f"the result has no prompt {unknown[0]}: it has {count}, counted from 0")
    own: dict[Pair, int] = {}
    for number, key in enumerate(result.ablations):
        if key.imputation == name and own.setdefault(key.heads[0], number) != number:
            raise InvalidResult(
                f"{key.label} has several ablations with the imputation {name!r}: rank a sweep with one"
            )
    score = -sign * result.change(metric)[chosen].mean(axis=0)
    return tuple(sorted(own, key=lambda head: score[own[head]]))


def random_orders(order: Sequence[Pair], heads: Iterable[Pair], count: int, seed: int) -> list[Series]:
    """Return random orders as long as an order of heads, so many of each kind.

    heads: all heads that may be drawn. Each order has a generator of its own, made from the seed, its kind and its
    number: more orders do not change the first ones.
    """
    everyone = sorted(heads, key=pair_order)
    found = []
    for number, kind in enumerate(RANDOM):
        for draw in range(count):
            random = np.random.default_rng([seed, number, draw])
            shuffled = [everyone[index] for index in random.permutation(len(everyone))]
            if kind == "layers":
                of_layer = {layer: iter([head for head in shuffled if head[0] == layer]) for layer, _ in order}
                drawn = [next(of_layer[layer]) for layer, _ in order]
            else:
                drawn = shuffled[: len(order)]
            found.append(Series(kind, draw, tuple(drawn)))
    return found


def split(prompts: int, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return the indices of prompts for the ranking, and of those for the evaluation, drawn with a seed.

    share: of the ranking. Raises InvalidAblation unless both parts have a prompt.
    """
    count = round(share * prompts)
    if not 0 < count < prompts:
        raise InvalidAblation(
            f"a split of {share} leaves {count} of {prompts} prompts for the ranking: both parts need one"
        )
    order = np.random.default_rng(seed).permutation(prompts)
    return sorted(order[:count].tolist()), sorted(order[count:].tolist())


# ---- what a result says


@dataclass(frozen=True)
class Curve:
    """What sets of growing size do: the result of a curve, arranged by size.

    Dimensions: I imputations, K sizes, D random orders of a kind, P prompts. ks: [K]. clean: {metric: the mean over the
    prompts}. ordered: {metric: the mean over the prompts, [I, K]}. low, high: its bootstrap interval; NaN for a single
    prompt. random: {kind: {metric: the mean over the prompts, [I, D, K]}}.
    """

    imputations: tuple[str, ...]
    ks: tuple[int, ...]
    clean: dict[str, float]
    ordered: dict[str, Floats]
    low: dict[str, Floats]
    high: dict[str, Floats]
    random: dict[str, dict[str, Floats]]
    same: dict[str, NDArray[np.bool_]]

    @classmethod
    def of(cls, result: Result) -> Curve:
        """Arrange the result of a curve. Raises InvalidResult if it is anything else."""
        places: dict[tuple[str, str, int, int], int] = {}
        for number, key in enumerate(result.ablations):
            found = _NAME.fullmatch(key.name)
            if found is None:
                raise InvalidResult(f"{key} is not a set of a removal curve")
            place = (key.imputation, found[1], int(found[3] or 0), int(found[2]))
            if places.setdefault(place, number) != number:
                raise InvalidResult(f"{key} occurs twice, so this is no removal curve")
        if missing := [metric for metric in METRICS if metric not in result.clean]:
            raise InvalidResult(f"the result has no {missing[0]}: a removal curve is of prompts")
        ks = tuple(sorted({k for *_, k in places}))
        draws = {kind: sorted({draw for _, of, draw, _ in places if of == kind}) for kind in (ORDERED, *RANDOM)}
        try:
            at = {
                kind: np.array(
                    [[[places[name, kind, draw, k] for k in ks] for draw in of] for name in result.imputations]
                )
                for kind, of in draws.items()
                if of
            }
            ordered = at[ORDERED][:, 0]
        except KeyError:
            raise InvalidResult("the removal curve lacks some of its sets") from None
        members = [frozenset(key.heads) for key in result.ablations]
        same = {
            kind: np.array(
                [
                    [[members[n] == members[m] for n, m in zip(row, own, strict=True)] for row in of]
                    for of, own in zip(at[kind], ordered, strict=True)
                ]
            )
            for kind in at
            if kind != ORDERED
        }
        means, low, high = {}, {}, {}
        for metric in METRICS:
            means[metric] = result.ablated[metric].mean(axis=0)
            ends = statistics.bootstrap_interval(result.ablated[metric][:, ordered.ravel()].astype(np.float64))
            low[metric], high[metric] = (end.reshape(ordered.shape) for end in ends)
        return cls(
            imputations=result.imputations,
            ks=ks,
            clean={metric: float(result.clean[metric].mean()) for metric in METRICS},
            ordered={metric: means[metric][ordered] for metric in METRICS},
            low=low,
            high=high,
            random={
                kind: {metric: means[metric][of] for metric in METRICS} for kind, of in at.items() if kind != ORDERED
            },
            same=same,
        )

    def band(self, kind: str, metric: str) -> tuple[Floats, Floats, Floats]:
        """Return the mean of the random orders of a kind, and the ends of their band, `BAND`, [I, K] each.

        kind: of `RANDOM`. Raises InvalidResult for a kind or a metric that the curve does not have.
        """
        values = self._orders(kind, metric)
        low, high = np.percentile(values, BAND, axis=1)
        return values.mean(axis=1), low, high

    def as_harmful(self, kind: str, metric: str) -> Floats:
        """Return the share of random orders that do at least as much harm as the ordered heads, [I, K].

        With D orders, it is (1 + their number) / (1 + D), so that it is never 0: a one-sided p value (Phipson and
        Smyth, 2010). Harm is a smaller value; for `kl`, a larger one. A random set of the same heads does the same
        harm, whatever rounding says. Raises InvalidResult as `band` does.
        """
        sign = -1.0 if metric == "kl" else 1.0
        values = sign * self._orders(kind, metric)
        worse = (values <= sign * self.ordered[metric][:, None]) | self.same[kind]
        return np.asarray((1 + worse.sum(axis=1)) / (1 + values.shape[1]))

    def _orders(self, kind: str, metric: str) -> Floats:
        if kind not in self.random or metric not in self.random[kind]:
            has = f"{', '.join(self.random) or 'none'}; metrics: {', '.join(METRICS)}"
            raise InvalidResult(f"the curve has no {metric!r} of random orders {kind!r}: its orders: {has}")
        return self.random[kind][metric]


def first_halving(values: Iterable[float], clean: float, ks: Iterable[int]) -> int | None:
    """Return the first size at which a metric is at most half of its clean value; None if there is none."""
    return next((k for k, value in zip(ks, values, strict=True) if value <= clean / 2), None)


def curve_rows(curve: Curve) -> Iterable[dict[str, Any]]:
    """Yield a row of the table for each imputation, order, size and metric.

    low, high: the bootstrap interval over the prompts of the ordered heads; None for random orders.
    """
    for (i, imputation), (j, k) in itertools.product(enumerate(curve.imputations), enumerate(curve.ks)):
        for metric in METRICS:
            shared = {"imputation": imputation, "k": k, "metric": metric, "clean": curve.clean[metric]}
            low, high = curve.low[metric][i, j], curve.high[metric][i, j]
            ends = {"low": None, "high": None} if np.isnan(low) else {"low": float(low), "high": float(high)}
            yield {**shared, "order": ORDERED, "draw": None, "value": float(curve.ordered[metric][i, j]), **ends}
            for kind, values in curve.random.items():
                for draw, value in enumerate(values[metric][i, :, j]):
                    yield {**shared, "order": kind, "draw": draw, "value": float(value), "low": None, "high": None}
