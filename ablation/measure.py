"""Measures of the last token's logits: probabilities, argmax and margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ablation.memory import measuring_bytes

# Two tokens with equal weights in the unembedding may get logits that differ in their last bits, since a kernel sums
# the columns at the edge of a block in another order. Measured: up to 10 eps of the logits' size (float32 and float64,
# 6 to 4096 channels, 1 to 16 rows, AVX-512, AVX2 and neither); 0 in bfloat16, whose sum is rounded once, to one eps.
TIE_EPS = 64.0


class LogitSummary(NamedTuple):
    """Measures of the logits of some rows, as tensors on the device of the logits (for MPS: on the CPU).

    Floats are float64. probability, log_probability: of the watched tokens, [rows, watched]; log-probabilities in nats.
    argmax: token ids, [rows]. margin: top-1 logit - top-2 logit, [rows]; 0 in a tie. finite: whether all logits of the
    row are finite, [rows] bool; if not, the other measures of the row mean nothing.
    """

    probability: Tensor
    log_probability: Tensor
    argmax: Tensor
    margin: Tensor
    finite: Tensor


def logit_size(logits: Tensor) -> float:
    """Return the size of logits, to which their rounding is relative. Masked tokens do not count."""
    return float(torch.maximum(logits.max().abs(), logits.abs().median()))


def logit_spread(logits: Tensor) -> float:
    """Return the median absolute deviation of logits, which neither an offset nor masked tokens change."""
    return float((logits - logits.median()).abs().median())


def coarsest_eps(*dtypes: torch.dtype) -> float:
    """Return the eps of the floating dtype that has the fewest digits."""
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


def tie_tolerance(logits: Tensor) -> float:
    """Return the difference up to which two logits of a row are a tie, since rounding decides which is larger.

    logits: those of the clean run, [vocabulary]. `TIE_EPS` has the evidence.
    """
    eps, eps32 = torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps
    return logit_size(logits) * (TIE_EPS * min(eps, eps32) + eps)


def lowest_best(logits: Tensor, tolerance: float) -> Tensor:
    """Return the argmax: the lowest token id whose logit is within `tolerance` of the largest.

    [..., vocabulary] -> [...].
    """
    best = logits.amax(dim=-1, keepdim=True)
    return (logits >= best - tolerance).to(torch.uint8).argmax(dim=-1)  # torch returns the first of equal maxima


def resolve_watched(watch: Sequence[int | None], logits: Tensor, tolerance: float) -> list[int]:
    """Return the watched tokens, with each None replaced by the most probable token that is not watched yet.

    logits: those of the clean run, [vocabulary].
    """
    free = float64(logits)
    named = torch.tensor([t for t in watch if t is not None], dtype=torch.long, device=free.device)
    free = free.index_fill(0, named, -torch.inf)
    watched = []
    for token in watch:
        if token is None:
            token = int(lowest_best(free, tolerance))
            free[token] = -torch.inf
        watched.append(token)
    return watched


def summarise_logits(logits: Tensor, watched: Tensor, tolerance: float) -> LogitSummary:
    """Return the probabilities of the watched tokens, the argmax and the margin of each row.

    logits: [rows, vocabulary]. watched: token ids, [watched]. tolerance: see `tie_tolerance`. Everything is computed in
    float64, where the sum over the vocabulary loses no digits.
    """
    logits = _on_float64_device(logits)
    watched = watched.to(logits.device)
    largest = max(4, measuring_bytes(logits.device) // (8 * logits.shape[1]))
    scratch = torch.empty(min(largest, len(logits)), logits.shape[1], dtype=torch.float64, device=logits.device)
    parts = [_summarise_chunk(rows, watched, tolerance, scratch) for rows in logits.split(largest)]
    return LogitSummary(*(torch.cat(part) for part in zip(*parts, strict=True)))


def float64(values: Tensor) -> Tensor:
    """Return the same values in float64, on a device that has it."""
    return _on_float64_device(values).double()


def _on_float64_device(logits: Tensor) -> Tensor:
    """Return a tensor on a device that has float64: MPS lacks it."""
    return logits.cpu() if logits.device.type == "mps" else logits


def _summarise_chunk(logits: Tensor, watched: Tensor, tolerance: float, scratch: Tensor) -> LogitSummary:
    """`summarise_logits` of as many rows as `scratch` has at most. scratch: [rows, vocabulary] float64, overwritten."""
    rest = scratch[: len(logits)].copy_(logits)
    finite = rest.sum(dim=-1).isfinite()
    of_watched = rest[:, watched]
    first, best = rest.max(dim=-1, keepdim=True)
    argmax = best[:, 0]
    second = rest.scatter_(-1, best, -torch.inf).amax(dim=-1)
    margin = first[:, 0] - second
    log_sum = first + rest.sub_(first).exp_().sum(dim=-1, keepdim=True).log1p()
    log_probability = of_watched - log_sum
    tied = second >= first[:, 0] - tolerance
    if tied.any():
        argmax[tied] = lowest_best(logits[tied].double(), tolerance)
        margin[tied] = 0.0
    return LogitSummary(log_probability.exp(), log_probability, argmax, margin, finite)
