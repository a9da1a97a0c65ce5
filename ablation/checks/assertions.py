"""How tensors are compared: bit for bit, or up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ablation.checks.check import unsupported_features
from ablation.checks.protocol import Factory

# Bits are compared only between calls with the same shapes, which run the same kernels. Logits of up to 5.2 from
# kernels for another number of rows differ as follows (400 random decoders of each dtype; eps at their size):
#
#   dtype     largest difference    in eps
#   float32   2.6e-6                9
#   float64   1.3e-15               4
#
# 256 eps are allowed: some 30 times the noise, and far less than the effect of a head.
TOLERANCE_EPS = 256


def assert_identical(got: Tensor, want: Tensor, what: str) -> None:
    """Assert that two tensors hold the same bits. what: the subject of the message."""
    __tracebackhide__ = True
    _assert_same_shape(got, want, what)
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, should be {want.dtype}"
    if not torch.equal(got, want):
        raise AssertionError(f"{what} should be identical: {_describe_difference(got, want, got != want)}")


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    """Assert that two tensors are equal up to rounding, within TOLERANCE_EPS. what: the subject of the message."""
    __tracebackhide__ = True
    _assert_same_shape(got, want, what)
    eps = torch.finfo(torch.float32 if got.dtype == torch.float32 else torch.float64).eps
    atol = TOLERANCE_EPS * eps * max(1.0, want.abs().max().item())
    wrong = ~((got - want).abs() <= atol)
    if wrong.any():
        raise AssertionError(f"{what}: {_describe_difference(got, want, wrong)} (tolerance {atol:.1e})")


def assert_equals_bare(factory: Factory, got: Tensor, want: Tensor, what: str) -> None:
    """Assert that an implementation gives the bits of the bare model, or its logits up to rounding if not "exact"."""
    __tracebackhide__ = True
    (assert_close if "exact" in unsupported_features(factory) else assert_identical)(got, want, what)


def _assert_same_shape(got: Tensor, want: Tensor, what: str) -> None:
    __tracebackhide__ = True
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, should be {tuple(want.shape)}"


def _describe_difference(got: Tensor, want: Tensor, wrong: Tensor) -> str:
    """Return how many elements are wrong, by how much, and the first of them."""
    first = tuple(wrong.nonzero()[0].tolist())
    largest = (got.double() - want.double()).abs().max()
    digits = 17 if got.dtype == torch.float64 else 9  # enough to distinguish any two numbers
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, by up to {largest:.3g}; "
        f"the first, at {list(first)}, is {got[first].item():.{digits}g}, should be {want[first].item():.{digits}g}"
    )
