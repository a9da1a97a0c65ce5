"""Sampled text: each token has the model's probability, and both runs see the same random numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from ablation.errors import InvalidAblation
from ablation.models import LoadedModel
from ablation.studies.generation import generate
from ablation.studies.sampling import Sampling, seed_of_prompt
from tests.test_generation import HEADS, LLAMA, loaded_of, looped, text_of


def sampled_by_hand(sampling: Sampling) -> Callable[[Tensor], int]:
    """Sample from the softmax by plain arithmetic, with torch's next random numbers."""

    def choose(row: Tensor) -> int:
        scaled = [value / sampling.temperature for value in row.tolist()]
        order = sorted(range(len(scaled)), key=lambda token: -scaled[token])[: sampling.top_k]
        total = math.fsum(math.exp(scaled[token]) for token in order)
        kept, mass = [], 0.0
        for token in order:
            if mass < sampling.top_p:
                kept.append(token)
                mass += math.exp(scaled[token]) / total
        weights = torch.zeros(len(row))
        whole = math.fsum(math.exp(scaled[token]) for token in kept)
        for token in kept:
            weights[token] = math.exp(scaled[token]) / whole
        return int(torch.multinomial(weights, 1))

    return choose


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.5),
        Sampling(top_p=0.6),
        Sampling(top_k=3),
        Sampling(1.5, top_p=0.8, top_k=60),
        Sampling(2.0),
    ],
)
def test_sampled_text_equals_sampling_by_hand(sampling: Sampling) -> None:
    """Also with 60 tokens of 41, which is all of them."""
    for ids in ([3, 1, 4], [1, 5]):
        wanted = []
        for ablation in (None, (HEADS, "zero", None)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of_prompt(7, ids))
                wanted.append(looped(LLAMA, ids, 6, ablation, sampled_by_hand(sampling))[0])
        (found,) = generate(loaded_of(LLAMA), [text_of(ids)], HEADS, max_new_tokens=6, sampling=sampling, seed=7)
        assert [found.clean, found.ablated] == wanted


def test_all_tokens_are_sampled_without_top_k(capitals: LoadedModel) -> None:
    """By default, transformers would sample among the 50 most probable ones."""
    (found,) = generate(capitals, ["Berlin is the capital of"], [], max_new_tokens=20, sampling=Sampling(1000.0))
    with torch.no_grad():
        rows = capitals.model(torch.tensor([[*found.token_ids, *found.clean]])).logits[0, len(found.token_ids) - 1 : -1]
    ranks = [int((row > row[token]).sum()) for row, token in zip(rows, found.clean, strict=True)]
    assert max(ranks) >= 50


@pytest.mark.slow
def test_sampled_tokens_have_the_models_probabilities() -> None:
    ids, runs = [3, 1, 4], 200
    (row,) = looped(LLAMA, ids, 1)[1]
    probability = (row.double() / 0.5).softmax(dim=-1)
    best = probability.topk(4).indices.tolist()
    expected = [runs * float(probability[token]) for token in best]
    assert min(expected) > 5
    found = [
        generate(loaded_of(LLAMA), [text_of(ids)], [], max_new_tokens=1, sampling=Sampling(0.5), seed=seed)[0].clean[0]
        for seed in range(runs)
    ]
    counts = Counter(found)
    observed = [counts[token] for token in best]
    assert chisquare([*observed, runs - sum(observed)], [*expected, runs - sum(expected)]).pvalue > 0.01
    assert len(counts) > 4


def test_text_depends_on_neither_the_order_nor_other_runs() -> None:
    options: dict[str, Any] = dict(sampling=Sampling(1.5), max_new_tokens=8)
    prompts, loaded = ["t3 t1 t4", "t1 t5", "t9"], loaded_of(LLAMA)
    found = generate(loaded, prompts, HEADS, seed=3, **options)
    assert generate(loaded, prompts, HEADS, seed=3, **options) == found
    assert generate(loaded, prompts[::-1], HEADS, seed=3, **options) == found[::-1]
    assert generate(loaded, prompts[1:2], HEADS, seed=3, **options) == found[1:2]
    others = generate(loaded, prompts, [(0, 0)], "scale:0.5", seed=3, **options)
    assert [of.clean for of in others] == [of.clean for of in found]
    of_other_seed = generate(loaded, prompts, [], seed=4, **options)
    assert all(one.clean != other.clean for one, other in zip(of_other_seed, found, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "the temperature is 0: it is a number above 0"),
        ({"temperature": math.nan}, "the temperature is nan"),
        ({"temperature": math.inf}, "the temperature is inf"),
        ({"temperature": True}, "the temperature is True"),
        ({"top_p": 0.0}, "top_p is 0.0: it is a probability"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": 0}, "top_k is 0: it is a number of tokens"),
        ({"top_k": 1.5}, "top_k is 1.5"),
    ],
)
def test_bad_sampling_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidAblation, match=message):
        Sampling(**arguments)
