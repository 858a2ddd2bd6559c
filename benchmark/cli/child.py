"""The command line in a child process (see grids/child.py), which ends with its parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from dualcl.benchmark import cli


def _end_with(parent: int) -> None:
    """Kills this session as soon as `parent` is gone: an orphan would go on writing where its successor works."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> int:
    """`dualcl` with the arguments that follow the parent's process number."""
    threading.Thread(target=_end_with, args=(int(sys.argv.pop(1)),), daemon=True).start()
    return cli.main()
