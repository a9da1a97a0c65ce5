"""The loss on a text: every token is scored once, and the loss is that of ordinary forward passes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import score
from ablation.errors import InvalidAblation, InvalidOutput, InvalidPrompt
from ablation.hook import HeadAblation
from ablation.imputation import Imputation, Values
from ablation.models import LoadedModel
from ablation.reference import Reference, record_z
from ablation.results import Result
from ablation.studies.texts import TextStudy, Window, sweep_text, windows
from ablation.sweeps import as_imputations, one_head_ablations
from tests.comparing import ATOL
from tests.test_checkpoint import Interrupted, assert_same_bits

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


def assert_losses_are_those_of(study: TextStudy, result: Result, imputations: list[list[Imputation]]) -> None:
    """Compare with ordinary hooked forwards for some heads. imputations: those of each window, several for draws."""
    model = study.loaded.model
    for index, window in enumerate(study.windows):
        ids, following = torch.tensor([window.token_ids[:-1]]), torch.tensor(window.token_ids[1:])
        for head in ((0, 1), (11, 5)):
            losses = []
            with HeadAblation(model) as ablated:
                for imputation in imputations[index]:
                    ablated.ablate([head], imputation, study.plan.positions)
                    with torch.no_grad():
                        logits = model(ids, use_cache=False).logits[0].double()
                    scored = slice(-window.scored, None)
                    losses.append(float(torch.nn.functional.cross_entropy(logits[scored], following[scored])))
            (column,) = (number for number, key in enumerate(result.ablations) if key.heads == (head,))
            assert result.ablated["loss"][index, column] == pytest.approx(np.mean(losses), abs=ATOL["float32"])


def test_reference_of_a_text_is_its_windows(capitals: LoadedModel) -> None:
    study = TextStudy(capitals, TEXT, 8, ["reference-mean"], positions="last")
    result = study.run()
    own = Reference.of(capitals.model, [window.token_ids[:-1] for window in study.windows])
    assert study.plan.computed is not None and study.plan.computed.sha256 == own.sha256
    assert_losses_are_those_of(study, result, [[own.mean()]] * len(study.windows))
    assert {key.positions for key in result.ablations} == {"last"}
    assert result.provenance["positions"] == [[8 - 1], [16 - 2]][: len(study.windows)]


def test_text_is_resampled_from_its_other_windows(capitals: LoadedModel) -> None:
    study = TextStudy(capitals, TEXT, 4, ["resample"], draws=2, seed=1)
    texts = [window.token_ids[:-1] for window in study.windows]
    assert len({len(ids) for ids in texts}) == 2, "the first window is shorter than the others"
    for ids, sources in zip(texts, study.sources, strict=True):
        assert len(sources) == 2 and ids not in sources
        assert all(any(other[: len(ids)] == source for other in texts) for source in sources)
    drawn: list[list[Imputation]] = [
        [Values(record_z(capitals.model, ids), "resample") for ids in sources] for sources in study.sources
    ]
    result = study.run()
    assert_losses_are_those_of(study, result, drawn)
    assert result.of_prompt(0).provenance["resampled_from"] == [capitals.decode(*ids) for ids in study.sources[0]]


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"positions": "subject"}, InvalidAblation, "a text has no column 'subject'"),
        ({"positions": [20]}, InvalidPrompt, "window 1 of the text: the prompt has 8 tokens, so it has no position 20"),
        ({"imputations": ["resample"], "stride": 16}, InvalidPrompt, "window 1 of the text: no other prompt has 16"),
        ({"reference": [{"prompt": "Rome is"}]}, InvalidPrompt, "'reference-mean-by-position' has values for 2"),
        ({"reference": []}, InvalidPrompt, "the reference: there are no prompts"),
    ],
)
def test_impossible_studies_of_a_text_are_refused(
    capitals: LoadedModel, arguments: dict[str, Any], error: type[Exception], reason: str
) -> None:
    call: dict[str, Any] = {"stride": 8, "imputations": ["reference-mean-by-position"], **arguments}
    with pytest.raises(error, match=reason):
        TextStudy(capitals, TEXT, **call)


def test_interrupted_text_goes_on_only_with_its_settings(capitals: LoadedModel, tmp_path: Path) -> None:
    call: dict[str, Any] = {"stride": 8, "imputations": ["reference-mean"], "positions": "last"}
    whole = sweep_text(capitals, TEXT, **call)

    def stop(share: float) -> None:
        if share > 0.7:
            raise Interrupted

    with pytest.raises(Interrupted):
        sweep_text(capitals, TEXT, **call, checkpoint=tmp_path, progress=stop)
    for change, setting in (({"positions": [0]}, "positions: last there, 0 now"), ({"stride": 4}, "stride")):
        with pytest.raises(InvalidOutput, match=rf"other settings \({setting}"):
            sweep_text(capitals, TEXT, **call | change, checkpoint=tmp_path)
    assert_same_bits(sweep_text(capitals, TEXT, **call, checkpoint=tmp_path), whole)
