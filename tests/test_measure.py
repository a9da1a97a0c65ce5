"""Measuring logits, and ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ablation.checks.decoders import Decoder, randomised
from ablation.measure import lowest_best, summarise_logits, tie_tolerance
from ablation.sweeps import sweep
from tests.comparing import IDS

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
WATCHED = torch.tensor([3, 0])


def random_logits(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 100, generator=torch.Generator().manual_seed(0)).to(dtype)


CHUNK_ROWS = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are measured four rows at a time."""
    monkeypatch.setattr("ablation.memory.CPU_CACHE_BYTES", CHUNK_ROWS * 8 * 100)


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS])
def test_summary_is_that_of_softmax_and_topk(rows: int) -> None:
    logits = random_logits(rows)
    summary = summarise_logits(logits, WATCHED, 0.0)
    exact = logits.double()
    torch.testing.assert_close(summary.probability, exact.softmax(-1)[:, WATCHED], rtol=1e-12, atol=0)
    torch.testing.assert_close(summary.log_probability, exact.log_softmax(-1)[:, WATCHED], rtol=1e-12, atol=0)
    assert torch.equal(summary.argmax, exact.argmax(-1)) and summary.finite.all()
    assert torch.equal(summary.margin, -exact.topk(2).values.diff()[:, 0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_with_non_finite_logits_are_marked(bad: float) -> None:
    logits = random_logits(CHUNK_ROWS + 2)
    logits[1, 7] = logits[-1, 0] = bad
    finite = summarise_logits(logits, WATCHED, 1e-4).finite
    assert finite.tolist() == [True, False, *[True] * (CHUNK_ROWS - 1), False]


# ---- ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_logits_that_differ_by_rounding_are_a_tie(dtype: torch.dtype, offset: float) -> None:
    """By up to 10 eps in float32 and float64, whichever of the tied tokens is the largest."""
    logits = (random_logits(1)[0] + offset).to(dtype)
    top = float(logits.max()) + 1
    step = 10 * torch.finfo(dtype).eps * abs(top) if dtype != torch.bfloat16 else 0.0
    for order in ([90, 20, 55], [20, 55, 90], [55, 90, 20]):
        for place, token in enumerate(order):
            logits[token] = top + step * place / 2
        tolerance = tie_tolerance(logits)
        summary = summarise_logits(logits[None], WATCHED, tolerance)
        assert int(summary.argmax) == 20 and float(summary.margin) == 0
        assert int(lowest_best(logits.double(), tolerance)) == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_that_differ_by_more_are_not_a_tie(dtype: torch.dtype) -> None:
    logits = random_logits(1)[0].to(dtype)
    logits[20], logits[90] = 5.0, 5.0 * (1 + 200 * torch.finfo(torch.float32).eps)
    if dtype == torch.bfloat16:
        logits[90] = 5.125  # four steps
    summary = summarise_logits(logits[None], WATCHED, tie_tolerance(logits))
    assert int(summary.argmax) == 90
    assert float(summary.margin) == float(logits[90].double() - logits[20].double())


def test_masked_tokens_do_not_widen_the_tie() -> None:
    logits = random_logits(1)[0]
    expected = tie_tolerance(logits)
    logits[20:50] = torch.finfo(torch.float32).min
    assert tie_tolerance(logits) < 3 * expected


def test_lowest_of_equal_tokens_is_the_prediction() -> None:
    """Equal columns of W_U: some kernels round their logits differently, so they are equal up to rounding only."""
    model = randomised(GPT2.shared().config, seed=1)
    ids = [11, 12, 13]
    first = sweep(model, ids).clean_argmax
    twins = {first, 2, 40}
    assert not twins & set(ids) and first > 2
    with torch.no_grad():
        embedding = model.transformer.wte.weight
        embedding[sorted(twins)] = embedding[first].clone()
    result = sweep(model, ids)
    assert result.clean_argmax == 2 and result.clean_margin == 0
    assert result.watched.tolist() == [2, min(first, 40)]
    assert not {first, 40} & set(result.argmax.flat) and not result.margin[result.argmax == 2].any()


def test_equal_logits_of_all_tokens_are_a_tie() -> None:
    model = Decoder("llama", num_layers=2, num_heads=3, head_dim=2).fresh()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = sweep(model, IDS)
    assert result.provenance["method"] == "growing batch"
    assert result.clean_argmax == 0 and result.has_head.all() and result.kept.all() and not result.flipped.any()
