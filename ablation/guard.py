"""The guard: rows of a growing batch have to agree with ordinary forward passes, within the model's own rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.edits import Ablation
from ablation.forward import Request, last_logits
from ablation.growing import BatchMismatch, first_layer, last_layer
from ablation.measure import coarsest_eps, logit_size, logit_spread
from ablation.units import MLP

# Differences up to this many eps of the logits' size are rounding; one eps of a dtype with fewer digits than float32,
# whose kernels round a sum once. Measured between growing batch and ordinary forward pass: up to 3.2 eps in float32 and
# float64, 1.0 in bfloat16 and float16 (7 families of 6 layers, capitals, SmolLM2; AVX-512).
ROUNDING_EPS = 64.0
ROUNDING_EPS_OF_SHORT_DTYPES = 2.0

# Larger differences are compared with the noise of the model itself: how much its logits change with the number of
# rows. Measured: up to 1.8 times that noise.
NOISE_FACTOR = 8.0
NOISE_ROWS = (2, 4, 16)

PROBES_PER_LAYER = 4
"""In each layer, where rows may influence each other; otherwise one."""


@dataclass(frozen=True)
class Guard:
    """What growing batches are compared with: ordinary forward passes.

    clean: logits of the clean run, [scored, vocabulary]. probes: those of some ablations, in the same shape. max_rows:
    the largest number of rows in a forward pass.
    """

    request: Request
    clean: Tensor
    probes: dict[Ablation, Tensor]
    max_rows: int

    def check(self, clean: Tensor, ablations: Sequence[Ablation], ablated: Tensor) -> None:
        """Raise BatchMismatch unless the clean row, and the probes among the ablated rows, agree with ordinary ones.

        clean: [scored, vocabulary]. ablated: [ablations, scored, vocabulary]. No ablation may be entered: the bare
        model may run.
        """
        rows, ordinary = [clean], [self.clean]
        for ablation, row in zip(ablations, ablated, strict=True):
            if ablation in self.probes:
                rows.append(row)
                ordinary.append(self.probes[ablation])
        difference = float((torch.stack(rows) - torch.stack(ordinary)).abs().max())
        # Not more than half of the digits, however much the clean rows differ: a hook may treat some rows differently.
        if not difference <= self._rounding and not difference <= min(NOISE_FACTOR * self._noise, self._half_digits):
            raise BatchMismatch(f"a row differs from the same row of an ordinary forward by {difference:.2g}")

    @cached_property
    def _rounding(self) -> float:
        """The difference that rounding alone makes, in logits."""
        eps = working_eps(self.request.model, self.clean)
        short = eps > torch.finfo(torch.float32).eps
        return logit_size(self.clean) * eps * (ROUNDING_EPS_OF_SHORT_DTYPES if short else ROUNDING_EPS)

    @cached_property
    def _half_digits(self) -> float:
        """Half of the digits of the logits' spread."""
        return float(working_eps(self.request.model, self.clean) ** 0.5 * 4 * logit_spread(self.clean))

    @cached_property
    def _noise(self) -> float:
        """How much the clean logits depend on the number of equal rows, whose influence on each other is nothing."""
        alone = last_logits(self.request, 1)[0]
        return max(
            float((last_logits(self.request, rows) - alone).abs().max()) for rows in NOISE_ROWS if rows <= self.max_rows
        )


def working_eps(model: PreTrainedModel, logits: Tensor) -> float:
    """Return the eps of the shortest dtype that the logits have passed through."""
    dtypes = [logits.dtype, model.dtype]
    if torch.amp.is_autocast_available(logits.device.type) and torch.is_autocast_enabled(logits.device.type):
        dtypes.append(torch.get_autocast_dtype(logits.device.type))
    return coarsest_eps(*dtypes)


def choose_probes(model: PreTrainedModel, ablations: Sequence[Ablation]) -> list[Ablation]:
    """Return the ablations that are compared: for each first layer, the last one, and more where rows may couple.

    Of the ablations that change several layers, the first one for each last layer is compared, too: its row may be a
    copy of an ablated row. Ablations that begin with an MLP are a group of their own in each layer.
    """
    by_layer: dict[tuple[int, bool], list[Ablation]] = {}
    deep: dict[int, Ablation] = {}
    for ablation in ablations:
        first, last = first_layer(ablation), last_layer(ablation)
        starts_with_mlp = {pair for pair in ablation.heads if pair[0] == first} == {(first, MLP)}
        by_layer.setdefault((first, starts_with_mlp), []).append(ablation)
        if first != last:
            deep.setdefault(last, ablation)
    count = PROBES_PER_LAYER if _may_couple_rows(model) else 1
    # From the last layer to the first, so that a probe's row differs from its row in the growing batch. The last
    # ablation of each layer, since some models mix up only the rows of a middle layer (HY-V4).
    chosen = [
        group[index]
        for _, group in sorted(by_layer.items(), reverse=True)
        for index in np.unique(np.linspace(len(group) - 1, 0, count).astype(int))
    ]
    return list(dict.fromkeys([*chosen, *deep.values()]))


def _may_couple_rows(model: PreTrainedModel) -> bool:
    """Whether a kind of model may treat rows differently in another batch: quantised ones, mixtures of experts."""
    config = model.config.get_text_config(decoder=True)
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return getattr(model, "is_quantized", False) or any((getattr(config, name, None) or 0) > 1 for name in experts)


def coupled_rows(model: PreTrainedModel) -> str | None:
    """Return why the rows of a batch influence each other in this model, if they are known to, or None."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "Linear8bitLt" and getattr(getattr(module, "state", None), "threshold", 0.0) > 0.0:
            return "LLM.int8 decides over the whole batch which columns it keeps in half precision"
        if ".quantized.dynamic." in f"{kind.__module__}.":
            return "dynamic quantisation scales the activations of the whole batch together"
    return None
