"""What readers rely on in a record beyond its matrix: kinds of values, and that numbers are those of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dualcl.benchmark.core.reading import CONTROL

#: beyond any count, size or time of a run; sums of so many stay finite
LARGEST = 1e15
MOST_TASKS = 100_000


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and abs(value) <= LARGEST)


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, int, float))


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _name(value: Any) -> bool:
    """Text that can stand in a table and in a terminal."""
    return value is None or (isinstance(value, str) and not CONTROL.search(value))


def _mapping(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _scalars(value: Any) -> bool:
    """A mapping of single values."""
    return value is None or (isinstance(value, dict) and all(map(_scalar, value.values())))


def _list(value: Any) -> bool:
    return value is None or isinstance(value, list)


#: place -> what is there, if anything; `[]` stands for every entry of a list
_SHAPES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("run.preset", "run.domain", "run.method", "run.label", "run.table"), _name),
    **dict.fromkeys(("run.caveats", "identity.class_order", "network.skipped_images", "network.concepts"), _list),
    **dict.fromkeys(("error", "config_hash", "created", "finished"), _text),
    **dict.fromkeys((f"environment.{key}" for key in ("dualcl", "commit", "dirty", "torch", "device")), _scalar),
    **dict.fromkeys((f"identity.{key}" for key in ("data", "split_name", "split_hash")), _scalar),
    **dict.fromkeys((f"identity.{key}" for key in ("backbone", "weights", "weights_sha256")), _scalar),
    **dict.fromkeys((f"identity.{key}" for key in ("features", "features_sha256", "kernel", "estimator")), _scalar),
    "identity.eval": _scalars,
    "environment": _mapping,
    "sources": _mapping,
    "measured.tasks": _list,
    "measured.tasks[]": _mapping,
    "tasks[]": _mapping,
    "tasks[].diagnostics": _mapping,
    **dict.fromkeys(("network.parameters", "measured.wall_seconds"), _number),
    **dict.fromkeys((f"measured.tasks[].{key}" for key in ("train_seconds", "eval_seconds", "peak_mib")), _number),
    **dict.fromkeys((f"tasks[].{key}" for key in ("task", "steps", "final_loss", "n_train")), _number),
    **dict.fromkeys((f"tasks[].{key}" for key in ("parameters_trained", "parameters_stored")), _number),
}
_PLACES = {place: place.replace("[]", ".[]").split(".") for place in _SHAPES}


def _found(value: Any, parts: list[str]) -> Iterator[Any]:
    """The values at a place."""
    for i, part in enumerate(parts):
        if part == "[]":
            for entry in value if isinstance(value, list) else ():
                yield from _found(entry, parts[i + 1 :])
            return
        value = value.get(part) if isinstance(value, Mapping) else None
    yield value


def problem(data: Mapping[str, Any]) -> str | None:
    """The first thing in a record that readers cannot work with, in a few words; None when all is in order."""
    for place, fits in _SHAPES.items():
        for value in _found(data, _PLACES[place]):
            if not fits(value):
                return f"{place} is {str(value)[:60]!r}"
    if data["run"]["n_tasks"] > MOST_TASKS:
        return f"run.n_tasks is {data['run']['n_tasks']}"
    for row in data["matrix"]["rows"]:
        for name, values in row.items():
            if isinstance(values, list) and not all(map(_number, values)):
                return f"{name} in a row of the matrix is no list of numbers of a run"
    return None
