"""Kernels whose last bits depend on the number of rows, as on some processors: here on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


@contextmanager
def batch_dependent_kernels() -> Iterator[None]:
    """While entered, the last bits that F.linear and Conv1D give depend on the batch size and on the column.

    nn.Linear, routers and experts call F.linear. A row of a larger batch then has other last bits than the same row
    alone, and equal columns of a weight give different last bits. The same call twice gives the same bits.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", _perturbed(functional.linear))
        patch.setattr(Conv1D, "forward", _perturbed(Conv1D.forward))
        yield


def _perturbed(function: Any) -> Any:
    def perturbed(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = function(*args, **kwargs)
        rows, columns = output.numel() // output.shape[-1], output.shape[-1]
        eps = torch.finfo(output.dtype).eps
        steps = (torch.arange(columns, device=output.device) + rows) % 3  # 0, 1 or 2 units in the last place
        return output * (1 + eps * steps).to(output.dtype)

    return perturbed
