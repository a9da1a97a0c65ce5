"""Ablations in `model.generate`, which keeps keys and values in a cache, against forward passes without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ablation.checks.assertions import assert_close
from ablation.checks.decoders import FAMILIES, Decoder
from ablation.checks.protocol import CACHE
from ablation.errors import AblationNotApplied, InvalidAblation
from ablation.hook import HeadAblation
from tests.surgery import kind
from tests.test_hook import logits

ROWS = [[3, 1, 4, 1, 5], [2, 6], [5, 30, 5]]
NEW = 4
SOLID = ("zero", "scale", "values", "values-by-position", "reference-mean", "reference-mean-by-position")
"""Kinds that need no other token of the row."""
POSITIONS = (None, [1, 4, 6])


def decoder_of(family: str) -> Decoder:
    return Decoder(family, num_layers=4, num_heads=2, head_dim=8)


def generated(model: PreTrainedModel, rows: list[list[int]], **options: Any) -> tuple[Tensor, Tensor]:
    """Generate greedily from left-padded rows. Returns tokens [rows, NEW], logits [rows, NEW, vocabulary]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences[:, longest:], torch.stack(output.logits, dim=1)


def without_cache(hook: HeadAblation, model: PreTrainedModel, row: list[int], ablation: Any) -> tuple[Tensor, Tensor]:
    """Decode one row greedily by forward passes over the whole row, with those of the positions that it has."""
    heads, imputation, positions = ablation
    ids, found = list(row), []
    for _ in range(NEW):
        known = None if positions is None else [position for position in positions if position < len(ids)]
        hook.clear()
        if known is None or known:
            hook.ablate(heads, imputation, known)
        found.append(logits(model, torch.tensor([ids]))[0, -1])
        ids.append(int(found[-1].argmax()))
    return torch.tensor(ids[len(row) :]), torch.stack(found)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", "lfm2"])
@pytest.mark.parametrize("name", SOLID)
def test_generation_equals_forwards_without_a_cache(family: str, name: str) -> None:
    """For a batch with padding on the left. gemma3: the window slides over the positions that are ablated."""
    decoder = decoder_of(family)
    model, imputation = decoder.shared(), kind(name, decoder).imputation
    heads = decoder.heads()[::3]
    for positions in POSITIONS:
        if imputation.by_position and positions is None and max(map(len, ROWS)) + NEW - 1 > 8:
            rows = [row[:4] for row in ROWS]  # the values end at position 7
        else:
            rows = ROWS
        with HeadAblation(model) as hook:
            hook.ablate(heads, imputation, positions)
            tokens, found = generated(model, rows)
            for row, got, of_row in zip(rows, tokens, found, strict=True):
                want, logits_alone = without_cache(hook, model, row, (heads, imputation, positions))
                assert got.tolist() == want.tolist()
                assert_close(of_row, logits_alone, f"the logits of {family} with {name} at {positions}")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("name", ["zero", "scale", "values"])
def test_generation_with_a_static_cache_equals_a_dynamic_one(family: str, name: str) -> None:
    decoder = decoder_of(family)
    model = decoder.shared()
    with HeadAblation(model) as hook:
        hook.ablate(decoder.heads()[::3], kind(name, decoder).imputation)
        tokens, found = generated(model, ROWS)
        static_tokens, static = generated(model, ROWS, cache_implementation="static")
    assert tokens.tolist() == static_tokens.tolist()
    assert_close(static, found, "the logits with a static cache")


def test_positions_with_a_static_cache_need_a_plain_mask() -> None:
    """`generate` turns the mask into one of four dimensions; a loop of one's own keeps it, and works."""
    decoder = decoder_of("llama")
    model, row = decoder.shared(), torch.tensor([[3, 1, 4, 1, 5]])
    with HeadAblation(model) as hook:
        hook.ablate(decoder.heads()[::3], "zero", [0, 3])
        with pytest.raises(InvalidAblation, match=r"needs an attention mask of \[rows, tokens\]"):
            generated(model, ROWS, cache_implementation="static")
        whole = logits(model, row)
        static = StaticCache(config=model.config, max_cache_len=8)
        parts = [
            model(row[:, part], **{CACHE: static}, use_cache=True).logits.detach()
            for part in (slice(0, 2), slice(2, 3), slice(3, 5))
        ]
    assert_close(torch.cat(parts, dim=1), whole, "the logits in parts")


@pytest.mark.parametrize(
    ("imputation", "positions"),
    [("mean", None), ("channel-mean", [0]), ("zero", "last"), ("scale:0.5", [0, -1])],
)
def test_what_needs_the_whole_row_is_refused_in_decoding(imputation: str, positions: Any) -> None:
    """In the pass after the first, which has one token; the first has the whole row, and is ablated."""
    model = decoder_of("gpt2").shared()
    with HeadAblation(model) as hook:
        hook.ablate([(1, 1)], imputation, positions)
        model(torch.tensor(ROWS[:1]), **{CACHE: DynamicCache()})
        assert hook.receipt.counts[1][0].replaced > 0
        with pytest.raises(InvalidAblation, match="need the whole sequence in one forward: pass use_cache=False"):
            generated(model, ROWS[:1])
        hook.clear()


def test_positions_that_never_occur_are_reported_on_leaving() -> None:
    model = decoder_of("gpt2").shared()
    with (
        pytest.raises(AblationNotApplied, match="no forward pass did it.*, or no row had a token at the positions$"),
        HeadAblation(model) as hook,
    ):
        hook.ablate([(1, 1)], "zero", [5 + NEW])  # the last token that is generated is not read
        generated(model, ROWS)


@pytest.mark.parametrize("position", [0, 4, 5, 5 + NEW - 2])
def test_position_that_occurred_once_is_enough(position: int) -> None:
    """Passes before and after it replace nothing."""
    model = decoder_of("gpt2").shared()
    with HeadAblation(model) as hook:
        hook.ablate([(0, 1), (1, 1)], "zero", [position])
        generated(model, ROWS[:1])
        assert len(hook.receipt.counts) == 2


def test_receipt_counts_the_tokens_of_each_decoding_step() -> None:
    """Rows of five, two and three tokens reach position 4 in different steps."""
    model, counts = decoder_of("gpt2").shared(), []
    with HeadAblation(model) as hook:
        hook.ablate([(1, 1)], "zero", [4])

        def note(*_: Any) -> None:
            counts.append(tuple(hook._receipt.counts[1][0]))

        handle = model.register_forward_hook(note)
        generated(model, ROWS)
        handle.remove()
    assert [expected for expected, *_ in counts] == [8, 0, 8, 8]
    assert all(expected == replaced == changed for expected, replaced, changed in counts)


def test_position_from_the_end_that_a_row_lacks_is_refused() -> None:
    """Another position of the list exists, so a receipt would not tell."""
    model = decoder_of("gpt2").shared()
    with HeadAblation(model) as hook:
        hook.ablate([(1, 1)], "zero", [-1, -6])
        with pytest.raises(InvalidAblation, match="a row has 5 tokens, so it has no position -6"):
            model(torch.tensor(ROWS[:1]), **{CACHE: DynamicCache()})


def test_generation_beyond_the_values_is_refused() -> None:
    decoder = decoder_of("llama")
    model, values = decoder.shared(), kind("resample", decoder).imputation  # of eight positions
    with HeadAblation(model) as hook:
        hook.ablate([(1, 1)], values)
        generated(model, [[3, 1, 4, 1, 5]])  # reads eight tokens
        with pytest.raises(InvalidAblation, match="the values of 'resample' end at position 7, the prompt at 8"):
            generated(model, [[3, 1, 4, 1, 5, 9]])
        hook.ablate([(1, 1)], values, range(6))
        generated(model, [[3, 1, 4, 1, 5, 9]])


def test_huge_position_of_a_cached_row_never_occurs() -> None:
    model = decoder_of("gpt2").shared()
    with pytest.raises(AblationNotApplied), HeadAblation(model) as hook:
        hook.ablate([(1, 1)], "zero", [2**70])
        generated(model, ROWS)
