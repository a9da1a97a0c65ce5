"""How results of sweeps and runs are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ablation.results import RECEIPTS, Result
from ablation.sweeps import sweep, sweep_sequential

IDS = [3, 1, 4, 1, 5]
"""A prompt of five tokens for random decoders."""

# The same numbers from kernels for another number of rows: 30 times the noise in the table of
# `ablation.checks.assertions`.
ATOL = {"float32": 8e-5, "float64": 4e-14}


def arrays(result: Result) -> dict[str, Any]:
    """Return every field of a result but its provenance: arrays by their name, and the tuples ablations and prompts."""
    return {
        "ablations": result.ablations,
        "prompts": result.prompts,
        **{f"clean.{name}": values for name, values in result.clean.items()},
        **{f"ablated.{name}": values for name, values in result.ablated.items()},
        "head_mean": result.head_mean,
        **{name: getattr(result, name) for name in RECEIPTS},
    }


def assert_results_equal(one: Result, other: Result, atol: float) -> None:
    """Assert that two results are equal up to rounding. atol: 0 asserts that all bits are equal.

    Rounding decides between logits that differ by less: the argmax, `correct` and whether the target has rank 1 are
    compared only where the margin exceeds the rounding. Any other rank may differ by one, since a token may pass the
    target. The margins after the first token of a longer target are not in a result, so `correct` of such a target is
    compared where the margin of the first token exceeds the rounding.
    """
    found, expected = arrays(one), arrays(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        run, _, metric = name.partition(".")
        if isinstance(value, tuple):
            assert value == expected[name], name
        elif atol == 0:
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        elif metric in ("argmax", "correct", "target_rank"):
            clear = found[f"{run}.margin"] > 2 * atol
            differs = value != expected[name]
            if metric == "target_rank":
                assert np.abs(value - expected[name]).max() <= 1, f"{name} differs by more than one"
                differs = (value == 1) != (expected[name] == 1)
            wrong = np.argwhere(clear & differs)
            assert not len(wrong), f"{name} differs at {wrong.tolist()}"
        else:
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=atol, err_msg=name)


def assert_falls_back(model: Any, layer: int, hook: Any) -> Result:
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
