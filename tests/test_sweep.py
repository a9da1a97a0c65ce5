"""The sweep: the run of all one-head ablations, arranged over imputations, layers and heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ablation.checks.decoders import POSITIONS, VOCABULARY, Decoder, decoders, randomised
from ablation.errors import InvalidPrompt, NonFiniteLogits
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Imputation
from ablation.sweeps import sweep, sweep_prompts, sweep_sequential
from tests.comparing import ATOL, IDS, arrays, assert_results_equal
from tests.test_hook import hooks_of, logits

FAMILIES = ("gpt2", "llama", "gemma3", "gpt_neox", "opt")
GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
PROMPT = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)


@given(decoders(FAMILIES), PROMPT, st.one_of(st.none(), st.integers(2, 9)))
def test_sweep_equals_sequential_sweep(decoder: Decoder, ids: list[int], max_rows: int | None) -> None:
    result = sweep(decoder.shared(), ids, max_rows=max_rows)
    assert result.provenance["method"] == "growing batch"
    assert_results_equal(result, sweep_sequential(decoder.shared(), ids), ATOL[decoder.dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_cell_is_the_single_ablation_of_that_head(family: str) -> None:
    decoder = Decoder(family, num_layers=2, num_heads=3, head_dim=4)
    model, target, control = decoder.shared(), 7, 11
    result = sweep(model, IDS, [target, control])
    ids = torch.tensor([IDS])
    clean = logits(model, ids)[0, -1].double().softmax(-1)
    with HeadAblation(model) as ablation:
        for index, imputation in enumerate(result.imputations):
            for layer, head in find_heads(model):
                ablation.ablate([(layer, head)], imputation)
                alone = logits(model, ids)[0, -1].double()
                change = alone.softmax(-1)[[target, control]] - clean[[target, control]]
                cell = (index, layer, head)
                np.testing.assert_allclose(result.probability_change[:, *cell], change, rtol=0, atol=1e-5)
                assert result.argmax[cell] == alone.argmax()
                assert result.margin[cell] == pytest.approx(float(-alone.topk(2).values.diff()), abs=1e-4)


def test_clean_values_are_those_of_a_model_without_hooks() -> None:
    """The clean run is a row of a larger batch, so it agrees up to rounding."""
    model = GPT2.shared()
    result = sweep(model, IDS, [7])
    kept: list[Tensor] = []
    handle = find_heads(model).layers[1].projection.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    clean = logits(model, torch.tensor([IDS]))[0, -1]
    handle.remove()
    atol = ATOL["float32"]
    assert result.head_mean[1, 2] == pytest.approx(kept[0][..., 4:6].double().mean().item(), abs=atol)
    assert result.clean_probability[0] == pytest.approx(clean.double().softmax(-1)[7].item(), abs=atol)
    assert result.clean_margin == pytest.approx(float(-clean.double().topk(2).values.diff()), abs=atol)
    assert result.clean_margin > 2 * atol and result.clean_argmax == clean.argmax()


def test_receipts_show_one_call_and_all_elements() -> None:
    result = sweep(GPT2.shared(), IDS)
    assert (result.calls == 1).all()
    assert (result.replaced == 5 * 2).all()  # tokens x head_dim
    assert (result.changed == 10).all()


def test_head_that_writes_nothing_has_no_effect() -> None:
    model = randomised(GPT2.shared().config, seed=1)
    with torch.no_grad():
        attention = model.transformer.h[1].attn
        attention.c_attn.weight[:, 2 * 6 + 2 : 2 * 6 + 4] = 0  # the values of head 1
        attention.c_attn.bias[2 * 6 + 2 : 2 * 6 + 4] = 0
        attention.c_proj.weight[4:6] = 0  # the block of W_O that reads head 2
    result = sweep_sequential(model, IDS)
    effect = np.abs(result.log_probability_change).max(axis=(0, 1))
    assert (effect == 0).tolist() == [[False, False, False], [False, True, True]]
    assert (result.changed == 0).tolist() == [[[False] * 3, [False, True, False]]] * 2


def test_imputations_of_one_class_stay_distinct() -> None:
    class Constant(Imputation):
        per_token = True

        def __init__(self, value: float) -> None:
            object.__setattr__(self, "value", value)
            object.__setattr__(self, "name", f"constant {value}")

        def __call__(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
            return z.new_full((), self.value)  # type: ignore[attr-defined]

    model, both = GPT2.shared(), [Constant(0.0), Constant(1.0)]
    for max_rows in (None, 3, 6):
        result = sweep(model, IDS, imputations=both, max_rows=max_rows)
        assert result.provenance["method"] == "growing batch"
        assert_results_equal(result, sweep_sequential(model, IDS, imputations=both), ATOL["float32"])


# ---- watched tokens and prompts


def test_none_watches_the_most_probable_tokens() -> None:
    model = GPT2.shared()
    first, second, third = logits(model, torch.tensor([IDS]))[0, -1].topk(3).indices.tolist()
    assert sweep(model, IDS).watched.tolist() == [first, second]
    other = min({0, 1, 2, 3} - {first, second, third})
    assert sweep(model, IDS, [second, None, other, None]).watched.tolist() == [second, first, other, third]


def test_every_token_can_be_watched_and_no_more() -> None:
    assert sweep_sequential(GPT2.shared(), IDS, range(VOCABULARY)).watched.tolist() == list(range(VOCABULARY))
    order = logits(GPT2.shared(), torch.tensor([IDS]))[0, -1].argsort(descending=True).tolist()
    assert sweep_sequential(GPT2.shared(), IDS, [None] * VOCABULARY).watched.tolist() == order
    with pytest.raises(InvalidPrompt, match="42 tokens cannot be watched: the model has 41"):
        sweep_sequential(GPT2.shared(), IDS, [None] * (VOCABULARY + 1))


def test_first_token_and_longest_prompt_are_accepted() -> None:
    result = sweep(GPT2.shared(), [0] * POSITIONS, [0], ["zero"])
    assert (result.replaced == POSITIONS * 2).all()  # tokens x head_dim


@pytest.mark.parametrize("ids", [[True, False], torch.tensor([[3], [1]]), torch.tensor([True, False]), [np.bool_(1)]])
def test_prompt_must_be_flat_integers(ids: Any) -> None:
    with pytest.raises(InvalidPrompt, match="is not a token id"):
        sweep(GPT2.shared(), ids)


@pytest.mark.parametrize("ids", [[np.int64(3), np.int64(1)], torch.tensor([3, 1]), np.array([3, 1])])
def test_prompt_may_hold_integers_of_any_library(ids: Any) -> None:
    assert np.array_equal(sweep(GPT2.shared(), ids).margin, sweep(GPT2.shared(), [3, 1]).margin)


@given(decoders(FAMILIES), st.lists(PROMPT, min_size=1, max_size=4), st.one_of(st.none(), st.integers(2, 40)))
def test_each_prompt_is_its_own_sweep(decoder: Decoder, prompts: list[list[int]], max_rows: int | None) -> None:
    model = decoder.shared()
    watch = [[len(ids), None] for ids in prompts]
    results = sweep_prompts(model, prompts, watch, max_rows=max_rows)
    assert len(results) == len(prompts)
    for ids, watched, result in zip(prompts, watch, results, strict=True):
        assert (result.provenance["token_ids"], result.provenance["method"]) == (ids, "growing batch")
        assert_results_equal(result, sweep(model, ids, watched, max_rows=max_rows), atol=0)


@pytest.mark.parametrize(("prompts", "watch"), [([], None), ([[1]], []), ([[1], [2]], [[None]])])
def test_prompts_and_watched_tokens_come_in_pairs(prompts: Any, watch: Any) -> None:
    with pytest.raises(InvalidPrompt, match=f"there are {len(prompts)} prompts"):
        sweep_prompts(GPT2.shared(), prompts, watch)


def test_progress_over_prompts_rises_to_one() -> None:
    shares: list[float] = []
    sweep_prompts(GPT2.shared(), [[1, 2], [3, 4, 5], [6, 7]], progress=shares.append)
    assert shares == pytest.approx([(i + 1) / 6 for i in range(6)])  # two layers for each prompt


# ---- side effects and provenance


def test_second_sweep_is_identical_and_leaves_no_hook() -> None:
    model = GPT2.shared()
    before = hooks_of(model)
    one, other = arrays(sweep(model, IDS)), arrays(sweep(model, IDS))
    assert hooks_of(model) == before
    for name, value in one.items():
        assert np.array_equal(value, other[name]), name


def test_interrupted_sweep_leaves_no_hook() -> None:
    model = GPT2.shared()
    before = hooks_of(model)

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    for way in (sweep, sweep_sequential):
        with pytest.raises(KeyboardInterrupt) as caught:
            way(model, IDS, progress=interrupt)
        assert hooks_of(model) == before  # while the traceback still holds every frame
        del caught


def test_progress_rises_to_one() -> None:
    for way, steps in ((sweep, 2), (sweep_sequential, 12)):
        shares: list[float] = []
        way(GPT2.shared(), IDS, progress=shares.append)
        assert shares == [(i + 1) / steps for i in range(steps)]


def test_provenance_names_method_and_passes() -> None:
    model = GPT2.shared()  # 2 layers x 3 heads, each ablated with 2 imputations
    for max_rows, passes in ((None, 1), (13, 1), (12, 2), (4, 4), (2, 12)):
        how = sweep(model, IDS, max_rows=max_rows).provenance
        assert (how["method"], how["passes"]) == ("growing batch", passes)
    assert sweep_sequential(model, IDS).provenance["method"] == "sequential"


def test_non_finite_logits_name_the_ablation() -> None:
    model = GPT2.shared()
    assert np.isfinite(sweep(model, IDS).margin).all()

    def poison(module: Any, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(0, torch.tensor(3), torch.nan) if len(out) > 3 else out

    handle = model.transformer.h[1].mlp.register_forward_hook(poison)
    try:
        with pytest.raises(NonFiniteLogits, match="layer 0, head 2; zero imputation"):
            sweep(model, IDS)
    finally:
        handle.remove()
