"""Bars: lines where nothing can be written over, and one line that moves where it can."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import threading

import pytest

from dualcl.benchmark.core.bar import Bar

MIB = 1 << 20


class Now(Bar):
    """Seen at once."""

    wait = 0.0


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def lines_of(text: str) -> list[str]:
    """Lines, of which none moves the cursor."""
    assert all(line.isprintable() for line in text.splitlines())
    return text.splitlines()


def test_bytes_are_told_in_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("data.bin", 4 * MIB, "MiB", MIB, interval=0) as bar:
        bar.update(MIB)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"data\.bin: 1 of 4 MiB \(25%\), ETA 0s, \d+\.\d MiB/s", lines_of(err)[-1])


def test_things_and_an_unknown_total() -> None:
    stream = io.StringIO()
    with Bar("checking", 10, "images", file=stream, interval=0) as bar:
        bar.update(5)
    with Bar("page.html", None, "MiB", MIB, file=stream, interval=0) as bar:
        bar.update(3 * MIB)
    assert lines_of(stream.getvalue())[1].startswith("checking: 5 of 10 images (50%), ETA ")
    assert re.fullmatch(r"page\.html: 3 MiB, \d+\.\d MiB/s", lines_of(stream.getvalue())[-1])


def test_what_goes_on_is_counted_from_where_it_began() -> None:
    stream = io.StringIO()
    with Bar("data.bin", 1000, "images", initial=900, file=stream, interval=0) as bar:
        bar.start_t -= 10
        bar.update(10)
    first, last = lines_of(stream.getvalue())
    assert first.startswith("data.bin: 900 of 1000 images (90%), 0.0 images/s")
    assert last == "data.bin: 910 of 1000 images (91%), ETA 1m30s, 1.0 images/s"


def test_what_is_done_in_a_moment_says_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Bar("quick", 1, "images", file=stream) as bar:
            bar.update()
        assert stream.getvalue() == ""


def test_a_terminal_gets_one_line_that_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    stream = Terminal()
    with Now("a name that is far too long for so narrow a line, by any measure", 2, "images", file=stream) as bar:
        bar.update(2)
        bar.refresh()
    shown = stream.getvalue().split("\r")
    assert "\n" not in stream.getvalue()
    assert all(len(frame) < 70 for frame in shown)
    assert shown[1].startswith("a name that is far")
    assert "██" in shown[-3]
    assert "2 of 2 images (100%)" in shown[-3]
    assert (shown[-2].strip(), shown[-1]) == ("", "")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Bar("checking", 2, "images", file=stream, interval=0) as bar:
        bar.update()
    assert lines_of(stream.getvalue())[-1].startswith("checking: 1 of 2 images (50%), ")


def test_no_thread_is_started_and_a_forked_process_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    before = threading.active_count()
    with Now("checking", 2, "images", file=Terminal()) as bar:
        assert threading.active_count() == before
        if (child := os.fork()) == 0:
            bar.update()
            bar.close()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_on_a_real_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, Now("checking", 4, "images", file=stream) as bar:
        bar.update(1)
        bar.refresh()
        shown = b""  # in pieces, as they come
        while b"(25%)" not in shown and select.select([ours], [], [], 10)[0]:
            shown += os.read(ours, 4096)
    os.close(ours)
    assert "1 of 4 images (25%)" in shown.decode()
    assert "█" in shown.decode()
