"""The cases of a check: a decoder, a batch of prompts, heads and an imputation."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformers import PreTrainedModel

from ablation.checks.decoders import FAMILIES, VOCABULARY, Decoder, decoders

MAX_TOKENS = 8  # more than the six of the prompt that hooks are often written for


@dataclass(frozen=True)
class Case:
    """One case of a check.

    rows: token ids of each prompt. heads: (layer, head) pairs to ablate. side: where short prompts are padded ("left",
    "right" or "both"). pad: the padding token of the configuration, which may also occur in the prompts; if it is None,
    the configuration has no padding token, and token 0 is used. steps: for a lifecycle check, method names of
    `LifecycleMachine`, each with its arguments.
    """

    decoder: Decoder
    rows: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, int], ...]
    imputation: str = "zero"
    side: str = "right"
    pad: int | None = None
    steps: tuple[tuple[Any, ...], ...] = ()

    def __str__(self) -> str:
        if self.steps:
            return f"{self.decoder.family}, {', '.join(' '.join(map(str, step)) for step in self.steps)}"
        if not self.heads:
            return f"{self.decoder.family}, no head ablated{self._batch()}"
        heads = ", ".join(f"layer {layer} head {head}" for layer, head in self.heads)
        return f"{self.decoder.family}, {heads}, {self.imputation} imputation{self._batch()}"

    def _batch(self) -> str:
        lengths = [str(len(row)) for row in self.rows]
        if len(lengths) == 1:
            return ""
        where = "on both sides" if self.side == "both" else f"on the {self.side}"
        padding = f", padded {where}" if len(set(lengths)) > 1 else ""
        return f", rows of {', '.join(lengths[:-1])} and {lengths[-1]} tokens{padding}"

    def model(self) -> PreTrainedModel:
        """Return a fresh model, since the code under test may damage it."""
        model = self.decoder.fresh()
        model.config.pad_token_id = self.pad
        return model

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
        attention_mask = torch.tensor(mask)
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": attention_mask,
            "position_ids": positions,
            "use_cache": False,
        }


@dataclass(frozen=True)
class CaseSpec:
    """How the cases of a check are drawn.

    max_rows: a batch has 2 to max_rows rows, or 1 row if max_rows is 1. ragged: whether rows have different lengths and
    are padded. max_heads: the largest number of ablated heads. min_tokens: the length of the shortest prompt.
    min_layers, min_layer_heads: the smallest number of layers, and of heads per layer.
    """

    imputations: tuple[str, ...] = ("zero", "mean")
    families: tuple[str, ...] = FAMILIES
    dtypes: tuple[str, ...] = ("float32", "float64")
    max_rows: int = 1
    ragged: bool = False
    max_heads: int = 1
    min_tokens: int = 1
    min_layers: int = 1
    min_layer_heads: int = 1

    def restrict_to(self, unsupported: Container[str]) -> CaseSpec:
        """Return a copy without the imputations, families, dtypes, batches and sets of heads that are unsupported."""
        return replace(
            self,
            max_rows=1 if "batch" in unsupported else self.max_rows,
            ragged=self.ragged and "padding" not in unsupported,
            max_heads=1 if "multiple_heads" in unsupported else self.max_heads,
            imputations=tuple(imputation for imputation in self.imputations if imputation not in unsupported),
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
            for imputation in self.imputations:
                yield Case(decoder, rows, tuple(heads), imputation, "left" if self.ragged else "right", pad=1)


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
    side = draw(st.sampled_from(["left", "right", "both", "both"])) if spec.ragged else "right"
    pad = draw(st.sampled_from([None, *prompts[0]]))
    # The mean is drawn more often, since it goes wrong in more ways.
    imputation = draw(st.sampled_from([*spec.imputations, spec.imputations[-1]]))
    return Case(decoder, tuple(map(tuple, prompts)), tuple(chosen), imputation, side, pad)


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
