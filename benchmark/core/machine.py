"""What a run runs on: versions, commit, platform, memory, cores, launcher; without torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

#: distributions whose version can change a result (Pillow: the bundled glyphs are drawn with it)
PACKAGES = ("torch", "torchvision", "timm", "diffusers", "transformers", "numpy", "Pillow")
#: beside this file in a package that was built from a checkout (setup.py): what `source_state` said there
BUILT_FROM = "built_from.json"
#: of an environment, what tells nothing of where this part of the run was made
_APART = ("places", "earlier")
_SOURCES = ("benchmark", "datasets", "methods", "results", "setup.cfg")


def package_version(name: str) -> str | None:
    """Installed version of a distribution, without importing it; None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args],
            capture_output=True,
            text=True,
            timeout=10,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _checkout() -> Path | None:
    """The root of the checkout that this file lies in; None in an installed package."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / ".git").exists() and (root / "setup.cfg").is_file() else None


def _built_from() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(Path(__file__).resolve().with_name(BUILT_FROM).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


@functools.lru_cache(maxsize=1)
def source_state() -> tuple[str | None, bool | None]:
    """(commit, whether the suite's files differ from it) of the checkout this runs from, or was built from.

    (None, None) where neither is known, as of an archive without git's folder.
    """
    root = _checkout()
    if root is None:
        built = _built_from()
        return built.get("commit"), built.get("dirty")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None:
        return None, None
    changes = _git(root, "status", "--porcelain", "--", *_SOURCES)
    return commit, None if changes is None else bool(changes)


def source_diff() -> str | None:
    """A hash of the files that uncommitted changes touch, which tells one state of them from another; None without."""
    commit, dirty = source_state()
    root = _checkout()
    if not dirty or root is None:
        return _built_from().get("diff") if dirty else None
    changed = _git(root, "diff", "--name-only", "-z", "--no-renames", str(commit), "--", *_SOURCES)
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *_SOURCES)
    if changed is None or new is None:
        return None
    digest = hashlib.sha256()
    for name in sorted({*changed.split("\0"), *new.split("\0")} - {""}):
        file = root / name
        try:
            digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        except OSError:  # it was removed
            digest.update(f"{name}\0\n".encode())
    return digest.hexdigest()[:12]


def checkout_commit(root: Path) -> str | None:
    """The short commit of a git checkout; None where the folder is none of its own."""
    return _git(root, "rev-parse", "--short", "HEAD") if (root / ".git").exists() else None


def environment() -> dict[str, Any]:
    """Versions, commit and platform for a record; no host name, no user name, no path."""
    commit, dirty = source_state()
    diff = source_diff()
    return {
        "dualcl": package_version("dualcl"),
        "commit": commit,
        "dirty": dirty,
        **({"diff": diff} if diff else {}),
        "python": platform.python_version(),
        **{name.lower(): package_version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
    }


def continued(now: Mapping[str, Any], before: Mapping[str, Any], tasks: int, step: int) -> dict[str, Any]:
    """The environment `now` of a run that goes on after `tasks` finished tasks and `step` steps of the next.

    It lists as `earlier`, each with the tasks and the step at which it ended, the environments that what is kept was
    made in, where they differ. `before` is the environment in the run's record so far.
    """
    was, here = ({k: v for k, v in found.items() if k not in _APART} for found in (before, now))
    kept: list[dict[str, Any]] = []
    begun = (0, 0)
    for part in (*(before.get("earlier") or ()), was):
        if begun >= (tasks, step):
            break  # what it did is done again
        ended = min((part.get("tasks", tasks), part.get("step", step)), (tasks, step))
        kept.append({**part, "tasks": ended[0], "step": ended[1]})
        begun = ended
    if kept and {k: v for k, v in kept[-1].items() if k not in ("tasks", "step")} == here:
        kept.pop()  # it goes on
    return {**now, **({"earlier": kept} if kept else {})}


def changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """In words how an environment differs from the one before; empty where it does not."""
    keys = [key for key in {**before, **now} if key not in _APART and before.get(key) != now.get(key)]
    return ", ".join(f"{key} {str(now.get(key))[:12]} (was {str(before.get(key))[:12]})" for key in keys)


def resident_peak_mib(pid: int | Literal["self"] = "self") -> float | None:
    """Largest resident set of a process so far, MiB; None when it has ended, and of another process off Linux."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
    if pid != "self":
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def launched() -> int:
    """How many processes a launcher (accelerate, torchrun) has started for one run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def follower() -> int:
    """This process's number among those launched together, 0 for the one that speaks and writes."""
    return int(os.environ.get("RANK") or 0) if launched() > 1 else 0


def usable_cpus() -> int:
    """CPU cores this process may use (fewer than the machine has in a container, a batch job, or beside its likes)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


class Stopwatch:
    """Seconds since it was made; it stands still where the clock goes back, as after the move of a virtual machine."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds = 0.0

    def read(self) -> float:
        """Seconds so far."""
        now = time.perf_counter()
        self._seconds += max(0.0, now - self._last)
        self._last = now
        return self._seconds
