"""Studies of sets of heads: removal curves, greedy orders, and pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation.choices import BY, check_ks
from ablation.errors import InvalidAblation, InvalidHead
from ablation.heads import HeadMap, find_heads
from ablation.imputation import Imputation
from ablation.measure import Metric
from ablation.models import LoadedModel
from ablation.passes import Progress
from ablation.results import Result
from ablation.studies.curves import ORDERED, Heads, Series, random_orders
from ablation.studies.experiment import Study
from ablation.studies.pairs import sets_of_two
from ablation.studies.study import subrange
from ablation.sweeps import HeadSet
from ablation.units import MLP, Pair

RANDOM_ORDERS = 20
"""Random orders of each kind, by default."""


def removal_curve(
    loaded: LoadedModel,
    prompts: Iterable[Any],
    order: Sequence[Pair],
    ks: Iterable[int] | None = None,
    imputations: Sequence[str | Imputation] = ("zero",),
    *,
    random: int = RANDOM_ORDERS,
    seed: int = 0,
    metrics: Mapping[str, Metric] | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Result:
    """Ablate the first k heads of an order together, for each k, and as many heads of random orders.

    order: (layer, head) pairs, such as `ablation.rank_heads` returns. ks: sizes of the sets; by default 1, 2, 4, ... up
    to all heads of the order. random: how many random orders of each kind (`ablation.studies.curves.random_orders`).
    seed: of the random orders, and of `resample`. The other arguments and the errors are those of
    `ablation.sweep_prompts`; in addition, raises InvalidHead and InvalidAblation for an order or sizes that are none.
    `ablation.Curve.of` arranges the result by size.
    """
    sets = curve_sets(find_heads(loaded.model), order, ks, random, seed)
    study = Study(loaded, prompts, imputations, sets=sets, seed=seed, stacklevel=3, **options)
    return study.run(metrics=metrics, max_rows=max_rows, progress=progress, checkpoint=checkpoint, overwrite=overwrite)


def sweep_pairs(
    loaded: LoadedModel,
    prompts: Iterable[Any],
    imputations: Sequence[str | Imputation] = ("zero",),
    *,
    heads: Iterable[Pair] | None = None,
    with_heads: Iterable[Pair] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    checkpoint: Path | str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Result:
    """Ablate every head alone and every set of two heads.

    heads: those that make pairs, such as `ablation.strongest_heads` returns; by default all. with_heads: only pairs
    that contain one of these heads. The other arguments and the errors are those of `ablation.sweep_prompts`; in
    addition, raises InvalidHead, and InvalidAblation if there is no pair. `ablation.Pairs.of` gives the interactions in
    the result.
    """
    sets = pair_sets(find_heads(loaded.model), heads, with_heads)
    study = Study(loaded, prompts, imputations, sets=sets, stacklevel=3, **options)
    return study.run(metrics=metrics, max_rows=max_rows, progress=progress, checkpoint=checkpoint, overwrite=overwrite)


def curve_sets(
    heads: HeadMap, order: Sequence[Pair], ks: Iterable[int] | None, random: int, seed: int
) -> list[HeadSet]:
    """Return the named sets of a removal curve. The arguments and the errors are those of `removal_curve`."""
    own = _validated(order, heads)
    if not own or len(set(own)) < len(own):
        raise InvalidAblation("an order of heads names at least one head, and each only once")
    if any(head == MLP for _, head in own):
        raise InvalidAblation("a removal curve is of heads, as its random orders are: name no MLPs")
    if isinstance(random, bool) or not isinstance(random, int) or random < 0:
        raise InvalidAblation(f"the number of random orders is {random!r}: it is a whole number, at least 0")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InvalidAblation(f"the seed is {seed!r}: it is a whole number, at least 0")
    doubled = {min(2**power, len(own)) for power in range(len(own).bit_length() + 1)}
    sizes = check_ks(doubled if ks is None else ks, len(own))
    series = [Series(ORDERED, 0, own), *random_orders(own, heads, random, seed)]
    return [HeadSet(of.name(k), of.heads[:k]) for of in series for k in sizes]


def pair_sets(heads: HeadMap, members: Iterable[Pair] | None, with_heads: Iterable[Pair] | None) -> list[HeadSet]:
    """Return every head alone, and the pairs. The arguments and the errors are those of `sweep_pairs`."""
    chosen = heads if members is None else _validated(members, heads)
    needed = None if with_heads is None else _validated(with_heads, heads)
    sets = [HeadSet("", of) for of in sets_of_two([*chosen, *(needed or [])], needed)]
    if not any(len(of.heads) == 2 for of in sets):
        raise InvalidAblation("there is no pair of heads: name at least two heads")
    return sets


def _validated(pairs: Iterable[Pair], heads: HeadMap) -> Heads:
    """Return (layer, head) pairs as a tuple. Raises InvalidHead."""
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise InvalidHead(f"{pairs!r} is no list of heads: pass a list of (layer, head) pairs, such as [(0, 1)]")
    return tuple(map(heads.validate, pairs))


def greedy_order(
    loaded: LoadedModel,
    prompts: Iterable[Any],
    count: int,
    imputation: str | Imputation = "zero",
    by: str = "target",
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Heads:
    """Return an order of heads that is ranked again at each step, with the heads before ablated.

    Each step adds the head that does most harm on average, together with the heads before; of heads that do the same,
    the first. count: heads of the order. by: a key of `ablation.choices.BY`. The other arguments and the errors are
    those of `ablation.sweep_prompts`.
    """
    if by not in BY:
        raise InvalidAblation(f"unknown ranking {by!r}: use one of {', '.join(BY)}")
    (metric, sign, _), left, order = BY[by], list(find_heads(loaded.model)), list[Pair]()
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(left):
        raise InvalidAblation(f"an order has 1 to {len(left)} heads, not {count!r}")
    study = Study(loaded, prompts, [imputation], sets=[[head] for head in left], stacklevel=3, **options)
    for step in range(count):
        study.plan.sets = [HeadSet("", (*order, head)) for head in left]
        part = subrange(progress, step / count, (step + 1) / count)
        result = study.run(max_rows=max_rows, progress=part)
        study.plan.reference = study.plan.reference or study.plan.computed  # the same at every step
        order.append(left.pop(int((sign * result.change(metric).mean(axis=0)).argmax())))
    return tuple(order)
