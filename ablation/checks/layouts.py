"""Chapter 9, layouts: decoders in which the place of a head, or what reads it, is not obvious.

An implementation that does not claim a family of LAYOUTS declares it in `unsupported`, as for any other family.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ablation.checks.assertions import assert_close
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check, unsupported_features
from ablation.checks.driving import ablate, ablated_logits, made, run
from ablation.checks.oracles import apply_surgery, expected_logits
from ablation.checks.protocol import IMPUTATIONS, Factory
from ablation.heads import find_heads

KNOWN = tuple(IMPUTATIONS)


@check(
    "layouts.sliding_window",
    "In a model whose sliding window is shorter than the prompt, an ablation gives, up to rounding, the logits of the "
    "bare model after the ablation is written into its weights.",
    # With a head left, since a norm follows W_O: it would amplify the rounding of an attention that writes nothing.
    cases=CaseSpec(
        imputations=KNOWN, families=("gemma3",), dtypes=("float32",), max_heads=2, min_tokens=5, min_layer_heads=3
    ),
)
def sliding_window(factory: Factory, case: Case) -> None:
    _assert_right(factory, case)


@check(
    "layouts.hybrid",
    "In a model in which some layers have no attention heads, layer l is the l-th of all layers, counted from 0: an "
    "ablation in layer l gives, up to rounding, the logits of the bare model after the ablation is written into the "
    "weights of layer l.",
    cases=CaseSpec(imputations=KNOWN, families=("lfm2",), dtypes=("float32",), max_heads=2, min_layers=4, min_tokens=2),
)
def hybrid(factory: Factory, case: Case) -> None:
    _assert_right(factory, case)


@check(
    "layouts.vision",
    "In a vision-language model, layer l is that of the text decoder: on a text prompt, an ablation in layer l gives, "
    "up to rounding, the logits of the bare model after the ablation is written into the weights of that layer.",
    cases=CaseSpec(
        imputations=KNOWN,
        families=("gemma3_vision",),
        dtypes=("float32",),
        max_heads=2,
        min_tokens=2,
        min_layer_heads=3,
    ),
)
def vision(factory: Factory, case: Case) -> None:
    _assert_right(factory, case)


@check(
    "layouts.low_rank",
    "If an adapter such as LoRA wraps a projection, zero imputation gives, up to rounding, the logits of the bare "
    "model after the weights that read the head, in the projection and in its adapter, are set to 0.",
    cases=CaseSpec(imputations=("zero",), families=("gpt2", "llama", "qwen3"), dtypes=("float32",), max_heads=2),
    needs=("zero", "adapters"),
)
def low_rank(factory: Factory, case: Case) -> None:
    model, merged = case.model(), case.model()
    for layer, twin in zip(find_heads(model).layers, find_heads(merged).layers, strict=True):
        parent, _, name = layer.projection_name.rpartition(".")
        wrapper = LowRank(layer.projection, seed=layer.index)
        setattr(model.get_submodule(parent), name, wrapper)
        with torch.no_grad():
            update = wrapper.up @ wrapper.down  # [hidden, num_heads * head_dim]
            weight: Any = twin.projection.weight
            weight += update.T if isinstance(twin.projection, Conv1D) else update
    apply_surgery(merged, case.heads)
    what = "the logits, against those of the adapters merged into W_O and its blocks of the heads set to 0"
    assert_close(ablated_logits(factory, case, model), run(merged, case.inputs()), what)


class LowRank(nn.Module):
    """A projection with a low-rank adapter beside it, which reads z, too."""

    def __init__(self, base_layer: Any, seed: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        columns = (base_layer.nf, base_layer.nx) if isinstance(base_layer, Conv1D) else base_layer.weight.shape
        random = np.random.RandomState(seed)
        self.up, self.down = (
            nn.Parameter(torch.from_numpy(random.randint(-128, 129, shape) / 256).to(base_layer.weight.dtype))
            for shape in ((columns[0], 2), (2, columns[1]))
        )

    def forward(self, z: Tensor) -> Tensor:
        """[rows, tokens, num_heads * head_dim] -> [rows, tokens, hidden]."""
        output: Tensor = self.base_layer(z) + z @ self.down.T @ self.up.T
        return output


def _assert_right(factory: Factory, case: Case) -> None:
    if "single_forward" in unsupported_features(factory):  # means that were measured before need not be those of a set
        case = replace(case, heads=case.heads[:1])
    model = case.model()
    bare = run(model, case.inputs())
    with made(factory, model) as implementation:
        assert_close(implementation.run(**case.inputs()), bare, "the logits before anything is ablated")
        ablate(implementation, case)
        got = implementation.run(**case.inputs())
    assert_close(got, expected_logits(case), "the logits, against those of the ablation written into W_O and its bias")
