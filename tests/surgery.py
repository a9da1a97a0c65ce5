"""An oracle for every imputation and position, which shares no code with the hook.

The block of W_O that reads an ablated head is 0, and a hook after the projection adds value @ block, token by token.
Values are computed in plain loops over the tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.checks.decoders import Decoder
from ablation.heads import AttentionLayer, find_heads
from ablation.imputation import Imputation, Scale, Values, as_imputation
from ablation.reference import Reference, record_z

PROMPTS = ((7, 2, 9), (3, 1, 4, 1, 5, 9, 2, 6), (8,), (3, 1, 4, 1, 5, 9, 2, 6), (5, 30, 8, 9, 7, 9, 3, 2))
"""The reference: a prompt of one token, one that occurs twice, and two as long as any row of a case."""
SOURCE = (8, 2, 8, 1, 8, 2, 8, 4)
"""The prompt that is resampled from."""

Value = Callable[[int, int, Tensor, int, int], Tensor]
"""(layer, head, z of all real tokens of the row in float64 [tokens, head_dim], token, position) -> [head_dim]"""


class Kind(NamedTuple):
    """An imputation, and the oracle for its values."""

    imputation: Imputation
    value: Value


@cache
def bare_z(decoder: Decoder, prompt: Sequence[int]) -> dict[int, Tensor]:
    """Return {layer: z}, float64 [tokens, num_heads, head_dim], recorded by a hook of this file."""
    model, found = decoder.shared(), {}
    with ExitStack() as stack:
        for layer in find_heads(model).layers:

            def look(module: Any, args: tuple[Tensor, ...], layer: AttentionLayer = layer) -> None:
                found[layer.index] = args[0][0].double().reshape(-1, layer.num_heads, layer.head_dim)

            stack.callback(layer.projection.register_forward_pre_hook(look).remove)
        with torch.no_grad():
            model(torch.tensor([prompt]), use_cache=False)
    return found


@cache
def reference(decoder: Decoder) -> Reference:
    """Return the reference of `PROMPTS`, by the code under test."""
    return Reference.of(decoder.shared(), PROMPTS)


def invented(decoder: Decoder, *dimensions: int) -> dict[int, Tensor]:
    """Return invented values for all layers, [*dimensions, num_heads, head_dim], in the model's dtype."""
    shape = (*dimensions, decoder.num_heads, decoder.head_dim)
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    dtype: torch.dtype = getattr(torch, decoder.dtype)
    return {layer: (((7 * numbers + 5 * layer) % 31 - 15) / 8).to(dtype) for layer, _ in decoder.heads()}


@cache
def kind(name: str, decoder: Decoder) -> Kind:
    """Return an imputation by its name in `KINDS`."""

    def mean_of_reference(layer: int, head: int, z: Tensor, token: int, position: int) -> Tensor:
        columns = [row for prompt in PROMPTS for row in bare_z(decoder, prompt)[layer][:, head]]
        return _exact_mean(columns)

    def mean_at_position(layer: int, head: int, z: Tensor, token: int, position: int) -> Tensor:
        longer = [prompt for prompt in PROMPTS if len(prompt) > position]
        return _exact_mean([bare_z(decoder, prompt)[layer][position, head] for prompt in longer])

    constant, by_position = invented(decoder), invented(decoder, 9)
    match name:
        case "zero":
            return Kind(as_imputation("zero"), lambda layer, head, z, token, position: torch.zeros(z.shape[-1]))
        case "mean":
            return Kind(
                as_imputation("mean"),
                lambda layer, head, z, token, position: _exact_mean(list(z.flatten())).expand(z.shape[-1]),
            )
        case "channel-mean":
            return Kind(as_imputation("channel-mean"), lambda layer, head, z, token, position: _exact_mean(list(z)))
        case "scale":
            return Kind(Scale(-1.5), lambda layer, head, z, token, position: -1.5 * z[token])
        case "values":
            return Kind(Values(constant), lambda layer, head, z, token, position: constant[layer][head])
        case "values-by-position":
            return Kind(Values(by_position), lambda layer, head, z, token, position: by_position[layer][position, head])
        case "reference-mean":
            return Kind(reference(decoder).mean(), mean_of_reference)
        case "reference-mean-by-position":
            return Kind(reference(decoder).mean_by_position(), mean_at_position)
        case "resample":
            return Kind(
                Values(record_z(decoder.shared(), SOURCE), "resample"),
                lambda layer, head, z, token, position: bare_z(decoder, SOURCE)[layer][position, head],
            )
    raise ValueError(name)


KINDS = (
    "zero",
    "mean",
    "channel-mean",
    "scale",
    "values",
    "values-by-position",
    "reference-mean",
    "reference-mean-by-position",
    "resample",
)


def _exact_mean(rows: Sequence[Tensor]) -> Tensor:
    """Return the mean over a list of tensors, [n] each or numbers, from sums without rounding."""
    columns = torch.stack(list(rows)).reshape(len(rows), -1).T.tolist()
    return torch.tensor([math.fsum(column) / len(column) for column in columns], dtype=torch.float64)


class Oracle(NamedTuple):
    """What an ablation should do. positions: as the user gives them, without names; None for all.

    real: of how many real tokens of each row positions count; None for all of them. A continuation follows these.
    """

    decoder: Decoder
    heads: Sequence[tuple[int, int]]
    kind: str
    positions: Sequence[int] | None = None
    real: int | None = None

    def tokens(self, mask: Sequence[int]) -> list[int]:
        """Return the columns of a row that are replaced, of those that are not padding. mask: of the row."""
        columns = [column for column, real in enumerate(mask) if real]
        counted = columns[: self.real]
        if self.positions is None:
            by_position = kind(self.kind, self.decoder).imputation.by_position
            return counted if by_position else columns
        return sorted({counted[position] for position in self.positions})

    def expected(self, layer: AttentionLayer, z: Tensor, mask: Sequence[Sequence[int]]) -> Tensor:
        """Return the z that the projection should receive, float64; padding keeps its z. z: [rows, tokens, channels]"""
        found = z.double().unflatten(-1, (layer.num_heads, layer.head_dim)).clone()
        value = kind(self.kind, self.decoder).value
        for row, of_row in enumerate(mask):
            columns = [column for column, real in enumerate(of_row) if real]
            for index, head in self.heads:
                if index == layer.index:
                    own = z[row, columns].double()[:, layer.channels(head)]
                    for column in self.tokens(of_row):
                        position = columns.index(column)
                        imputed = value(layer.index, head, own, position, position)
                        found[row, column, head] = imputed.to(z.dtype).double()
        return found.flatten(2)

    @contextmanager
    def operated(self, mask: Sequence[Sequence[int]]) -> Iterator[PreTrainedModel]:
        """Context manager: a copy of the model with the ablation in its weights. mask: [rows, tokens], of its batch."""
        model = self.decoder.fresh()
        with ExitStack() as stack:
            for layer in find_heads(model).layers:
                heads = [head for index, head in self.heads if index == layer.index]
                if heads:
                    stack.callback(self._operate(layer, heads, mask))
            yield model

    def _operate(
        self, layer: AttentionLayer, heads: Iterable[int], mask: Sequence[Sequence[int]]
    ) -> Callable[[], None]:
        weight: Any = layer.projection.weight
        by_input = weight if isinstance(layer.projection, Conv1D) else weight.T  # [num_heads * head_dim, hidden]
        channels = [at for head in heads for at in range(layer.head_dim * head, layer.head_dim * (head + 1))]
        block = by_input[channels].detach().double()
        with torch.no_grad():
            by_input[channels] = 0.0

        def add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            value = self.expected(layer, args[0], mask)[..., channels]
            return (output.double() + value @ block).to(output.dtype)

        return layer.projection.register_forward_hook(add).remove

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the logits, [rows, tokens, vocabulary]. inputs: of a batch, with its attention mask."""
        with self.operated(inputs["attention_mask"].tolist()) as model, torch.no_grad():
            return model(**inputs).logits
