"""The ways to ablate every head: ours, by hand, and by other libraries."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from ablation.heads import find_heads
from ablation.measure import Metric
from ablation.sweeps import sweep, sweep_sequential

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
SHAPES: dict[str, PretrainedConfig] = {
    "GPT-2 small": GPT2Config(),
    "SmolLM2-135M": SMOLLM2,
    "GPT-2 medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "Llama-2-7B": LlamaConfig(intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
}

Cell = tuple[str, int, int]
"""An imputation, a layer and a head."""
Way = Callable[[PreTrainedModel, list[int], Sequence[Cell]], Iterator[Tensor]]
"""Gives the last token's logits [vocabulary] of each ablation."""


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model of that shape, with the same random weights each time."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model


def prompt(model: PreTrainedModel, tokens: int, seed: int = 0) -> list[int]:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, model.config.vocab_size, (tokens,), generator=generator).tolist()
    return ids


def watched(model: PreTrainedModel) -> dict[str, Metric]:
    """Return metrics that are compared: the log-probabilities of tokens that are spread over the vocabulary."""

    def log_probability(logits: Tensor, token: int) -> Tensor:
        logits = logits.double()
        return logits[:, token] - logits.logsumexp(dim=-1)

    vocabulary = model.config.vocab_size
    return {f"token_{token}": partial(log_probability, token=token) for token in range(0, vocabulary, vocabulary // 16)}


def input_ids(model: PreTrainedModel, ids: list[int], rows: int = 1) -> Tensor:
    """Return the prompt as a batch of equal rows, on the device of the model."""
    return torch.tensor([ids] * rows, device=model.device)


def double_loop(model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """One hook and one forward pass for each ablation, as people write it by hand."""
    heads = find_heads(model)
    for imputation, index, head in cells:
        channels = heads.layer(index).channels(head)

        def hook(_: Any, args: tuple[Tensor, ...], channels: slice = channels, by: str = imputation) -> tuple[Tensor]:
            z = args[0].clone()
            z[..., channels] = 0 if by == "zero" else z[..., channels].mean()
            return (z,)

        handle = heads.layer(index).projection.register_forward_pre_hook(hook)
        yield model(input_ids(model, ids)).logits[0, -1]
        handle.remove()


def plain_batch(rows: int, model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """Many ablations as rows of one ordinary batch, in which all rows run through all layers."""
    heads = find_heads(model)
    for start in range(0, len(cells), rows):
        chunk = cells[start : start + rows]
        handles = []
        for layer in heads.layers:
            edits = [(row, cell[2], cell[0] == "zero") for row, cell in enumerate(chunk) if cell[1] == layer.index]
            if not edits:
                continue
            row, head, zero = torch.tensor(edits, device=model.device).unbind(dim=1)

            def hook(
                _: Any, args: tuple[Tensor, ...], row: Any = row, head: Any = head, zero: Any = zero, layer: Any = layer
            ) -> tuple[Tensor]:
                z = args[0].clone().unflatten(-1, (layer.num_heads, layer.head_dim))
                mean = z[row, :, head].mean(dim=(1, 2))  # [edits]
                z[row, :, head] = mean.masked_fill(zero.bool(), 0)[:, None, None].expand(-1, *z.shape[1::2])
                return (z.flatten(-2),)

            handles.append(layer.projection.register_forward_pre_hook(hook))
        yield from model(input_ids(model, ids, len(chunk)), use_cache=False, logits_to_keep=1).logits[:, -1]
        for handle in handles:
            handle.remove()


def adapter(module: str, model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """One head at a time by a library, through its adapter in tests/implementations."""
    found = importlib.import_module(f"tests.implementations.{module}")
    (make,) = (
        kind
        for kind in vars(found).values()
        if getattr(kind, "__module__", "") == found.__name__ and isinstance(kind, type)
    )
    implementation = make(model)
    for imputation, layer, head in cells:
        implementation.ablate([(layer, head)], imputation)
        yield implementation.run(input_ids(model, ids))[0, -1]
    implementation.close()


def nnsight_invokes(model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """Many invokes in each trace, the batching of nnsight: with 6 tokens, 48 to 144 are fastest."""
    from nnsight import NNsight

    rows = max(12, 576 // len(ids))

    class Batching(NNsight):  # type: ignore[misc]  # a plain NNsight leaves it to the user to join the inputs of invokes
        def _batch(self, invokes: list[Any], fn: Any) -> Any:
            return (torch.cat([inputs[0] for inputs, _ in invokes]),), {}

    wrapped, heads = Batching(model), find_heads(model)
    for start in range(0, len(cells), rows):
        saved = []
        with wrapped.trace() as tracer:
            for imputation, index, head in cells[start : start + rows]:
                layer = heads.layer(index)
                with tracer.invoke(input_ids(model, ids)):
                    projection = wrapped.get(layer.projection_name)
                    z = projection.input.clone()
                    part = z[..., layer.channels(head)]
                    z[..., layer.channels(head)] = 0 if imputation == "zero" else part.mean()
                    projection.input = z
                    saved.append(wrapped.output.logits[:, -1].save())
        yield from (logits[0] for logits in saved)


def captum_features(model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """LayerFeatureAblation with one feature for each head, all heads of a layer at once."""
    from captum.attr import LayerActivation, LayerFeatureAblation

    heads = find_heads(model)
    for imputation, index in dict.fromkeys(cell[:2] for cell in cells):
        layer = heads.layer(index)
        runs: list[Tensor] = []

        def score(batch: Tensor, runs: list[Tensor] = runs) -> Tensor:
            logits = model(batch).logits[:, -1]
            runs.append(logits)
            return logits[:, 0]

        batch, where = input_ids(model, ids), {"attribute_to_layer_input": True}
        z = LayerActivation(score, layer.projection).attribute(batch, **where)
        features = torch.arange(layer.num_heads).repeat_interleave(layer.head_dim)[None, None]
        means = (
            z.unflatten(-1, (layer.num_heads, layer.head_dim))
            .mean(dim=(1, 3))
            .repeat_interleave(layer.head_dim, dim=-1)
        )
        baseline = torch.zeros_like(z) if imputation == "zero" else means[:, None].expand_as(z)
        runs.clear()
        LayerFeatureAblation(score, layer.projection).attribute(
            batch, baseline, layer_mask=features, perturbations_per_eval=layer.num_heads, **where
        )
        yield from torch.cat(runs)[-layer.num_heads :]  # the first row is the clean run


def ours(way: Callable[..., Any], model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """The sweep itself, always complete. It keeps no logits, so none are compared."""
    way(model, ids)
    return iter(())


WAYS: dict[str, tuple[str, Way]] = {  # each with the library that it needs
    "`sweep`: a growing batch": ("", partial(ours, sweep)),
    "`sweep_sequential`: one forward per ablation": ("", partial(ours, sweep_sequential)),
    "double loop of hooked forwards": ("", double_loop),
    **{f"plain batch of {rows} rows": ("", partial(plain_batch, rows)) for rows in (64, 256)},
    "TransformerLens, `run_with_hooks` per head": ("transformer_lens", partial(adapter, "transformer_lens")),
    "nnsight, a trace per head": ("nnsight", partial(adapter, "nnsight")),
    "nnsight, many invokes per trace": ("nnsight", nnsight_invokes),
    "Captum, a layer's heads at once": ("captum", captum_features),
    "pyvene, a model per head": ("pyvene", partial(adapter, "pyvene")),
}
SWEEP = next(iter(WAYS))


def installed(library: str) -> bool:
    """Whether a library can be imported; "" always can."""
    return not library or importlib.util.find_spec(library) is not None
