"""What a failure depends on: the failing case is run again with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from transformers import PreTrainedModel

from ablation.checks.cases import Case
from ablation.checks.decoders import VOCABULARY, Decoder
from ablation.heads import find_heads

BIAS_FREE = {"llama": "Llama", "qwen3": "Qwen3"}
"""Families of which most released models have no bias in the projection, while the random ones have one."""


UNRELATED = (("rows", "layers"), ("layers", "channels per head"))
"""Lengths that no code mixes up: a layer is an index into a list, rows and channels are axes of z."""


def remarks(passes: Callable[[Case], bool], case: Case) -> Iterator[str]:
    """Yield a sentence for each peculiarity of a failing case that may be the reason. passes: runs the check."""
    if not isinstance(case.decoder, Decoder):  # nothing about the user's own model can be exchanged
        return
    yield from _square(passes, case)
    if _has_projection_bias(case) and passes(_WithoutProjectionBias(**vars(case))):
        released = BIAS_FREE.get(case.decoder.family)
        yield "only models whose projection has a bias are affected: if that bias is 0, the check passes" + (
            f"; most released {released} models have none" if released else ""
        )


def _square(passes: Callable[[Case], bool], case: Case) -> Iterator[str]:
    """Yield a sentence for each two axes of the same length, which are easily mixed up."""
    lengths = {
        "tokens": max(map(len, case.rows)),
        "rows": len(case.rows),
        "layers": case.decoder.num_layers,
        "heads": case.decoder.num_heads,
        "channels per head": case.decoder.head_dim,
    }
    for one, other in combinations(lengths, 2):
        if (one, other) not in UNRELATED and lengths[one] == lengths[other] > 1:
            longer, length = _longer(case, one)
            again = "it passes, so they may be mixed up" if passes(longer) else "it fails, too"
            yield f"the case has as many {one} as {other} ({lengths[one]}); with {length} {one} {again}"


def _longer(case: Case, axis: str) -> tuple[Case, int]:
    """Return a case that is longer along one axis, and its length."""
    decoder = case.random_decoder
    match axis:
        case "tokens":
            rows = tuple((*row, (row[-1] + 1) % VOCABULARY) for row in case.rows)
            return replace(case, rows=rows), max(map(len, rows))
        case "rows":
            return replace(case, rows=(*case.rows, case.rows[0])), len(case.rows) + 1
        case "layers":
            decoder = decoder._replace(num_layers=decoder.num_layers + 1)
            return replace(case, decoder=decoder), decoder.num_layers
        case _:
            decoder = decoder._replace(num_heads=decoder.num_heads + decoder.num_key_value_groups)
            return replace(case, decoder=decoder), decoder.num_heads


def _has_projection_bias(case: Case) -> bool:
    return any(layer.projection.bias is not None for layer in find_heads(case.decoder.shared()).layers)


@dataclass(frozen=True)
class _WithoutProjectionBias(Case):
    """The same case, with the bias of each projection set to 0."""

    def model(self) -> PreTrainedModel:
        model = super().model()
        with torch.no_grad():
            for layer in find_heads(model).layers:
                bias = layer.projection.bias
                if isinstance(bias, torch.Tensor):
                    bias.zero_()
        return model
