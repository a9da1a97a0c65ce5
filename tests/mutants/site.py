"""Site: the wrong tensor is edited."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tests.mutants.correct_variants import AttentionFunctions
from tests.mutants.mutant import Mutant
from tests.mutants.reference import Reference


class PseudoHeads(Mutant):
    """Cuts the output of the projection into heads: these are residual coordinates that all heads have written to."""

    source = "interp-reasoning/thought-anchors#7, ndif-team/nnsight#525"

    def install(self) -> None:
        for layer, projection in enumerate(self.projections()):
            self.handles.append(projection.register_forward_hook(partial(self.after, layer)))

    def after(self, layer: int, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self.replace_heads(out, self.targets(layer))


class ResidualSlice(Mutant):
    """Edits the input of the whole layer, the residual stream, as if it consisted of heads."""

    def projections(self) -> list[Any]:
        return self.layers()


class AttentionWeights(Mutant):
    """Zeroes the attention weights that a layer returns, after they were used."""

    def install(self) -> None:
        for layer, block in enumerate(self.layers()):
            attention = next(m for m in block.modules() if type(m).__name__.endswith("Attention"))
            self.handles.append(attention.register_forward_hook(partial(self.after, layer)))

    def after(self, layer: int, module: nn.Module, args: Any, out: tuple[Any, ...]) -> Any:
        if out[1] is not None:
            out[1][:, self.targets(layer)] = 0
        return out


class TransposedWeight(Mutant):
    """Cuts the head out of W_O as if every projection kept its weight as [out, in]; Conv1D keeps [in, out]."""

    source = "goodfire-ai/causalab#61"
    expected_check = "oracle.numpy"
    unsupported: ClassVar[dict[str, str]] = {
        "mean": "weights do not depend on prompts",
        "observable": "z stays as it is",
    }

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        weights = [self.projections()[layer].weight for layer, _ in self.heads]
        kept = [weight.clone() for weight in weights]
        for weight, (_, head) in zip(weights, self.heads, strict=True):
            weight[:, self.channels(head, weight)] = 0
        try:
            return super().forward(input_ids, **inputs)
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


class Bypassed(Mutant):
    """Computes the projection from its weights and never calls the module, so that no hook on it fires."""

    source = "pytorch/pytorch#78109"

    def install(self) -> None:
        for layer, block in enumerate(self.layers()):
            for module in block.modules():
                for name, child in module.named_children():
                    if child is self.projections()[layer]:
                        self.places = [*getattr(self, "places", []), (module, name, child)]
        for layer, (module, name, child) in enumerate(self.places):
            setattr(module, name, Functional(child, partial(self.hook, layer)))

    def remove(self) -> None:
        for module, name, child in self.places:
            setattr(module, name, child)


class Functional(nn.Module):
    """A projection by its weights."""

    def __init__(self, projection: nn.Module, hook: Any) -> None:
        super().__init__()
        self.projection, self.hook = projection, hook

    def forward(self, z: Tensor) -> Tensor:
        (z,) = self.hook(self, (z,)) or (z,)
        weight: Any = self.projection.weight
        bias: Any = self.projection.bias
        return functional.linear(z, weight.T if isinstance(self.projection, Conv1D) else weight, bias)


class BiasGone(Mutant):
    """Removes the projection's whole bias together with the head."""

    source = "ArthurConmy/Automatic-Circuit-Discovery#52"
    expected_check = "oracle.zero"
    share = 1.0

    def install(self) -> None:
        super().install()
        for layer, projection in enumerate(self.projections()):
            self.handles.append(projection.register_forward_hook(partial(self.after, layer)))

    def after(self, layer: int, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if self.targets(layer) and module.bias is not None:
            return out - self.share * module.bias
        return None


class BiasShared(BiasGone):
    """Assumes that each head owns a share of the projection's bias."""

    @property
    def share(self) -> float:  # type: ignore[override]
        return 1 / self.num_heads()


class ValueBiasKept(Mutant):
    """Zeroes a head whose value bias was folded into the projection's bias, and so keeps that bias."""

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        edited = super().hook(layer, module, args)
        if edited and self.imputation == "zero" and self.config.model_type == "gpt2":
            bias = self.layers()[layer].attn.c_attn.bias.chunk(3)[2]
            for head in self.targets(layer):
                channels = self.channels(head, args[0])
                edited[0][..., channels] = bias[channels]
        return edited


class KeyValueHead(Mutant):
    """Hooks the projection of the values, and so ablates every query head that shares the key/value head."""

    source = "TransformerLensOrg/TransformerLens#980"

    def targets(self, layer: int) -> list[int]:
        group = self.num_heads() // getattr(self.config, "num_key_value_heads", self.num_heads())
        firsts = {head // group * group for head in super().targets(layer)}
        return [first + i for first in firsts for i in range(group)]


class Queries(Mutant):
    """Zeroes the queries of the head, which leaves a uniform mean over the tokens it attends to."""

    expected_check = "oracle.zero"

    def projections(self) -> list[Any]:
        if self.config.model_type in ("gpt2", "gpt_neox"):
            return super().projections()
        return [block.self_attn.q_proj for block in self.layers()]

    def install(self) -> None:
        if self.config.model_type in ("gpt2", "gpt_neox"):
            return super().install()
        for layer, projection in enumerate(self.projections()):
            self.handles.append(projection.register_forward_hook(partial(self.after, layer)))
        return None

    def after(self, layer: int, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self.replace_heads(out, self.targets(layer))


class MatchesNothing(Mutant):
    """Looks for hook points by a name that this model does not use, and finds none."""

    source = "ArthurConmy/Automatic-Circuit-Discovery#82"
    expected_check = "smoke"

    def projections(self) -> list[Any]:
        return [module for name, module in self.model.named_modules() if "attn_result" in name]


class MatchesTooMuch(Mutant):
    """Hooks every module with the name of the projection: a GPT-2 has one in each MLP, too."""

    def projections(self) -> list[Any]:
        ends = ("c_proj", "o_proj", "out_proj", "attention.dense")
        return [module for name, module in self.model.named_modules() if name.endswith(ends)]


class MlpToo(Mutant):
    """Edits the same channels of the MLP's input as well."""

    expected_check = "oracle.zero"

    def install(self) -> None:
        super().install()
        for layer, block in enumerate(self.layers()):
            names = dict(block.named_children())
            mlp = names.get("mlp") or names.get("fc1")
            self.handles.append(mlp.register_forward_pre_hook(partial(self.hook, layer)))


class WholeAttention(Mutant):
    """Switches off the attention of the whole layer."""

    expected_check = "oracle.zero"

    def install(self) -> None:
        super().install()
        for layer, projection in enumerate(self.projections()):
            self.handles.append(projection.register_forward_hook(partial(self.after, layer)))

    def after(self, layer: int, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        return torch.zeros_like(out) if self.targets(layer) else None


class EveryModel(Mutant, AttentionFunctions):
    """Replaces transformers' attention functions, for every model that has a layer of that number."""

    expected_check = "independence.other_models"

    def install(self) -> None:
        self.replace()

    def remove(self) -> None:
        self.restore()

    def layer(self, attention: Any) -> int | None:
        return attention.layer_idx

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return Reference.forward(self, input_ids, **inputs)
