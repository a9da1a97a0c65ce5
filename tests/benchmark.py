"""How fast a full sweep is, against what people would use instead: `python -m tests.benchmark`

Every way ablates heads by zero and by their mean, and keeps the last token's logits of each ablation. All run on the
same random weights and tokens, in one process, in turn, and are first checked to give the same logits. Read the ratios:
seconds are those of the machine. Libraries that are not installed (`pip install -e ".[peers]"`) are left out.

The first table takes every ablation of GPT-2 small's shape; `--write` puts it into README.md. `--more` makes those of
tests/benchmark.md: other shapes, what grows with what, memory, and start-up.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ablation import provenance
from ablation.heads import find_heads
from ablation.imputation import IMPUTATIONS
from ablation.sweeps import SweepResult, sweep, sweep_prompts, sweep_sequential

ROOT = Path(__file__).parent.parent
README, PAGE = ROOT / "README.md", ROOT / "tests" / "benchmark.md"
BLOCK = re.compile(r"(?<=<!-- benchmark -->\n).*?(?=<!-- /benchmark -->)", re.DOTALL)
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
}
NOISE = 3e-5  # of a log-probability in float32, by kernels for other numbers of rows

Cell = tuple[str, int, int]
"""An imputation, a layer and a head."""
Way = Callable[[PreTrainedModel, list[int], Sequence[Cell]], Iterator[Tensor]]
"""Gives the last token's logits [vocabulary] of each ablation."""


def build(config: PretrainedConfig) -> PreTrainedModel:
    """A model of that shape with random weights, the same each time."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def prompt(model: PreTrainedModel, tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, model.config.vocab_size, (tokens,), generator=generator).tolist()
    return ids


def watched(model: PreTrainedModel) -> list[int]:
    """Tokens whose probabilities are compared, spread over the vocabulary."""
    return list(range(0, model.config.vocab_size, model.config.vocab_size // 16))


# ---- the ways


def double_loop(model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """A hook and a forward an ablation, as one writes it by hand."""
    heads = find_heads(model)
    for imputation, index, head in cells:
        channels = heads.layer(index).channels(head)

        def hook(_: Any, args: tuple[Tensor, ...], channels: slice = channels, by: str = imputation) -> tuple[Tensor]:
            z = args[0].clone()
            z[..., channels] = 0 if by == "zero" else z[..., channels].mean()
            return (z,)

        handle = heads.layer(index).projection.register_forward_pre_hook(hook)
        yield model(torch.tensor([ids])).logits[0, -1]
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
        yield implementation.run(torch.tensor([ids]))[0, -1]
    implementation.close()


def nnsight_invokes(model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """Many invokes a trace, nnsight's own batching: with 6 tokens, 48 to 144 are fastest."""
    from nnsight import NNsight

    rows = max(12, 576 // len(ids))

    class Batching(NNsight):  # a plain NNsight leaves to the user how the inputs of invokes are joined
        def _batch(self, invokes: list[Any], fn: Any) -> Any:
            return (torch.cat([inputs[0] for inputs, _ in invokes]),), {}

    wrapped, heads = Batching(model), find_heads(model)
    for start in range(0, len(cells), rows):
        saved = []
        with wrapped.trace() as tracer:
            for imputation, index, head in cells[start : start + rows]:
                layer = heads.layer(index)
                with tracer.invoke(torch.tensor([ids])):
                    projection = wrapped.get(layer.projection_name)
                    z = projection.input.clone()
                    part = z[..., layer.channels(head)]
                    z[..., layer.channels(head)] = 0 if imputation == "zero" else part.mean()
                    projection.input = z
                    saved.append(wrapped.output.logits[:, -1].save())
        yield from (logits[0] for logits in saved)


def captum_features(model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """LayerFeatureAblation with a feature a head, all heads of a layer at once."""
    from captum.attr import LayerActivation, LayerFeatureAblation

    heads = find_heads(model)
    for imputation, index in dict.fromkeys(cell[:2] for cell in cells):
        layer = heads.layer(index)
        runs: list[Tensor] = []

        def score(input_ids: Tensor, runs: list[Tensor] = runs) -> Tensor:
            logits = model(input_ids).logits[:, -1]
            runs.append(logits)
            return logits[:, 0]

        input_ids, where = torch.tensor([ids]), {"attribute_to_layer_input": True}
        z = LayerActivation(score, layer.projection).attribute(input_ids, **where)
        features = torch.arange(layer.num_heads).repeat_interleave(layer.head_dim)[None, None]
        means = (
            z.unflatten(-1, (layer.num_heads, layer.head_dim))
            .mean(dim=(1, 3))
            .repeat_interleave(layer.head_dim, dim=-1)
        )
        baseline = torch.zeros_like(z) if imputation == "zero" else means[:, None].expand_as(z)
        runs.clear()
        LayerFeatureAblation(score, layer.projection).attribute(
            input_ids, baseline, layer_mask=features, perturbations_per_eval=layer.num_heads, **where
        )
        yield from torch.cat(runs)[-layer.num_heads :]  # the clean run comes before


def ours(way: Callable[..., Any], model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> Iterator[Tensor]:
    """The sweep itself, always whole: it measures what it has and keeps no logits."""
    way(model, ids)
    return iter(())


WAYS: dict[str, tuple[str, Way]] = {  # with the library that each needs
    "`sweep`: a growing batch": ("", partial(ours, sweep)),
    "`sweep_sequential`: a forward an ablation": ("", partial(ours, sweep_sequential)),
    "double loop of hooked forwards": ("", double_loop),
    "TransformerLens, `run_with_hooks` a head": ("transformer_lens", partial(adapter, "transformer_lens")),
    "nnsight, a trace a head": ("nnsight", partial(adapter, "nnsight")),
    "nnsight, many invokes a trace": ("nnsight", nnsight_invokes),
    "Captum, a layer's heads at once": ("captum", captum_features),
    "pyvene, a model a head": ("pyvene", partial(adapter, "pyvene")),
}
SWEEP = next(iter(WAYS))


# ---- the measuring


def apart(swept: SweepResult, cells: Sequence[Cell], rows: Iterable[Tensor]) -> float:
    """The largest difference of a log-probability, of the watched tokens, between a sweep and the logits of a way."""
    worst = 0.0
    for (imputation, layer, head), logits in zip(cells, rows, strict=True):
        change = swept.log_probability_change[:, swept.imputations.index(imputation), layer, head]
        found = logits.double().log_softmax(dim=-1)[swept.watched].numpy()
        worst = max(worst, abs(found - swept.clean_log_probability - change).max())
    return worst


def apart_on_one_thread(model: PreTrainedModel, ids: list[int], cells: Sequence[Cell]) -> float:
    """The same, growing batch against double loop, by the same kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, MKL multiplies the few rows of one prompt by another kernel
    try:
        return apart(sweep(model, ids, watched(model)), cells, double_loop(model, ids, cells))
    finally:
        torch.set_num_threads(threads)


class Multiplication(NamedTuple):
    """[rows, inner] @ [inner, columns], where it comes in its layer: before its heads are ablated, or behind."""

    behind: bool
    inner: int
    columns: int


def multiplications(model: PreTrainedModel) -> dict[int, list[Multiplication]]:
    """Those of each layer, in a forward of one row."""
    found: dict[int, list[Multiplication]] = {}
    with ExitStack() as hooks:
        for layer in find_heads(model).layers:
            here = found.setdefault(layer.index, [])

            def note(module: nn.Module, args: Any, here: Any = here, projection: Any = layer.projection) -> None:
                weight = module.weight if isinstance(module, Conv1D) else module.weight.T
                behind = module is projection or any(m.behind for m in here)
                here.append(Multiplication(behind, *weight.shape))

            for module in layer.block.modules():
                if isinstance(module, nn.Linear | Conv1D):
                    hooks.callback(module.register_forward_pre_hook(note).remove)
        model(torch.tensor([[0]]))
    return found


def limit(model: PreTrainedModel, tokens: int) -> float:
    """Seconds that the multiplications of the ablations take at the rate measured here for their shapes.

    Counted are, of each ablation, the projection and what comes behind it in its own layer, all of the layers above,
    in the last layer the last token alone behind its attention, and one unembedding. Attention itself, norms,
    activations and the clean run are left out.
    """
    heads, seconds, above = find_heads(model), 0.0, 0
    products = multiplications(model)
    for layer in heads.layers:
        here = above + layer.num_heads * len(IMPUTATIONS)  # rows that differ from the clean run behind its attention
        behind = here * (1 if layer is heads.layers[-1] else tokens)
        seconds += sum(
            _product(behind if m.behind else above * tokens, m.inner, m.columns) for m in products[layer.index]
        )
        above = here
    return seconds + _product(above, *reversed(model.get_output_embeddings().weight.shape))


def _product(rows: int, inner: int, columns: int) -> float:
    if not rows:
        return 0.0
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    return min(_seconds(lambda: a @ b) for _ in range(3))


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


class Timed(NamedTuple):
    """Seconds of each way, for all ablations, and of the multiplications alone."""

    seconds: dict[str, float]
    least: float
    cells: list[Cell]


def timed(model: PreTrainedModel, ids: list[int], rounds: int, parts: int, pattern: str = "") -> Timed:
    """Time the ways in turn, the best of some rounds, and check that they agree.

    parts: the ways that take one ablation after the other run one layer in so many; their time is multiplied.
    """
    heads = find_heads(model)
    cells = [(imputation, *pair) for imputation in IMPUTATIONS for pair in heads]
    some = [cell for cell in cells if cell[1] % parts == 0]
    ways = {name: way for name, (library, way) in WAYS.items() if re.search(pattern, name) and installed(library)}
    if parts > 1:
        ways.pop("`sweep_sequential`: a forward an ablation", None)  # always whole
    times: dict[str, list[float]] = {name: [] for name in ways}
    least = []
    swept = sweep(model, ids, watched(model))
    for turn in range(rounds):
        least.append(limit(model, len(ids)))
        for name, way in ways.items():
            print(f"{turn + 1} of {rounds}: {name} ...", file=sys.stderr)
            logits: list[Tensor] = []
            seconds = _seconds(lambda way=way, logits=logits: logits.extend(way(model, ids, some)))  # type: ignore[misc]
            times[name].append(seconds * len(cells) / len(some) if logits else seconds)
            if logits:
                off = apart(swept, some, logits)
                assert off < NOISE, f"{name} differs by {off}"
    return Timed({name: min(seconds) for name, seconds in times.items()}, min(least), cells)


def installed(library: str) -> bool:
    """Whether a library can be imported; "" always can."""
    return not library or importlib.util.find_spec(library) is not None


# ---- the tables


def comparison(measured: Timed) -> Iterator[str]:
    """A table of the ways."""
    own = measured.seconds[SWEEP]
    yield from ("| way | time | ratio |", "|---|---|---|")
    for name, seconds in measured.seconds.items():
        yield f"| {name} | {seconds:.2f} s | {seconds / own:.1f} |"
    yield f"| the multiplications alone, at the rate measured | {measured.least:.2f} s | {measured.least / own:.2f} |"


def made_with() -> str:
    """Date, machine and versions."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "transformer-lens", "nnsight", "captum", "pyvene")
        if installed(name.replace("-", "_"))
    )
    cpu = provenance.environment()["cpu_capability"]
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return f"{today}, {torch.get_num_threads()} threads of {cpu}, {versions}"


def first_table(rounds: int, pattern: str) -> str:
    """The README's."""
    model = build(SHAPES["GPT-2 small"])
    ids = prompt(model, 6)
    measured = timed(model, ids, rounds, parts=1, pattern=pattern)
    off = {kind: apart_on_one_thread(model.to(kind), ids, measured.cells) for kind in (torch.float32, torch.float64)}
    return "\n".join(
        [
            *comparison(measured),
            "",
            f"{len(measured.cells)} ablations of GPT-2 small's shape, 6 tokens, float32, best of {rounds}. "
            f"{made_with()}.",
            "",
            "All ways give the same log-probabilities but for rounding. On one thread, where the same kernels run, "
            "those of the growing batch and of the double loop differ by "
            f"{off[torch.float32]:.1g} at most in float32 and by {off[torch.float64]:.1g} in float64.",
            "",
        ]
    )


def page() -> str:
    """tests/benchmark.md."""
    return "\n".join(
        [
            "# Speed, in more detail",
            "",
            f"Made by `python -m tests.benchmark --more --write`; {made_with()}.",
            "",
            *shapes(),
            *where(),
            *growth(),
            *memory(),
            *start_up(),
        ]
    )


def shapes() -> Iterator[str]:
    """The ways at other shapes and prompts."""
    parts = {"GPT-2 small": 12, "SmolLM2-135M": 15, "GPT-2 medium": 24}
    yield from ("## Other shapes", "")
    yield "Of the ways that take one ablation after the other, one layer in so many was run and the time multiplied."
    for name, tokens in (("GPT-2 small", 32), ("GPT-2 small", 128), ("SmolLM2-135M", 6), ("GPT-2 medium", 6)):
        model = build(SHAPES[name])
        measured = timed(model, prompt(model, tokens), 1, parts[name])
        yield from ("", f"### {name}, {tokens} tokens, {len(measured.cells)} ablations, 1 layer in {parts[name]}", "")
        yield from comparison(measured)
    yield ""


def where() -> Iterator[str]:
    """What a sweep does with its time."""
    yield from ("## Where the time goes", "")
    yield "Shares of PyTorch's operations in a sweep of GPT-2 small's shape, by its profiler."
    yield from ("", "| tokens | operation | calls | share |", "|---|---|---|---|")
    model = build(SHAPES["GPT-2 small"])
    for tokens in (6, 128):
        sweep(model, prompt(model, tokens))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            sweep(model, prompt(model, tokens))
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        for event in events[:9]:
            yield f"| {tokens} | `{event.key}` | {event.count} | {event.self_cpu_time_total / total:.1%} |"
    yield ""


def growth() -> Iterator[str]:
    """What a sweep costs as one thing grows."""
    yield from ("## As the work grows", "")
    yield "`sweep` of models of random weights, 768 wide, with a vocabulary of 50257, 6 tokens unless said otherwise."
    yield from (
        "",
        "| layers | heads | tokens | prompts | ablations | time | the multiplications alone |",
        "|" + "---|" * 7,
    )
    base = dict(layers=12, heads=12, tokens=6, prompts=1)
    for change in (
        {},
        {"tokens": 12},
        {"tokens": 24},
        {"tokens": 48},
        {"layers": 6},
        {"layers": 24},
        {"heads": 6},
        {"heads": 24},
        {"prompts": 4},
    ):
        at = base | change
        model = build(GPT2Config(n_layer=at["layers"], n_head=at["heads"]))
        prompts = [prompt(model, at["tokens"], seed) for seed in range(at["prompts"])]
        seconds = _seconds(lambda: sweep_prompts(model, prompts))  # noqa: B023 (called at once)
        least = limit(model, at["tokens"]) * at["prompts"]
        ablations = 2 * at["layers"] * at["heads"] * at["prompts"]
        yield f"| {' | '.join(map(str, at.values()))} | {ablations} | {seconds:.2f} s | {least:.2f} s |"
    yield from (
        "",
        "Prompts that share passes gain where a model is small. `capitals`, of 144 heads of 8 channels:",
        "",
    )
    yield from ("| prompts of 6 tokens | `sweep` one by one | `sweep_prompts` |", "|---|---|---|")
    from ablation.models import load

    model = load("capitals", device="cpu").model
    for count in (1, 4, 16):
        prompts = [prompt(model, 6, seed) for seed in range(count)]
        alone = min(_seconds(lambda: [sweep(model, ids) for ids in prompts]) for _ in range(2))  # noqa: B023
        together = min(_seconds(lambda: sweep_prompts(model, prompts)) for _ in range(2))  # noqa: B023
        yield f"| {count} | {alone:.2f} s | {together:.2f} s |"
    yield ""


MEMORY = """
import pathlib, re, sys, time
from ablation.sweeps import sweep
from tests.benchmark import SHAPES, build, prompt
model = build(SHAPES["GPT-2 small"])
started = time.perf_counter()
result = sweep(model, prompt(model, int(sys.argv[1])), max_rows=int(sys.argv[2]) or None)
seconds = time.perf_counter() - started
(peak,) = re.findall(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())  # getrusage: the parent's
print(result.provenance["passes"], peak, seconds)
"""
KEEP = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}


def memory() -> Iterator[str]:
    """Peak memory with the row budget and without."""
    yield from ("## Memory", "")
    yield "The most that the process of a sweep of GPT-2 small's shape ever held, weights (0.5 GB) and Python with it."
    yield "A Linux process (glibc) gives freed memory back and maps it anew, unless its environment says otherwise:"
    yield f"`{' '.join(f'{name}={value}' for name, value in KEEP.items())}`."
    yield from ("", "| tokens | rows | freed memory | passes | peak | time |", "|---|---|---|---|---|---|")
    for tokens in (6, 128):
        for rows, name in ((0, "as many as the budget allows"), (10**6, "all at once")):
            for keep, kept in ((KEEP, "kept"), ({}, "given back")):
                out = _run(sys.executable, "-c", MEMORY, str(tokens), str(rows), **keep).split()
                passes, peak, seconds = out[0], int(out[1]) / 2**20, float(out[2])
                yield f"| {tokens} | {name} | {kept} | {passes} | {peak:.2f} GB | {seconds:.2f} s |"
    yield ""


def start_up() -> Iterator[str]:
    """What a user waits for before anything happens."""
    yield from ("## Start-up", "", "| what | time |", "|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "`ablation --help`": ("-m", "ablation", "--help"),
            "`import ablation.sweep`, most of it torch and transformers": ("-c", "import ablation.sweep"),
            "`import torch, transformers.modeling_utils` alone": ("-c", "import torch, transformers.modeling_utils"),
            "`ablation heads capitals`": ("-m", "ablation", "heads", "capitals"),
            "`ablation sweep`: 288 ablations of `capitals`, with figures": ("-m", "ablation", "sweep", "--out", folder),
        }
        for name, command in commands.items():
            seconds = min(_seconds(partial(_run, sys.executable, *command)) for _ in range(3))
            yield f"| {name} | {seconds:.2f} s |"
    tests = _seconds(partial(_run, sys.executable, "-m", "pytest", "-q", "--models", "capitals"))
    yield f"| `pytest --models capitals` | {tests:.0f} s |"
    yield ""


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=os.environ | environment)
    return done.stdout


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--ways", default="", help="a pattern: only ways whose name it is found in, and `sweep`")
    parser.add_argument("--more", action="store_true", help="the tables of tests/benchmark.md, some 15 minutes")
    parser.add_argument(
        "--write", action="store_true", help="put what is measured into README.md or tests/benchmark.md"
    )
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with torch.no_grad():
        text = page() if options.more else first_table(options.rounds, f"^`sweep`|{options.ways}")
    print(text)
    if options.write:
        whole = text if options.more else BLOCK.sub(lambda _: text, README.read_text(encoding="utf-8"))
        (PAGE if options.more else README).write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    main()
