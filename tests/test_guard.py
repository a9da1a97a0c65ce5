"""The guard of the growing batch: rows that influence each other, the model's rounding, and models known to couple."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import run, run_sequential
from ablation.forward import Request
from ablation.growing import BatchMismatch
from ablation.guard import Guard, choose_probes, coupled_rows
from ablation.sweeps import sweep, sweep_sequential
from ablation.units import Pair
from tests.comparing import IDS, assert_results_equal

LLAMA = Decoder("llama", num_layers=4, num_heads=4, head_dim=8, num_key_value_groups=2)
DTYPES = ("float32", "float64", "bfloat16", "float16")


def coupled(strength: float) -> Any:
    """A hook by which the rows of a batch influence each other."""

    def mix(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + strength * (out.mean(dim=0, keepdim=True) - out)

    return mix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt"])
def test_independent_rows_are_accepted_in_every_dtype(family: str, dtype: str) -> None:
    model = Decoder(family, num_layers=4, num_heads=4, head_dim=8).fresh().to(getattr(torch, dtype))
    assert sweep(model, IDS).provenance["method"] == "growing batch"


@pytest.mark.parametrize(
    ("dtype", "strength"),
    # In 16 bits as strong as to be seen where the kernels of the tests round coarsely, too.
    [("float32", 3e-3), ("float64", 1e-6), ("bfloat16", 30.0), ("float16", 10.0)],
)
def test_weak_influence_between_rows_is_noticed(dtype: str, strength: float) -> None:
    model = LLAMA.fresh().to(getattr(torch, dtype))
    model.model.layers[1].mlp.register_forward_hook(coupled(strength))
    with pytest.warns(UserWarning, match="differs from the same row of an ordinary forward"):
        result = sweep(model, IDS)
    assert result.provenance["method"] == "sequential"


def noisy(scale: float) -> Any:
    """A hook that adds rounding of its own, which depends on the number of rows but not on their values."""

    def round_rows(module: Any, args: Any, out: Tensor) -> Tensor:
        return out * (1 + scale * math.sin(7 * len(out)))

    return round_rows


def test_coarser_rounding_of_the_model_is_measured() -> None:
    """As of kernels in tensor cores: all rows of a batch are rounded alike, and otherwise in another batch."""
    model = LLAMA.fresh()
    model.model.norm.register_forward_hook(noisy(1e-5))
    assert sweep(model, IDS).provenance["method"] == "growing batch"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rounding_beyond_half_of_the_digits_is_none() -> None:
    model = LLAMA.fresh()
    model.model.norm.register_forward_hook(noisy(1e-1))
    assert sweep(model, IDS).provenance["method"] == "sequential"


def test_probes_are_more_where_rows_may_couple() -> None:
    ablations = [Ablation([(layer, head)]) for layer in range(4) for head in range(4)] + [Ablation([(1, 0)], "mean")]
    assert [str(probe) for probe in choose_probes(LLAMA.shared(), ablations)] == [
        "layer 3, head 3; zero imputation",
        "layer 2, head 3; zero imputation",
        "layer 1, head 0; mean imputation",
        "layer 0, head 3; zero imputation",
    ]
    mixtral = Decoder("mixtral", num_layers=4, num_heads=4, head_dim=8).shared()
    probes = choose_probes(mixtral, ablations)
    assert len(set(probes)) == len(probes) == 16 and all(isinstance(probe, Ablation) for probe in probes)
    assert len(choose_probes(mixtral, ablations[:2])) == 2


def test_probes_include_mlps_of_each_layer() -> None:
    pairs: list[list[Pair]] = [[(0, "mlp")], [(1, "mlp")], [(0, "mlp"), (0, 1)], [(0, 0)]]
    assert [str(probe) for probe in choose_probes(LLAMA.shared(), list(map(Ablation, pairs)))] == [
        "layer 1, MLP; zero imputation",
        "layer 0, MLP; zero imputation",
        "layer 0, head 0; zero imputation",
    ]


# ---- how far a row may differ


def guard(clean: Tensor, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> Guard:
    """A guard with given clean logits, [vocabulary], of one scored token, whose noise need not be measured."""
    made = Guard(cast(Request, SimpleNamespace(model=SimpleNamespace(dtype=dtype))), clean[None], {}, max_rows=16)
    vars(made)["_noise"] = noise
    return made


def check(guarded: Guard, row: Tensor) -> None:
    """Check a clean row of a growing batch, [vocabulary], without probes."""
    guarded.check(row[None], [], row.new_empty(0, 1, len(row)))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_row_may_differ_by_rounding_or_by_measured_noise(size: float) -> None:
    clean = torch.tensor([0.0, -size, size / 2, size / 4])
    eps = torch.finfo(torch.float32).eps
    check(guard(clean), clean * (1 + 16 * eps))
    check(guard(clean, noise=1e-5 * size), clean * (1 + 7e-5))
    for noise, row in (
        (0.0, clean * (1 + 128 * eps)),
        (1e-5 * size, clean * (1 + 9e-5)),
        (size, clean * (1 + 1e-2)),  # more than half of the digits
        (0.0, clean * torch.nan),
    ):
        with pytest.raises(BatchMismatch, match=r"^a row differs from the same row of an ordinary forward by [^ ]+$"):
            check(guard(clean, noise), row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offset_or_masked_tokens_do_not_hide_a_mismatch(dtype: torch.dtype) -> None:
    ordinary = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    different = ordinary.clone()
    different[7] += 1
    masked = [row.index_fill(-1, torch.arange(20, 50), torch.finfo(dtype).min) for row in (different, ordinary)]
    for one, other in ((different, ordinary), (different + 50, ordinary + 50), masked):
        check(guard(other, dtype=dtype), other)
        with pytest.raises(BatchMismatch):
            check(guard(other, dtype=dtype), one)


def test_shortest_dtype_decides() -> None:
    """Some models compute in bfloat16 and give logits of float32; so does autocast."""
    clean = torch.tensor([0.0, -1.0, 0.5, 0.25])
    row = clean * (1 + torch.finfo(torch.bfloat16).eps)
    check(guard(clean, dtype=torch.bfloat16), row)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(guard(clean), row)
    with pytest.raises(BatchMismatch):
        check(guard(clean), row)


# ---- kinds of quantisation


class Linear8bitLt(nn.Linear):
    """As bitsandbytes: columns with an outlier anywhere in the batch are kept, the others are rounded."""

    state: Any

    def forward(self, x: Tensor) -> Tensor:
        outlier = (x.abs() > self.state.threshold).flatten(0, -2).any(dim=0)
        return super().forward(torch.where(outlier, x, (x * 8).round() / 8))


def quantised(threshold: float) -> Any:
    model = LLAMA.fresh()
    for layer in model.model.layers:
        small = Linear8bitLt(layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features, bias=False)
        small.load_state_dict(layer.mlp.up_proj.state_dict())
        small.state = SimpleNamespace(threshold=threshold)
        layer.mlp.up_proj = small.eval()
    return model


def test_llm_int8_runs_sequentially() -> None:
    model = quantised(1.0)
    with pytest.warns(UserWarning, match="LLM.int8 decides over the whole batch .*: running one forward per ablation"):
        result = sweep(model, IDS)
    assert result.provenance["method"] == "sequential" and "LLM.int8" in result.provenance["reason"]
    assert_results_equal(result, sweep_sequential(model, IDS), atol=0)


def test_int8_without_outliers_is_no_reason() -> None:
    assert coupled_rows(quantised(0.0)) is None


def test_dynamic_quantisation_runs_sequentially() -> None:
    model = LLAMA.fresh()
    kind = type("Linear", (nn.Linear,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})
    model.model.layers[1].mlp.up_proj.__class__ = kind
    with pytest.warns(UserWarning, match="dynamic quantisation scales the activations of the whole batch together"):
        assert sweep(model, IDS).provenance["method"] == "sequential"


@pytest.mark.parametrize("seed", range(6))
def test_llm_int8_of_bitsandbytes_equals_one_forward_each(seed: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = LLAMA.fresh().half()
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        for name in ("up_proj", "gate_proj", "down_proj"):
            plain = getattr(layer.mlp, name)
            eight = bitsandbytes.nn.Linear8bitLt(
                plain.in_features, plain.out_features, bias=False, has_fp16_weights=False, threshold=1.0
            )
            eight.load_state_dict(plain.state_dict())
            setattr(layer.mlp, name, eight.to("cpu"))
    ids = torch.randint(0, 41, (6,), generator=generator).tolist()
    with pytest.warns(UserWarning, match="LLM.int8"):
        result = run(model.eval(), ids, [Ablation([(layer, 1)]) for layer in range(4)])
    assert_results_equal(result, run_sequential(model, ids, [Ablation([(layer, 1)]) for layer in range(4)]), atol=0)
