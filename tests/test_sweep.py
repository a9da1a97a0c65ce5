"""The sweep: the growing batch equals the double loop, and no cell is believed without its receipt."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BloomConfig

from ablation import hook as hook_module
from ablation.checks.decoders import POSITIONS, VOCABULARY, Decoder, decoders, randomised
from ablation.errors import AblationNotApplied, InvalidPrompt, NonFiniteLogits, UnsupportedModel
from ablation.growing import BatchMismatch, growing_batch
from ablation.heads import find_heads
from ablation.hook import EditCounts, HeadAblation
from ablation.imputation import Imputation
from ablation.sweep import SweepResult, _agree, sweep, sweep_prompts, sweep_sequential
from tests.test_hook import Twice, hooks_of, logits

FAMILIES = ("gpt2", "llama", "gemma3", "gpt_neox", "opt")
GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
IDS = [3, 1, 4, 1, 5]

# The same numbers by kernels for another number of rows; see `ablation.checks.cases.close` for the noise.
ATOL = {"float32": 8e-5, "float64": 4e-14}  # 30 times


def arrays(result: SweepResult) -> dict[str, Any]:
    return {f.name: getattr(result, f.name) for f in fields(SweepResult) if f.name != "provenance"}


def assert_equal(one: SweepResult, other: SweepResult, atol: float) -> None:
    """Equal but for rounding; argmax where its margin decides it."""
    for name, value in arrays(one).items():
        expected = getattr(other, name)
        if name == "argmax":
            wrong = np.argwhere((one.margin > 2 * atol) & (value != expected))
            assert not len(wrong), f"argmax differs at [imputation, layer, head] {wrong.tolist()}"
        elif name == "imputations":
            assert value == expected
        else:
            np.testing.assert_allclose(value, expected, rtol=0, atol=atol, err_msg=name)


@given(
    decoders(FAMILIES),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(2, 9)),
)
def test_the_growing_batch_equals_the_double_loop(decoder: Decoder, ids: list[int], max_rows: int | None) -> None:
    growing_batch = sweep(decoder.build(), ids, max_rows=max_rows)
    assert growing_batch.provenance["method"] == "growing batch"
    assert_equal(growing_batch, sweep_sequential(decoder.build(), ids), ATOL[decoder.dtype])


PROMPT = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)


@given(
    decoders(FAMILIES),
    st.lists(st.one_of(PROMPT, PROMPT.filter(lambda ids: len(ids) == 3)), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(2, 40)),
)
def test_several_prompts_give_what_each_gives_alone(
    decoder: Decoder, prompts: list[list[int]], max_rows: int | None
) -> None:
    model = decoder.build()
    watch = [[len(ids), None] for ids in prompts]
    together = sweep_prompts(model, prompts, watch, max_rows=max_rows)
    assert len(together) == len(prompts)
    for ids, watched, result in zip(prompts, watch, together, strict=True):
        assert (result.provenance["token_ids"], result.provenance["method"]) == (ids, "growing batch")
        assert_equal(result, sweep(model, ids, watched), ATOL[decoder.dtype])


def test_prompts_of_one_length_share_their_passes_as_far_as_rows_go() -> None:
    model = GPT2.build()  # 2 layers x 3 heads x 2 imputations: 13 rows a prompt
    prompts = [[1, 2], [3, 4, 5], [6, 7], [8, 9], [10, 11]]
    for max_rows, together in ((None, [4, 1, 4, 4, 4]), (39, [3, 1, 3, 3, 1]), (25, [1] * 5)):
        results = sweep_prompts(model, prompts, max_rows=max_rows)
        assert [result.provenance["prompts"] for result in results] == together


def test_prompts_whose_rows_see_each_other_are_swept_alone() -> None:
    """Each prompt's sweep is right by itself here, but not beside another prompt."""
    model = GPT2.build()

    def first_prompt_for_all(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + out[:1] * 0.1  # the first row is the clean one of the first prompt

    embedding = model.transformer.drop.register_forward_hook(first_prompt_for_all)
    try:
        shares: list[float] = []
        together = sweep_prompts(model, [[1, 2], [3, 4]], progress=shares.append)
        assert shares[-4:] == [0.25, 0.5, 0.75, 1]
        for ids, result in zip([[1, 2], [3, 4]], together, strict=True):
            assert result.provenance["prompts"] == 1
            assert_equal(result, sweep_sequential(model, ids), ATOL["float32"])
    finally:
        embedding.remove()


@pytest.mark.parametrize(("prompts", "watch"), [([], None), ([[1]], []), ([[1], [2]], [[None]])])
def test_prompts_and_watched_tokens_come_in_pairs(prompts: Any, watch: Any) -> None:
    with pytest.raises(InvalidPrompt, match=f"there are {len(prompts)} prompts"):
        sweep_prompts(GPT2.build(), prompts, watch)


def test_what_a_layer_is_given_for_each_prompt_is_repeated_for_the_copies_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two prompts, of as many tokens, so that not all that has two of something has a row for each prompt."""
    heads = find_heads(GPT2.build())
    block = heads.layers[1].block
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: (args, kwargs))
    hidden, mask, shared, tokens = torch.rand(6, 2, 6), torch.rand(2, 2), torch.rand(1, 2, 2), torch.arange(2)
    with growing_batch(heads, 2, {0: 2, 1: 1}, False, lambda: None):
        args, kwargs = block(hidden, mask, None, made=({"mask": mask}, shared, tokens), how="fast")
        none, named = block(hidden_states=hidden, mask=mask)
    for states, masks in (args[:2], (named["hidden_states"], named["mask"])):
        assert torch.equal(states, torch.cat([hidden, hidden[:2]])) and torch.equal(masks, torch.cat([mask] * 4))
    assert (args[2:], none, len(named)) == ((None,), (), 2)
    made, one, same = kwargs["made"]
    assert kwargs.keys() == {"made", "how"} and kwargs["how"] == "fast" and one is shared and same is tokens
    assert made.keys() == {"mask"} and torch.equal(made["mask"], torch.cat([mask] * 4))


def test_behind_the_last_attention_a_part_that_is_called_by_keyword_is_narrowed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = find_heads(GPT2.build())
    part, hidden = heads.layers[1].block.mlp, torch.rand(2, 5, 6)
    monkeypatch.setattr(part, "forward", lambda *args, **kwargs: (args, kwargs))
    with growing_batch(heads, 2, {}, True, lambda: None):
        args, kwargs = part(hidden)
        assert args[0] is hidden and not kwargs
        heads.layers[1].projection(hidden)
        args, kwargs = part(hidden, hidden)
        assert torch.equal(args[0], hidden[:, -1:]) and args[1] is hidden and not kwargs
        args, kwargs = part(hidden_states=hidden, other=hidden)
        assert torch.equal(kwargs["hidden_states"], hidden[:, -1:]) and kwargs["other"] is hidden
        assert not args and len(kwargs) == 2
        assert part(other=hidden) == ((), {"other": hidden})
        flat = hidden[0]  # of a row's tokens, as a router of experts is given
        assert part(flat)[0][0] is flat


def test_a_layer_that_is_given_other_rows_than_it_should_be_disagrees() -> None:
    heads = find_heads(GPT2.build())
    with (
        growing_batch(heads, 2, {0: 2}, False, lambda: None),
        pytest.raises(BatchMismatch, match=r"given 6 rows, not 2$"),
    ):
        heads.layers[0].block(torch.rand(6, 2, 6))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_row_and_no_token_is_computed_that_nothing_is_read_from(family: str) -> None:
    model = Decoder(family, num_layers=2, num_heads=3, head_dim=4).build()
    parts = [*(layer.projection for layer in find_heads(model).layers), model.get_output_embeddings()]
    shapes: list[list[tuple[int, ...]]] = [[] for _ in parts]
    handles = [
        part.register_forward_hook(lambda _, args, out, seen=seen: seen.append(tuple(out.shape[:2])))
        for part, seen in zip(parts, shapes, strict=True)
    ]
    try:
        assert sweep(model, IDS, max_rows=4).provenance["method"] == "growing batch"
    finally:
        for handle in handles:
            handle.remove()
    assert shapes == [  # two probes and the clean run; four passes of a clean row and three ablations
        [(3, 5), (4, 5), (4, 5), (1, 5), (1, 5)],
        [(3, 5), (4, 1), (4, 1), (4, 1), (4, 1)],
        [(3, 1), (4, 1), (4, 1), (4, 1), (4, 1)],
    ]


def without_logits_to_keep(decoder: Decoder) -> Any:
    """A model that cannot be told which logits are wanted."""
    model = decoder.fresh()
    every = model.forward

    def forward(ids: Tensor, use_cache: bool) -> Any:
        assert use_cache is False, "nobody reads what is kept"
        return every(ids, use_cache=use_cache)

    model.forward = forward
    return model


def test_a_pass_has_as_many_rows_as_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = Decoder("llama", num_layers=2, num_heads=3, head_dim=2)  # its widest weight is of 12 channels
    for model, kept in ((llama.build(), 1), (without_logits_to_keep(llama), 5)):
        row = 4 * (5 * (4 * 12 + 3 * 5) + kept * VOCABULARY)  # bytes, for 5 tokens that 3 heads attend to
        for budget, passes in ((13 * row, 1), (13 * row - 1, 2), (4 * row, 4), (4 * row - 1, 6), (1, 12)):
            monkeypatch.setattr("ablation.sweep.ROW_BUDGET_BYTES", budget)
            assert sweep(model, IDS).provenance["passes"] == passes


def test_weights_that_are_no_parameters_are_no_obstacle() -> None:
    model = GPT2.fresh()
    for module in model.transformer.h.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())
    assert_equal(sweep(model, IDS), sweep(GPT2.build(), IDS), atol=0)


def test_a_model_that_cannot_be_told_which_logits_are_wanted_gives_them_all() -> None:
    result = sweep(without_logits_to_keep(GPT2), IDS)
    assert result.provenance["method"] == "growing batch"
    assert_equal(result, sweep(GPT2.build(), IDS), ATOL["float32"])


def test_behind_the_last_attention_each_part_is_given_the_last_token_alone() -> None:
    model = GPT2.build()
    block, tokens = model.transformer.h[1], dict[str, list[int]]()
    handles = [
        part.register_forward_hook(lambda _, args, out, name=name: tokens.setdefault(name, []).append(args[0].shape[1]))
        for name, part in block.named_modules()
        if name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_fc")
    ]
    try:
        sweep(model, IDS)
    finally:
        for handle in handles:
            handle.remove()
    before, behind = [5, 5], [5, 1]  # the plain batch, the growing one
    assert tokens == {"ln_1": before, "attn.c_attn": before} | dict.fromkeys(
        ("attn.c_proj", "ln_2", "mlp", "mlp.c_fc"), behind
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_of_the_sweep_is_the_single_ablation_of_that_head(family: str) -> None:
    decoder = Decoder(family, num_layers=2, num_heads=3, head_dim=4)
    model, target, control = decoder.build(), 7, 11
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


def test_head_means_and_clean_values_are_those_of_a_model_without_hooks() -> None:
    model = GPT2.build()
    result = sweep(model, IDS, [7])
    kept: list[Tensor] = []
    handle = find_heads(model).layers[1].projection.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    clean = logits(model, torch.tensor([IDS]))[0, -1]
    handle.remove()
    assert result.head_mean[1, 2] == pytest.approx(kept[0][..., 4:6].double().mean().item(), rel=1e-12)
    assert result.clean_probability[0] == pytest.approx(clean.double().softmax(-1)[7].item(), rel=1e-12)
    assert result.clean_argmax == clean.argmax()
    assert result.clean_margin == float(-clean.double().topk(2).values.diff())


def test_receipts_show_one_call_and_all_elements_of_a_head() -> None:
    result = sweep(GPT2.build(), IDS)
    assert (result.calls == 1).all()
    assert (result.replaced == 5 * 2).all()  # tokens x width
    assert (result.changed == 10).all()


def test_a_head_that_writes_nothing_has_no_effect_and_says_so() -> None:
    model = randomised(GPT2.build().config, seed=1)
    with torch.no_grad():
        attention = model.transformer.h[1].attn
        attention.c_attn.weight[:, 2 * 6 + 2 : 2 * 6 + 4] = 0  # head 1's values
        attention.c_attn.bias[2 * 6 + 2 : 2 * 6 + 4] = 0
        attention.c_proj.weight[4:6] = 0  # head 2's block of W_O
    result = sweep_sequential(model, IDS)
    effect = np.abs(result.log_probability_change).max(axis=(0, 1))
    assert (effect == 0).tolist() == [[False, False, False], [False, True, True]]
    assert (result.changed == 0).tolist() == [[[False] * 3, [False, True, False]]] * 2


def test_unnamed_tokens_are_the_most_probable_ones() -> None:
    model = GPT2.build()
    first, second, third = logits(model, torch.tensor([IDS]))[0, -1].topk(3).indices.tolist()
    assert sweep(model, IDS).watched.tolist() == [first, second]
    assert sweep(model, IDS, [second, None, 40, None]).watched.tolist() == [second, first, 40, third]


def test_every_token_can_be_watched_and_no_more() -> None:
    assert sweep_sequential(GPT2.build(), IDS, range(VOCABULARY)).watched.tolist() == list(range(VOCABULARY))
    order = logits(GPT2.build(), torch.tensor([IDS]))[0, -1].argsort(descending=True).tolist()
    assert sweep_sequential(GPT2.build(), IDS, [None] * VOCABULARY).watched.tolist() == order
    with pytest.raises(InvalidPrompt, match="42 tokens cannot be watched: the model has 41"):
        sweep_sequential(GPT2.build(), IDS, [None] * (VOCABULARY + 1))


def test_a_second_sweep_is_the_same_to_the_last_bit_and_leaves_no_hook() -> None:
    model = GPT2.build()
    before = hooks_of(model)
    one, other = arrays(sweep(model, IDS)), arrays(sweep(model, IDS))
    assert hooks_of(model) == before
    for name, value in one.items():
        assert np.array_equal(value, other[name]), name


def test_saved_and_loaded_it_is_equal(tmp_path: Path) -> None:
    result = sweep(GPT2.build(), IDS)
    result.save(str(tmp_path))
    loaded = SweepResult.load(str(tmp_path))
    assert loaded.provenance == json.loads(json.dumps(result.provenance))
    for name, value in arrays(result).items():
        again = getattr(loaded, name)
        assert type(again) is type(value) and np.array_equal(again, value), name
        assert not isinstance(value, np.ndarray) or again.dtype == value.dtype, name


def test_what_is_saved_can_be_read_by_people_too(tmp_path: Path) -> None:
    replace(sweep(GPT2.build(), IDS, imputations=["zero"]), provenance={"prompt": "Zürich"}).save(tmp_path)
    text = (tmp_path / "sweep.json").read_text(encoding="utf-8")
    assert text == '{\n  "imputations": [\n    "zero"\n  ],\n  "provenance": {\n    "prompt": "Zürich"\n  }\n}\n'


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    sweep(GPT2.build(), IDS).save(tmp_path)
    with np.load(tmp_path / "sweep.npz") as arrays:
        np.savez(tmp_path / "sweep.npz", **dict(arrays) | {"margin": np.array([{}])})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        SweepResult.load(tmp_path)


def test_a_hook_that_changes_nothing_is_not_taken_for_a_robust_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hook_module, "apply_edits", lambda z, layer, edits, mask: (z, [EditCounts(0, 0) for _ in edits])
    )
    for way in (sweep, sweep_sequential):
        model = GPT2.build()
        before = hooks_of(model)
        with pytest.raises(AblationNotApplied, match="layer 0, head 0, zero imputation: 1 calls, 0 of 10 elements"):
            way(model, IDS)
        assert hooks_of(model) == before


def test_an_interrupted_sweep_leaves_no_hook() -> None:
    model = GPT2.build()
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
        way(GPT2.build(), IDS, progress=shares.append)
        assert shares == [(i + 1) / steps for i in range(steps)]


def test_progress_over_several_prompts_rises_to_one() -> None:
    shares: list[float] = []
    sweep_prompts(GPT2.build(), [[1, 2], [3, 4, 5], [6, 7]], progress=shares.append)
    assert shares == pytest.approx([1 / 3, 2 / 3, 5 / 6, 1])  # the two of one length at once


def test_a_model_that_the_growing_batch_does_not_suit_is_swept_sequentially_and_says_so() -> None:
    small = dict(vocab_size=41, hidden_size=6, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None)
    bloom = randomised(BloomConfig(**small, pad_token_id=None), seed=1, attention="eager")
    with pytest.warns(UserWarning, match="growing batch does not suit BloomForCausalLM"):
        result = sweep(bloom, IDS)
    assert result.provenance["method"] == "sequential"
    assert_equal(result, sweep_sequential(bloom, IDS), atol=0)


def assert_noticed(model: Any, layer: int, hook: Any) -> None:
    """With a hook behind the MLP of a layer, rows are found not to be alike, and are swept one by one."""
    handle = model.transformer.h[layer].mlp.register_forward_hook(hook)
    try:
        with pytest.warns(UserWarning, match="differs from the same forward without growth"):
            result = sweep(model, IDS)
        reason = "BatchMismatch: a row differs from the same forward without growth by "
        assert result.provenance["reason"].startswith(reason)
        assert_equal(result, sweep_sequential(model, IDS), atol=0)
    finally:
        handle.remove()


def test_a_model_whose_rows_see_each_other_is_swept_sequentially() -> None:
    assert_noticed(GPT2.build(), 1, lambda _, args, out: out + 0.1 * (out.mean(dim=0, keepdim=True) - out))


@pytest.mark.parametrize("row", [slice(0, 1), slice(-1, None)], ids=["first", "last"])
def test_a_hook_that_was_written_for_one_row_is_noticed(row: slice) -> None:
    def steer(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[row] *= 2
        return out

    assert_noticed(GPT2.build(), 0, steer)


@pytest.mark.parametrize("max_rows", [2, 3, 4, 9])
def test_no_forward_has_more_rows_than_were_allowed(max_rows: int) -> None:
    model, rows = Decoder("gpt2", num_layers=4, num_heads=2, head_dim=3).build(), []
    handle = model.transformer.register_forward_hook(lambda _, args, out: rows.append(len(out[0])))
    try:
        assert sweep(model, IDS, max_rows=max_rows).provenance["method"] == "growing batch"
    finally:
        handle.remove()
    assert max(rows) == max_rows


def test_a_projection_that_is_given_other_than_every_token_is_refused() -> None:
    model = GPT2.build()
    part = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _, args: (args[0][:, :3],))
    reason = r"^transformer.h.1.attn.c_proj was given \((\d), 3, 6\), not \[\1 rows, 5 tokens, 6 channels\]$"
    try:
        for way in (sweep, sweep_sequential):
            with pytest.raises(UnsupportedModel, match=reason):
                way(model, IDS)
    finally:
        part.remove()


def test_a_projection_that_is_called_twice_is_refused() -> None:
    model = GPT2.fresh()
    attention = model.transformer.h[1].attn
    attention.c_proj = Twice(attention.c_proj).eval()
    for way in (sweep, sweep_sequential):
        called = r"^transformer.h.1.attn.c_proj.dense was called 2 times in one forward, not once"
        with pytest.raises(AblationNotApplied, match=called):
            way(model, IDS)


def test_ablated_logits_that_are_not_finite_are_refused_by_name() -> None:
    healthy = GPT2.build()
    run = sweep(healthy, IDS)
    assert np.isfinite(run.margin).all()

    def poison(module: Any, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(0, torch.tensor(3), torch.nan) if len(out) > 3 else out

    handle = healthy.transformer.h[1].mlp.register_forward_hook(poison)
    try:
        with pytest.raises(NonFiniteLogits, match="layer 0, head 2, zero imputation"):
            sweep(healthy, IDS)
    finally:
        handle.remove()


def test_it_is_replaceable() -> None:
    """`dataclasses.replace` adds provenance: the arrays stay the same objects."""
    result = sweep(GPT2.build(), IDS)
    named = replace(result, provenance={"model": "x", **result.provenance})
    assert named.margin is result.margin and named.provenance["model"] == "x"


def test_of_equal_logits_the_lowest_token_is_the_prediction() -> None:
    model = randomised(GPT2.build().config, seed=1)
    ids = [7, 9, 8]
    first = sweep(model, ids).clean_argmax
    twins = {first, 2, 40}
    assert not twins & set(ids) and first > 2
    with torch.no_grad():
        embedding = model.transformer.wte.weight
        embedding[sorted(twins)] = embedding[first].clone()
    result = sweep(model, ids)
    assert result.clean_argmax == 2 and result.clean_margin == 0
    assert not {first, 40} & set(result.argmax.flat) and not result.margin[result.argmax == 2].any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_logits_agree_that_are_apart_by_less_than_half_of_their_digits(size: float) -> None:
    plain = torch.tensor([[0.0, -size, size / 2]])
    noise = torch.finfo(torch.float32).eps ** 0.5
    _agree(plain * (1 - noise / 2), plain)
    for apart in (plain * (1 - noise * 3), plain * torch.nan):
        with pytest.raises(BatchMismatch, match=r"^a row differs from the same forward without growth by [^ ]+$"):
            _agree(apart, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_an_offset_nor_masked_tokens_hide_that_logits_are_apart(dtype: torch.dtype) -> None:
    plain = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    apart = plain.clone()
    apart[1, 7] += 1
    masked = [row.index_fill(-1, torch.arange(20, 50), torch.finfo(dtype).min) for row in (apart, plain)]
    for one, other in ((apart, plain), (apart + 50, plain + 50), masked):
        _agree(other, other)
        with pytest.raises(BatchMismatch):
            _agree(one, other)


@pytest.mark.parametrize("ids", [[True, False], torch.tensor([[3], [1]]), torch.tensor([True, False]), [np.bool_(1)]])
def test_a_mask_or_rows_are_no_prompt(ids: Any) -> None:
    with pytest.raises(InvalidPrompt, match="no token id"):
        sweep(GPT2.build(), ids)
    expected = sweep(GPT2.build(), [3, 1]).margin
    for right in ([np.int64(3), np.int64(1)], torch.tensor([3, 1]), np.array([3, 1])):
        assert np.array_equal(sweep(GPT2.build(), right).margin, expected)  # type: ignore[arg-type]


def test_imputations_of_one_class_that_differ_are_not_taken_for_each_other() -> None:
    class Constant(Imputation):
        per_token = True

        def __init__(self, value: float) -> None:
            object.__setattr__(self, "value", value)
            object.__setattr__(self, "name", f"constant {value}")

        def __call__(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
            return z.new_full((), self.value)  # type: ignore[attr-defined]

    model, both = GPT2.build(), [Constant(0.0), Constant(1.0)]
    for max_rows in (None, 3, 6):
        result = sweep(model, IDS, imputations=both, max_rows=max_rows)
        assert result.provenance["method"] == "growing batch"
        assert_equal(result, sweep_sequential(model, IDS, imputations=both), ATOL["float32"])


def test_logits_that_are_all_zero_are_no_disagreement() -> None:
    model = Decoder("llama", num_layers=2, num_heads=3, head_dim=2).fresh()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = sweep(model, IDS)
    assert result.provenance["method"] == "growing batch"
    assert result.clean_argmax == 0 and result.has_head.all() and result.kept.all() and not result.flipped.any()


def test_the_first_token_and_the_longest_prompt_are_taken() -> None:
    result = sweep(GPT2.build(), [0] * POSITIONS, [0], ["zero"])
    assert (result.replaced == POSITIONS * 2).all()  # tokens x width


def test_the_provenance_says_in_which_way_and_in_how_many_passes() -> None:
    model = GPT2.build()  # 2 layers x 3 heads, each ablated with 2 imputations
    for max_rows, passes in ((None, 1), (13, 1), (12, 2), (4, 4), (2, 12)):
        how = sweep(model, IDS, max_rows=max_rows).provenance
        assert (how["method"], how["passes"]) == ("growing batch", passes)
    assert sweep_sequential(model, IDS).provenance["method"] == "sequential"
