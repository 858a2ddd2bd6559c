"""Whether the files that a run was made of are those that are there now: by content, wherever they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import as_json
from dualcl.benchmark.core.settings import Resolved, flatten
from dualcl.benchmark.domains import domain_class
from dualcl.datasets import dataset_info

#: keys that say where files lie -> what of a record's `content` says which files they are
PLACES = {
    "data.root": "data",
    "data.prompts": "words",
    "backbone.weights": "weights",
    "base.model": "base",
    "prior.images": "prior.",
    "eval.features": "features",
}
#: files of tensors: where their bytes differ, the tensors that are loaded tell
TENSORS = {"weights": "weights_sha256", "base": "weights_sha256", "features": "features_sha256"}
#: what of an identity such a hash says better: names, which change with the place
NAMES = {"weights_sha256": ("backbone", "weights"), "features_sha256": ("features",)}
#: by domain, the place of what is pretrained
WEIGHTS = {"classification": "backbone.weights", "customization": "base.model"}
OLDER = "it is older than hashes of content"


def _place(resolved: Resolved, key: str) -> Path | None:
    section, _, name = key.partition(".")
    value = getattr(resolved.sections.get(section), name, None)
    return Path(value).expanduser() if value else None


def placed(resolved: Resolved, key: str, place: str) -> Resolved:
    """With another place for a key of PLACES."""
    section, _, name = key.partition(".")
    changed = replace(resolved.sections[section], **{name: place})
    return replace(resolved, sections={**resolved.sections, section: changed})


def check_apart(resolved: Resolved, out: Path) -> None:
    """UserError for an --out among the user's own data, where what a run writes would be read as data.

    Prepared sets read what their lists name; where they lie (`data.root`) tells nothing of a run, and is volatile.
    """
    root = _place(resolved, "data.root")
    if root is None or "data.root" in resolved.volatile:
        return
    # as they are written too: a link among the data may lead out of it
    for told in (os.path.abspath, os.path.realpath):
        if Path(told(out)).is_relative_to(told(root)):
            raise UserError(f"{out} lies in data.root={root}, and would be read as data; choose an --out outside of it")


def relative_places(resolved: Resolved, folder: Path, record: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Where files lie that the configuration names as from this directory, or as from that of the record's run.

    As from the run's folder: a record that is shown to others names no folders of this machine.
    """
    found = ((key, _place(resolved, key)) for key in PLACES)
    start = os.path.realpath(folder)
    own = {key: os.path.relpath(p, start) for key, p in found if p is not None and not p.is_absolute() and p.exists()}
    return {**_places(record), **own}


def _places(record: Mapping[str, Any] | None) -> Mapping[str, str]:
    return {} if record is None else (record.get("environment") or {}).get("places") or {}


def located(resolved: Resolved, folder: Path, record: Mapping[str, Any] | None, *, here: bool = True) -> Resolved:
    """With what the record's run was given as from its directory in that place; `here`: what is not in this one."""
    for key, written in _places(record).items():
        now = _place(resolved, key) if key in PLACES else None
        place = os.path.normpath(os.path.join(os.path.realpath(folder), written))
        if now is None or now.is_absolute() or (here and now.exists()) or not os.path.exists(place):
            continue
        resolved = placed(resolved, key, place)
    return resolved


def moved_keys(record: Mapping[str, Any], resolved: Resolved, path: Path, mend: str) -> list[str]:
    """Keys that name other places than the record, whose files its content tells; UserError where any other differs."""
    old = resolved.telling(flatten(record["config"]))
    new = resolved.flat(volatile=False)
    content = tuple(record.get("content") or ())
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    there = domain_class(resolved.domain).contents(resolved, known=content)
    moved = [k for k in differ if k in PLACES and any(n.startswith(PLACES[k]) and n in there for n in content)]
    other = [k for k in differ if k not in moved]
    if other:
        shown = ", ".join(f"{k} (there {old.get(k)!r}, now {new.get(k)!r})" for k in other[:4])
        more = f" and {len(other) - 4} more" if len(other) > 4 else ""
        raise UserError(f"{path} holds a run with another configuration: {shown}{more}; {mend}")
    return moved


def differences(old: Mapping[str, str], new: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Which of `names` has another digest, with both of them, short."""
    shown = ((n, *(str(side.get(n))[:12] for side in (old, new))) for n in names if old.get(n) != new.get(n))
    return [f"{name.rstrip('.')} (sha256 there {before}, now {now})" for name, before, now in shown]


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """UserError, with what differs, unless a record that begins now is of the same data and weights as the old one."""
    before, now, known = old["identity"], new["identity"], old.get("content") or {}
    found = differences(known, new["content"], [name for name in known if name not in TENSORS])
    found += differences(before, now, [key for key in NAMES if key in now])
    files = {TENSORS[name] for name in TENSORS if name in known and name in new["content"]}
    free = {*NAMES, *(name for key in files for name in NAMES[key])}
    found += [key for key, value in now.items() if key not in free and before.get(key) != value]
    # another GPU's prior differs, and notes tell of files that are not used
    facts = {key: value for key, value in new["network"].items() if key not in ("prior", "notes")}
    found += [key for key, value in as_json(facts).items() if old["network"].get(key, value) != value]
    if found:
        raise _changed(path, found)


def unchecked(path: Path, why: str) -> str:
    """The line on a run that goes on, or stands, although its files could not be compared."""
    return f"{path}: whether its data and weights are as they were could not be checked ({why})"


def _changed(path: Path, what: Iterable[str]) -> UserError:
    return UserError(
        f"{path} was begun with another {', '.join(what)}: the data or weights behind the same configuration have "
        "changed; put them back, or choose another --out"
    )


def look(record: Mapping[str, Any], resolved: Resolved, path: Path) -> tuple[str, bool]:
    """(what could not be checked, in a few words; whether tensors must be compared) of the run in `path`.

    Raises UserError when its data, words or prior images are others now.
    """
    old, domain = record.get("content"), domain_class(resolved.domain)
    if old is None:
        return (OLDER if domain.contents(resolved) else ""), False
    there, new, gone = domain.contents(resolved, known=old), dict[str, str](), list[str]()
    for name in old:
        try:
            new[name] = there[name]()
        except KeyError:
            gone.append(name)
        except UserError:
            if not dataset_info(resolved.data_reference, resolved.domain).needs_prepare:
                raise
            gone.append(name)  # to be had again
    if found := differences(old, new, [name for name in new if name not in TENSORS]):
        raise _changed(path, found)
    unchecked = f"no longer there: {', '.join(name.rstrip('.') for name in gone)}" if gone else ""
    return unchecked, any(new[name] != old[name] for name in new)
