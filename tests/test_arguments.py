"""Arguments of `run` and `sweep`: wrong ones are named, and any flat sequence is a prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import run, run_sequential
from ablation.errors import InvalidAblation, InvalidPrompt, UnknownImputation, UnsupportedModel
from ablation.imputation import IMPUTATIONS
from ablation.models import LoadedModel
from ablation.prompts import Question, prompt_ids
from ablation.results import PromptRecord
from ablation.studies.experiment import sweep_prompts
from ablation.sweeps import sweep, sweep_sequential
from tests.comparing import IDS, assert_results_equal

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
PAIR = [Ablation([(0, 1)]), Ablation([(0, 2), (1, 0)], "mean")]


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        (dict(token_ids=3), InvalidPrompt, "^a prompt is a list, not 3$"),
        (dict(token_ids=None), InvalidPrompt, "^a prompt is a list, not None$"),
        ({"token_ids": "ab"}, InvalidPrompt, "'a' is not a token id"),
        (dict(token_ids=[[3, 1]]), InvalidPrompt, "is not a token id: a prompt is one flat list of integers"),
        (dict(token_ids=[3, 41]), InvalidPrompt, "^no token 41: the model has 41 tokens$"),
        (dict(target=3.0), InvalidPrompt, "^a target of several tokens is a list, not 3.0$"),
        (dict(control=True), InvalidPrompt, "^a control of several tokens is a list, not True$"),
        (dict(target="ab"), InvalidPrompt, "^'a' is not a token id"),
        (dict(control=[[3, 1]]), InvalidPrompt, r"^\[3, 1\] is not a token id"),
        (dict(target=[3, None]), InvalidPrompt, "^None is not a token id"),
        (dict(target=-1), InvalidPrompt, "^no token -1"),
        (dict(target=[-1]), InvalidPrompt, "^no token -1"),
        (dict(control=[3, -1]), InvalidPrompt, "^no token -1"),
        (dict(target=[]), InvalidPrompt, "^the target has no tokens$"),
        (dict(control=()), InvalidPrompt, "^the control has no tokens$"),
        (dict(ablations=Ablation([(0, 0)])), InvalidAblation, "^`ablations` is a list, not"),
        (dict(ablations=[(0, 0)]), InvalidAblation, r"^\(0, 0\) is not an Ablation"),
        (dict(max_rows=50.5), InvalidAblation, "^max_rows is 50.5, not a number of rows$"),
        (dict(max_rows=8.0), InvalidAblation, "^max_rows is 8.0, not a number of rows$"),
        (dict(max_rows=True), InvalidAblation, "^max_rows is True, not a number of rows$"),
        (dict(max_rows="8"), InvalidAblation, "^max_rows is '8', not a number of rows$"),
        (dict(max_rows=1), InvalidAblation, "^max_rows is 1: a pass needs 2 rows"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        run(**dict(model=GPT2.shared(), token_ids=IDS, ablations=PAIR) | arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [tuple, iter, np.array, torch.tensor], ids=["tuple", "iterator", "array", "tensor"])
def test_prompt_may_be_any_flat_sequence(kind: Any) -> None:
    result = run(GPT2.shared(), kind(IDS), iter(PAIR), kind([7, 11]), kind([3, 2, 1]))  # type: ignore[arg-type]
    assert_results_equal(result, run(GPT2.shared(), IDS, PAIR, [7, 11], [3, 2, 1]), atol=0)
    assert result.prompts == (PromptRecord(tuple(IDS), (7, 11), (3, 2, 1)),)
    for token in (7, [7], np.int64(7), torch.tensor(7), np.array([7])):
        result = run(GPT2.shared(), kind(IDS), PAIR, token)  # type: ignore[arg-type]
        assert_results_equal(result, run(GPT2.shared(), IDS, PAIR, 7), atol=0)


@pytest.mark.parametrize("kind", [tuple, iter, np.array], ids=["tuple", "iterator", "array"])
def test_prompts_may_be_any_sequence(kind: Any, capitals: LoadedModel) -> None:
    questions = [Question("Berlin is", " Germany", " France"), Question("Paris", None, " the")]
    result = sweep_prompts(capitals, kind(questions), ["zero"])
    assert [record.prompt for record in result.prompts] == ["Berlin is", "Paris"]
    ids = [tuple(prompt_ids(capitals.tokenizer, question.prompt)) for question in questions]
    assert [record.token_ids for record in result.prompts] == ids


@pytest.mark.parametrize("imputations", ["zero", IMPUTATIONS["mean"], None, 3])
def test_imputations_have_to_be_a_list(imputations: Any) -> None:
    for way in (sweep, sweep_sequential):
        with pytest.raises(UnknownImputation, match=r"^`imputations` is a list: pass \["):
            way(GPT2.shared(), IDS, imputations=imputations)


def test_model_that_returns_tuples_is_refused() -> None:
    model = GPT2.fresh()
    model.config.return_dict = False
    for way in (run, run_sequential):
        with pytest.raises(UnsupportedModel, match="set config.return_dict = True$"):
            way(model, IDS, PAIR)


def test_question_needs_a_loaded_model_and_a_list(capitals: LoadedModel) -> None:
    for loaded in (capitals.model, None):
        with pytest.raises(UnsupportedModel, match="has no tokenizer: pass what `ablation.load` returns$"):
            sweep_prompts(loaded, [Question("Berlin is")])  # type: ignore[arg-type]
    for prompts in ("Berlin is", Question("Berlin is"), None):
        kind = type(prompts).__name__
        with pytest.raises(InvalidPrompt, match=f"^prompts are a list of records, not a {kind}$"):
            sweep_prompts(capitals, prompts)  # type: ignore[arg-type]
    with pytest.raises(InvalidPrompt, match="^prompt 1: a record has columns, unlike 'Berlin is'$"):
        sweep_prompts(capitals, ["Berlin is"])


@pytest.mark.parametrize("tokens", [30, 50])
def test_unembedding_may_have_another_vocabulary(tokens: int) -> None:
    model = GPT2.fresh()
    wide = torch.nn.Linear(6, tokens, bias=False)
    with torch.no_grad():
        wide.weight.zero_()[:30] = model.lm_head.weight[:30]
    model.lm_head = wide.eval()
    for target in (tokens - 1, [tokens - 1]):
        assert run(model, [40], PAIR, target).prompts[0].target == (tokens - 1,)
    for target in (tokens, [tokens], [1, tokens]):
        with pytest.raises(InvalidPrompt, match=f"^no token {tokens}: the model predicts {tokens} tokens$"):
            run(model, [40], PAIR, target)


def test_model_that_predicts_one_token_is_refused() -> None:
    model = GPT2.fresh()
    model.lm_head = torch.nn.Linear(6, 1, bias=False).eval()
    for way in (run, run_sequential):
        with pytest.raises(InvalidPrompt, match="^a target and a control are two tokens: the model has 1$"):
            way(model, IDS, PAIR)


def test_progress_never_goes_back() -> None:
    """The model fails in the growing batch, with one token in the last layer and with all of them."""
    model, shares = GPT2.shared(), list[float]()

    def fail(module: Any, args: Any, out: Tensor) -> None:
        if len(out) > len(PAIR) + 1:
            raise RuntimeError("too many rows")

    handle = model.transformer.h[1].mlp.register_forward_hook(fail)
    try:
        with pytest.warns(UserWarning, match="does not suit"):
            run(model, IDS, [*PAIR, *PAIR], progress=shares.append)
    finally:
        handle.remove()
    assert shares == sorted(set(shares)) and shares[0] < shares[-1] == 1.0
