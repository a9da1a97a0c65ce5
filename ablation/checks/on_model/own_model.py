"""The user's own model, in the place of a random decoder: real weights, of which there is one copy in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation.checks.cases import Case, CaseSpec, with_factor
from ablation.checks.causes.simulation import RIGHT, Setting, simulated
from ablation.checks.driving import run
from ablation.checks.oracles import surgery_logits
from ablation.errors import UnsupportedModel, one_line
from ablation.forward import embedding_weight
from ablation.heads import find_heads

NOISE_FACTOR = 8.0
"""Logits are equal up to rounding if they differ by at most this many times the noise, which is measured on few heads
and few tokens."""
PADDING_FACTOR = 64.0
"""A model is sensitive to padding if padding changes its logits by more than this many times its noise."""


class OwnModel:
    """One model. Each case restores it to the state in which it was found: modules, hooks, flags and configuration.

    Its weights are not copied: whoever changes them restores them. family: its name. rows: the token ids of its
    prompts, at least three tokens each. left_out: how many other prompts there are. Raises UnsupportedModel if its
    projections cannot be edited, if its heads differ in size, or if it does not give finite logits.
    """

    def __init__(
        self, model: PreTrainedModel, family: str, rows: Sequence[Sequence[int]], *, left_out: int = 0
    ) -> None:
        self._model, self.family, self.left_out = model, family, left_out
        self.rows = tuple(map(tuple, rows))
        self._heads = find_heads(model)
        for layer in self._heads.layers:
            _verify_editable(layer.projection_name, layer.projection)
        if len({layer.head_dim for layer in self._heads.layers}) > 1:
            raise UnsupportedModel(f"the layers of {family} have heads of different sizes")
        self._found = [_AsFound(owner) for owner in _owners(model)]
        self._flags = [(tensor, tensor.requires_grad, tensor.grad) for tensor in model.parameters()]
        try:
            self.clean = run(self.fresh(), self.case(self.rows[:1]).inputs())  # [1, tokens, vocabulary]
        except Exception as error:
            raise UnsupportedModel(f"{family} cannot be run: {one_line(error)}") from error
        if not self.clean.isfinite().all():
            raise UnsupportedModel(f"the logits of {family} in {self.dtype} are not finite: choose another --dtype")

    def __repr__(self) -> str:
        return self.family

    @property
    def model_type(self) -> str:
        """The family that it belongs to: as declarations name it, or else as transformers does."""
        found = str(self._model.config.model_type)
        return {"gemma3_text": "gemma3", "gemma3": "gemma3_vision"}.get(found, found)

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self._heads.num_layers

    @property
    def num_heads(self) -> int:
        """The number of query heads of the layer that has most."""
        return self._heads.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of the z of one head."""
        return self._heads.layers[0].head_dim

    @property
    def num_key_value_groups(self) -> int:
        """How many query heads share one key/value head in the first layer."""
        return self._heads.layers[0].num_heads // self._heads.layers[0].key_value_heads

    @property
    def dtype(self) -> str:
        """The name of the dtype of the first projection."""
        weight: Any = self._heads.layers[0].projection.weight
        return str(weight.dtype).removeprefix("torch.")

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return len(embedding_weight(self._model))

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self._model.device

    @property
    def longest(self) -> float:
        """The largest number of tokens that it can read; infinity if its configuration does not say."""
        return float(getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or "inf")

    def heads(self) -> list[tuple[int, int]]:
        """Return all (layer, head) pairs."""
        return list(self._heads)

    def shared(self) -> PreTrainedModel:
        """Return the model as it is now, perhaps with an implementation on it."""
        return self._model

    def fresh(self) -> PreTrainedModel:
        """Return the model as it was found, without what an implementation has left on it."""
        for each in self._found:
            each.restore()
        for tensor, requires_grad, grad in self._flags:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad
        return self._model

    @property
    def is_intact(self) -> bool:
        """Whether the model, once restored, gives the logits that it gave when it was found."""
        return torch.equal(run(self.fresh(), self.case(self.rows[:1]).inputs()), self.clean)

    def case(self, rows: Sequence[Sequence[int]], **changes: Any) -> Case:
        """Return a case on this model, padded as its configuration says."""
        pad = getattr(self._model.config, "pad_token_id", None)
        return replace(Case(self, tuple(map(tuple, rows)), heads=(), pad=pad), **changes)

    def cases(self, spec: CaseSpec) -> Iterator[Case]:
        """Yield the cases of a check: each imputation on some heads of different layers, padded on either side."""
        first, *others = self.rows
        rows = [first]
        if spec.ragged:
            rows.append(next((row for row in others if len(row) != len(first)), shorter(first)))
        elif spec.max_rows > 1:
            rows.append(first[::-1])
        for name in spec.imputations or ():
            for side in dict.fromkeys(spec.sides) if spec.ragged else ("right",):
                yield self.case(
                    rows,
                    heads=tuple(self._some_heads()[: spec.max_heads]),
                    imputation=with_factor(name),
                    side=side,
                    positions=(1, -1) if spec.positions else None,
                )

    @cached_property
    def noise(self) -> float:
        """The largest difference of a logit between two right ways to the same, relative to the largest logit.

        The bare model on a prompt alone and as a row of a batch without padding; and mean imputation of some heads by
        surgery and by a hook. It is at least half of eps.
        """
        alone, batch = self.rows[0], self.case([self.rows[0], self.rows[0][::-1], self.rows[0]])
        together = run(self.fresh(), batch.inputs())
        found = [(together[row] - self.clean[0]).abs().max().item() for row in (0, 2)]
        for heads in self._some_heads():
            case = self.case([alone], heads=(heads,), imputation="mean")
            by_hook = simulated(Setting(case, self.fresh(), case.inputs()), RIGHT).logits
            found.append((surgery_logits(case)[0] - by_hook).abs().max().item())
        return max(torch.finfo(self.clean.dtype).eps / 2, max(found) / self._largest)

    @cached_property
    def padding_noise(self) -> float:
        """The same for the bare model on a prompt alone and in batches that are padded on the left or on the right."""
        longer = (*self.rows[0], *self.rows[0][:2])
        batches = [self.case([self.rows[0], longer], side=side) for side in ("left", "right")]
        found = [run(self.fresh(), batch.inputs())[0, batch.replaced()[0]] for batch in batches]
        return max((logits - self.clean[0]).abs().max().item() for logits in found) / self._largest

    @property
    def can_be_padded(self) -> bool:
        """Whether padding changes the logits of the bare model by little more than its noise."""
        return self.padding_noise <= PADDING_FACTOR * self.noise

    @property
    def relative_tolerance(self) -> float:
        """How far logits may differ that should be equal up to rounding, relative to the largest logit."""
        return NOISE_FACTOR * max(self.noise, self.padding_noise if self.can_be_padded else 0.0)

    @property
    def tolerance(self) -> float:
        """The same in logits, for the model's prompts."""
        return self.relative_tolerance * self._largest

    @property
    def _largest(self) -> float:
        return self.clean.abs().max().item()

    def _some_heads(self) -> list[tuple[int, int]]:
        """Return up to four heads of the first, the middle and the last layer with heads."""
        layers = self._heads.layers
        middle = layers[len(layers) // 2]
        heads = [
            (middle.index, middle.num_heads - 1),
            (layers[0].index, 0),
            (layers[-1].index, layers[-1].num_heads // 2),
            (middle.index, 0),
        ]
        return list(dict.fromkeys(heads))


def shorter(row: Sequence[int]) -> tuple[int, ...]:
    """Return other tokens, two fewer than a row has, but at least two: cases have positions 1 and -1."""
    return tuple(row[::-1][: max(2, len(row) - 2)])


def _verify_editable(name: str, projection: Any) -> None:
    """Raise UnsupportedModel unless the weight of a projection can be edited."""
    if not isinstance(projection, nn.Linear | Conv1D):
        raise UnsupportedModel(
            f"{name} is a {type(projection).__name__}, whose weight cannot be edited: merge adapters into the weights"
        )
    if projection.weight.is_meta:
        raise UnsupportedModel(f"the weight of {name} is not in memory: load the model on one device, with --device")
    if not projection.weight.is_floating_point():
        raise UnsupportedModel(
            f"the weight of {name} is quantised ({projection.weight.dtype}) and cannot be edited: load the model in a "
            "floating-point dtype"
        )


def _owners(model: nn.Module) -> Iterator[Any]:
    """Yield each module of a model and each configuration."""
    seen: set[int] = set()
    waiting: list[Any] = [*model.modules(), getattr(model, "generation_config", None)]
    for owner in waiting:
        if owner is not None and id(owner) not in seen:
            seen.add(id(owner))
            yield owner
            if not isinstance(owner, nn.Module) or "config" in vars(owner):
                waiting += [
                    value
                    for name, value in vars(owner).items()
                    if name.endswith("config") and hasattr(value, "__dict__")
                ]


class _AsFound:
    """The attributes of an object, and the entries of its tables, such as those of hooks."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.attributes = owner, dict(vars(owner))
        self.tables = [(table, dict(table)) for table in vars(owner).values() if isinstance(table, dict)]

    def restore(self) -> None:
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
        for table, entries in self.tables:  # the same objects as before, since handles of hooks refer to them
            if list(table.items()) != list(entries.items()):
                table.clear()
                table.update(entries)
