"""`dualcl bench KIND`: ours and a peer as two processes on one machine, measured in alternating pairs; ratios count.

A comparison is declared (`Comparison`), a side of it is an adapter file run by `bench_worker.py`, or any command that
speaks its lines. While one side works, the other waits blocked on its stdin.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dualcl.benchmark.core.devices import pick_device
from dualcl.benchmark.core.errors import RunFailed, UserError, nearest
from dualcl.benchmark.core.machine import checkout_commit, environment
from dualcl.benchmark.core.reading import parse_names
from dualcl.benchmark.core.text import say
from dualcl.benchmark.runs.runner import device_name
from dualcl.benchmark.speed.common import fixed, formatted, measure_all, positive_count

OURS = "dualcl"
PEERS = Path(__file__).resolve().parent / "peers"
WORKER = Path(__file__).resolve().with_name("worker.py")
#: units of work before the first pair: the first ones make the optimiser's state and warm caches
WARM_UP = 2


@dataclass(frozen=True)
class Side:
    """One side of a comparison: an adapter of `peers/`, what it is to build (`setup`, JSON), and which work is timed.

    `peer` is the name that --peer, --python, --adapter and --command take; `source` the address of the public code that
    it needs a checkout of.
    """

    peer: str
    adapter: str
    work: str
    setup: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None


@dataclass(frozen=True)
class Target:
    """What a ratio should be; `at_least` of speed-ups (peer's time per image / ours), `at_most` of ours / peer's."""

    text: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool | None:
        """Whether `ratio` is what it should be; None without a limit."""
        if self.at_least is not None:
            return ratio >= self.at_least
        return None if self.at_most is None else ratio <= self.at_most


@dataclass(frozen=True)
class Comparison:
    """A quantity of both sides: `time` and `memory` each give a row, from the same pairs.

    `agree` is a work whose value must be the same on both sides, within `tolerance` (relative); it is asked for before
    anything is timed.
    """

    name: str
    quantity: str
    ours: Side
    peer: Side
    time: Target | None = None
    memory: Target | None = None
    unit: Literal["ms", "images/s"] = "ms"
    agree: str | None = None
    tolerance: float = 1e-3
    note: str = ""
    #: how the table calls the peer, if not by its name
    against: str = ""


# --- arguments --------------------------------------------------------------------------------------------------------


def add_pair_arguments(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds what every kind of comparison takes; `names` of its comparisons or what they begin with, for the help."""
    parser.add_argument(
        "--quantities", metavar="A,B,C", help=f"names, or what they begin with up to a dash: {', '.join(names)}"
    )
    parser.add_argument(
        "--repeats", type=positive_count, default=7, metavar="N", help="timed pairs; default %(default)s"
    )
    parser.add_argument("--threads", type=positive_count, metavar="N", help="CPU threads; default: torch's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default %(default)s")
    for option, value, text in (
        ("--peer", "CHECKOUT[@COMMIT]", "folder of a peer's public code (and its commit, where it is no git checkout)"),
        ("--python", "PYTHON", "interpreter of a peer's own environment; default: this one"),
        ("--adapter", "FILE", "adapter to use in place of the suite's"),
        ("--command", "COMMAND", "command that speaks the worker's lines, in place of an adapter"),
    ):
        dest = f"given_{option[2:]}"  # `command` is the sub-command's
        parser.add_argument(option, dest=dest, action="append", default=[], metavar=f"NAME={value}", help=text)
    parser.add_argument("--format", choices=("text", "md", "csv", "json"), default="text", help="default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the output to this file too")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.set_defaults(bench_parser=parser)


def _named(args: argparse.Namespace, option: str, peers: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE of an option that may be given several times. Raises UserError."""
    values = {}
    for text in getattr(args, f"given_{option}"):
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise UserError(f"--{option} {text}: wants NAME=VALUE, for example {min(peers)}=...")
        if name not in peers:
            raise UserError(f"--{option} {text}: no peer is called {name!r}; {nearest(name, peers, 'peers')}")
        values[name] = value
    return values


@dataclass(frozen=True)
class Peer:
    """What the user gave for a peer."""

    checkout: str | None = None
    commit: str | None = None
    python: str = sys.executable
    adapter: str | None = None
    command: str | None = None


def _checkout(text: str) -> tuple[str, str | None]:
    """(folder, commit) of CHECKOUT or CHECKOUT@COMMIT. Raises UserError."""
    folder, _, commit = text.rpartition("@")
    if folder and not Path(text).exists():
        text = folder
    else:
        commit = ""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise UserError(f"--peer: the folder {text} does not exist")
    return str(path.resolve()), commit or checkout_commit(path)


def given_peers(args: argparse.Namespace, comparisons: Sequence[Comparison]) -> dict[str, Peer]:
    """What the user gave for every peer of `comparisons`, checked."""
    names = {side.peer for c in comparisons for side in (c.ours, c.peer)}
    options = {option: _named(args, option, names) for option in ("peer", "python", "adapter", "command")}
    for name, file in options["adapter"].items():
        if not Path(file).is_file():
            raise UserError(f"--adapter {name}={file}: the file does not exist")
    peers = {}
    for name in sorted(names):
        checkout, commit = _checkout(options["peer"][name]) if name in options["peer"] else (None, None)
        peers[name] = Peer(
            checkout=checkout,
            commit=commit,
            python=options["python"].get(name, sys.executable),
            adapter=options["adapter"].get(name),
            command=options["command"].get(name),
        )
    return peers


def chosen(args: argparse.Namespace, comparisons: Sequence[Comparison], peers: Mapping[str, Peer]) -> list[Comparison]:
    """The comparisons of --quantities; without it all whose public code is there, the others are said. UserError."""
    wanted = None if args.quantities is None else parse_names(args.quantities, "quantities")
    picked = list(comparisons)
    if wanted is not None:
        of = {name: [c for c in comparisons if f"{c.name}-".startswith(f"{name}-")] for name in wanted}
        for name in wanted:
            if not of[name]:
                raise UserError(
                    f"unknown quantity {name!r}; {nearest(name, [c.name for c in comparisons], 'quantities')}"
                )
        picked = [c for c in comparisons if any(c in found for found in of.values())]
    out, left_out = [], Counter[str]()
    for comparison in picked:
        lacking = [
            side
            for side in (comparison.ours, comparison.peer)
            if side.source is not None and peers[side.peer].checkout is None and peers[side.peer].command is None
        ]
        if not lacking:
            out.append(comparison)
            continue
        wants = f"--peer {lacking[0].peer}=CHECKOUT of {lacking[0].source}"
        if wanted is not None and comparison.name in wanted:
            raise UserError(f"{comparison.name} wants {wants}")
        left_out[wants] += 1
    for wants, count in left_out.items():
        say(f"left out, for want of {wants}: {count} quantities")
    if not out:
        raise UserError("no quantity is left to measure; give --peer NAME=CHECKOUT")
    return out


# --- workers ----------------------------------------------------------------------------------------------------------


class WorkerProcess:
    """A worker, seen from outside. Every failure is one line that names it."""

    def __init__(self, name: str, command: Sequence[str], threads: int | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                encoding="utf-8",
                env=environment,
            )
        except OSError as error:
            raise UserError(f"{name}: cannot start {command[0]}: {error.strerror}") from None

    def ask(self, wanted: str, **request: Any) -> dict[str, Any]:
        """The reply to a request, which must have the field `wanted`. Raises UserError or RunFailed."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._died()
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise RunFailed(f"{self.name}: answers {line.strip()[:80]!r}, which is no JSON object")
        if "error" in reply:
            text = f"{self.name}: {reply['error']}"
            raise UserError(text) if reply.get("user") else RunFailed(text)
        if wanted not in reply:
            raise RunFailed(f"{self.name}: its answer to {request['do']!r} lacks {wanted!r}")
        return reply

    def _died(self) -> RunFailed:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return RunFailed(f"{self.name}: killed (out of memory? try a smaller --batch)")
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        why = f"killed by signal {-code}" if code < 0 else f"its process ended with code {code}"
        return RunFailed(f"{self.name}: {why}" + (f": {lines[-1][:200]}" if lines else ""))

    def close(self) -> None:
        """Ends the process."""
        try:
            self._process.communicate('{"do": "end"}\n', timeout=10)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self.kill()
        self._log.close()

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


class Bench:
    """Measures comparisons one after another; a pair of workers is kept while both sides stay the same."""

    def __init__(self, peers: Mapping[str, Peer], device: str, threads: int | None, repeats: int) -> None:
        self.peers = peers
        self.device = device
        self.threads = threads
        self.repeats = repeats
        self._key: str | None = None
        self._workers: list[WorkerProcess] = []
        self._made: list[dict[str, Any]] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._end(kill=kind is not None)

    def _end(self, kill: bool = False) -> None:
        workers, self._workers, self._made, self._key = self._workers, [], [], None
        for worker in workers:
            worker.kill() if kill else worker.close()

    def _command(self, side: Side) -> list[str]:
        peer = self.peers[side.peer]
        if peer.command is not None:
            return shlex.split(peer.command)
        return [peer.python, str(WORKER), peer.adapter or str(PEERS / f"{side.adapter}.py")]

    def _start(self, comparison: Comparison) -> None:
        """Starts both workers, unless they are the ones at hand."""
        sides = (comparison.ours, comparison.peer)
        key = json.dumps([[s.peer, s.adapter, s.setup] for s in sides], sort_keys=True)
        if key == self._key:
            return
        self._end()
        for number, side in enumerate(sides):
            peer = self.peers[side.peer]
            name = side.peer if side.peer != OURS or number == 0 else f"{side.peer} (second)"
            self._workers.append(WorkerProcess(name, self._command(side), self.threads))
            setup = {**side.setup, "device": self.device, "threads": self.threads, "checkout": peer.checkout}
            self._made.append(self._workers[-1].ask("ok", do="make", setup=setup))
        self._key = key

    def measure(self, comparison: Comparison) -> dict[str, Any]:
        """Seconds, images and peaks of both sides, pair by pair. Raises UserError or RunFailed."""
        try:
            self._start(comparison)
            return self._pairs(comparison)
        except BaseException:
            self._end(kill=True)
            raise

    def _pairs(self, comparison: Comparison) -> dict[str, Any]:
        works = (comparison.ours.work, comparison.peer.work)
        result: dict[str, Any] = {"made": self._made, "agree": self._agreement(comparison)}
        for _ in range(WARM_UP):
            for worker, work in zip(self._workers, works, strict=True):
                worker.ask("seconds", do="time", work=work)
        samples: list[dict[str, list[float]]] = [
            {key: [] for key in ("seconds", "images", "mib", "process_mib")} for _ in works
        ]
        for i in range(self.repeats):
            for n in (0, 1) if i % 2 == 0 else (1, 0):
                worker = self._workers[n]
                worker.ask("mib", do="peak")
                reply = worker.ask("seconds", do="time", work=works[n])
                reply.update(worker.ask("mib", do="peak"))
                for key, values in samples[n].items():
                    values.append(float(reply.get(key, reply["mib"])))
        return {**result, "ours": samples[0], "peer": samples[1]}

    def _agreement(self, comparison: Comparison) -> float | None:
        """The relative difference of the values that must agree. RunFailed when they do not."""
        if comparison.agree is None:
            return None
        ours, peer = (w.ask("value", do="value", work=comparison.agree)["value"] for w in self._workers)
        difference = abs(ours - peer) / max(abs(peer), 1e-12)
        if not difference <= comparison.tolerance:
            raise RunFailed(
                f"{comparison.name}: the two sides do not compute the same: {comparison.agree} is {ours:.6g} here and "
                f"{peer:.6g} there"
            )
        return float(difference)


# --- numbers ----------------------------------------------------------------------------------------------------------


def rows_of(comparison: Comparison, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for times and one for memory, where the comparison has a target for it."""
    ours, peer = result["ours"], result["peer"]
    rows = []
    for measure, target in (("time", comparison.time), ("memory", comparison.memory)):
        if target is None:
            continue
        unit: str = comparison.unit
        if measure == "memory":
            mine, theirs, unit = ours["mib"], peer["mib"], "MiB"
            shown = [statistics.median(mine), statistics.median(theirs)]
        else:
            mine, theirs = (
                [s / i for s, i in zip(side["seconds"], side["images"], strict=True)] for side in (ours, peer)
            )
            if unit == "images/s":
                shown = [1 / statistics.median(per_image) for per_image in (mine, theirs)]
            else:
                shown = [1e3 * statistics.median(side["seconds"]) for side in (ours, peer)]
        pairs = list(zip(mine, theirs, strict=True))
        ratios = [b / a if target.at_least is not None else a / b for a, b in pairs]
        middle = statistics.median(ratios)
        rows.append(
            {
                "name": comparison.name,
                "quantity": comparison.quantity,
                "measure": measure,
                "unit": unit,
                "ours": shown[0],
                "peer": shown[1],
                "against": comparison.against or comparison.peer.peer,
                "ratio": middle,
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "pairs": len(ratios),
                "target": target.text,
                "met": target.met(middle),
                "agree": result["agree"],
                "note": comparison.note,
            }
        )
    return rows


def run_comparisons(
    args: argparse.Namespace, kind: str, comparisons: Sequence[Comparison], setup: Mapping[str, Any]
) -> int:
    """Measures the chosen ones, prints the table and writes `--out`; returns the exit code.

    `setup` is what a reader must know besides (batch, sizes, weights). A comparison that cannot be measured does not
    stop the others; its error is raised after the table of the rest.
    """
    peers = given_peers(args, comparisons)
    jobs = [(c.name, c) for c in chosen(args, comparisons, peers)]
    device = pick_device(args.device)
    facts = {"kind": kind, "command": command_line(args, kind), "setup": {**setup, "repeats": args.repeats}}

    def show(args: argparse.Namespace, results: Sequence[tuple[str, dict[str, Any]]]) -> str:
        by_name = {c.name: c for c in comparisons}
        made = results[0][1]["made"][0]
        value = {
            **facts,
            "device": device_name(device),
            "threads": made.get("threads", args.threads),
            "environment": environment(),
            "peers": _peer_facts(peers, [(by_name[name], result) for name, result in results]),
            "rows": [row for name, result in results for row in rows_of(by_name[name], result)],
        }
        return render(value, args.format)

    with Bench(peers, str(device), args.threads, args.repeats) as bench:
        return measure_all(args, jobs, bench.measure, show)


def _peer_facts(
    peers: Mapping[str, Peer], results: Sequence[tuple[Comparison, Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """What was measured against: source, commit and versions, by peer."""
    facts: dict[str, dict[str, Any]] = {}
    for comparison, result in results:
        for side, made in zip((comparison.ours, comparison.peer), result["made"], strict=True):
            if side.peer == OURS:
                continue
            peer, known = peers[side.peer], facts.setdefault(side.peer, {})
            known.update({"source": side.source, "commit": peer.commit, **made.get("versions", {})})
            if peer.adapter or peer.command:
                known["adapter"] = "the user's own"
    return facts


def command_line(args: argparse.Namespace, kind: str) -> str:
    """The command as it can be repeated elsewhere: without this machine's paths."""
    words = ["dualcl", "bench", kind]
    parser: argparse.ArgumentParser = args.bench_parser
    places = {"peer": "CHECKOUT", "python": "PYTHON", "adapter": "FILE", "command": "COMMAND"}
    for key, value in vars(args).items():
        hidden = key in ("bench_parser", "command", "func", "kind", "debug", "out", "format")
        if hidden or value == parser.get_default(key):
            continue
        name = key.removeprefix("given_")
        if isinstance(value, list) and all(isinstance(each, int) for each in value):
            value = ",".join(map(str, value))
        for each in value if isinstance(value, list) else [value]:
            text = "PLACE" if isinstance(each, Path) else str(each)
            if name != key:
                text = f"{text.partition('=')[0]}={places[name]}"
            option = "--set" if key == "sets" else f"--{name.replace('_', '-')}"
            words += [option] if each is True else [option, shlex.quote(text)]
    return " ".join(words)


# --- tables -----------------------------------------------------------------------------------------------------------

HEADER = ("quantity", "ours", "peer", "ratio", "target", "met")


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """A row of the table, as HEADER."""
    digits = 1 if row["unit"] == "images/s" or max(row["ours"], row["peer"]) < 100 else 0
    ours, peer = (f"{fixed(row[key], digits)} {row['unit']}" for key in ("ours", "peer"))
    met = {True: "yes", False: "no", None: "-"}[row["met"]]
    what = row["quantity"] + (", peak memory" if row["measure"] == "memory" else "")
    places = 2 if row["ratio"] >= 0.1 else 4
    ratio, least, most = (fixed(row[key], places) for key in ("ratio", "ratio_min", "ratio_max"))
    return [f"{what}, against {row['against']}", ours, peer, f"{ratio} ({least}-{most})", row["target"], met]


def about_lines(value: Mapping[str, Any]) -> list[str]:
    """What was measured on what, in lines."""
    setup = {**value["setup"], "device": value["device"], "threads": value["threads"]}
    ours = value["environment"]
    setup.update({key: ours[key] for key in ("torch", "timm", "dualcl") if ours.get(key)})
    lines = [", ".join(f"{key.replace('_', ' ')} {v}" for key, v in setup.items())]
    for name, facts in value["peers"].items():
        known = {k: v for k, v in facts.items() if v is not None}
        lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in known.items()))
    return [
        *lines,
        "ratio: median (least-most) over pairs measured one right after the other, ours against the peer in "
        "alternating order; of targets 'at least' the peer's time over ours, of 'at most' ours over the peer's",
        "peak memory: "
        + (
            "allocated on the GPU" if value["device"].startswith("cuda") else "resident set above that before the model"
        ),
    ]


def notes_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The rows' notes, each once, with the names of the rows they belong to."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["note"] and row["name"] not in names.setdefault(row["note"], []):
            names[row["note"]].append(row["name"])
    return [f"{', '.join(of)}: {note}" for note, of in names.items()]


def render(value: Mapping[str, Any], fmt: str) -> str:
    """A result in the wanted format, ending in a line break."""
    rows, setup = value["rows"], {**value["setup"], "device": value["device"], "threads": value["threads"]}
    table, notes = [list(HEADER), *[cells_of(row) for row in rows]], [*about_lines(value), *notes_of(rows)]
    return formatted(fmt, value, rows, setup, table, notes, range(1, 4))
