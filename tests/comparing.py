"""How results of sweeps and runs are compared."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from ablation.results import SweepResult
from ablation.sweeps import sweep, sweep_sequential

IDS = [3, 1, 4, 1, 5]
"""A prompt of five tokens for random decoders."""

# The same numbers from kernels for another number of rows: 30 times the noise in the table of
# `ablation.checks.assertions`.
ATOL = {"float32": 8e-5, "float64": 4e-14}


def arrays(result: Any) -> dict[str, Any]:
    """Every field of a result but its provenance."""
    return {f.name: getattr(result, f.name) for f in fields(result) if f.name != "provenance"}


def assert_results_equal(one: Any, other: Any, atol: float) -> None:
    """Assert that two results are equal up to rounding; the argmax only where the margin exceeds the rounding."""
    for name, value in arrays(one).items():
        expected = getattr(other, name)
        if name == "argmax":
            wrong = np.argwhere((one.margin > 2 * atol) & (value != expected))
            assert not len(wrong), f"argmax differs at {wrong.tolist()}"
        elif isinstance(value, tuple):
            assert value == expected, name
        else:
            np.testing.assert_allclose(value, expected, rtol=0, atol=atol, err_msg=name)


def assert_falls_back(model: Any, layer: int, hook: Any) -> SweepResult:
    """Assert that a sweep is sequential while this forward hook is on the MLP of a layer of a GPT-2."""
    handle = model.transformer.h[layer].mlp.register_forward_hook(hook)
    try:
        with pytest.warns(UserWarning, match="differs from the same row of an ordinary forward"):
            result = sweep(model, IDS)
        assert result.provenance["reason"].startswith("a row differs from the same row of an ordinary forward by ")
        assert result.provenance["method"] == "sequential"
        assert_results_equal(result, sweep_sequential(model, IDS), atol=0)
    finally:
        handle.remove()
    return result
