"""What is verified of a family: its heads attend, zeroing one is zeroing its block of W_O, and its sweep is exact.

Which heads attend is not taken from `ablation.heads` but observed from outside: see `Witness`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ablation.checks.assertions import assert_close
from ablation.checks.oracles import w_o_block
from ablation.heads import HeadMap
from ablation.hook import HeadAblation
from ablation.sweeps import sweep, sweep_sequential
from tests.comparing import ATOL, assert_results_equal
from tests.families.configurations import IDS, logits


class Witness(TorchFunctionMode):
    """Observes attention where it is computed: the weights [rows, heads, tokens, keys] of a softmax, or a fused z.

    heads: for each layer, the number of heads of each attention that ran in it. boost: a (layer, head) whose weights or
    z are doubled; at the projection, that must change the channels of this head and no others.
    """

    SEEN = (F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax, torch.exp)  # exp: in Reformer

    def __init__(self, blocks: Sequence[nn.Module], boost: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.blocks, self.boost = blocks, boost
        self.heads: dict[int, list[int]] = {index: [] for index in range(len(blocks))}
        self.layer: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.layer is None or func not in self.SEEN or out.ndim not in (3, 4) or out.shape[-2] != len(IDS):
            return out
        keys = out.shape[-1]
        if (func is torch.exp and keys != len(IDS)) or (func is not F.scaled_dot_product_attention and keys < len(IDS)):
            return out  # not attention weights
        self.heads[self.layer].append(out.shape[-3])
        if self.boost is not None and self.boost[0] == self.layer:
            out = out.clone()
            out[..., self.boost[1], :, :] *= 2
        return out

    def run(self, model: PreTrainedModel) -> None:
        """Run the model once, and observe it."""

        def enter(index: int) -> Any:
            return lambda *_: setattr(self, "layer", index)

        with ExitStack() as hooks, self:
            for index, block in enumerate(self.blocks):
                hooks.callback(block.register_forward_pre_hook(enter(index)).remove)
                hooks.callback(block.register_forward_hook(lambda *_: setattr(self, "layer", None)).remove)
            logits(model)


@contextmanager
def projection_inputs(heads: HeadMap) -> Iterator[dict[int, Tensor]]:
    """Record the input of each layer's projection, [1, tokens, channels]."""
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        return lambda _, args, kwargs: seen.update({index: next(iter((*args, *kwargs.values())))})

    with ExitStack() as hooks:
        for layer in heads.layers:
            hooks.callback(layer.projection.register_forward_pre_hook(keep(layer.index), with_kwargs=True).remove)
        yield seen


def blocks_of(model: PreTrainedModel, heads: HeadMap) -> Sequence[nn.Module]:
    """Return all decoder layers, including those without heads."""
    lists: Any = (m for m in heads.decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == heads.num_layers)
    return next(m for m in lists if heads.layers[0].block is m[heads.layers[0].index])


def check_heads(model: PreTrainedModel, heads: HeadMap) -> bool:
    """Assert that the heads found are those that attend. Returns whether each head's channels are its own.

    They are not if something between the heads and the projection mixes them, such as a norm over all heads.
    """
    blocks = blocks_of(model, heads)
    seen = Witness(blocks)
    with projection_inputs(heads) as clean:
        seen.run(model)
    found = {layer.index: layer.num_heads for layer in heads.layers}
    for index, counts in seen.heads.items():
        assert set(counts) == {found[index]} - {None} if index in found else not counts, (
            f"layer {index}: {found.get(index, 'no')} heads were found, but {counts or 'none'} attend"
        )
    own = True
    for layer in heads.layers:
        for head in range(layer.num_heads):
            with projection_inputs(heads) as boosted:
                Witness(blocks, (layer.index, head)).run(model)
            changed = (boosted[layer.index] != clean[layer.index]).any(dim=(0, 1)).unflatten(-1, (layer.num_heads, -1))
            which = changed.any(dim=-1).nonzero().flatten().tolist()
            if which == list(range(layer.num_heads)) and layer.num_heads > 1:
                own = False
            else:
                assert which == [head], f"layer {layer.index}: head {head} writes to the channels of heads {which}"
    return own


def check_mlps(model: PreTrainedModel, heads: HeadMap) -> None:
    """Assert for each MLP that zero imputation equals zeroing its last projection, and has an effect."""
    clean = logits(model)
    for mlp in heads.mlps:
        if isinstance(mlp, str):
            continue
        with HeadAblation(model) as ablation:
            ablation.ablate([(mlp.index, "mlp")], "zero")
            got = logits(model)
        weights = [(parameter, parameter.detach().clone()) for parameter in mlp.projection.parameters()]
        with torch.no_grad():
            for parameter, _ in weights:
                parameter.zero_()
            want = logits(model)
            for parameter, values in weights:
                parameter.copy_(values)
        assert_close(got, want, f"zero imputation of the MLP of layer {mlp.index}")
        assert not torch.allclose(got, clean), f"the MLP of layer {mlp.index} has no effect"


def check_zero_oracle(model: PreTrainedModel, heads: HeadMap) -> None:
    """Assert for each head that zero imputation equals zeroing its block of W_O, and has an effect."""
    for layer in heads.layers:  # layers may share a weight, and surgery must reach one layer only
        layer.projection.weight = nn.Parameter(layer.projection.weight.clone())
    clean = logits(model)
    for layer in heads.layers:
        for head in range(layer.num_heads):
            with HeadAblation(model) as ablation:
                ablation.ablate([(layer.index, head)], "zero")
                ablated = logits(model)
            block = w_o_block(layer, head)
            with torch.no_grad():
                before = block.clone()
                block.zero_()
                without = logits(model)
                block.copy_(before)
            assert_close(ablated, without, f"the logits without layer {layer.index}, head {head}")
            assert not torch.equal(ablated, clean), f"layer {layer.index}, head {head} has no effect"


def check_sweeps(model: PreTrainedModel, heads: HeadMap) -> str:
    """Assert that the sweep equals the sequential sweep, with every receipt. Returns how it ran."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        swept = sweep(model, IDS)
    assert_results_equal(
        swept, sweep_sequential(model, IDS), ATOL["float32"] * max(1.0, float(logits(model).abs().max()))
    )
    calls, replaced = swept.grid(swept.calls)[0], swept.grid(swept.replaced)[0]
    margin = swept.grid(swept.ablated["margin"])[0]
    for layer in range(heads.num_layers):
        for head in range(heads.shape[1]):
            here = (layer, head) in set(heads)
            head_dim = heads.layer(layer).head_dim if here else 0
            assert (calls[:, layer, head] == (1 if here else -1)).all()
            assert (replaced[:, layer, head] == (len(IDS) * head_dim if here else -1)).all()
            assert (np.isnan(margin[:, layer, head]) != here).all()
    method = swept.provenance["method"]
    fell_back = [str(note.message) for note in notes if "growing batch" in str(note.message)]
    assert bool(fell_back) == (method == "sequential")
    return "grows" if method == "growing batch" else f"sequential: {swept.provenance['reason']}"
