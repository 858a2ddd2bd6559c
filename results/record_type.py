"""What a record is made of: its fields, the kinds of matrix with the measures computed from them, and its versions.

A record is read for ever. The required fields of a released version never grow: what comes later is optional, and reads
as None where a record lacks it. VERSION rises only when something changes its meaning, with a step in MIGRATIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from typing import Any, Literal

from dualcl.benchmark.core.reading import CONTROL

FORMAT = "dualcl-record"
VERSION = 1
STATUSES = ("running", "finished", "failed", "interrupted")

#: older version -> the function that turns such a record into one of the next version
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

#: beyond any count, size or time of a run; sums of so many stay finite
LARGEST = 1e15
MOST_TASKS = 100_000

BETTER = ("higher", "lower")

#: a matrix to be drawn: row i holds tasks 0..i, None where not evaluated; None for a missing row
Grid = Sequence["Sequence[float | None] | None"]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= LARGEST


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, int, float))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _name(value: Any) -> bool:
    """Text that can stand in a table and in a terminal."""
    return isinstance(value, str) and not CONTROL.search(value)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


#: kind of value -> whether readers can work with one (None is asked for nowhere), and its JSON Schema
_KINDS: dict[str, tuple[Callable[[Any], bool], dict[str, Any]]] = {
    "number": (_number, {"type": "number"}),
    "integer": (_number, {"type": "integer"}),
    "count": (_number, {"type": "integer", "minimum": 0}),
    "size": (_number, {"type": "integer", "minimum": 1}),
    "seconds": (lambda value: _number(value) and value >= 0, {"type": "number", "minimum": 0}),
    "flag": (_scalar, {"type": "boolean"}),
    "scalar": (_scalar, {"type": ["string", "number", "boolean"]}),
    "text": (_text, {"type": "string"}),
    "name": (_name, {"type": "string"}),
    "list": (_list, {"type": "array"}),
    "texts": (_list, {"type": "array", "items": {"type": "string"}}),
    "mapping": (_mapping, {"type": "object"}),
    "scalars": (lambda value: _mapping(value) and all(map(_scalar, value.values())), {"type": "object"}),
    "words": (_mapping, {"type": "object", "additionalProperties": {"type": "string"}}),
}


@dataclass(frozen=True)
class Field:
    """A value in a record; of a matrix, a list in each of its rows with an entry for each of the tasks so far."""

    #: where it is: `run.seed`; `[]` stands for every entry of a list, `{}` for every value of a mapping
    name: str
    kind: str
    #: what it holds
    what: str
    unit: str = ""
    required: bool = True
    #: the version of a record that has it first
    since: int = VERSION
    nullable: bool = False
    #: the only values, where there are few
    choices: tuple[str, ...] = ()

    def fits(self, value: Any) -> bool:
        """Whether readers can work with the value."""
        return value is None or _KINDS[self.kind][0](value)

    @property
    def about(self) -> str:
        """What it holds, with its unit."""
        return self.what + f" [{self.unit}]" * bool(self.unit)

    def schema(self, *, of_cells: bool = False) -> dict[str, Any]:
        """Its JSON Schema; `of_cells`: of the entries of a list in a row."""
        found: dict[str, Any] = {"enum": [*self.choices]} if self.choices else {**_KINDS[self.kind][1]}
        if self.nullable:
            types = found["type"] if isinstance(found["type"], list) else [found["type"]]
            found["type"] = [*types, "null"]
        return {**found, "description": self.about} if self.about and not of_cells else found


def optional_field(name: str) -> Field:
    """A list of a row that is known by its name alone."""
    return Field(name, "number", "", required=False, nullable=True)


def _optional(place: str, of_kind: str, /, **about: str) -> list[Field]:
    return [Field(f"{place}.{name}", of_kind, what, required=False, nullable=True) for name, what in about.items()]


def _source(place: str, of: str) -> list[Field]:
    return [
        Field(place, "mapping", f"where the {of} comes from, if it is not built in", required=False),
        *_optional(
            place, "name", kind="file or package", file="its name", package="its name", version="of the package",
            sha256="of the text of the file that registers it",
        ),
    ]  # fmt: skip


#: everything but the rows of the matrix, whose fields are those of its kind
FIELDS = (
    Field("status", "name", "running, finished, failed or interrupted", choices=STATUSES),
    Field("error", "text", "why it failed", nullable=True),
    Field("sha256", "text", "of the rest, as json.dumps(record, sort_keys=True); not in the first", required=False),
    Field("run", "mapping", "what was run"),
    Field("run.preset", "name", "the preset, and so the stream"),
    Field("run.domain", "name", "", choices=("classification", "customization")),
    Field("run.method", "name", "the registered method"),
    Field("run.label", "name", "what tables call it"),
    Field("run.seed", "count", "of initialisation, batch order and augmentation"),
    Field("run.n_tasks", "size", "tasks (concepts) of the stream"),
    Field("run.joint", "flag", "saw all tasks at once: an upper bound"),
    Field("run.table", "name", "the preset in whose table it appears; missing in the first records", required=False),
    Field("run.caveats", "texts", "what a reader of the numbers must know", required=False),
    Field("run.tuning", "text", "who tuned the method's values", required=False),
    Field("run.tuned_on", "name", "the preset on which a sweep chose them, if it is another", required=False),
    Field("run.extends", "mapping", "the run whose exported model it goes on from", required=False),
    *_optional("run.extends", "scalar", preset="its preset", method="its method", label="its label", seed="its seed"),
    *_optional("run.extends", "scalar", config_hash="of its record", weights_sha256="of the exported model"),
    *_source("run.method_source", "method"),
    *_source("run.data_source", "data set"),
    Field("config", "mapping", "the resolved configuration, as `dualcl show` prints it"),
    Field("config_hash", "text", "of every setting that can change a result"),
    Field("sources", "words", "where each setting came from, by dotted key"),
    Field("identity", "mapping", "what must agree between runs that share a table: data, split, weights, budget, ..."),
    *_optional("identity", "scalar", data="the data set", split_name="of training and test data"),
    *_optional("identity", "scalar", split_hash="of the split's file names or indices"),
    *_optional("identity", "scalar", backbone="the pretrained model", weights="where its weights came from"),
    *_optional("identity", "scalar", weights_sha256="of its weights"),
    *_optional("identity", "scalar", features="the model whose features measure generated images"),
    *_optional("identity", "scalar", features_sha256="of that model's weights"),
    *_optional("identity", "scalar", kernel="of the MMD", estimator="of the MMD"),
    *_optional("identity", "list", class_order="classes or concepts in the order learnt"),
    *_optional("identity", "list", task_sizes="classes of each task, where they are not as equal as can be"),
    *_optional("identity", "scalars", eval="how images are generated that are measured"),
    Field("content", "words", "hashes of what the run read from files; not in older records", required=False),
    *_optional("content", "name", data="pictures and their names", words="names of classes; nouns and prompts"),
    *_optional("content", "name", weights="the file of weights", base="the model's directory", features="that of CLIP"),
    *_optional("content", "name", settings="what the small files of the model's directory say"),
    Field("network", "mapping", "the adapted network"),
    Field("network.parameters", "size", "of the adapted network"),
    Field("network.skipped_images", "texts", "unreadable images that were left out", required=False),
    Field("network.prepared_as", "text", "who says mean, std and interpolation of its input", required=False),
    Field("network.half_precision_files", "texts", "parts of the base whose only files are in float16", required=False),
    Field("network.notes", "texts", "what the files of the data left open, and how it was taken", required=False),
    Field("network.captions", "words", "the prompt of each image that has a caption", required=False),
    Field("network.repeated_pictures", "texts", "pictures that are there more than once, by kind", required=False),
    Field("network.concepts", "list", "names of the concepts", required=False),
    Field("network.requests", "list", "what is to be unlearnt: target, anchor, kind", required=False),
    Field("network.requests[]", "mapping", "a request", required=False),
    Field("network.retained", "list", "what is measured beside requests", required=False),
    Field("network.retained[]", "mapping", "one thing: its prompts, and what a judge should see", required=False),
    *_optional("network.retained[]", "name", name="of it", side="inside or across the requests' attributes"),
    Field("network.kept", "texts", "prompts that methods may hold, none of them measured", required=False),
    Field("environment", "mapping", "versions, commit, device"),
    *_optional("environment", "scalar", dualcl="version", torch="version", device="cpu, or the GPU"),
    *_optional("environment", "scalar", commit="of the checkout that it ran from, or that its package was built from"),
    *_optional("environment", "flag", dirty="uncommitted changes in it"),
    *_optional("environment", "scalar", diff="hash of the files that these touch"),
    Field("environment.earlier", "list", "what the run was made in before it went on in this one", required=False),
    Field("environment.earlier[]", "mapping", "the same facts", required=False),
    *_optional("environment.earlier[]", "scalar", tasks="finished when it ended", step="of the next task, then"),
    Field("environment.places", "words", "absolute paths of what the configuration names relatively", required=False),
    Field("tasks", "list", "one entry per task learnt, in order; one in all for joint training"),
    Field("tasks[]", "mapping", "a task"),
    Field("tasks[].task", "integer", "from 0; null: all at once", nullable=True),
    Field("tasks[].name", "text", "of the task"),
    Field("tasks[].classes", "texts", "its classes", required=False),
    Field("tasks[].concept", "text", "its concept", required=False),
    Field("tasks[].noun", "text", "the concept's class noun", required=False),
    Field("tasks[].n_train", "integer", "training images", required=False),
    Field("tasks[].n_test", "integer", "test images", required=False),
    Field("tasks[].steps", "count", "optimiser steps"),
    Field("tasks[].final_loss", "number", "mean loss of the last epoch; null without steps", nullable=True),
    Field("tasks[].parameters_trained", "count", "trained for this task"),
    Field("tasks[].parameters_stored", "count", "stored after it"),
    Field("tasks[].diagnostics", "mapping", "the method's own numbers"),
    Field("matrix", "mapping", "results, in the order of training"),
    Field("matrix.rows", "list", ""),
    Field("matrix.measures", "mapping", "measures of a plug-in, by the field of the rows", required=False),
    Field("matrix.measures{}", "mapping", "one of them"),
    Field("matrix.measures{}.unit", "name", "its unit"),
    Field("matrix.measures{}.better", "name", "", choices=BETTER),
    Field("matrix.measures{}.definition", "text", "what it is", required=False),
    Field("measured", "mapping", "what differs when the very same run is repeated"),
    Field("measured.tasks", "list", ""),
    Field("measured.tasks[]", "mapping", "a task, as in `tasks`"),
    Field("measured.tasks[].task", "integer", "from 0", nullable=True),
    Field("measured.tasks[].train_seconds", "number", "of training", "s"),
    Field("measured.tasks[].begin_seconds", "seconds", "part of it: before the first step", "s", required=False),
    Field("measured.tasks[].end_seconds", "seconds", "part of it: after the last step", "s", required=False),
    Field("measured.tasks[].eval_seconds", "number", "of evaluating all tasks so far", "s"),
    Field("measured.tasks[].peak_mib", "number", "peak memory", "MiB", nullable=True),
    Field("measured.wall_seconds", "number", "of all tasks", "s"),
    Field("created", "text", "when the run began, ISO 8601, UTC"),
    Field("finished", "text", "when it ended", nullable=True),
)


def _by_parent() -> dict[str, list[tuple[str, Field]]]:
    out: dict[str, list[tuple[str, Field]]] = {}
    for field in FIELDS:
        if not field.name.endswith(("[]", "{}")):
            parent, _, key = field.name.rpartition(".")
            out.setdefault(parent, []).append((key, field))
    return out


_BY_PARENT = _by_parent()


def _entries(data: Any, parts: Sequence[str]) -> Iterator[Any]:
    """The mappings at a place, and what is there in their stead as entry of a list or value of a mapping."""
    for i, part in enumerate(parts):
        data = data.get(part[:-2] if part.endswith(("[]", "{}")) else part)
        if part.endswith(("[]", "{}")):
            every = data.values() if isinstance(data, dict) and part.endswith("{}") else data
            for entry in every if every is not None else ():
                if i + 1 == len(parts) or not isinstance(entry, dict):
                    yield entry
                else:
                    yield from _entries(entry, parts[i + 1 :])
            return
        if not isinstance(data, dict):  # said by its own field, unless it is not there
            return
    yield data


def problem(data: Mapping[str, Any]) -> str | None:
    """The first thing in a record that readers cannot work with, in a few words; None when all is in order."""
    for parent, fields in _BY_PARENT.items():
        for place in _entries(data, parent.split(".") if parent else ()):
            if not isinstance(place, dict):
                return f"{parent} is {str(place)[:60]!r}"
            for key, field in fields:
                if not field.fits(value := place.get(key)):
                    return f"{field.name} is {str(value)[:60]!r}"
    if data["run"]["n_tasks"] > MOST_TASKS:
        return f"run.n_tasks is {data['run']['n_tasks']}"
    for name, about in (data["matrix"].get("measures") or {}).items():
        if not _name(name) or about.get("unit") is None or about.get("better") not in BETTER:
            return f"matrix.measures.{name[:60]!r} has no unit, or its better is none of {', '.join(BETTER)}"
    for row in data["matrix"]["rows"]:
        for name, values in row.items():
            if isinstance(values, list) and not all(value is None or _number(value) for value in values):
                return f"{name} in a row of the matrix is no list of numbers of a run"
    return None


# --- measures and kinds of matrix -------------------------------------------------------------------------------------


def whole(values: Sequence[float | None]) -> list[float] | None:
    """The values when there are some and none is missing."""
    known = [value for value in values if value is not None]
    return known if known and len(known) == len(values) else None


def last_mean(rows: Mapping[int, Mapping[str, Any]], n_tasks: int, field: str) -> float | None:
    """Mean of a field over all tasks after the last one (`after_task` -> row); None unless all are there."""
    values = whole(rows.get(n_tasks - 1, {}).get(field) or ())
    return fsum(values) / len(values) if values else None


class Results:
    """What the measures of a run are computed from: its record, and its matrix with every field of its kind."""

    def __init__(self, record: Mapping[str, Any], kind: MatrixKind | None = None) -> None:
        self.record = record
        self.kind = kind

    @property
    def matrix(self) -> Mapping[str, Any]:
        """As recorded."""
        found: Mapping[str, Any] = self.record["matrix"]
        return found

    @property
    def n_tasks(self) -> int:
        """Of the stream."""
        return int(self.record["run"]["n_tasks"])

    @cached_property
    def rows(self) -> dict[int, Mapping[str, Any]]:
        """`after_task` -> row; None in every cell of a field that the row lacks."""
        names = self.kind.row_fields if self.kind else ()
        declared = self.matrix.get("measures") or {}
        # what a plug-in measured in its own way is not what the kind's measure means
        other = {name for name, about in declared.items() if self.kind and not self.kind.knows(name, about)}
        out = {}
        for row in self.matrix["rows"]:
            missing = [name for name in names if row.get(name) is None or name in other]
            none = [None] * (row["after_task"] + 1)
            out[row["after_task"]] = {**row, **dict.fromkeys(missing, none)} if missing else row
        return out

    @cached_property
    def cells(self) -> Any:
        """The matrix in the unit of its kind."""
        return self.kind and self.kind.cells(self.matrix, self.n_tasks)


@dataclass(frozen=True)
class Measure:
    """A number of a run: how it is computed and shown, and the field that it alone reads.

    This is all that a new measure needs, in `metrics.KINDS`; of a released kind of matrix, its field is optional.
    """

    key: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    #: what the report prints of it
    definition: str
    #: None: the mean of its field over all tasks after the last one
    compute: Callable[[Results], float | None] | None = None
    field: Field | None = None
    #: "": the title
    latex: str = ""
    decimals: int = 2
    #: a count, equal in every seed unless something is odd: no "± 0"
    exact: bool = False
    #: in the table, not only below it
    column: bool = True
    #: a measure that it often equals: a column of its own only in tables where it does not
    beside: str = ""
    #: differences between methods are tested
    compared: bool = False
    #: undefined in every run of some tables, which then have no column of it
    may_lack: bool = False

    @property
    def higher_is_better(self) -> bool:
        """Its direction."""
        return self.better == "higher"

    @property
    def optional(self) -> bool:
        """Whether there may be records without it."""
        return self.may_lack or (self.field is not None and not self.field.required)

    def value(self, results: Results) -> float | None:
        """The number of a run; None where undefined, or not measured."""
        if self.compute is not None:
            return self.compute(results)
        return last_mean(results.rows, results.n_tasks, self.field.name) if self.field else None


@dataclass(frozen=True)
class Curve:
    """A quantity that is followed over the tasks: the mean of a row of its cells after every task."""

    heading: str
    #: of the axis
    title: str
    cells: Callable[[Mapping[str, Any], int], Grid]
    #: the measure that the last point is, where joint training has one to draw as a line
    metric: str


@dataclass(frozen=True)
class MatrixKind:
    """A kind of recorded matrix: what its rows hold, its measures, and what it offers to tables and plots."""

    #: heading of its part of the report
    heading: str
    #: what a row and a column of the matrix stands for
    item: str
    #: the symbols in the definitions of its measures
    notation: str
    #: lists that several measures read; for one measure alone, `Measure.field`
    fields: tuple[Field, ...]
    measures: tuple[Measure, ...]
    #: the two measures of the trade-off plots
    quality: str
    forgetting: str
    #: what a cell of the matrix is, for axis labels
    cell_title: str
    #: None: as far as the values go
    cell_range: tuple[float, float] | None
    #: followed over the tasks: the quality, and the forgetting where it is recorded apart
    curves: tuple[Curve, ...]
    cells: Callable[[Mapping[str, Any], int], Grid]
    #: (row, n_tasks, joint) -> what is wrong with the row, beyond its lengths and numbers
    problem: Callable[[Mapping[str, Any], int, bool], str | None] = lambda row, n_tasks, joint: None
    #: names of the lists of a row: those of the fields and measures, and any more, which are optional
    row_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = [field.name for field in self._fields()]
        object.__setattr__(self, "row_fields", tuple(dict.fromkeys([*known, *self.row_fields])))

    def _fields(self) -> list[Field]:
        return [*self.fields, *(measure.field for measure in self.measures if measure.field)]

    @cached_property
    def by_name(self) -> dict[str, Field]:
        """The fields of a row by name."""
        return {**{n: optional_field(n) for n in self.row_fields}, **{f.name: f for f in self._fields()}}

    @property
    def columns(self) -> tuple[str, ...]:
        """Measures in every table, before those of cost."""
        return tuple(measure.key for measure in self.measures if measure.column and not measure.beside)

    @property
    def compared(self) -> tuple[str, ...]:
        """Measures whose differences between methods are tested."""
        return tuple(measure.key for measure in self.measures if measure.compared)

    @property
    def higher_is_better(self) -> bool:
        """Direction of the quality, and so of the cells."""
        return next(measure for measure in self.measures if measure.key == self.quality).higher_is_better

    def compute(self, matrix: Mapping[str, Any], n_tasks: int) -> dict[str, float | None]:
        """All measures of a matrix by key."""
        results = Results({"matrix": matrix, "run": {"n_tasks": n_tasks}}, self)
        return {measure.key: measure.value(results) for measure in self.measures}

    def knows(self, name: str, about: Mapping[str, Any]) -> bool:
        """Whether the measure that a record declares for a field is this kind's own."""
        own = [m for m in self.measures if m.field and m.field.name == name]
        return any((m.unit, m.better) == (about["unit"], about["better"]) for m in own)
