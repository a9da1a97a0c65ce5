"""The sweep: the run of all one-head ablations, and the sweeps of several prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ablation.checks.decoders import POSITIONS, VOCABULARY, Decoder, decoders, randomised
from ablation.edits import Ablation
from ablation.engine import run_sequential
from ablation.errors import InvalidPrompt, InvalidResult, NonFiniteLogits
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Imputation, Site
from ablation.measure import resolve_watched, tie_tolerance
from ablation.models import LoadedModel
from ablation.prompts import Question
from ablation.results import AblationKey, Result
from ablation.studies.experiment import sweep_prompts
from ablation.sweeps import sweep, sweep_sequential
from tests.comparing import ATOL, IDS, arrays, assert_results_equal
from tests.synthetic import synthetic
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
    result = sweep(model, IDS, target, control)
    names = ("target_probability", "control_probability")
    changes = np.stack([result.grid(result.change(name))[0] for name in names])
    argmax, margin = (result.grid(result.ablated[name])[0] for name in ("argmax", "margin"))
    ids = torch.tensor([IDS])
    clean = logits(model, ids)[0, -1].double().softmax(-1)
    with HeadAblation(model) as ablation:
        for index, imputation in enumerate(result.imputations):
            for layer, head in find_heads(model):
                ablation.ablate([(layer, head)], imputation)
                alone = logits(model, ids)[0, -1].double()
                change = alone.softmax(-1)[[target, control]] - clean[[target, control]]
                cell = (index, layer, head)
                np.testing.assert_allclose(changes[:, *cell], change, rtol=0, atol=1e-5)
                assert argmax[cell] == alone.argmax()
                assert margin[cell] == pytest.approx(float(-alone.topk(2).values.diff()), abs=1e-4)


def test_clean_values_are_those_of_a_model_without_hooks() -> None:
    """The clean run is a row of a larger batch, so it agrees up to rounding."""
    model = GPT2.shared()
    result = sweep(model, IDS, 7)
    kept: list[Tensor] = []
    handle = find_heads(model).layers[1].projection.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    clean = logits(model, torch.tensor([IDS]))[0, -1]
    handle.remove()
    atol = ATOL["float32"]
    assert result.head_mean[0, 1, 2] == pytest.approx(kept[0][..., 4:6].double().mean().item(), abs=atol)
    of_clean = {name: value for name, (value,) in result.clean.items()}
    assert of_clean["target_probability"] == pytest.approx(clean.double().softmax(-1)[7].item(), abs=atol)
    assert of_clean["margin"] == pytest.approx(float(-clean.double().topk(2).values.diff()), abs=atol)
    assert of_clean["margin"] > 2 * atol and of_clean["argmax"] == clean.argmax()


def test_receipts_show_one_call_and_all_elements() -> None:
    result = sweep(GPT2.shared(), IDS)
    assert result.calls.shape == (1, 12) and (result.calls == 1).all()
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
    changes = [result.grid(result.change(f"{name}_log_probability"))[0] for name in ("target", "control")]
    assert (np.abs(changes).max(axis=(0, 1)) == 0).tolist() == [[False, False, False], [False, True, True]]
    assert (result.grid(result.changed)[0] == 0).tolist() == [[[False] * 3, [False, True, False]]] * 2


def test_imputations_of_one_class_stay_distinct() -> None:
    class Constant(Imputation):
        reads = "token"

        def __init__(self, value: float) -> None:
            object.__setattr__(self, "value", value)
            object.__setattr__(self, "name", f"constant {value}")

        def __call__(self, z: Tensor, site: Site) -> Tensor:
            return z.new_full((), self.value)  # type: ignore[attr-defined]

    model, both = GPT2.shared(), [Constant(0.0), Constant(1.0)]
    for max_rows in (None, 3, 6):
        result = sweep(model, IDS, imputations=both, max_rows=max_rows)
        assert result.provenance["method"] == "growing batch"
        assert_results_equal(result, sweep_sequential(model, IDS, imputations=both), ATOL["float32"])


# ---- watched tokens and prompts


def watched(result: Result) -> tuple[int, ...]:
    """The target and the control of a result of one prompt, each of one token."""
    (prompt,) = result.prompts
    return (*prompt.target, *prompt.control)


def test_none_watches_the_most_probable_tokens() -> None:
    model = GPT2.shared()
    first, second, third = logits(model, torch.tensor([IDS]))[0, -1].topk(3).indices.tolist()
    assert watched(sweep(model, IDS)) == (first, second)
    assert watched(sweep(model, IDS, second)) == (second, first)
    assert watched(sweep(model, IDS, first)) == (first, second)
    assert watched(sweep(model, IDS, None, first)) == (second, first)
    assert watched(sweep(model, IDS, None, second)) == (first, second)
    assert watched(sweep(model, IDS, third)) == (third, first)


def test_every_token_can_be_watched_and_no_other() -> None:
    model = GPT2.shared()
    for token in range(VOCABULARY):
        other = (token + 1) % VOCABULARY
        assert watched(run_sequential(model, IDS, [Ablation([])], token, other)) == (token, other)
    clean = logits(model, torch.tensor([IDS]))[0, -1]
    order = clean.argsort(descending=True).tolist()
    assert resolve_watched([None] * VOCABULARY, clean, tie_tolerance(clean)) == order
    for way in (sweep, sweep_sequential):
        for arguments in ((VOCABULARY,), (None, VOCABULARY), (0, [1, VOCABULARY]), (-1,)):
            with pytest.raises(InvalidPrompt, match=r"^no token (41|-1): the model predicts 41 tokens$"):
                way(model, IDS, *arguments)  # type: ignore[operator]


def test_first_token_and_longest_prompt_are_accepted() -> None:
    result = sweep(GPT2.shared(), [0] * POSITIONS, 0, imputations=["zero"])
    assert (result.replaced == POSITIONS * 2).all()  # tokens x head_dim


@pytest.mark.parametrize("ids", [[True, False], torch.tensor([[3], [1]]), torch.tensor([True, False]), [np.bool_(1)]])
def test_prompt_must_be_flat_integers(ids: Any) -> None:
    with pytest.raises(InvalidPrompt, match="is not a token id"):
        sweep(GPT2.shared(), ids)


@pytest.mark.parametrize("ids", [[np.int64(3), np.int64(1)], torch.tensor([3, 1]), np.array([3, 1])])
def test_prompt_may_hold_integers_of_any_library(ids: Any) -> None:
    assert_results_equal(sweep(GPT2.shared(), ids), sweep(GPT2.shared(), [3, 1]), atol=0)


# ---- several prompts


def of_words(model: PreTrainedModel) -> LoadedModel:
    """A random decoder with a tokenizer whose token 7 is the word w7."""
    raw = Tokenizer(WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    raw.pre_tokenizer = WhitespaceSplit()
    return LoadedModel("words", model, PreTrainedTokenizerFast(tokenizer_object=raw))


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


@given(decoders(FAMILIES), st.lists(PROMPT, min_size=1, max_size=4), st.one_of(st.none(), st.integers(2, 40)))
def test_each_prompt_is_its_own_sweep(decoder: Decoder, prompts: list[list[int]], max_rows: int | None) -> None:
    model = decoder.shared()
    targets = [len(ids) for ids in prompts]
    records = [dict(prompt=words(ids), target=f"w{target}") for ids, target in zip(prompts, targets, strict=True)]
    both = sweep_prompts(of_words(model), records, max_rows=max_rows)
    assert len(both.prompts) == len(prompts) and both.ablated["margin"].shape[0] == len(prompts)
    for index, (ids, target) in enumerate(zip(prompts, targets, strict=True)):
        result, alone = both.of_prompt(index), sweep(model, ids, target, max_rows=max_rows)
        (prompt,) = result.prompts
        assert (prompt.token_ids, result.provenance["method"]) == (tuple(ids), "growing batch")
        assert (prompt.prompt, prompt.target_text) == (words(ids), f"w{target}")
        unnamed = replace(prompt, prompt=None, target_text=None, control_text=None)
        assert_results_equal(replace(result, prompts=(unnamed,)), alone, atol=0)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "^there are no prompts$"),
        ([{"prompt": "w1"}], "^prompt 1, column target: it is missing$"),
        ([{"prompt": "w1", "target": "w2"}, {"target": "w2"}], "^prompt 2, column prompt: it is missing$"),
    ],
)
def test_prompts_and_targets_come_in_pairs(records: Any, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason):
        sweep_prompts(of_words(GPT2.shared()), records)


def test_progress_over_prompts_rises_to_one() -> None:
    shares: list[float] = []
    prompts = [Question(words(ids)) for ids in ([1, 2], [3, 4, 5], [6, 7])]
    sweep_prompts(of_words(GPT2.shared()), prompts, progress=shares.append)
    assert shares == pytest.approx([(i + 1) / 6 for i in range(6)])  # two layers for each prompt


# ---- results of several prompts, joined and taken apart


def of_prompts() -> list[Result]:
    """Results of one list of ablations, for prompts and targets of other lengths."""
    model, metrics = GPT2.shared(), {"largest": lambda rows: rows.amax(dim=-1)}
    asked: list[tuple[list[int], Any, Any]] = [(IDS, 7, None), ([1, 2], [7, 3], 11), ([9], None, [1, 2, 3])]
    return [sweep(model, *of, metrics=metrics) for of in asked]


def test_joined_results_are_taken_apart_without_loss() -> None:
    parts = of_prompts()
    parts[1] = replace(parts[1], provenance={**parts[1].provenance, "device": "elsewhere"})
    both = Result.joined(parts)
    assert both.prompts == tuple(part.prompts[0] for part in parts) and both.ablations == parts[0].ablations
    assert {name: len(values) for name, values in arrays(both).items()} == {"ablations": 12} | dict.fromkeys(
        arrays(both).keys() - {"ablations"}, 3
    )
    assert both.provenance["device"] == ["cpu", "elsewhere", "cpu"] and "device" in both.provenance["for_each_prompt"]
    for index, part in enumerate(parts):
        for place in (index, index - 3):
            alone = both.of_prompt(place)
            assert_results_equal(alone, part, atol=0)
            assert alone.provenance == part.provenance
    again = Result.joined([both.of_prompt(index) for index in range(3)])
    nested = Result.joined([Result.joined(parts[:1]), Result.joined(parts[1:])])
    for other in (again, nested):
        assert_results_equal(other, both, atol=0)
        assert other.provenance == both.provenance
    assert Result.joined(parts[:1]).provenance == parts[0].provenance


def test_results_that_differ_in_kind_cannot_be_joined() -> None:
    first, other = of_prompts()[0], Decoder("gpt2", num_layers=3, num_heads=3, head_dim=2).shared()
    largest: Any = {"largest": lambda rows: rows.amax(dim=-1)}
    for stranger in (
        sweep(GPT2.shared(), IDS),
        sweep(GPT2.shared(), IDS, imputations=["zero"], metrics=largest),
        sweep(GPT2.shared(), IDS, imputations=["mean", "zero"], metrics=largest),
        run_sequential(other, IDS, [Ablation(key.heads, key.imputation) for key in first.ablations], metrics=largest),
    ):
        for order in ([first, stranger], [stranger, first]):
            with pytest.raises(InvalidResult, match="^results of other ablations, metrics or models cannot be joined$"):
                Result.joined(order)


# ---- maps of heads


def test_grid_places_every_kind_of_value() -> None:
    """Layer 0 has two heads, layer 1 none, and layer 2 three; the order of the ablations does not matter."""
    heads = [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    head_mean = np.full((2, 3, 3), np.nan)
    head_mean[:, *np.array(heads).T] = 0.0
    result = synthetic(3, 3, prompts=2, head_mean=head_mean)
    keys = [AblationKey(((layer, head),), name) for name in ("zero", "mean") for layer, head in heads]
    np.random.RandomState(0).shuffle(keys)
    result = replace(result, ablations=tuple(keys))
    missing = np.ones((3, 3), dtype=bool)
    missing[*np.array(heads).T] = False
    assert set(result.imputations) == {"zero", "mean"} and np.array_equal(result.has_head, ~missing)
    values = np.arange(20).reshape(2, 10)
    for listed, empty in ((values / 2, np.nan), (values, -1), (values % 2 == 0, False)):
        maps = result.grid(listed)
        assert maps.shape == (2, 2, 3, 3) and maps.dtype == listed.dtype
        np.testing.assert_array_equal(maps[..., missing], np.full((2, 2, 4), empty))
        for index, key in enumerate(keys):
            cell = (result.imputations.index(key.imputation), *key.heads[0])
            assert np.array_equal(maps[:, *cell], listed[:, index])
        assert np.array_equal(result.grid(listed[1]), maps[1], equal_nan=listed.dtype == float)


@pytest.mark.parametrize("heads", [[], [(0, 0), (1, 2)]], ids=["none", "two"])
def test_sets_of_heads_make_no_map(heads: list[tuple[int, int]]) -> None:
    result = run_sequential(GPT2.shared(), IDS, [Ablation([(0, 0)]), Ablation(heads)])
    reason = "^ablations of several heads, or of none, cannot be arranged as a map of heads$"
    for act in (lambda: result.grid(result.kept), lambda: result.has_head):
        with pytest.raises(InvalidResult, match=reason):
            act()


# ---- side effects and provenance


def test_second_sweep_is_identical_and_leaves_no_hook() -> None:
    model = GPT2.shared()
    before = hooks_of(model)
    one, other = sweep(model, IDS), sweep(model, IDS)
    assert hooks_of(model) == before
    assert_results_equal(one, other, atol=0)


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
    assert np.isfinite(sweep(model, IDS).ablated["margin"]).all()

    def poison(module: Any, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(0, torch.tensor(3), torch.nan) if len(out) > 3 else out

    handle = model.transformer.h[1].mlp.register_forward_hook(poison)
    try:
        with pytest.raises(NonFiniteLogits, match="layer 0, head 1; zero imputation"):
            sweep(model, IDS)
    finally:
        handle.remove()
