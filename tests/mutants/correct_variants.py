"""Correct implementations in other styles, which the specification must not reject."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from tests.mutants.reference import Reference


class Where(Reference):
    """Chooses between old and new by a mask of channels, and writes nothing in place."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        per_head = z.unflatten(-1, (self.num_heads(), -1))  # [rows, tokens, heads, width]
        chosen = torch.zeros(self.num_heads(), dtype=torch.bool, device=z.device)
        chosen[heads] = True
        values = torch.stack([torch.as_tensor(self.value(head)).to(z).expand_as(head) for head in per_head.unbind(-2)])
        return torch.where(chosen[:, None], values.movedim(0, -2), per_head).flatten(-2)


class Concatenated(Reference):
    """Concatenates the heads again."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        parts = list(z.split(self.head_dim(z), dim=-1))
        for head in heads:
            parts[head] = torch.as_tensor(self.value(parts[head])).to(z).expand_as(parts[head])
        return torch.cat(parts, dim=-1)


class Multiplied(Reference):
    """Multiplies by zero, which leaves -0.0 where z is negative."""

    unsupported: ClassVar[dict[str, str]] = {"non_finite": "NaN times 0 is NaN"}

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        if self.imputation == "mean":
            return super().replace_heads(z, heads)
        gates = torch.ones(self.num_heads()).index_fill(0, torch.tensor(heads), 0).to(z)
        return (z.unflatten(-1, (self.num_heads(), -1)) * gates[:, None]).flatten(-2)


class RealTokensOnly(Reference):
    """Leaves the padding unchanged."""

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        if self.real is None or self.real.shape != z.shape[:2]:  # tokens of a cache, not padded
            return super().replace_heads(z, heads)
        return super().replace_heads(z, heads).where(self.real[..., None], z)


class OwnPrecision(Reference):
    """Computes the mean in the dtype of z, row by row."""

    def mean(self, z: Tensor, real: Tensor) -> Tensor:
        return torch.stack([row[here].mean() for row, here in zip(z, real, strict=True)])[:, None, None]


class CleanMeans(Reference):
    """Measures the means of all heads in a clean forward pass of the same inputs, beforehand."""

    unsupported: ClassVar[dict[str, str]] = {"single_forward": "it measures first"}

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        if self.imputation == "mean" and self.heads:
            heads, self.heads = self.heads, []
            self.means: dict[int, list[Tensor]] = {}
            handles: list[RemovableHandle] = []
            try:
                for layer, projection in enumerate(self.projections()):
                    handles.append(projection.register_forward_pre_hook(partial(self.measure, layer)))
                super().forward(input_ids, **inputs)
            finally:
                self.heads = heads
                for handle in handles:
                    handle.remove()
        return super().forward(input_ids, **inputs)

    def measure(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        z = args[0]
        self.means[layer] = [
            super(CleanMeans, self).mean(head, self.real) for head in z.split(self.head_dim(z), dim=-1)
        ]

    def hook(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.layer = layer
        return super().hook(layer, module, args)

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        if self.imputation != "mean":
            return super().replace_heads(z, heads)
        out = z.clone()
        for head in heads:
            out[..., self.channels(head, z)] = self.means[self.layer][head]
        return out


class PerRun(Reference):
    """Registers its hooks for each run, before all others, to be called also when a forward pass raises."""

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        try:
            for layer, projection in enumerate(self.projections()):
                hook = partial(self.hook, layer)
                self.handles.append(projection.register_forward_pre_hook(hook, prepend=True))
            self.handles.append(self.model.register_forward_hook(lambda *_: None, always_call=True))
            return super().forward(input_ids, **inputs)
        finally:
            self.remove()


class PerSet(Reference):
    """Registers hooks on the layers that it ablates, when they are named."""

    def install(self) -> None:
        pass

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.remove()
        for layer in {layer for layer, _ in heads}:
            hook = partial(self.hook, layer)
            self.handles.append(self.projections()[layer].register_forward_pre_hook(hook))

    def clear(self) -> None:
        super().clear()
        self.remove()


class GlobalHook(Reference):
    """Registers one hook for all modules of the process, and does not touch the model itself."""

    def install(self) -> None:
        index = {projection: layer for layer, projection in enumerate(self.projections())}

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return self.hook(index[module], module, args) if module in index else None

        self.handles.append(register_module_forward_pre_hook(hook))


class WrappedForward(Reference):
    """Replaces the `forward` of each projection by a function, one at a time."""

    unsupported: ClassVar[dict[str, str]] = {"later_patches": "it puts the `forward` back that it found"}

    def taken(self) -> bool:
        return any(isinstance(projection.forward, partial) for projection in self.projections())

    def install(self) -> None:
        self.before: list[tuple[nn.Module, Any]] = []
        if self.taken():
            raise RuntimeError("the model is ablated already")
        self.before = [(projection, projection.__dict__.get("forward")) for projection in self.projections()]
        for layer, projection in enumerate(self.projections()):
            projection.forward = partial(self.replaced, layer, projection.forward)

    def replaced(self, layer: int, forward: Any, z: Tensor) -> Any:
        heads = self.targets(layer)
        return forward(self.replace_heads(z, heads) if heads else z)

    def remove(self) -> None:
        for projection, forward in self.before:
            if forward is None:
                projection.__dict__.pop("forward", None)
            else:
                projection.forward = forward


class Wrapper(nn.Module):
    """Takes the place of a projection, and calls it."""

    def __init__(self, projection: nn.Module, edit: Any) -> None:
        super().__init__()
        self.projection, self.edit = projection, edit

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.projection(self.edit(z))
        return out


class WrappedModule(Reference):
    """Wraps each projection in a module of its own, unless it is wrapped already."""

    def install(self) -> None:
        self.places: list[tuple[nn.Module, str, nn.Module]] = []
        if any(isinstance(module, Wrapper) for module in self.model.modules()):
            raise RuntimeError("the model is ablated already")
        names = {module: name for name, module in self.model.named_modules()}
        for layer, projection in enumerate(self.projections()):
            if projection not in names:  # a layer without heads
                continue
            parent, _, name = names[projection].rpartition(".")
            place = self.model.get_submodule(parent)
            self.places.append((place, name, projection))
            setattr(place, name, Wrapper(projection, partial(self.edit, layer)))

    def edit(self, layer: int, z: Tensor) -> Tensor:
        heads = self.targets(layer)
        return self.replace_heads(z, heads) if heads else z

    def remove(self) -> None:
        for place, name, projection in self.places:
            setattr(place, name, projection)


class Subtracted(Reference):
    """Leaves z unchanged, and corrects the projection's output."""

    unsupported: ClassVar[dict[str, str]] = {
        "adapters": "it subtracts what the weight of the projection makes of z, and nothing beside it",
        "observable": "it corrects the projection's output",
        "non_finite": "it subtracts what z contributes",
    }

    def install(self) -> None:
        for layer, projection in enumerate(self.projections()):
            self.handles.append(projection.register_forward_hook(partial(self.correct, layer)))

    def correct(self, layer: int, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        weight = module.weight if isinstance(module, Conv1D) else module.weight.T  # [in, out]
        for head in set(self.targets(layer)):
            channels = self.channels(head, args[0])
            z = args[0][..., channels]
            out = out + (self.value(z) - z) @ weight[channels]
        return out


class PatchedPerRun(WrappedForward):
    """Replaces `forward` for each run."""

    unsupported: ClassVar[dict[str, str]] = {}

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        super().install()
        try:
            return super().forward(input_ids, **inputs)
        finally:
            super().remove()

    def remove(self) -> None:
        pass


class ClassSwapped(Reference):
    """Changes the class of each projection for each run."""

    unsupported: ClassVar[dict[str, str]] = {"observable": "z changes in a `forward` of a class"}

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        kinds = [(projection, type(projection)) for projection in self.projections()]
        try:
            for layer, (projection, kind) in enumerate(kinds):
                edit = partial(self.replaced, layer, kind)
                projection.__class__ = type(
                    "Ablated", (kind,), {"forward": lambda module, z, edit=edit: edit(module, z)}
                )
            return super().forward(input_ids, **inputs)
        finally:
            for projection, kind in kinds:
                projection.__class__ = kind

    def replaced(self, layer: int, kind: type[nn.Module], projection: nn.Module, z: Tensor) -> Any:
        heads = self.targets(layer)
        return kind.forward(projection, self.replace_heads(z, heads) if heads else z)


class AttentionFunctions(Reference):
    """Edits the output of transformers' attention functions for this model's modules, in each run."""

    functions: ClassVar[Any] = ALL_ATTENTION_FUNCTIONS

    def install(self) -> None:
        self.layer_of = {}
        for layer, block in enumerate(self.layers()):
            attentions = (m for m in block.modules() if type(m).__name__.endswith("Attention"))
            self.layer_of.update(dict.fromkeys(attentions, layer))

    def replace(self) -> None:
        self.before = dict(self.functions._local_mapping)
        for name in ("eager", "sdpa"):
            self.functions._local_mapping[name] = partial(self.attend, name)

    def restore(self) -> None:
        self.functions._local_mapping.clear()
        self.functions._local_mapping.update(self.before)

    def attend(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        known = self.before | self.functions._global_mapping
        attention = known.get(name) or sys.modules[type(module).__module__].eager_attention_forward
        z, weights = attention(module, *args, **kwargs)  # z: [rows, tokens, heads, width]
        layer = self.layer(module)
        heads = [] if layer is None else self.targets(layer)
        return self.replace_heads(z.flatten(2), heads).view_as(z) if heads else z, weights

    def layer(self, attention: nn.Module) -> int | None:
        return self.layer_of.get(attention)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.replace()
        try:
            return super().forward(input_ids, **inputs)
        finally:
            self.restore()


class InPlaceSurgery(Reference):
    """Writes zeros into W_O for each run, and restores the weights."""

    unsupported: ClassVar[dict[str, str]] = {
        "mean": "weights do not depend on prompts",
        "observable": "z stays as it is",
        "non_finite": "NaN times 0 is NaN",
        "adapters": "weights beside W_O stay as they are",
    }

    def install(self) -> None:
        pass

    def weight(self, layer: int) -> Tensor:
        """A view of W_O, [in, out]."""
        projection = self.projections()[layer]
        weight: Any = projection.weight
        return weight if isinstance(projection, Conv1D) else weight.T

    def kept(self, block: Tensor) -> Tensor:
        return block.clone()

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        blocks = [self.weight(layer)[self.channels(head, self.weight(layer).T)] for layer, head in set(self.heads)]
        before = [self.kept(block) for block in blocks]
        try:
            for block in blocks:
                block.zero_()
            return super().forward(input_ids, **inputs)
        finally:
            for block, was in zip(blocks, before, strict=True):
                block.copy_(was)


class FunctionalCall(InPlaceSurgery):
    """Calls the model with other weights, and writes nothing."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            for layer, head in self.heads:
                if parameter is self.projections()[layer].weight:
                    weights.setdefault(name, parameter.clone())
                    by_input = weights[name] if self.config.model_type == "gpt2" else weights[name].T
                    by_input[self.channels(head, by_input.T)] = 0
        inputs = {"use_cache": False} | inputs
        logits: Tensor = torch.func.functional_call(self.model, weights, (input_ids,), inputs).logits
        return logits


class Masked(Reference):
    """Keeps a mask [layers, heads]."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.chosen = torch.zeros(config.num_hidden_layers, config.num_attention_heads, dtype=torch.bool)
        super().__init__(model)

    def __deepcopy__(self, memo: Any) -> Reference:
        idle: Any = super().__deepcopy__(memo)
        idle.chosen = torch.zeros_like(self.chosen)
        return idle

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        super().ablate(heads, imputation)
        self.chosen.zero_()
        for layer, head in heads:
            self.chosen[layer, head] = True

    def targets(self, layer: int) -> list[int]:
        return self.chosen[layer].nonzero().flatten().tolist()

    def clear(self) -> None:
        super().clear()
        self.chosen.zero_()


class Differentiable(Reference):
    """Keeps the graph of the forward pass."""

    differentiable = True


class DifferentiablePerRun(PerRun):
    """Keeps the graph of the forward pass, and removes its hooks before the backward pass."""

    differentiable = True
    unsupported: ClassVar[dict[str, str]] = {"checkpointing": "its hooks are gone when layers are run again"}


class DifferentiableFunctionalCall(FunctionalCall):
    """Keeps the graph of a forward pass with other weights."""

    differentiable = True
    unsupported: ClassVar[dict[str, str]] = {
        **InPlaceSurgery.unsupported,
        "checkpointing": "the other weights are gone when layers are run again",
    }


class InferenceMode(Reference):
    """Runs under torch.inference_mode()."""

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.inference_mode():
            return super().run(*args, **kwargs)


class WorkerThread(Reference):
    """Runs in a thread of its own."""

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        with ThreadPoolExecutor(1) as worker:
            return worker.submit(super().run, *args, **kwargs).result()


class HiddenStates(Reference):
    """Asks for hidden states, for which transformers registers hooks that stay."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        return super().forward(input_ids, output_hidden_states=True, **inputs)


class BatchRows(Reference):
    """Runs clean and ablated rows in one batch, and returns the ablated ones."""

    unsupported: ClassVar[dict[str, str]] = {
        "observable": "each projection receives twice as many rows",
        "bit_identity": "kernels for twice as many rows may round differently",
        "cache": "a cache holds no clean rows",
    }

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        twice = {name: self.twice(given) for name, given in inputs.items()}
        self.real = self.twice(self.real)
        return super().forward(self.twice(input_ids), **twice)[len(input_ids) :]

    def twice(self, given: Any) -> Any:
        return torch.cat([given, given]) if isinstance(given, Tensor) else given

    def replace_heads(self, z: Tensor, heads: list[int]) -> Tensor:
        clean = len(z) // 2
        return torch.cat([z[:clean], super().replace_heads(z, heads)[clean:]])


class Linears(TorchFunctionMode):
    """Edits the input of linear functions, if their weight is that of a projection."""

    def __init__(self, edit: Any) -> None:
        super().__init__()
        self.edit = edit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            z, weight, *rest = args
            args = (self.edit(z, weight), weight, *rest)
        elif func is torch.addmm:  # of Conv1D
            bias, z, weight = args
            args = (bias, self.edit(z, weight), weight)
        return func(*args, **kwargs or {})


class FunctionMode(Reference):
    """Edits the arguments of torch's linear functions in each run, and registers no hook."""

    unsupported: ClassVar[dict[str, str]] = {
        "observable": "z changes within the projection's `forward`",
        "adapters": "it edits what the weight of a projection multiplies, and nothing beside it",
    }

    def install(self) -> None:
        pass

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        self.shape = input_ids.shape
        with Linears(self.edit):
            return super().forward(input_ids, **inputs)

    def edit(self, z: Tensor, weight: Tensor) -> Tensor:
        for layer in {layer for layer, _ in self.heads}:
            if weight is self.projections()[layer].weight:
                return self.replace_heads(z.view(*self.shape, -1), self.targets(layer)).view(z.shape)
        return z


class Flip(Reference):
    """Reverses the channels of z: an imputation of its own, and no other."""

    imputations: ClassVar[tuple[str, ...]] = ("flip",)

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str) -> None:
        assert imputation == "flip"
        super().ablate(heads, "zero")

    def zero(self, z: Tensor) -> Tensor:
        return z.flip(-1)


CORRECT_VARIANTS = (
    Where,
    Concatenated,
    Multiplied,
    RealTokensOnly,
    OwnPrecision,
    CleanMeans,
    PerRun,
    PerSet,
    GlobalHook,
    WrappedForward,
    WrappedModule,
    Subtracted,
    PatchedPerRun,
    ClassSwapped,
    AttentionFunctions,
    InPlaceSurgery,
    FunctionalCall,
    Masked,
    Differentiable,
    DifferentiablePerRun,
    DifferentiableFunctionalCall,
    InferenceMode,
    WorkerThread,
    HiddenStates,
    BatchRows,
    FunctionMode,
    Flip,
)
