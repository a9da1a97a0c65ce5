"""Checks on an accelerator, some minutes: `python -m tests.on_gpu [DEVICE]`; scripts/gpu runs it and the benchmark.

Each line says what was checked and how far numbers differ; the exit status is 1 if a check fails.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks import check_implementation
from ablation.checks.decoders import FAMILIES, Decoder
from ablation.checks.protocol import Factory
from ablation.models import load
from ablation.sweeps import sweep, sweep_sequential
from tests.implementations.ours import Ours

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
EPS = 64
"""Log-probabilities of a growing batch and of single forward passes may differ by this many eps of the dtype."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def equals_single_forwards(device: str, family: str, dtype: torch.dtype) -> str:
    """A sweep in a growing batch gives the numbers of one forward pass for each ablation, with the same receipts."""
    model: Any = Decoder(family, 6, 4, 16).fresh()
    model.to(device=device, dtype=dtype)
    swept, single = sweep(model, IDS), sweep_sequential(model, IDS)
    names = ("target_log_probability", "control_log_probability")
    off = max(float(np.abs(swept.change(name) - single.change(name)).max()) for name in names)
    assert swept.provenance["method"] == "growing batch", swept.provenance["reason"]
    assert (swept.replaced == single.replaced).all() and (swept.calls == 1).all()
    assert off <= EPS * torch.finfo(dtype).eps, f"differs by {off:.1e}"
    clear = single.ablated["margin"] > 4 * EPS * torch.finfo(dtype).eps
    assert (swept.ablated["argmax"] == single.ablated["argmax"])[clear].all(), "an argmax differs"
    return f"differs by {off:.1e}"


def keeps_memory(device: str) -> str:
    """A sweep leaves no memory allocated."""
    model: Any = Decoder("llama", 6, 4, 16).fresh()
    model.to(device)
    sweep(model, IDS)
    before = torch.accelerator.memory_allocated() if device != "cpu" else 0
    for _ in range(3):
        sweep(model, IDS)
    after = torch.accelerator.memory_allocated() if device != "cpu" else 0
    assert after <= before, f"{after - before} bytes more"
    return f"{after} bytes before and after"


def spreads_over_devices(device: str) -> str:
    """A model that is partly on the CPU, as `--device auto` places it, gives the numbers of the CPU alone."""
    from accelerate import dispatch_model

    ids = load("capitals", device="cpu").tokenizer("Berlin is the capital of").input_ids
    want = sweep(load("capitals", device="cpu").model, ids)
    places: dict[str, Any] = {"transformer.wte": device, "transformer.wpe": device, "lm_head": device}
    places |= {f"transformer.h.{layer}": device if layer < 6 else "cpu" for layer in range(12)}
    places["transformer.ln_f"] = device
    got = sweep(dispatch_model(load("capitals", device="cpu").model, places, main_device=device), ids)
    names = ("target_probability", "control_probability")
    off = max(float(np.abs(got.change(name) - want.change(name)).max()) for name in names)
    assert off < 1e-4, f"differs by {off:.1e}"
    return f"differs by {off:.1e} from the CPU; {got.provenance['device']}"


def holds_specification(device: str) -> str:
    """The specification holds for our hook on a model on the device."""

    class OnDevice(Ours):
        unsupported: ClassVar[dict[str, str]] = dict.fromkeys(
            (
                *("observable", "restores", "bit_identity", "gradients", "checkpointing", "later_patches", "copies"),
                *("float64", "cache"),
            ),
            "the model is moved to another device, whose kernels round differently",
        )

        def __init__(self, model: PreTrainedModel) -> None:
            model.to(torch.device(device))  # type: ignore[arg-type]
            super().__init__(model)

        def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            mask = None if attention_mask is None else attention_mask.to(device)
            with torch.no_grad():
                return super().run(input_ids.to(device), mask, **moved).cpu()

        def close(self) -> None:
            super().close()
            self.model.to(torch.device("cpu"))  # type: ignore[arg-type]

    records = check_implementation(cast(Factory, OnDevice))
    failed = [record.id for record in records if record.outcome == "failed"]
    assert not failed, f"broken: {', '.join(failed)}"
    return f"{sum(record.outcome == 'passed' for record in records)} requirements hold, the others were not tried"


def main(device: str) -> int:
    """Run all checks, and print a line for each."""
    checks: list[tuple[str, Callable[[], str]]] = [
        (f"{family} {str(dtype)[6:]}", lambda family=family, dtype=dtype: equals_single_forwards(device, family, dtype))  # type: ignore[misc]
        for family in FAMILIES
        for dtype in DTYPES
    ]
    checks += [(check.__name__, lambda check=check: check(device)) for check in (keeps_memory, spreads_over_devices)]  # type: ignore[misc]
    checks.append(("holds_specification", lambda: holds_specification(device)))
    failures = 0
    for name, check in checks:
        started = time.perf_counter()
        try:
            outcome = f"passed: {check()}"
        except Exception as error:
            failures += 1
            outcome = f"FAILED: {type(error).__name__}: {error}"
        print(f"{name}: {outcome} ({time.perf_counter() - started:.1f} s)", flush=True)
    print(f"{len(checks) - failures} of {len(checks)} checks passed on {device}")
    return 1 if failures else 0


if __name__ == "__main__":
    gpu = torch.accelerator.current_accelerator(check_available=True)
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else gpu.type if gpu else "cpu"))
