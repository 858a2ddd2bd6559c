"""Records as data: tidy pandas frames with typed, documented columns, and the same as Parquet files.

`load("runs")` has a row per run, `load("runs", "cells")` one per entry of a matrix, "tasks" one per task learnt, "log"
one per logged step; `path` joins them. pandas and pyarrow are imported when they are asked for.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dualcl.benchmark.core.errors import UserError
from dualcl.results.late import late
from dualcl.results.metrics import KINDS, METRICS
from dualcl.results.record_type import FIELDS
from dualcl.results.records import Record, find_records, run_row, scan_records
from dualcl.results.tables import streams

if TYPE_CHECKING:
    import pandas as pd

#: of the columns: goes up when one is renamed, removed or changes its meaning, not when one is added
VERSION = 1

#: pandas dtype of every kind of column; a value that is missing, or of another type, is NA
DTYPES = {"text": "string", "integer": "Int64", "number": "float64", "flag": "boolean", "time": "datetime64[us, UTC]"}


Kind = Literal["text", "integer", "number", "flag", "time"]


@dataclass(frozen=True)
class Column:
    """A column of a frame."""

    name: str
    kind: Kind
    #: what it holds, with its unit
    what: str


_RUN = (
    Column("path", "text", "the run's folder; the key that joins the frames"),
    Column("preset", "text", "the preset, and so the stream"),
    Column("table", "text", "the preset in whose table the run appears"),
    Column("domain", "text", "classification or customization"),
    Column("method", "text", "the registered method"),
    Column("label", "text", "what tables call the row: the method, with the settings that a sweep varies"),
    Column("seed", "integer", "of initialisation, batch order and augmentation"),
)

_FIELDS = {field.name: field for field in FIELDS}
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("name", "text", "texts", "scalar"), "text"),
    **dict.fromkeys(("integer", "count", "size"), "integer"),
    **dict.fromkeys(("number", "seconds"), "number"),
    "flag": "flag",
}


def _recorded(place: str, names: str) -> list[Column]:
    """Columns of what is in a record at a place."""
    fields = [(name, _FIELDS[f"{place}.{name}" if place else name]) for name in names.split()]
    return [Column(name, _KINDS[field.kind], field.about) for name, field in fields]


RUNS = (
    *_RUN,
    *_recorded("run", "joint caveats n_tasks"),
    *_recorded("", "status error"),
    *(Column(m.key, "number", f"{m.definition} [{m.unit}]") for m in METRICS.values()),
    *_recorded("network", "parameters"),
    *_recorded("identity", "data split_name split_hash backbone weights weights_sha256"),
    *_recorded("identity", "features features_sha256 kernel estimator"),
    Column("steps", "integer", "optimiser steps per concept"),
    Column("eval_n", "integer", "images generated per concept"),
    Column("eval_steps", "integer", "denoising steps"),
    Column("eval_scheduler", "text", "sampler"),
    Column("eval_guidance", "number", "guidance scale"),
    Column("eval_prompt", "text", "template of the prompts"),
    Column("eval_negative_prompt", "text", "negative prompt"),
    Column("eval_prompts_hash", "text", "of all prompts"),
    *_recorded("", "config_hash"),
    *_recorded("environment", "dualcl commit dirty torch device"),
    Column("finished", "time", "when the run ended"),
)

CELLS = (
    *_RUN,
    Column("after_task", "integer", "the task learnt last, from 0"),
    Column("task", "integer", "the task tested, from 0"),
    Column("value", "number", "accuracy in percent, or MMD to the real images x 10^3"),
    *(Column(field.name, _KINDS[field.kind], field.what) for kind in KINDS.values() for field in kind.by_name.values()),
)

TASKS = (
    *_RUN,
    Column("task", "integer", "from 0; missing where all were learnt at once"),
    *_recorded("tasks[]", "name n_train n_test steps final_loss parameters_trained parameters_stored"),
    *_recorded("measured.tasks[]", "train_seconds begin_seconds end_seconds eval_seconds peak_mib"),
)

LOG = (
    *_RUN,
    Column("task", "integer", "from 0"),
    Column("step", "integer", "optimiser step of the task, from 0"),
    Column("epoch", "integer", "of the task, from 0"),
    Column("loss", "number", "task loss and penalty"),
    Column("penalty", "number", "in the loss"),
    Column("lr_factor", "number", "on every learning rate"),
)


_COSTS = ("train_seconds", "begin_seconds", "end_seconds", "eval_seconds", "peak_mib")


def _key(record: Record) -> dict[str, Any]:
    run = record.data["run"]
    return {
        **{name: run[name] for name in ("preset", "domain", "method", "label", "seed")},
        "table": record.table,
        "path": str(record.directory),
    }


def _cells(record: Record) -> Iterator[dict[str, Any]]:
    key, values = _key(record), record.cells()
    for row in record.data["matrix"]["rows"]:
        after = row["after_task"]
        shown = values[after] or [None] * (after + 1)
        for task in range(after + 1):
            fields = {n: row[n][task] if row.get(n) else None for n in record.kind.row_fields}
            if any(value is not None for value in fields.values()):
                yield {**key, "after_task": after, "task": task, "value": shown[task], **fields}


def _tasks(record: Record) -> Iterator[dict[str, Any]]:
    costs = record.data["measured"].get("tasks") or []
    for number, task in enumerate(record.data["tasks"]):
        cost = costs[number] if number < len(costs) else {}
        yield {**_key(record), **task, **{name: cost.get(name) for name in _COSTS}}


def _log(record: Record) -> Iterator[dict[str, Any]]:
    key = _key(record)
    for line in record.log():
        yield {**key, **line}


def _runs(record: Record) -> Iterator[dict[str, Any]]:
    yield run_row(record)


#: name -> columns, and what makes the rows of one record
FRAMES: dict[str, tuple[tuple[Column, ...], Callable[[Record], Iterator[dict[str, Any]]]]] = {
    "runs": (RUNS, _runs),
    "cells": (CELLS, _cells),
    "tasks": (TASKS, _tasks),
    "log": (LOG, _log),
}


def load(
    dirs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], what: str = "runs", *, strict: bool = True
) -> pd.DataFrame:
    """The runs below `dirs` (a folder, or several) as a tidy frame: "runs", "cells", "tasks" or "log".

    Columns and their types are those of `FRAMES`, whatever the records hold. Raises UserError for a folder that is not
    there and for a record that cannot be read; with `strict=False` that one is left out, with a warning.
    """
    places = [dirs] if isinstance(dirs, (str, os.PathLike)) else [*dirs]
    records, problems = scan_records(places)
    if problems and strict:
        raise UserError(problems[0])
    for problem in problems:
        warnings.warn(f"left out: {problem}", stacklevel=2)
    found: pd.DataFrame = late("writers.parquet").frame_of([r for stream in streams(records) for r in stream], what)
    return found


def need_parquet() -> None:
    """UserError unless pyarrow is there."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError('Parquet needs pyarrow: pip install "dualcl[parquet]"')


def frame(dirs: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """One row per run below `dirs` as it is, with every measure; see `load` for columns that are always there."""
    found: pd.DataFrame = late("writers.parquet").pd.DataFrame([run_row(record) for record in find_records(dirs)])
    return found
