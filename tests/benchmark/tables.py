"""The tables of docs/benchmark.md."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config

from ablation import provenance
from ablation.sweeps import sweep
from tests.benchmark.measuring import Timed, difference_on_one_thread, multiplication_time, seconds_of, timed
from tests.benchmark.ways import SHAPES, SWEEP, build, installed, prompt

ROOT = Path(__file__).parents[2]


def comparison(measured: Timed) -> Iterator[str]:
    """Yield the table of the ways."""
    own = measured.seconds[SWEEP]
    yield from ("| way | time | ratio |", "|---|---|---|")
    for name, seconds in measured.seconds.items():
        yield f"| {name} | {seconds:.2f} s | {seconds / own:.1f} |"
    yield f"| the multiplications alone, at the rate measured | {measured.least:.2f} s | {measured.least / own:.2f} |"


def made_with() -> str:
    """Return the date, the machine and the versions."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "transformer-lens", "nnsight", "captum", "pyvene")
        if installed(name.replace("-", "_"))
    )
    cpu = provenance.environment()["cpu_capability"]
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return f"{today}, {torch.get_num_threads()} threads of {cpu}, {versions}"


def on_device(device: str, rounds: int, pattern: str) -> Iterator[str]:
    """Yield the table of an accelerator: GPT-2 small's shape in float32, and Llama-2-7B's in bfloat16."""
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    yield from (f"## On an accelerator: {card}", "", f"{made_with()}.")
    for name, dtype, tokens, parts in (
        ("GPT-2 small", torch.float32, 6, 1),
        ("Llama-2-7B", torch.bfloat16, 6, 8),
        ("Llama-2-7B", torch.bfloat16, 128, 16),
    ):
        with torch.device(device):
            model = build(SHAPES[name], dtype)
        measured = timed(model, prompt(model, tokens), rounds, parts, pattern)
        passes = sweep(model, prompt(model, tokens)).provenance["passes"]
        yield from ("", f"### {name}'s shape, {str(dtype)[6:]}, {tokens} tokens, {len(measured.cells)} ablations", "")
        yield from comparison(measured)
        yield from ("", f"The sweep took {passes} passes.")
        del model
        torch.accelerator.empty_cache()
    yield ""


def gpt2_small(rounds: int, pattern: str) -> Iterator[str]:
    """Yield the first table: every ablation of GPT-2 small's shape."""
    model: Any = build(SHAPES["GPT-2 small"])
    ids = prompt(model, 6)
    measured = timed(model, ids, rounds, parts=1, pattern=pattern)
    off: dict[torch.dtype, float] = {
        kind: difference_on_one_thread(model.to(kind), ids, measured.cells) for kind in (torch.float32, torch.float64)
    }
    yield from comparison(measured)
    yield ""
    yield f"{len(measured.cells)} ablations of GPT-2 small's shape, 6 tokens, float32, best of {rounds}. {made_with()}."
    yield ""
    yield (
        "All ways give the same log-probabilities up to rounding. On one thread, where the same kernels run, those of "
        f"the growing batch and of the double loop differ by at most {off[torch.float32]:.1g} in float32 and "
        f"{off[torch.float64]:.1g} in float64."
    )
    yield ""


def shapes() -> Iterator[str]:
    """Yield the ways at other shapes and prompts."""
    parts = {"GPT-2 small": 12, "SmolLM2-135M": 15, "GPT-2 medium": 24}
    yield from ("## Other shapes", "")
    yield "Ways that run one ablation after the other ran those of 1 layer in n; the time shown is n times as long."
    for name, tokens in (("GPT-2 small", 32), ("GPT-2 small", 128), ("SmolLM2-135M", 6), ("GPT-2 medium", 6)):
        model = build(SHAPES[name])
        measured = timed(model, prompt(model, tokens), 1, parts[name])
        yield from ("", f"### {name}, {tokens} tokens, {len(measured.cells)} ablations, 1 layer in {parts[name]}", "")
        yield from comparison(measured)
    yield ""


def where() -> Iterator[str]:
    """Yield the operations on which a sweep spends its time."""
    yield from ("## Where the time goes", "")
    yield "Shares of PyTorch operations in the time of a sweep of GPT-2 small's shape, by PyTorch's profiler."
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
    """Yield the time of a sweep as one quantity grows."""
    yield from ("## As the work grows", "")
    yield "`sweep` of models with random weights, 768 channels and a vocabulary of 50257."
    yield from (
        "",
        "| layers | heads | tokens | ablations | time | the multiplications alone |",
        "|" + "---|" * 6,
    )
    base = dict(layers=12, heads=12, tokens=6)
    for change in (
        {},
        {"tokens": 48},
        {"tokens": 128},
        {"tokens": 512},
        {"layers": 6},
        {"layers": 24},
        {"heads": 6},
        {"heads": 24},
    ):
        at = base | change
        model = build(GPT2Config(n_layer=at["layers"], n_head=at["heads"]))
        seconds = seconds_of(lambda: sweep(model, prompt(model, at["tokens"])))  # noqa: B023 (called at once)
        least = multiplication_time(model, at["tokens"])
        ablations = 2 * at["layers"] * at["heads"]
        yield f"| {' | '.join(map(str, at.values()))} | {ablations} | {seconds:.2f} s | {least:.2f} s |"
    yield ""


# /proc, since getrusage gives the peak of the parent process.
MEMORY = """
import pathlib, re, sys, time
from ablation.sweeps import sweep
from tests.benchmark.ways import SHAPES, build, prompt
model = build(SHAPES["GPT-2 small"])
started = time.perf_counter()
result = sweep(model, prompt(model, int(sys.argv[1])), max_rows=int(sys.argv[2]) or None)
seconds = time.perf_counter() - started
(peak,) = re.findall(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
print(result.provenance["passes"], peak, seconds)
"""
KEEP = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}


def memory() -> Iterator[str]:
    """Yield the peak memory with and without the row budget."""
    yield from ("## Memory", "")
    yield "The peak memory of a process that sweeps GPT-2 small's shape, including the weights (0.5 GB) and Python."
    yield "By default, glibc returns freed memory to the system and maps it again. These variables make it keep memory:"
    yield f"`{' '.join(f'{name}={value}' for name, value in KEEP.items())}`."
    yield from ("", "| tokens | rows | freed memory | passes | peak | time |", "|---|---|---|---|---|---|")
    for tokens in (6, 128):
        for rows, name in ((0, "as many as the budget allows"), (10**6, "all at once")):
            for keep, kept in ((KEEP, "kept"), ({}, "returned")):
                out = _run(sys.executable, "-c", MEMORY, str(tokens), str(rows), **keep).split()
                passes, peak, seconds = out[0], int(out[1]) / 2**20, float(out[2])
                yield f"| {tokens} | {name} | {kept} | {passes} | {peak:.2f} GB | {seconds:.2f} s |"
    yield ""


def start_up() -> Iterator[str]:
    """Yield what a user waits for before anything happens."""
    yield from ("## Start-up", "", "| what | time |", "|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "`ablation --help`": ("-m", "ablation", "--help"),
            "`import ablation.sweeps`, most of it torch and transformers": ("-c", "import ablation.sweeps"),
            "`import torch, transformers.modeling_utils` alone": ("-c", "import torch, transformers.modeling_utils"),
            "`ablation heads`": ("-m", "ablation", "heads"),
            "`ablation sweep`: 288 ablations of `capitals`, with figures": ("-m", "ablation", "sweep", "--out", folder),
        }
        for name, command in commands.items():
            seconds = min(seconds_of(partial(_run, sys.executable, *command)) for _ in range(3))
            yield f"| {name} | {seconds:.2f} s |"
    tests = seconds_of(partial(_run, sys.executable, "-m", "pytest", "-q", "--models", "capitals"))
    yield f"| `pytest --models capitals` | {tests:.0f} s |"
    yield ""


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=os.environ | environment)
    return done.stdout
