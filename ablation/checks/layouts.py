"""Chapter 7, layouts: decoders in which the place of a head is not obvious.

An implementation that does not claim a family of LAYOUTS declares it in `unsupported`, as for any other family.
"""

from __future__ import annotations

from dataclasses import replace

from ablation.checks.assertions import assert_close
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check, unsupported_features
from ablation.checks.driving import made, run
from ablation.checks.oracles import expected_logits
from ablation.checks.protocol import Factory


@check(
    "layouts.sliding_window",
    "In a model whose sliding window is shorter than the prompt, an ablation gives, up to rounding, the logits of the "
    "bare model after the ablation is written into its weights.",
    cases=CaseSpec(families=("gemma3",), dtypes=("float32",), max_heads=2, min_tokens=5),
)
def sliding_window(factory: Factory, case: Case) -> None:
    _assert_right(factory, case)


@check(
    "layouts.hybrid",
    "Layer numbers count the layers without attention heads, too: with the number of a layer that has heads, an "
    "ablation gives, up to rounding, the logits of the bare model after the ablation is written into the weights of that layer.",
    cases=CaseSpec(families=("lfm2",), dtypes=("float32",), max_heads=2, min_layers=4, min_tokens=2),
)
def hybrid(factory: Factory, case: Case) -> None:
    _assert_right(factory, case)


@check(
    "layouts.vision",
    "In a vision-language model, layer numbers are those of the text decoder: on a text prompt, an ablation gives, up "
    "to rounding, the logits of the bare model after the ablation is written into the weights of that layer.",
    cases=CaseSpec(families=("gemma3_vision",), dtypes=("float32",), max_heads=2, min_tokens=2),
)
def vision(factory: Factory, case: Case) -> None:
    _assert_right(factory, case)


def _assert_right(factory: Factory, case: Case) -> None:
    if "single_forward" in unsupported_features(factory):  # means that were measured before need not be those of a set
        case = replace(case, heads=case.heads[:1])
    model = case.model()
    bare = run(model, case.inputs())
    with made(factory, model) as implementation:
        assert_close(implementation.run(**case.inputs()), bare, "the logits before anything is ablated")
        implementation.ablate(list(case.heads), case.imputation)
        got = implementation.run(**case.inputs())
    assert_close(got, expected_logits(case), "the logits, against those of the ablation written into W_O and its bias")
