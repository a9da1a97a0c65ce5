"""What a check is run on: a decoder, a batch of prompts, heads and an imputation; and how its failures are worded."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.decoders import FAMILIES, VOCABULARY, Decoder, decoders

MOST_TOKENS = 8  # more than the prompt that everybody hard-codes


@dataclass(frozen=True)
class Case:
    """One case of a check.

    rows: each prompt's token ids. heads: (layer, head) pairs to ablate. side: of padding. pad: the configuration's
    padding token, which may be a word of the prompts; where it has none, token 0 pads. steps: of a `hygiene.lifecycle`.
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
        """A fresh model: the code under test is assumed to be broken."""
        model = self.decoder.fresh()
        model.config.pad_token_id = self.pad
        return model

    def another(self) -> tuple[int, int]:
        """A head that is not the first of `heads`, unless the model has one only."""
        layers, heads = self.decoder.num_layers, self.decoder.num_heads
        layer, head = self.heads[0]
        return divmod((layer * heads + head + 1) % (layers * heads), heads)

    def inputs(self) -> dict[str, Any]:
        """The batch: input_ids, attention_mask and position_ids, all [rows, tokens]; no cache: it rounds otherwise."""
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
    """How the cases of a check are drawn: up to that many rows and heads, at least that many tokens and layers.

    in_layer: at least that many heads in a layer of the model.
    """

    imputations: tuple[str, ...] = ("zero", "mean")
    families: tuple[str, ...] = FAMILIES
    dtypes: tuple[str, ...] = ("float32", "float64")
    rows: int = 1
    ragged: bool = False
    heads: int = 1
    tokens: int = 1
    layers: int = 1
    in_layer: int = 1

    def without(self, unsupported: Container[str]) -> CaseSpec:
        """The same, without imputations, families, dtypes, batches and sets that an implementation does not claim."""
        return replace(
            self,
            rows=1 if "batch" in unsupported else self.rows,
            ragged=self.ragged and "padding" not in unsupported,
            heads=1 if "multiple_heads" in unsupported else self.heads,
            imputations=tuple(imputation for imputation in self.imputations if imputation not in unsupported),
            families=tuple(family for family in self.families if family not in unsupported),
            dtypes=tuple(dtype for dtype in self.dtypes if dtype not in unsupported),
        )

    def strategy(self) -> SearchStrategy[Case]:
        """Draws a case."""
        return _cases(self)

    def plain(self) -> Iterator[Case]:
        """One case an imputation, easy to read and tried first: most bugs fail in it, and need no shrinking."""
        digits = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3)
        tokens = max(3, self.tokens)
        rows = tuple(digits[i : i + tokens + (i % 2 if self.ragged else 0)] for i in range(self.rows))
        heads = ((1, 0), (0, 2), (1, 2), (0, 1))[: self.heads]
        family, dtype = self.families[0], self.dtypes[0]
        if (family, dtype) != ("mixtral", "float64"):
            decoder = Decoder(family, max(2, self.layers), max(3, self.in_layer), head_dim=8, dtype=dtype)
            for imputation in self.imputations:
                yield Case(decoder, rows, heads, imputation, "left" if self.ragged else "right", pad=1)


@st.composite
def _cases(draw: st.DrawFn, of: CaseSpec) -> Case:
    decoder = draw(decoders(of.families, of.dtypes, of.layers, of.in_layer))
    count = draw(st.integers(1 if of.rows == 1 else 2, of.rows))
    token = st.integers(0, VOCABULARY - 1)
    if of.ragged:
        prompts = [draw(st.lists(token, min_size=of.tokens, max_size=MOST_TOKENS)) for _ in range(count)]
    else:
        length = draw(st.integers(of.tokens, MOST_TOKENS))
        prompts = [draw(st.lists(token, min_size=length, max_size=length)) for _ in range(count)]
    chosen = draw(st.permutations(draw(_sets(decoder, of.heads))))
    side = draw(st.sampled_from(["left", "right", "both", "both"])) if of.ragged else "right"
    pad = draw(st.sampled_from([None, *prompts[0]]))
    imputation = draw(st.sampled_from([*of.imputations, of.imputations[-1]]))  # the mean, which goes wrong in more ways
    return Case(decoder, tuple(map(tuple, prompts)), tuple(chosen), imputation, side, pad)


def _sets(decoder: Decoder, most: int) -> SearchStrategy[Any]:
    """Heads anywhere; or, since bugs live there, several of one layer, or one of each. Seldom a single one."""
    layer, head = st.integers(0, decoder.num_layers - 1), st.integers(0, decoder.num_heads - 1)
    least = min(2, most, decoder.num_layers * decoder.num_heads)
    anywhere = st.lists(st.tuples(layer, head), min_size=least, max_size=most, unique=True)
    of_one = layer.map(lambda index: [(index, head) for head in range(decoder.num_heads)][:most])
    of_each = st.tuples(*(st.tuples(st.just(index), head) for index in range(decoder.num_layers)[:most]))
    return anywhere if most == 1 else anywhere | of_one | of_each


def run(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Logits of a bare model, [rows, tokens, vocabulary]."""
    with torch.no_grad():
        logits: Tensor = model(**{"use_cache": False} | inputs).logits
    return logits


def same(got: Tensor, want: Tensor, what: str) -> None:
    """Assert that two tensors are the same bits."""
    __tracebackhide__ = True
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, should be {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, should be {want.dtype}"
    if not torch.equal(got, want):
        raise AssertionError(f"{what} should be the same to the last bit: {_where(got, want, got != want)}")


def close(got: Tensor, want: Tensor, what: str) -> None:
    """Assert that two tensors are equal up to the rounding of another order of summation.

    Over 400 random decoders of each type, kernels for other numbers of rows change logits of up to 5.2 by at most
    2.6e-6 in float32 and 1.3e-15 in float64: 9 and 4 units of rounding at their size. 256 units are allowed.
    """
    __tracebackhide__ = True
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, should be {tuple(want.shape)}"
    eps = torch.finfo(torch.float32 if got.dtype == torch.float32 else torch.float64).eps
    atol = 256 * eps * max(1.0, want.abs().max().item())
    wrong = ~((got - want).abs() <= atol)
    if wrong.any():
        raise AssertionError(f"{what}: {_where(got, want, wrong)} (tolerance {atol:.1e})")


def _where(got: Tensor, want: Tensor, wrong: Tensor) -> str:
    """The first wrong element, and how many there are."""
    first = tuple(wrong.nonzero()[0].tolist())
    worst = (got.double() - want.double()).abs().max()
    digits = 17 if got.dtype == torch.float64 else 9  # what it takes to tell any two numbers apart
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, by up to {worst:.3g}; "
        f"the first, at {list(first)}, is {got[first].item():.{digits}g}, should be {want[first].item():.{digits}g}"
    )
