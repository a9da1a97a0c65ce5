"""Measures of logits: probabilities, ranks, divergence, argmax and margin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ablation.errors import InvalidAblation
from ablation.memory import measuring_bytes

# Two tokens with equal weights in the unembedding may get logits that differ in their last bits, since a kernel sums
# the columns at the edge of a block in another order. Measured: up to 10 eps of the logits' size (float32 and float64,
# 6 to 4096 channels, 1 to 16 rows, AVX-512, AVX2 and neither); 0 in bfloat16, whose sum is rounded once, to one eps.
TIE_EPS = 64.0

Metric = Callable[[Tensor], Tensor]
"""A metric of one's own: logits after the prompt, [rows, vocabulary], in the dtype and on the device of the model;
returns one number for each row, [rows]."""


class Measure(Protocol):
    """Measures rows of logits. tolerance: see `tie_tolerance`."""

    @property
    def tolerance(self) -> float:
        """Of the clean logits, in logits."""

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        """Logits, [rows, scored, vocabulary] -> {name: one number for each row, [rows]}.

        `finite` says whether all logits of the row are finite; if not, its other numbers mean nothing.
        """


class LogitSummary(NamedTuple):
    """Measures of the logits of some rows, as tensors on the device of the logits (for MPS: on the CPU).

    Floats are float64. log_probability: of the watched tokens, [rows, watched], in nats. rank: of the first watched
    token, [rows]; 1 is the largest logit. argmax: token ids, [rows]. margin: top-1 logit - top-2 logit, [rows]; 0 in a
    tie. kl: KL(clean || row), [rows], in nats. finite: whether all logits of the row are finite, [rows] bool; if not,
    the other measures of the row mean nothing.
    """

    log_probability: Tensor
    rank: Tensor
    argmax: Tensor
    margin: Tensor
    kl: Tensor
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

    logits: those of the clean run, [..., vocabulary]. `TIE_EPS` has the evidence.
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


# ---- what is measured of a run


@dataclass(frozen=True)
class NextToken:
    """Measures the prediction of the token after a prompt.

    clean: logits of the clean run, [vocabulary]. target, control: token ids. tolerance: see `tie_tolerance`. own:
    metrics of the user.
    """

    clean: Tensor
    target: int
    control: int
    tolerance: float
    own: Mapping[str, Metric]

    @classmethod
    def after(cls, clean: Tensor, target: int | None, control: int | None, own: Mapping[str, Metric]) -> NextToken:
        """Choose the tokens that are None, by `resolve_watched`. clean: [1, vocabulary]."""
        (logits,), tolerance = clean, tie_tolerance(clean)
        target, control = resolve_watched([target, control], logits, tolerance)
        return cls(logits, target, control, tolerance, own)

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        """Measure logits, [rows, 1, vocabulary]; see `Measure`. Raises InvalidAblation for a wrong metric."""
        logits = logits[:, 0]
        watched = torch.tensor([[self.target, self.control]], device=logits.device).expand(len(logits), -1)
        found = summarise_logits(logits, watched, self.tolerance, self.clean)
        target, control = found.log_probability.unbind(-1)
        return {
            "target_log_probability": target,
            "control_log_probability": control,
            "kl": found.kl,
            "target_rank": found.rank,
            "margin": found.margin,
            "correct": (found.argmax == self.target).double(),
            "argmax": found.argmax,
            "finite": found.finite,
            **{name: _own_metric(name, metric, logits) for name, metric in self.own.items()},
        }


@dataclass(frozen=True)
class Continuation:
    """Measures a continuation of several tokens after a prompt, each predicted from the prompt and those before it.

    name: target or control. tokens: their ids, [scored]. tolerance: see `tie_tolerance`.
    """

    name: str
    tokens: tuple[int, ...]
    tolerance: float

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        """Measure logits, [rows, scored, vocabulary]; see `Measure`."""
        rows = len(logits)
        watched = torch.tensor(self.tokens, device=logits.device).repeat(rows)[:, None]
        found = summarise_logits(logits.flatten(0, 1), watched, self.tolerance)
        greedy = (found.argmax == watched[:, 0].to(found.argmax.device)).unflatten(0, (rows, -1)).all(dim=-1)
        return {
            f"{self.name}_log_probability": found.log_probability.unflatten(0, (rows, -1)).sum(dim=(1, 2)),
            **({"correct": greedy.double()} if self.name == "target" else {}),
            "finite": found.finite.unflatten(0, (rows, -1)).all(dim=-1),
        }


@dataclass(frozen=True)
class MovedTokens:
    """Measures which tokens rise and fall most in probability after a prompt.

    clean: probabilities of the clean run, [vocabulary] float64. count: of the tokens that rise, and of those that fall.
    """

    clean: Tensor
    tolerance: float
    count: int

    @classmethod
    def after(cls, clean: Tensor, count: int) -> MovedTokens:
        """Return the measure for the clean logits, [1, vocabulary]."""
        (logits,) = clean
        return cls(float64(logits).softmax(dim=-1), tie_tolerance(logits), min(count, len(logits)))

    def __call__(self, logits: Tensor) -> dict[str, Tensor]:
        """Return token ids and changes of probability, [rows, count] each, those that move most first."""
        change = float64(logits[:, 0]).softmax(dim=-1) - self.clean
        rising, falling = change.topk(self.count), (-change).topk(self.count)
        return {
            "rising": rising.indices,
            "rise": rising.values,
            "falling": falling.indices,
            "fall": -falling.values,
            "finite": change.isfinite().all(dim=-1),
        }


def _own_metric(name: str, metric: Metric, logits: Tensor) -> Tensor:
    """Return the values of a user's metric, [rows] float64. Raises InvalidAblation if they are anything else."""
    values = metric(logits.clone())  # it may write into what it gets
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        returned = list(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise InvalidAblation(f"the metric {name!r} returned {returned}, not one number for each of {len(logits)} rows")
    return float64(values.detach())


# ---- arithmetic, in float64


def summarise_logits(logits: Tensor, watched: Tensor, tolerance: float, clean: Tensor | None = None) -> LogitSummary:
    """Measure each row. Everything is computed in float64, where the sum over the vocabulary loses no digits.

    logits: [rows, vocabulary]. watched: token ids, [rows, watched]. tolerance: see `tie_tolerance`. clean: logits,
    [vocabulary], with which the rows are compared; without them, `kl` is NaN.
    """
    logits = _on_float64_device(logits)
    watched = watched.to(logits.device)
    clean_log = None if clean is None else float64(clean).log_softmax(dim=-1).to(logits.device)
    largest = max(4, measuring_bytes(logits.device) // (8 * logits.shape[1]))
    scratch = torch.empty(min(largest, len(logits)), logits.shape[1], dtype=torch.float64, device=logits.device)
    chunks = zip(logits.split(largest), watched.split(largest), strict=True)
    parts = [_summarise_chunk(rows, tokens, tolerance, clean_log, scratch) for rows, tokens in chunks]
    return LogitSummary(*(torch.cat(part) for part in zip(*parts, strict=True)))


def float64(values: Tensor) -> Tensor:
    """Return the same values in float64, on a device that has it."""
    return _on_float64_device(values).double()


def _on_float64_device(logits: Tensor) -> Tensor:
    """Return a tensor on a device that has float64: MPS lacks it."""
    return logits.cpu() if logits.device.type == "mps" else logits


def _summarise_chunk(
    logits: Tensor, watched: Tensor, tolerance: float, clean_log: Tensor | None, scratch: Tensor
) -> LogitSummary:
    """`summarise_logits` of as many rows as `scratch` has at most. scratch: [rows, vocabulary] float64, overwritten.

    clean_log: log-probabilities of the clean run, [vocabulary].
    """
    rest = scratch[: len(logits)].copy_(logits)
    finite = rest.sum(dim=-1).isfinite()
    of_watched = rest.gather(-1, watched)
    rank = 1 + (rest > of_watched[:, :1] + tolerance).sum(dim=-1)
    if clean_log is not None:
        clean = clean_log.exp()
        kl = clean @ clean_log - rest @ clean  # + log_sum, below: log P(row) is its logit - log_sum
    else:
        kl = rest.new_full((len(rest),), torch.nan)
    first, best = rest.max(dim=-1, keepdim=True)
    argmax = best[:, 0]
    second = rest.scatter_(-1, best, -torch.inf).amax(dim=-1)
    margin = first[:, 0] - second
    log_sum = first + rest.sub_(first).exp_().sum(dim=-1, keepdim=True).log1p()
    tied = second >= first[:, 0] - tolerance
    if tied.any():
        argmax[tied] = lowest_best(logits[tied].double(), tolerance)
        margin[tied] = 0.0
    kl = (kl + log_sum[:, 0]).clamp(min=0.0)  # rounding can make it negative
    return LogitSummary(of_watched - log_sum, rank, argmax, margin, kl, finite)
