"""Chapter 2, identity: an implementation that ablates nothing gives the logits of the bare model."""

from __future__ import annotations

from ablation.checks.assertions import assert_equals_bare, assert_identical
from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check, inputs_for, unsupported_features
from ablation.checks.decoders import DTYPES
from ablation.checks.driving import ablate, decode_with_cache, made, run
from ablation.checks.protocol import Factory


@check(
    "identity",
    "With no head ablated (before any `ablate`, after `ablate([])`, after `clear` or after `close`), the logits are "
    "those of the bare model, bit for bit.",
    cases=CaseSpec(max_heads=4, dtypes=DTYPES),
)
def identity(factory: Factory, case: Case) -> None:
    _assert_identity(factory, case)


@check(
    "identity.padded",
    "On a padded batch with no head ablated, the logits of real tokens are those of the bare model, bit for bit.",
    cases=CaseSpec(max_rows=3, ragged=True, max_heads=4),
    needs=("batch", "padding"),
)
def identity_padded(factory: Factory, case: Case) -> None:
    _assert_identity(factory, case)


def _assert_identity(factory: Factory, case: Case) -> None:
    model, inputs = case.model(), inputs_for(factory, case)
    without_mask = {"input_ids": inputs["input_ids"], "use_cache": False}
    without_positions = {name: value for name, value in inputs.items() if name != "position_ids"}
    real = inputs["attention_mask"].bool()  # the logits of padding mean nothing
    bare = run(model, inputs)
    with made(factory, model) as implementation:
        clean = implementation.run(**inputs)[real].clone()
        assert_equals_bare(factory, clean, bare[real], "the logits before anything is ablated")

        def assert_unchanged(when: str) -> None:
            got = implementation.run(**inputs)[real]
            assert_identical(got, clean, f"the logits {when}, against those before anything is ablated,")

        assert_unchanged("of a second run")
        if "cache" not in unsupported_features(factory):
            of_model = decode_with_cache(lambda **piece: run(model, piece), case)
            of_implementation = decode_with_cache(implementation.run, case)
            for (name, here, want), (_, _, got) in zip(of_model, of_implementation, strict=True):
                what = f"the logits of {name}, decoded with a cache,"
                assert_equals_bare(factory, got[real[:, here]], want[real[:, here]], what)
        ablate(implementation, case, [])
        assert_unchanged("with an empty set of heads")
        ablate(implementation, case)
        implementation.run(**inputs)
        ablate(implementation, case, [])
        assert_unchanged("with an empty set of heads after another set")
        ablate(implementation, case)
        implementation.clear()
        assert_unchanged("after clear()")
        got, want = implementation.run(**without_mask), run(model, without_mask)
        assert_equals_bare(factory, got, want, "the logits without an attention mask")
        got, want = implementation.run(**without_positions), run(model, without_positions)
        assert_equals_bare(factory, got[real], want[real], "the logits without position_ids")
    assert_identical(run(model, inputs)[real], bare[real], "the logits of the model after close()")
