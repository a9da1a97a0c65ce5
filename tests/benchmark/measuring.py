"""How the ways are timed and compared, and the least time that the multiplications alone need."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.heads import find_heads
from ablation.imputation import DEFAULT_IMPUTATIONS
from ablation.results import Result
from ablation.sweeps import sweep
from tests.benchmark.ways import WAYS, Cell, double_loop, input_ids, installed, watched

NOISE = 3e-5
"""Of a log-probability in float32, from kernels for another number of rows."""
NOISE_EPS = 16
"""The same in a shorter dtype, in eps."""


def largest_difference(model: PreTrainedModel, swept: Result, cells: Sequence[Cell], rows: Iterable[Tensor]) -> float:
    """Return the largest difference between a sweep and the logits of a way, in log-probabilities of watched tokens."""
    worst, metrics = 0.0, watched(model)
    maps = {name: swept.grid(swept.ablated[name])[0] for name in metrics}
    for (imputation, layer, head), logits in zip(cells, rows, strict=True):
        cell = (swept.imputations.index(imputation), layer, head)
        worst = max(worst, *(abs(float(metric(logits[None])) - maps[name][cell]) for name, metric in metrics.items()))
    return worst


def difference_on_one_thread(model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> float:
    """Return the largest difference between the growing batch and the double loop, from the same kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, MKL uses another kernel for the few rows of one prompt
    try:
        swept = sweep(model, ids, metrics=watched(model))
        return largest_difference(model, swept, cells, double_loop(model, ids, cells))
    finally:
        torch.set_num_threads(threads)


class Multiplication(NamedTuple):
    """[rows, inner] @ [inner, columns]. after_attention: whether the heads of its layer have been ablated before it."""

    after_attention: bool
    inner: int
    columns: int


def multiplications(model: PreTrainedModel) -> dict[int, list[Multiplication]]:
    """Return the multiplications of each layer, in a forward pass of one row."""
    found: dict[int, list[Multiplication]] = {}
    with ExitStack() as hooks:
        for layer in find_heads(model).layers:
            here = found.setdefault(layer.index, [])

            def note(module: Any, args: Any, here: Any = here, projection: Any = layer.projection) -> None:
                weight = module.weight if isinstance(module, Conv1D) else module.weight.T
                after_attention = module is projection or any(m.after_attention for m in here)
                here.append(Multiplication(after_attention, *weight.shape))

            for module in layer.block.modules():
                if isinstance(module, nn.Linear | Conv1D):
                    hooks.callback(module.register_forward_pre_hook(note).remove)
        model(input_ids(model, [0]))
    return found


def multiplication_time(model: PreTrainedModel, tokens: int) -> float:
    """Return the seconds that the multiplications of the ablations take, at the rate measured here for their shapes.

    For each ablation these are the projection and what comes after it in its own layer, all of the layers above, only
    the last token after the attention of the last layer, and one unembedding. Attention itself, norms, activations and
    the clean run are left out.
    """
    heads, seconds, above = find_heads(model), 0.0, 0
    like = next(model.parameters())
    products = multiplications(model)
    for layer in heads.layers:
        # Rows that differ from the clean run after the attention of this layer.
        here = above + layer.num_heads * len(DEFAULT_IMPUTATIONS)
        after_attention = here * (1 if layer is heads.layers[-1] else tokens)
        seconds += sum(
            product_time(after_attention if m.after_attention else above * tokens, m.inner, m.columns, like)
            for m in products[layer.index]
        )
        above = here
    columns, inner = model.get_output_embeddings().weight.shape
    return seconds + product_time(above, inner, columns, like)


def product_time(rows: int, inner: int, columns: int, like: Tensor) -> float:
    """Return the seconds of one multiplication, in the dtype and on the device of a tensor."""
    if not rows:
        return 0.0
    a, b = like.new_empty(rows, inner).normal_(), like.new_empty(inner, columns).normal_()
    return min(seconds_of(lambda: a @ b) for _ in range(3))


def seconds_of(act: Callable[[], object]) -> float:
    """Return the seconds that a call takes, with all that it has given an accelerator to do."""
    synchronise()
    started = time.perf_counter()
    act()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Timed(NamedTuple):
    """Seconds of each way for all ablations, and of the multiplications alone."""

    seconds: dict[str, float]
    least: float
    cells: list[Cell]


def timed(model: PreTrainedModel, ids: list[int], rounds: int, parts: int, pattern: str = "") -> Timed:
    """Time the ways in turn, take the best of some rounds, and assert that they agree.

    parts: a way that runs one ablation after the other runs one layer in that many, and its time is multiplied.
    """
    heads = find_heads(model)
    cells = [(imputation, *pair) for imputation in DEFAULT_IMPUTATIONS for pair in heads]
    some = [cell for cell in cells if cell[1] % parts == 0]
    ways = {name: way for name, (library, way) in WAYS.items() if re.search(pattern, name) and installed(library)}
    if parts > 1:
        ways.pop("`sweep_sequential`: one forward per ablation", None)  # it cannot run in part
    times: dict[str, list[float]] = {name: [] for name in ways}
    least = []
    swept = sweep(model, ids, metrics=watched(model))
    for turn in range(rounds):
        least.append(multiplication_time(model, len(ids)))
        for name, way in ways.items():
            print(f"{turn + 1} of {rounds}: {name} ...", file=sys.stderr)
            logits: list[Tensor] = []
            if turn == 0 and model.device.type != "cpu":
                list(way(model, ids, some))  # an accelerator chooses its kernels at the first call
            seconds = seconds_of(lambda way=way, logits=logits: logits.extend(way(model, ids, some)))  # type: ignore[misc]
            times[name].append(seconds * len(cells) / len(some) if logits else seconds)
            if logits:
                off = largest_difference(model, swept, some, logits)
                assert off < max(NOISE, NOISE_EPS * torch.finfo(model.dtype).eps), f"{name} differs by {off}"
    return Timed({name: min(seconds) for name, seconds in times.items()}, min(least), cells)
