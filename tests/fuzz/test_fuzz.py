"""The targets under hypothesis: valid inputs with a few things wrong. A crash that was found stays here, inline."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dualcl.benchmark.core.errors import UserError

_spec = importlib.util.spec_from_file_location("fuzz_targets", Path(__file__).with_name("targets.py"))
assert _spec is not None
assert _spec.loader is not None
targets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(targets)

#: of each target; `DUALCL_FUZZ_EXAMPLES=10000 pytest tests/fuzz` looks longer, and elsewhere every time
EXAMPLES = int(os.environ.get("DUALCL_FUZZ_EXAMPLES", 0))
PROFILE: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": not EXAMPLES,
    "suppress_health_check": list(HealthCheck),
    # shrinking would take longer than all the rest; the input is printed as it is
    "phases": (Phase.explicit, Phase.generate),
}

#: values that readers do not expect
HOSTILE: list[Any] = [None, True, 0, -1, 2**63, 10**19, 1e308, 0.5, "", "x", "=1+1", "../../x", "<script>", "\x1b[31m"]
HOSTILE += ["\ud800", "a\nb", "'\"`$|\\[*", [], {}, [None], [[]], {"": None}, [1, "a", {}], {"a": {"b": [1]}}]


def paths(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value is in a tree, itself included."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(path for key, value in inner for path in paths(value, (*at, key)))]


def spoil(tree: Any, path: tuple[Any, ...], value: Any, how: str) -> Any:
    """`tree` with the value at `path` replaced, removed, nested, or given another name."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    place = tree
    for key in path[:-1]:
        place = place[key]
    if how == "remove":
        del place[path[-1]]
    elif how == "nest":
        place[path[-1]] = [place[path[-1]]]
    elif how == "rename" and isinstance(place, dict):
        place[str(value)] = place.pop(path[-1])
    else:
        place[path[-1]] = value
    return tree


@st.composite
def trees(draw: st.DrawFn, seeds: list[Any]) -> Any:
    """A tree of a seed with one to three places spoilt."""
    tree = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["replace", "replace", "remove", "nest", "rename"]))
        tree = spoil(tree, draw(st.sampled_from(paths(tree))), draw(st.sampled_from(HOSTILE)), how)
    return tree


@st.composite
def garbled(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with bytes changed, cut off, put in, or another seed's end."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["flip", "insert", "cut", "splice", "repeat"]))
        if how == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif how == "insert":
            data[at:at] = draw(st.one_of(st.binary(max_size=8), st.text(max_size=6).map(str.encode)))
        elif how == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif how == "splice":
            other = draw(st.sampled_from(seeds))
            data[at:] = other[draw(st.integers(0, len(other))) :]
        else:
            data[at:at] = data[at : at + 4] * draw(st.integers(1, 200))
    return bytes(data)


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def as_preset(parts: list[Any]) -> bytes:
    tree, number, sets = parts
    return b"\0".join([bytes([number]), yaml.safe_dump(tree).encode(), *(os.fsencode(s) for s in sets)])


def json_seeds(name: str) -> list[Any]:
    return [json.loads(seed) for seed in targets.TARGETS[name].seeds()]


KEYS = st.sampled_from(
    ["seed", "label", "train.epochs", "method.lr", "backbone.kwargs", "data.root", "stream", "x.y.z"]
)
VALUES = st.one_of(
    st.sampled_from(HOSTILE).map(str), st.text(max_size=12), st.sampled_from(["1e400", "[1,2]", "{a: 1}"])
)
SETS = st.lists(st.one_of(st.builds("{}={}".format, KEYS, VALUES), st.text(max_size=8)), max_size=3).map(
    lambda sets: [s.replace("\0", "").encode("utf-8", "replace").decode() for s in sets]
)


def structured(name: str) -> st.SearchStrategy[bytes] | None:
    """Inputs of a target that are valid files of a wrong content; None where there is no such thing."""
    if name == "config":
        texts = [seed.split(b"\0")[1].decode() for seed in targets.TARGETS[name].seeds()]
        presets = [yaml.safe_load(text.replace("1e-", "1.0e-")) for text in texts]
        return st.tuples(trees(presets), st.integers(1, len(targets.METHODS)), SETS).map(as_preset)
    if name in ("record", "card"):
        return trees(json_seeds(name)).map(as_json)
    if name == "lists":
        seeds = targets.TARGETS[name].seeds()
        found = [trees([yaml.safe_load(seeds[i][1:])]).map(as_json).map(bytes([i]).__add__) for i in (0, 1, 3)]
        return st.one_of(found)
    if name == "tokens":
        return st.lists(st.text(max_size=10), min_size=4, max_size=4).map(
            lambda t: "\0".join(t).encode("utf-8", "replace")
        )
    return None


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_a_file_that_is_wrong_is_refused_in_one_line(name: str) -> None:
    """Valid inputs are taken; of spoilt ones nothing comes but UserError."""
    seeds = targets.TARGETS[name].seeds()
    inputs = garbled(seeds)
    if (valid := structured(name)) is not None:
        inputs = st.one_of(valid, valid, inputs)
    outcomes: list[bool] = []

    @settings(max_examples=EXAMPLES or SLOW.get(name, 60), **PROFILE)
    @given(inputs)
    def feed(data: bytes) -> None:
        outcomes.append(targets.run_one(name, data))

    feed()
    assert False in outcomes or name == "command"


#: examples of targets that take longer than milliseconds each
SLOW = {"record": 15, "tokens": 20, "config": 25, "command": 40}


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_valid_inputs_are_taken(name: str) -> None:
    if name == "card":  # up to the base model, which is not there
        for seed in targets.TARGETS[name].seeds():
            with pytest.raises(UserError, match=r"--base DIR|model_index|nobody/nothing"):
                targets.TARGETS[name].run(seed)
        return
    refused = [seed for seed in targets.TARGETS[name].seeds() if not targets.run_one(name, seed)]
    assert refused == [] or (name == "images" and [seed[:2] for seed in refused] == [b"II"])  # floating point


def test_what_is_neither_taken_nor_refused_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        if data == b"bad":
            raise ValueError("a crash")
        raise UserError("the file is wrong")

    monkeypatch.setitem(targets.TARGETS, "command", targets.Target(broken, list))
    assert not targets.run_one("command", b"")
    with pytest.raises(ValueError, match="a crash"):
        targets.run_one("command", b"bad")


#: crashes that were found: target, what was wrong in its first seed (place and value), in the order found
FOUND: list[tuple[str, tuple[Any, ...], Any]] = [
    ("record", ("tasks", 0), 5),  # AttributeError in metrics
    ("record", ("tasks", 0, "parameters_trained"), ["x"]),  # TypeError in metrics
    ("record", ("measured", "tasks"), ["a"]),  # AttributeError in metrics
    ("record", ("network", "parameters"), [[]]),  # TypeError in metrics
    ("record", ("environment",), 7),  # AttributeError in run_row
    ("record", ("environment",), {"earlier": 7}),  # TypeError in run_row
    ("record", ("identity", "class_order"), 3),  # TypeError in the page
    ("record", ("matrix", "rows", 0, "mmd", 0), 1e308),  # the sum is infinite
    ("card", ("concepts",), True),  # TypeError where the card is checked
    ("card", ("run", "precision"), []),  # the same
    (
        "card",
        ("base",),
        {**dict.fromkeys(("name", "weights", "weights_sha256"), "a/b"), "weights_dtype": "fp32"},
    ),  # KeyError
]


def _holds(tree: Any, place: tuple[Any, ...]) -> bool:
    for key in place:
        if not (0 <= key < len(tree) if isinstance(tree, list) else isinstance(tree, dict) and key in tree):
            return False
        tree = tree[key]
    return True


@pytest.mark.parametrize(("name", "place", "value"), FOUND)
def test_what_crashed_once_is_refused(name: str, place: tuple[Any, ...], value: Any) -> None:
    seed = next(seed for seed in json_seeds(name) if _holds(seed, place))
    assert not targets.run_one(name, as_json(spoil(seed, place, value, "replace")))


def test_a_line_break_in_a_field_of_a_prompt_is_told_in_one_line() -> None:
    seed = targets.TARGETS["lists"].seeds()[2]
    assert targets.run_one("lists", seed)
    assert not targets.run_one("lists", seed.replace(b"{1} in", b"{1\x1eu} in"))


@pytest.mark.parametrize("at", [1, 2, 3], ids=["placeholder", "noun", "prompt"])
def test_words_that_are_no_text_are_refused(at: int) -> None:
    """The tokenizer raises TypeError at bytes that are no UTF-8."""
    parts = [b"", b"<c{number}>", b"", b"a photo of <c1>"]
    parts[at] += b"\xff"
    assert not targets.run_one("tokens", b"\0".join(parts))
