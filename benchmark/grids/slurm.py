"""`dualcl compare --print-slurm`: a plan as a Slurm array script, one array task per run."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dualcl.benchmark.core.devices import available_devices
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.grids.plan import Planned, needs

#: seconds before the time limit at which a run is told to save
NOTICE = 120
#: what a cluster takes in one array unless its administrator allows more (MaxArraySize)
_USUAL_ARRAY = 1001

# Slurm's own SIGTERM is that of scancel and of a pre-emption, after which Slurm requeues by itself: only the notice of
# the time limit makes the script requeue, or nobody could cancel a run
_RUN = """\
notice=
trap 'notice=1; kill -TERM "$run" 2>/dev/null' USR1
trap 'kill -TERM "$run" 2>/dev/null' TERM
"${command[@]}" &
run=$!
wait "$run"
code=$?
# a signal ends `wait`, not the run
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    code=$?
done
if [ -n "$notice" ] && [ "$code" -eq 130 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
"""


def parse_options(texts: Iterable[str]) -> dict[str, str]:
    """`partition=gpu` or `exclusive` -> sbatch's long options by name; UserError for anything else."""
    options = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or not value.isprintable():
            raise UserError(f"--slurm-option wants a long option of sbatch, as partition=gpu; got {text!r}")
        options[key] = value
    return options


def array_script(plan: Sequence[Planned], out: str, options: Iterable[str] = ()) -> str:
    """The script: `sbatch` takes it as it is. `out` is the grid's folder or URL; nodes have GPUs if this one has.

    Every run asks for as much as the one that declares most. UserError for an option that sbatch could not read.
    """
    if not out.isprintable():  # it stands in a comment
        raise UserError(f"--out {out!r} has control characters; choose another one")
    cuda = available_devices()[0].startswith("cuda")
    asked = [needs(planned, cuda=cuda) for planned in plan]
    gpus, memory = math.ceil(max(n.gpus for n in asked)), max(n.memory_gib or 0 for n in asked)
    chosen = {
        "job-name": f"dualcl-{plan[0].resolved.preset}",
        "array": f"0-{len(plan) - 1}",
        "cpus-per-task": str(max(n.cpus for n in asked)),
        **({"gres": f"gpu:{gpus}"} if gpus else {}),
        **({"mem": f"{math.ceil(memory * 1024)}M"} if memory else {}),
        "requeue": "",
        "open-mode": "append",
        "signal": f"B:USR1@{NOTICE}",
        **parse_options(options),
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{k}{'=' + shlex.quote(v) if v else ''}" for k, v in chosen.items())]
    if len(plan) > _USUAL_ARRAY:
        lines.append(f"# {len(plan)} array tasks: more than {_USUAL_ARRAY} need a MaxArraySize above Slurm's default")
    lines += [
        "",
        f"cd {shlex.quote(os.getcwd())} || exit 2",
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for i, (planned, n) in enumerate(zip(plan, asked, strict=True)):
        sets = [f"threads={n.cpus}"] if planned.resolved.general.threads is None else []
        command = ["dualcl", *planned.arguments(*sets), "--quiet", "--wait"]
        lines.append(f"{i}) command=({shlex.join(command)}) ;;")
    lines += [
        '*) echo "no run has the number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;',
        "esac",
        "",
        _RUN.rstrip(),
        "",
        f"# how it goes: dualcl status {shlex.quote(out)}",
        f"# when all is done: dualcl report {shlex.quote(out)}",
    ]
    return "\n".join(lines) + "\n"
