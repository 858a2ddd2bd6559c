"""Run folders at URLs: whole after a fault at any write, resumable elsewhere, and never two writers' mixture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import RunFailed, UserError
from dualcl.benchmark.core.files import write_json
from dualcl.benchmark.runs import mirror
from dualcl.benchmark.runs.folder import MirroredFolder
from dualcl.benchmark.runs.mirror import REMOTE, Mirror, local_copy, pull_records
from dualcl.benchmark.runs.runner import run
from dualcl.results.records import comparable, load_record


class Failing(MemoryFileSystem):
    """`memory://` under the name `failing://` that breaks amid its n-th write, and from then on at every one."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012 - as MemoryFileSystem's
    pseudo_dirs = [""]  # noqa: RUF012
    left: int | None = None
    error: type[BaseException] = OSError
    writes = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("failing://"))

    def _count(self) -> bool:
        Failing.writes += 1
        return Failing.left is not None and Failing.writes > Failing.left

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        broken = self._count()
        super().pipe_file(path, value[: len(value) // 2] if broken else value, **kwargs)
        if broken:
            raise Failing.error(f"cut while writing {path}")

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        if self._count():
            super().pipe_file(rpath, Path(lpath).read_bytes()[:5])
            raise Failing.error(f"cut while writing {rpath}")
        super().put_file(lpath, rpath, *args, **kwargs)

    def rm_file(self, path: str) -> None:
        if self._count():
            raise Failing.error(f"cannot remove {path}")
        super().rm_file(path)


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new place on a file system that can fail."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(mirror, "_AGAIN", (0.0,))
    Failing.store.clear()
    Failing.pseudo_dirs[:] = [""]
    Failing.left, Failing.writes, Failing.error = None, 0, OSError
    yield "failing://bucket/run"
    Failing.store.clear()


def fill(folder: Path, files: dict[str, str]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


FIRST = {"record.json": "one", "log.jsonl": "a", "checkpoints/task_0/state.json": "0", "config.yaml": "same"}
SECOND = {"record.json": "two", "log.jsonl": "ab", "checkpoints/task_1/state.json": "1", "config.yaml": "same"}


def pulled(url: str, folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    Mirror(url, folder).pull()
    return content(folder)


def with_changes_and_a_fault(url: str, here: Path, n: int) -> Mirror:
    """A writer whose first state is at the URL, with a second one to push, and a fault after n more writes."""
    Failing.store.clear()
    Failing.left = None
    writer = Mirror(url, fill(here, FIRST))
    writer.push()
    Failing.writes, Failing.left = 0, n
    fill(here, SECOND)
    return writer


def test_a_fault_at_any_write_leaves_one_of_the_two_states(url: str, tmp_path: Path) -> None:
    seen = []
    for n in range(20):
        writer = with_changes_and_a_fault(url, tmp_path / "here", n)
        try:
            writer.push(tidy=True)
            whole = True
        except OSError:
            whole = False
        Failing.left = None
        shutil.rmtree(tmp_path / "there", ignore_errors=True)
        found = pulled(url, tmp_path / "there")
        assert found in (FIRST, SECOND)
        seen.append(found == SECOND)
        if whole:
            break
        # the writer goes on, or another one starts from what it finds: both end well and leave nothing else
        writer.push(tidy=True)
        assert pulled(url, tmp_path / "there") == SECOND
        assert len(Failing.store) == len(SECOND) + 1
    assert whole
    assert seen == sorted(seen)  # the change happens at one write
    assert (seen[0], seen[-1], len(seen)) == (False, True, 9)


def test_a_new_writer_goes_on_after_a_fault_at_any_write(url: str, tmp_path: Path) -> None:
    for n in range(8):
        writer = with_changes_and_a_fault(url, tmp_path / "here", n)
        with pytest.raises(OSError, match="c"):
            writer.push(tidy=True)
        Failing.left = None
        shutil.rmtree(tmp_path / "there", ignore_errors=True)
        (tmp_path / "there").mkdir()
        other = Mirror(url, tmp_path / "there")
        other.pull()
        fill(tmp_path / "there", {**SECOND, "log.jsonl": "abc"})
        other.push(tidy=True)
        assert len(Failing.store) == len(SECOND) + 1
        assert pulled(url, tmp_path / "third")["log.jsonl"] == "abc"
        shutil.rmtree(tmp_path / "third")
        # and the first one, should it still be alive, ends without touching what is there
        before = dict(Failing.store)
        fill(tmp_path / "here", {**SECOND, "log.jsonl": "late"})
        with pytest.raises(UserError, match="has written to failing://bucket/run since"):
            writer.push()
        assert before.items() <= Failing.store.items()
        assert pulled(url, tmp_path / "third")["log.jsonl"] == "abc"
        shutil.rmtree(tmp_path / "third")


def test_damage_is_named_and_nothing_leaves_the_folder(url: str, tmp_path: Path) -> None:
    Mirror(url, fill(tmp_path / "here", FIRST)).push()
    (stored,) = (name for name in Failing.store if "record.json." in name)
    Failing.store[stored].seek(0)
    Failing.store[stored].write(b"0")
    with pytest.raises(UserError, match=r"failing://bucket/run/record\.json\.\w+ is damaged"):
        pulled(url, tmp_path / "there")
    del Failing.store[stored]
    with pytest.raises(UserError, match=r"record\.json\.\w+ is missing"):
        pulled(url, tmp_path / "there")
    for name in ("../x", "/x", "a/../../x", ".lock", "a//b", "a\\b"):
        evil = mirror.Manifest(9, "0" * 8, "h", 0.0, {name: "0" * 64})
        Failing().pipe_file(f"bucket/run/{evil.name}", evil.encode())
        with pytest.raises(UserError, match="which is none of a run"):
            pulled(url, tmp_path / "there")
    with pytest.raises(UserError, match="cannot open nosuch://x"):
        Mirror("nosuch://x", tmp_path)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """elsewhere() -> from now on another machine: its scratch folders are empty."""
    count = iter(range(100))

    def move() -> None:
        monkeypatch.setenv("DUALCL_CACHE", str(tmp_path / f"cache{next(count)}"))

    move()
    return move


def test_a_killed_run_goes_on_on_another_machine_and_ends_the_same(
    url: str, tiny: Callable[..., Any], tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    sets = ("train.checkpoint_seconds=0", "train.log_every=1", "threads=1")
    run(tiny("ewc", *sets), tmp_path / "undisturbed")
    wanted = comparable(load_record(tmp_path / "undisturbed"))
    run(tiny("ewc", *sets), MirroredFolder(url))
    total = Failing.writes
    assert comparable(load_record(pulled_to(url, tmp_path / "whole"))) == wanted

    class Killed(BaseException):
        """Not to be caught, as a kill is not."""

    for n in (total // 3, total - 3):
        Failing.store.clear()
        elsewhere()
        Failing.writes, Failing.left, Failing.error = 0, n, Killed
        with pytest.raises(Killed):
            run(tiny("ewc", *sets), MirroredFolder(url))
        Failing.left = None
        elsewhere()
        run(tiny("ewc", *sets), MirroredFolder(url))
        assert comparable(load_record(pulled_to(url, tmp_path / f"after{n}"))) == wanted
        assert not [name for name in Failing.store if "partial" in name]


def pulled_to(url: str, folder: Path) -> Path:
    folder.mkdir()
    Mirror(url, folder).pull()
    return folder


def test_a_run_outlasts_a_place_that_fails_for_a_while_and_says_so_when_it_stays_away(
    url: str,
    tiny: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    elsewhere: Callable[[], None],
    tmp_path: Path,
) -> None:
    Failing.left = 3
    with pytest.raises(RunFailed, match=r"all is kept in .*the same command on this machine writes it"):
        run(tiny("ncm"), MirroredFolder(url))
    assert "cannot write to failing://bucket/run now (OSError: c" in capsys.readouterr().err
    assert load_record(local_copy(url)).finished
    Failing.left = None
    run(tiny("ncm"), MirroredFolder(url))
    assert load_record(pulled_to(url, tmp_path / "there")).finished


def test_the_command_line_takes_urls(
    tiny_preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], elsewhere: Callable[[], None]
) -> None:
    place = f"file://{tmp_path}/grid"
    sets = ["--set", "threads=1"]
    command = ["compare", tiny_preset, "--methods", "ncm,finetune", "--out", place, "--format", "md", "--quiet", *sets]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "finetune" in first
    assert not list(local_copy(f"{place}/ncm-seed0").parent.iterdir())  # what is at the URL is not kept twice
    assert (tmp_path / "grid" / "report" / "table.md").is_file()
    elsewhere()
    assert main(["status", place, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"finished": 2}
    assert main(["report", place, "--format", "md"]) == 0
    assert "finetune" in capsys.readouterr().out
    assert main(["report", place]) == 2
    assert "needs --out DIR" in capsys.readouterr().err
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "grid").rglob("manifest-*")}
    assert main(command) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "grid").rglob("manifest-*")} == before
    assert main(["sweep", tiny_preset, "ewc", "--out", place]) == 2
    assert "wants a folder, not a URL" in capsys.readouterr().err


def test_the_state_of_a_run_at_a_url_is_that_of_its_last_write(
    url: str, tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    from dualcl.benchmark.grids.survey import Survey
    from dualcl.benchmark.runs.folder import new_record

    facts = {"preset": "p", "domain": "d", "method": "m", "seed": 0, "n_tasks": 2, "joint": False, "label": "m"}
    write_json(tmp_path / "here" / "record.json", new_record(facts, {}))
    Mirror(f"{url}/m-seed0", tmp_path / "here").push()
    folder = pull_records(url)
    (state,) = Survey([folder]).look()
    assert (state.state, bool(state.host)) == ("running", True)
    write_json(folder / "m-seed0" / REMOTE, {"host": "h", "written": 1.0})
    assert Survey([folder]).look()[0].state == "stale"
