"""Sweeps: each head of a model is ablated in turn, to measure what the head does to a prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from ablation.edits import Ablation
from ablation.engine import run, run_sequential
from ablation.errors import InvalidAblation, UnknownImputation
from ablation.heads import find_heads
from ablation.imputation import DEFAULT_IMPUTATIONS, Imputation, as_imputation
from ablation.measure import Metric
from ablation.passes import Progress
from ablation.results import Result
from ablation.rows import as_positions
from ablation.units import Pair


def sweep(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    target: int | Sequence[int] | None = None,
    control: int | Sequence[int] | None = None,
    imputations: Sequence[str | Imputation] = DEFAULT_IMPUTATIONS,
    *,
    positions: str | Iterable[int] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Ablate each head in turn, with each imputation, in growing batches.

    imputations: names or `Imputation` objects, each with a different name. positions: see `ablation.Ablation`. `run`
    describes the growing batch, the other arguments and the errors; in addition, raises UnknownImputation.
    """
    ablations = one_head_ablations(model, as_imputations(imputations), positions)
    return run(model, token_ids, ablations, target, control, metrics=metrics, max_rows=max_rows, progress=progress)


def sweep_sequential(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    target: int | Sequence[int] | None = None,
    control: int | Sequence[int] | None = None,
    imputations: Sequence[str | Imputation] = DEFAULT_IMPUTATIONS,
    *,
    positions: str | Iterable[int] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Reference implementation of `sweep`: one forward pass for each ablation."""
    ablations = one_head_ablations(model, as_imputations(imputations), positions)
    return run_sequential(model, token_ids, ablations, target, control, metrics=metrics, progress=progress)


def as_imputations(imputations: Sequence[str | Imputation]) -> list[Imputation]:
    """Return the imputations of a sweep.

    Raises UnknownImputation, and InvalidAblation for an empty list or equal names.
    """
    chosen = [as_imputation(imputation) for imputation in listed(imputations)]
    verify_names([imputation.name for imputation in chosen])
    return chosen


def listed(imputations: Sequence[str | Imputation]) -> list[str | Imputation]:
    """Return a list of imputations. Raises UnknownImputation for a single one, and for what is no list."""
    if isinstance(imputations, str | Imputation) or not isinstance(imputations, Iterable):
        raise UnknownImputation(f"`imputations` is a list: pass [{imputations!r}]")
    return list(imputations)


def verify_names(names: Sequence[str]) -> None:
    """Raise InvalidAblation if there are no imputations, or two of one name."""
    if not names or len(set(names)) < len(names):
        raise InvalidAblation("name at least one imputation, and each only once")


class HeadSet(NamedTuple):
    """A set of heads, with a name for results; without a name, its heads name it. heads: (layer, head) pairs."""

    name: str
    heads: tuple[Pair, ...]


def ablations_of_sets(
    sets: Sequence[HeadSet], imputations: Sequence[Imputation], positions: str | Iterable[int] | None = None
) -> list[Ablation]:
    """Return an ablation of each set with each imputation, imputation by imputation.

    Raises InvalidAblation for positions that are none.
    """
    at = as_positions(positions)
    return [Ablation(of.heads, imputation, at) for imputation in imputations for of in sets]


def one_head_ablations(
    model: PreTrainedModel, imputations: Sequence[Imputation], positions: str | Iterable[int] | None = None
) -> list[Ablation]:
    """Return the ablations of a sweep, layer by layer: the order in which rows join a growing batch.

    Raises InvalidAblation for positions that are none, and UnsupportedModel.
    """
    at = as_positions(positions)
    return [
        Ablation([(layer.index, head)], imputation, at)
        for layer in find_heads(model).layers
        for imputation in imputations
        for head in range(layer.num_heads)
    ]
