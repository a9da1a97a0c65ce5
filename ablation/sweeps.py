"""Sweeps: each head of a model is ablated in turn, to measure what the head does to a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ablation.edits import Ablation
from ablation.engine import Progress, run, run_sequential
from ablation.errors import InvalidAblation, InvalidPrompt, UnknownImputation
from ablation.heads import find_heads
from ablation.imputation import IMPUTATIONS, Imputation, as_imputation
from ablation.results import RunResult, SweepResult


def sweep(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    watch: Sequence[int | None] = (None, None),
    imputations: Sequence[str | Imputation] = tuple(IMPUTATIONS),
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Ablate each head in turn, with each imputation, in growing batches.

    imputations: names or `Imputation` objects, each with a different name. `run` describes the growing batch, the other
    arguments and the errors; in addition, raises UnknownImputation.
    """
    return _sweep(partial(run, max_rows=max_rows), model, token_ids, watch, imputations, progress)


def sweep_sequential(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    watch: Sequence[int | None] = (None, None),
    imputations: Sequence[str | Imputation] = tuple(IMPUTATIONS),
    *,
    progress: Progress | None = None,
) -> SweepResult:
    """Reference implementation of `sweep`: one forward pass for each ablation."""
    return _sweep(run_sequential, model, token_ids, watch, imputations, progress)


def sweep_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    watch: Sequence[Sequence[int | None]] | None = None,
    imputations: Sequence[str | Imputation] = tuple(IMPUTATIONS),
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> list[SweepResult]:
    """Call `sweep` for several prompts, one after the other, and return one result per prompt.

    prompts: token ids of each prompt, without padding. watch: for each prompt, the argument `watch` of `sweep`. Raises
    the errors of `sweep`, and InvalidPrompt if there are no prompts, or if `watch` has another length than `prompts`.
    """
    prompts = list(prompts)
    watch = [(None, None)] * len(prompts) if watch is None else list(watch)
    if not prompts or len(watch) != len(prompts):
        raise InvalidPrompt(f"there are {len(prompts)} prompts, and tokens to watch for {len(watch)}")
    return [
        sweep(
            model,
            token_ids,
            tokens,
            imputations,
            max_rows=max_rows,
            progress=None if progress is None else _subrange(progress, number, len(prompts)),
        )
        for number, (token_ids, tokens) in enumerate(zip(prompts, watch, strict=True))
    ]


def _subrange(progress: Progress, number: int, count: int) -> Progress:
    """Return a callback for the progress of one of `count` equal parts. number: of the part, from 0."""
    return lambda share: progress((number + share) / count)


def _sweep(
    runner: Callable[..., RunResult],
    model: PreTrainedModel,
    token_ids: Sequence[int],
    watch: Sequence[int | None],
    imputations: Sequence[str | Imputation],
    progress: Progress | None,
) -> SweepResult:
    """Run all one-head ablations, and arrange their effects in arrays over imputations, layers and heads.

    runner: `run` or `run_sequential`.
    """
    if isinstance(imputations, str | Imputation) or not isinstance(imputations, Iterable):
        raise UnknownImputation(f"`imputations` is a list: pass [{imputations!r}]")
    chosen = [as_imputation(imputation) for imputation in imputations]
    names = tuple(imputation.name for imputation in chosen)
    if not names or len(set(names)) < len(names):
        raise InvalidAblation("name at least one imputation, and each only once")
    heads = find_heads(model)
    # Layer by layer: this is the order in which rows join a growing batch.
    cells = [
        (number, layer.index, head)
        for layer in heads.layers
        for number in range(len(chosen))
        for head in range(layer.num_heads)
    ]
    ablations = [Ablation([(layer, head)], chosen[number]) for number, layer, head in cells]
    result = runner(model, token_ids, ablations, watch, progress=progress)

    shape = (len(chosen), *heads.shape)
    places = tuple(np.array(cells).T)

    def floats(values: NDArray[np.float64]) -> NDArray[np.float64]:
        grid = np.full((*values.shape[:-1], *shape), np.nan)
        grid[..., *places] = values
        return grid

    def ints(values: NDArray[np.int64]) -> NDArray[np.int64]:
        grid = np.full(shape, -1, dtype=np.int64)
        grid[places] = values
        return grid

    return SweepResult(
        imputations=names,
        watched=result.watched,
        clean_probability=result.clean_probability,
        clean_log_probability=result.clean_log_probability,
        clean_argmax=result.clean_argmax,
        clean_margin=result.clean_margin,
        probability_change=floats(result.probability_change),
        log_probability_change=floats(result.log_probability_change),
        argmax=ints(result.argmax),
        margin=floats(result.margin),
        head_mean=result.head_mean,
        calls=ints(result.calls),
        replaced=ints(result.replaced),
        changed=ints(result.changed),
        provenance=result.provenance,
    )
