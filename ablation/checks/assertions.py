"""How tensors are compared: bit for bit, or up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ablation.checks.check import unsupported_features
from ablation.checks.protocol import Factory

# Tensors are compared bit for bit only between calls with equal shapes, which run the same kernels. With another number
# of rows, other kernels run, and logits of up to 5.2 differ as follows (400 random decoders per dtype; the last column
# is the difference in units of the dtype's eps at the size of the logits):
#
#   dtype     largest difference    in eps
#   float32   2.6e-6                9
#   float64   1.3e-15               4
#
# 256 eps are allowed: some 30 times the noise, and far less than the effect of a head. In bfloat16, logits are compared
# up to rounding only with implementations that compute attention themselves; eager and fused attention differ by up to
# 1.6 eps there (150 random decoders), and 256 eps would be more than the effect of a head.
TOLERANCE_EPS = 256
TOLERANCE_EPS_16_BITS = 16


def different(got: Tensor, want: Tensor) -> Tensor:
    """Return where two tensors of one shape differ, as a bool tensor. NaN equals NaN."""
    return (got != want) & ~(got.isnan() & want.isnan())


def assert_identical(got: Tensor, want: Tensor, what: str) -> None:
    """Assert that two tensors have one shape and dtype and equal values: +0 equals -0, and NaN equals NaN.

    what: the subject of the message.
    """
    __tracebackhide__ = True
    _assert_same_shape(got, want, what)
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, should be {want.dtype}"
    wrong = different(got, want)
    if wrong.any():
        raise AssertionError(f"{what} should be identical: {_describe_difference(got, want, wrong)}")


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    """Assert that two tensors are equal up to rounding, within TOLERANCE_EPS. what: the subject of the message."""
    __tracebackhide__ = True
    _assert_same_shape(got, want, what)
    atol = tolerance(want, want.dtype)
    wrong = ~((got - want).abs() <= atol) & different(got, want)
    if wrong.any():
        raise AssertionError(f"{what}: {_describe_difference(got, want, wrong)} (tolerance {atol:.1e})")


def assert_equals_bare(factory: Factory, got: Tensor, want: Tensor, what: str) -> None:
    """Assert that an implementation gives the bits of the bare model, or else, without "bit_identity", its numbers.

    If the difference is rounding only, the message says how to declare that.
    """
    __tracebackhide__ = True
    if "bit_identity" in unsupported_features(factory):
        _assert_rounded(got, want, what)
        return
    try:
        assert_identical(got, want, what)
    except AssertionError as error:
        try:
            _assert_rounded(got, want, what)
        except AssertionError:
            raise error from None
        raise AssertionError(
            f"{error}; the difference is rounding, so if the implementation computes attention itself, declare "
            "'bit_identity' unsupported"
        ) from None


def _assert_rounded(got: Tensor, want: Tensor, what: str) -> None:
    __tracebackhide__ = True
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, should be {want.dtype}"
    assert_close(got, want, what)


_MEASURED: ContextVar[float | None] = ContextVar("measured tolerance", default=None)


def is_measured() -> bool:
    """Whether the tolerance was measured on the model."""
    return _MEASURED.get() is not None


@contextmanager
def measured_tolerance(value: float) -> Iterator[None]:
    """Context manager: compare within a tolerance that was measured on the model, relative to the largest logit."""
    token = _MEASURED.set(value)
    try:
        yield
    finally:
        _MEASURED.reset(token)


def tolerance(want: Tensor, dtype: torch.dtype) -> float:
    """Return the absolute tolerance for numbers as large as these, rounded in a dtype, or as it was measured."""
    info, finite = torch.finfo(dtype), want[want.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    if (measured := _MEASURED.get()) is not None:
        return measured * largest
    size = max(1.0, largest)
    return (TOLERANCE_EPS_16_BITS if info.bits == 16 else TOLERANCE_EPS) * info.eps * size


def _assert_same_shape(got: Tensor, want: Tensor, what: str) -> None:
    __tracebackhide__ = True
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, should be {tuple(want.shape)}"


def _describe_difference(got: Tensor, want: Tensor, wrong: Tensor) -> str:
    """Return how many elements are wrong, by how much, and the first of them."""
    first = tuple(wrong.nonzero()[0].tolist())
    largest = (got.double() - want.double())[wrong].abs().max().item()
    digits = 17 if got.dtype == torch.float64 else 9  # enough to distinguish any two numbers
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, by up to {largest:.3g}; "
        f"the first, at {list(first)}, is {got[first].item():.{digits}g}, should be {want[first].item():.{digits}g}"
        f"{_precision_remark(want, largest)}"
    )


def _precision_remark(want: Tensor, largest: float) -> str:
    """A remark for a difference in float64 that is as small as the rounding of float32."""
    double, single = torch.float64, torch.float32
    if want.dtype != double or not tolerance(want, double) < largest <= tolerance(want, single):
        return ""
    return (
        "; the difference is as small as rounding in float32, so a part of the float64 model runs in float32, perhaps "
        "a softmax: if that is intended, declare 'float64' unsupported"
    )
