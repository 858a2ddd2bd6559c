"""Many runs of one preset, one after another or side by side; methods x seeds of a comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dualcl.benchmark.config.presets import bundled_presets, load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.config.tuned import read_tuned
from dualcl.benchmark.core.errors import EXIT_FAILED, EXIT_USER, UserError
from dualcl.benchmark.core.reading import SEEDS, natural, parse_names
from dualcl.benchmark.core.registry import check_plugins, is_file
from dualcl.benchmark.core.settings import Resolved, parse_assignment
from dualcl.benchmark.core.text import printable
from dualcl.benchmark.runs.content import check_apart, located, look, moved_keys
from dualcl.methods import method_info
from dualcl.results.records import load_record


@dataclass(frozen=True)
class Planned:
    """One run to be done: its checked configuration, the arguments that gave it, and its directory."""

    resolved: Resolved
    preset: str
    sets: tuple[str, ...]
    out: Path
    label: str
    #: where the run's files go in the end, a URL; `out` is then their copy on this machine
    remote: str = ""
    #: more options of `dualcl run`
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.remote:
            check_apart(self.resolved, self.out)

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.resolved.general.seed

    def arguments(self, *sets: str) -> list[str]:
        """What follows `dualcl` to do this run, from any folder, with these settings too."""
        preset = self.preset if self.preset in bundled_presets() else os.path.abspath(self.preset)
        command = ["run", preset, self.resolved.method_reference, "--seed", str(self.seed)]
        command += ["--out", self.remote or os.path.abspath(self.out)]
        own = [text for text in (*self.sets, *sets) if parse_assignment(text)[0] != "seed"]
        if "data" in self.resolved.plugins:  # its file as from here, with the hash
            own.append(f"data.name={json.dumps(self.resolved.data_reference)}")
        return [*command, *self.options, *(["--set", *own] if own else [])]


@dataclass(frozen=True)
class Outcome:
    """How a planned run ended: exit code and, unless that is 0, the error in one line."""

    planned: Planned
    code: int
    error: str = ""


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]; UserError when one is no number of SEEDS, or given twice."""
    seeds: list[int] = []
    for name in parse_names(text, "seeds"):
        try:
            seed = natural(name)
        except ValueError:
            raise UserError(f"--seeds wants whole numbers {SEEDS}, such as 0,1,2; got {name!r}") from None
        if seed in seeds:
            raise UserError(f"--seeds names {seed} twice; give it once")
        seeds.append(seed)
    return seeds


def check_seed_given_once(sets: Iterable[str], flag: str) -> None:
    """UserError when `--set seed=...` competes with a flag that gives the seed."""
    if any(parse_assignment(text)[0] == "seed" for text in sets):
        raise UserError(f"the seed is given by {flag} and by --set seed=...; keep one of the two")


def plan_comparison(
    preset: str,
    methods: Sequence[str],
    seeds: Sequence[int] | None,
    sets: Sequence[str],
    out: Path,
    url: str | None = None,
    tuned_on: Path | None = None,
    same_stream: bool = False,
) -> list[Planned]:
    """Checks every method with every seed and says where each run goes: `<out>/<method>-seed<seed>`, or below a URL.

    No seeds: the preset's own. `methods.NAME.key` for a file's method is left out for the others, which do not know it.
    `tuned_on`: the --out of sweeps; each method takes the best settings of its own, if it was in one.
    Raises UserError for the first thing that is wrong, before anything runs.
    """
    if seeds is not None:
        check_seed_given_once(sets, "--seeds")
    of_files = {method: method_info(method).name for method in methods if is_file(method)}
    names = {method: of_files.get(method) or method_info(method).name for method in methods}
    tuned = {m: read_tuned(tuned_on, n, same_stream=same_stream) if tuned_on else None for m, n in names.items()}
    if tuned_on and not any(tuned.values()):
        raise UserError(f"--tuned-on {tuned_on} has no sweep of {', '.join(names.values())}")
    options = ("--tuned-on", os.path.abspath(tuned_on), *(["--allow-same-stream"] * same_stream)) if tuned_on else ()
    plan: list[Planned] = []
    for seed in [None] if seeds is None else seeds:
        for method in methods:
            others = tuple(f"methods.{name}." for given, name in of_files.items() if given != method)
            own = tuple(text for text in sets if not text.startswith(others))
            resolved = resolve(preset, method, own, seed=seed, tuned=tuned[method])
            name = f"{resolved.method}-seed{resolved.general.seed}"
            if any(planned.out.name == name for planned in plan):
                raise UserError(f"--methods names {resolved.method!r} twice; give it once")
            label = f"{resolved.method} seed {resolved.general.seed}"
            folder = out / name
            remote = "" if url is None else f"{url.rstrip('/')}/{folder.name}"
            more = options if tuned[method] else ()
            plan.append(Planned(resolved, preset, own, folder, label, remote, more))
    return plan


def default_methods(preset: str) -> list[str]:
    """The preset's own list (`compare:`); UserError when it has none."""
    methods = list(load_preset(preset).compare)
    if not methods:
        raise UserError(f"preset {preset} has no default methods; give --methods a,b,c (see `dualcl list methods`)")
    return methods


def finished(planned: Planned) -> str | None:
    """None unless the directory holds a finished record of this configuration; else what could not be checked of it.

    Raises UserError when it holds a damaged record, one of another configuration, or one of other data.
    """
    path = planned.out / "record.json"
    if not path.is_file():
        return None
    record = load_record(path)
    mend = "choose another --out or remove that folder"
    check_plugins(record.data["run"], planned.resolved.plugins, f"the run in {planned.out}", mend)
    moved_keys(record.data, planned.resolved, planned.out, mend)
    if not record.finished:
        return None
    why, doubtful = look(record.data, located(planned.resolved, planned.out, record.data), planned.out)
    return None if doubtful else why


class Engine(Protocol):
    """Does runs, resumes those that were begun, and says how each ended."""

    def do(self, plan: Sequence[Planned]) -> list[Outcome]:
        """One outcome per run, in the order of the plan; a run that fails does not stop the others.

        KeyboardInterrupt stops all of them, resumable.
        """


@dataclass(frozen=True)
class Needs:
    """What a run asks of a scheduler; memory None: nothing said."""

    cpus: int
    gpus: float
    memory_gib: float | None


def needs(planned: Planned, *, cuda: bool) -> Needs:
    """The declared resources of a run, completed; `cuda`: whether device=auto finds a GPU where it will run."""
    general, asked = planned.resolved.general, planned.resolved.resources
    on_gpu = general.device.startswith("cuda") or (general.device == "auto" and cuda)
    gpus = float(on_gpu) if asked.gpus is None else asked.gpus
    return Needs(asked.cpus or general.threads or 1, gpus, asked.memory_gib)


def outcome_of(planned: Planned, code: int, last: str) -> Outcome:
    """How a child process's end reads: its exit code (negative: a signal) and the last line of its stderr."""
    if code == 0:
        return Outcome(planned, 0)
    if code < 0:
        why = " (out of memory?)" if code == -9 else ""
        return Outcome(planned, EXIT_FAILED, f"killed by signal {-code}{why}; the same command resumes")
    text = last.removeprefix("dualcl: error: ").removeprefix("dualcl: run failed: ").removeprefix("dualcl: ")
    return Outcome(planned, EXIT_USER if code == EXIT_USER else EXIT_FAILED, printable(text))
