"""Reading run records: record.json and log.jsonl of a run directory, never a model."""

from __future__ import annotations

import concurrent.futures
import copy
import hashlib
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import json_text
from dualcl.benchmark.core.machine import usable_cpus
from dualcl.benchmark.core.reading import read_json
from dualcl.results import record_type
from dualcl.results.metrics import KINDS, run_metrics
from dualcl.results.record_type import FORMAT, MIGRATIONS, STATUSES, VERSION, Grid, MatrixKind

FILE_NAME = "record.json"

#: parts of a record that differ when the very same run is repeated
VOLATILE = ("measured", "environment", "created", "finished", "sha256")

#: records that one process reads at a time
_PART = 500

#: parts at the top of a record that are equal in many
_REPEATED = ("sources", "environment")

_TYPES: dict[str, type] = {"name": str, "count": int, "size": int, "flag": bool}
_RUN_FIELDS = {
    field.name.removeprefix("run."): _TYPES[field.kind]
    for field in record_type.FIELDS
    if field.required and field.name.startswith("run.")
}

_IDENTITY = ("data", "split_name", "split_hash", "backbone", "weights", "weights_sha256")
#: identity of what generated images are measured with (customization)
_MEASURING = ("features", "features_sha256", "kernel", "estimator", "steps")


@dataclass(frozen=True)
class Record:
    """One run: the parsed record.json and where it lies."""

    path: Path
    data: dict[str, Any]

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.path.parent

    @property
    def status(self) -> str:
        """running, finished, failed or interrupted."""
        return str(self.data["status"])

    @property
    def finished(self) -> bool:
        """Whether the run has all its results."""
        return self.status == "finished"

    @property
    def preset(self) -> str:
        """Preset, and so the data stream, of the run."""
        return str(self.data["run"]["preset"])

    @property
    def table(self) -> str:
        """The preset in whose table the run appears: its own, or that of which it is an ablation."""
        return str(self.data["run"].get("table") or self.preset)

    @property
    def label(self) -> str:
        """What the run is called in tables: the method, an ablation's name, settings where a sweep varies them."""
        return str(self.data["run"]["label"])

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.data["run"]["seed"])

    @property
    def n_tasks(self) -> int:
        """Number of tasks in the stream."""
        return int(self.data["run"]["n_tasks"])

    @property
    def joint(self) -> bool:
        """Whether the run saw all tasks at once (an upper bound)."""
        return bool(self.data["run"]["joint"])

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader of the run's numbers must know, one sentence each; older records have none."""
        found = self.data["run"].get("caveats")
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @property
    def environments(self) -> list[Mapping[str, Any]]:
        """What the run was made in, in order: one, or more where it went on at another commit or elsewhere."""
        last = self.data.get("environment") or {}
        return [*_mappings(last.get("earlier") or ()), last]

    @property
    def dirty(self) -> bool | None:
        """Whether any part of it came from a working tree with uncommitted changes; None where that is not known."""
        known = [bool(part["dirty"]) for part in self.environments if part.get("dirty") is not None]
        return any(known) if known else None

    def made_in(self, key: str) -> list[str]:
        """What its environments say under a key, each value once, in order."""
        return list(dict.fromkeys(str(part[key]) for part in self.environments if part.get(key) is not None))

    @property
    def kind(self) -> MatrixKind:
        """The kind of the recorded matrix."""
        return KINDS[self.data["matrix"]["kind"]]

    @cached_property
    def metrics(self) -> dict[str, float | None]:
        """All metrics by key, None where undefined."""
        return run_metrics(self.data)

    def cells(self) -> Grid:
        """The matrix in the unit of its kind: row i lists tasks 0..i after task i (None: not evaluated) or is None."""
        return self.kind.cells(self.data["matrix"], self.n_tasks)

    def log(self, most: int | None = None) -> list[dict[str, Any]]:
        """Lines of log.jsonl in order of training; of a step logged twice (after a resume) the later line.

        A last line cut off by a crash is left out; a missing file is an empty log. Of a log with more than `most`
        lines, every second (third, ...) is read, at most so many.
        """
        lines: dict[tuple[int, int], dict[str, Any]] = {}
        try:
            text = (self.directory / "log.jsonl").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        found = text.splitlines()
        for line in found[:: 1 if most is None else max(1, ceil(len(found) / most))]:
            try:
                entry = json.loads(line)
                key = (-1 if entry["task"] is None else int(entry["task"]), int(entry["step"]))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
            lines[key] = entry
        return [lines[key] for key in sorted(lines)]


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a usable record ({why}); delete it and call its dualcl run again")


def _check(path: Path, data: dict[str, Any]) -> None:
    if data.get("status") not in STATUSES:
        raise _broken(path, f"status is {data.get('status')!r}")
    run, matrix = data.get("run"), data.get("matrix")
    if not isinstance(run, dict) or not isinstance(matrix, dict):
        raise _broken(path, f"{'matrix' if isinstance(run, dict) else 'run'} is missing")
    for name, wanted in _RUN_FIELDS.items():
        if not isinstance(run.get(name), wanted):
            raise _broken(path, f"run.{name} is {run.get(name)!r}")
    if run["n_tasks"] < 1:
        raise _broken(path, f"run.n_tasks is {run['n_tasks']}")
    for name, wanted in {"identity": dict, "config": dict, "network": dict, "measured": dict, "tasks": list}.items():
        if not isinstance(data.setdefault(name, wanted()), wanted):
            raise _broken(path, f"{name} is not a {wanted.__name__}")
    kind = KINDS.get(str(matrix.get("kind")))
    if kind is None:
        raise _broken(path, f"matrix.kind is {matrix.get('kind')!r}, known: {', '.join(KINDS)}")
    try:
        fields = [*kind.by_name.values(), *map(record_type.optional_field, matrix.get("measures") or ())]
        lists = [
            (row["after_task"], field, row[field.name])
            for row in matrix["rows"]
            for field in fields
            if field.required or row.get(field.name) is not None
        ]
        rows = [int(row["after_task"]) for row in matrix["rows"]]
        whole = all(len(values) == after + 1 for after, _, values in lists)
        whole = whole and all((x is None and f.nullable) or isfinite(x) for _, f, values in lists for x in values)
        whole = whole and len(set(rows)) == len(rows) and all(0 <= i < run["n_tasks"] for i in rows)
        problems = [p for row in matrix["rows"] if whole and (p := kind.problem(row, run["n_tasks"], run["joint"]))]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise _broken(path, f"a row of the matrix is damaged: {' '.join(str(error).split())}") from None
    if not whole:
        raise _broken(path, "the rows of the matrix do not fit run.n_tasks")
    if problems:
        raise _broken(path, f"in the matrix, {problems[0]}")
    if (wrong := record_type.problem(data)) is not None:
        raise _broken(path, wrong)


def record_checksum(data: Mapping[str, Any]) -> str:
    """sha256 of a record as parsed from JSON, its own `sha256` aside."""
    kept = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json_text(kept, sort_keys=True).encode()).hexdigest()


def load_record(path: str | os.PathLike[str]) -> Record:
    """The record of a run directory, or of a record.json; older versions are migrated.

    Raises UserError that names the file when it is missing, half-written, from a newer dualcl, or inconsistent.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a run directory, or a directory that holds some") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except ValueError:
        raise _broken(path, "not valid JSON, perhaps half-written") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _broken(path, f"its format is not {FORMAT}")
    version = data.get("version")
    if not isinstance(version, int):
        raise _broken(path, f"version is {version!r}")
    if version > VERSION:
        raise UserError(
            f"{path} has record version {version}, this dualcl reads up to {VERSION}; read it with a newer dualcl"
        )
    written = data.get("sha256")  # older records have none
    intact = written is None or written == record_checksum(data)
    while version < VERSION:
        if version not in MIGRATIONS:
            raise _broken(path, f"record version {version} was never released")
        data = MIGRATIONS[version](data)
        version += 1
        data["version"] = version
    _check(path, data)
    if not intact:
        raise _broken(path, "its checksum differs: it is damaged, or was changed by hand")
    data.pop("sha256", None)
    return Record(path, data)


def _mappings(values: Iterable[Any]) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)]


def _shared(data: dict[str, Any], known: dict[str, Any]) -> None:
    """Puts parts that are equal in many records (settings, names of classes, versions) in memory once."""
    for place in (data, data["config"], data["identity"], data["network"], *_mappings(data["tasks"])):
        for name, part in place.items():
            if name in _REPEATED or (place is not data and isinstance(part, (dict, list)) and name != "diagnostics"):
                place[name] = known.setdefault(json.dumps(part), part)


def scan_records(dirs: Iterable[str | os.PathLike[str]]) -> tuple[list[Record], list[str]]:
    """All records below `dirs`, in the order of their paths, and one line for each that cannot be read.

    Raises UserError for a directory that does not exist.
    """
    files: dict[str, Path] = {}
    for given in map(Path, dirs):
        if given.is_file():
            files.setdefault(os.path.realpath(given), given)
            continue
        if not given.is_dir():
            raise UserError(f"{given} does not exist; give a run directory, or a directory that holds some")
        for folder, below, names in os.walk(given):
            below.sort()
            if FILE_NAME in names:
                below.clear()  # checkpoints and samples: no runs in there
                found = Path(folder) / FILE_NAME
                files.setdefault(os.path.realpath(found), found)
    records: list[Record] = []
    problems: list[str] = []
    for some, wrong in _loaded(sorted(files.values())):
        records += some
        problems += wrong
    return records, problems


def _loaded(files: list[Path]) -> Iterator[tuple[list[Record], list[str]]]:
    """The records of `files` in parts; many are checked by several processes, as that is most of a report's time."""
    parts = [files[i : i + _PART] for i in range(0, len(files), _PART)]
    # fork alone starts a worker without importing the caller's program again, and Linux alone forks safely
    if len(parts) < 3 or sys.platform != "linux" or (cpus := usable_cpus()) == 1:
        yield from map(_load_part, parts)
        return
    with concurrent.futures.ProcessPoolExecutor(min(cpus, 8), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_load_part, parts)


def _load_part(files: list[Path]) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    problems: list[str] = []
    known: dict[str, Any] = {}
    for path in files:
        try:
            records.append(load_record(path))
        except UserError as error:
            problems.append(str(error))
        else:
            _shared(records[-1].data, known)
    return records, problems


def find_records(dirs: Iterable[str | os.PathLike[str]], *, strict: bool = True) -> list[Record]:
    """All records below `dirs` (run directories or trees of them), in the order of their paths.

    Raises UserError for a record that cannot be read; with `strict=False` such a record is left out.
    """
    records, problems = scan_records(dirs)
    if strict and problems:
        raise UserError(problems[0])
    return records


def comparable(record: Record | Mapping[str, Any]) -> dict[str, Any]:
    """The deterministic part of a record: equal for two runs of the same code, configuration and seed."""
    data = record.data if isinstance(record, Record) else record
    return copy.deepcopy({key: value for key, value in data.items() if key not in VOLATILE})


def run_row(record: Record) -> dict[str, Any]:
    """One run as flat values: what it was, how it ended, every metric, and where it comes from."""
    data, run, identity = record.data, record.data["run"], record.data["identity"]
    measuring = identity.get("eval")
    return {
        "preset": record.preset,
        "table": record.table,
        **{key: run[key] for key in ("domain", "method", "label", "joint")},
        **({"caveats": "; ".join(record.caveats)} if record.caveats else {}),
        "seed": record.seed,
        "n_tasks": record.n_tasks,
        "status": record.status,
        "error": data.get("error"),
        **record.metrics,
        "parameters": data["network"].get("parameters"),
        **{key: identity.get(key) for key in _IDENTITY},
        **{key: identity[key] for key in _MEASURING if key in identity},
        **({f"eval_{key}": value for key, value in measuring.items()} if isinstance(measuring, Mapping) else {}),
        "config_hash": data.get("config_hash"),
        **{
            key: record.dirty if key == "dirty" else ", ".join(record.made_in(key)) or None
            for key in ("dualcl", "commit", "dirty", "torch", "device")
        },
        "finished": data.get("finished"),
        "path": str(record.directory),
    }


def assignments(record: Record) -> dict[str, Any]:
    """Keys that `--set` or a sweep gave for a run, with their values: what its preset alone would not give."""
    found = {}
    for key, source in (record.data.get("sources") or {}).items():
        if not str(source).startswith(("--set", "sweep on ")):
            continue
        value: Any = record.data["config"]
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        found[key] = value
    return found


def set_words(values: Mapping[str, Any]) -> list[str]:
    """`--set key=value` for each, as words of a command."""
    pairs = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
    return [word for pair in pairs for word in ("--set", pair)]


def command(record: Record) -> str:
    """The shell command that repeats a run."""
    run = record.data["run"]
    words = ["dualcl", "run", str(run["preset"]), str(run["method"]), "--seed", str(run["seed"])]
    return shlex.join([*words, *set_words(assignments(record))])
