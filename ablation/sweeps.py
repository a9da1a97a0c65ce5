"""Sweeps: each head of a model is ablated in turn, to measure what the head does to a prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedModel

from ablation.edits import Ablation
from ablation.engine import run, run_sequential
from ablation.errors import InvalidAblation, UnknownImputation
from ablation.heads import find_heads
from ablation.imputation import IMPUTATIONS, Imputation, as_imputation
from ablation.measure import Metric
from ablation.passes import Progress
from ablation.results import Result


def sweep(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    target: int | Sequence[int] | None = None,
    control: int | Sequence[int] | None = None,
    imputations: Sequence[str | Imputation] = tuple(IMPUTATIONS),
    *,
    metrics: Mapping[str, Metric] | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Ablate each head in turn, with each imputation, in growing batches.

    imputations: names or `Imputation` objects, each with a different name. `run` describes the growing batch, the other
    arguments and the errors; in addition, raises UnknownImputation.
    """
    ablations = one_head_ablations(model, imputations)
    return run(model, token_ids, ablations, target, control, metrics=metrics, max_rows=max_rows, progress=progress)


def sweep_sequential(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    target: int | Sequence[int] | None = None,
    control: int | Sequence[int] | None = None,
    imputations: Sequence[str | Imputation] = tuple(IMPUTATIONS),
    *,
    metrics: Mapping[str, Metric] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Reference implementation of `sweep`: one forward pass for each ablation."""
    ablations = one_head_ablations(model, imputations)
    return run_sequential(model, token_ids, ablations, target, control, metrics=metrics, progress=progress)


def one_head_ablations(model: PreTrainedModel, imputations: Sequence[str | Imputation]) -> list[Ablation]:
    """Return the ablations of a sweep, layer by layer: the order in which rows join a growing batch.

    Raises UnknownImputation, InvalidAblation if the list is empty or has equal names, and UnsupportedModel.
    """
    if isinstance(imputations, str | Imputation) or not isinstance(imputations, Iterable):
        raise UnknownImputation(f"`imputations` is a list: pass [{imputations!r}]")
    chosen = [as_imputation(imputation) for imputation in imputations]
    if not chosen or len({imputation.name for imputation in chosen}) < len(chosen):
        raise InvalidAblation("name at least one imputation, and each only once")
    return [
        Ablation([(layer.index, head)], imputation)
        for layer in find_heads(model).layers
        for imputation in chosen
        for head in range(layer.num_heads)
    ]
