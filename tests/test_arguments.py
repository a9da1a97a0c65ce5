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
from ablation.experiment import sweep_question
from ablation.imputation import IMPUTATIONS
from ablation.models import LoadedModel
from ablation.prompts import Question
from ablation.sweeps import sweep, sweep_prompts, sweep_sequential
from tests.comparing import IDS

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
        (dict(watch=3), InvalidPrompt, "^`watch` is a list, not 3$"),
        (dict(watch=None), InvalidPrompt, "^`watch` is a list, not None$"),
        (dict(watch=[-1]), InvalidPrompt, "^no token -1"),
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
    result, want = run(GPT2.shared(), kind(IDS), iter(PAIR), iter([7])), run(GPT2.shared(), IDS, PAIR, [7])  # type: ignore[arg-type]
    assert (result.margin == want.margin).all() and result.provenance["token_ids"] == IDS


@pytest.mark.parametrize("kind", [tuple, iter, np.array, torch.tensor], ids=["tuple", "iterator", "array", "tensor"])
def test_prompts_may_be_any_sequence(kind: Any) -> None:
    results = sweep_prompts(GPT2.shared(), kind([IDS, IDS[::-1]]), [(7, 11), (None, 3)])
    assert [result.provenance["token_ids"] for result in results] == [IDS, IDS[::-1]]


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


def test_question_needs_a_loaded_model_and_a_question(capitals: LoadedModel) -> None:
    wrong: list[tuple[Any, Any]] = [(capitals.model, Question("Berlin is")), (None, Question("Berlin is"))]
    for loaded, question in wrong:
        with pytest.raises(UnsupportedModel, match="has no tokenizer: pass what `ablation.load` returns$"):
            sweep_question(loaded, question)
    text: Any = "Berlin is"
    with pytest.raises(InvalidPrompt, match=r"^a str is not a question: pass Question\(prompt\)$"):
        sweep_question(capitals, text)


@pytest.mark.parametrize("tokens", [30, 50])
def test_unembedding_may_have_another_vocabulary(tokens: int) -> None:
    model = GPT2.fresh()
    wide = torch.nn.Linear(6, tokens, bias=False)
    with torch.no_grad():
        wide.weight.zero_()[:30] = model.lm_head.weight[:30]
    model.lm_head = wide.eval()
    result = run(model, [40], PAIR, [tokens - 1])
    assert result.watched.tolist() == [tokens - 1]
    with pytest.raises(InvalidPrompt, match=f"^no token {tokens}: the model predicts {tokens} tokens$"):
        run(model, [40], PAIR, [tokens])


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
