"""The engine: any list of ablations, exact in one growing batch; its guard, its fallback and its limits."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BloomConfig

from ablation import hook as hook_module
from ablation.checks.decoders import VOCABULARY, Decoder, decoders, randomised
from ablation.edits import Ablation
from ablation.engine import run, run_sequential
from ablation.errors import AblationNotApplied, InvalidAblation, InvalidHead, UnsupportedModel
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Imputation, Site
from ablation.results import AblationKey
from ablation.sweeps import sweep, sweep_sequential
from tests.comparing import ATOL, IDS, assert_falls_back, assert_results_equal
from tests.test_hook import Twice, hooks_of, logits

FAMILIES = ("gpt2", "llama", "gemma3", "gpt_neox", "opt", "mixtral")
GPT2 = Decoder("gpt2", num_layers=2, num_heads=3, head_dim=2)
PAIR = [Ablation([(0, 1)]), Ablation([(0, 2), (1, 0)], "mean")]


# ---- sets of heads


@st.composite
def lists_of_sets(draw: st.DrawFn) -> tuple[Decoder, list[Ablation]]:
    """A decoder, and ablations of up to five heads in any layers, in any order, repeated or empty."""
    decoder = draw(decoders(FAMILIES))
    head = st.tuples(st.integers(0, decoder.num_layers - 1), st.integers(0, decoder.num_heads - 1))
    ablation = st.builds(Ablation, st.lists(head, max_size=5), st.sampled_from(["zero", "mean"]))
    return decoder, draw(st.lists(ablation, min_size=1, max_size=8))


@given(
    lists_of_sets(),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(2, 6)),
)
def test_sets_of_heads_equal_one_hooked_forward_each(
    drawn: tuple[Decoder, list[Ablation]], ids: list[int], max_rows: int | None
) -> None:
    decoder, ablations = drawn
    model, atol = decoder.shared(), ATOL[decoder.dtype]
    result = run(model, ids, ablations, 7, 11, max_rows=max_rows)
    changes = np.stack([result.change(f"{name}_log_probability")[0] for name in ("target", "control")])
    margin, argmax = (result.ablated[name][0] for name in ("margin", "argmax"))
    assert result.provenance["method"] == "growing batch"
    clean = logits(model, torch.tensor([ids]))[0, -1].double().log_softmax(-1)
    with HeadAblation(model) as hook:
        for index, ablation in enumerate(ablations):
            hook.ablate(ablation.heads, ablation.imputation)
            alone = logits(model, torch.tensor([ids]))[0, -1].double()
            change = (alone.log_softmax(-1) - clean)[[7, 11]]
            np.testing.assert_allclose(changes[:, index], change, rtol=0, atol=2 * atol)
            counts = [count for layer in hook.receipt.counts.values() for count in layer]
            assert result.replaced[0, index] == sum(count.replaced for count in counts)
            assert margin[index] == pytest.approx(float(-alone.topk(2).values.diff()), abs=2 * atol)
            if margin[index] > 4 * atol:
                assert argmax[index] == alone.argmax()
    assert_results_equal(result, run_sequential(model, ids, ablations, 7, 11), atol)


@pytest.mark.parametrize("max_rows", [None, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_sets_of_two_or_three_equal_one_forward_each(family: str, max_rows: int | None) -> None:
    """Rows are copied from ablated rows; imputations and positions must not be mixed up, nor receipts."""
    model = Decoder(family, num_layers=3, num_heads=2, head_dim=2).shared()
    heads = list(find_heads(model))
    sets = [of for size in (1, 2, 3) for of in itertools.combinations(heads, size)]
    how: list[tuple[Any, ...]] = [("zero",), ("mean",), ("zero", [0, -1])]
    ablations = [Ablation(of, *how[number % 3]) for number, of in enumerate(sets)]
    ablations += [Ablation(of, *how[(number + 1) % 3]) for number, of in enumerate(sets)]
    result = run(model, IDS, ablations, 7, 11, max_rows=max_rows)
    assert result.provenance["method"] == "growing batch"
    assert_results_equal(result, run_sequential(model, IDS, ablations, 7, 11), ATOL["float32"])


def test_heads_of_a_result_are_distinct_and_in_order() -> None:
    result = run(GPT2.shared(), IDS, [Ablation(((np.int64(1), 2), (0, 1), [1, 2]))])  # type: ignore[arg-type]
    assert result.ablations == (AblationKey(((1, 2), (0, 1)), "zero"),)
    assert result.replaced.tolist() == [[2 * 5 * 2]]  # heads x tokens x head_dim


def test_ablation_without_heads_is_a_clean_run() -> None:
    result = run(GPT2.shared(), IDS, [Ablation([]), Ablation([(0, 0)])], max_rows=2)
    assert (result.replaced.tolist(), result.calls.tolist()) == ([[0, 10]], [[1, 1]])
    for name in ("target_log_probability", "control_log_probability"):
        assert np.abs(result.change(name)[0, 0]) < ATOL["float32"] < np.abs(result.change(name)[0, 1])
    assert np.abs(result.ablated["margin"][0, 1]) > ATOL["float32"]
    assert result.ablated["argmax"][0, 0] == result.clean["argmax"][0]
    assert result.ablations == (AblationKey((), "zero"), AblationKey(((0, 0),), "zero"))


@pytest.mark.parametrize(
    ("ablations", "error", "reason"),
    [
        ([], InvalidAblation, "^the list of ablations is empty$"),
        ([Ablation([(0, 0)]), Ablation([(1, 3)])], InvalidHead, "no head 3: layer 1 has 3 heads, 0 to 2"),
    ],
)
def test_invalid_ablations_are_refused(ablations: list[Ablation], error: type[Exception], reason: str) -> None:
    for way in (run, run_sequential):
        with pytest.raises(error, match=reason):
            way(GPT2.shared(), IDS, ablations)


# ---- the guard and the fallback


def test_unsuitable_model_runs_sequentially_and_says_so() -> None:
    small: dict[str, Any] = dict(
        vocab_size=41, hidden_size=6, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None
    )
    bloom = randomised(BloomConfig(**small, pad_token_id=None), seed=1, attention="eager")
    with pytest.warns(UserWarning, match=r"growing batch does not suit BloomForCausalLM .*: running one forward per"):
        result = sweep(bloom, IDS)
    assert result.provenance["method"] == "sequential"
    assert_results_equal(result, sweep_sequential(bloom, IDS), atol=0)


def test_rows_that_see_each_other_are_noticed() -> None:
    assert_falls_back(GPT2.shared(), 1, lambda _, args, out: out + 0.1 * (out.mean(dim=0, keepdim=True) - out))


@pytest.mark.parametrize("row", [slice(0, 1), slice(-1, None)], ids=["first", "last"])
def test_hook_written_for_one_row_is_noticed(row: slice) -> None:
    def steer(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[row] *= 2
        return out

    assert_falls_back(GPT2.shared(), 0, steer)


class Boom(Exception):
    """An error that neither torch nor transformers raises."""


@pytest.mark.parametrize("error", [Boom, TypeError, RuntimeError, KeyError])
def test_failure_of_the_models_own_layer_leads_to_fallback(error: type[Exception]) -> None:
    model = GPT2.shared()

    def fail(module: Any, args: Any, out: Tensor) -> None:
        if len(out) > 1:
            raise error("one row only\nplease")

    handle = model.transformer.h[1].mlp.register_forward_hook(fail)
    try:
        with pytest.warns(UserWarning, match="does not suit GPT2LMHeadModel"):
            result = run(model, IDS, PAIR)
        assert result.provenance["method"] == "sequential"
        assert result.provenance["reason"].startswith(f"{error.__name__}: ") and "\n" not in result.provenance["reason"]
        assert_results_equal(result, run_sequential(model, IDS, PAIR), atol=0)
    finally:
        handle.remove()


@contextmanager
def broken_apply_edits(error: Exception) -> Iterator[None]:
    """An error in this package's own hook."""

    def apply_edits(*args: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hook_module, "apply_edits", apply_edits)
        yield


class Failing(Imputation):
    """A user's imputation that raises."""

    name = "failing"
    reads = "token"

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        return z + None  # type: ignore[operator]


def fail_in_progress(share: float) -> None:
    raise ValueError("progress bar")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [Boom("ours"), TypeError("ours"), RuntimeError("ours"), KeyError("ours")])
def test_error_in_our_own_hook_propagates(error: Exception) -> None:
    model = GPT2.shared()
    before = hooks_of(model)
    with broken_apply_edits(error), pytest.raises(type(error), match="ours") as caught:
        run(model, IDS, PAIR)
    assert caught.value is error and hooks_of(model) == before


@pytest.mark.filterwarnings("error")
def test_error_in_reading_the_output_propagates() -> None:
    model = GPT2.shared()
    handle = model.register_forward_hook(lambda *_: "no logits")
    try:
        with pytest.raises(UnsupportedModel, match="^GPT2LMHeadModel returns str without logits"):
            run(model, IDS, PAIR)
    finally:
        handle.remove()


@pytest.mark.filterwarnings("error")
def test_error_wrapped_by_the_model_is_still_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that catches what its layers raise, and raises an error of its own."""
    model = GPT2.shared()
    inner = model.transformer.forward

    def wrapping(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except TypeError:
            raise Boom("the model failed") from None

    monkeypatch.setattr(model.transformer, "forward", wrapping)
    with broken_apply_edits(TypeError("ours")), pytest.raises(Boom):
        run(model, IDS, PAIR)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("ablations", "progress", "error"),
    [([Ablation([(0, 1)], Failing())], None, TypeError), (PAIR, fail_in_progress, ValueError)],
    ids=["imputation", "progress"],
)
def test_error_in_the_callers_code_propagates(
    ablations: list[Ablation], progress: Callable[[float], None] | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        run(GPT2.shared(), IDS, ablations, progress=progress)


@pytest.mark.parametrize("way", [sweep, sweep_sequential])
def test_hook_that_changes_nothing_is_no_robust_model(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(z: Tensor, layer: Any, edits: Any, mask: Any) -> tuple[Tensor, Tensor]:
        return z, torch.zeros(len(edits), 3, dtype=torch.long)

    monkeypatch.setattr(hook_module, "apply_edits", idle)
    model = GPT2.shared()
    before = hooks_of(model)
    with pytest.raises(AblationNotApplied, match=r"c_proj: 0 of 0 elements of head [02] hold the imputed"):
        way(model, IDS)
    assert hooks_of(model) == before


@pytest.mark.parametrize("way", [sweep, sweep_sequential])
def test_projection_without_every_token_is_refused(way: Any) -> None:
    model = GPT2.shared()
    part = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _, args: (args[0][:, :3],))
    reason = r"^transformer.h.1.attn.c_proj received \((\d), 3, 6\), not \[\1 rows, 5 tokens, 6 channels\]$"
    try:
        with pytest.raises(UnsupportedModel, match=reason):
            way(model, IDS)
    finally:
        part.remove()


@pytest.mark.parametrize("way", [sweep, sweep_sequential])
def test_projection_called_twice_is_refused(way: Any) -> None:
    model = GPT2.fresh()
    attention = model.transformer.h[1].attn
    attention.c_proj = Twice(attention.c_proj).eval()
    called = r"^transformer.h.1.attn.c_proj.dense was called 2 times in one forward, not once"
    with pytest.raises(AblationNotApplied, match=called):
        way(model, IDS)


# ---- how much is computed


@pytest.mark.parametrize("max_rows", [2, 3, 4, 9])
def test_no_forward_has_more_than_max_rows(max_rows: int) -> None:
    model, rows = Decoder("gpt2", num_layers=4, num_heads=2, head_dim=3).shared(), []
    handle = model.transformer.register_forward_hook(lambda _, args, out: rows.append(len(out[0])))
    try:
        assert sweep(model, IDS, max_rows=max_rows).provenance["method"] == "growing batch"
    finally:
        handle.remove()
    assert max(rows) == max_rows


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_no_row_or_token_is_computed_in_vain(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(family, num_layers=2, num_heads=3, head_dim=4).shared()
    parts = [*(layer.projection for layer in find_heads(model).layers), model.get_output_embeddings()]
    shapes: list[list[tuple[int, ...]]] = [[] for _ in parts]
    for part, seen in zip(parts, shapes, strict=True):

        def forward(z: Tensor, forward: Any = part.forward, seen: list[Any] = seen) -> Tensor:
            seen.append(tuple(z.shape[:2]))
            return forward(z)

        monkeypatch.setattr(part, "forward", forward)
    assert sweep(model, IDS, max_rows=4).provenance["method"] == "growing batch"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:  # OPT in transformers 4
        shapes.pop()
    # Four rows that verify the model; the clean run with two probes; four passes of the clean row and three ablations.
    expected = [
        [(4, 5), (3, 5), (4, 5), (4, 5), (1, 5), (1, 5)],
        [(4, 5), (3, 5), (4, 1), (4, 1), (4, 1), (4, 1)],
        [(4, 5), (3, 1), (4, 1), (4, 1), (4, 1), (4, 1)],
    ]
    assert shapes == expected[: len(shapes)]


def test_users_hook_on_the_unembedding_sees_all_tokens() -> None:
    """It may edit the logits of one position, which is another one if only the last is computed."""
    model = GPT2.shared()
    clean = run(model, IDS, PAIR)

    def edit_first(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 0] = 100.0
        return out

    handle = model.lm_head.register_forward_hook(edit_first)
    try:
        for way in (run, run_sequential):
            assert_results_equal(way(model, IDS, PAIR), clean, ATOL["float32"])
    finally:
        handle.remove()


def test_parts_after_the_last_attention_get_one_token() -> None:
    model = GPT2.shared()
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
    # In the batch that verifies the model, in the plain one, and in the growing one.
    before, after = [5, 5, 5], [5, 5, 1]
    assert tokens == {"ln_1": before, "attn.c_attn": before} | dict.fromkeys(
        ("attn.c_proj", "ln_2", "mlp", "mlp.c_fc"), after
    )


def without_logits_to_keep(decoder: Decoder) -> Any:
    """A model that cannot be asked for the last logits alone."""
    model = decoder.fresh()
    every = model.forward

    def forward(ids: Tensor, use_cache: bool) -> Any:
        assert use_cache is False, "a run reads no cache"
        return every(ids, use_cache=use_cache)

    model.forward = forward
    return model


def test_pass_has_as_many_rows_as_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = Decoder("llama", num_layers=2, num_heads=3, head_dim=2)  # its widest weight has 12 channels
    for model, kept in ((llama.shared(), 1), (without_logits_to_keep(llama), 5)):
        row = 4 * (5 * (4 * 12 + 3 * 5) + kept * VOCABULARY)  # bytes, for 5 tokens that 3 heads attend to
        for budget, passes in ((13 * row, 1), (13 * row - 1, 2), (4 * row, 4), (4 * row - 1, 6), (1, 12)):
            monkeypatch.setattr("ablation.memory.CPU_PASS_BYTES", budget)
            assert sweep(model, IDS).provenance["passes"] == passes


def test_weights_may_be_buffers() -> None:
    model = GPT2.fresh()
    for module in model.transformer.h.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())
    assert_results_equal(sweep(model, IDS), sweep(GPT2.shared(), IDS), atol=0)


def test_model_without_logits_to_keep_gives_all_logits() -> None:
    for target in (None, [7, 3, 9]):
        result = sweep(without_logits_to_keep(GPT2), IDS, target)
        assert result.provenance["method"] == "growing batch"
        assert_results_equal(result, sweep(GPT2.shared(), IDS, target), ATOL["float32"])
