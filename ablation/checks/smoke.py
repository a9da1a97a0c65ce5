"""Chapter 1, smoke: whether the adapter works at all. A failure here is a fault of the adapter, not of the hook."""

from __future__ import annotations

import torch

from ablation.checks.assertions import different
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check
from ablation.checks.driving import ablate, run
from ablation.checks.protocol import Factory


@check(
    "smoke",
    "An adapter can be made from a model, ablate a head, run, clear and close, and its ablation changes the logits.",
    # A single token of a head with one channel is its own mean, so there are at least two tokens.
    cases=CaseSpec(min_tokens=2, dtypes=("float32",)),
)
def smoke(factory: Factory, case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    bare = run(model, inputs)
    implementation = factory(model)
    for method in ("ablate", "run", "clear", "close"):
        assert callable(getattr(implementation, method, None)), f"the adapter has no method {method}"
    try:
        clean = implementation.run(**inputs)
        assert isinstance(clean, torch.Tensor), f"run returned a {type(clean).__name__}, not the logits"
        assert clean.shape == bare.shape, f"run returned logits of shape {tuple(clean.shape)}, not {tuple(bare.shape)}"
        ablate(implementation, case)
        ablated = implementation.run(**inputs)
        layer, head = case.heads[0]
        changed = different(ablated, clean).any()
        assert changed, f"ablating layer {layer} head {head} changed no logit: the hook ablates nothing, or elsewhere"
        implementation.clear()
    finally:
        implementation.close()
