"""Coverage-guided fuzzing of one target with atheris, or one input again.

python tests/fuzz/run.py TARGET [--seconds N | --runs N] [--corpus DIR]
python tests/fuzz/run.py TARGET FILE
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

NAMES = ("config", "record", "lists", "images", "tokens", "checkpoint", "card", "archive", "command")
#: more than any input needs: what takes longer is a crash
SECONDS_EACH = 20


def _replay(name: str, file: Path) -> int:
    import targets

    print("taken" if targets.run_one(name, file.read_bytes()) else "refused, as it should be")
    return 0


def _fuzz(name: str, corpus: Path, crashes: Path, flags: list[str]) -> None:
    """Does not return: libFuzzer ends the process, or the first crash does."""
    import atheris

    with atheris.instrument_imports(include=["dualcl"]):
        import targets

    for i, seed in enumerate(targets.TARGETS[name].seeds()):
        (corpus / f"seed{i}").write_bytes(seed)

    def feed(data: bytes) -> None:
        try:
            targets.run_one(name, data)
        except Exception:
            # not left to atheris, whose own alarm may end the process before the input is written
            file = crashes / f"crash-{name}-{hashlib.sha256(data).hexdigest()[:16]}"
            file.write_bytes(data)
            traceback.print_exc()
            print(f"Test unit written to {file}", file=sys.stderr, flush=True)
            os._exit(1)

    atheris.Setup([sys.argv[0], *flags, str(corpus)], feed)
    atheris.Fuzz()


def main() -> int:
    """Fuzzes in a process of its own, as libFuzzer ends it, and says in one line what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("file", nargs="?", type=Path, help="an input to feed once")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=-1, help="executions; default: as many as the seconds allow")
    parser.add_argument("--corpus", type=Path, help="keeps the inputs that reached new code for the next time")
    parser.add_argument("--crashes", type=Path, default=Path(), metavar="DIR", help="where crash inputs go")
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.file is not None:
        return _replay(args.target, args.file)
    try:
        import atheris  # noqa: F401
    except ImportError:
        print('fuzzing by coverage needs atheris; pip install "dualcl[fuzz]"', file=sys.stderr)
        return 2
    if args.inside is not None:
        _fuzz(args.target, args.corpus, args.crashes, args.inside)
    with tempfile.TemporaryDirectory() as folder:
        corpus = args.corpus or Path(folder)
        for made in (corpus, args.crashes):
            made.mkdir(parents=True, exist_ok=True)
        flags = ["-print_final_stats=1", f"-artifact_prefix={args.crashes / f'crash-{args.target}-'}", "-max_len=65536"]
        flags += [
            f"-max_total_time={args.seconds}",
            f"-runs={args.runs}",
            f"-timeout={SECONDS_EACH}",
            f"-report_slow_units={SECONDS_EACH}",
            "-rss_limit_mb=0",
        ]
        words = [sys.executable, __file__, args.target, "--corpus", str(corpus)]
        words += ["--crashes", str(args.crashes), "--inside", *flags]
        done = subprocess.run(words, stderr=subprocess.PIPE, text=True, errors="replace")
    log = done.stderr
    covered = [int(n) for n in re.findall(r"cov: (\d+)", log)]
    count = re.findall(r"(?:^#|number_of_executed_units: )(\d+)", log, flags=re.MULTILINE)
    crash = re.search(r"Test unit written to (.*)", log)
    if crash or done.returncode:
        print(log[-6000:], file=sys.stderr)
    outcome = f"crash: {crash[1]}" if crash else f"ended with {done.returncode}" if done.returncode else "no crash"
    print(
        f"{args.target}: {count[-1] if count else 0} executions, coverage {covered[0] if covered else 0} -> "
        f"{covered[-1] if covered else 0}, {outcome}"
    )
    return int(bool(crash or done.returncode))


if __name__ == "__main__":
    sys.exit(main())
