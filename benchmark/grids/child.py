"""A run as a child process: a crash of a run takes nothing else with it, and the end of its parent ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

#: a terminated child may still be writing a checkpoint
GRACE_SECONDS = 60.0
#: `python -m` would put the working directory on sys.path: a checkout's folder datasets/ hides Hugging Face's there
_CODE = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; "
    "from dualcl.benchmark.cli.child import main; sys.exit(main())"
)


class Child:
    """`dualcl ARGUMENTS` as a process and a session of its own, so that Ctrl-C reaches it through `stop` alone, once.

    `relay` gets every line of its stderr; `last` is the last one that says something.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        threads: int,
        relay: Callable[[str], None] | None = None,
        cwd: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        settings = {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": str(threads)}
        self.last = ""
        self._asked = False
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            cwd=cwd,
            env={**os.environ, **(environment or {}), **settings},
            start_new_session=True,
        )
        assert self.process.stderr is not None
        self._listener = threading.Thread(target=self._listen, args=(self.process.stderr, relay), daemon=True)
        self._listener.start()

    def _listen(self, stderr: IO[str], relay: Callable[[str], None] | None) -> None:
        for line in stderr:
            self.last = line.strip() or self.last
            if relay is not None:
                relay(line.rstrip())

    def wait(self) -> int:
        """Its exit code; negative: the signal that killed it. An interrupt is noticed while it waits."""
        while self.process.poll() is None:
            time.sleep(0.05)
        # a worker process that outlives the child may keep the pipe open
        self._listener.join(timeout=5)
        return self.process.returncode

    def ask(self) -> None:
        """Asks it to checkpoint and end; once, as a second signal would not let it finish its step."""
        if not self._asked:
            self._asked = True
            self.process.terminate()

    def stop(self) -> None:
        """Asks it to end and waits for that; after GRACE_SECONDS it is killed."""
        self.ask()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
