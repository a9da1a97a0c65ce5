"""Refusals: each has an error class of its own, comes before any forward pass, and leaves no side effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Lfm2Config, PreTrainedModel

from ablation.checks.decoders import Decoder
from ablation.checks.observe import assert_state_equals, state
from ablation.errors import (
    AblationError,
    InvalidAblation,
    InvalidHead,
    InvalidPrompt,
    NonFiniteLogits,
    UnknownImputation,
    UnsupportedModel,
)
from ablation.hook import HeadAblation
from ablation.sweeps import sweep, sweep_sequential

IDS = [3, 1, 4, 1, 5]
Act = Callable[[PreTrainedModel], object]


def gpt2() -> PreTrainedModel:
    return Decoder("gpt2", num_layers=3, num_heads=4, head_dim=2).fresh()


def training() -> PreTrainedModel:
    model = gpt2()
    model.transformer.h[1].attn.resid_dropout.train()  # one module is enough
    return model


def shared() -> PreTrainedModel:
    model = gpt2()
    model.transformer.h[2].attn.c_proj = model.transformer.h[0].attn.c_proj
    return model


def compiled() -> PreTrainedModel:
    model = gpt2()
    model.transformer.h[1].compile(backend="eager")
    return model


def hybrid() -> PreTrainedModel:
    shape: dict[str, Any] = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    config = Lfm2Config(vocab_size=41, num_hidden_layers=2, layer_types=["conv", "full_attention"], **shape)
    return AutoModelForCausalLM.from_config(config).eval()


def bypassed() -> PreTrainedModel:
    config = BloomConfig(vocab_size=41, hidden_size=8, n_layer=2, n_head=2, pretraining_tp=2, slow_but_exact=True)
    return AutoModelForCausalLM.from_config(config).eval()


def infinite() -> PreTrainedModel:
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.inf
    return model


def enter(model: PreTrainedModel) -> None:
    with HeadAblation(model):
        pass


def ablate(heads: Any, imputation: Any = "zero") -> Act:
    def act(model: PreTrainedModel) -> None:
        with HeadAblation(model) as ablation:
            ablation.ablate([(1, 1)], "mean")
            kept = ablation.edits
            try:
                ablation.ablate(heads, imputation)
            finally:
                assert ablation.edits == kept, "the previous heads have to stay in force"

    return act


def swept(**arguments: Any) -> Act:
    return lambda model: sweep(model, **dict(token_ids=IDS) | arguments)


@pytest.mark.parametrize(
    ("make", "act", "error", "reason"),
    [
        pytest.param(gpt2, ablate([(3, 0)]), InvalidHead, "no layer 3: the model has 3 layers, 0 to 2", id="layer"),
        pytest.param(gpt2, ablate([(-1, 0)]), InvalidHead, "no layer -1", id="negative layer"),
        pytest.param(gpt2, ablate([(0, 0), (0, 4)]), InvalidHead, "no head 4: .* 4 heads, 0 to 3", id="head"),
        pytest.param(gpt2, ablate([(0, -1)]), InvalidHead, "no head -1", id="negative head"),
        pytest.param(gpt2, ablate([(True, 0)]), InvalidHead, "layer True is not an integer", id="bool"),
        pytest.param(gpt2, ablate([(0, 1.0)]), InvalidHead, "head 1.0 is not an integer", id="float"),
        pytest.param(gpt2, ablate([(0, "1")]), InvalidHead, "head '1' is not an integer", id="text"),
        pytest.param(
            gpt2, ablate((0, 1)), InvalidHead, r"0 is not a \(layer, head\) pair.* such as \[\(0, 1\)\]", id="pair"
        ),
        pytest.param(gpt2, ablate([(0,)]), InvalidHead, r"\(0,\) is not a \(layer, head\) pair", id="half a pair"),
        pytest.param(hybrid, ablate([(0, 1)]), InvalidHead, "layer 0 has no attention heads", id="layer without heads"),
        pytest.param(gpt2, ablate([(0, 1)], "median"), UnknownImputation, "use one of 'zero', 'mean'", id="imputation"),
        pytest.param(gpt2, swept(imputations=["median"]), UnknownImputation, "'zero', 'mean'", id="imputation, sweep"),
        pytest.param(gpt2, ablate([(0, 1)], None), UnknownImputation, "imputation None", id="no imputation"),
        pytest.param(gpt2, swept(imputations=["zero", "zero"]), InvalidAblation, "^name .* only once$", id="twice"),
        pytest.param(gpt2, swept(imputations=[]), InvalidAblation, "at least one imputation", id="no imputations"),
        pytest.param(gpt2, swept(max_rows=1), InvalidAblation, "a pass needs 2 rows", id="rows"),
        pytest.param(training, swept(), InvalidAblation, r"^the model is in training .*eval\(\)$", id="training mode"),
        pytest.param(
            training,
            lambda model: sweep_sequential(model, IDS),
            InvalidAblation,
            "training mode",
            id="training mode, sequential",
        ),
        pytest.param(shared, enter, UnsupportedModel, "shares one projection among its layers", id="shared"),
        pytest.param(compiled, enter, UnsupportedModel, "is compiled.* compile it after the ablation", id="compiled"),
        pytest.param(bypassed, enter, UnsupportedModel, "does not call its projections: set", id="bypassed"),
        pytest.param(
            gpt2,
            swept(token_ids=[]),
            InvalidPrompt,
            "^a run needs .* one prompt token",
            id="no prompt",
        ),
        pytest.param(gpt2, swept(token_ids=[41]), InvalidPrompt, "no token 41: the model has 41 tokens", id="token"),
        pytest.param(gpt2, swept(token_ids=[1] * 129), InvalidPrompt, "129 tokens, .* takes at most 128", id="long"),
        pytest.param(gpt2, swept(target=-1), InvalidPrompt, "no token -1", id="target"),
        pytest.param(gpt2, swept(control=[3, 41]), InvalidPrompt, "no token 41", id="control"),
        pytest.param(gpt2, swept(target=[]), InvalidPrompt, "^the target has no tokens$", id="empty target"),
        pytest.param(gpt2, swept(control=[]), InvalidPrompt, "^the control has no tokens$", id="empty control"),
        pytest.param(
            gpt2,
            swept(token_ids=[1] * 127, target=[1, 2, 3]),
            InvalidPrompt,
            "^the prompt with its target or control has 129 tokens, the model takes at most 128$",
            id="long target",
        ),
        pytest.param(gpt2, swept(metrics={"kl": len}), InvalidAblation, "^'kl' cannot name a metric", id="metric"),
        pytest.param(gpt2, swept(token_ids=list("words")), InvalidPrompt, "'w' is not a token id", id="text for ids"),
        pytest.param(
            gpt2,
            lambda model: HeadAblation(model).ablate([(0, 0)]),
            InvalidAblation,
            "enter it first",
            id="not entered",
        ),
    ],
)
def test_refusal_precedes_any_forward_and_leaves_nothing(
    make: Callable[[], PreTrainedModel], act: Act, error: type[AblationError], reason: str
) -> None:
    model = make()
    before = state(model)
    forwards: list[object] = []
    counting = model.register_forward_pre_hook(lambda *_: forwards.append(None))
    with pytest.raises(error, match=reason) as caught:
        act(model)
    counting.remove()
    assert type(caught.value) is error and not forwards
    assert_state_equals(model, before)


def test_non_finite_clean_logits_are_refused() -> None:
    model = infinite()
    before = state(model)
    with pytest.raises(NonFiniteLogits, match="^the model's clean logits are not finite$"):
        sweep(model, IDS)
    assert_state_equals(model, before)


def test_second_ablation_is_refused_and_the_first_persists() -> None:
    model = gpt2()
    ids = torch.tensor([IDS])
    with HeadAblation(model) as ablation, torch.no_grad():
        ablation.ablate([(1, 1)])
        once = model(ids).logits
        carrying = state(model)
        for again in (ablation, HeadAblation(model)):
            with pytest.raises(InvalidAblation, match="^the model already carries .*HeadAblation.remove_from"):
                again.__enter__()
        with pytest.raises(InvalidAblation, match="already carries an ablation"):
            sweep(model, IDS)
        assert_state_equals(model, carrying)
        assert torch.equal(model(ids).logits, once)
