"""Published reference numbers, kept apart from ours: read from the CSV files here, each cell with its source.

README.md in this folder says how to read them and holds them rendered.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.results.records import Record

FOLDER = Path(__file__).parent
#: benchmark -> its number of classes, concepts or requests, 0 where not seen, in the order shown
BENCHMARKS = {
    "imagenet-r": 200,
    "cifar100": 100,
    "domainnet": 345,
    "domainnet-domains": 345,
    "cifc": 10,
    "merged-faces": 3,
    "t2i-conbench-items": 4,
    "conceptguard": 0,
    "unlearncanvas-objects": 12,
    "unlearncanvas-styles": 12,
}
#: benchmarks whose classes all have as many test images: averages over tasks and over images agree
EQUAL_TEST_SETS = frozenset({"cifar100"})
#: of them, what the tasks are called in customization
CONCEPTS = {"customization": "concepts", "unlearning": "requests"}
SCENARIOS = ("class-incremental", "domain-incremental", *CONCEPTS)
SEEN = {
    "P": "in the paper's own text or table, or in the authors' own repository",
    "S": "in a secondary transcription: notes, a machine extraction, a later paper or repository that quotes it",
    "D": "derived: by arithmetic, or read off a plot",
}
#: how weights read whose name in a source says less: the two stages of training, or the self-supervised method
WEIGHTS = {
    "in21k_ft_in1k": "ImageNet-21k, then fine-tuned on ImageNet-1k",
    "in21k": "ImageNet-21k, not fine-tuned",
    "dino": "DINO on ImageNet-1k",
    "ibot": "iBOT on ImageNet-1k",
}


@dataclass(frozen=True)
class Number:
    """One published cell; "" and None where the source was not seen to say it."""

    benchmark: str
    tasks: int | None
    classes_per_task: int | None
    scenario: str
    method: str
    #: our registered method of that name, "" without one
    dualcl_method: str
    #: configuration of our method that the row stands for, dotted keys below `method.`
    settings: dict[str, str]
    metric: str
    metric_definition: str
    #: as printed, with the source's decimals
    value: str
    std: str
    runs: int | None
    weights: str
    weights_reading: str
    protocol: str
    source: str
    seen: str
    seen_words: str
    note: str

    @property
    def text(self) -> str:
        """Value and standard deviation as printed."""
        return f"{self.value} ± {self.std}" if self.std else self.value


@dataclass(frozen=True)
class Protocol:
    """How a source trained and tested on one benchmark, as far as seen; "" and None where not."""

    protocol: str
    benchmark: str
    title: str
    backbone: str
    optimizer: str
    lr: str
    #: learning rates that differ from `lr`, by our method's name
    lr_methods: dict[str, str]
    batch_size: int | None
    epochs: int | None
    schedule: str
    class_order: str
    preprocess: str
    split: str
    seen: str
    source: str
    note: str


@dataclass(frozen=True)
class Definition:
    """What a metric means under one definition, and our metric (by key) that means the same, "" without one."""

    definition: str
    applies_to: str
    what: str
    ours: str
    #: our metric where all tasks have equally many test images
    ours_equal_tasks: str


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _whole(text: str) -> int | None:
    return int(text) if text else None


def _pairs(text: str) -> dict[str, str]:
    return {key: value for key, _, value in (part.partition("=") for part in text.split(";") if part)}


@functools.lru_cache(maxsize=1)
def published_numbers() -> tuple[Number, ...]:
    """All published numbers, in the order of the files."""
    numbers = []
    for benchmark in BENCHMARKS:
        for row in _rows(benchmark):
            tasks, classes, runs = (_whole(row.pop(key)) for key in ("tasks", "classes_per_task", "runs"))
            settings = _pairs(row.pop("settings"))
            numbers.append(Number(tasks=tasks, classes_per_task=classes, runs=runs, settings=settings, **row))
    return tuple(numbers)


@functools.lru_cache(maxsize=1)
def protocols() -> dict[tuple[str, str], Protocol]:
    """All protocols by (protocol, benchmark), in the order shown."""
    found = {}
    for row in _rows("protocols"):
        batch, epochs, rates = _whole(row.pop("batch_size")), _whole(row.pop("epochs")), _pairs(row.pop("lr_methods"))
        found[row["protocol"], row["benchmark"]] = Protocol(batch_size=batch, epochs=epochs, lr_methods=rates, **row)
    return found


@functools.lru_cache(maxsize=1)
def definitions() -> dict[tuple[str, str], Definition]:
    """All definitions by (definition, metric)."""
    return {(row["definition"], row["applies_to"]): Definition(**row) for row in _rows("definitions")}


def our_metric(number: Number) -> str:
    """Key of our metric with the same definition, "" when there is none or the definition was not seen."""
    definition = definitions()[number.metric_definition, number.metric]
    return definition.ours_equal_tasks if number.benchmark in EQUAL_TEST_SETS else definition.ours


def stream_name(benchmark: str, tasks: int | None) -> str:
    """What a published stream is called: `imagenet-r-10`; without the number where it was not seen."""
    return benchmark if tasks is None else f"{benchmark}-{tasks}"


def streams() -> dict[str, list[Number]]:
    """Numbers by stream (see `stream_name`): benchmarks in order, then few tasks before many, unknown ones last."""
    order = list(BENCHMARKS)
    places = {(n.benchmark, n.tasks) for n in published_numbers()}
    ordered = sorted(places, key=lambda p: (order.index(p[0]), p[1] is None, p[1] or 0))
    found: dict[str, list[Number]] = {stream_name(*place): [] for place in ordered}
    for number in published_numbers():
        found[stream_name(number.benchmark, number.tasks)].append(number)
    return found


def stream(name: str) -> list[Number]:
    """The numbers of one stream; UserError when it has none."""
    known = streams()
    if name not in known:
        raise UserError(f"no published numbers for {name!r}; {nearest(name, known, 'streams')}")
    return known[name]


def numbers_for(data: str, tasks: int) -> list[Number]:
    """Published class-incremental numbers on a data set in that many tasks; [] without any."""
    return [n for n in published_numbers() if (n.benchmark, n.tasks, n.scenario) == (data, tasks, "class-incremental")]


def numbers_beside(record: Record) -> list[Number]:
    """Published numbers of a run's stream; [] for tasks of sizes that were asked for."""
    identity = record.data["identity"]
    return [] if identity.get("task_sizes") else numbers_for(str(identity.get("data")), record.n_tasks)


@dataclass(frozen=True)
class Group:
    """Numbers that one source reports under one protocol: what may stand in one small table."""

    protocol: Protocol
    source: str
    weights: str
    weights_reading: str
    numbers: tuple[Number, ...]

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """(metric, definition) of the columns, accuracies first."""
        found = dict.fromkeys((n.metric, n.metric_definition) for n in self.numbers)
        order = list(dict.fromkeys(metric for _, metric in definitions()))
        return sorted(found, key=lambda key: order.index(key[0]))

    @property
    def methods(self) -> list[str]:
        """Methods in the source's order."""
        return list(dict.fromkeys(n.method for n in self.numbers))


def groups(numbers: Iterable[Number]) -> list[Group]:
    """The numbers of one stream by protocol, source and weights, in the order of protocols.csv; never by value."""
    found: dict[tuple[str, str, str, str], list[Number]] = {}
    for n in numbers:
        found.setdefault((n.protocol, n.source, n.weights, n.benchmark), []).append(n)
    order = list(protocols())
    keys = sorted(found, key=lambda key: order.index((key[0], key[3])))  # stable: files' order within a protocol
    return [
        Group(protocols()[key[0], key[3]], key[1], key[2], found[key][0].weights_reading, tuple(found[key]))
        for key in keys
    ]


def backbone_weights(backbone: str) -> str:
    """The key of WEIGHTS that a timm name with its tag means, "" when the tag says none of them."""
    tag = backbone.partition(".")[2]
    for key, pattern in {"in21k_ft_in1k": r"in21k_ft_in1k$", "in21k": r"in21k$", "dino": r"dino$"}.items():
        if re.search(pattern, tag):
            return key
    return ""
