"""Models elsewhere than on the CPU in float32: other dtypes, and weights that accelerate spreads or keeps on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

from ablation import models
from ablation.checks.decoders import Decoder
from ablation.errors import ModelUnavailable
from ablation.hook import HeadAblation
from ablation.provenance import weights_sha256
from ablation.sweep import sweep, sweep_prompts
from tests.test_hook import hooks_of, logits
from tests.test_sweep import assert_equal

IDS = [3, 1, 4, 1, 5]


@pytest.mark.filterwarnings("ignore")  # accelerate's own
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_whose_weights_wait_on_disk_gives_the_same_with_every_receipt(family: str, tmp_path: Path) -> None:
    decoder = Decoder(family, num_layers=3, num_heads=4, head_dim=2)
    plain, spread = decoder.build(), decoder.fresh()
    blocks = spread.get_decoder()
    layers = "h" if family == "gpt2" else "layers"
    prefix = "transformer" if family == "gpt2" else "model"
    places = {f"{prefix}.{name}": "cpu" for name, _ in blocks.named_children() if name != layers}
    places |= {f"{prefix}.{layers}.{i}": "disk" if i else "cpu" for i in range(3)} | {"lm_head": "cpu"}
    if family == "llama":  # whose unembedding is not its embedding
        places["model.embed_tokens"] = "disk"
    dispatch_model(spread, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert next(blocks.get_submodule(f"{layers}.1").parameters()).is_meta
    before = hooks_of(spread)
    result = sweep(spread, IDS)
    assert (result.calls == 1).all() and (result.replaced == 5 * 2).all()
    assert (result.provenance["method"], result.provenance["device"]) == ("growing batch", "cpu, disk")
    assert_equal(result, sweep(plain, IDS), atol=0)
    with HeadAblation(spread) as one, HeadAblation(plain) as other:
        for ablation in (one, other):
            ablation.ablate([(1, 2), (2, 3)], "mean")
        assert torch.equal(logits(spread, torch.tensor([IDS])), logits(plain, torch.tensor([IDS])))
        assert one.receipt.counts == other.receipt.counts
    assert hooks_of(spread) == before
    assert weights_sha256(spread) == weights_sha256(plain)


def test_a_sweep_is_made_where_the_model_is_not_where_tensors_are_by_default() -> None:
    model = Decoder("llama", num_layers=2, num_heads=3, head_dim=2).build()
    expected = sweep(model, IDS)
    with torch.device("meta"):
        assert_equal(sweep(model, IDS), expected, atol=0)


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_is_loaded_where_and_as_asked(device: str, dtype: torch.dtype) -> None:
    loaded = models.load("capitals", device=device, dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype} and not loaded.model.training
    result = sweep(loaded.model, models.prompt_ids(loaded.tokenizer, "Berlin is the capital of"))
    assert result.provenance["dtype"] == str(dtype).removeprefix("torch.")
    assert result.provenance["device"] == "cpu" and (result.calls == 1).all()


def test_by_default_the_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.accelerator.current_accelerator(check_available=True)
    assert models._device(None) == ("cpu" if there is None else there.type)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert models._device(None) == "cuda"


@pytest.mark.parametrize("device", ["nonsense", "xpu:7"])
def test_a_device_that_is_not_there_is_said_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"no device {device!r} here"):
        models.load("does-not-exist", device=device)


def test_settings_that_change_the_arithmetic_are_in_the_provenance() -> None:
    model = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=4).build()
    exact = sweep(model, IDS)
    assert (exact.provenance["autocast"], exact.provenance["float32_matmul"]) == (None, "highest")
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = sweep(model, IDS)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (cast.provenance["autocast"], cast.provenance["float32_matmul"]) == ("bfloat16", "medium")
    assert cast.provenance["dtype"] == "float32" and not np.array_equal(cast.margin, exact.margin)


def test_in_half_precision_the_growing_batch_is_what_its_rounding_allows() -> None:
    """Its noise is that of the dtype: of float32's it has 16 digits fewer."""
    model = Decoder("llama", num_layers=3, num_heads=4, head_dim=4).fresh()
    exact = sweep(model, IDS)
    half = sweep_prompts(model.to(torch.bfloat16), [IDS, IDS], [[*exact.watched]] * 2)
    for result in half:
        assert result.provenance["method"] == "growing batch"
        assert np.abs(result.probability_change - exact.probability_change).max() < 30 * torch.finfo(torch.bfloat16).eps
