"""The tokens that rise and fall most with an ablation."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import MovedToken, moved_tokens
from ablation.hook import HeadAblation
from ablation.models import LoadedModel
from ablation.prompts import Question
from ablation.results import AblationKey
from ablation.studies import moved
from ablation.studies.experiment import sweep_prompts
from tests.comparing import ATOL, IDS

GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)


def test_moved_tokens_are_those_of_hooked_forward_passes() -> None:
    model, ablations = GPT2.shared(), [Ablation([(0, 1)]), Ablation([(1, 2), (0, 0)], "mean")]

    def probabilities() -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([IDS])).logits[0, -1].double().softmax(-1)

    clean = probabilities()
    moves = moved_tokens(model, IDS, ablations, 3)
    with HeadAblation(model) as hook:
        for ablation, (rising, falling) in zip(ablations, moves, strict=True):
            hook.ablate(ablation.heads, ablation.imputation)
            change = probabilities() - clean
            assert [t.change for t in rising] == pytest.approx(change.topk(3).values.tolist(), abs=ATOL["float32"])
            assert [-t.change for t in falling] == pytest.approx((-change).topk(3).values.tolist(), abs=ATOL["float32"])
            for t in (*rising, *falling):
                assert t.clean == pytest.approx(float(clean[t.token]), abs=ATOL["float32"])
                assert t.change == pytest.approx(float(change[t.token]), abs=ATOL["float32"])


def test_ablation_that_changes_nothing_moves_no_token() -> None:
    ((rising, falling),) = moved_tokens(GPT2.shared(), IDS, [Ablation([])])
    assert rising == falling == []


def test_count_is_limited_by_the_vocabulary() -> None:
    ((rising, falling),) = moved_tokens(GPT2.shared(), IDS, [Ablation([(0, 0)])], 1000)
    tokens = [t.token for t in (*rising, *falling)]
    assert len(tokens) == len(set(tokens)) <= GPT2.shared().config.vocab_size
    assert all(t.change > 0 for t in rising) and all(t.change < 0 for t in falling)


def test_strongest_ablations_of_each_prompt_are_listed(capitals: LoadedModel, tmp_path: Path) -> None:
    questions = [Question(f"{city} is the capital of") for city in ("Berlin", "Rome")]
    result = sweep_prompts(capitals, questions, ["zero"])
    found = moved.of_strongest(capitals, result, 2, count=3)
    assert [of.prompt for of in found] == [0, 0, 1, 1]
    for of in found:
        kl = result.ablated["kl"][of.prompt]
        assert kl[result.ablations.index(of.ablation)] >= sorted(kl)[-2]
    moved.write_csv(capitals, result, found, tmp_path / "top_tokens.csv")
    with (tmp_path / "top_tokens.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(of.rising) + len(of.falling) for of in found)
    assert rows[0]["prompt"] == "Berlin is the capital of" and rows[0]["direction"] == "rises"
    assert float(rows[0]["ablated"]) - float(rows[0]["clean"]) == pytest.approx(float(rows[0]["change"]))
    lines = list(moved.render(capitals, found[:1]))
    assert lines[0] == f"{found[0].ablation.label}, zero" and lines[1].startswith("  rise  '")


def test_small_change_is_not_shown_as_zero(capitals: LoadedModel) -> None:
    key = AblationKey(((0, 1),), "zero", "last")
    of = moved.Moved(0, key, [MovedToken(3, 0.1, 0.0131)], [MovedToken(4, 0.1, -0.00004), MovedToken(5, 0.1, -3e-9)])
    heading, rises, falls = moved.render(capitals, [of])
    assert heading == "L0H1, zero at last" and rises.endswith(" +1.31")
    assert re.findall(r" (-\S+?)(?:,|$)", falls) == ["-4e-03", "-3e-07"]
