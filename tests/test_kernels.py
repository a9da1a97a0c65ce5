"""The specification and the sweep hold under kernels whose last bits depend on the number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ablation.checks import parametrize_with_checks
from ablation.checks.decoders import Decoder, randomised
from ablation.edits import Ablation
from ablation.engine import run
from ablation.sweeps import sweep, sweep_sequential
from tests.comparing import ATOL, IDS, assert_results_equal
from tests.implementations.ours import Ours
from tests.kernels import batch_dependent_kernels

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Perturbed kernels, and few examples: they perturb every comparison."""
    profile = settings.get_current_profile_name()
    settings.register_profile("kernels", settings.get_profile(profile), max_examples=4)
    settings.load_profile("kernels")
    with batch_dependent_kernels():
        yield
    settings.load_profile(profile)


@pytest.mark.parametrize("layer", [nn.Linear(8, 4), Conv1D(nf=4, nx=8)], ids=["linear", "conv1d"])
def test_last_bits_depend_on_rows_and_columns(layer: nn.Module) -> None:
    x = torch.rand(1, 8, generator=torch.manual_seed(1))
    with torch.no_grad():
        weight = layer.weight if isinstance(layer, Conv1D) else layer.weight.T  # type: ignore[union-attr]
        weight.copy_(weight[:, :1].clone().expand(8, 4))  # four equal columns
        layer.bias.zero_()  # type: ignore[union-attr, operator]
        alone, batch = layer(x), layer(x.repeat(2, 1))
    assert torch.equal(layer(x), alone)  # deterministic
    assert not torch.equal(batch[:1], alone) and torch.allclose(batch[:1], alone)
    assert len(set(alone[0].tolist())) > 1


def test_direct_calls_of_linear_are_perturbed() -> None:
    """Routers and experts call F.linear without a module."""
    x, weight = torch.ones(1, 8), torch.full((4, 8), 0.3)
    alone, batch = functional.linear(x, weight), functional.linear(x.repeat(2, 1), weight)
    assert not torch.equal(batch[:1], alone) and torch.allclose(batch[:1], alone)
    assert len(set(alone[0].tolist())) > 1


@pytest.mark.end_to_end
@parametrize_with_checks(Ours)
def test_specification_holds(check: object) -> None:
    check()  # type: ignore[operator]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sweep_equals_sequential_sweep_up_to_rounding(family: str) -> None:
    model = Decoder(family, num_layers=3, num_heads=4, head_dim=4).shared()
    result, reference = sweep(model, IDS), sweep_sequential(model, IDS)
    assert result.provenance["method"] == "growing batch"
    assert_results_equal(result, reference, ATOL["float32"])
    for name in ("target_probability", "control_probability"):
        assert not np.array_equal(result.change(name), reference.change(name))  # the kernels do differ


def test_lowest_of_equal_tokens_is_the_prediction() -> None:
    model = randomised(GPT2.shared().config, seed=1)
    first = int(sweep(model, [7, 9, 8]).clean["argmax"][0])
    twins = sorted({first, 2, 40, 17})
    with torch.no_grad():
        embedding = model.transformer.wte.weight
        embedding[twins] = embedding[first].clone()
    for max_rows in (2, 3, 5, None):
        result = sweep(model, [7, 9, 8], max_rows=max_rows)
        assert result.clean["argmax"] == 2 and result.clean["margin"] == 0
        assert not {17, first, 40} & set(result.ablated["argmax"].flat)
        single = run(model, [7, 9, 8], [Ablation([])], max_rows=2)
        assert single.ablated["argmax"] == 2 and single.ablated["margin"] == 0
