"""Whether a text holds the answer, and how often an ablation changes that."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from ablation.studies.answers import change, changes, contains_answer, flags, is_exact
from ablation.studies.statistics import share


@pytest.mark.parametrize(
    ("text", "target", "exact", "contained"),
    [
        (" Berlin", "Berlin", True, True),
        ("Berlin\n", " Berlin", True, True),
        (" Berlin.", " Berlin", False, True),
        ("It is BERLIN", " Berlin", False, True),
        (" Berliner", " Berlin", False, False),
        ("EastBerlin", " Berlin", False, False),
        (" Berlin2", " Berlin", False, False),
        ("Berliner in Berlin", "Berlin", False, True),
        (" New York City", " New York", False, True),
        (" New  York", " New York", False, False),
        (" 12", "2", False, False),
        (" 1.2", "2", False, True),
        ("", "Berlin", False, False),
        ("Berlin", " ", False, False),
        ("I use C++.", "C++", False, True),
        ("它是柏林市", "柏林", False, True),
        ("STRASSE", "straße", False, True),
        ("Cafe\u0301", "Café", False, True),
        ("berlin berlin", "berlin berlin", True, True),
    ],
)
def test_answers_are_words_of_their_own(text: str, target: str, exact: bool, contained: bool) -> None:
    assert (is_exact(text, target), contains_answer(text, target)) == (exact, contained)


def test_change_counts_flips_in_both_directions() -> None:
    pairs = [(True, True)] * 5 + [(True, False)] * 6 + [(False, True)] + [(False, False)] * 3
    found = change(pairs)
    assert (found.clean.count, found.ablated.count, found.clean.of, found.lost, found.gained) == (11, 6, 15, 6, 1)
    assert found.p == pytest.approx(2 * binom.cdf(1, 7, 0.5))
    assert found.clean == share([before for before, _ in pairs])  # type: ignore[arg-type]


def test_change_without_flips_has_no_evidence() -> None:
    assert change([(True, True), (False, False)]).p == 1.0


def test_prompts_without_a_target_do_not_count() -> None:
    found = [flags(" a", " a", " b a"), flags(None, " a", " b")]
    assert set(found[1].values()) == {None}
    assert found[0] == {"clean_exact": True, "ablated_exact": False, "clean_contains": True, "ablated_contains": True}
    assert {name: (of.clean.of, of.lost) for name, of in changes(found).items()} == {
        "exact": (1, 1),
        "contains": (1, 0),
    }
    assert changes(found[1:]) == {}
