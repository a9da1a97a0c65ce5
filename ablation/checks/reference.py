"""Chapter 7, reference: the means of a reference depend on its prompts alone, and are those of clean runs."""

from __future__ import annotations

from dataclasses import replace

from ablation.checks.assertions import assert_close, assert_identical
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check
from ablation.checks.driving import ablate, ablated_logits, made
from ablation.checks.protocol import FROM_REFERENCE, Factory

MEANS = ("reference-mean", "reference-mean-by-position")


@check(
    "reference.partition",
    "The split of a reference into batches, its padding and the order of its prompts change the logits only by "
    "rounding.",
    cases=CaseSpec(imputations=MEANS, max_rows=4, ragged=True, max_heads=2),
    needs=("batch", "padding"),
)
def partition(factory: Factory, case: Case) -> None:
    """The rows of the case are the reference, and the longest of them is the prompt."""
    prompts = list(case.rows)
    alone = replace(case, rows=(max(prompts, key=len),))
    splits = {
        "in one batch": [prompts],
        "in one batch, in the opposite order": [prompts[::-1]],
        "in two batches": [prompts[:1], prompts[1:]],
    }
    with made(factory, case.model()) as implementation:
        ablate(implementation, alone, reference=case.batches([[prompt] for prompt in prompts]))
        want = implementation.run(**alone.inputs()).clone()
        for name, split in splits.items():
            ablate(implementation, alone, reference=case.batches(split))
            got = implementation.run(**alone.inputs())
            assert_close(got, want, f"the logits with the reference {name}, against its prompts one by one")


@check(
    "reference.clean",
    "The z of a reference is that of clean runs, bit for bit, also if heads are ablated when it is measured.",
    cases=CaseSpec(imputations=FROM_REFERENCE, min_layers=2),
)
def clean(factory: Factory, case: Case) -> None:
    """Ablate a head of a lower layer, on which the z of the case's head depends, before the head itself."""
    ((_, head),) = case.heads
    layers = sorted(dict(case.decoder.heads()))
    case = replace(case, heads=((layers[-1], head),))
    want = ablated_logits(factory, case).clone()
    with made(factory, case.model()) as implementation:
        ablate(implementation, case, [(layers[0], head)])
        implementation.run(**case.inputs())
        ablate(implementation, case)
        got = implementation.run(**case.inputs())
    assert_identical(got, want, "the logits with a reference that was given while another head was ablated")
