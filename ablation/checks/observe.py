"""Observations that do not rely on the implementation: the inputs of the projections, and the state of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.checks.decoders import Subject
from ablation.heads import find_heads


@contextmanager
def recorded_inputs(model: PreTrainedModel) -> Iterator[dict[int, list[Tensor]]]:
    """Context manager: record the inputs that the projection of each layer receives, by the index of the layer.

    Yields, for each layer with heads, a list with one copy per call, [rows, tokens, num_heads * head_dim]. The recorder
    wraps the `forward` of each projection, so it sees an input after all pre-hooks. If the recorder is entered before
    an implementation is made, it also sees the edits of an implementation that replaces `forward`.
    """
    layers = find_heads(model).layers
    calls: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
    found = [vars(layer.projection).get("forward") for layer in layers]  # such as that of accelerate
    for layer in layers:
        recording = _recording(layer.projection.forward, calls[layer.index])
        layer.projection.forward = recording
    try:
        yield calls
    finally:
        for layer, forward in zip(layers, found, strict=True):
            if forward is None:
                vars(layer.projection).pop("forward", None)
            else:
                layer.projection.forward = forward


def _recording(forward: Any, calls: list[Tensor]) -> Any:
    def recording(*args: Tensor, **kwargs: Tensor) -> Tensor:
        (z,) = args or kwargs.values()
        calls.append(z.detach().clone())
        output: Tensor = forward(*args, **kwargs)
        return output

    return recording


CAPTURING = "transformers.utils.output_capturing"
"""transformers 5 installs hooks of its own in the first forward pass with `output_hidden_states=True` or
`output_attentions=True`, and keeps them."""
CAPTURING_INSTALLED = "_output_capturing_hooks_installed"  # the attribute that it then sets

WITH_VALUE_PROJECTION = ("llama", "qwen3", "opt", "mixtral")
"""Families whose values have a projection of their own, so that the z of some heads can be spoiled by a bias."""


def spoil_values(
    model: PreTrainedModel, decoder: Subject, layer: int, group: int, value: float
) -> tuple[tuple[int, int], ...]:
    """Make the values of one key/value head NaN or infinite, and so the z of its query heads. Returns these heads."""
    size, dim = decoder.num_key_value_groups, decoder.head_dim
    projection: Any = find_heads(model).layer(layer).block.get_submodule("self_attn.v_proj")
    without = projection.weight.new_zeros(projection.out_features)
    bias = without if projection.bias is None else projection.bias.detach().clone()
    bias[group * dim : (group + 1) * dim] = value
    projection.bias = nn.Parameter(bias)
    return tuple((layer, head) for head in range(group * size, (group + 1) * size))


def hooks(model: nn.Module) -> dict[str, Any]:
    """Return the hooks of all modules, without those that transformers installs itself.

    {module and table of hooks: [(key, id of the hook), in order]}.
    """
    return {
        f"{name or 'the model'}.{attribute}": [
            (key, id(hook)) for key, hook in value.items() if getattr(hook, "__module__", None) != CAPTURING
        ]
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "_hooks" in attribute and isinstance(value, dict)
    }


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything that an ablation must restore: modules, hooks, weights, their order, flags, configuration."""
    config = getattr(model, "config", None)
    found: dict[str, Any] = {
        "config": repr(config),
        "generation_config": repr(getattr(model, "generation_config", None)),
        "config._attn_implementation": getattr(config, "_attn_implementation", None),  # not in the repr
        **hooks(model),
    }
    for name, module in model.named_modules():
        found[f"{name or 'the model'}: its attributes"] = sorted(vars(module).keys() - {CAPTURING_INSTALLED})
        for attribute, value in vars(module).items():
            place = f"{name or 'the model'}.{attribute}"
            if attribute == "forward":
                found[place] = id(value)
            elif not attribute.startswith("_") and isinstance(value, bool | int | float | str | None):
                found[place] = repr(value)
        found[f"{name or 'the model'}: the module itself"] = (id(module), type(module))
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in tensors.items():
        values = [None if t is None else digest(t) for t in (tensor, tensor.grad)]
        storage = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device)
        found[name] = (storage, tensor.requires_grad, values)
    found["the order of modules and weights"] = ([name for name, _ in model.named_modules()], list(tensors))
    return found


def digest(tensor: Tensor) -> str:
    """Return a digest of the bytes of a tensor."""
    on_cpu = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(on_cpu.numpy().data, digest_size=16).hexdigest()


def changes(model: nn.Module, before: dict[str, Any], look: Callable[[nn.Module], dict[str, Any]] = state) -> list[str]:
    """Return the names of the entries that differ from an earlier result of `look` (`state` or `hooks`)."""
    after = look(model)
    return [place for place in before | after if before.get(place) != after.get(place)]


def assert_unchanged(changed: Sequence[str]) -> None:
    """Assert that a list of changes is empty; the message names the first three."""
    __tracebackhide__ = True
    shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    assert not changed, f"the model is not as it was found: {shown} changed"


def assert_state_equals(model: nn.Module, before: dict[str, Any]) -> None:
    """Assert that a model's state equals an earlier one; the message names what changed."""
    __tracebackhide__ = True
    assert_unchanged(changes(model, before))
