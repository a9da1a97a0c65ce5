"""Chapter 1, smoke: whether the adapter works at all. A failure here is a fault of the adapter, not of the hook."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ablation.checks.assertions import different, tolerance
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check
from ablation.checks.driving import ablate, discard, run
from ablation.checks.oracles import expected_logits
from ablation.checks.protocol import IMPUTATIONS, Factory


@check(
    "smoke",
    "An adapter can be made from a model, ablate a head, run, clear and close, and its ablation changes the logits.",
    # Each channel of a single token is its own mean.
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
        clean = clean.clone()
        ablate(implementation, case)
        changed = different(implementation.run(**inputs), clean).any()
        implementation.clear()
    finally:
        discard(implementation.close)
    layer, head = case.heads[0]
    what = f"ablating layer {layer} head {head} changed no logit: the hook ablates nothing, or elsewhere"
    assert changed or not _must_change(case, bare), what


def _must_change(case: Case, bare: Tensor) -> bool:
    """Return whether the right ablation changes a logit by more than rounding.

    With equal tokens and rotary positions, z may be its own mean over the tokens; and in a trained model, W_O may not
    read a head. Of an imputation of the implementation's own, it is known only that it may depend on the row: it has
    to change the logits if the tokens differ and if zero imputation changes them.
    """
    if case.kind not in IMPUTATIONS:
        if all(len(set(row)) == 1 for row in case.rows):
            return False
        case = replace(case, imputation="zero")
    return bool(((expected_logits(case) - bare).abs() > tolerance(bare, bare.dtype)).any())
