"""What a hook is asked for and what it receives: heads, masks, packed rows, unusual tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation, apply_edits, edits_by_layer
from ablation.errors import AblationNotApplied, InvalidAblation, InvalidHead, UnknownImputation, UnsupportedModel
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import IMPUTATIONS, Imputation, Site
from ablation.rows import Rows
from tests.test_hook import logits

LLAMA = Decoder("llama", num_layers=3, num_heads=4, head_dim=8, num_key_value_groups=2)
ONE, TWO = [3, 1, 4, 1, 5], [9, 2, 6]
IDS = torch.tensor([ONE])


# ---- heads and imputations


@pytest.mark.parametrize(
    "heads",
    [{(0, 2): "mean"}, {(0, 2): 1.0, (1, 1): 0.5}, "ab", b"ab", 3, None, object()],
    ids=["dict", "weights", "str", "bytes", "int", "None", "object"],
)
def test_heads_must_be_a_list_of_pairs(heads: Any) -> None:
    with pytest.raises(InvalidHead, match=r"is not a list of heads: pass pairs, such as \[\(0, 1\)\]$"):
        Ablation(heads)
    model = LLAMA.shared()
    with HeadAblation(model) as ablation:
        with pytest.raises(InvalidHead, match="is not a list of heads"):
            ablation.ablate(heads)
        assert ablation.edits == {}


@pytest.mark.parametrize("heads", [(0, 1), [0, 1], [(0, 1, 2)], np.array([0, 1]), torch.tensor([0, 1]), [((0, 1),)]])
def test_items_that_are_no_pairs_are_refused(heads: Any) -> None:
    with HeadAblation(LLAMA.shared()) as ablation, pytest.raises(InvalidHead):
        ablation.ablate(heads)


@pytest.mark.parametrize(
    "heads",
    [
        {(0, 1), (2, 3)},
        (pair for pair in [(0, 1), (2, 3)]),
        np.array([[0, 1], [2, 3]]),
        torch.tensor([[0, 1], [2, 3]]),
        {(0, 1): 0, (2, 3): 0}.keys(),
    ],
    ids=["set", "generator", "array", "tensor", "keys"],
)
def test_any_iterable_of_pairs_is_accepted(heads: Any) -> None:
    model = LLAMA.shared()
    with HeadAblation(model) as ablation:
        ablation.ablate([(0, 1), (2, 3)])
        want = logits(model, IDS)
        ablation.ablate(heads)
        assert torch.equal(logits(model, IDS), want)


class Nameless(Imputation):
    reads = "token"


class Undeclared(Imputation):
    name = "undeclared"


@pytest.mark.parametrize("imputation", [Nameless(), Undeclared(), Imputation(), Imputation, "", None, 0, ["zero"], abs])
def test_unknown_imputation_is_a_named_error(imputation: Any) -> None:
    with pytest.raises(UnknownImputation):
        Ablation([(0, 1)], imputation)


# ---- masks and packed rows


def mean_logits(ids: list[list[int]], **inputs: Any) -> Tensor:
    model = LLAMA.shared()
    with HeadAblation(model) as ablation:
        ablation.ablate([(0, 1)], "mean")
        return logits(model, torch.tensor(ids), **inputs)


@pytest.mark.parametrize(
    "inputs",
    [
        {"position_ids": [[0, 1, 2, 3, 4, 0, 1, 2]]},
        {"position_ids": [[0, 1, 2, 3, 4, 0, 1, 2]], "attention_mask": [[1] * 8]},
        {"position_ids": [[0, 1, 2, 3, 4, 4, 5, 6]]},
        {"position_ids": [[0, 0, 1, 2, 3, 4, 5, 6]]},
        {"position_ids": [[0, 1, 2, 0, 0, 1, 2, 3]], "attention_mask": [[1, 1, 1, 0, 1, 1, 1, 1]]},
        {"attention_mask": [[1, 1, 1, 1, 1, 2, 2, 2]]},
        {"cu_seq_lens_q": [0, 5, 8], "cu_seq_lens_k": [0, 5, 8], "max_length_q": 5, "max_length_k": 5},
        {"seq_idx": [[0, 0, 0, 0, 0, 1, 1, 1]]},
    ],
    ids=["positions", "masked", "shifted", "one token", "gap", "numbered mask", "boundaries", "numbers"],
)
def test_mean_of_packed_rows_is_refused(inputs: dict[str, Any]) -> None:
    tensors = {name: torch.tensor(v) if isinstance(v, list) else v for name, v in inputs.items()}
    with pytest.raises(InvalidAblation, match="holds several packed sequences"):
        mean_logits([ONE + TWO], **tensors)


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="with torch 2.5, transformers lets packed rows mix")
def test_zero_of_packed_rows_is_that_of_each_alone() -> None:
    model, positions = LLAMA.shared(), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with HeadAblation(model) as ablation:
        ablation.ablate([(0, 1)])
        alone = torch.cat([logits(model, torch.tensor([row]))[0] for row in (ONE, TWO)])
        packed = logits(model, torch.tensor([ONE + TWO]), position_ids=positions)[0]
    torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize(
    ("ids", "inputs"),
    [
        ([ONE], {"position_ids": [[0, 1, 2, 3, 4]]}),
        ([ONE], {"position_ids": [[7, 8, 9, 10, 11]]}),
        ([[0, 0, *ONE]], {"position_ids": [[0, 0, 0, 1, 2, 3, 4]], "attention_mask": [[0, 0, 1, 1, 1, 1, 1]]}),
        ([[0, 0, *ONE]], {"position_ids": [[1, 1, 0, 1, 2, 3, 4]], "attention_mask": [[0, 0, 1, 1, 1, 1, 1]]}),
        ([[*ONE, 0, 0]], {"position_ids": [[0, 1, 2, 3, 4, 4, 4]], "attention_mask": [[1, 1, 1, 1, 1, 0, 0]]}),
        ([[*ONE, 0, 0]], {"attention_mask": [[True] * 5 + [False] * 2]}),
        ([[*ONE, 0, 0]], {"attention_mask": [[1.0] * 5 + [0.0] * 2]}),
        ([ONE, ONE], {"position_ids": [[0, 1, 2, 3, 4]]}),
    ],
    ids=["own", "shifted", "left", "left as generate", "right", "bool", "float", "one row of positions"],
)
def test_mean_of_unpacked_rows_is_that_of_each_alone(ids: list[list[int]], inputs: dict[str, Any]) -> None:
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    if "attention_mask" in inputs and tensors["attention_mask"].is_floating_point():
        tensors["attention_mask"] = tensors["attention_mask"].long().to(torch.int8)
    got = mean_logits(ids, **tensors)
    first = ids[0].index(3)
    for row in got:
        torch.testing.assert_close(row[first : first + 5], mean_logits([ONE])[0], rtol=1e-4, atol=1e-5)


def test_mask_of_one_row_is_that_of_all_rows() -> None:
    layer, z = find_heads(LLAMA.shared()).layers[0], torch.rand(3, 5, 32, generator=torch.manual_seed(0))
    edits = edits_by_layer([(Ablation([(0, 1)], "mean"), None)])[0]
    one = torch.tensor([[1, 1, 1, 0, 0]])
    for mask in (one, one.bool(), one.float()):
        (got, _), (want, _) = (apply_edits(z, layer, edits, Rows(m)) for m in (mask, one.repeat(3, 1)))
        assert torch.equal(got, want) and not torch.equal(got, apply_edits(z, layer, edits, Rows())[0])
    for wrong in (torch.ones(2, 5), torch.ones(3, 4), torch.ones(1, 6)):
        with pytest.raises(InvalidAblation, match="does not fit z of 3 rows and 5 tokens"):
            apply_edits(z, layer, edits, Rows(wrong))


def test_row_of_padding_only_leaves_others_alone() -> None:
    ids, mask = [ONE, [0] * 5], torch.tensor([[1] * 5, [0] * 5])
    torch.testing.assert_close(mean_logits(ids, attention_mask=mask)[0], mean_logits([ONE])[0])


# ---- what the projection receives


class Sealed(Tensor):
    """A tensor with its own dispatch, which ignores writes, as some quantised activations do."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__setitem__:
            return None
        return Tensor.__torch_function__.__func__(cls, function, types, args, kwargs or {})


class Detached(Tensor):
    """A tensor whose views are copies."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = Tensor.__torch_function__.__func__(cls, function, types, args, kwargs or {})
        return result.clone() if function is Tensor.unflatten else result


@pytest.mark.parametrize("kind", [Sealed, Detached])
@pytest.mark.parametrize("imputation", ["zero", "mean"])
def test_elements_that_are_not_replaced_are_an_error(kind: Any, imputation: str) -> None:
    model = LLAMA.fresh()
    projection = model.model.layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, args: (args[0].as_subclass(kind),))
    with HeadAblation(model) as ablation:
        logits(model, IDS)  # unset
        ablation.ablate([(1, 0), (1, 2)], imputation)
        with pytest.raises(AblationNotApplied, match=r"o_proj: 0 of 40 elements of head 0 hold the imputed value"):
            logits(model, IDS)


def test_subclass_that_behaves_is_ablated() -> None:
    class Plain(Tensor):
        pass

    model = LLAMA.fresh()
    with HeadAblation(model) as ablation:
        ablation.ablate([(1, 0)])
        want = logits(model, IDS)
        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0].as_subclass(Plain),))
    with HeadAblation(model) as ablation:
        ablation.ablate([(1, 0)])
        assert torch.equal(logits(model, IDS).as_subclass(Tensor), want)


def test_transform_that_hides_values_is_refused() -> None:
    model = LLAMA._replace(attention="eager").shared()
    with HeadAblation(model) as ablation, torch.no_grad():
        ablation.ablate([(1, 0)])
        with pytest.raises(UnsupportedModel, match=r"a tensor of a torch.func transform: pass a batch instead of vmap"):
            torch.vmap(lambda ids: model(ids[None], use_cache=False).logits)(torch.tensor([ONE, ONE]))


def test_meta_tensor_is_refused() -> None:
    layer, edits = find_heads(LLAMA.shared()).layers[0], edits_by_layer([(Ablation([(0, 1)]), None)])[0]
    with pytest.raises(UnsupportedModel, match="on the meta device, which has no values"):
        apply_edits(torch.rand(1, 5, 32, device="meta"), layer, edits, Rows())


def test_distributed_tensor_is_refused() -> None:
    class DTensor(Tensor):
        """As tensor parallelism passes it on."""

    layer, z = find_heads(LLAMA.shared()).layers[0], torch.rand(1, 5, 32)
    with pytest.raises(UnsupportedModel, match="a DTensor, which is spread over devices"):
        apply_edits(z.as_subclass(DTensor), layer, edits_by_layer([(Ablation([(0, 1)]), None)])[0], Rows())


def test_nan_in_z_is_replaced_and_counted() -> None:
    layer, z = find_heads(LLAMA.shared()).layers[0], torch.rand(2, 5, 32)
    z[0, :, 8:16], z[1, 2, 9] = torch.nan, torch.inf
    zero = edits_by_layer([(Ablation([(0, 1)]), None)])[0]
    edited, counts = apply_edits(z, layer, zero, Rows())
    assert not edited[..., 8:16].any() and counts.tolist() == [[80, 80, 80]]
    mean = edits_by_layer([(Ablation([(0, 1)], IMPUTATIONS["mean"]), None)])[0]
    edited, counts = apply_edits(z, layer, mean, Rows())
    assert edited[0, :, 8:16].isnan().all() and edited[1, :, 8:16].isinf().all()
    assert counts.tolist() == [[80, 80, 39]]  # NaN stays NaN, infinity stays infinity


class Halved(Imputation):
    """Writes into the z that it receives, although it must not."""

    name, reads = "halved", "token"

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        return z.mul_(0.5)


class Misshapen(Imputation):
    name, reads = "misshapen", "token"

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        return z[:, :, :3]


class Number(Imputation):
    name, reads = "number", "token"

    def __call__(self, z: Tensor, site: Site) -> Any:
        return 0.0


def test_imputation_that_writes_into_z_is_counted_rightly() -> None:
    model = LLAMA.shared()
    with HeadAblation(model) as ablation:
        ablation.ablate([(1, 0)], Halved())
        logits(model, IDS)
        assert ablation.receipt.counts[1] == [(40, 40, 40)]


@pytest.mark.parametrize("imputation", [Misshapen(), Number()])
def test_imputation_that_returns_no_replacement_is_named(imputation: Imputation) -> None:
    model = LLAMA.shared()
    with HeadAblation(model) as ablation:
        ablation.ablate([(1, 0)], imputation)
        reason = rf"^the imputation '{imputation.name}' returned .*, which does not broadcast to z of \[1, 5, 8\]$"
        with pytest.raises(InvalidAblation, match=reason):
            logits(model, IDS)
