"""Accelerators, and how much a device can hold: the only place that distinguishes devices."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Larger passes are no faster on a CPU: a heap that grows beyond some 100 MB is returned to the system and mapped again
# at every operation.
CPU_PASS_BYTES = 2**27
# Four rows of 50,000 logits in float64 fit into the cache of a CPU core.
CPU_CACHE_BYTES = 2**21

FREE_SHARE = 0.5
"""Of the free memory of an accelerator, what a pass may plan for: its kernels need room of their own."""
MEASURING_SHARE = 0.02
"""Of the free memory of an accelerator, what the measuring of logits may use at once."""


def accelerator() -> torch.device | None:
    """Return the kind of accelerator that is available here, without an index, or None."""
    if not hasattr(torch, "accelerator"):  # torch 2.5
        return torch.device("cuda") if torch.cuda.is_available() else None
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def num_accelerators() -> int:
    """Return the number of accelerators that are available here."""
    kind = accelerator()
    return 0 if kind is None else int(torch.get_device_module(kind).device_count())


def pass_bytes(devices: Iterable[torch.device]) -> int:
    """Return how many bytes the activations of a pass may take, where a model lies on these devices."""
    return min(int(FREE_SHARE * free) if (free := free_bytes(device)) else CPU_PASS_BYTES for device in devices)


def measuring_bytes(device: torch.device) -> int:
    """Return how many bytes of logits, in float64, are measured at once."""
    free = free_bytes(device)
    return int(MEASURING_SHARE * free) if free else CPU_CACHE_BYTES


def free_bytes(device: torch.device) -> int:
    """Return how many bytes of an accelerator are free, or cached by torch; 0 for a CPU, or if nothing tells."""
    if device.type == "cpu" or not hasattr(getattr(torch, "accelerator", None), "get_memory_info"):  # an older torch
        return 0
    try:
        free, _ = torch.accelerator.get_memory_info(device)
        cached = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    except (RuntimeError, NotImplementedError):  # of a device that cannot tell
        return 0
    return free + cached


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the CPU, has no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def release() -> None:
    """Give memory that torch has cached back to the accelerator, if there is one."""
    if (kind := accelerator()) is not None:
        torch.get_device_module(kind).empty_cache()
