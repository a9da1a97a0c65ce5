"""Chapter 8, positions: an ablation at some positions replaces the z of the tokens there, and of no others."""

from __future__ import annotations

from dataclasses import replace

from ablation.checks.cases import Case, CaseSpec
from ablation.checks.check import check
from ablation.checks.decoders import DTYPES
from ablation.checks.independence import assert_cache_changes_nothing
from ablation.checks.locality import assert_local
from ablation.checks.protocol import WITHOUT_ROW, Factory


@check(
    "positions",
    "An ablation at some positions replaces the z of the tokens there, and keeps that of all others, bit for bit; a "
    "position is the number of real tokens before a token in its row, and negative positions count from the row's end.",
    cases=CaseSpec(max_rows=3, ragged=True, max_heads=4, positions=True, dtypes=DTYPES),
    needs=("positions", "observable", "single_forward"),
)
def positions(factory: Factory, case: Case) -> None:
    assert_local(factory, case, case.model())


@check(
    "positions.cache",
    "Under an imputation that does not read the whole row (zero, scale, values and means of a reference), an ablation "
    "at some positions gives, up to rounding, the same logits with a key/value cache as in one forward pass.",
    cases=CaseSpec(imputations=WITHOUT_ROW, max_rows=3, ragged=True, min_tokens=3, positions=True),
    needs=("positions", "cache"),
)
def cache(factory: Factory, case: Case) -> None:
    if case.positions is not None:  # from the start: the end of a row is not known yet
        shortest = min(map(len, case.rows))
        case = replace(case, positions=tuple(dict.fromkeys(position % shortest for position in case.positions)))
    assert_cache_changes_nothing(factory, case)
