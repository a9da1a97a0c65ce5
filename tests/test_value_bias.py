"""Which imputations depend on whether a value bias is folded into the projection's bias, as libraries do on loading."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ablation.checks.decoders import Decoder
from ablation.imputation import Imputation, Values
from ablation.reference import MEAN, MEAN_BY_POSITION, Reference, record_z
from ablation.sweeps import sweep

IDS, OTHERS = [3, 1, 4, 1, 5], [[9, 2, 6, 5, 3], [5, 8, 9, 7], [9, 3, 2, 3, 8]]
MODEL = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=4, dtype="float64")


def folded(model: PreTrainedModel) -> PreTrainedModel:
    """Return a GPT-2 that computes the same, without a value bias."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.transformer.h:
            value_bias = block.attn.c_attn.bias[-model.config.n_embd :]
            assert value_bias.abs().min() > 0
            block.attn.c_proj.bias += value_bias @ block.attn.c_proj.weight
            value_bias.zero_()
    return model


def imputation(name: str, model: PreTrainedModel) -> str | Imputation:
    if name in (MEAN, MEAN_BY_POSITION):
        return Reference.of(model, OTHERS).imputation(name)
    return Values(record_z(model, OTHERS[0]), name) if name == "resample" else name


def effects(name: str, model: PreTrainedModel) -> NDArray[np.float64]:
    """The change of the target's log-probability by each head, [heads]."""
    return sweep(model, IDS, 7, 8, [imputation(name, model)]).change("target_log_probability")[0]


@pytest.mark.parametrize("name", ["zero", "mean", "scale:0.5"])
def test_numbers_for_whole_heads_depend_on_folding(name: str) -> None:
    model = MODEL.shared()
    assert np.abs(effects(name, model) - effects(name, folded(model))).min() > 1e-6


@pytest.mark.parametrize("name", ["scale:1", "channel-mean", MEAN, MEAN_BY_POSITION, "resample"])
def test_values_for_each_channel_do_not(name: str) -> None:
    model = MODEL.shared()
    np.testing.assert_allclose(effects(name, folded(model)), effects(name, model), atol=1e-12)
