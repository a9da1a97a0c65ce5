"""The adapters that docs/checking.md shows work, with code of the kind that each is for."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ablation import HeadAblation, find_heads
from ablation.checks import CHECKS
from ablation.checks.oracles import apply_surgery
from ablation.checks.signature import adapter_problem
from tests.mutants.trial import few_examples, try_check

PAGE = (Path(__file__).parent.parent / "docs" / "checking.md").read_text(encoding="utf-8")
SHOWN = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "from my_project import" in code]
"""Each adapter on the page."""
IMPORTED = [" ".join(re.findall(r"from my_project import (\w+)", code)) for code in SHOWN]
TITLES = [f"class of {name}" if "class Mine" in code else name for name, code in zip(IMPORTED, SHOWN, strict=True)]

Pairs = Sequence[tuple[int, int]]


@contextmanager
def my_hook(model: PreTrainedModel, heads: Pairs, imputation: str = "zero") -> Iterator[None]:
    with HeadAblation(model) as ablation:
        ablation.ablate(list(heads), imputation)
        yield


def run_ablated(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, heads: Pairs) -> Tensor:
    with torch.no_grad(), my_hook(model, heads):
        return model(input_ids, attention_mask=attention_mask).logits


def logits_of_texts(model: PreTrainedModel, tokenizer: Any, texts: list[str], heads: Pairs) -> Tensor:
    return run_ablated(model, tokenizer(texts, return_tensors="pt")["input_ids"], None, heads)


def next_token_probabilities(model: PreTrainedModel, input_ids: Tensor, heads: Pairs, **inputs: Any) -> Tensor:
    with my_hook(model, heads):
        return model(input_ids, **inputs).logits[:, -1].softmax(dim=-1)


class Ablator:
    def __init__(self, name: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(name)

    def logits(self, input_ids: Tensor, heads: Pairs, **inputs: Any) -> Tensor:
        with my_hook(self.model, heads):
            return self.model(input_ids, **inputs).logits


def zero_weights(model: PreTrainedModel, heads: Pairs) -> None:
    for layer, head in heads:
        find_heads(model).validate((layer, head))
    apply_surgery(model, tuple(heads))


@contextmanager
def ablate_head(model: PreTrainedModel, layer_index: int, head_index: int) -> Iterator[None]:
    with my_hook(model, [(layer_index, head_index)]):
        yield


CODE = (my_hook, run_ablated, logits_of_texts, next_token_probabilities, Ablator, zero_weights, ablate_head)


@pytest.fixture(params=SHOWN, ids=TITLES)
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter that a block of the page makes."""
    my_project = ModuleType("my_project")
    vars(my_project).update({code.__name__: code for code in CODE})
    monkeypatch.setitem(sys.modules, "my_project", my_project)
    names: dict[str, Any] = {"__name__": "my_adapter"}
    exec(request.param, names)  # noqa: S102 (our own documentation)
    return names["Mine"]


def test_page_shows_an_adapter_for_each_kind_of_code() -> None:
    assert set(IMPORTED) == {code.__name__ for code in CODE} and len(SHOWN) == len(CODE) + 1  # my_hook is shown twice


def test_adapter_of_the_page_passes_some_checks(shown: Any) -> None:
    assert adapter_problem(shown) is None
    with few_examples(examples=1):
        for check in CHECKS:
            if check.id in ("smoke", "identity", "oracle.zero", "locality", "refusal.head", "hygiene.restored"):
                trial = try_check(check, shown)
                assert trial is None or not trial.rejected, trial.reason


@pytest.mark.mutants
def test_adapter_of_the_page_passes_all_checks(shown: Any) -> None:
    with few_examples(examples=4):
        for check in CHECKS:
            trial = try_check(check, shown)
            assert trial is None or not trial.rejected, trial.reason
