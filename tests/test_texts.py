"""The loss on a text: every token is scored once, and the loss is that of ordinary forward passes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import score
from ablation.errors import InvalidPrompt
from ablation.hook import HeadAblation
from ablation.models import LoadedModel
from ablation.sweeps import as_imputations, one_head_ablations
from ablation.texts import Window, sweep_text, windows
from tests.comparing import ATOL

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
TEXT = "Berlin is the capital of Germany. Paris is the capital of France. Rome lies in Italy."


@given(st.integers(2, 200), st.integers(1, 40))
def test_windows_score_each_token_once_after_a_context(tokens: int, stride: int) -> None:
    ids = list(range(tokens))
    parts = windows(ids, stride)
    scored = list(itertools.chain.from_iterable(window.token_ids[-window.scored :] for window in parts))
    assert scored == ids[1 : len(scored) + 1] and tokens - 1 - len(scored) < stride
    for window in parts:
        first, last = window.token_ids[0], window.token_ids[-1]
        assert window.token_ids == tuple(range(first, last + 1))  # a part of the text
        context = len(window.token_ids) - window.scored
        assert context == min(stride, window.token_ids[-window.scored]) >= 1


def test_text_of_one_token_cannot_be_scored() -> None:
    assert windows([7, 8], 5) == [Window((7, 8), 1)]
    with pytest.raises(InvalidPrompt, match="at least two tokens"):
        windows([7], 5)


@pytest.mark.parametrize("max_rows", [None, 2, 5])
@pytest.mark.parametrize("scored", [1, 3, 7])
def test_loss_is_that_of_one_hooked_forward_per_ablation(scored: int, max_rows: int | None) -> None:
    model = GPT2.shared()
    ablations = [*one_head_ablations(model, as_imputations(["zero", "mean"])), Ablation([(0, 1), (1, 2)])]
    result = score(model, IDS, scored, ablations, max_rows=max_rows)
    assert result.provenance["method"] == "growing batch" and list(result.clean) == ["loss"]
    ids, following = torch.tensor([IDS[:-1]]), torch.tensor(IDS[1:])

    def loss() -> float:
        with torch.no_grad():
            logits = model(ids).logits[0].double()
        return float(torch.nn.functional.cross_entropy(logits[-scored:], following[-scored:]))

    assert result.clean["loss"][0] == pytest.approx(loss(), abs=ATOL["float32"])
    with HeadAblation(model) as ablated:
        for number, ablation in enumerate(ablations):
            ablated.ablate(ablation.heads, ablation.imputation)
            assert result.ablated["loss"][0, number] == pytest.approx(loss(), abs=ATOL["float32"])
    assert (result.replaced[0, :-1] == (len(IDS) - 1) * 2).all()


def test_sweep_of_a_text_is_the_loss_of_its_windows(capitals: LoadedModel) -> None:
    result = sweep_text(capitals, TEXT, 8, ["zero"])
    ids = capitals.tokenizer(TEXT).input_ids
    assert [len(prompt.target) for prompt in result.prompts] == [8] * ((len(ids) - 1) // 8)
    assert capitals.decode(*itertools.chain.from_iterable(p.target for p in result.prompts)) in TEXT
    assert result.head_mean.shape == (len(result.prompts), 12, 12) and np.isfinite(result.change("loss")).all()


def test_stride_has_to_fit_the_model(capitals: LoadedModel) -> None:
    assert {len(p.target) for p in sweep_text(capitals, TEXT, imputations=["zero"]).prompts} == {16}
    for stride in (0, -1, 1.5, True):
        with pytest.raises(InvalidPrompt, match="not a number of tokens"):
            sweep_text(capitals, TEXT, stride)  # type: ignore[arg-type]
    with pytest.raises(InvalidPrompt, match="windows of 34 tokens, the model takes 32"):
        sweep_text(capitals, TEXT, 17)
