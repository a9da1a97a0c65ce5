"""A likely cause is named only if the failing check can show it, and finding it has no side effects."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ablation.checks import CHECKS, adapter_from_function, causes
from ablation.checks.cases import Case
from ablation.checks.causes.conditions import NO_HOOK, NOT_CALLED, no_effect
from ablation.checks.causes.diagnosis import diagnosis
from ablation.checks.causes.histories import EARLIER, History
from ablation.checks.causes.surroundings import RESTARTED, decoded
from ablation.checks.check import Check, CheckFailure
from ablation.checks.decoders import Decoder
from ablation.checks.observe import changes, state
from ablation.checks.on_model.own_model import OwnModel
from ablation.checks.protocol import CACHE, FROM_REFERENCE
from ablation.heads import AttentionLayer, find_heads
from tests.implementations.ours import Ours
from tests.mutants.imputations import ReferenceAblated, ValuesRestart
from tests.test_causes_of_edits import hooked

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=8)
PROMPT = (3, 14, 15, 9, 26, 5)
CHECK = {check.id: check for check in CHECKS}


class LeavesAHook(Ours):
    """Ablates as it should, so that all experiments of a check are tried, and leaves a hook."""

    imputations: ClassVar[tuple[str, ...]] = ("zero", "mean")

    def close(self) -> None:
        super().close()
        self.model.register_forward_hook(lambda *_: None)


# ---- side effects


ALTERED = ("hygiene.restored", "hygiene.user_hooks", "gradients.zero", "independence.other_models")


@pytest.mark.parametrize("id", [pytest.param(id, marks=() if id in ALTERED else pytest.mark.slow) for id in CHECK])
def test_diagnosis_leaves_the_users_model_as_found(id: str) -> None:
    model = GPT2.fresh()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.full_like(parameter, number) if number % 3 else None
    mine = OwnModel(model, "mine", [PROMPT])
    before = state(model)
    rows = (PROMPT, PROMPT[:4]) if "padded" in id else (PROMPT,)
    diagnosis(LeavesAHook, CHECK[id], mine.case(rows, heads=((1, 0),)), AssertionError("a finding"))
    assert not changes(model, before)


# ---- inputs


def replaced_by(value: float, model: Any, heads: Sequence[tuple[int, int]], inputs: dict[str, Any]) -> Tensor:
    """Run a model with z replaced by a number that no imputation gives."""

    def edit(z: Tensor, layer: AttentionLayer, named: Sequence[int]) -> None:
        for head in named:
            z[..., layer.channels(head)] = value

    with hooked(model, heads, edit):
        logits: Tensor = model(**{"use_cache": False} | inputs).logits
    return logits


def ids_only(model: Any, input_ids: Tensor, heads: Any) -> Tensor:
    return replaced_by(0.123, model, heads, {"input_ids": input_ids})


def ids_and_mask(model: Any, input_ids: Tensor, attention_mask: Tensor, heads: Any) -> Tensor:
    return replaced_by(0.123, model, heads, {"input_ids": input_ids, "attention_mask": attention_mask})


def without_cache(
    model: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, heads: Any, use_cache: bool = False
) -> Tensor:
    inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
    return replaced_by(0.123, model, heads, {"input_ids": input_ids, **inputs})


def all_inputs(model: Any, heads: Any, **inputs: Any) -> Tensor:
    return replaced_by(0.123, model, heads, inputs)


def one_head(model: Any, layer: int, head: int, **inputs: Any) -> Tensor:
    return replaced_by(0.123, model, [(layer, head)], inputs)


def failures(factory: Any, check: Check) -> list[CheckFailure]:
    """Return how a check fails in its simplest cases."""
    found = []
    if check.skip_reason(factory) is None:
        for case in check.cases_for(factory).simplest():
            try:
                check.run_case(factory, case)
            except CheckFailure as failure:
                found.append(failure)
    return found


REFUSALS = ("heads are not validated", "are not checked, or not before the forward pass")
"""What else is wrong with these functions."""
INPUTS = ("smoke", "identity", "locality", "locality.padded", "independence.padding", "independence.cache")


@pytest.mark.parametrize("id", [pytest.param(id, marks=() if id in INPUTS else pytest.mark.mutants) for id in CHECK])
@pytest.mark.parametrize("function", [ids_only, ids_and_mask, without_cache, all_inputs, one_head])
def test_wrong_value_is_not_blamed_on_an_input(function: Any, id: str) -> None:
    factory = adapter_from_function(function)
    found = failures(factory, CHECK[id])
    assert found or id not in ("locality", "oracle.zero")
    for failure in found:
        cause = diagnosis(factory, CHECK[id], failure.case, failure.error)
        assert cause is None or cause.endswith(REFUSALS), cause


def loses(*names: str) -> Any:
    """Return a right adapter that does not pass some inputs on to the model."""

    class Loses(Ours):
        imputations: ClassVar[tuple[str, ...]] = ("zero",)

        def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
            given = {"attention_mask": attention_mask, **inputs}
            return super().run(input_ids, **{name: value for name, value in given.items() if name not in names})

    return Loses


@pytest.mark.parametrize(
    ("names", "id", "lost"),
    [
        (("attention_mask",), "identity.padded", "the attention mask is"),
        (("attention_mask", "position_ids"), "locality.padded", "the attention mask and the position ids are"),
        (("position_ids",), "identity.padded", "the position ids are"),
        (("attention_mask", "position_ids"), "identity.padded", "the attention mask and the position ids are"),
        ((CACHE,), "identity", "the key/value cache is"),
        ((CACHE, "attention_mask"), "identity", "the key/value cache is"),
        ((CACHE, "attention_mask", "position_ids", "use_cache"), "identity", "the key/value cache is"),
    ],
)
def test_input_that_is_lost_is_named(names: tuple[str, ...], id: str, lost: str) -> None:
    rows = ((3, 1, 4, 1, 5), (9, 2, 6)) if "padded" in id else (PROMPT,)
    case = Case(GPT2, rows, ((1, 0),), side="left")
    assert diagnosis(loses(*names), CHECK[id], case) == f"{lost} not passed on to the model"
    assert diagnosis(loses(*names), CHECK["smoke"], case) is None


# ---- a reference


class Adds(Ours):
    """Adds to the heads of earlier calls; the reference is measured on clean runs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.sets: list[tuple[int, int]] = []

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        self.sets = sorted({*self.sets, *heads})
        super().ablate(self.sets, imputation, **keywords)


class Drifts(Ours):
    """Adds the number of earlier calls of `ablate` to the logits."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        super().ablate(heads, imputation, **keywords)
        self.calls = getattr(self, "calls", 0) + 1

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        return super().run(*args, **inputs) + max(0, self.calls - 1)


ADDS, ABLATED = "each call adds to them", "the reference is measured while the previous heads are still ablated"


@pytest.mark.parametrize(
    ("factory", "names", "cause"),
    [
        (Adds, FROM_REFERENCE, ADDS),
        # Resample puts back the z of the reference, so nothing changes in its runs.
        (ReferenceAblated, ("reference-mean", "reference-mean-by-position"), ABLATED),
        (Drifts, FROM_REFERENCE, ""),
    ],
)
def test_cause_of_an_unclean_reference_is_told_apart(factory: Any, names: tuple[str, ...], cause: str) -> None:
    check = CHECK["reference.clean"]
    cases = [case for case in check.cases_for(factory).simplest() if case.kind in names]
    assert len(cases) == len(names)
    for case in cases:
        with pytest.raises(CheckFailure) as failure:
            check.run_case(factory, case)
        found = diagnosis(factory, check, case, failure.value.error)
        assert (found or "").endswith(cause) and bool(found) == bool(cause)


# ---- decoding with a cache


class FirstPassOnly(Ours):
    """Ablates nothing in passes that follow a cache."""

    def ablate(self, *args: Any, **keywords: Any) -> None:
        self.again = partial(super().ablate, *args, **keywords)
        self.again()

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        if CACHE not in inputs or not inputs[CACHE].get_seq_length():
            return super().run(*args, **inputs)
        self.clear()
        logits = super().run(*args, **inputs)
        self.again()
        return logits


DECODED = {f"{case.imputation} {case.by_position}": case for case in CHECK["independence.cache"].cases.simplest()}


@pytest.mark.parametrize("case", DECODED.values(), ids=DECODED)
def test_pass_that_is_not_ablated_is_named(case: Case) -> None:
    for rows in (case.rows, (PROMPT, PROMPT[:4])):
        found = decoded(History(FirstPassOnly, replace(case, rows=rows, side="left")))
        assert found == "nothing is ablated in passes that follow a cache"


@pytest.mark.parametrize("name", ["values True", "reference-mean-by-position False"])
def test_position_that_restarts_is_named(name: str) -> None:
    case = DECODED[name]
    for rows in (case.rows, (PROMPT, PROMPT[:4])):
        assert decoded(History(ValuesRestart, replace(case, rows=rows, side="left"))) == RESTARTED


# ---- nothing is ablated


class NanInPadding(Ours):
    """Gives NaN in padding, whose logits mean nothing."""

    imputations: ClassVar[tuple[str, ...]] = ("zero", "mean")

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        logits = super().run(input_ids, attention_mask, **inputs)
        return logits if attention_mask is None else logits.masked_fill(attention_mask[..., None] == 0, float("nan"))


class Noisy:
    """Ablates nothing, and rounds differently in each run."""

    def __init__(self, model: Any) -> None:
        self.model, self.noise = model, 2**-22

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None: ...

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        self.noise = -self.noise
        logits: Tensor = self.model(input_ids, attention_mask=attention_mask, **inputs).logits * (1 + self.noise)
        return logits if attention_mask is None else logits.masked_fill(attention_mask[..., None] == 0, float("nan"))

    def clear(self) -> None: ...

    def close(self) -> None: ...


class FromSecondRun(Ours):
    """Registers its hooks after the first run."""

    waiting: Any = None

    def ablate(self, *args: Any, **keywords: Any) -> None:
        self.waiting = partial(super().ablate, *args, **keywords)

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        logits = super().run(*args, **inputs).clone()
        if self.waiting:
            self.waiting()
        return logits


PADDED = Case(GPT2, ((3, 1, 4, 1, 5), (9, 2, 6)), ((1, 0),))


def test_first_run_is_compared_as_the_checks_compare() -> None:
    assert no_effect(Noisy, PADDED) == NO_HOOK
    found = no_effect(FromSecondRun, PADDED)
    assert found and "only from the second run on" in found


@pytest.mark.parametrize("experiment", EARLIER, ids=lambda each: each.__name__)
def test_nan_in_padding_is_no_cause(experiment: Any) -> None:
    assert experiment(History(NanInPadding, PADDED)) is None


class UncalledHere(Noisy):
    """Hooks a module that is never called in the layer of the head, and other modules in the other layers."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        for layer in find_heads(self.model).layers:
            module = layer.block
            if layer.index == heads[0][0]:
                module = layer.block.never = torch.nn.Identity()
            module.register_forward_hook(lambda *_: None)


class OnTheModel(Noisy):
    """Hooks the model as a whole, which does nothing."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        self.model.register_forward_hook(lambda *_: None)


def test_hook_on_the_whole_model_is_called() -> None:
    assert (no_effect(OnTheModel, PADDED) or "").startswith("the hook on the model is called")


def test_hook_that_is_never_called_is_named() -> None:
    assert no_effect(UncalledHere, PADDED) == NOT_CALLED.format("transformer.h.1.never")


# ---- devices

MAKERS = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")


def made_without_device(source: str) -> list[str]:
    """Return the calls of torch that make a tensor and do not say on which device."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in MAKERS
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]


@pytest.mark.parametrize("path", sorted(Path(causes.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_tensors_are_made_on_the_device_of_the_model(path: Path) -> None:
    """On the CPU, where these tests run, a tensor on the wrong device raises nothing."""
    assert made_without_device("torch.zeros(3)") and not made_without_device("torch.zeros(3, device=z.device)")
    assert not made_without_device(path.read_text())
