"""The two-phase protocol: settings that a sweep found on one stream, used once on another (arXiv 2403.09066)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import read_json
from dualcl.benchmark.core.settings import parse_assignment

FORMAT = "dualcl-sweep"
#: a stream is known again by so many pictures of each class or concept, and each by so many digits of its hash
SAMPLE, DIGITS = 4, 16
AGAIN = "give the same `dualcl sweep` command again (its finished runs are kept)"


@dataclass(frozen=True)
class Tuned:
    """What a finished sweep found for one method, and what it was measured on."""

    preset: str
    #: as `--set` takes them
    settings: tuple[str, ...]
    #: in a word, for records and tables
    tuning: str
    #: the data set, and the names of the classes or concepts of the stream
    data: str
    items: frozenset[str]
    #: hashes of some of its pictures; none where they are drawn, nor from an earlier version
    pictures: frozenset[str] = frozenset()
    #: whether it may be used on what it was measured on
    same_stream: bool = False

    @property
    def values(self) -> dict[str, Any]:
        """Keys and parsed values."""
        return dict(parse_assignment(text) for text in self.settings)

    def check(self, data: str, items: Iterable[str], pictures: Iterable[Sequence[str]] = ()) -> str:
        """What is to be said of a stream that shares pictures with the sweep's, or names where not both's are known.

        `pictures`: the part, class or concept, id and hash of each. UserError when it does, unless that is allowed.
        """
        names = frozenset(items)
        there = {hashed[:DIGITS]: place for _, name, place, hashed in pictures if name in names}
        known = bool(there and self.pictures)
        if known:
            shared = sorted(there[hashed] for hashed in self.pictures.intersection(there))
        else:
            shared = sorted(self.items & names) if data == self.data else []
        if shared and not self.same_stream:
            what = f"{shared[0]} of {data}, which this stream has by name too ({len(shared)} shared)"
            if known:
                what = f"{shared[0]}, a picture of this stream too ({len(shared)} of {len(self.pictures)} compared)"
            doubt = f", unless its pictures are others: then {AGAIN}" if there and not known else ""
            raise UserError(
                f"the settings were chosen on {what}: such numbers overstate a method{doubt}; give --tuned-on a sweep "
                "on another stream, or add --allow-same-stream"
            )
        if bool(there) != bool(self.pictures):
            return "its settings were chosen on classes or concepts of the same names" if shared else ""
        return "its settings were chosen on this very stream" if shared else ""


def read_tuned(place: Path, method: str, *, same_stream: bool = False) -> Tuned | None:
    """What the sweeps at `place`, the --out of `dualcl sweep` or a method's folder in it, found for a method.

    None where only other methods were swept. Raises UserError when there is no sweep, a damaged one, or one whose best
    point is not known.
    """
    found = [f for f in (place / method / "sweep.json", place / "sweep.json") if f.is_file()]
    if not found:
        if any(place.glob("*/sweep.json")):
            return None
        raise UserError(f"--tuned-on {place} holds no sweep.json; give the --out of a finished `dualcl sweep`")
    try:
        tree = read_json(found[0])
        if tree["format"] != FORMAT:
            raise ValueError
        if tree["method"] != method:
            return None
        best, stream = tree["best"], tree.get("stream")
        if best is not None and stream is not None:
            settings = tuple(f"{key}={value}" for key, value in best["settings"].items())
            items = frozenset(map(str, stream["items"]))
            pictures = frozenset(map(str, stream.get("pictures", ())))
            return Tuned(tree["preset"], settings, tree["tuning"], str(stream["data"]), items, pictures, same_stream)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{found[0]} is no whole sweep.json; {AGAIN}") from None
    lacks = "names no best point" if best is None else "does not say what it was measured on"
    raise UserError(f"{found[0]} {lacks}; {AGAIN}")


def stream_of(record: Mapping[str, Any], pictures: Iterable[Sequence[str]] = ()) -> dict[str, Any]:
    """What a recorded run was measured on: the data set, and the names of its classes or concepts.

    Of `pictures`, see `Tuned.check`, those with the lowest hashes of each.
    """
    network = record["network"]
    names = item_names(record["tasks"]) or network.get("class_names") or network["concepts"]
    hashes: dict[str, set[str]] = {name: set() for name in names}
    for _, name, _, hashed in pictures:
        if name in hashes:
            hashes[name].add(hashed[:DIGITS])
    lowest = sorted({hashed for found in hashes.values() for hashed in sorted(found)[:SAMPLE]})
    return {"data": record["identity"]["data"], "items": names, **({"pictures": lowest} if lowest else {})}


def item_names(tasks: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the classes or concepts in what is known of tasks; none of joint training's single one."""
    return [name for task in tasks for name in task.get("classes") or [task.get("concept")] if name is not None]
