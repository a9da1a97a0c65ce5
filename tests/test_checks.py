"""The specification bites: a wrong implementation fails the check that it should, with a message that says why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablation.checks import CHECKS, Case, Decoder, Record, check_implementation, reproduce
from ablation.checks.assertions import assert_identical
from ablation.checks.cases import CaseSpec
from ablation.checks.decoders import LAYOUTS
from ablation.checks.protocol import FEATURES
from ablation.checks.runner import requirements_table
from ablation.errors import InvalidDeclaration
from ablation.heads import AttentionLayer, find_heads
from ablation.imputation import Site, as_imputation
from tests.implementations.notebook import Notebook
from tests.implementations.ours import Ours

ROOT = Path(__file__).parent.parent
GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
SMALLEST = Decoder("gpt2", num_layers=1, num_heads=1, head_dim=2)
CASE = Case(GPT2, rows=((3, 1, 4, 1),), heads=((1, 0),))
SMALLEST_CASE = Case(SMALLEST, rows=((3, 1),), heads=((0, 0),))

POINTING_WORDS = re.compile(
    r"^(The same|So|Nor|Neither|And|Or|It|This|That|These|They|Likewise|Also)\b|\b(anew|as ever|nor|neither)\b"
)
FINITE_VERB = re.compile(
    r"\b(is|are|does|gives?|equals?|changes?|uses|replaces|keeps|leaves|agrees|holds|stays?|remains|permutes|affects?|depends?|gets|differ|count)\b"
)


def broken(factory: Any) -> set[str]:
    """The checks that an implementation fails; without shrinking, since only the fact counts."""
    profile = settings.get_current_profile_name()
    settings.load_profile("mutants")
    try:
        return {record.id for record in check_implementation(factory) if record.outcome == "failed"}
    finally:
        settings.load_profile(profile)


# ---- the requirements


def test_check_ids_are_unique_and_name_their_chapter() -> None:
    ids = [check.id for check in CHECKS]
    assert len(set(ids)) == len(ids)
    chapters = "smoke identity locality independence masks oracle reference positions layouts gradients hygiene refusal"
    assert list(dict.fromkeys(id.partition(".")[0] for id in ids)) == chapters.split()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_requirement_is_one_sentence_that_stands_alone(check: Any) -> None:
    text = check.requirement
    assert text[0].isupper() and text.endswith(".") and ". " not in text
    assert not POINTING_WORDS.search(text), "it points to another sentence"
    assert FINITE_VERB.search(text), "it has no verb"
    assert set(check.needs) <= set(FEATURES)


def test_documented_requirements_are_the_specification() -> None:
    page = (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8")
    assert page == requirements_table(), "run: ablation check --list > docs/requirements.md"


# ---- wrong implementations


@pytest.mark.mutants
def test_notebook_hook_fails_exactly_where_it_is_wrong() -> None:
    """It writes in place, takes the mean over the whole batch with its padding, and keeps its state in globals.

    It also validates nothing. If it cannot register all its hooks, those that it has registered remain, and copies of
    the model keep its hooks.
    """
    assert broken(Notebook) == {
        "locality.padded",
        "locality.input_untouched",
        "independence.other_models",
        "independence.rows",
        "independence.padding",
        "independence.many_rows",
        "masks.single_row",
        "masks.empty_row",
        "masks.non_finite",
        "hygiene.copies",
        "hygiene.exception",
        "hygiene.lifecycle",
        "refusal.head",
        "refusal.type",
        "refusal.imputation",
    }


class OffByOne(Ours):
    """Ablates the next head."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        count = self.ablation.heads.shape[1]
        super().ablate([(layer, (head + 1) % count) for layer, head in heads], imputation, **keywords)


def test_off_by_one_hook_learns_which_head_it_ablates() -> None:
    with pytest.raises(AssertionError) as error:
        reproduce("locality", OffByOne, CASE)
    assert str(error.value) == (
        "OffByOne breaks locality (MUST): Up to and including the layer of the ablated head, the input of each "
        "projection equals its input in the clean run, except for the slice of the ablated head, which holds the "
        "imputed value.\n"
        "  likely cause: the head after the named one is ablated: heads are counted from another number than 0\n"
        "  found: head 0 of layer 1 should be ablated, but head 1 was changed\n"
        "  in: gpt2, layer 1 head 0, zero imputation\n"
        "  reproduce: from ablation.checks import Case, Decoder, reproduce\n"
        f"  reproduce('locality', OffByOne, {CASE!r})"
    )


def test_square_case_is_pointed_out() -> None:
    case = replace(CASE, rows=((3, 1, 4),))
    with pytest.raises(
        AssertionError, match=r"  note: the case has as many tokens as heads \(3\); with 4 tokens it fails"
    ):
        reproduce("locality", OffByOne, case)


class Silent(Ours):
    """Never fires."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        pass


def test_hook_that_never_fires_fails_the_smoke_check() -> None:
    what = "ablating layer 1 head 0 changed no logit: the hook ablates nothing, or elsewhere"
    with pytest.raises(AssertionError, match=what):
        reproduce("smoke", Silent, CASE)


class AfterProjection(Ours):
    """Replaces a slice of the projection's output."""

    def run(self, *args: Any, **inputs: Any) -> torch.Tensor:
        edits, self.ablation.edits = self.ablation.edits, {}
        handles = []
        for layer, heads in edits.items():
            found = self.ablation.heads.layer(layer)
            ablated = found.channels(heads[0].head)

            def hook(_: Any, args: Any, out: Any, channels: slice = ablated) -> Any:
                out = out.clone()
                out[..., channels] = 0
                return out

            handles.append(found.projection.register_forward_hook(hook))
        try:
            return super().run(*args, **inputs)
        finally:
            self.ablation.edits = edits
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("imputation", ["zero", "mean"])
def test_edit_after_the_projection_is_located(imputation: str) -> None:
    with pytest.raises(
        AssertionError, match="is unchanged at the projection, though the logits changed: the edit is downstream of it"
    ):
        reproduce("locality", AfterProjection, replace(CASE, imputation=imputation))
    with pytest.raises(AssertionError, match="holds 8 of 8 elements that are not 0"):
        reproduce("locality", Silent, CASE)


class LeavesLayerZero(Ours):
    """Ablates no head of layer 0."""

    def ablate(self, heads: Any, imputation: str, **keywords: Any) -> None:
        super().ablate([pair for pair in heads if pair[0] > 0], imputation, **keywords)


def test_head_that_is_left_out_is_not_an_edit_downstream() -> None:
    with pytest.raises(AssertionError, match="heads 1 and 2 of layer 0 .* holds 8 of 8 elements that are not 0"):
        reproduce("locality.sets", LeavesLayerZero, replace(CASE, heads=((1, 0), (0, 2), (0, 1))))


class Wrapping:
    """Ablates without a hook, in a `forward` of its own, which it does not remove."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.heads: Sequence[tuple[int, int]] = []
        self.imputation = as_imputation("zero")
        for layer in find_heads(model).layers:
            layer.projection.forward = partial(self.forward, layer, layer.projection.forward)  # type: ignore[assignment]

    def forward(self, layer: AttentionLayer, original: Any, z: torch.Tensor) -> torch.Tensor:
        out = z.clone()
        for head in [head for index, head in self.heads if index == layer.index]:
            site, channels = Site(layer.index, torch.full((len(z),), head), z.shape[1]), layer.channels(head)
            out[..., channels] = self.imputation(z[..., channels], site)
        return original(out)

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        self.heads, self.imputation = heads, as_imputation(imputation)

    def run(self, **inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(**inputs).logits

    def clear(self) -> None:
        self.heads = []

    def close(self) -> None:
        self.clear()


def test_inputs_are_recorded_below_a_replaced_forward() -> None:
    case = replace(CASE, decoder=GPT2._replace(family="llama"), imputation="mean")
    factory: Any = Wrapping
    for check in ("locality", "hygiene.user_hooks"):
        reproduce(check, factory, case)
    with pytest.raises(AssertionError, match=r"not as it was found: .*layers.0.self_attn.o_proj.forward"):
        reproduce("hygiene.restored", factory, case)


class Tidy(Ours):
    """Removes all hooks, the user's as well."""

    def close(self) -> None:
        super().close()
        for module in self.model.modules():
            module._forward_hooks.clear()


def test_removed_user_hook_is_named() -> None:
    with pytest.raises(AssertionError, match="not as it was found: the model._forward_hooks, "):
        reproduce("hygiene.user_hooks", Tidy, SMALLEST_CASE)


class Rounding(Ours):
    """Rounds differently from the model, with and without an ablation."""

    def run(self, *args: Any, **inputs: Any) -> torch.Tensor:
        return super().run(*args, **inputs) * (1 + 1e-6)


def test_effects_are_measured_from_the_own_clean_run() -> None:
    reproduce("oracle.unread_head", Rounding, SMALLEST_CASE)
    steps = (("open",), ("clear",), ("close",))
    reproduce("hygiene.lifecycle", Rounding, replace(SMALLEST_CASE, heads=(), steps=steps))
    with pytest.raises(AssertionError, match="the logits before anything is ablated should be identical"):
        reproduce("identity", Rounding, SMALLEST_CASE)


# ---- cases and messages


def test_case_describes_its_padding() -> None:
    case = Case(SMALLEST, rows=((3, 1), (4, 1), (5,)), heads=((0, 0),), side="left", pad=9)
    assert str(case) == "gpt2, layer 0 head 0, zero imputation, rows of 2, 2 and 1 tokens, padded on the left"
    assert case.inputs()["input_ids"].tolist() == [[3, 1], [4, 1], [9, 5]]
    assert str(replace(case, rows=((3, 1), (4, 1)))).endswith(", rows of 2 and 2 tokens")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_message_shows_a_difference_in_the_last_bit(dtype: torch.dtype) -> None:
    one = torch.ones(1, dtype=dtype) / 3
    with pytest.raises(AssertionError) as error:
        assert_identical(one, one * (1 + torch.finfo(dtype).eps), "a number")
    shown = re.search(r"is (\S+), should be (\S+)$", str(error.value))
    assert shown and shown[1] != shown[2]


class AsInTheDocs(Ours):
    """Passes the model's own default for the cache."""

    def run(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids, attention_mask=attention_mask, **inputs).logits


@pytest.mark.parametrize("check", ["identity", "locality"])
def test_cache_setting_is_the_same_for_bare_model_and_adapter(check: str) -> None:
    decoder = Decoder("mixtral", num_layers=1, num_heads=2, head_dim=8, attention="eager")
    reproduce(check, AsInTheDocs, Case(decoder, rows=((0,) * 8, (0,) * 8), heads=((0, 0),)))


# ---- what an adapter declares


class NoDoubles(Ours):
    """Does not claim one dtype."""

    unsupported: ClassVar[dict[str, str]] = {"float64": "never tried"}


def test_unsupported_dtype_is_not_drawn() -> None:
    drawn = []

    def record(factory: Any, case: Case) -> None:
        drawn.append(case.decoder.dtype)

    check = replace(next(check for check in CHECKS if check.id == "identity"), function=record)
    check(NoDoubles)
    assert set(drawn) == {"float32", "bfloat16"}
    check = replace(check, cases=CaseSpec(dtypes=("float64",)))
    assert check.skip_reason(NoDoubles) == "does not support 'float64': never tried"


class Inexact(Rounding):
    unsupported: ClassVar[dict[str, str]] = {"bit_identity": "it rounds"}


class Wrong(Inexact):
    def run(self, *args: Any, **inputs: Any) -> torch.Tensor:
        return super().run(*args, **inputs) * (1 + 1e-3)


def test_inexact_implementation_may_round_and_no_more() -> None:
    reproduce("identity", Inexact, SMALLEST_CASE)
    with pytest.raises(AssertionError, match="the logits before anything is ablated: "):
        reproduce("identity", Wrong, SMALLEST_CASE)


class WithoutGraph(Ours):
    def run(self, *args: Any, **inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return super().run(*args, **inputs)


def test_gradients_are_tried_only_if_run_returns_them() -> None:
    check = next(check for check in CHECKS if check.id == "gradients.zero")
    reason = "does not support 'gradients': the logits that run returns do not require gradients"
    assert check.skip_reason(WithoutGraph) == reason
    assert check.skip_reason(Ours) is None


@pytest.mark.parametrize("family", LAYOUTS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_cases_name_heads_that_the_decoder_has(family: str, data: Any) -> None:
    spec = CaseSpec(("zero", "values"), families=(family,), max_heads=4, min_layers=2)
    for case in (*spec.simplest(), data.draw(spec.strategy())):
        assert case.heads and set(case.heads) <= set(find_heads(case.decoder.shared()))
        assert case.decoder.heads() == list(find_heads(case.decoder.shared()))
        assert case.another_head() in case.decoder.heads()


class Unfinished:
    """Has none of the methods."""

    def __init__(self, model: Any) -> None:
        pass


def test_incomplete_adapter_learns_what_is_missing() -> None:
    factory: Any = Unfinished
    with pytest.raises(AssertionError, match="the adapter has no method ablate"):
        reproduce("smoke", factory, SMALLEST_CASE)


def test_incomplete_adapter_is_one_record() -> None:
    factory: Any = Unfinished
    first, *rest = check_implementation(factory, expected_failures={"smoke": "not written yet"})
    assert first == Record("smoke", "failed", "Unfinished: the adapter has no method ablate")
    assert [record.id for record in rest] == [check.id for check in CHECKS[1:]]
    assert {record.outcome for record in rest} == {"skipped"}


def test_expected_failures_must_name_checks() -> None:
    with pytest.raises(InvalidDeclaration, match="'oracle.zeros', which does not exist; did you mean 'oracle.zero'"):
        check_implementation(Ours, expected_failures={"oracle.zeros": "it is"})
    with pytest.raises(InvalidDeclaration, match="name 'xyz', which does not exist; `ablation check --list` lists"):
        check_implementation(Ours, expected_failures={"xyz": "it is"})
