"""Results are saved and loaded without loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ablation.checks.decoders import Decoder
from ablation.results import SweepResult
from ablation.sweeps import sweep
from tests.comparing import IDS, arrays

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)


def test_loaded_result_equals_the_saved_one(tmp_path: Path) -> None:
    result = sweep(GPT2.shared(), IDS)
    result.save(str(tmp_path))
    loaded = SweepResult.load(str(tmp_path))
    assert loaded.provenance == json.loads(json.dumps(result.provenance))
    for name, value in arrays(result).items():
        again = getattr(loaded, name)
        assert type(again) is type(value) and np.array_equal(again, value), name
        assert not isinstance(value, np.ndarray) or again.dtype == value.dtype, name


def test_saved_text_is_readable_utf8(tmp_path: Path) -> None:
    replace(sweep(GPT2.shared(), IDS, imputations=["zero"]), provenance={"prompt": "Zürich"}).save(tmp_path)
    text = (tmp_path / "sweep.json").read_text(encoding="utf-8")
    assert text == '{\n  "imputations": [\n    "zero"\n  ],\n  "provenance": {\n    "prompt": "Zürich"\n  }\n}\n'


def test_load_rejects_pickled_arrays(tmp_path: Path) -> None:
    sweep(GPT2.shared(), IDS).save(tmp_path)
    with np.load(tmp_path / "sweep.npz") as saved:
        np.savez(tmp_path / "sweep.npz", **dict(saved) | {"margin": np.array([{}])})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        SweepResult.load(tmp_path)


def test_provenance_can_be_added_by_replace() -> None:
    """`dataclasses.replace` keeps the arrays, as the same objects."""
    result = sweep(GPT2.shared(), IDS)
    named = replace(result, provenance={"model": "x", **result.provenance})
    assert named.margin is result.margin and named.provenance["model"] == "x"
