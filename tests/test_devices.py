"""Devices and dtypes: half precision, offloaded weights, the default device, what provenance says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

from ablation import memory, models
from ablation.checks.decoders import Decoder
from ablation.errors import ModelUnavailable
from ablation.hook import HeadAblation
from ablation.prompts import prompt_ids
from ablation.provenance import weights_sha256
from ablation.sweeps import sweep
from tests.comparing import IDS, assert_results_equal
from tests.test_hook import hooks_of, logits


@pytest.mark.filterwarnings("ignore")  # accelerate's own
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_offloaded_weights_give_identical_results(family: str, tmp_path: Path) -> None:
    decoder = Decoder(family, num_layers=3, num_heads=4, head_dim=2)
    plain, spread = decoder.shared(), decoder.fresh()
    blocks = spread.get_decoder()
    layers = "h" if family == "gpt2" else "layers"
    prefix = "transformer" if family == "gpt2" else "model"
    places = {f"{prefix}.{name}": "cpu" for name, _ in blocks.named_children() if name != layers}
    places |= {f"{prefix}.{layers}.{i}": "disk" if i else "cpu" for i in range(3)} | {"lm_head": "cpu"}
    if family == "llama":  # its unembedding is not its embedding
        places["model.embed_tokens"] = "disk"
    dispatch_model(spread, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert next(blocks.get_submodule(f"{layers}.1").parameters()).is_meta
    before = hooks_of(spread)
    result = sweep(spread, IDS)
    assert (result.calls == 1).all() and (result.replaced == 5 * 2).all()
    assert (result.provenance["method"], result.provenance["device"]) == ("growing batch", "cpu, disk")
    assert_results_equal(result, sweep(plain, IDS), atol=0)
    with HeadAblation(spread) as one, HeadAblation(plain) as other:
        for ablation in (one, other):
            ablation.ablate([(1, 2), (2, 3)], "mean")
        assert torch.equal(logits(spread, torch.tensor([IDS])), logits(plain, torch.tensor([IDS])))
        assert one.receipt.counts == other.receipt.counts
    assert hooks_of(spread) == before
    assert weights_sha256(spread) == weights_sha256(plain)


def test_sweep_ignores_the_default_device() -> None:
    model = Decoder("llama", num_layers=2, num_heads=3, head_dim=2).shared()
    for target, control in ((None, None), ([7, 3], [3, 1, 4])):
        expected = sweep(model, IDS, target, control)
        with torch.device("meta"):
            assert_results_equal(sweep(model, IDS, target, control), expected, atol=0)


AVAILABLE = models._device(None)
"""The kind of device that this machine uses by default, and that "auto" means where everything fits on it."""


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_model_loads_with_the_requested_device_and_dtype(device: str, dtype: torch.dtype) -> None:
    if AVAILABLE == "mps" and dtype == torch.float64:
        pytest.skip("MPS has no float64")
    loaded = models.load("capitals", device=device, dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype} and not loaded.model.training
    result = sweep(loaded.model, prompt_ids(loaded.tokenizer, "Berlin is the capital of"))
    assert result.provenance["dtype"] == str(dtype).removeprefix("torch.")
    expected = AVAILABLE if device == "auto" else device
    assert torch.device(result.provenance["device"]).type == expected and (result.calls == 1).all()


def test_default_device_is_an_available_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    available = memory.accelerator()
    assert models._device(None) == ("cpu" if available is None else available.type)
    monkeypatch.setattr(models, "accelerator", lambda: torch.device("cuda"))
    assert models._device(None) == "cuda"


@pytest.mark.parametrize("device", ["nonsense", "xpu:7"])
def test_missing_device_is_reported_before_loading(device: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"no device {device!r} here"):
        models.load("does-not-exist", device=device)


def test_provenance_holds_arithmetic_settings() -> None:
    model = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=4).shared()
    exact = sweep(model, IDS)
    assert (exact.provenance["autocast"], exact.provenance["float32_matmul"]) == (None, "highest")
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = sweep(model, IDS)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (cast.provenance["autocast"], cast.provenance["float32_matmul"]) == ("bfloat16", "medium")
    assert cast.provenance["dtype"] == "float32" and not np.array_equal(cast.ablated["margin"], exact.ablated["margin"])


def test_half_precision_sweep_is_within_its_rounding() -> None:
    """Noise scales with the dtype: bfloat16 has 16 mantissa digits fewer than float32."""
    model = Decoder("llama", num_layers=3, num_heads=4, head_dim=4).fresh()
    exact = sweep(model, IDS)
    (prompt,) = exact.prompts
    half = sweep(model.bfloat16(), IDS, prompt.target, prompt.control)
    assert half.provenance["method"] == "growing batch"
    for name in ("target_probability", "control_probability"):
        assert np.abs(half.change(name) - exact.change(name)).max() < 30 * torch.finfo(torch.bfloat16).eps
