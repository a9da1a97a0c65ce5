"""The specification rejects every wrong implementation that is known, and no right one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ablation.checks import CHECKS
from tests.implementations.ours import Ours
from tests.implementations.surgery import Surgery
from tests.mutants import ELSEWHERE, GROUPS, MUTANTS, Mutant
from tests.mutants.right import Reference
from tests.mutants.styles import STYLES
from tests.mutants.trial import death, few_examples, tried

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def examples(request: pytest.FixtureRequest) -> Iterator[None]:
    """Derandomised, but for --hypothesis-seed. A right implementation goes through all examples, so it has fewer."""
    right = request.node.name.startswith("test_no_right")
    with few_examples(seeded=request.config.getoption("--hypothesis-seed") is not None, examples=4 if right else 15):
        yield


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_is_rejected_for_a_requirement_that_it_breaks(mutant: type[Mutant]) -> None:
    death(mutant)


@pytest.mark.mutants
@pytest.mark.parametrize("make", [Reference, Ours, Surgery, *STYLES], ids=lambda make: make.__name__)
def test_no_right_implementation_is_rejected(make: Any) -> None:
    for check in CHECKS:
        trial = tried(check, make)
        assert trial is None or not trial.rejected, trial.reason


class Survivor(Mutant):
    """Is no mutant at all."""


class Accident(Mutant):
    """Cannot be made."""

    def install(self) -> None:
        raise LookupError("no such module")


@pytest.mark.mutants
def test_a_survivor_and_an_accident_are_no_deaths() -> None:
    with few_examples(examples=1):
        with pytest.raises(AssertionError, match="Survivor survives: Is no mutant at all"):
            death(Survivor)
        with pytest.raises(AssertionError, match=r"Accident is killed by accident only: locality: LookupError\('no"):
            death(Accident)


def test_an_implementation_that_is_not_deterministic_is_rejected_by_an_assertion() -> None:
    """Hypothesis, which runs a failing case again, calls it flaky."""

    class Once(Mutant):
        """Ablates nothing, but only once."""

        done: ClassVar[bool] = False

        def targets(self, layer: int) -> list[int]:
            once, Once.done = not Once.done, Once.done or bool(self.heads)
            return [] if once else super().targets(layer)

    smoke = next(check for check in CHECKS if check.id == "smoke")
    trial = tried(smoke, Once)
    assert trial is not None and trial.rejected and "what is tested is not deterministic" in trial.reason


def test_every_mutant_has_a_cause_and_a_name_of_its_own() -> None:
    assert len({mutant.__name__ for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.__doc__ != Mutant.__doc__ and (mutant.__doc__ or "").splitlines()[0].endswith("."), mutant
        assert mutant.killer in {check.id for check in CHECKS}, mutant
    for group in GROUPS:
        assert any(mutant.__module__ == group.__name__ for mutant in MUTANTS), group


@pytest.mark.parametrize("bug", ELSEWHERE, ids=lambda bug: bug.name)
def test_the_test_that_catches_a_bug_elsewhere_exists(bug: Any) -> None:
    file, _, name = bug.test.partition("::")
    assert re.search(rf"^def {name}\(", (TESTS.parent / file).read_text(encoding="utf-8"), re.MULTILINE), bug.test


def test_the_page_names_exactly_the_mutants_and_checks_there_are() -> None:
    page = (TESTS / "mutants.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (.*?) \|", page.partition("\n## Elsewhere")[0], re.MULTILINE)
    assert [name for name, *_ in rows if name[0].isupper()] == [mutant.__name__ for mutant in MUTANTS]
    assert re.findall(r"^\| \d+ \| `(.+?)` \|", page, re.MULTILINE) == [check.id for check in CHECKS]
