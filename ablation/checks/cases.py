"""The cases of a check: a decoder, a batch of prompts, heads and an imputation."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.decoders import FAMILIES, POSITIONS, VOCABULARY, Decoder, Subject, decoders
from ablation.checks.protocol import KEYWORDS, READ_ROW

MAX_TOKENS = 8  # more than the six of the prompt that hooks are often written for
FACTORS = ("0.5", "-1", "1.5", "0.25")  # exact in every dtype, so that multiplying rounds at most once


@dataclass(frozen=True)
class Case:
    """One case of a check.

    rows: token ids of each prompt. heads: (layer, head) pairs to ablate. imputation: as `ablate` receives it. side:
    where short prompts are padded ("left", "right" or "both"). pad: the padding token of the configuration, which may
    also occur in the prompts; if it is None, the configuration has no padding token, and token 0 is used. positions:
    where the ablation acts; None for all tokens. by_position: whether given values depend on the position. steps: for a
    lifecycle check, method names of `LifecycleMachine`, each with its arguments.
    """

    decoder: Subject
    rows: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, int], ...]
    imputation: str = "zero"
    side: str = "right"
    pad: int | None = None
    positions: tuple[int, ...] | None = None
    by_position: bool = False
    steps: tuple[tuple[Any, ...], ...] = ()

    def __str__(self) -> str:
        if self.steps:
            return f"{self.decoder.family}, {', '.join(' '.join(map(str, step)) for step in self.steps)}"
        if not self.heads:
            return f"{self.decoder.family}, no head ablated{self._batch()}"
        heads = ", ".join(f"layer {layer} head {head}" for layer, head in self.heads)
        by = " by position" if self.by_position else ""
        at = "" if self.positions is None else f" at positions {', '.join(map(str, self.positions))}"
        return f"{self.decoder.family}, {heads}, {self.imputation} imputation{by}{at}{self._batch()}"

    def _batch(self) -> str:
        lengths = [str(len(row)) for row in self.rows]
        if len(lengths) == 1:
            return ""
        where = "on both sides" if self.side == "both" else f"on the {self.side}"
        padding = f", padded {where}" if self.is_padded else ""
        return f", rows of {', '.join(lengths[:-1])} and {lengths[-1]} tokens{padding}"

    def model(self) -> PreTrainedModel:
        """Return a fresh model, since the code under test may damage it."""
        model = self.decoder.fresh()
        model.config.pad_token_id = self.pad
        return model

    @property
    def random_decoder(self) -> Decoder:
        """The decoder, whose shape can be exchanged. Raises TypeError for the user's own model."""
        if not isinstance(self.decoder, Decoder):
            raise TypeError(f"{self.decoder!r} is no random decoder")
        return self.decoder

    @property
    def kind(self) -> str:
        """The imputation without a factor, as `protocol.IMPUTATIONS` names it."""
        return self.imputation.partition(":")[0]

    @property
    def factor(self) -> str:
        """The factor of scale, as `ablate` receives it."""
        return self.imputation.partition(":")[2]

    @property
    def reads_row(self) -> bool:
        """Whether the values depend on all tokens of the row."""
        return self.kind in READ_ROW

    @property
    def is_padded(self) -> bool:
        """Whether rows differ in length."""
        return len(set(map(len, self.rows))) > 1

    def tensor(self, *rows: Sequence[int]) -> Tensor:
        """Return rows of integers, all of one length, on the device of the model, [rows, tokens]."""
        return torch.tensor(rows, device=self.decoder.device)

    def keywords(self) -> dict[str, Any]:
        """Return the keyword arguments that `ablate` needs for this case."""
        of_imputation = {"values": self.values, "reference": self.reference}
        needed = {KEYWORDS[self.kind]: of_imputation[KEYWORDS[self.kind]]()} if self.kind in KEYWORDS else {}
        return needed | ({} if self.positions is None else {"positions": self.positions})

    def values(self) -> dict[tuple[int, int], Tensor]:
        """Return values for each head, [head_dim], or [positions of the longest row, head_dim] if `by_position`."""
        pairs, dtype = self.decoder.heads(), getattr(torch, self.decoder.dtype)
        drawn = _drawn_values(len(pairs), self.decoder.head_dim)
        values = torch.from_numpy(drawn[:, : max(map(len, self.rows))] if self.by_position else drawn[:, 0])
        return {
            pair: value.to(self.decoder.device, dtype, copy=True) for pair, value in zip(pairs, values, strict=True)
        }

    def reference(self) -> list[dict[str, Tensor]]:
        """Return the batches of the reference: input_ids and attention_mask, each [rows, tokens].

        The prompts differ in length, and are padded if those of the case are. The longest is as long as any row of the
        checks; one holds the padding token. For resample, there is one batch, like that of the case, of other tokens.
        """
        if self.kind == "resample":
            inputs = self.inputs()
            return [{**_batch(inputs), "input_ids": (inputs["input_ids"] + 11) % self.decoder.vocabulary}]
        longest = max(MAX_TOKENS + 2, *map(len, self.rows))
        prompts = [
            tuple((7 * at * at + 3 * at + 5 * start) % self.decoder.vocabulary for at in range(length))
            for start, length in enumerate((3, longest, 6))
        ]
        prompts[0] = (prompts[0][0], self.pad or 0, prompts[0][2])
        batches = [prompts[:2], prompts[2:]] if self.is_padded else [[prompt] for prompt in prompts]
        return self.batches(batches)

    def batches(self, prompts: list[list[tuple[int, ...]]]) -> list[dict[str, Tensor]]:
        """Return batches of a reference, padded as the case is."""
        return [_batch(replace(self, rows=tuple(batch)).inputs()) for batch in prompts]

    def replaced(self) -> Tensor:
        """Return which tokens are real and at the positions of the case, bool [rows, tokens]."""
        real: Tensor = self.inputs()["attention_mask"].bool()
        if self.positions is None:
            return real
        at = torch.zeros_like(real)
        for row, here in enumerate(real):
            at[row, here.nonzero()[list(self.positions), 0]] = True
        return at

    def another_head(self) -> tuple[int, int]:
        """Return a head other than the first of `heads`, if the model has more than one."""
        every = self.decoder.heads()
        return every[(every.index(self.heads[0]) + 1) % len(every)]

    def inputs(self) -> dict[str, Any]:
        """Return the batch: input_ids, attention_mask and position_ids, each [rows, tokens], and use_cache=False.

        The cache is switched off, since some models round differently when they use one.
        """
        longest = max(map(len, self.rows))
        ids, mask = [], []
        for number, row in enumerate(self.rows):
            pads = longest - len(row)
            left = {"left": pads, "right": 0, "both": (pads + number % 2) // 2}[self.side]
            pad = self.pad or 0
            ids.append([*[pad] * left, *row, *[pad] * (pads - left)])
            mask.append([*[0] * left, *[1] * len(row), *[0] * (pads - left)])
        attention_mask = self.tensor(*mask)
        return {
            "input_ids": self.tensor(*ids),
            "attention_mask": attention_mask,
            "position_ids": token_positions(attention_mask),
            "use_cache": False,
        }


def token_positions(mask: Tensor) -> Tensor:
    """Return the position of each token, the number of real tokens before it; 0 before the first. [rows, tokens]."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _batch(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@lru_cache(maxsize=64)
def _drawn_values(heads: int, head_dim: int) -> Any:
    """Return an array of [heads, POSITIONS, head_dim], of numbers that are exact in every dtype."""
    return np.random.RandomState(0).randint(-64, 65, (heads, POSITIONS, head_dim)) / 64


@dataclass(frozen=True)
class CaseSpec:
    """How the cases of a check are drawn.

    imputations: those that the check knows, or None for all that the adapter offers, its own included. without: not
    these. positions: whether positions are drawn, for adapters that offer them.
    max_rows: a batch has 2 to max_rows rows, or 1 row if max_rows is 1. ragged: whether rows have different lengths and
    are padded. max_heads: the largest number of ablated heads. min_tokens: the length of the shortest prompt.
    min_layers, min_layer_heads: the smallest number of layers, and of heads per layer.
    """

    imputations: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    families: tuple[str, ...] = FAMILIES
    dtypes: tuple[str, ...] = ("float32", "float64")
    max_rows: int = 1
    ragged: bool = False
    sides: tuple[str, ...] = ("left", "right", "both", "both")
    max_heads: int = 1
    min_tokens: int = 1
    min_layers: int = 1
    min_layer_heads: int = 1
    positions: bool = False

    def restrict_to(self, unsupported: Container[str], offered: tuple[str, ...]) -> CaseSpec:
        """Return a copy with offered imputations, and without what is unsupported."""
        known = offered if self.imputations is None else self.imputations
        return replace(
            self,
            max_rows=1 if "batch" in unsupported else self.max_rows,
            ragged=self.ragged and "padding" not in unsupported,
            sides=("right",) if "position_ids" in unsupported else self.sides,
            max_heads=1 if "multiple_heads" in unsupported else self.max_heads,
            imputations=tuple(name for name in known if name in offered and name not in self.without),
            positions=self.positions and "positions" not in unsupported,
            families=tuple(family for family in self.families if family not in unsupported),
            dtypes=tuple(dtype for dtype in self.dtypes if dtype not in unsupported),
        )

    def strategy(self) -> SearchStrategy[Case]:
        """Return the hypothesis strategy that draws a case."""
        return _cases(self)

    def simplest(self) -> Iterator[Case]:
        """Yield one simple case per imputation, to be tried first: most bugs show in these, without shrinking."""
        digits = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3)
        tokens = max(4, self.min_tokens)  # not as many as heads
        rows = tuple(digits[i : i + tokens + (i % 2 if self.ragged else 0)] for i in range(self.max_rows))
        family, dtype = self.families[0], self.dtypes[0]
        if (family, dtype) != ("mixtral", "float64"):
            decoder = Decoder(family, max(2, self.min_layers), max(3, self.min_layer_heads), head_dim=8, dtype=dtype)
            heads = [pair for pair in ((1, 0), (0, 2), (1, 2), (0, 1)) if pair in decoder.heads()][: self.max_heads]
            for name in self.imputations or ():
                side, at = self.sides[0] if self.ragged else "right", (1, -1) if self.positions else None
                for by_position in (False, True) if name == "values" else (False,):
                    imputation = with_factor(name)
                    yield Case(decoder, rows, tuple(heads), imputation, side, 1, at, by_position)


def with_factor(imputation: str, factor: str = FACTORS[0]) -> str:
    """Return an imputation as `ablate` receives it."""
    return f"{imputation}:{factor}" if imputation == "scale" else imputation


@st.composite
def _cases(draw: st.DrawFn, spec: CaseSpec) -> Case:
    decoder = draw(decoders(spec.families, spec.dtypes, spec.min_layers, spec.min_layer_heads))
    count = draw(st.integers(1 if spec.max_rows == 1 else 2, spec.max_rows))
    token = st.integers(0, VOCABULARY - 1)
    if spec.ragged:
        prompts = [draw(st.lists(token, min_size=spec.min_tokens, max_size=MAX_TOKENS)) for _ in range(count)]
    else:
        length = draw(st.integers(spec.min_tokens, MAX_TOKENS))
        prompts = [draw(st.lists(token, min_size=length, max_size=length)) for _ in range(count)]
    chosen = draw(st.permutations(draw(_sets_of_heads(decoder, spec.max_heads))))
    side = draw(st.sampled_from(spec.sides)) if spec.ragged else "right"
    pad = draw(st.sampled_from([None, *prompts[0]]))
    names = spec.imputations or ()
    # Means of the row are drawn more often, since they go wrong in more ways.
    imputation = draw(st.sampled_from([*names, *(name for name in names if name in READ_ROW)]))
    by_position = imputation == "values" and draw(st.booleans())
    imputation = with_factor(imputation, draw(st.sampled_from(FACTORS)) if imputation == "scale" else "")
    positions = draw(_positions(min(map(len, prompts)))) if spec.positions else None
    return Case(decoder, tuple(map(tuple, prompts)), tuple(chosen), imputation, side, pad, positions, by_position)


def _positions(tokens: int) -> SearchStrategy[Any]:
    """Draw positions that a row of so many tokens has; seldom None, for all."""
    some = st.lists(st.integers(-tokens, tokens - 1), max_size=3, unique=True)
    return some.map(lambda positions: tuple(positions) or None)


def _sets_of_heads(decoder: Decoder, max_heads: int) -> SearchStrategy[Any]:
    """Draw heads of any layers, several heads of one layer, or one head of each layer; rarely a single head.

    Bugs are likely in the last two kinds of sets.
    """
    every = decoder.heads()
    layers, heads = sorted(dict(every)), range(decoder.num_heads)
    fewest = min(2, max_heads, len(every))
    anywhere = st.lists(st.sampled_from(every), min_size=fewest, max_size=max_heads, unique=True)
    of_one_layer = st.sampled_from(layers).map(lambda layer: [(layer, head) for head in heads][:max_heads])
    head = st.sampled_from(heads)
    of_each_layer = st.tuples(*(st.tuples(st.just(layer), head) for layer in layers[:max_heads]))
    return anywhere if max_heads == 1 else anywhere | of_one_layer | of_each_layer
