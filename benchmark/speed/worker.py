"""One side of a comparison, a process of its own: `PYTHON bench_worker.py ADAPTER.py`, JSON lines on stdin and stdout.

It needs the standard library and torch only, so it also runs in the environment of a peer. One line per request, and
one line per reply:

    {"do": "make", "setup": {...}}      {"ok": true, "works": ["step", ...]}
    {"do": "time", "work": "step"}      {"seconds": 0.8, "images": 16}, after one call of the work
    {"do": "value", "work": "loss"}     {"value": 2.3}, what the work returns
    {"do": "peak"}                      {"mib": 812.5, "process_mib": 1320.1} since the last "peak"; starts a new one
    {"do": "end"}                       none; the process ends

`mib` is what a GPU allocated, else by how much the resident set was larger than before `make`; `process_mib` is the
whole resident set, libraries included. A request that fails is answered by `{"error": "...", "user": ...}`, where
`user` says whether the mistake is in what the user gave (a checkout or package that is not there).
An adapter defines `make(setup) -> {name of a work: function that does one unit and returns the number of images}`.
Whatever it prints goes to stderr.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    del sys.path[0]  # the folder of this file: its modules must not shadow those of a peer

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch

USER_ERRORS = (ImportError, FileNotFoundError, NotADirectoryError, ValueError)


def load_adapter(path: str | Path) -> ModuleType:
    """The adapter in the file `path`, as a module. Raises ImportError or FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"bench_adapter_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not callable(getattr(module, "make", None)):
        raise ImportError(f"{path} defines no make(setup)")
    return module


def _status_mib(field: str) -> float | None:
    """A size of this process from the system's table, such as VmRSS; None off Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return None


def _give_back() -> None:
    """Returns to the system what was freed while things were made: glibc keeps it, and it would count as used."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """The peak of memory since it was last asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base = self._resident() or 0.0

    def _resident(self) -> float | None:
        now = _status_mib("VmRSS")
        if now is not None:
            return now
        # off Linux there is only the peak since the process began
        unit = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def read(self) -> dict[str, float]:
        """The peak, MiB; starts a new one."""
        process = _status_mib("VmHWM") or self._resident() or 0.0
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        mib = process - self.base
        if self.device.type == "cuda":
            mib = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        return {"mib": mib, "process_mib": process}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Worker:
    """Answers requests about one adapter."""

    def __init__(self, adapter: str | Path) -> None:
        self.adapter = adapter
        self.works: Mapping[str, Callable[[], float]] = {}
        self.device = torch.device("cpu")
        self.peak: Peak | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request other than "end". Raises what the adapter raises; ValueError for a wrong request."""
        do = request.get("do")
        if do == "make":
            return self._make(request["setup"])
        if do == "peak" and self.peak is not None:
            return {**self.peak.read()}
        if do not in ("time", "value"):
            raise ValueError(f"unknown or too early request {do!r}")
        work = self.works.get(request["work"])
        if work is None:
            raise ValueError(f"no work {request['work']!r}; it has: {', '.join(self.works)}")
        if do == "value":
            return {"value": float(work())}
        _synchronize(self.device)
        started = time.perf_counter()
        images = work()
        _synchronize(self.device)
        return {"seconds": time.perf_counter() - started, "images": int(images)}

    def _make(self, setup: dict[str, Any]) -> dict[str, Any]:
        self.device = torch.device(setup.get("device", "cpu"))
        if setup.get("threads") is not None:
            torch.set_num_threads(setup["threads"])
        module = load_adapter(self.adapter)
        self.peak = Peak(self.device)
        self.works = module.make(setup)
        _give_back()
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, **getattr(module, "VERSIONS", {})}
        return {
            "ok": True,
            "works": list(self.works),
            "threads": torch.get_num_threads(),
            "versions": versions,
        }


def serve(worker: Worker, requests: IO[str], replies: IO[str]) -> None:
    """Answers requests until "end" or the end of `requests`."""
    for line in requests:
        try:
            request = json.loads(line)
            if request.get("do") == "end":
                return
            reply = worker.answer(request)
        except Exception as error:
            traceback.print_exc()
            text = (str(error).splitlines() or [""])[0]
            known = isinstance(error, USER_ERRORS)
            reply = {"error": text if known and text else f"{type(error).__name__}: {text}", "user": known}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> int:
    """Serves stdin and stdout."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the adapter prints must not get among the replies
    serve(Worker(sys.argv[1]), sys.stdin, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
