"""`smoke` asks for an effect only where the right ablation has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from torch import Tensor

from ablation.checks import CHECKS
from ablation.checks.cases import Case, with_factor
from ablation.checks.check import CheckFailure
from ablation.checks.decoders import FAMILIES, Decoder
from ablation.checks.on_model.own_model import OwnModel
from ablation.checks.oracles import apply_surgery
from ablation.checks.protocol import IMPUTATIONS
from ablation.errors import AblationNotApplied
from tests.implementations.ours import Ours

SMOKE = next(check for check in CHECKS if check.id == "smoke")
ROWS = {"equal": ((7, 7),), "one": ((7,),), "all equal": ((5, 5, 5, 5),), "distinct": ((3, 1, 4),)}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", IMPUTATIONS)
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.families if name not in ("gpt2", "llama") else ()) for name in FAMILIES],
)
def test_right_hook_passes_smoke_on_any_row(family: str, name: str, rows: Any) -> None:
    decoder = Decoder(family, num_layers=2, num_heads=3, head_dim=8)
    for pair in ((0, 0), (1, 2)):
        SMOKE.run_case(Ours, Case(decoder, rows, (pair,), with_factor(name)))


class Silent(Ours):
    """Ablates nothing."""

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        pass


@pytest.mark.parametrize("name", IMPUTATIONS)
def test_silent_hook_fails_smoke(name: str) -> None:
    decoder = Decoder("llama", num_layers=2, num_heads=3, head_dim=8)
    with pytest.raises(CheckFailure, match="changed no logit"):
        SMOKE.run_case(Silent, Case(decoder, ROWS["distinct"], ((1, 0),), with_factor(name)))


@pytest.mark.parametrize("name", ["zero", "mean", "scale", "values"])
def test_silent_hook_fails_smoke_on_equal_tokens(name: str) -> None:
    decoder = Decoder("llama", num_layers=2, num_heads=3, head_dim=8)
    with pytest.raises(CheckFailure, match="changed no logit"):
        SMOKE.run_case(Silent, Case(decoder, ROWS["equal"], ((1, 0),), with_factor(name)))


class OwnMean(Ours):
    """Replaces z by its mean per channel, under a name of its own."""

    imputations: ClassVar[tuple[str, ...]] = ("mine",)

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **keywords: Any) -> None:
        super().ablate(heads, "channel-mean")


class SilentOnItsOwn(Silent):
    """Offers an imputation of its own, which does nothing."""

    imputations: ClassVar[tuple[str, ...]] = ("mine",)


def test_own_imputation_has_to_act_if_tokens_differ() -> None:
    decoder = Decoder("llama", num_layers=2, num_heads=3, head_dim=8)
    for rows in ROWS.values():
        SMOKE.run_case(OwnMean, Case(decoder, rows, ((1, 0),), "mine"))
    with pytest.raises(CheckFailure, match="changed no logit"):
        SMOKE.run_case(SilentOnItsOwn, Case(decoder, ROWS["distinct"], ((1, 0),), "mine"))


@pytest.mark.parametrize("name", IMPUTATIONS)
def test_head_that_nothing_reads_may_have_no_effect(name: str) -> None:
    model = Decoder("llama", num_layers=2, num_heads=3, head_dim=8).fresh()
    apply_surgery(model, [(1, 0)])
    mine = OwnModel(model, "pruned", ROWS["distinct"])
    SMOKE.run_case(Ours, mine.case(mine.rows, heads=((1, 0),), imputation=with_factor(name)))


class FailsAndCloses(Ours):
    """Fails in a run, and reports in `close` that the heads were not applied."""

    def run(self, *args: Any, **inputs: Any) -> Tensor:
        raise ValueError("the real error")

    def close(self) -> None:
        super().close()
        raise AblationNotApplied("no run has used the heads")


def test_error_of_a_run_is_not_hidden_by_close() -> None:
    case = Case(Decoder("gpt2", 2, 3, 8), ROWS["distinct"], ((1, 0),))
    with pytest.raises(CheckFailure, match="ValueError: the real error"):
        SMOKE.run_case(FailsAndCloses, case)
