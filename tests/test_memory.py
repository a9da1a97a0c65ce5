"""How many rows a pass has on a device, and what happens where memory runs out nevertheless."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ablation import memory
from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import run
from ablation.sweeps import sweep
from tests.comparing import ATOL, IDS, assert_results_equal

GPT2 = Decoder("gpt2", num_layers=3, num_heads=4, head_dim=2)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


TELLS = pytest.mark.skipif(
    not hasattr(getattr(torch, "accelerator", None), "get_memory_info"), reason="an older torch tells no free memory"
)


@TELLS
def test_pass_on_an_accelerator_fits_into_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": (60, 80), "cuda:1": (10, 80)}
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: free[str(device)])
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 10)
    assert memory.free_bytes(GPU) == 80 and memory.pass_bytes([GPU]) == 40
    assert memory.pass_bytes([GPU, torch.device("cuda", 1)]) == 15
    assert memory.pass_bytes([CPU]) == memory.CPU_PASS_BYTES and memory.measuring_bytes(CPU) == memory.CPU_CACHE_BYTES
    assert memory.measuring_bytes(GPU) == int(memory.MEASURING_SHARE * 80)


@TELLS
def test_device_that_cannot_tell_counts_as_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: Any) -> None:
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", refuse)
    assert memory.pass_bytes([GPU]) == memory.CPU_PASS_BYTES


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "cpu"])
@pytest.mark.parametrize("fits", [2, 3, 5, 8])
def test_pass_that_runs_out_of_memory_is_halved(error: Exception, fits: int) -> None:
    model, rows, shares = GPT2.shared(), list[int](), list[float]()
    want = sweep(model, IDS)

    def allocate(module: Any, args: Any, out: Tensor) -> None:
        rows.append(len(out))
        if len(out) > fits:
            raise error

    handle = model.transformer.h[2].mlp.register_forward_hook(allocate)
    try:
        result = sweep(model, IDS, progress=shares.append)
    finally:
        handle.remove()
    assert result.provenance["method"] == "growing batch"
    growing = rows[rows.index(25) :]  # a clean row and 24 ablations; before, the passes of the guard
    assert result.provenance["passes"] == sum(count <= fits for count in growing) > 1
    assert_results_equal(result, want, ATOL["float32"])
    assert shares == sorted(set(shares)) and shares[-1] == 1.0


@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "cpu"])
def test_single_ablation_that_does_not_fit_is_an_error(error: Exception) -> None:
    model = GPT2.shared()

    def allocate(module: Any, args: Any, out: Tensor) -> None:
        if len(out) > 1:
            raise error

    handle = model.transformer.h[2].mlp.register_forward_hook(allocate)
    try:
        with pytest.raises(type(error), match=str(error)):
            run(model, IDS, [Ablation([(0, 1)]), Ablation([(1, 1)])])
    finally:
        handle.remove()
