"""What an adapter declares: its imputations, positions and unsupported features. Checks ask for nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from transformers import GPT2Config

from ablation.checks import CHECKS, Case, Decoder, Record, check_implementation, reproduce
from ablation.checks.cases import CaseSpec, with_factor
from ablation.checks.check import offered_imputations, unsupported_features
from ablation.checks.decoders import ALL_FAMILIES, DTYPES
from ablation.checks.imputed import frozen_values
from ablation.checks.protocol import FROM_REFERENCE, IMPUTATIONS, KEYWORDS
from ablation.checks.runner import NOTHING_TRIED
from ablation.checks.signature import signature_problem
from ablation.errors import InvalidDeclaration
from tests.implementations.ours import Ours
from tests.implementations.surgery import Surgery
from tests.mutants.correct_variants import Flip
from tests.mutants.everything import Everything
from tests.mutants.reference import Reference

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
PADDED = Case(GPT2, rows=((3, 1, 4, 1), (5, 9)), heads=((1, 0),), side="left", pad=9)

# ---- unsupported features


class Misspelt(Ours):
    """Declares a feature that does not exist."""

    unsupported: ClassVar[dict[str, str]] = {"meen": "not written"}


def test_unknown_declaration_is_an_error() -> None:
    reason = "`unsupported` names 'meen', which does not exist; did you mean 'mean'"
    with pytest.raises(InvalidDeclaration, match=reason):
        CHECKS[0].skip_reason(Misspelt)
    unlike = type("Unlike", (Ours,), {"unsupported": {"xyz": "not written"}})
    with pytest.raises(
        InvalidDeclaration, match="names 'xyz', which does not exist; there are zero, mean, channel-mean"
    ):
        CHECKS[0].skip_reason(unlike)


class OffersNothing(Ours):
    """Declares both imputations as unsupported."""

    imputations: ClassVar[tuple[str, ...]] = ("zero", "mean")
    unsupported: ClassVar[dict[str, str]] = {"zero": "another imputation", "mean": "another imputation"}


@pytest.mark.parametrize("expected", [{}, {"smoke": "known"}], ids=["not expected", "expected"])
def test_run_that_tries_no_check_is_no_success(expected: dict[str, str]) -> None:
    first, *rest = check_implementation(OffersNothing, expected_failures=expected)
    assert first == Record("smoke", "failed", NOTHING_TRIED)
    assert {record.outcome for record in rest} == {"skipped"}


# ---- imputations


class FlipsTwoHeads(Flip):
    """Reverses the next head, too."""

    def targets(self, layer: int) -> list[int]:
        return [head for of in super().targets(layer) for head in (of, (of + 1) % self.num_heads())]


def test_own_imputation_runs_the_general_checks() -> None:
    tried = {check.id for check in CHECKS if not check.skip_reason(Flip)}
    general = {"smoke", "identity", "locality", "locality.padded", "independence.padding", "independence.head_order"}
    assert general | {"oracle.unread_head", "hygiene.restored", "hygiene.lifecycle", "refusal.head"} <= tried
    assert not tried & {"oracle.zero", "oracle.numpy", "oracle.values", "independence.cache", "positions"}
    assert next(check for check in CHECKS if check.id == "oracle.mean").skip_reason(Flip) == "offers only flip"


def test_own_imputation_must_not_change_other_heads() -> None:
    case = replace(PADDED, imputation="flip")
    reproduce("locality.padded", Flip, case)
    with pytest.raises(AssertionError, match="head 0 of layer 1 should be ablated, but head 1 was changed"):
        reproduce("locality.padded", FlipsTwoHeads, case)


@pytest.mark.parametrize(
    ("imputations", "problem"),
    [
        ("zero", "`imputations` is 'zero', but should be a tuple of names"),
        (("zero", None), r"`imputations` is \('zero', None\), but should be"),
        (("zero", "zero"), "names an imputation twice"),
        (("channel_mean",), "names 'channel_mean', which does not exist; did you mean 'channel-mean'"),
        (("Zero",), "did you mean 'zero'"),
        (("zeros",), "did you mean 'zero'"),
        (("scale:0.5",), "did you mean 'scale'"),
    ],
)
def test_wrong_imputations_are_an_invalid_declaration(imputations: Any, problem: str) -> None:
    factory: Any = type("Misnamed", (Reference,), {"imputations": imputations})
    with pytest.raises(InvalidDeclaration, match=problem):
        offered_imputations(factory)


def test_unnamed_imputations_are_zero_and_mean() -> None:
    assert offered_imputations(Reference) == ("zero", "mean")
    assert offered_imputations(Surgery) == ("zero", "scale", "reference-mean")
    assert offered_imputations(Everything) == tuple(IMPUTATIONS)
    fewer: Any = type("Fewer", (Everything,), {"unsupported": {"values": "not written", "positions": "not tested"}})
    assert "values" not in offered_imputations(fewer)
    reasons = {check.id: check.skip_reason(fewer) for check in CHECKS}
    assert reasons["oracle.values"] == "does not support 'values': not written"
    assert reasons["positions"] == "does not support 'positions': not tested"
    reasons = {check.id: check.skip_reason(Reference) for check in CHECKS}
    assert reasons["oracle.values"] == reasons["reference.clean"] == "offers only zero, mean"
    assert reasons["positions.cache"] == "`ablate` has no parameter `positions`"
    assert unsupported_features(Everything) == {}


# ---- families


class OnlyGPT2(Reference):
    families = ("gpt2",)


def test_families_that_are_not_named_are_left_out() -> None:
    assert unsupported_features(OnlyGPT2).keys() - IMPUTATIONS.keys() - {"positions"} == set(ALL_FAMILIES) - {"gpt2"}
    reasons = {check.id: check.skip_reason(OnlyGPT2) for check in CHECKS}
    assert reasons["smoke"] is reasons["oracle.numpy"] is None
    assert reasons["layouts.sliding_window"] == "needs gemma3; supports only gpt2"
    assert reasons["locality.non_finite"] == "needs llama or qwen3 or opt or mixtral; supports only gpt2"
    fewer: Any = type("Fewer", (OnlyGPT2,), {"unsupported": {"lfm2": "it has no attention"}})
    assert unsupported_features(fewer)["lfm2"] == "it has no attention"


@pytest.mark.parametrize(
    ("families", "problem"),
    [
        ("gpt2", "`families` is 'gpt2', but should be a tuple of names"),
        ((), r"`families` is \(\), but should be a tuple of names"),
        ((GPT2Config,), "`families` is .*, but should be a tuple of names"),
        (("gpt-2",), "`families` names 'gpt-2', which does not exist; did you mean 'gpt2'"),
        (("pythia",), "`families` names 'pythia', which does not exist; there are gpt2, llama, "),
    ],
)
def test_wrong_families_are_an_invalid_declaration(families: Any, problem: str) -> None:
    factory: Any = type("Misnamed", (Reference,), {"families": families})
    with pytest.raises(InvalidDeclaration, match=problem):
        unsupported_features(factory)


# ---- reasons


def test_reason_names_only_what_leaves_no_case() -> None:
    """`locality.non_finite` needs one imputation of several, and a family without GPT-2's mask."""
    fewer: Any = type("Fewer", (OnlyGPT2,), {"unsupported": {"mean": "not written"}})
    reasons = {check.id: check.skip_reason(fewer) for check in CHECKS}
    assert reasons["locality.non_finite"] == "needs llama or qwen3 or opt or mixtral; supports only gpt2"
    assert reasons["oracle.mean"] == "does not support 'mean': not written"


def test_reason_that_features_share_is_given_once() -> None:
    dtypes = dict.fromkeys(DTYPES, "never tried")
    fewer: Any = type("Fewer", (Reference,), {"unsupported": dtypes})
    reasons = {check.id: check.skip_reason(fewer) for check in CHECKS}
    assert reasons["smoke"] == "does not support 'float32': never tried"
    assert reasons["locality.non_finite"] == "does not support 'float32', 'float64': never tried"


# ---- signatures


class TakesNoValues(Ours):
    def ablate(self, heads: Any, imputation: str, *, reference: Any = None) -> None:  # type: ignore[override]
        pass


class TakesNoReference(Ours):
    def ablate(self, heads: Any, imputation: str, *, values: Any = None, positions: Any = None) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("factory", "call"),
    [
        (TakesNoValues, "ablate(heads, imputation, values=...)"),
        (TakesNoReference, "ablate(heads, imputation, reference=..., positions=...)"),
    ],
)
def test_imputation_needs_its_keyword_in_the_signature(factory: Any, call: str) -> None:
    problem = signature_problem(factory)
    assert problem is not None and problem.startswith(f"ablate cannot be called as {call}: ")


class Notes(Everything):
    """Notes the keywords that it is given, by imputation."""

    given: ClassVar[dict[str, set[frozenset[str]]]] = {}

    def ablate(self, heads: Any, imputation: str, *, positions: Any = None, **keywords: Any) -> None:
        at = set() if positions is None else {"positions"}
        kind = imputation.partition(":")[0] if isinstance(imputation, str) else ""
        self.given.setdefault(kind, set()).add(frozenset(keywords.keys() | at))
        super().ablate(heads, imputation, positions=positions, **keywords)


@pytest.mark.parametrize("check", ["locality", "positions", "independence.earlier_runs", "refusal.no_side_effect"])
def test_checks_pass_only_the_keywords_that_a_case_needs(check: str) -> None:
    for name in IMPUTATIONS:
        Notes.given.clear()
        positions = (1, -1) if check == "positions" else None
        rows = PADDED.rows[:1]
        reproduce(check, Notes, replace(PADDED, rows=rows, imputation=with_factor(name), positions=positions))
        needed = {KEYWORDS[name]} if name in KEYWORDS else set()
        assert Notes.given.pop(name) == {frozenset(needed | ({"positions"} if positions else set()))}
        assert set().union(*Notes.given.values()) <= {frozenset()}, "another imputation needs none"


# ---- cases


@pytest.mark.parametrize("name", IMPUTATIONS)
def test_case_can_be_made_from_its_short_repr(name: str) -> None:
    spec = CaseSpec((name,), max_rows=3, ragged=True, positions=True)
    for case in spec.simplest():
        assert eval(repr(case), {"Case": Case, "Decoder": Decoder}) == case  # noqa: S307 (our own)
        assert len(repr(case)) < 500


def test_values_have_the_dtype_and_positions_of_the_case() -> None:
    case = replace(PADDED, imputation="values", decoder=GPT2._replace(dtype="bfloat16"))
    (constant, by_position) = (replace(case, by_position=by).keywords()["values"] for by in (False, True))
    assert constant.keys() == by_position.keys() == set(GPT2.heads())
    assert {(v.dtype, v.shape) for v in constant.values()} == {(torch.bfloat16, (2,))}
    assert {(v.dtype, v.shape) for v in by_position.values()} == {(torch.bfloat16, (4, 2))}
    longer = replace(case, rows=(*case.rows, (1,) * 7), by_position=True).keywords()["values"]
    assert all(torch.equal(longer[pair][:4], by_position[pair]) for pair in longer), "the same for a longer batch"
    assert len({tuple(v.flatten().tolist()) for v in by_position.values()}) == len(by_position)


def test_reference_is_padded_only_if_the_case_is() -> None:
    for name in FROM_REFERENCE:
        case = replace(PADDED, imputation=name)
        masks = [batch["attention_mask"] for batch in case.keywords()["reference"]]
        assert not all(mask.all() for mask in masks) and max(map(len, masks)) == 2
        alone = replace(case, rows=case.rows[:1])
        assert all(mask.all() and len(mask) == 1 for mask in (b["attention_mask"] for b in alone.reference()))
    (batch,) = replace(PADDED, imputation="resample").reference()
    assert torch.equal(batch["attention_mask"], PADDED.inputs()["attention_mask"])
    assert not (batch["input_ids"] == PADDED.inputs()["input_ids"]).any()


def test_positions_of_a_case_do_not_count_padding() -> None:
    case = replace(PADDED, positions=(0, -1))
    assert case.replaced().tolist() == [[True, False, False, True], [False, False, True, True]]
    assert replace(case, side="right").replaced().tolist()[1] == [True, True, False, False]
    assert replace(case, positions=(-2,)).replaced().tolist()[1] == [False, False, True, False]
    assert str(case) == (
        "gpt2, layer 1 head 0, zero imputation at positions 0, -1, rows of 4 and 2 tokens, padded on the left"
    )


def test_frozen_values_are_those_of_each_tokens_position() -> None:
    case = replace(PADDED, imputation="values", by_position=True)
    values, frozen = case.values()[1, 0].double(), frozen_values(case, case.model())[1, 0]
    assert torch.equal(frozen[0], values) and torch.equal(frozen[1, 2:], values[:2])
    case = replace(case, imputation="reference-mean-by-position", by_position=False)
    own = replace(case, imputation="resample")
    z = frozen_values(own, case.model())[1, 0]
    assert z.shape == (2, 4, 2) and frozen_values(replace(case, imputation="mean"), case.model()) == {}
    by_position = frozen_values(case, case.model())[1, 0]
    assert torch.equal(by_position[0, :2], by_position[1, 2:]), "rows share the values of a position"
