"""Side by side: the worker and its lines, turns, ratios, what goes wrong, and the command line of comparisons."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.cli.bench import KINDS
from dualcl.benchmark.core.errors import RunFailed, UserError
from dualcl.benchmark.speed import pairs as bench_pairs
from dualcl.benchmark.speed.pairs import WORKER, Bench, Comparison, Peer, Side, Target, WorkerProcess, rows_of

ADAPTER = """
import os, signal, sys
import torch
VERSIONS = {"own": "1.5"}

def make(setup):
    if setup.get("lacks"):
        import no_such_package
    kept = []
    def grow():
        kept.append(torch.ones(setup["mib"], 2**18))
        print("not a reply")
        return 3
    def alone():
        return any(name.split(".")[0] == "dualcl" for name in sys.modules) or any("benchmark" in p for p in sys.path)
    def killed():
        os.kill(os.getpid(), signal.SIGKILL)
    return {"grow": grow, "alone": alone, "fail": lambda: 1 // 0, "killed": killed}
"""
#: speaks the worker's lines without torch; every unit of work is noted in a file
COMMAND = """
import json, sys
name, log, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if do == "end":
        break
    if do == "make":
        open(log, "a").write(f"make {name}\\n")
    if do == "time":
        open(log, "a").write(f"{name}\\n")
    replies = {
        "make": {"ok": True, "threads": 1, "versions": {"own": "1"}},
        "time": {"seconds": seconds, "images": 4},
        "peak": {"mib": 100 * seconds, "process_mib": 500},
        "value": {"value": seconds},
    }
    print(json.dumps(replies[do]), flush=True)
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter.py"
    path.write_text(ADAPTER, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def worker(adapter: Path) -> Iterator[WorkerProcess]:
    process = WorkerProcess("mine", [sys.executable, str(WORKER), str(adapter)], threads=1)
    yield process
    process.close()


def test_worker_needs_torch_only_and_counts_memory_anew(worker: WorkerProcess) -> None:
    with pytest.raises(UserError, match="too early"):
        worker.ask("mib", do="peak")
    made = worker.ask("ok", do="make", setup={"device": "cpu", "threads": 1, "mib": 64})
    assert made["threads"] == 1
    assert made["versions"]["own"] == "1.5"
    assert worker.ask("value", do="value", work="alone")["value"] == 0
    done = worker.ask("seconds", do="time", work="grow")
    assert done["images"] == 3
    assert done["seconds"] > 0
    first = worker.ask("mib", do="peak")
    assert first["mib"] >= 64
    assert first["process_mib"] > first["mib"] + 100  # torch itself
    assert worker.ask("mib", do="peak")["mib"] < first["mib"] + 16
    worker.ask("seconds", do="time", work="grow")
    assert worker.ask("mib", do="peak")["mib"] >= first["mib"] + 48


def test_failures_of_a_worker_are_one_line_that_names_it(worker: WorkerProcess, adapter: Path) -> None:
    setup = {"device": "cpu", "threads": 1, "mib": 1}
    with pytest.raises(UserError, match="mine: No module named 'no_such_package'"):
        worker.ask("ok", do="make", setup={**setup, "lacks": True})
    worker.ask("ok", do="make", setup=setup)
    with pytest.raises(RunFailed, match="mine: ZeroDivisionError"):
        worker.ask("seconds", do="time", work="fail")
    with pytest.raises(UserError, match="mine: no work 'grew'; it has: grow"):
        worker.ask("seconds", do="time", work="grew")
    with pytest.raises(RunFailed, match=r"mine: killed .*out of memory"):
        worker.ask("seconds", do="time", work="killed")


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        ("import sys; sys.exit('no such GPU')", RunFailed, "theirs: its process ended with code 1: no such GPU"),
        ("input(); print('hello')", RunFailed, "theirs: answers 'hello', which is no JSON object"),
        ("input(); print('{}')", RunFailed, "theirs: its answer to 'make' lacks 'ok'"),
        (None, UserError, "theirs: cannot start"),
    ],
)
def test_commands_that_do_not_speak_the_lines(program: str | None, error: type[Exception], message: str) -> None:
    command = ["no-such-python"] if program is None else [sys.executable, "-c", program]

    def ask() -> None:
        process = WorkerProcess("theirs", command)
        try:
            process.ask("ok", do="make", setup={})
        finally:
            process.kill()

    with pytest.raises(error, match=message) as caught:
        ask()
    assert "\n" not in str(caught.value)


@pytest.fixture
def peers(tmp_path: Path) -> dict[str, Peer]:
    """Ours takes 1 s a unit of 4 images, theirs 2 s."""
    program = tmp_path / "command.py"
    program.write_text(COMMAND, encoding="utf-8")

    def peer(name: str, seconds: float) -> Peer:
        return Peer(command=f"{sys.executable} {program} {name} {tmp_path / 'log'} {seconds}")

    return {"dualcl": peer("A", 1.0), "theirs": peer("B", 2.0)}


def comparison(name: str = "step", **others: Any) -> Comparison:
    return Comparison(
        **{
            "name": name,
            "quantity": "a step",
            "ours": Side("dualcl", "ours", "step"),
            "peer": Side("theirs", "theirs", "step"),
            "time": Target("at least 1.5x as fast", at_least=1.5),
            **others,
        }
    )


def test_sides_take_turns_after_the_warm_up(peers: dict[str, Peer], tmp_path: Path) -> None:
    with Bench(peers, "cpu", 1, repeats=3) as bench:
        result = bench.measure(comparison())
        bench.measure(comparison("again"))
        bench.measure(comparison("other", peer=Side("theirs", "theirs", "step", {"size": 2})))
    log = (tmp_path / "log").read_text(encoding="utf-8").replace("\n", " ").strip()
    turns = "A B " * bench_pairs.WARM_UP + "A B B A A B"
    assert log == f"make A make B {turns} {turns} make A make B {turns}"
    assert result["ours"]["seconds"] == [1, 1, 1]
    assert result["peer"]["mib"] == [200, 200, 200]


def test_ratios_mean_what_their_targets_say(peers: dict[str, Peer]) -> None:
    both = comparison(memory=Target("at most 0.6x", at_most=0.6), unit="images/s")
    with Bench(peers, "cpu", 1, repeats=2) as bench:
        result = bench.measure(both)
    time, memory = rows_of(both, result)
    assert (time["ours"], time["peer"], time["unit"]) == (4, 2, "images/s")
    assert (time["ratio"], time["met"]) == (2, True)  # the peer takes twice as long
    assert (memory["ours"], memory["peer"], memory["unit"]) == (100, 200, "MiB")
    assert (memory["ratio"], memory["met"]) == (0.5, True)  # ours takes half as much
    slow = comparison(time=Target("at most 0.4x", at_most=0.4))
    (row,) = rows_of(slow, result)
    assert (row["ratio"], row["met"]) == (0.5, False)
    assert (row["ours"], row["unit"]) == (1000, "ms")
    assert rows_of(comparison(time=Target("-")), result)[0]["met"] is None


def test_sides_that_compute_different_things_are_not_compared(peers: dict[str, Peer], tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"step: .* loss is 1 here and 2 there"):
        Bench(peers, "cpu", 1, repeats=1).measure(comparison(agree="loss"))
    with Bench(peers, "cpu", 1, repeats=1) as bench:
        assert bench.measure(comparison(agree="loss", tolerance=0.6))["agree"] == 0.5


# --- the command line -------------------------------------------------------------------------------------------------


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_pairs.add_pair_arguments(parser, ["step"])
    return parser.parse_args(list(words))


def test_command_runs_the_chosen_comparisons(
    peers: dict[str, Peer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [comparison("step-a"), comparison("step-b", note="a note"), comparison("eval")]
    rows.append(comparison("step-c", peer=Side("public", "public", "step", source="https://example.org/code")))
    given = [word for name in peers for word in ("--command", f"{name}={peers[name].command}")]
    args = arguments(*given, "--device", "cpu", "--repeats", "2", "--quantities", "step", "--format", "json")
    assert bench_pairs.run_comparisons(args, "kind", rows, {"batch": 4}) == 0
    text, said = capsys.readouterr()
    value = json.loads(text)
    assert "left out, for want of --peer public=CHECKOUT of https://example.org/code: 1 quantities" in said
    assert [row["name"] for row in value["rows"]] == ["step-a", "step-b"]
    assert value["setup"] == {"batch": 4, "repeats": 2}
    assert value["peers"]["theirs"]["own"] == "1"
    # to be repeated elsewhere: without this machine's paths
    assert value["command"].startswith("dualcl bench kind --quantities step --repeats 2 --device cpu")
    assert "--command dualcl=COMMAND --command theirs=COMMAND" in value["command"]
    assert str(tmp_path) not in text
    for fmt in ("text", "md", "csv"):
        shown = bench_pairs.render(value, fmt)
        assert all(word in shown for word in ("a step", "at least 1.5x as fast", "a note"))
    header, rule, *cells = [line for line in bench_pairs.render(value, "md").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (header, rule, *cells)} == {len(bench_pairs.HEADER) + 1}
    assert "2.00 (2.00-2.00)" in cells[0]


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--quantities", "stp"], "stp"),
        (["--quantities", "step-public"], "--peer public=CHECKOUT"),
        (["--peer", "public"], "NAME=VALUE"),
        (["--peer", "publc=."], "public"),
        (["--peer", "public=no/such/folder"], "no/such/folder"),
        (["--adapter", "theirs=no/such/file.py"], "no/such/file.py"),
        (["--out", "no/such/folder/x.json"], "no/such/folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    words: list[str], culprit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_pairs.Bench, "measure", lambda *_: pytest.fail("measured"))
    public = Side("public", "public", "step", source="https://example.org/code")
    rows = [comparison(), comparison("step-public", peer=public)]
    with pytest.raises(UserError, match=culprit):
        bench_pairs.run_comparisons(arguments(*words), "kind", rows, {})


def test_commit_of_a_checkout_that_is_no_git_checkout_can_be_given(tmp_path: Path) -> None:
    public = [comparison(peer=Side("public", "public", "step", source="https://example.org/code"))]
    given = bench_pairs.given_peers(arguments("--peer", f"public={tmp_path}@abc123"), public)["public"]
    assert (given.checkout, given.commit) == (str(tmp_path.resolve()), "abc123")
    assert bench_pairs.given_peers(arguments("--peer", f"public={tmp_path}"), public)["public"].commit is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_help(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", kind, "--help"]) == 0
    assert "usage" in capsys.readouterr().out
