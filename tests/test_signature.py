"""An adapter that cannot be called as the checks call it is reported in one line, before any check runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ablation.checks import parametrize_with_checks
from ablation.checks.signature import signature_problem
from tests.implementations.notebook import Notebook
from tests.implementations.ours import Ours
from tests.implementations.surgery import Surgery


class TakesNoModel(Ours):
    def __init__(self) -> None:
        pass


class TakesOnlyIds(Ours):
    def run(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().run(ids)


class NamesItsArgumentsOtherwise(Ours):
    def run(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return super().run(ids, mask)


class TakesOnlyHeads(Ours):
    def ablate(self, heads: Sequence[tuple[int, int]]) -> None:  # type: ignore[override]
        pass


class HasNoClose(Ours):
    close = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (TakesNoModel, "__init__ cannot be called as __init__(model): too many positional arguments"),
        (TakesOnlyHeads, "ablate cannot be called as ablate(heads, imputation): too many positional arguments"),
        (
            TakesOnlyIds,
            "run cannot be called as run(input_ids, attention_mask=...): got an unexpected keyword argument",
        ),
        (NamesItsArgumentsOtherwise, "run cannot be called as run(input_ids, attention_mask=...): got an unexpected"),
        (HasNoClose, "the adapter has no method close"),
    ],
)
def test_wrong_signature_is_one_line(factory: Any, problem: str) -> None:
    found = signature_problem(factory)
    assert found is not None and problem in found and "\n" not in found
    with pytest.raises(ValueError, match=re.escape(problem)):
        parametrize_with_checks(factory)


class MethodsOfTheInstance:
    """Has its methods as attributes of the instance, with any arguments."""

    def __init__(self, model: Any) -> None:
        self.ablate = self.run = self.clear = self.close = lambda *args, **inputs: None


class CannotBeMade(Ours):
    """Raises in its constructor, which does not concern its signature."""

    def __init__(self, model: Any) -> None:
        raise LookupError("no such module")


@pytest.mark.parametrize(
    "factory", [Ours, Notebook, Surgery, MethodsOfTheInstance, CannotBeMade, lambda model: Ours(model)]
)
def test_callable_adapter_has_no_signature_problem(factory: Any) -> None:
    assert signature_problem(factory) is None
