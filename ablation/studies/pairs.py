"""Pairs of heads: what two heads do together, beyond what each does alone. Does not import torch.

The interaction of two heads is effect(a, b) - effect(a) - effect(b), where an effect is the ablated value of a metric -
its clean value. It is 0 if the effects add up. Two heads that stand in for each other have a larger effect together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ablation.choices import BY
from ablation.errors import InvalidAblation, InvalidResult
from ablation.results import Result
from ablation.studies import statistics
from ablation.studies.curves import Heads, rank_heads
from ablation.studies.statistics import Floats
from ablation.units import Pair, pair_label, pair_order

METRICS = ("target_probability", "target_log_probability", "logit_difference", "kl", "margin")
"""The metrics whose interactions are in the table."""


def sets_of_two(heads: Iterable[Pair], with_head: Iterable[Pair] | None = None) -> list[Heads]:
    """Return every head alone, and every set of two heads. with_head: only sets that contain one of these heads."""
    members, needed = sorted(set(heads), key=pair_order), None if with_head is None else set(with_head)
    pairs = [pair for pair in itertools.combinations(members, 2) if needed is None or needed & set(pair)]
    return [*((head,) for head in members), *pairs]


@dataclass(frozen=True)
class Pairs:
    """The pairs of one imputation in a result. Dimensions: P prompts, N pairs.

    pairs: [N]. lower, upper, together: the columns of the result with the ablations of each pair's heads and of the
    pair, [N]. The lower head is that of the lower layer; in one layer, that with the lower number.
    """

    result: Result
    imputation: str
    pairs: tuple[Heads, ...]
    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    together: NDArray[np.int64]

    @classmethod
    def of(cls, result: Result, imputation: str | None = None) -> Pairs:
        """Find the pairs of an imputation, by default the first.

        Raises InvalidResult if there are none, if a head alone is missing, and if heads have several ablations.
        """
        name = next(iter(result.imputations), "") if imputation is None else imputation
        place: dict[Heads, int] = {}
        for n, key in enumerate(result.ablations):
            if key.imputation == name and len(key.heads) in (1, 2):
                heads = tuple(sorted(key.heads, key=pair_order))
                if place.setdefault(heads, n) != n:
                    raise InvalidResult(f"{key.label} has several ablations with the imputation {name!r}")
        pairs = tuple(heads for heads in place if len(heads) == 2)
        if not pairs:
            raise InvalidResult(f"the result has no pairs of heads with the imputation {name!r}")
        if missing := [head for pair in pairs for head in pair if (head,) not in place]:
            raise InvalidResult(f"the result has no ablation of {pair_label(missing[0])} alone")
        columns = [[place[(pair[0],)], place[(pair[1],)], place[pair]] for pair in pairs]
        return cls(result, name, pairs, *np.array(columns, dtype=np.int64).T)

    def effect(self, metric: str) -> Floats:
        """Return the change of a metric by both heads together, [P, N]. Raises KeyError for an unknown metric."""
        return self.result.change(metric)[:, self.together]

    def alone(self, metric: str) -> tuple[Floats, Floats]:
        """Return the change of a metric by the lower head alone and by the upper head alone, [P, N] each."""
        change = self.result.change(metric)
        return change[:, self.lower], change[:, self.upper]

    def interaction(self, metric: str) -> Floats:
        """Return effect(a, b) - effect(a) - effect(b) of a metric, [P, N]."""
        lower, upper = self.alone(metric)
        return self.effect(metric) - lower - upper

    def map_of(self, values: NDArray[Any]) -> NDArray[Any]:
        """Arrange values of pairs as a symmetric map of heads, [N] -> [heads, heads]; NaN where there is no pair."""
        index = {head: number for number, head in enumerate(self.heads)}
        filled = np.full((len(index), len(index)), np.nan)
        rows, columns = np.array([[index[lower], index[upper]] for lower, upper in self.pairs]).T
        filled[rows, columns] = filled[columns, rows] = values
        return filled

    @cached_property
    def heads(self) -> Heads:
        """All heads of the pairs, layer by layer."""
        return tuple(sorted({head for pair in self.pairs for head in pair}, key=pair_order))

    @cached_property
    def both_kept_alone(self) -> NDArray[np.bool_]:
        """[P, N] whether neither head alone changes the prediction."""
        kept = self.result.kept
        both: NDArray[np.bool_] = kept[:, self.lower] & kept[:, self.upper]
        return both

    @cached_property
    def compensates(self) -> NDArray[np.bool_]:
        """[P, N] whether both heads together change the prediction, which neither changes alone."""
        return self.both_kept_alone & ~self.result.kept[:, self.together]

    @cached_property
    def restores(self) -> NDArray[np.bool_]:
        """[P, N] whether both heads together keep the prediction, which one of them alone changes."""
        return ~self.both_kept_alone & self.result.kept[:, self.together]


def strongest_heads(result: Result, count: int, by: str = "target", imputation: str | None = None) -> Heads:
    """Return the heads of a sweep with the largest mean effect of either sign. by: see `ablation.choices.BY`.

    Raises InvalidAblation unless `count` is at least 1, and the errors of `rank_heads`.
    """
    if count < 1:
        raise InvalidAblation(f"{count} heads are none: take at least 1")
    order = rank_heads(result, by, imputation)
    name = result.imputations[0] if imputation is None else imputation
    change = np.abs(result.change(BY[by][0]).mean(axis=0))
    of = {key.heads[0]: change[n] for n, key in enumerate(result.ablations) if key.imputation == name}
    return tuple(sorted(order, key=lambda head: -of[head])[:count])


def pair_rows(result: Result) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each imputation, metric and pair: means over the prompts.

    low, high: the bootstrap interval of the interaction; None for a single prompt. compensates: in how many prompts the
    two heads together change the prediction, which neither changes alone.
    """
    for imputation in result.imputations:
        pairs = Pairs.of(result, imputation)
        compensates = pairs.compensates.sum(axis=0).tolist()
        for metric in METRICS:
            interaction = pairs.interaction(metric)
            ends = statistics.bootstrap_interval(interaction)
            columns = [*pairs.alone(metric), pairs.effect(metric), interaction]
            means: Sequence[list[float]] = [of.mean(axis=0).tolist() for of in columns]
            many = len(interaction) > 1
            low, high = (end.tolist() if many else [None] * len(pairs.pairs) for end in ends)
            for pair, *numbers in zip(pairs.pairs, *means, low, high, compensates, strict=True):
                lower, upper = map(pair_label, pair)
                names = ("effect_lower", "effect_upper", "effect", "interaction", "low", "high", "compensates")
                yield {
                    **{"imputation": imputation, "lower": lower, "upper": upper, "metric": metric},
                    **dict(zip(names, numbers, strict=True)),
                }
