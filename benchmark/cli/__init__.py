"""The command line: `dualcl`. Tables and lists go to stdout, everything else to stderr.

Exit codes: 0 done, 1 a run failed, 2 the user's input, 130 interrupted (the same command resumes). A command's file is
imported when it is asked for; one of them is called `list`, so no built-in `list` is used here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

from dualcl.benchmark.cli.options import COMMANDS, build_parser, expand_sets
from dualcl.benchmark.core.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER,
    RunFailed,
    UserError,
    describe_os_error,
    nearest,
)
from dualcl.benchmark.core.imports import import_large
from dualcl.benchmark.core.machine import follower, launched
from dualcl.benchmark.core.text import printable, say


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless it is ignored (nohup), stop like Ctrl-C: after the current step, resumable."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            old[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _silence_stdout() -> None:
    """Sends what is still buffered for a stdout that takes no more to nowhere, or Python complains at its exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: Sequence[str]) -> int:
    word, second = [*(a for a in argv if not a.startswith("-")), "", ""][:2]
    if word and word not in COMMANDS:
        raise UserError(f"unknown command {word!r}; {nearest(word, COMMANDS, 'commands')}")
    args = build_parser(word, second).parse_args(expand_sets(argv))
    if args.command != "run" and launched() > 1:
        raise UserError(f"a launcher started {launched()} processes; they share one `dualcl run`, not {args.command}")
    try:
        code: int = import_large(f"{__name__}.{args.command}").main(args)
        sys.stdout.flush()
        return code
    except OSError as error:
        # writing to an open file tells no name: say at least which folder was being filled
        if error.filename is None and not isinstance(error, BrokenPipeError):
            error.filename = str(getattr(args, "place", "standard output"))
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dualcl` with these arguments (default: the process's); returns the exit code."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    with contextlib.suppress(AttributeError):  # names that are no UTF-8 must not stop a table; not all streams can
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    error: BaseException
    try:
        with _stop_signals():
            return _dispatch(words)
    except SystemExit as stop:  # argparse: --help, --version, wrong usage
        return stop.code if isinstance(stop.code, int) else EXIT_USER
    except KeyboardInterrupt as interrupt:
        resumes = bool({"run", "compare", "sweep", "quickstart"} & set(words[:1]))
        error, code = interrupt, EXIT_INTERRUPTED
        text = "interrupted; the same command resumes" if resumes else "interrupted"
    except UserError as wrong:
        error, code, text = wrong, EXIT_USER, f"error: {wrong}"
    except RunFailed as failed:
        error, code, text = failed, EXIT_FAILED, f"run failed: {failed}"
    except BrokenPipeError:  # `dualcl list | head -1`
        _silence_stdout()
        return 0
    except OSError as broken:
        _silence_stdout()
        error, code, text = broken, EXIT_USER, f"error: {describe_os_error(broken, '?')}"
    if "--debug" in words:
        traceback.print_exception(error)
    say(f"dualcl: {f'process {follower()}: ' if follower() else ''}{printable(text)}")
    return code
