"""MLPs are ablated like heads, at the output of their last projection."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ablation.checks.assertions import assert_close
from ablation.checks.cases import Case
from ablation.checks.decoders import Decoder, decoders
from ablation.edits import Ablation
from ablation.engine import run, run_sequential
from ablation.errors import AblationNotApplied, InvalidAblation, InvalidHead, UnsupportedModel
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Values
from ablation.reference import Reference
from ablation.units import Pair, parse_set
from tests.comparing import ATOL, IDS, assert_results_equal
from tests.families.configurations import build
from tests.surgery import Oracle, kind
from tests.test_adapters import LowRank
from tests.test_hook import Twice, logits
from tests.test_positions import cases

MLPS = {
    "gpt2": "transformer.h.{}.mlp",
    "llama": "model.layers.{}.mlp",
    "qwen3": "model.layers.{}.mlp",
    "gemma3": "model.layers.{}.mlp",
    "gpt_neox": "gpt_neox.layers.{}.mlp",
    "opt": "model.decoder.layers.{}.fc2",
    "lfm2": "model.layers.{}.feed_forward",
}
"""The module that returns the MLP's output; in OPT, the tokens of all rows in one dimension. In LFM2, only every second
layer has heads."""
KINDS = ("zero", "mean", "channel-mean", "scale")
GPT2 = Decoder("gpt2", num_layers=3, num_heads=3, head_dim=2)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
        ("opt", "model.decoder.layers.1.fc2"),
        ("lfm2", "model.layers.1.feed_forward.w2"),
        ("gemma3_vision", "model.language_model.layers.1.mlp.down_proj"),
    ],
)
def test_mlp_is_the_output_of_its_last_projection(family: str, name: str) -> None:
    model = Decoder(family, num_layers=3, num_heads=2, head_dim=6).shared()
    mlp = find_heads(model).mlp(1)
    assert (mlp.index, mlp.projection_name, mlp.num_heads) == (1, name, 1)
    assert mlp.projection is model.get_submodule(name)
    assert mlp.head_dim == model.get_input_embeddings().weight.shape[1]


# ---- the right values: each pass on its own


class MLPOracle:
    """A model with heads ablated in its weights, and MLPs by hooks of this file on other modules, in plain loops."""

    def __init__(self, case: Case, layers: list[int], name: str, positions: list[int] | None) -> None:
        self.case, self.layers, self.name = case, layers, name
        self.oracle = Oracle(case.random_decoder, case.heads, name, positions)

    def logits(self, inputs: Any) -> Tensor:
        mask = inputs["attention_mask"].tolist()
        with self.oracle.operated(mask) as model, ExitStack() as hooks, torch.no_grad():
            for layer in self.layers:
                module = model.get_submodule(MLPS[self.case.decoder.family].format(layer))

                def replace(module: Any, args: Any, output: Tensor, layer: int = layer) -> Tensor:
                    return self.replaced(layer, output.reshape(len(mask), len(mask[0]), -1), mask).reshape(output.shape)

                hooks.callback(module.register_forward_hook(replace).remove)
            found: Tensor = model(**inputs).logits
        return found

    def replaced(self, layer: int, output: Tensor, mask: list[list[int]]) -> Tensor:
        value, found = kind(self.name, self.case.random_decoder).value, output.clone()
        for row, of_row in enumerate(mask):
            columns = [column for column, real in enumerate(of_row) if real]
            own = output[row, columns].double()
            for column in self.oracle.tokens(of_row):
                position = columns.index(column)
                found[row, column] = value(layer, 0, own, position, position).to(output.dtype)
        return found


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_mlps_and_heads_equal_an_edited_model(name: str, data: st.DataObject) -> None:
    """A padded batch, at some positions or all."""
    case, positions = data.draw(cases(tuple(MLPS), ("float32", "float64")))
    decoder, inputs = case.random_decoder, case.inputs()
    layers = data.draw(st.lists(st.integers(0, decoder.num_layers - 1), min_size=1, unique=True))
    mlps: list[Pair] = [(layer, "mlp") for layer in layers]
    pairs = data.draw(st.permutations([*case.heads, *mlps]))
    model, mask = decoder.shared(), inputs["attention_mask"]
    oracle = MLPOracle(case, layers, name, positions)
    with HeadAblation(model) as hook:
        hook.ablate(pairs, kind(name, decoder).imputation, positions)
        with torch.no_grad():
            got = model(**inputs).logits
        counts = hook.receipt.counts
    assert_close(got[mask.bool()], oracle.logits(inputs)[mask.bool()], f"the logits with {pairs}")
    tokens = mask.numel() if positions is None else sum(len(oracle.oracle.tokens(row)) for row in mask.tolist())
    for layer in layers:
        (count,) = counts[layer, "mlp"]
        assert count.expected == count.replaced == tokens * model.get_input_embeddings().weight.shape[1]


@pytest.mark.parametrize("family", MLPS)
def test_zero_is_the_projection_without_weights_and_bias(family: str) -> None:
    decoder = Decoder(family, num_layers=3, num_heads=2, head_dim=6)
    model, ids = decoder.shared(), torch.tensor([IDS])
    for layer in range(3):
        without = decoder.fresh()
        projection: Any = find_heads(without).mlp(layer).projection
        with torch.no_grad():
            for parameter in projection.parameters():
                parameter.zero_()
        with HeadAblation(model) as hook:
            hook.ablate([(layer, "mlp")])
            got = logits(model, ids)
        assert_close(got, logits(without, ids), f"the logits without the MLP of layer {layer}")
        assert not torch.allclose(got, logits(model, ids))


def test_low_rank_wrapper_of_an_mlp_is_its_projection() -> None:
    """The output of the adapter belongs to the MLP's output."""
    model: Any = Decoder("llama", num_layers=3, num_heads=2, head_dim=4).fresh()
    merged: Any = Decoder("llama", num_layers=3, num_heads=2, head_dim=4).fresh()
    for layer, of in zip(model.model.layers, merged.model.layers, strict=True):
        layer.mlp.down_proj = LowRank(layer.mlp.down_proj)
        of.mlp.down_proj = layer.mlp.down_proj.merged()
    assert find_heads(model).mlp(1).projection is model.model.layers[1].mlp.down_proj
    for imputation in ("zero", "mean"):
        ablated = []
        for each in (model, merged):
            with HeadAblation(each) as hook:
                hook.ablate([(1, "mlp")], imputation)
                ablated.append(logits(each, torch.tensor([IDS])))
        torch.testing.assert_close(*ablated, rtol=0, atol=1e-5)
        assert not torch.allclose(ablated[0], logits(model, torch.tensor([IDS])), atol=1e-3)


# ---- growing batches


@st.composite
def lists(draw: st.DrawFn) -> tuple[Decoder, list[Ablation]]:
    """A decoder, and ablations of MLPs and heads in any layers, in any order, repeated or empty."""
    decoder = draw(decoders(tuple(MLPS)))
    layer = st.integers(0, decoder.num_layers - 1)
    pairs = [layer.map(lambda index: (index, "mlp"))]
    if decoder.heads():
        pairs.append(st.sampled_from(decoder.heads()))
    positions = st.one_of(st.none(), st.just("last"), st.lists(st.integers(-4, 3), min_size=1, max_size=2))
    imputation = st.sampled_from(["zero", "mean", "channel-mean", "scale:0.5"])
    ablation = st.builds(Ablation, st.lists(st.one_of(pairs), max_size=5), imputation, positions)
    return decoder, draw(st.lists(ablation, min_size=1, max_size=8))


@given(lists(), st.lists(st.integers(0, 40), min_size=4, max_size=6), st.one_of(st.none(), st.integers(2, 6)))
def test_mixed_sets_equal_one_hooked_forward_each(
    drawn: tuple[Decoder, list[Ablation]], ids: list[int], max_rows: int | None
) -> None:
    decoder, ablations = drawn
    if not decoder.heads():  # an LFM2 of one layer
        return
    model, atol = decoder.shared(), ATOL[decoder.dtype]
    result = run(model, ids, ablations, 7, 11, max_rows=max_rows)
    assert result.provenance["method"] == "growing batch"
    assert_results_equal(result, run_sequential(model, ids, ablations, 7, 11), atol)
    clean = logits(model, torch.tensor([ids]))[0, -1].double().log_softmax(-1)
    with HeadAblation(model) as hook:
        for index, ablation in enumerate(ablations):
            hook.ablate(ablation.heads, ablation.imputation, ablation.positions)
            alone = logits(model, torch.tensor([ids]))[0, -1].double().log_softmax(-1)
            change = result.change("target_log_probability")[0, index]
            np.testing.assert_allclose(change, float((alone - clean)[7]), rtol=0, atol=2 * atol)
            counts = [count for of_key in hook.receipt.counts.values() for count in of_key]
            assert result.replaced[0, index] == sum(count.replaced for count in counts)
            assert result.calls[0, index] == 1


@pytest.mark.parametrize("family", ["gpt2", "lfm2"])
def test_all_sets_of_two_or_three_equal_one_forward_each(family: str) -> None:
    """Rows are copied from ablated rows; the MLP of a layer comes after its heads, and both are one step."""
    model = Decoder(family, num_layers=4 if family == "lfm2" else 3, num_heads=2, head_dim=4).shared()
    heads = find_heads(model)
    units: list[Pair] = [*heads, *((layer, "mlp") for layer in range(heads.num_layers))]  # type: ignore[list-item]
    sets = [of for size in (1, 2, 3) for of in itertools.combinations(units, size)]
    how: list[tuple[Any, ...]] = [("zero",), ("mean",), ("zero", [0, -1])]
    ablations = [Ablation(reversed(of), *how[number % 3]) for number, of in enumerate(sets)]
    result = run(model, IDS, ablations, 7, 11)
    assert result.provenance["method"] == "growing batch"
    assert_results_equal(result, run_sequential(model, IDS, ablations, 7, 11), ATOL["float32"])


def test_last_mlp_sees_all_tokens() -> None:
    """A batch that ablates it must not be narrowed to the last token."""
    model = GPT2.shared()
    result = run(model, IDS, [Ablation([(2, "mlp")], "mean"), Ablation([(2, 0)], "mean")], 7, 11)
    assert result.replaced.tolist() == [[len(IDS) * 6, len(IDS) * 2]]
    assert result.provenance["method"] == "growing batch"


# ---- what is refused


@pytest.mark.parametrize(
    ("family", "layer", "reason"),
    [
        ("mixtral", 0, "the MLP of layer 0 cannot be ablated: the layer has a mixture of experts, which has no one"),
        ("deepseek_v3", 1, "the MLP of layer 1 cannot be ablated: the layer has a mixture of experts"),
        ("zamba2", 1, "the MLP of layer 1 cannot be ablated: Zamba2HybridLayer has 0 output projections of an MLP"),
        ("gpt2", 3, "no layer 3: the model has 3 layers, 0 to 2"),
        ("gpt2", -1, "no layer -1"),
    ],
)
def test_mlp_that_cannot_be_ablated_is_refused(family: str, layer: int, reason: str) -> None:
    model = build(family)
    with HeadAblation(model) as hook:
        with pytest.raises(InvalidHead, match=reason):
            hook.ablate([(layer, "mlp")])
        head = next(iter(hook.heads))
        hook.ablate([head])  # heads are ablated all the same
        assert not torch.equal(logits(model, torch.tensor([IDS])), logits(build(family), torch.tensor([IDS])))


def test_dense_mlp_beside_experts_is_refused() -> None:
    """Gemma 4 may add the output of experts to that of its MLP."""
    model = build("gemma4_text", enable_moe_block=True, num_experts=2, top_k_experts=1, moe_intermediate_size=8)
    with pytest.raises(InvalidHead, match="mixture of experts"):
        find_heads(model).mlp(0)
    assert find_heads(build("gemma4_text")).mlp(0).projection_name.endswith("layers.0.mlp.down_proj")


def test_dense_layer_of_a_mixture_is_ablated() -> None:
    model = build("deepseek_v3")
    with HeadAblation(model) as hook:
        hook.ablate([(0, "mlp")])
        logits(model, torch.tensor([IDS]))
        assert hook.receipt.mlp_calls == [1, 0, 0]
    assert parse_set("MLP0").heads(find_heads(model)) == ((0, "mlp"),)
    with pytest.raises(InvalidHead, match="the MLP of layer 1 cannot be ablated"):
        parse_set("MLP*").heads(find_heads(model))


def test_shared_mlp_is_refused() -> None:
    model: Any = GPT2.fresh()
    model.transformer.h[2].mlp = model.transformer.h[0].mlp
    heads = find_heads(model)
    for layer in (0, 2):
        with pytest.raises(InvalidHead, match="its layer shares the MLP with another layer"):
            heads.mlp(layer)
    assert heads.mlp(1).index == 1


@pytest.mark.parametrize("pair", [(0, "MLP"), (0, "attn"), ("mlp", 0), (0, b"mlp")])
def test_other_names_are_refused(pair: Any) -> None:
    with HeadAblation(GPT2.shared()) as hook, pytest.raises(InvalidHead, match="is not an integer"):
        hook.ablate([pair])


def test_values_of_heads_are_refused() -> None:
    model = GPT2.shared()
    reference = Reference.of(model, [IDS])
    for imputation in (reference.mean(), reference.mean_by_position(), Values({0: torch.zeros(1, 6)}, "mine")):
        reason = f"'{imputation.name}' has values for heads, and none for the MLP of layer 0"
        with HeadAblation(model) as hook, pytest.raises(InvalidAblation, match=reason):
            hook.ablate([(0, "mlp")], imputation)
        with pytest.raises(InvalidAblation, match=reason):
            run(model, IDS, [Ablation([(0, "mlp"), (0, 0)], imputation)])


def test_mlp_that_runs_twice_is_reported() -> None:
    model: Any = GPT2.fresh()
    model.transformer.h[1].mlp.c_proj = Twice(model.transformer.h[1].mlp.c_proj)
    with pytest.raises(InvalidHead, match="GPT2Block has 0 output projections"):  # the wrapper is no Linear
        find_heads(model).mlp(1)
    model = GPT2.fresh()
    block = model.transformer.h[1]
    forward = block.mlp.forward
    block.mlp.forward = lambda hidden: forward(hidden) + forward(hidden)
    with (
        pytest.raises(AblationNotApplied, match=r"h.1.mlp.c_proj was called 2 times in one forward, not once: the MLP"),
        HeadAblation(model) as hook,
    ):
        hook.ablate([(1, "mlp")])
        logits(model, torch.tensor([IDS]))


def test_mlp_that_is_bypassed_is_reported() -> None:
    model: Any = GPT2.fresh()
    model.transformer.h[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(AblationNotApplied, match="was called 0 times"), HeadAblation(model) as hook:
        hook.ablate([(1, "mlp")])
        logits(model, torch.tensor([IDS]))


def test_output_of_another_shape_is_refused() -> None:
    model: Any = GPT2.fresh()
    model.transformer.h[1].mlp.c_proj.register_forward_hook(lambda *of: of[-1][..., :-1])
    with pytest.raises(UnsupportedModel, match="mlp.c_proj returned 5 channels, not 6"), HeadAblation(model) as hook:
        hook.ablate([(1, "mlp")])
        logits(model, torch.tensor([IDS]))
