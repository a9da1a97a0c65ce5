"""Every causal-LM family of transformers is supported, or refused for the expected reason: none is silently wrong.

The default run takes one family for each mechanism; `pytest -m families` takes all (some minutes), as CI does.
"""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from ablation.heads import find_heads
from tests.families.configurations import FAMILIES, build, config_of
from tests.families.evidence import check_heads, check_mlps
from tests.families.outcomes import NOT_BUILT, PAGE, REFUSED, VERSIONS, Outcome, described, outcome, summary

FEW = {
    "deepseek_v3": "latent attention: the values have a head_dim of their own",
    "falcon_h1": "attention beside a state-space model in each layer",
    "bert": "the projection is not in the module that knows the heads",
    "bitnet": "a norm over all heads before the projection",
    "zamba2": "layers that share their weights; a batch that cannot grow",
    "gemma3": "the text decoder of a model of several parts",
    "mamba": "no attention heads",
    "xlnet": "a projection that is not a Linear",
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


@pytest.mark.filterwarnings("ignore")  # warnings in transformers' own code
@pytest.mark.parametrize("family", FEW)
def test_family_of_each_mechanism(family: str) -> None:
    check(family)


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FEW])
def test_every_family(family: str) -> None:
    check(family)


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_BUILT | REFUSED])
def test_head_map_is_the_same_without_weights(family: str) -> None:
    """The map that `ablation heads` shows."""
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config_of(family))
    assert described(find_heads(empty)) == described(find_heads(build(family)))


WITHOUT_MLPS = {
    "nemotron_h": "a layer is an attention, a state-space model or an MLP",
    "xlm": "the MLPs are not in the layers",
    "zamba": "the layers share an attention and an MLP, or have neither",
    "zamba2": "the layers share an attention and an MLP, or have neither",
}


def check_mlps_of(family: str) -> None:
    model = build(family)
    heads = find_heads(model)
    check_mlps(model, heads)
    reasons = {mlp for mlp in heads.mlps if isinstance(mlp, str)}
    assert family in WITHOUT_MLPS or all("mixture of experts" in reason for reason in reasons), reasons


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [family for family in FEW if family not in REFUSED])
def test_mlps_of_each_mechanism(family: str) -> None:
    check_mlps_of(family)


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_BUILT | REFUSED | FEW])
def test_mlps_of_every_family(family: str) -> None:
    check_mlps_of(family)


def test_page_lists_every_family_and_counts_them() -> None:
    rows = re.findall(r"^\| (\S+) \| \S+ \| (supported|refused|not built) \|", page(), re.MULTILINE)
    outcomes = [Outcome(family, "", what, "") for family, what in rows]
    assert {o.family for o in outcomes if o.what == "refused"} == REFUSED.keys()
    assert {o.family for o in outcomes if o.what == "not built"} == NOT_BUILT.keys()
    if f"transformers {VERSIONS['transformers']}" in page():
        assert tuple(family for family, _ in rows) == FAMILIES
        assert summary(outcomes) in page()
    built = [o for o in outcomes if o.what != "not built"]
    assert sum(o.what == "supported" for o in built) >= 0.9 * len(built)


def test_wrong_head_dim_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zero oracle holds for any set of channels; only the observed attention tells whether they are a head."""
    monkeypatch.setattr(
        "ablation.heads._head_count_and_dim", lambda attention, projection, *_: (2, projection.in_features // 2)
    )
    with pytest.raises(AssertionError, match="layer 0: 2 heads were found, but .4. attend"):
        outcome("llama")


def test_linear_attention_is_noticed() -> None:
    """A recurrence whose class is called an attention is known as one only from the configuration."""
    model = build("kimi_linear")
    model.config.layer_types = ["full_attention"] * 3
    with pytest.raises(AssertionError, match="layer 0: 4 heads were found, but none attend"):
        check_heads(model, find_heads(model))
