"""The specification rejects every known wrong implementation, and accepts correct ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ablation.checks import CHECKS
from tests.implementations.ours import Ours
from tests.implementations.surgery import Surgery
from tests.mutants import GROUPS, MUTANTS, OUTSIDE_PROTOCOL, Mutant
from tests.mutants.correct_variants import CORRECT_VARIANTS
from tests.mutants.everything import Everything
from tests.mutants.reference import Reference
from tests.mutants.trial import assert_rejected, few_examples, try_check

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def examples(request: pytest.FixtureRequest) -> Iterator[None]:
    """Derandomised without --hypothesis-seed. A correct implementation runs all examples, so it has fewer."""
    correct = request.node.name.startswith("test_correct")
    with few_examples(seeded=request.config.getoption("--hypothesis-seed") is not None, examples=4 if correct else 15):
        yield


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_rejected(mutant: type[Mutant]) -> None:
    assert_rejected(mutant)


@pytest.mark.mutants
@pytest.mark.parametrize(
    "factory", [Reference, Everything, Ours, Surgery, *CORRECT_VARIANTS], ids=lambda factory: factory.__name__
)
def test_correct_implementation_is_accepted(factory: Any) -> None:
    for check in CHECKS:
        trial = try_check(check, factory)
        assert trial is None or not trial.rejected, trial.reason


class Survivor(Mutant):
    """Has no bug."""


class Accident(Mutant):
    """Cannot be made."""

    def install(self) -> None:
        raise LookupError("no such module")


@pytest.mark.mutants
def test_survivors_and_crashes_do_not_count_as_killed() -> None:
    with few_examples(examples=1):
        with pytest.raises(AssertionError, match="Survivor survives: Has no bug"):
            assert_rejected(Survivor)
        with pytest.raises(AssertionError, match=r"Accident is only rejected by crashes: locality: LookupError\('no"):
            assert_rejected(Accident)


def test_nondeterministic_implementation_is_rejected() -> None:
    """Hypothesis runs a failing case again, and calls it flaky."""

    class Once(Mutant):
        """Ablates nothing in its first run."""

        done: ClassVar[bool] = False

        def targets(self, layer: int) -> list[int]:
            once, Once.done = not Once.done, Once.done or bool(self.heads)
            return [] if once else super().targets(layer)

    smoke = next(check for check in CHECKS if check.id == "smoke")
    trial = try_check(smoke, Once)
    assert trial is not None and trial.rejected and "so the implementation is not deterministic" in trial.reason


def test_mutants_have_unique_names_and_a_cause() -> None:
    assert len({mutant.__name__ for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.__doc__ != Mutant.__doc__ and (mutant.__doc__ or "").splitlines()[0].endswith("."), mutant
        assert mutant.expected_check in {check.id for check in CHECKS}, mutant
    for group in GROUPS:
        assert any(mutant.__module__ == group.__name__ for mutant in MUTANTS), group


@pytest.mark.parametrize("bug", OUTSIDE_PROTOCOL, ids=lambda bug: bug.name)
def test_bug_outside_the_protocol_has_a_test(bug: Any) -> None:
    file, _, name = bug.test.partition("::")
    assert re.search(rf"^def {name}\(", (TESTS.parent / file).read_text(encoding="utf-8"), re.MULTILINE), bug.test


def test_page_lists_all_mutants_and_checks() -> None:
    page = (TESTS.parent / "docs" / "mutants.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (.*?) \|", page.partition("\n## Outside the protocol")[0], re.MULTILINE)
    assert [name for name, *_ in rows if name[0].isupper()] == [mutant.__name__ for mutant in MUTANTS]
    assert re.findall(r"^\| \d+ \| `(.+?)` \|", page, re.MULTILINE) == [check.id for check in CHECKS]
