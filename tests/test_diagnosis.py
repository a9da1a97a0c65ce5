"""The likely cause of a failure names the bug of the wrong implementation, or nothing is said."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks import CHECKS
from ablation.checks.cases import Case
from ablation.checks.causes.diagnosis import diagnosis
from ablation.checks.decoders import Decoder
from ablation.checks.observe import changes, state
from tests.mutants import GROUPS, MUTANTS, Mutant
from tests.mutants.diagnoses import NAMES_OF, PATTERNS_OF
from tests.mutants.reference import Reference
from tests.mutants.trial import diagnosed

SAMPLE = (
    "PseudoHeads",
    "CountsFromOne",
    "MeanPerChannel",
    "PaddedRowsLeft",
    "ForgotReturn",
    "SetsAdd",
    "NoHandle",
    "UnknownIsMean",
)
"""Mutants of many kinds, whose diagnosis needs a second at most."""
CASE = Case(Decoder("gpt2", num_layers=2, num_heads=3, head_dim=8), ((3, 1, 4, 1),), ((1, 0),))


@pytest.fixture(autouse=True)
def as_on_the_command_line() -> Any:
    """Try the cases of `ablation check`."""
    profile = settings.get_current_profile_name()
    settings.load_profile("ci")
    yield
    settings.load_profile(profile)


def verdict(mutant: type[Mutant]) -> str | None:
    """Return the cause that the first check prints that rejects a mutant."""
    for check in sorted(CHECKS, key=lambda check: check.id != mutant.expected_check):
        rejected, cause = diagnosed(mutant, check.id)
        if rejected:
            return cause
    raise AssertionError(f"{mutant.__name__} survives")


def names_the_bug(mutant: type[Mutant], cause: str) -> bool:
    return any(re.search(pattern, cause) for pattern in PATTERNS_OF.get(mutant.__name__, ()))


@pytest.mark.parametrize("name", SAMPLE)
def test_diagnosis_names_the_bug(name: str) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.__name__ == name)
    cause = verdict(mutant)
    assert cause is not None and names_the_bug(mutant, cause), cause


@pytest.mark.mutants
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__.rpartition(".")[2])
def test_diagnoses_of_a_group_are_right(group: ModuleType) -> None:
    """At least 80 % of the mutants of each group have a diagnosis, and no diagnosis is wrong."""
    mutants = [mutant for mutant in MUTANTS if mutant.__module__ == group.__name__]
    causes = {mutant: verdict(mutant) for mutant in mutants}
    wrong = [f"{m.__name__}: {cause}" for m, cause in causes.items() if cause and not names_the_bug(m, cause)]
    assert not wrong
    assert sum(cause is not None for cause in causes.values()) >= 0.8 * len(mutants)


def test_every_pattern_belongs_to_a_mutant() -> None:
    known = {mutant.__name__ for mutant in MUTANTS}
    assert {name for names in NAMES_OF.values() for name in names.split()} <= known


def test_right_implementation_has_no_diagnosis() -> None:
    for id in ("locality", "oracle.zero", "smoke", "identity", "hygiene.restored", "hygiene.user_hooks"):
        check = next(check for check in CHECKS if check.id == id)
        assert diagnosis(Reference, check, CASE, AssertionError("a finding")) is None


class PreviousLayer(Mutant):
    """Counts layers from 1."""

    def targets(self, layer: int) -> list[int]:
        return super().targets(layer + 1)


class LastTokenLeft(Mutant):
    """Leaves out the last token."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        return torch.cat([super().replace_heads(z, heads)[:, :-1], z[:, -1:]], dim=1)


class HalfOff(Mutant):
    """Halves z."""

    def zero(self, z: Tensor) -> Tensor:
        return z / 2


class FourHeads(Mutant):
    """Assumes that every model has four heads."""

    def head_dim(self, z: Tensor) -> int:
        return z.shape[-1] // 4


@pytest.mark.parametrize(
    ("factory", "pattern"),
    [
        (PreviousLayer, "counts layers from 1"),
        (LastTokenLeft, "the last token is not ablated"),
        (HalfOff, "replaces half of z"),
        (FourHeads, "number of heads is taken as 4"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_mistake_that_no_mutant_makes_is_named(factory: type[Mutant], pattern: str) -> None:
    check = next(check for check in CHECKS if check.id == "locality")
    assert re.search(pattern, diagnosis(factory, check, CASE) or "")


def test_diagnosis_leaves_a_given_model_as_it_was() -> None:
    """A case may always give one model: experiments remove their own hooks from it."""

    class Same(Case):
        def model(self) -> PreTrainedModel:
            return self.decoder.shared()

    case = Same(**vars(CASE))
    before = state(case.model())
    check = next(check for check in CHECKS if check.id == "locality")
    assert diagnosis(PreviousLayer, check, case)
    assert not changes(case.model(), before)


@pytest.mark.parametrize("id", ["locality.sets", "oracle.zero_sets", "layouts.hybrid"])
def test_late_binding_over_heads_is_named(id: str) -> None:
    class LateHead(Mutant):
        """Its hooks see the last head of the loop."""

        def targets(self, layer: int) -> list[int]:
            return [self.heads[-1][1] for index, _ in self.heads if index == layer]

    rejected, cause = diagnosed(LateHead, id)
    assert rejected and cause is not None and "act as that of the last one" in cause


def test_unknown_mistake_has_no_diagnosis() -> None:
    class Cubed(Mutant):
        """Writes the cube of z."""

        def zero(self, z: Tensor) -> Tensor:
            return z**3

    check = next(check for check in CHECKS if check.id == "locality")
    assert diagnosed(Cubed, "locality") == (True, None)
    assert diagnosis(Cubed, check, CASE) is None


def test_experiment_that_raises_is_no_diagnosis() -> None:
    class Broken(Mutant):
        """Raises in its second run."""

        def run(self, *args: Any, **kwargs: Any) -> Tensor:
            raise ValueError("no")

    check = next(check for check in CHECKS if check.id == "locality")
    assert diagnosis(Broken, check, CASE, ValueError("no")) is None


def test_diagnosis_follows_the_requirement() -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.__name__ == "NextHead")
    check = next(check for check in CHECKS if check.id == "locality")
    with pytest.raises(AssertionError) as error:
        check(mutant)
    lines = str(error.value).splitlines()
    assert lines[1].startswith("  likely cause: the head after the named one") and lines[2].startswith("  found: ")


def test_keyboard_interrupt_in_an_experiment_propagates() -> None:
    class Interrupted(Mutant):
        """Is interrupted by the user."""

        def run(self, *args: Any, **kwargs: Any) -> Tensor:
            raise KeyboardInterrupt

    check = next(check for check in CHECKS if check.id == "locality")
    with pytest.raises(KeyboardInterrupt):
        diagnosis(Interrupted, check, CASE)
