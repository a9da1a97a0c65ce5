"""Values taken from reference prompts: means of z, and the z of one prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation import provenance
from ablation.choices import OF_REFERENCE
from ablation.edits import Ablation, verify_called_once, verify_shape
from ablation.errors import InvalidPrompt, InvalidResult, one_line
from ablation.forward import as_token_ids, last_logits, validated_request
from ablation.heads import AttentionLayer
from ablation.imputation import Values
from ablation.module_hooks import register
from ablation.passes import Progress

MEAN, MEAN_BY_POSITION = OF_REFERENCE
"""The names of the two imputations of a `Reference`."""


def record_z(model: PreTrainedModel, token_ids: Sequence[int]) -> dict[int, Tensor]:
    """Return the z of a prompt in the clean run, {layer: [tokens, num_heads, head_dim]}, in the model's dtype.

    With `Values`, it replaces the z of other prompts at the same positions. token_ids: one row without padding. Raises
    InvalidPrompt, UnsupportedModel, and InvalidAblation if the model carries an ablation or is in training mode.
    """
    request = validated_request(model, token_ids, [Ablation([])], None, None, None)
    found: dict[int, Tensor] = {}

    def look(layer: AttentionLayer, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (z, *_) = args or kwargs.values()
        verify_shape(layer, z, 1, len(request.token_ids))
        found[layer.index] = z[0].unflatten(-1, (layer.num_heads, layer.head_dim)).clone()

    with torch.no_grad(), request.hook as hook, ExitStack() as hooks:
        for layer in request.heads.layers:
            hooks.callback(register(layer.projection, partial(look, layer), owner=hook))
        last_logits(request, 1)
        for layer in request.heads.layers:
            verify_called_once(layer, hook.receipt)
    return found


@dataclass(frozen=True, eq=False)
class Reference:
    """The sums of z over the tokens of reference prompts, for each position, from which both reference means follow.

    counts: the number of prompts that have a token at each position, int64 [positions]. sums: {layer: [positions,
    num_heads, head_dim]}, float64, on the CPU. provenance: model and prompts, as values that JSON can hold.
    """

    counts: Tensor
    sums: Mapping[int, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        prompts: Iterable[Sequence[int]],
        *,
        known: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Run a model on reference prompts, one by one, and add up their z.

        Prompts run in the order of their token ids, so that the sums do not depend on the order of `prompts`, bit for
        bit. A prompt that occurs twice counts twice. prompts: token ids, each one row without padding. known: more for
        the provenance. progress: called with the share of the work that is done. Raises InvalidPrompt if there are
        none, and the errors of `record_z`.
        """
        listed = sorted(map(as_token_ids, prompts))
        if not listed:
            raise InvalidPrompt("there are no reference prompts")
        counts = torch.tensor([sum(len(ids) > at for ids in listed) for at in range(max(map(len, listed)))])
        sums: dict[int, Tensor] = {}
        for number, token_ids in enumerate(listed, start=1):
            for layer, z in record_z(model, token_ids).items():
                z = z.cpu().double()
                if layer not in sums:
                    sums[layer] = z.new_zeros(len(counts), *z.shape[1:])
                sums[layer][: len(z)] += z
            if progress is not None:
                progress(number / len(listed))
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        of = {"prompts": len(listed), "tokens": int(counts.sum()), "prompts_sha256": digest}
        return cls(counts, sums, {**of, **provenance.of_model(model), **provenance.environment(), **(known or {})})

    def mean(self) -> Values:
        """Return the imputation by the mean over all tokens of the reference, for each channel: `reference-mean`."""
        tokens = self.counts.sum()
        return Values({layer: z.sum(dim=0) / tokens for layer, z in self.sums.items()}, MEAN)

    def mean_by_position(self) -> Values:
        """Return the imputation by the means over the tokens at each position: `reference-mean-by-position`."""
        counts = self.counts[:, None, None]
        return Values({layer: z / counts for layer, z in self.sums.items()}, MEAN_BY_POSITION)

    def imputation(self, name: str) -> Values:
        """Return the imputation of that name."""
        return {MEAN: self.mean, MEAN_BY_POSITION: self.mean_by_position}[name]()

    @property
    def sha256(self) -> str:
        """A digest of the counts and sums."""
        digest = hashlib.sha256(self.counts.numpy().tobytes())
        for layer, z in sorted(self.sums.items()):
            digest.update(str(layer).encode() + z.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write the reference into an .npz file, which is replaced if it exists. Raises OSError."""
        arrays: dict[str, Any] = {f"layer.{layer}": z.numpy() for layer, z in self.sums.items()}
        arrays |= {"counts": self.counts.numpy(), "provenance": np.array(json.dumps(dict(self.provenance)))}
        with Path(path).open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote. Raises InvalidResult if it is missing or damaged."""
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                values = {name: arrays[name] for name in arrays}
            counts, known = values.pop("counts"), json.loads(str(values.pop("provenance")))
            sums = {int(name.removeprefix("layer.")): z for name, z in values.items()}
            if not sums or values.keys() != {f"layer.{abs(layer)}" for layer in sums} or not isinstance(known, dict):
                raise ValueError("it is not a reference")
            if counts.ndim != 1 or counts.dtype != np.int64 or not counts.size:
                raise ValueError("its counts have the wrong dimensions")
            if counts[-1] < 1 or (np.diff(counts) > 0).any():  # a prompt has all positions before its last
                raise ValueError("its counts are not those of prompts")
            if any(z.ndim != 3 or z.dtype != np.float64 or len(z) != len(counts) for z in sums.values()):
                raise ValueError("its sums have the wrong dimensions")
        except Exception as error:  # a damaged file makes json, zipfile, zlib and numpy raise many kinds of errors
            raise InvalidResult(f"no reference can be read from {one_line(path)}: {one_line(error)}") from error
        return cls(torch.from_numpy(counts), {layer: torch.from_numpy(z) for layer, z in sorted(sums.items())}, known)
