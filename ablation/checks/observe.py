"""What the checks observe themselves: the inputs of the projections, and the state of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.checks.decoders import Decoder
from ablation.heads import find_heads


@contextmanager
def recorded_inputs(model: PreTrainedModel) -> Iterator[dict[int, list[Tensor]]]:
    """Record copies of the inputs of each projection, [rows, tokens, num_heads * head_dim], by layer index.

    It wraps the projection's own `forward`, which runs after all hooks. If it is entered before an implementation is
    made, it also runs after a `forward` that the implementation puts in its place.
    """
    layers = find_heads(model).layers
    calls: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
    for layer in layers:
        recording = _recording(layer.projection.forward, calls[layer.index])
        layer.projection.forward = recording
    try:
        yield calls
    finally:
        for layer in layers:
            layer.projection.__dict__.pop("forward", None)


def _recording(forward: Any, calls: list[Tensor]) -> Any:
    def recording(*args: Tensor, **kwargs: Tensor) -> Tensor:
        (z,) = args or kwargs.values()
        calls.append(z.detach().clone())
        output: Tensor = forward(*args, **kwargs)
        return output

    return recording


WITH_VALUE_PROJECTION = ("llama", "qwen3", "opt", "mixtral")
"""Families whose values have a projection of their own, so that the z of some heads can be spoiled by a bias."""


def spoil_values(
    model: PreTrainedModel, decoder: Decoder, layer: int, group: int, value: float
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
    """Return the tables of hooks of all modules, in their order."""
    return {
        f"{name or 'the model'}.{attribute}": [(key, id(hook)) for key, hook in value.items()]
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "_hooks" in attribute and isinstance(value, dict)
    }


def state(model: nn.Module) -> dict[str, Any]:
    """Return all that an ablation must not change: modules, hooks, weights, their order, flags, configuration."""
    config = getattr(model, "config", None)
    found: dict[str, Any] = {
        "config": repr(config),
        "generation_config": repr(getattr(model, "generation_config", None)),
        "config._attn_implementation": getattr(config, "_attn_implementation", None),  # not in the repr
        **hooks(model),
    }
    for name, module in model.named_modules():
        found[f"{name or 'the model'}: its attributes"] = sorted(vars(module))
        for attribute, value in vars(module).items():
            place = f"{name or 'the model'}.{attribute}"
            if attribute == "forward":
                found[place] = id(value)
            elif not attribute.startswith("_") and isinstance(value, bool | int | float | str | None):
                found[place] = repr(value)
        found[f"{name or 'the model'}: the module itself"] = (id(module), type(module))
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in tensors.items():
        values = [None if t is None else t.detach().cpu().double().numpy().tobytes() for t in (tensor, tensor.grad)]
        storage = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device)
        found[name] = (storage, tensor.requires_grad, values)
    found["the order of modules and weights"] = ([name for name, _ in model.named_modules()], list(tensors))
    return found


def changes(model: nn.Module, before: dict[str, Any], look: Callable[[nn.Module], dict[str, Any]] = state) -> list[str]:
    """Return the names of what differs from an earlier state, or an earlier table of hooks."""
    after = look(model)
    return [place for place in before | after if before.get(place) != after.get(place)]


def assert_unchanged(changed: Sequence[str]) -> None:
    """Assert that nothing changed; the message names the first changes."""
    __tracebackhide__ = True
    shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    assert not changed, f"the model is not as it was found: {shown} changed"


def assert_state_equals(model: nn.Module, before: dict[str, Any]) -> None:
    """Assert that a model's state equals an earlier one; the message names what changed."""
    __tracebackhide__ = True
    assert_unchanged(changes(model, before))
