"""Following a run in TensorBoard or Weights & Biases: a small interface, two backends, and what they are told.

The record stays the result; a tracker is told the same numbers and writes them into the run's folder. Steps are counted
over all tasks, so that a resumed run goes on where its checkpoint was. A tracker that fails is dropped with a note.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.settings import Resolved
from dualcl.results.metrics import KINDS, METRICS, run_metrics

#: names of `tracker`, and the module that each needs
NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    """What follows a run."""

    def start(self, record: Mapping[str, Any], folder: Path, step: int) -> None:
        """Begins, or goes on at `step`: what was logged from there on will be logged again. `record` as it stands."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name (`train/loss`) at a step; on the disk when it returns."""

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        """Ends with final numbers; status as in a record: finished, failed, interrupted."""


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder."""

    def start(self, record: Mapping[str, Any], folder: Path, step: int) -> None:
        """See Tracker."""
        from torch.utils.tensorboard import SummaryWriter

        # event files know no deletion: readers drop what has these steps in older files
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        if not step:
            for name in ("run", "config", "identity"):
                text = json.dumps(record[name], indent=1, ensure_ascii=False)
                self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, 0)
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases in `wandb/` of the run's folder; offline unless WANDB_MODE says otherwise."""

    def start(self, record: Mapping[str, Any], folder: Path, step: int) -> None:
        """See Tracker."""
        import wandb

        run = record["run"]
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        # the same for all sessions of a run, wherever its folder lies
        name = f"{record['config_hash']}-{''.join(filter(str.isdigit, record['created']))}"
        self._run = wandb.init(
            id=name,
            resume="allow",
            mode=mode,
            project=os.environ.get("WANDB_PROJECT", "dualcl"),
            group=run["preset"],
            name=f"{run['label']}-seed{run['seed']}",
            dir=str(folder),
            config={**record["config"], "config_hash": record["config_hash"], "identity": record["identity"]},
            settings=wandb.Settings(
                silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False
            ),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log(dict(values), step=step)

    def finish(self, status: str, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.summary.update({**values, "status": status})
        self._run.finish(exit_code=0 if status == "finished" else 1)


BACKENDS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def without_trackers(resolved: Resolved) -> tuple[Resolved, Sequence[str]]:
    """The configuration as it is recorded, which no tracker changes; and the trackers it names.

    Raises UserError for one whose extra is not installed.
    """
    names = resolved.general.tracker
    for name in names:
        if importlib.util.find_spec(NEEDS[name]) is None:
            raise UserError(f'tracker={name} needs another package: pip install "dualcl[{name}]"')
    sections = {**resolved.sections, "general": replace(resolved.general, tracker=())}
    sources = {**resolved.sources, "tracker": "default"} if resolved.sources else resolved.sources
    return replace(resolved, sections=sections, sources=sources), names


def _steps(task: Mapping[str, Any]) -> int:
    """Steps that a task counts for; one at least, so that tasks without any have a place of their own."""
    return max(int(task["steps"]), 1)


class Trackers:
    """All trackers of a run as one; none of them can stop it."""

    def __init__(self, names: Sequence[str], folder: Path, note: Callable[[str], None]) -> None:
        self._names = names
        self._active: dict[str, Tracker] = {}
        self._folder = folder
        self._note = note
        #: steps of the tasks before the current one
        self._before = 0

    def _all(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._active.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._active[name]
                why = (str(error) or type(error).__name__).splitlines()[0]
                self._note(f"tracker {name} stopped ({why}); the run and its record go on without it")

    def start(self, record: Mapping[str, Any], step: int) -> None:
        """Begins after the tasks in `record`, at `step` of the next one."""
        self._active = {name: BACKENDS[name]() for name in self._names}
        self._before = sum(map(_steps, record["tasks"]))
        self._all(lambda tracker: tracker.start(record, self._folder, self._before + step))

    def log(self, entry: Mapping[str, Any]) -> None:
        """A line of log.jsonl."""
        if self._active:
            values = {f"train/{name}": float(entry[name]) for name in ("loss", "penalty", "lr_factor")}
            self._all(lambda tracker: tracker.log(self._before + entry["step"], values))

    def task(self, record: Mapping[str, Any]) -> None:
        """The task that the record got last, at its last step."""
        task = record["tasks"][-1]
        self._before += _steps(task)
        if not self._active:
            return
        kind, row = KINDS[record["matrix"]["kind"]], record["matrix"]["rows"][-1]
        cells = kind.cells({**record["matrix"], "rows": [row]}, record["run"]["n_tasks"])[row["after_task"]] or []
        known = {f"eval/task_{j + 1}": float(value) for j, value in enumerate(cells) if value is not None}
        values = {**known, "cost/parameters_stored": float(task["parameters_stored"])}
        if known:
            values["eval/mean"] = sum(known.values()) / len(known)
        spent = record["measured"]["tasks"][-1]
        values.update({f"cost/{k}": float(v) for k, v in spent.items() if k != "task" and v is not None})
        self._all(lambda tracker: tracker.log(self._before - 1, values))

    def finish(self, record: Mapping[str, Any], status: str) -> None:
        """The end, with the metrics of a finished run."""
        found = run_metrics(record) if status == "finished" else {}
        values = {f"final/{name}": value for name in METRICS if (value := found.get(name)) is not None}
        self._all(lambda tracker: tracker.finish(status, values))
        self._active = {}


@contextlib.contextmanager
def tracking(
    names: Sequence[str], folder: Path, record: Mapping[str, Any], note: Callable[[str], None]
) -> Iterator[Trackers]:
    """The trackers of a run, to be started and told; they finish with it, however it ends."""
    trackers = Trackers(names, folder, note)
    status = "failed"
    try:
        yield trackers
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        trackers.finish(record, status)
