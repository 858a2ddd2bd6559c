"""What differs between a published protocol and that of our records, from the records' own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualcl.results.published import BENCHMARKS, WEIGHTS, Group, Number, backbone_weights
from dualcl.results.records import Record

#: settings of ours that make another method of one, and their values in the plain one: a number without them is of that
VARIANTS = {"deep": "false", "align": "false", "adapt": "none"}
_VIT_B = "vit_base_patch16_224"


@dataclass(frozen=True)
class Comparison:
    """Points of a protocol: those that agree, those that differ as (what, theirs, ours), and those not seen there."""

    same: tuple[str, ...]
    differs: tuple[tuple[str, str, str], ...]
    unseen: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """At most three lines for a reader."""
        out = []
        if self.differs:
            out.append("Differs: " + "; ".join(f"{what} {theirs}, ours {ours}" for what, theirs, ours in self.differs))
        if self.unseen:
            out.append("Not seen there: " + ", ".join(self.unseen))
        if self.same:
            out.append("As ours: " + ", ".join(self.same))
        return out


def variant(settings: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """What of a method's settings (ours or a published row's) is not the plain one's: keys and values."""
    told = {key: str(settings.get(key, plain)).lower() for key, plain in VARIANTS.items()}
    found = {(key, value) for key, value in told.items() if value != VARIANTS[key]}
    # RanPAC without its random layer
    return frozenset(found | ({("width", "0")} if str(settings.get("width")) == "0" else set()))


def is_of(number: Number, method: str, settings: Mapping[str, Any]) -> bool:
    """Whether a number is of our `method` with these settings, other than by their values."""
    return number.dualcl_method == method and variant(number.settings) == variant(settings)


def _part(record: Record, name: str) -> Mapping[str, Any]:
    value = record.data["config"].get(name)
    return value if isinstance(value, Mapping) else {}


def _preprocess(record: Record) -> str:
    view = record.data["identity"].get("preprocess")
    if not isinstance(view, Mapping):
        return ""
    mean, std = (v if isinstance(v, list) else [v] for v in (view.get("mean"), view.get("std")))
    if set(mean) == {0} and set(std) == {1}:
        return "none"
    shown = (",".join(f"{x:g}" if isinstance(x, (int, float)) else str(x) for x in v) for v in (mean, std))
    return "mean {} std {}".format(*shown)


def _weights(record: Record) -> str:
    # a local file, or random numbers, need not be what the backbone's tag says
    name = str(record.data["identity"].get("weights") or "")
    return backbone_weights(name) or name if name.startswith("timm:") else name


def _backbone(record: Record) -> str:
    name = str(record.data["identity"].get("backbone") or "")
    plain = name.partition(".")[0] == _VIT_B and not _part(record, "backbone").get("kwargs")
    return "ViT-B/16" if plain else name


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value or "")


def _rate(record: Record) -> str:
    """The learning rates of a run: one value where the classifier shares it."""
    method = _part(record, "method")
    rates = [_number(method[key]) for key in ("lr", "head_lr") if method.get(key) is not None]
    return " and ".join(dict.fromkeys(rates))


def _shared(group: Group, record: Record) -> list[tuple[str, str, str]]:
    """(what, theirs, ours) of what all methods of a comparison share; "" where not seen."""
    protocol, identity = group.protocol, record.data["identity"]
    train, stream = _part(record, "train"), _part(record, "stream")
    reading = group.weights_reading
    theirs = f'"{group.weights}" ({WEIGHTS[reading]})' if reading in WEIGHTS else group.weights
    ours = _weights(record)
    order, named = identity.get("class_order"), stream.get("class_order")
    classes = str(len(order)) if isinstance(order, list) else ""
    return [
        ("classes", str(BENCHMARKS[protocol.benchmark]), classes),
        ("backbone", protocol.backbone, _backbone(record)),
        ("weights", theirs, theirs if reading and reading == ours else WEIGHTS.get(ours, ours)),
        ("preprocessing", protocol.preprocess, _preprocess(record)),
        ("epochs", _number(protocol.epochs), _number(identity.get("epochs") or train.get("epochs"))),
        ("batch", _number(protocol.batch_size), _number(identity.get("batch_size") or train.get("batch_size"))),
        ("optimizer", protocol.optimizer, str(train.get("optimizer") or "")),
        ("schedule", protocol.schedule, str(train.get("schedule") or "")),
        ("class order", protocol.class_order, "a list" if isinstance(named, list) else str(named or "")),
        ("split", protocol.split, str(identity.get("split_name") or "")),
    ]


def _of_method(group: Group, number: Number, record: Record) -> list[tuple[str, str, str]]:
    """The same of one method: learning rate and settings."""
    method = _part(record, "method")
    trained = any(method.get(key) is not None for key in ("lr", "head_lr"))
    rate = group.protocol.lr_methods.get(number.dualcl_method, group.protocol.lr)
    points = [("learning rate", _number(float(rate)) if rate else "", _rate(record))] if trained else []
    for key, value in number.settings.items():
        if key not in VARIANTS:
            points.append((key.rstrip("_"), _number(float(value)), _number(method.get(key))))
    return points


def _compare(points: Sequence[tuple[str, str, str]]) -> Comparison:
    return Comparison(
        tuple(what for what, theirs, ours in points if theirs and theirs == ours),
        tuple((what, theirs, ours or "not recorded") for what, theirs, ours in points if theirs and theirs != ours),
        tuple(what for what, theirs, _ in points if not theirs),
    )


def compare_protocol(group: Group, records: Sequence[Record]) -> Comparison:
    """How a published protocol differs from that of the records of one table (at least one).

    What the records share is read from the first; a learning rate is compared per method, where both have the method.
    """
    points = _shared(group, records[0])
    seen = set()
    for number in group.numbers:
        for record in records:
            if not is_of(number, str(record.data["run"]["method"]), _part(record, "method")):
                continue
            for what, theirs, ours in _of_method(group, number, record):
                point = (f"{what} ({number.dualcl_method})" if theirs and theirs != ours else what, theirs, ours)
                if point not in seen and not (not theirs and any(p[0] == what for p in points)):
                    seen.add(point)
                    points.append(point)
    return _compare(points)


def compare_number(group: Group, number: Number, record: Record) -> Comparison:
    """The same for one published row and one run of our method."""
    return _compare([*_shared(group, record), *_of_method(group, number, record)])
