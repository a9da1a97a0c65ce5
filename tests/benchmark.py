"""How fast a full sweep is, against what people would use instead: `python -m tests.benchmark`

Every way ablates every head, by zero and by its mean, and keeps the last token's logits of each ablation. All run on
the same random weights and tokens, in one process, in turn, and are first checked to give the same logits. Read the
ratios: seconds are those of the machine. Libraries that are not installed (`pip install -e ".[peers]"`) are left out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from ablation import provenance
from ablation.heads import find_heads
from ablation.imputation import IMPUTATIONS
from ablation.sweep import _Run, sweep, sweep_sequential

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- benchmark -->\n).*?(?=<!-- /benchmark -->)", re.DOTALL)
SHAPES = {"small": GPT2Config(), "medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16)}
TOKENS = (0, 1)  # whose probabilities are followed; which ones, does not matter

Way = Callable[[PreTrainedModel, list[int]], Iterator[Tensor]]
"""Gives the last token's logits [vocabulary] of every ablation: imputation by imputation, layer by layer."""


def cells(model: PreTrainedModel) -> list[tuple[str, int, int]]:
    """Every (imputation, layer, head)."""
    return [(imputation, *pair) for imputation in IMPUTATIONS for pair in find_heads(model)]


def double_loop(model: PreTrainedModel, ids: list[int]) -> Iterator[Tensor]:
    """A hook and a forward an ablation, as one writes it by hand."""
    heads = find_heads(model)
    for imputation, index, head in cells(model):
        channels = heads.layer(index).channels(head)

        def hook(_: Any, args: tuple[Tensor, ...], channels: slice = channels, by: str = imputation) -> tuple[Tensor]:
            z = args[0].clone()
            z[..., channels] = 0 if by == "zero" else z[..., channels].mean()
            return (z,)

        handle = heads.layer(index).projection.register_forward_pre_hook(hook)
        yield model(torch.tensor([ids])).logits[0, -1]
        handle.remove()


def adapter(module: str, model: PreTrainedModel, ids: list[int]) -> Iterator[Tensor]:
    """One head at a time by a library, through its adapter in tests/implementations."""
    found = importlib.import_module(f"tests.implementations.{module}")
    (make,) = (
        kind
        for kind in vars(found).values()
        if getattr(kind, "__module__", "") == found.__name__ and isinstance(kind, type)
    )
    implementation = make(model)
    for imputation, layer, head in cells(model):
        implementation.ablate([(layer, head)], imputation)
        yield implementation.run(torch.tensor([ids]))[0, -1]
    implementation.close()


def nnsight_invokes(model: PreTrainedModel, ids: list[int], rows: int = 24) -> Iterator[Tensor]:
    """As many invokes a trace as ablations of a layer: nnsight's own batching."""
    from nnsight import NNsight

    class Batching(NNsight):  # a plain NNsight leaves to the user how the inputs of invokes are joined
        def _batch(self, invokes: list[Any], fn: Any) -> Any:
            return (torch.cat([inputs[0] for inputs, _ in invokes]),), {}

    wrapped, heads = Batching(model), find_heads(model)
    todo = cells(model)
    for start in range(0, len(todo), rows):
        saved = []
        with wrapped.trace() as tracer:
            for imputation, index, head in todo[start : start + rows]:
                layer = heads.layer(index)
                with tracer.invoke(torch.tensor([ids])):
                    projection = wrapped.get(layer.name)
                    z = projection.input.clone()
                    part = z[..., layer.channels(head)]
                    z[..., layer.channels(head)] = 0 if imputation == "zero" else part.mean()
                    projection.input = z
                    saved.append(wrapped.output.logits[:, -1].save())
        yield from (logits[0] for logits in saved)


def captum_features(model: PreTrainedModel, ids: list[int], at_once: int = 12) -> Iterator[Tensor]:
    """LayerFeatureAblation with a feature a head, `perturbations_per_eval` heads at once."""
    from captum.attr import LayerActivation, LayerFeatureAblation

    heads = find_heads(model)
    for imputation in IMPUTATIONS:
        for layer in heads.layers:
            runs: list[Tensor] = []

            def score(input_ids: Tensor, runs: list[Tensor] = runs) -> Tensor:
                logits = model(input_ids).logits[:, -1]
                runs.append(logits)
                return logits[:, 0]

            input_ids, where = torch.tensor([ids]), {"attribute_to_layer_input": True}
            z = LayerActivation(score, layer.projection).attribute(input_ids, **where)
            features = torch.arange(layer.heads).repeat_interleave(layer.width)[None, None]
            means = z.unflatten(-1, (layer.heads, layer.width)).mean(dim=(1, 3)).repeat_interleave(layer.width, dim=-1)
            baseline = torch.zeros_like(z) if imputation == "zero" else means[:, None].expand_as(z)
            runs.clear()
            LayerFeatureAblation(score, layer.projection).attribute(
                input_ids, baseline, layer_mask=features, perturbations_per_eval=at_once, **where
            )
            yield from torch.cat(runs)[-layer.heads :]  # the clean run comes before


def ours(way: Callable[..., Any], model: PreTrainedModel, ids: list[int]) -> Iterator[Tensor]:
    """The sweep itself: it measures what it has and keeps no logits."""
    way(model, ids, TOKENS)
    return iter(())


WAYS: dict[str, tuple[str, Way]] = {
    "`sweep`: one growing batch": ("", partial(ours, sweep)),
    "`sweep_sequential`: one forward an ablation": ("", partial(ours, sweep_sequential)),
    "double loop of hooked forwards": ("", double_loop),
    "TransformerLens, `run_with_hooks` a head": ("transformer_lens", partial(adapter, "transformer_lens")),
    "nnsight, a trace a head": ("nnsight", partial(adapter, "nnsight")),
    "nnsight, 24 invokes a trace": ("nnsight", nnsight_invokes),
    "Captum, 12 heads at once": ("captum", captum_features),
    "pyvene, a model a head": ("pyvene", partial(adapter, "pyvene")),
}


def sweeps_logits(model: PreTrainedModel, ids: list[int]) -> list[Tensor]:
    """The logits that the growing batch measures, in the order of `cells`."""
    run = _Run(model, ids, TOKENS, list(IMPUTATIONS))
    found = {
        cell: logits
        for rows in run.growing([run.cells], run.clean(), None)
        for cell, logits in zip(rows.cells, rows.logits, strict=True)
    }
    return [found[cell] for cell in sorted(found)]


def apart_on_one_thread(model: PreTrainedModel, ids: list[int]) -> float:
    """The largest difference of any logit of any ablation, growing batch against double loop, by the same kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, MKL multiplies the few rows of one prompt by another kernel
    try:
        alone = torch.stack(list(double_loop(model, ids)))
        return (torch.stack(sweeps_logits(model, ids)) - alone).abs().max().item()
    finally:
        torch.set_num_threads(threads)


def limit(model: PreTrainedModel, tokens: int) -> float:
    """Seconds that the multiplications of the ablations take at the rate measured here for their shapes.

    Counted are, for GPT-2: of each ablation the projection and MLP of its layer, all of the layers above, in the last
    layer the last token alone behind its attention, and one unembedding. Attention itself, norms and the clean run are
    left out.
    """
    config = model.config
    width, layers, each = config.n_embd, config.n_layer, config.n_head * len(IMPUTATIONS)
    rows = {layer: each * (layer + 1) for layer in range(layers)}  # that differ from the clean run behind its attention
    seconds = 0.0
    for layer in range(layers):
        above, here = rows[layer] - each, rows[layer]
        behind = here * (tokens if layer < layers - 1 else 1)
        seconds += _product(above * tokens, width, 3 * width) + _product(behind, width, width)
        seconds += _product(behind, width, 4 * width) + _product(behind, 4 * width, width)
    return seconds + _product(rows[layers - 1], width, config.vocab_size)


def _product(rows: int, inner: int, columns: int) -> float:
    if not rows:
        return 0.0
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    return min(_seconds(lambda: a @ b) for _ in range(3))


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def main() -> None:
    """Check that all ways agree, time them in turn, print the table; put it into the README if asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="GPT-2's sizes (default: small)")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--ways", default=".*", help="a pattern: only ways whose name it is found in")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    model = GPT2LMHeadModel(SHAPES[options.shape]).eval()
    ids = torch.randint(0, 50257, (options.tokens,)).tolist()
    ways = {name: way for name, (library, way) in WAYS.items() if re.search(options.ways, name) and installed(library)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        expected = torch.stack(sweeps_logits(model, ids))
        for turn in range(options.rounds):
            for name, way in ways.items():
                print(f"round {turn + 1}: {name} ...", file=sys.stderr)
                logits: list[Tensor] = []
                times[name].append(_seconds(lambda way=way, logits=logits: logits.extend(way(model, ids))))
                if logits:  # by kernels for other numbers of rows, in float32
                    off = (torch.stack(logits) - expected).abs().max().item()
                    assert off < 2e-5, f"{name} differs by {off}"
        least = limit(model, options.tokens)
        apart = {dtype: apart_on_one_thread(model.to(dtype), ids) for dtype in (torch.float32, torch.float64)}
    best = {name: min(seconds) for name, seconds in times.items()}
    own = next(iter(best.values()))
    rows = [f"| {name} | {seconds:.2f} s | {seconds / own:.1f} |" for name, seconds in best.items()]
    made = provenance.environment()
    block = "\n".join(
        [
            "| way | time | ratio |",
            "|---|---|---|",
            *rows,
            f"| the multiplications alone, at the rate measured | {least:.2f} s | {least / own:.2f} |",
            "",
            f"{len(expected)} ablations of GPT-2 {options.shape}'s shape, {options.tokens} tokens, float32, "
            f"{torch.get_num_threads()} CPU threads, best of {options.rounds}. "
            f"{datetime.date.today()}, torch {made['torch']}, transformers {made['transformers']}.",
            "",
            "All ways give the same logits but for rounding. On one thread, where the same kernels run, the growing "
            f"batch and the double loop differ in no logit by more than {apart[torch.float32]:.1g} in float32 and "
            f"{apart[torch.float64]:.1g} in float64.",
            "",
        ]
    )
    print(block)
    if options.write:
        README.write_text(BLOCK.sub(lambda _: block, README.read_text(encoding="utf-8")), encoding="utf-8")


def installed(library: str) -> bool:
    """Whether a library can be imported; "" always can."""
    return not library or importlib.util.find_spec(library) is not None


if __name__ == "__main__":
    main()
