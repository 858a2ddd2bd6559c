"""Torch devices and how much memory was needed on them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.machine import resident_peak_mib


def available_devices() -> list[str]:
    """Devices that torch can use here, best first; the last one is "cpu"."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" takes cuda, then mps, then cpu. UserError when unknown or not there."""
    found = available_devices()
    if name == "auto":
        return torch.device(found[0].partition(":")[0])
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()):
        raise UserError(
            f"unknown device {name!r}; {nearest(kind, ('auto', 'cpu', 'cuda', 'cuda:1', 'mps'), 'devices')}"
        )
    there = [d for d in found if d == name or d.partition(":")[0] == name]
    if not there:
        raise UserError(f"device {name!r} is not available here; use device=auto or one of: {', '.join(found)}")
    return torch.device(name)


def reset_peak(device: torch.device) -> None:
    """Starts a new peak where the system allows it (CUDA; Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib(device: torch.device) -> float:
    """Peak since `reset_peak`, MiB: allocated tensors on CUDA, else the resident set.

    Off Linux the resident set's peak is that since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_peak_mib() or 0.0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, has no memory left."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in said
        for sign in ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough", "backend out of memory")
    )
