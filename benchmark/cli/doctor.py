"""`dualcl doctor`: what is installed, what can be used, what is missing and how to get it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from dualcl.benchmark.core.machine import package_version, source_state, usable_cpus
from dualcl.benchmark.models.bundled import BUNDLED, bundled_weights, intact

#: bundled models of the default presets
NEEDED = ("renditions-vit", "portraits-diffusion")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `broken` makes the exit code 1."""

    topic: str
    text: str
    mend: str = ""
    broken: bool = False

    @property
    def mark(self) -> str:
        """`ok`, `note` or `BROKEN`."""
        return "BROKEN" if self.broken else "note" if self.mend else "ok"


def _packages() -> Iterator[Finding]:
    """Every requirement of the installed distribution against what is there."""
    missing_extras: dict[str, list[str]] = {}
    for text in importlib.metadata.requires("dualcl") or []:
        requirement = Requirement(text)
        extras = sorted(importlib.metadata.metadata("dualcl").get_all("Provides-Extra") or [])
        extra = next((e for e in extras if requirement.marker and requirement.marker.evaluate({"extra": e})), None)
        if requirement.marker and extra is None and not requirement.marker.evaluate({"extra": ""}):
            continue  # for another platform or Python
        found = package_version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        if extra is not None:
            if not fits:
                missing_extras.setdefault(extra, []).append(requirement.name)
        elif fits:
            yield Finding("package", f"{requirement.name} {found}")
        else:
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Finding(
                "package", f"{wanted} {f'(found {found})' if found else 'is missing'}", f"pip install '{wanted}'", True
            )
    for extra, names in missing_extras.items():
        yield Finding("optional", f"{', '.join(names)} missing (extra `{extra}`)", f"pip install 'dualcl[{extra}]'")


def _torch() -> Iterator[Finding]:
    # by name: a torch that cannot be imported is a finding
    torch = importlib.import_module("torch")
    if importlib.import_module("dualcl.benchmark.core.compat").TORCHVISION_OPS:
        yield Finding("torchvision", "compiled operators load")
    else:
        yield Finding(
            "torchvision",
            "compiled operators do not match this torch; the suite does not need them",
            "install torch and torchvision of one kind (both for CPU, or both for CUDA)",
        )
    for name in importlib.import_module("dualcl.benchmark.core.devices").available_devices():
        if name.startswith("cuda"):
            facts = torch.cuda.get_device_properties(name)
            yield Finding("device", f"{name}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB")
        elif name == "cpu":
            yield Finding("device", f"cpu: {usable_cpus()} usable cores, torch uses {torch.get_num_threads()} threads")
        else:
            yield Finding("device", name)


def _cache_folders() -> dict[str, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub"
    own = os.environ.get("DUALCL_CACHE") or Path("~/.cache/dualcl").expanduser()
    return {"dualcl": Path(own), "Hugging Face hub (timm's weights)": Path(hub)}


def _write_error(folder: Path) -> str:
    """Why nothing can be written below `folder` (or its nearest existing parent); empty when it can."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _places() -> Iterator[Finding]:
    for name, folder in _cache_folders().items():
        state = "there" if folder.is_dir() else "not made yet"
        if why := _write_error(folder):
            yield Finding(
                "cache", f"{name}: {folder}: {why}", "set DUALCL_CACHE / HF_HOME to a folder that can be written"
            )
        else:
            yield Finding("cache", f"{name}: {folder} ({state})")
    here, temporary = Path.cwd(), Path(tempfile.gettempdir())
    if why := _write_error(here):
        yield Finding("folder", f"working directory {here}: {why}", "give --out DIR; runs would go to ./runs")
    else:
        free = shutil.disk_usage(here).free / 2**30
        mend = "runs of large backbones need some GiB" if free < 2 else ""
        yield Finding("folder", f"working directory {here}: {free:.1f} GiB free", mend)
    if why := _write_error(temporary):
        yield Finding(
            "folder", f"temporary files {temporary}: {why}", "set TMPDIR to a folder that can be written", True
        )


def _models() -> Iterator[Finding]:
    """Bundled weights against the checksums in their cards."""
    mend = "reinstall dualcl"
    try:
        models = bundled_weights()
    except (OSError, ValueError, KeyError) as error:
        yield Finding("model", f"the card of a bundled model cannot be read ({error!r})", mend, True)
        return
    for name in [name for name in NEEDED if name not in models]:
        yield Finding("model", f"{name} is missing: the default presets cannot run", mend, True)
    for name, files in models.items():
        if gone := [file for file in files if not file.is_file()]:
            yield Finding("model", f"{name}: {gone[0].relative_to(BUNDLED)} is missing", mend, True)
            continue
        if damaged := [file for file, sha256 in files.items() if not intact(file, sha256)]:
            text = f"{name}: {damaged[0].relative_to(BUNDLED)} is damaged (its checksum differs)"
            yield Finding("model", text, mend, True)
        else:
            yield Finding("model", f"{name}: checksum agrees")


def examine() -> Iterator[Finding]:
    """All findings, in the order in which they are printed."""
    commit, dirty = source_state()
    where = "" if commit is None else f" (commit {commit[:12]}{', modified' if dirty else ''})"
    yield Finding("dualcl", f"{package_version('dualcl')}{where}")
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    try:
        yield from _torch()
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding("torch", f"cannot be imported: {error}", "reinstall torch and torchvision from one index", True)
    yield from _models()
    yield from _places()


def main(args: argparse.Namespace) -> int:
    """Prints all findings to stdout; returns 0 unless something that is needed is broken, then 1."""
    broken = 0
    for finding in examine():
        broken += finding.broken
        mend = f" -> {finding.mend}" if finding.mend else ""
        print(f"{finding.mark:<6}  {finding.topic:<11}  {finding.text}{mend}")
    print(f"\n{broken} thing(s) broken" if broken else "\nnothing needed is broken")
    return 1 if broken else 0
