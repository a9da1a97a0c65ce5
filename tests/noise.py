"""Measure the noise of the golden arrays, and write the tolerances that it justifies: python -m tests.noise [MODEL ...]

`python -m tests.noise --prompts MODEL` measures those of the experiment over all capitals, on the first prompts,
`--imputations` those of other imputations, `--curve` those of a removal curve, and `--pairs` those of all pairs.

The same sweep runs in new processes. Each differs from the reference (float32, one thread, sdpa, the widest instruction
set of the processor) in one thing that must not change a result. The tolerance of an array is FACTOR times the largest
difference: that leaves room for other processors and releases, and is still far below any real change.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ablation import models, provenance
from ablation.results import Result
from ablation.sources import NAMED_MODELS
from ablation.studies.experiment import sweep_prompts
from tests import all_capitals, golden_sets, other_imputations
from tests.golden import FOLDER, agreement_arrays, head_mean_arrays, robustness_arrays, sensitivity_arrays

FACTOR = 30
PROMPTS = 8
"""So many prompts are swept to measure the noise of the experiment over all capitals."""
VARIANTS: dict[str, dict[str, Any]] = {
    "the same again": {},
    "instruction set avx2": {"environment": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"}},
    "instruction set default": {"environment": {"ATEN_CPU_CAPABILITY": "default"}},
    "instruction set default, MKL too": {"environment": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}},
    "2 threads": {"threads": 2},
    "eager attention": {"attention": "eager"},
    "float64": {"dtype": "float64"},
    "8 rows at once": {"max_rows": 8},
}


STUDIES: dict[str, Callable[[models.LoadedModel, int | None], Result]] = {
    "imputations": other_imputations.swept,
    "curve": golden_sets.curve,
    "pairs": golden_sets.pairs,
}


def floats(result: Result) -> dict[str, Any]:
    """Return every float array that is pinned."""
    pinned = (
        robustness_arrays(result, 0.0)
        | sensitivity_arrays(result, "target")
        | sensitivity_arrays(result, "control")
        | agreement_arrays(result)
        | head_mean_arrays(result)
    )
    return {name: value for name, value in pinned.items() if np.asarray(value).dtype.kind == "f"}


def run(
    name: str,
    out: Path,
    threads: int = 1,
    attention: str = "sdpa",
    dtype: str = "float32",
    max_rows: int = 0,
    prompts: int = 0,
    study: str = "",
) -> None:
    """Sweep in this process, and save the result.

    prompts: of the file of capitals; 0 for the model's own question. study: a key of `STUDIES`, in place of a sweep.
    """
    torch.set_num_threads(threads)
    loaded = models.load(name, download=False, device="cpu")
    loaded.model.set_attn_implementation(attention)
    loaded.model.to(getattr(torch, dtype))
    if study:
        STUDIES[study](loaded, max_rows or None).save(out)
        return
    questions = all_capitals.questions(name)[:prompts] if prompts else [NAMED_MODELS[name].question]
    sweep_prompts(loaded, questions, max_rows=max_rows or None).save(out)


def in_new_process(name: str, environment: Mapping[str, str] = MappingProxyType({}), **variant: Any) -> Result:
    """Sweep in a new process, since a process chooses its instruction set once."""
    with tempfile.TemporaryDirectory() as out:
        call = f"from pathlib import Path; from tests.noise import run; run({name!r}, Path({out!r}), **{variant!r})"
        subprocess.run([sys.executable, "-c", call], check=True, env=os.environ | environment)
        return Result.load(Path(out))


def measure(name: str) -> dict[str, Any]:
    """Return the entry of a model in the table of tolerances."""
    reference = in_new_process(name)
    noise: dict[str, dict[str, float]] = {}
    turned: dict[str, int] = {}
    for label, variant in VARIANTS.items():
        other = in_new_process(name, **variant)
        turned[label] = int((other.ablated["argmax"] != reference.ablated["argmax"]).sum())
        for key, value in floats(reference).items():
            noise.setdefault(key, {})[label] = float(np.abs(floats(other)[key] - value).max())
        print(f"{name}, {label}: {turned[label]} argmax differ; margin {noise['margin'][label]:.1e}", flush=True)
    return {
        "date": datetime.date.today().isoformat(),
        "made_with": provenance.environment(),
        "argmax_turned": turned,
        "smallest_margin": float(reference.ablated["margin"].min()),
        "arrays": {key: {"atol": float(f"{FACTOR * max(by.values()):.1e}"), "noise": by} for key, by in noise.items()},
    }


PINNED: dict[str, tuple[Callable[[Result, Result], dict[str, float]], dict[str, Any]]] = {
    "--prompts": (all_capitals.noise_between, {"prompts": PROMPTS}),
    "--imputations": (other_imputations.noise_between, {"study": "imputations"}),
    "--curve": (golden_sets.noise_of_curve, {"study": "curve"}),
    "--pairs": (golden_sets.noise_of_pairs, {"study": "pairs"}),
}
"""{option: how the results of two runs are compared, and the arguments of `run`}"""


def measure_more(name: str, option: str) -> dict[str, Any]:
    """Return {array: its tolerance and noise} of what an option measures."""
    noise_between, arguments = PINNED[option]
    reference = in_new_process(name, **arguments)
    noise: dict[str, dict[str, float]] = {}
    for label, variant in VARIANTS.items():
        between = noise_between(reference, in_new_process(name, **arguments, **variant))
        for key, value in between.items():
            noise.setdefault(key, {})[label] = value
        print(f"{name}, {label}: {max(between.values()):.1e}", flush=True)
    return {key: {"atol": float(f"{FACTOR * max(by.values()):.1e}"), "noise": by} for key, by in noise.items()}


def as_toml(table: dict[str, Any]) -> str:
    """Return the text of golden/tolerances.toml."""
    lines = [
        "# The tolerances of the golden arrays, all absolute. `python -m tests.noise MODEL ...` measures them:",
        f"# atol is {FACTOR} times the largest difference between the reference run and the runs named under noise.",
    ]
    for model, entry in sorted(table.items()):
        lines += ["", f"[{model}]"]
        lines += [f"{key} = {_value(value)}" for key, value in entry.items() if key != "arrays"]
        for key, row in entry["arrays"].items():
            lines += ["", f"[{model}.arrays.{key}]", f"atol = {row['atol']:.1e}", f"noise = {_value(row['noise'])}"]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + " }"
    return f"{value:.1e}" if isinstance(value, float) else json.dumps(value)


if __name__ == "__main__":
    import tomllib

    path = FOLDER / "tolerances.toml"
    table = tomllib.loads(path.read_text()) if path.exists() else {}
    names = sys.argv[1:]
    if names and names[0] in PINNED:
        option, *names = names
        for name in names:
            table[name]["arrays"] |= measure_more(name, option)
    else:
        for name in names:  # the other arrays stay
            entry = measure(name)
            entry["arrays"] = table.get(name, entry)["arrays"] | entry["arrays"]
            table[name] = entry
    path.write_text(as_toml(table))
