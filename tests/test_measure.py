"""Measuring logits, and ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from ablation.checks.decoders import Decoder, randomised
from ablation.measure import lowest_best, summarise_logits, tie_tolerance
from ablation.sweeps import sweep
from tests.comparing import IDS

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
WATCHED = torch.tensor([3, 0])


def watched(rows: int) -> Tensor:
    """The same watched tokens for each row."""
    return WATCHED.expand(rows, -1)


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
    summary = summarise_logits(logits, watched(rows), 0.0)
    exact = logits.double()
    torch.testing.assert_close(summary.log_probability.exp(), exact.softmax(-1)[:, WATCHED], rtol=1e-12, atol=0)
    torch.testing.assert_close(summary.log_probability, exact.log_softmax(-1)[:, WATCHED], rtol=1e-12, atol=0)
    assert torch.equal(summary.argmax, exact.argmax(-1)) and summary.finite.all()
    assert torch.equal(summary.margin, -exact.topk(2).values.diff()[:, 0])
    assert torch.equal(summary.rank, 1 + exact.argsort(descending=True).argsort()[:, WATCHED[0]])
    assert summary.kl.isnan().all() and summary.kl.shape == (rows,)


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS + 1])
def test_each_row_has_its_own_watched_tokens(rows: int) -> None:
    """As the tokens of a continuation have."""
    logits, tokens = random_logits(rows), torch.arange(2 * rows).reshape(rows, 2)
    summary, exact = summarise_logits(logits, tokens, 0.0), logits.double()
    expected = exact.log_softmax(-1).gather(-1, tokens)
    torch.testing.assert_close(summary.log_probability, expected, rtol=1e-12, atol=0)
    assert torch.equal(summary.rank, 1 + (exact > exact.gather(-1, tokens[:, :1])).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_divergence_is_that_of_scipy(dtype: torch.dtype) -> None:
    """In bits that a subtraction of sums would lose: the rows are close to the clean one, or far from it."""
    clean, logits = random_logits(1)[0].to(dtype), random_logits(3 * CHUNK_ROWS).to(dtype)
    logits[0], logits[2:5] = clean, (clean + 1e-2 * logits[2:5]).to(dtype)
    logits[5], logits[6] = clean + 3, 40 * logits[6]
    for masked in (False, True):
        if masked:
            clean[20:50] = logits[:, 20:50] = torch.finfo(dtype).min
        found = summarise_logits(logits, watched(len(logits)), 0.0, clean).kl
        p, q = clean.double().softmax(-1).numpy(), logits.double().softmax(-1).numpy()
        seen = p > 0
        expected = entropy(p[None, seen], q[:, seen], axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)
        assert (found >= 0).all() and found[0] < 1e-14


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_with_non_finite_logits_are_marked(bad: float) -> None:
    logits = random_logits(CHUNK_ROWS + 2)
    logits[1, 7] = logits[-1, 0] = bad
    finite = summarise_logits(logits, watched(len(logits)), 1e-4).finite
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
        summary = summarise_logits(logits[None], watched(1), tolerance)
        assert int(summary.argmax) == 20 and float(summary.margin) == 0
        for token in order:
            assert int(summarise_logits(logits[None], torch.tensor([[token]]), tolerance).rank) == 1
        assert int(lowest_best(logits.double(), tolerance)) == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_that_differ_by_more_are_not_a_tie(dtype: torch.dtype) -> None:
    logits = random_logits(1)[0].to(dtype)
    logits[20], logits[90] = 5.0, 5.0 * (1 + 200 * torch.finfo(torch.float32).eps)
    if dtype == torch.bfloat16:
        logits[90] = 5.125  # four steps
    summary = summarise_logits(logits[None], torch.tensor([[20, 90]]), tie_tolerance(logits))
    assert int(summary.argmax) == 90 and int(summary.rank) == 2
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
    first = int(sweep(model, ids).clean["argmax"][0])
    twins = {first, 2, 40}
    assert not twins & set(ids) and first > 2
    with torch.no_grad():
        embedding = model.transformer.wte.weight
        embedding[sorted(twins)] = embedding[first].clone()
    result = sweep(model, ids)
    assert result.clean["argmax"] == 2 and result.clean["margin"] == 0
    (prompt,) = result.prompts
    assert (prompt.target, prompt.control) == ((2,), (min(first, 40),))
    argmax, margin = result.ablated["argmax"], result.ablated["margin"]
    assert not {first, 40} & set(argmax.flat) and not margin[argmax == 2].any()
    ranks = result.ablated["target_rank"]
    for token in sorted(twins - {2}):
        of_twin = sweep(model, ids, token)
        assert of_twin.clean["target_rank"] == 1 and (of_twin.ablated["target_rank"] == ranks).all()
        assert not of_twin.clean["correct"].any() and not of_twin.ablated["correct"].any()
    assert result.clean["correct"] == 1 and ((argmax == 2) == result.ablated["correct"]).all()


def test_equal_logits_of_all_tokens_are_a_tie() -> None:
    model = Decoder("llama", num_layers=2, num_heads=3, head_dim=2).fresh()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = sweep(model, IDS)
    assert result.provenance["method"] == "growing batch"
    assert result.clean["argmax"] == 0 and result.has_head.all() and result.kept.all()
    assert (result.ablated["target_rank"] == 1).all() and (result.ablated["correct"] == 1).all()
    other = sweep(model, IDS, 7, [5, 6])
    assert (other.ablated["target_rank"] == 1).all() and not other.ablated["correct"].any()
    assert sweep(model, IDS, [0, 0, 0]).ablated["correct"].all()
    assert not sweep(model, IDS, [0, 0, 1]).ablated["correct"].any()
