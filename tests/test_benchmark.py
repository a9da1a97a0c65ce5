"""The benchmark measures what it says. Its times are not tested."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from ablation.heads import find_heads
from tests.benchmark import measuring
from tests.benchmark.measuring import Multiplication, multiplication_time, multiplications, timed
from tests.benchmark.tables import comparison
from tests.benchmark.ways import SWEEP, WAYS, build

GPT2 = GPT2Config(vocab_size=41, n_embd=6, n_layer=2, n_head=3, n_positions=16, bos_token_id=None, eos_token_id=None)
LLAMA = LlamaConfig(
    vocab_size=41,
    hidden_size=8,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_every_way_agrees_with_the_sweep(config: PretrainedConfig) -> None:
    model = build(config)
    cells = 2 * 2 * find_heads(model).shape[1]
    with torch.no_grad():
        measured = timed(model, [3, 1, 4], rounds=1, parts=1, pattern="sweep|double|batch|invokes|Captum")
    assert len(measured.cells) == cells and SWEEP in measured.seconds and "double loop" in str(measured.seconds)
    assert len(list(comparison(measured))) == 2 + len(measured.seconds) + 1


def test_way_that_disagrees_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, "double loop", ("", lambda model, ids, cells: iter(torch.zeros(len(cells), 41))))
    with pytest.raises(AssertionError, match="double loop differs by"), torch.no_grad():
        timed(build(GPT2), [3, 1, 4], rounds=1, parts=1, pattern="^double loop$|growing")


def test_every_multiplication_of_a_layer_is_counted() -> None:
    with torch.no_grad():
        gpt2, llama = (multiplications(build(config))[1] for config in (GPT2, LLAMA))
    assert gpt2 == [
        Multiplication(False, 6, 18),
        Multiplication(True, 6, 6),
        Multiplication(True, 6, 24),
        Multiplication(True, 24, 6),
    ]
    assert sorted(llama) == [
        *[Multiplication(False, 8, 4)] * 2,  # keys and values
        Multiplication(False, 8, 8),
        Multiplication(True, 8, 8),
        *[Multiplication(True, 8, 20)] * 2,
        Multiplication(True, 20, 8),
    ]


def test_only_needed_multiplications_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 ablations, 6 differ from the clean run after the first attention; after the last, one token is needed."""
    asked: list[tuple[int, int, int]] = []

    def product_time(rows: int, inner: int, columns: int, like: torch.Tensor) -> float:
        asked.append((rows, inner, columns))
        return 1.0

    monkeypatch.setattr(measuring, "product_time", product_time)
    with torch.no_grad():
        assert multiplication_time(build(GPT2), tokens=5) == 9
    assert asked == [
        *((0, 6, 18), (6 * 5, 6, 6), (6 * 5, 6, 24), (6 * 5, 24, 6)),
        *((6 * 5, 6, 18), (12, 6, 6), (12, 6, 24), (12, 24, 6)),
        (12, 6, 41),
    ]
