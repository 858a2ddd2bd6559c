"""Memory: the peak of a task (the device's own counter on a GPU, the resident set on a CPU), and the lack of it."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from dualcl.benchmark.environment import resident_peak_mib


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
    if (peak := resident_peak_mib()) is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, has no memory left."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in said
        for sign in ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough", "backend out of memory")
    )
