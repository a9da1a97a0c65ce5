"""What figures show of a result: changes in the units that are drawn, on average over the prompts, and texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ablation.errors import shortened
from ablation.figures.labels import NO_BREAK, Flags, Floats, largest_cells, printable, signed
from ablation.reports.report import token_labels, where
from ablation.results import Result

FACTORS = {"target_probability": 100.0, "control_probability": 100.0, "signed_margin": 1.0}
"""{drawn metric: drawn units for each of its own}: percentage points (pp), and logits."""
LONGEST_NAME = 30
"""Letters of the name of an imputation that are shown."""
CHANCE = "false discovery rate 5%"


@dataclass(frozen=True)
class Change:
    """The changes of a metric, arranged as maps of all heads; NaN where there is no head.

    of_prompts: [P, I, L, H]. mean: over the prompts, [I, L, H]. low, high: the 95% interval of the mean, [I, L, H].
    differs: [I, L, H] whether the mean differs from 0, corrected for the number of ablations, as the report counts; see
    `ablation.studies.statistics`. The last three are None for a single prompt.
    """

    of_prompts: Floats
    mean: Floats
    low: Floats | None = None
    high: Floats | None = None
    differs: Flags | None = None

    def certain(self, imputation: int) -> Flags | None:
        """Return `differs` of one imputation, [L, H]; None for a single prompt."""
        return None if self.differs is None else self.differs[imputation]

    @property
    def strongest(self) -> tuple[int, int, int] | None:
        """The imputation, layer and head of the largest mean change, of those that differ from 0; None if none does."""
        found = largest_cells(self.mean if self.differs is None else np.where(self.differs, self.mean, 0.0), 1)
        return None if not found else (found[0][0], found[0][1], found[0][2])

    def amount(self, place: tuple[int, ...], unit: str) -> str:
        """Return a mean change as text, with its sign and its interval; no line is broken within it."""
        text = f"{signed(self.mean[place])} {unit}"
        if self.low is not None and self.high is not None and np.isfinite(self.low[place]):
            text += f" [{signed(self.low[place])}, {signed(self.high[place])}]"
        return text.replace(" ", NO_BREAK)


def names_of_imputations(result: Result) -> list[str]:
    """Return the names of the imputations as figures show them, [I]."""
    return [printable(shortened(name, LONGEST_NAME)) for name in result.imputations]


def heading(result: Result, title: str) -> str:
    """Return the last part of a title. title: the model and the prompt; for several prompts, the model."""
    prompts = len(result.prompts)
    words = f"{title.rstrip(': ')}: {prompts} prompts" if prompts > 1 else title
    at = where(result)
    return words if at == "at every token" else f"{words}; heads ablated {at}"


class Drawn:
    """A result of one-head ablations, and the changes that its figures show. Each change is computed once."""

    def __init__(self, result: Result, decode: Callable[..., str]) -> None:
        """decode: returns the text of token ids; see `roles`."""
        kept, margin = result.kept, result.ablated["margin"]
        self.result = replace(
            result,
            clean={**result.clean, "signed_margin": result.clean["margin"]},
            ablated={**result.ablated, "signed_margin": np.where(kept, margin, -margin)},
        )
        self.prompts, self.total = kept.shape
        self.imputations = result.imputations
        self.names = names_of_imputations(result)
        self.has_head = result.has_head
        self.kept = result.grid(kept)  # [P, I, L, H]
        self.target, self.control, self.probability, self.argmax = roles(result, decode)
        self.averaged = "mean " if self.many else ""
        self._changes: dict[str, Change] = {}

    @property
    def many(self) -> bool:
        """Whether there are several prompts."""
        return len(self.result.prompts) > 1

    @cached_property
    def flipped(self) -> Floats:
        """[I, L, H] the share of the prompts whose prediction an ablation changes, in percent; NaN without a head."""
        return np.where(self.has_head, 100 * (1 - self.kept.mean(axis=0)), np.nan)

    def flips(self, imputation: int) -> Flags | None:
        """Return which heads change the argmax, [L, H]; None for several prompts, whose shares are in `flipped`."""
        return None if self.many else self.has_head & ~self.kept[0, imputation]

    @cached_property
    def head_mean(self) -> Floats:
        """[L, H] the mean of z over tokens, channels and prompts; NaN where there is no head."""
        mean: Floats = self.result.head_mean.mean(axis=0)
        return mean

    def change(self, metric: str) -> Change:
        """Return the change of one of the metrics in `FACTORS`."""
        if metric not in self._changes:
            self._changes[metric] = _change(self.result, metric, FACTORS[metric])
        return self._changes[metric]

    def head(self, place: tuple[int, ...]) -> str:
        """Return the name of an imputation, layer and head, such as L9H6 (zero)."""
        imputation, layer, head = place
        return f"L{layer}H{head}" + (f" ({self.names[imputation]})" if self.names[1:] else "")

    def kept_line(self, imputation: int | None = None) -> str:
        """Return how many ablations keep the argmax, in words: of all, or in short of one imputation."""
        if imputation is None:
            runs = "runs" if self.many else "ablations"
            return f"{self.kept.sum()} of {self.prompts * self.total} {runs} keep {self.argmax}"
        own = sum(key.imputation == self.imputations[imputation] for key in self.result.ablations)
        return f"{self.kept[:, imputation].sum()} of {own * self.prompts} kept"

    def largest_line(self, change: Change, of: str, unit: str) -> str:
        """Return which ablation changes a metric most, in words. of: the metric in words."""
        if change.strongest is None:
            if self.many and np.nan_to_num(change.of_prompts).any():
                return f"no ablation changes {of} on average, beyond chance ({CHANCE})"
            return f"no ablation changes {of}"
        average = " on average" if self.many else ""
        return f"{self.head(change.strongest)} changes {of} most, by {change.amount(change.strongest, unit)}{average}"

    def strongest_line(self) -> str:
        """Return which ablation changes the target's probability most, in words."""
        return self.largest_line(self.change("target_probability"), self.probability, "pp")


def _change(result: Result, metric: str, factor: float) -> Change:
    of_prompts = factor * result.grid(result.change(metric))
    if len(result.prompts) == 1:
        return Change(of_prompts, of_prompts[0])
    from ablation.studies import statistics

    effects = statistics.effects(result, metric)
    mean, low, high = (factor * result.grid(values) for values in (effects.mean, effects.low, effects.high))
    return Change(of_prompts, mean, low, high, result.grid(effects.differs))


def roles(result: Result, decode: Callable[..., str]) -> tuple[str, str, str, str]:
    """How figures call the target and the control, the probability of the target, and the clean argmax.

    For one prompt with their texts in quotes, and the token id where the text is not enough. decode: returns the text
    of token ids.
    """
    if len(result.prompts) > 1:
        return "target", "control", "P(target)", "the prediction"
    (prompt,), argmax = result.prompts, int(result.clean["argmax"][0])
    texts: dict[tuple[int, ...], str] = {(argmax,): decode(argmax)}
    for tokens, text in ((prompt.target, prompt.target_text), (prompt.control, prompt.control_text)):
        texts[tokens] = decode(*tokens) if text is None else text
    labels = token_labels({tokens[0]: text for tokens, text in texts.items() if len(tokens) == 1}, quoted)
    target, control = (
        labels[tokens[0]] if len(tokens) == 1 else quoted(texts[tokens]) for tokens in (prompt.target, prompt.control)
    )
    return f"target {target}", f"control {control}", f"P({target})", labels[argmax]


def quoted(text: str) -> str:
    """A token in quotes, shortened if it is long, with visible spaces."""
    shown = printable(text).replace(" ", "␣")
    return f"“{shown if len(shown) <= 20 else shown[:19] + '…'}”"
