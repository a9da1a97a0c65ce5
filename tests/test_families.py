"""Every causal-LM family of transformers is supported, or refused for the reason expected: none is silently wrong.

By default one family a mechanism; `pytest -m families` for all of them (some minutes), as CI does.
"""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from ablation.heads import find_heads
from tests import families
from tests.families import FAMILIES, MARKS, NOT_BUILT, PAGE, README, REFUSED, VERSIONS, outcome

FEW = {
    "deepseek_v3": "latent attention: the values have a width of their own",
    "falcon_h1": "attention beside a state-space model in each layer",
    "bert": "the projection is in another module than the heads",
    "bitnet": "a norm over all heads before the projection",
    "zamba2": "layers that share their weights; a batch that cannot grow",
    "gemma3": "the text decoder of a model of several parts",
    "mamba": "no attention heads",
    "xlnet": "a projection that is no Linear",
}


def check(family: str) -> None:
    result = outcome(family)
    expected = "refused" if family in REFUSED else "not built" if family in NOT_BUILT else "supported"
    assert result.what == expected, f"{result.what}: {result.note}"
    assert {**REFUSED, **NOT_BUILT}.get(family, "") in result.note
    if result.what == "supported":
        assert f"| {family} | {result.model} | supported | {result.note} | {result.sweep.split(':')[0]}" in page()


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")  # those of transformers' own code
@pytest.mark.parametrize("family", FEW)
def test_a_family_of_each_mechanism(family: str) -> None:
    check(family)


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FEW])
def test_every_family(family: str) -> None:
    check(family)


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_BUILT | REFUSED])
def test_without_weights_the_map_is_the_same(family: str) -> None:
    """What `python -m ablation heads` shows."""
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(families.config_of(family))
    assert families.described(find_heads(empty)) == families.described(find_heads(families.build(family)))


def test_the_page_has_every_family_and_the_number_in_the_readme_is_its_own() -> None:
    rows = re.findall(r"^\| (\S+) \| \S+ \| (supported|refused|not built) \|", page(), re.MULTILINE)
    outcomes = [families.Outcome(family, "", what, "") for family, what in rows]
    assert {o.family for o in outcomes if o.what == "refused"} == REFUSED.keys()
    assert {o.family for o in outcomes if o.what == "not built"} == NOT_BUILT.keys()
    if f"transformers {VERSIONS['transformers']}" in page():
        assert tuple(family for family, _ in rows) == FAMILIES
        assert MARKS.format(families.summary(outcomes)) in README.read_text(encoding="utf-8")
        assert families.summary(outcomes) in page()
    built = [o for o in outcomes if o.what != "not built"]
    assert sum(o.what == "supported" for o in built) >= 0.9 * len(built)


def test_a_wrong_width_does_not_pass_for_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zero oracle holds for any channels: what attends is what tells them from a head."""
    monkeypatch.setattr("ablation.heads._count", lambda attention, projection, *_: (2, projection.in_features // 2))
    with pytest.raises(AssertionError, match="layer 0: 2 heads were found, but .4. attend"):
        outcome("llama")


def test_linear_attention_does_not_pass_for_heads() -> None:
    """A recurrence whose class is called an attention is one only by the configuration's word."""
    model = families.build("kimi_linear")
    model.config.layer_types = ["full_attention"] * 3
    with pytest.raises(AssertionError, match="layer 0: 4 heads were found, but none attend"):
        families.check_heads(model, find_heads(model))
