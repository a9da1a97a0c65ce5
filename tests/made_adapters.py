"""Adapters that the helpers make, from code of every form, and the same code called by an adapter class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation import HeadAblation
from ablation.checks import adapter_from_context, adapter_from_function
from ablation.checks.protocol import CACHE
from tests.mutants import Mutant

Pairs = Sequence[tuple[int, int]]


@contextmanager
def of_pairs(model: PreTrainedModel, heads: Pairs, imputation: str) -> Iterator[None]:
    """A context manager as most are: it yields nothing."""
    with HeadAblation(model) as ablation:
        ablation.ablate(list(heads), imputation)
        yield


@contextmanager
def zero_only(model: PreTrainedModel, heads: Pairs, strength: float = 1.0) -> Iterator[HeadAblation]:
    """It knows one imputation, and has a parameter of its own."""
    with HeadAblation(model) as ablation:
        ablation.ablate(list(heads), "zero")
        yield ablation


@contextmanager
def by_layer(model: PreTrainedModel, heads_by_layer: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """It takes heads as transformers' `prune_heads` does."""
    with zero_only(model, [(layer, head) for layer, heads in heads_by_layer.items() for head in heads]):
        yield


@contextmanager
def one_head(model: PreTrainedModel, layer: int, head: int, *, imputation: str) -> Iterator[None]:
    """It takes one head."""
    with of_pairs(model, [(layer, head)], imputation):
        yield


class Entered:
    """A class: `__enter__` returns the object."""

    def __init__(self, model: PreTrainedModel, /, heads: Pairs, imputation: str) -> None:
        self.ablation, self.heads, self.imputation = HeadAblation(model), list(heads), imputation

    def __enter__(self) -> Entered:
        self.ablation.__enter__()
        try:
            self.ablation.ablate(self.heads, self.imputation)
        except BaseException:
            self.ablation.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.ablation.__exit__(None, None, None)


@contextmanager
def with_values(
    model: PreTrainedModel, heads: Pairs, imputation: str, values: Any = None, positions: Any = None
) -> Iterator[None]:
    """It takes what `values` and positions need."""
    with HeadAblation(model) as ablation:
        given: Any = imputation
        if imputation == "values" and heads:
            from ablation.imputation import Values

            layers = ablation.heads.layers
            given = Values(
                {
                    layer.index: torch.stack([values[layer.index, head] for head in range(layer.num_heads)], dim=-2)
                    for layer in layers
                }
            )
        ablation.ablate(list(heads), given if heads else "zero", positions)
        yield


def run_ablated(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, heads: Pairs) -> Any:
    """It takes neither positions nor a cache, and returns what the model does."""
    with torch.no_grad(), zero_only(model, heads):
        return model(input_ids, attention_mask=attention_mask)


def run_with_inputs(model: PreTrainedModel, heads: Pairs, *, input_ids: Tensor, imputation: str, **inputs: Any) -> Any:
    """It passes on all inputs."""
    with of_pairs(model, heads, imputation):
        return model(input_ids, **inputs).logits


def run_one(model: PreTrainedModel, input_ids: Tensor, layer: int, head: int) -> Tensor:
    """It takes one head, and no mask."""
    with torch.no_grad(), zero_only(model, [(layer, head)]):
        return model(input_ids).logits


def run_decoding(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Any,
    heads: Pairs,
) -> Tensor:
    """It takes a cache by the name of older versions of transformers."""
    with torch.no_grad(), zero_only(model, heads):
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: past_key_values}
        return model(input_ids, **inputs).logits


OfPairs = adapter_from_context(of_pairs)
MADE = (
    OfPairs,
    adapter_from_context(zero_only),
    adapter_from_context(by_layer),
    adapter_from_context(one_head),
    adapter_from_context(Entered, imputations=("zero", "mean", "scale")),
    adapter_from_context(
        with_values,
        imputations=("zero", "channel-mean", "values"),
        unsupported={"cache": "our hook refuses a run that has none of its positions"},
    ),
    adapter_from_function(run_ablated),
    adapter_from_function(run_with_inputs),
    adapter_from_function(run_one),
    adapter_from_function(run_decoding),
)
"""Correct code in every form."""


def context_of(mutant: type[Mutant]) -> Callable[..., Any]:
    """Return a wrong implementation as a context manager, which makes it and closes it in each run."""

    @contextmanager
    def hook(
        model: PreTrainedModel, heads: Any, imputation: str, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Iterator[None]:
        implementation = mutant(model)
        try:
            implementation.ablate(heads, imputation)
            implementation.real = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
            yield
        finally:
            implementation.close()

    return hook


def function_of(mutant: type[Mutant]) -> Callable[..., Any]:
    """Return a wrong implementation as a function, which makes it and closes it in each call."""

    def run(
        model: PreTrainedModel, input_ids: Tensor, attention_mask: Any, heads: Any, imputation: str, **inputs: Any
    ) -> Tensor:
        implementation = mutant(model)
        try:
            implementation.ablate(heads, imputation)
            return implementation.run(input_ids, attention_mask, **inputs)
        finally:
            implementation.close()

    return run


def written(run: Callable[..., Tensor], without: Mapping[str, str]) -> Any:
    """Return an adapter class written out, as docs/checking.md shows it.

    run: takes a model, heads, an imputation and the inputs of a run. without: what the adapter does not support.
    """

    class Written:
        unsupported: ClassVar[Mapping[str, str]] = without

        def __init__(self, model: PreTrainedModel) -> None:
            self.model, self.heads, self.imputation = model, list[Any](), "zero"

        def ablate(self, heads: Pairs, imputation: str) -> None:
            self.heads, self.imputation = list(heads), imputation

        def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
            return run(
                self.model, self.heads, self.imputation, input_ids, attention_mask, **{"use_cache": False} | inputs
            )

        def clear(self) -> None:
            self.heads = []

        def close(self) -> None:
            pass

    return Written


def made_and_written(mutant: type[Mutant]) -> Iterator[tuple[str, Any, Any]]:
    """Yield for each form of a wrong implementation its name, the adapter of the helper, and one written out."""
    hook, function = context_of(mutant), function_of(mutant)

    def in_context(model: Any, heads: Any, imputation: str, input_ids: Tensor, mask: Any, **inputs: Any) -> Tensor:
        with hook(model, heads, imputation, input_ids, mask):
            return model(input_ids, attention_mask=mask, **inputs).logits

    def by_function(model: Any, heads: Any, imputation: str, input_ids: Tensor, mask: Any, **inputs: Any) -> Tensor:
        return function(model, input_ids, mask, heads, imputation, **inputs)

    made: Any = adapter_from_context(hook, unsupported=mutant.unsupported)
    yield "context", made, written(in_context, made.unsupported)
    made = adapter_from_function(function, unsupported=mutant.unsupported)
    yield "function", made, written(by_function, made.unsupported)
