"""First: is this an adapter at all? A failure here is the adapter's, not the implementation's."""

from __future__ import annotations

import torch

from ablation.checks.cases import Case, CaseSpec, run
from ablation.checks.check import Check, Factory


def opens_and_ablates(make: Factory, case: Case) -> None:
    """It is made, runs, ablates something, clears and closes, and gives logits of the right shape."""
    model, inputs = case.model(), case.inputs()
    bare = run(model, inputs)
    implementation = make(model)
    for step in ("ablate", "run", "clear", "close"):
        assert callable(getattr(implementation, step, None)), f"the adapter has no method {step}"
    try:
        clean = implementation.run(**inputs)
        assert isinstance(clean, torch.Tensor), f"run gave a {type(clean).__name__}, not the logits"
        assert clean.shape == bare.shape, f"run gave logits of shape {tuple(clean.shape)}, not {tuple(bare.shape)}"
        implementation.ablate(list(case.heads), case.imputation)
        ablated = implementation.run(**inputs)
        layer, head = case.heads[0]
        changed = not torch.equal(ablated, clean)
        assert changed, f"ablating layer {layer} head {head} changed no logit: nothing is ablated, or the wrong place"
        implementation.clear()
    finally:
        implementation.close()


CHECKS = [
    Check(
        id="smoke",
        requirement="An adapter is made from a model, ablates, runs, clears and closes.",
        function=opens_and_ablates,
        # Two tokens at least: a single one is its own mean where heads are one channel wide.
        cases=CaseSpec(tokens=2, dtypes=("float32",)),
    ),
]
