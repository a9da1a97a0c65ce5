"""The growing batch: which row carries which ablation, and how the batch grows and narrows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation, Edit, Receipt
from ablation.growing import BatchMismatch, Join, RowLayout, first_layer, growing_batch
from ablation.hook import HeadAblation
from ablation.imputation import IMPUTATIONS

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
ZERO, MEAN = IMPUTATIONS["zero"], IMPUTATIONS["mean"]
SETS = (Ablation([]), Ablation([(0, 1), (2, 0)]), Ablation([(1, 0), (1, 2)], "mean"), Ablation([(2, 1)]))
"""Ablations sorted by their first layer."""


def unchanged() -> None:
    """The on_layer callback of a batch that reports no progress."""


def test_first_layer_is_the_lowest_of_a_set() -> None:
    assert [first_layer(ablation) for ablation in (*SETS, Ablation([(3, 0), (1, 1), (2, 2)]))] == [0, 0, 1, 2, 1]


def test_growing_layout_starts_with_the_clean_row() -> None:
    layout = RowLayout.growing(SETS)
    assert (layout.num_rows, layout.clean_row, layout.ablated_rows) == (5, 0, slice(1, 5))
    assert [layout.rows_in_layer(layer) for layer in range(4)] == [3, 4, 5, 5]
    assert layout.edits == {
        0: [Edit(1, ZERO, 2)],
        2: [Edit(0, ZERO, 2), Edit(1, ZERO, 4)],
        1: [Edit(0, MEAN, 3), Edit(2, MEAN, 3)],
    }


def test_row_joins_as_a_copy_of_the_row_with_its_lower_heads() -> None:
    """Row 1 is ablated in layers 0 and 3, and between them is what row 3 begins with; row 5 begins as row 3."""
    a, b, c = (0, 1), (2, 0), (3, 1)
    given = [Ablation([b, a]), Ablation([a, c]), Ablation([c]), Ablation([a, b, c]), Ablation([a, b], "mean")]
    layout = RowLayout.growing(given)
    assert layout.order == (1, 4, 0, 2, 3)
    assert layout.joins == (Join(0, 0, 0), Join(0, 0, 0), Join(2, 1, 1), Join(3, 0, 0), Join(3, 3, 2))
    assert layout.edits == {
        0: [Edit(1, ZERO, 1), Edit(1, MEAN, 2)],
        2: [Edit(0, MEAN, 2), Edit(0, ZERO, 3)],
        3: [Edit(1, ZERO, 1), Edit(1, ZERO, 4), Edit(1, ZERO, 5)],
    }


def test_ablation_is_copied_only_from_its_own_kind() -> None:
    """Another imputation, other positions and other heads of the lower layer are other rows."""
    others = [Ablation([(0, 1)], "mean"), Ablation([(0, 1)], "zero", [0]), Ablation([(0, 0), (0, 1)])]
    layout = RowLayout.growing([*others, Ablation([(0, 1), (1, 0)])])
    assert [join.source for join in layout.joins] == [0, 0, 0, 0]


def test_receipt_counts_edits_of_the_row_that_was_copied() -> None:
    layout = RowLayout.growing([Ablation([(0, 1), (1, 0)]), Ablation([(0, 1), (1, 2)]), Ablation([(0, 1)])])
    receipt = Receipt(2)
    receipt.calls = [1, 1]
    counts = {0: [[10, 10, 9]], 1: [[10, 10, 1], [10, 10, 2]]}
    receipt.edited = {layer: torch.tensor(of) for layer, of in counts.items()}
    assert {layer: len(edits) for layer, edits in layout.edits.items()} == {0: 1, 1: 2}
    assert dict(zip(layout.order, layout.receipts(receipt).tolist(), strict=True)) == {
        0: [1, 20, 10],
        1: [1, 20, 11],
        2: [1, 10, 9],
    }


def test_plain_layout_ends_with_the_clean_row() -> None:
    layout = RowLayout.plain(SETS[2:])
    assert (layout.num_rows, layout.clean_row, layout.ablated_rows) == (3, 2, slice(0, 2))
    assert layout.edits == {1: [Edit(0, MEAN, 0), Edit(2, MEAN, 0)], 2: [Edit(1, ZERO, 1)]}


def test_single_layout_has_no_clean_row() -> None:
    layout = RowLayout.single(SETS[3])
    assert (layout.num_rows, layout.clean_row, layout.ablated_rows) == (1, None, slice(0, 1))
    assert layout.edits == {2: [Edit(1, ZERO, 0)]}


def test_receipts_are_summed_over_the_heads_of_a_set() -> None:
    receipt = Receipt(3)
    receipt.calls = [1, 2, 1]
    receipt.edited = {
        0: torch.tensor([[10, 10, 9]]),
        1: torch.tensor([[10, 10, 1], [10, 10, 2]]),
        2: torch.tensor([[10, 10, 3], [10, 10, 0]]),
    }
    found = RowLayout.growing(SETS).receipts(receipt)
    assert found.tolist() == [[1, 0, 0], [1, 20, 12], [2, 20, 3], [1, 10, 0]]


@pytest.fixture
def hook() -> Iterator[HeadAblation]:
    with HeadAblation(GPT2.shared()) as entered:
        yield entered


def test_clean_row_is_copied_and_masks_are_repeated(hook: HeadAblation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of two tokens, so that not every tensor of size two has a row for each row of the batch."""
    block = hook.heads.layers[1].block
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: (args, kwargs))
    hidden, mask, full, tokens = torch.rand(3, 2, 6), torch.rand(1, 2), torch.rand(3, 2, 2), torch.arange(2)
    layout = RowLayout.growing([Ablation([(0, 0)])] * 2 + [Ablation([(1, 0)])] * 3)
    with growing_batch(hook, layout, last_token_only=False, on_layer=unchanged):
        args, kwargs = block(hidden, mask, None, made=({"mask": mask}, full, tokens), how="fast")
        none, named = block(hidden_states=hidden, mask=mask)
    for states, masks in (args[:2], (named["hidden_states"], named["mask"])):
        assert torch.equal(states, torch.cat([hidden, *[hidden[:1]] * 3])) and torch.equal(masks, mask.repeat(6, 1))
    assert (args[2:], none, len(named)) == ((None,), (), 2)
    made, one, same = kwargs["made"]
    assert kwargs.keys() == {"made", "how"} and kwargs["how"] == "fast" and one is full and same is tokens
    assert made.keys() == {"mask"} and torch.equal(made["mask"], mask.repeat(6, 1))


@pytest.mark.parametrize(
    ("hidden", "reason"),
    [
        (torch.rand(6, 2, 6), "a layer received 6 rows, not 1 rows"),
        ((torch.rand(1, 2, 6),), "a layer received a tuple, not 1 rows"),
        (None, "a layer received no hidden states, only mask"),
    ],
)
def test_layer_with_other_input_is_a_mismatch(hook: HeadAblation, hidden: Any, reason: str) -> None:
    layout = RowLayout.growing([Ablation([(0, 0)])])
    with (
        growing_batch(hook, layout, last_token_only=False, on_layer=unchanged),
        pytest.raises(BatchMismatch, match=f"^{reason}$"),
    ):
        hook.heads.layers[0].block(**{"mask": None} if hidden is None else {"hidden_states": hidden})


def test_parts_after_the_last_attention_see_one_token(hook: HeadAblation, monkeypatch: pytest.MonkeyPatch) -> None:
    part, hidden = hook.heads.layers[1].block.mlp, torch.rand(2, 5, 6)
    monkeypatch.setattr(part, "forward", lambda *args, **kwargs: (args, kwargs))
    with growing_batch(hook, RowLayout.growing([]), last_token_only=True, on_layer=unchanged):
        args, kwargs = part(hidden)
        assert args[0] is hidden and not kwargs
        hook.heads.layers[1].projection(hidden)
        args, kwargs = part(hidden, hidden)
        assert torch.equal(args[0], hidden[:, -1:]) and args[1] is hidden and not kwargs
        args, kwargs = part(hidden_states=hidden, other=hidden)
        assert torch.equal(kwargs["hidden_states"], hidden[:, -1:]) and kwargs["other"] is hidden
        assert not args and len(kwargs) == 2
        assert part(other=hidden) == ((), {"other": hidden})
        flat = hidden[0]  # of a row's tokens, as a router of experts is given
        assert part(flat)[0][0] is flat
