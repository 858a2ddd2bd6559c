"""What a comparison will take, said before it starts: runs, time and disk, as far as finished records tell."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dualcl.results
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.settings import Resolved, flatten
from dualcl.benchmark.core.text import duration
from dualcl.benchmark.grids.plan import Planned
from dualcl.benchmark.grids.survey import read_state
from dualcl.methods import method_class
from dualcl.results.records import Record, load_record

RECORDED = Path(dualcl.results.__file__).parent / "recorded"
#: what leaves time and disk as they are, beside rates and other factors of methods
_NO_WORK = {"preset", "method_name", "seed", "label", "stream.order_seed"}
#: (seconds, bytes of its checkpoint) of a finished run
Taken = tuple[float, float]


def forecast(plan: Sequence[Planned], waiting: Sequence[Planned], jobs: int = 1) -> list[str]:
    """Two lines: runs and time; disk of the checkpoints that stay. What no record tells is said not to be known."""
    states = {p.out: read_state(p.out) for p in waiting}
    known: dict[str, Taken | None] = {}
    for p in waiting:
        if p.resolved.method not in known:
            known[p.resolved.method] = _taken(p)
    seconds = [(1 - states[p.out].done) * found[0] for p in waiting if (found := known[p.resolved.method])]
    told = f"{_count(len(plan), 'run')}, {len(plan) - len(waiting)} finished already"
    if not waiting:
        return [told]
    unknown = [name for name, found in known.items() if found is None]
    if seconds:
        jobs = min(jobs, len(waiting))
        least = max(sum(seconds) / jobs, *seconds) if len(seconds) > 1 else seconds[0]
        told += f"; about {duration(least)}" + f" for {len(seconds)} of the others" * bool(unknown)
        told += f", {jobs} at once" if jobs > 1 else ", one after another" * (len(seconds) > 1)
        told += ", as finished runs with such settings took"
    if unknown:
        told += f"; how long {', '.join(unknown)} will take is not known: no finished run with such settings"
    held = sum(found[1] for p in waiting if (found := known[p.resolved.method]))
    disk = [f"about {_size(held)} of checkpoints"] if seconds else []
    for name in unknown:
        if least_kept := 4 * sum(_least_kept(p) for p in waiting if p.resolved.method == name):
            disk.append(f"at least {_size(least_kept)} of {name}")
    if rest := [name for name in unknown if not any(d.endswith(f" of {name}") for d in disk)]:
        disk.append(f"not known of {', '.join(rest)}")
    return [told, "disk: " + ", ".join(disk)]


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def _size(n: float) -> str:
    mib = n / 2**20
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.1f} MiB" if mib < 10 else f"{mib:.0f} MiB"


def _least_kept(planned: Planned) -> int:
    return method_class(planned.resolved.method_reference).least_kept(planned.resolved.sections["method"])


def _taken(planned: Planned) -> Taken | None:
    """Means over finished runs of the method with such settings beside this one, else over recorded ones."""
    for places in (planned.out.parent.glob("*"), RECORDED.glob("*/records/*")):
        found = [_of(record) for record in _records(places, planned.resolved)]
        if found:
            return statistics.fmean(f[0] for f in found), statistics.fmean(f[1] for f in found)
    return None


def _records(places: Iterator[Path], resolved: Resolved) -> Iterator[Record]:
    for place in places:
        if resolved.method not in place.name or not (place / "record.json").is_file():
            continue
        try:
            record = load_record(place / "record.json")
        except (OSError, UserError):  # what is damaged tells nothing
            continue
        run = record.data["run"]
        if record.finished and run["method"] == resolved.method and _same_work(record.data["config"], resolved):
            yield record


def _same_work(config: Mapping[str, Any], resolved: Resolved) -> bool:
    """Whether the configuration of a record asks for as much work; a method's fractions are its rates and factors."""
    ours, theirs = resolved.flat(volatile=False), resolved.telling(flatten(config))
    for key in ours.keys() & theirs.keys() - _NO_WORK:
        one, two = ours[key], theirs[key]
        factor = key.startswith("method.") and float in (type(one), type(two))
        if not factor and one != two:
            return False
    return str(theirs.get("preset")) == resolved.preset


def _of(record: Record) -> Taken:
    """Its checkpoint where it is still there, else 4 bytes for each number stored."""
    data = record.data
    files = [f.stat().st_size for f in (record.directory / "checkpoints").rglob("*") if f.is_file()]
    stored = data["tasks"][-1]["parameters_stored"] if data["tasks"] else 0
    return float(data["measured"]["wall_seconds"]), float(sum(files) or 4 * stored)
