"""How a run ends: one cause is named once, nothing but the user's interrupt is raised, and reports are short."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, settings
from torch import Tensor

from ablation.checks import CHECKS, Record, check_implementation, parametrize_with_checks, verdict
from ablation.checks.cases import Case
from ablation.checks.decoders import Decoder
from ablation.checks.runner import NOTHING_TRIED, STOPPED, UNUSABLE, CheckRun, works_with_some_model
from ablation.errors import InvalidDeclaration
from tests.implementations import ours


class Ours(ours.Ours):
    """Our hook with two imputations, to be quick."""

    imputations: ClassVar[tuple[str, ...]] = ("zero", "mean")


@pytest.fixture(autouse=True)
def examples() -> Iterator[None]:
    """No shrinking, and few examples."""
    profile = settings.get_current_profile_name()
    settings.register_profile("verdict", settings.get_profile("mutants"), max_examples=15, derandomize=True)
    settings.load_profile("verdict")
    yield
    settings.load_profile(profile)


def records_of(factory: Any, *ids: str) -> list[Record]:
    """Run some checks."""
    run = CheckRun(factory)
    return [run(check) for check in CHECKS if check.id in ids]


# ---- one cause of many failures


def test_likely_cause_of_several_failures_is_named_once() -> None:
    records = [
        Record("smoke", "passed"),
        *(
            Record(id, "failed", f"broken\n  likely cause: the next head\n  found: {id}")
            for id in ("locality", "identity")
        ),
        Record("oracle.zero", "failed", "broken\n  likely cause: another\n  found: x"),
        Record("oracle.mean", "failed", "broken\n  found: y"),
        Record("oracle.scale", "expected failure", "\n  likely cause: another"),
    ]
    first, second, *_ = verdict(Ours, records)
    assert first == "2 of the 4 failures have one likely cause: the next head"
    assert second.startswith("1 of 6 requirements hold")


class WithoutFamily(Ours):
    """Cannot be made from one family, and does not say so."""

    family = "llama"

    def __init__(self, model: Any) -> None:
        if model.config.model_type == self.family:
            raise LookupError(f"no {self.family}")
        super().__init__(model)


class WithoutDtype(Ours):
    """Cannot run in one dtype, and does not say so."""

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        if self.model.dtype == torch.bfloat16:
            raise LookupError("no bfloat16")
        return super().run(*args, **inputs)


class WithoutBoth(WithoutFamily, WithoutDtype):
    """Supports neither."""


class WrongMean(Ours):
    """Takes zero for the mean."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        super().ablate(heads, "zero" if imputation == "mean" else imputation, **keywords)


class IgnoresPadding(Ours):
    """Refuses a mask with zeros."""

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        if attention_mask is not None and not attention_mask.all():
            raise LookupError("no padding")
        return super().run(input_ids, attention_mask, **inputs)


@pytest.mark.parametrize(
    ("factory", "ids", "features", "gone"),
    [
        (WithoutFamily, ["locality", "oracle.zero", "oracle.mean"], "'llama': ...", 3),
        (type("NoGPT2", (WithoutFamily,), {"family": "gpt2"}), ["locality", "oracle.zero", "oracle.numpy"],
         "'gpt2': ...", 3),
        (WithoutDtype, ["identity", "locality", "independence.head_order"], "'bfloat16': ...", 3),
        (WithoutBoth, ["locality", "locality.sets", "oracle.zero", "oracle.mean"], "'llama': ..., 'bfloat16': ...", 4),
        (WrongMean, ["locality", "oracle.mean", "oracle.mean_sets"], "'mean': ...", 3),
        (IgnoresPadding, ["identity.padded", "locality.padded", "hygiene.global_state"], "'padding': ...", 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_verdict_names_the_cause_that_failures_share(factory: Any, ids: list[str], features: str, gone: int) -> None:
    records = records_of(factory, *ids)
    assert {record.outcome for record in records} == {"failed"}
    first, second, *_ = [line for line in verdict(factory, records) if "have one likely cause" not in line]
    named = re.fullmatch(r"if you declare unsupported = {(.*)}, (\d) of the (\d) failures go away", first)
    assert named and set(named[1].split(", ")) == set(features.split(", "))
    assert (int(named[2]), int(named[3])) == (gone, len(ids))
    assert second == f"0 of {len(ids)} requirements hold; {len(CHECKS) - len(ids)} were not run"


class OneFamilyAndALayout(WithoutFamily):
    """Supports a family and a layout, and cannot be made from the family."""

    family = "gpt2"
    families: ClassVar[tuple[str, ...]] = ("gpt2", "gemma3")


class OneFamilyAndAHybrid(OneFamilyAndALayout):
    """The other family has no heads in its first layer."""

    families: ClassVar[tuple[str, ...]] = ("gpt2", "lfm2")


class OneDtype(WithoutDtype):
    """Runs in one other dtype, which half of the families do not support."""

    unsupported: ClassVar[dict[str, str]] = {"float32": "not tried"}


def failed(decoder: Decoder, *ids: str, **changes: Any) -> list[Record]:
    case = replace(Case(decoder, ((3, 1, 4, 1),), ((1, 0),)), **changes)
    return [Record(id, "failed", "broken", case) for id in ids]


@pytest.mark.parametrize("factory", [OneFamilyAndALayout, OneFamilyAndAHybrid])
def test_family_is_exchanged_for_a_layout(factory: Any) -> None:
    first, *_ = verdict(factory, failed(Decoder("gpt2", 2, 3, 8), "locality", "oracle.zero"))
    assert first == "if you declare unsupported = {'gpt2': ...}, 2 of the 2 failures go away"


def test_family_that_nothing_replaces_is_no_cause() -> None:
    records = failed(Decoder("gpt2", 2, 3, 8), "locality", "oracle.zero", heads=((0, 0),))  # lfm2 has no such head
    first, *_ = verdict(OneFamilyAndAHybrid, records)
    assert first.startswith("0 of 2 requirements hold")


def test_layout_is_exchanged_for_a_family() -> None:
    no_layout = type("NoLayout", (WithoutFamily,), {"family": "gemma3_text"})
    records = failed(Decoder("gemma3", 2, 4, 8, 2), "layouts.sliding_window", "locality", "oracle.zero")
    first, *_ = verdict(no_layout, records)
    assert first == "if you declare unsupported = {'gemma3': ...}, 3 of the 3 failures go away"


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_dtype_is_exchanged_if_another_is_left(family: str) -> None:
    records = failed(Decoder(family, 2, 3, 8, dtype="bfloat16"), "locality", "locality.sets")
    first, *_ = verdict(OneDtype, records)
    found = first == "if you declare unsupported = {'bfloat16': ...}, 2 of the 2 failures go away"
    assert found == (family == "gpt2")


class NextHead(Ours):
    """Ablates the next head."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        count = self.ablation.heads.shape[1]
        super().ablate([(layer, (head + 1) % count) for layer, head in heads], imputation, **keywords)


class OnlyZeroAndWrong(NextHead):
    """Offers one imputation: without it, no check could be tried."""

    unsupported: ClassVar[dict[str, str]] = {"mean": "not implemented"}


@pytest.mark.parametrize("factory", [NextHead, OnlyZeroAndWrong])
def test_verdict_names_no_feature_for_a_general_bug(factory: Any) -> None:
    ids = ("locality", "locality.sets", "oracle.zero", "oracle.zero_deep", "refusal.head")
    first, second, *_ = verdict(factory, records_of(factory, *ids))
    assert re.match(r"\d of the 5 failures have one likely cause: the head after the named one is ablated", first)
    assert second.endswith("were not run")


def test_verdict_on_a_correct_implementation_has_one_line() -> None:
    count = len(CHECKS)
    passed = [Record(check.id, "passed") for check in CHECKS]
    assert verdict(Ours, passed) == [f"{count} of {count} requirements hold"]
    assert verdict(Ours, []) == []


# ---- an adapter that works with no model


class Silent(Ours):
    """Ablates nothing."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        pass


def test_broken_adapter_stops_after_the_first_failure() -> None:
    first, *rest = check_implementation(Silent)
    assert first.outcome == "failed" and "changed no logit" in first.reason
    assert rest == [Record(check.id, "skipped", STOPPED) for check in CHECKS[1:]]
    assert verdict(Silent, [first, *rest]) == [
        f"0 of {len(CHECKS)} requirements hold",
        "broken: smoke",
        f"not tried: {len(CHECKS) - 1} checks ({STOPPED})",
    ]


def test_adapter_that_works_with_some_model_is_not_stopped() -> None:
    for factory in (WithoutFamily, type("NoGPT2", (WithoutFamily,), {"family": "gpt2"}), WrongMean, NextHead):
        assert works_with_some_model(factory)
    records = records_of(WithoutFamily, "locality", "oracle.zero")
    assert [record.outcome for record in records] == ["failed", "failed"]


def test_broken_adapter_is_not_stopped_if_that_is_expected() -> None:
    run = CheckRun(Silent, {"smoke": "not written yet"})
    outcomes = [run(check).outcome for check in CHECKS if check.id in ("smoke", "locality", "oracle.zero")]
    assert outcomes == ["expected failure", "failed", "failed"]


# ---- nothing is raised, and failures are short


class Strange(Exception):
    """Cannot be printed."""

    def __str__(self) -> str:
        raise ValueError("no text")


RAISED: dict[str, Callable[[], Any]] = {
    "an error": lambda: _raise(RuntimeError("broken\n" * 1000)),
    "a failed assertion": lambda: _raise(AssertionError()),
    "SystemExit": lambda: _raise(SystemExit(3)),
    "GeneratorExit": lambda: _raise(GeneratorExit()),
    "a group": lambda: _raise(BaseExceptionGroup("several", [ValueError("one"), SystemExit(2)])),
    "a skip": lambda: pytest.skip("not today"),
    "a false assumption": lambda: assume(False),
    "an error without a text": lambda: _raise(Strange()),
}


def _raise(error: BaseException) -> None:
    raise error


METHODS = ("__init__", "ablate", "run", "clear", "close")


def raising(method: str, fail: Callable[[], Any]) -> Any:
    """Return an adapter that raises in one of its methods."""
    return type("Raises", (Ours,), {method: lambda self, *args, **inputs: fail()})


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("method", METHODS)
def test_adapter_that_raises_is_one_short_failure(method: str, what: str) -> None:
    settings.load_profile("default")  # of hypothesis, as in a plain script; `examples` restores the profile
    first, *rest = check_implementation(raising(method, RAISED[what]))
    assert first.outcome == "failed" and {record.outcome for record in rest} == {"skipped"}
    assert first.reason.startswith("Raises breaks smoke (MUST): ") and "found: it raised " in first.reason
    assert len(first.reason) < 2500 and len(first.reason.splitlines()) < 8
    assert "hypothesis" not in first.reason and "Traceback" not in first.reason


@pytest.mark.parametrize("what", ["an error", "SystemExit", "a group"])
@pytest.mark.parametrize("check", ["locality", "hygiene.exception", "hygiene.lifecycle", "refusal.no_side_effect"])
def test_each_kind_of_check_catches_what_an_adapter_raises(check: str, what: str) -> None:
    (record,) = records_of(raising("run", RAISED[what]), check)
    assert record.outcome == "failed" and record.reason.startswith(f"Raises breaks {check} (")
    assert "it raised " in record.reason and len(record.reason.splitlines()) < 8


@pytest.mark.parametrize("method", METHODS)
def test_interrupt_by_the_user_propagates(method: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        check_implementation(raising(method, RAISED_INTERRUPT))


def RAISED_INTERRUPT() -> None:  # noqa: N802
    raise KeyboardInterrupt


class SeveralBugs(Ours):
    """Raises one error for short prompts, another for long ones."""

    def run(self, input_ids: Tensor, *args: Any, **inputs: Any) -> Tensor:
        if input_ids.shape[1] < 4:
            raise LookupError("too short")
        if input_ids.shape[1] > 5:
            raise ArithmeticError("too long")
        return super().run(input_ids, *args, **inputs)


def test_several_bugs_are_one_failure() -> None:
    settings.load_profile("default")
    (record,) = records_of(SeveralBugs, "oracle.zero")
    assert record.outcome == "failed" and record.reason.count("found: it raised") == 1


def test_wrong_adapter_is_one_record() -> None:
    class HasNoClose(Ours):
        close = None  # type: ignore[assignment]

    misspelt = type("Misspelt", (Ours,), {"unsupported": {"means": "not written"}})
    listed = type("Listed", (Ours,), {"unsupported": ["mean"]})
    for factory, problem in (
        (HasNoClose, "the adapter has no method close"),
        (misspelt, "Misspelt: `unsupported` names 'means', which does not exist; did you mean 'mean'?"),
        (listed, "Listed: `unsupported` is a list, but should be a dict, name: reason"),
    ):
        first, *rest = check_implementation(factory)
        assert first.outcome == "failed" and first.reason.endswith(problem) and "\n" not in first.reason
        assert rest == [Record(check.id, "skipped", UNUSABLE) for check in CHECKS[1:]]


@pytest.mark.parametrize(("name", "meant"), [("Qwen3", "qwen3"), ("bf16", "bfloat16"), ("paddings", "padding")])
def test_misspelt_declaration_is_corrected(name: str, meant: str) -> None:
    factory = type("Misspelt", (Ours,), {"unsupported": {name: "?"}})
    with pytest.raises(InvalidDeclaration, match=f"did you mean '{meant}'"):
        parametrize_with_checks(factory)


def test_progress_is_called_with_each_record() -> None:
    seen: list[Record] = []
    assert check_implementation(Silent, progress=seen.append) == seen


# ---- a run that tests nothing


class OffersNothing(Ours):
    """Declares both imputations as unsupported."""

    unsupported: ClassVar[dict[str, str]] = {"zero": "another imputation", "mean": "another imputation"}


def test_parametrised_tests_that_would_test_nothing_are_an_error() -> None:
    with pytest.raises(InvalidDeclaration, match=f"OffersNothing: {NOTHING_TRIED}"):
        parametrize_with_checks(Ours, OffersNothing)
