"""The one task loop. It knows neither ViT nor diffusion nor any method's name.

begin -> fit -> end -> evaluate seen tasks -> record -> checkpoint. Every random number is a function of (seed, task,
step or epoch, sample), so a killed run that is called again ends with the record of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualcl.benchmark.config.tuned import item_names
from dualcl.benchmark.core.devices import is_out_of_memory, peak_mib, pick_device, reset_peak
from dualcl.benchmark.core.domain import Domain
from dualcl.benchmark.core.errors import RunFailed, UserError
from dualcl.benchmark.core.files import Growing, as_json, now
from dualcl.benchmark.core.machine import Stopwatch, changes, continued, environment
from dualcl.benchmark.core.processes import ALONE, Processes, join
from dualcl.benchmark.core.registry import check_plugins
from dualcl.benchmark.core.seeding import derive_seed
from dualcl.benchmark.core.settings import Resolved
from dualcl.benchmark.domains import domain_class
from dualcl.benchmark.runs.content import (
    OLDER,
    check_apart,
    check_same,
    located,
    look,
    moved_keys,
    relative_places,
    unchecked,
)
from dualcl.benchmark.runs.folder import (
    PARTIAL,
    DamagedCheckpoint,
    MirroredFolder,
    RunFolder,
    Spectator,
    new_record,
)
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.step import Steps, load_optimizer, lr_factor, make_optimizer, optimizer_tensors
from dualcl.benchmark.runs.stopping import Stop
from dualcl.benchmark.runs.trackers import Trackers, tracking, without_trackers
from dualcl.datasets.reading.loader import lost_process
from dualcl.methods import method_class
from dualcl.methods.base import Method, ParamGroup

#: tensors and JSON state
Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's type and product name."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _finite(value: Any) -> bool:
    """Whether JSON can hold `value`."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Run(Steps):
    """One method on one stream with one seed, in one folder."""

    def __init__(
        self,
        resolved: Resolved,
        folder: RunFolder,
        reporter: Reporter,
        domain: Domain | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.resolved = resolved
        self.train = resolved.train
        self.folder = folder
        self.reporter = reporter
        general = resolved.general
        self.processes = processes
        self.device = processes.device or pick_device(general.device)
        if general.threads is not None:
            torch.set_num_threads(general.threads)
        cls = self.method_class()
        self.joint = cls.joint
        torch.manual_seed(derive_seed(general.seed, "build"))
        self.domain: Domain = domain or domain_class(resolved.domain)(resolved, self.device)  # type: ignore[call-arg]
        self.domain.folder = folder.path if processes.main else None
        self.domain.processes = processes
        self.domain.micro_batch_size = resolved.train.micro_batch_size
        self.n_tasks = len(self.domain.tasks)
        self.method: Method = cls(resolved.sections["method"], self.domain, self.n_tasks, general.seed)
        self.method.to(self.device)
        self.precision = general.precision
        self.scaler = self.fresh_scaler()
        self.trackers = Trackers((), folder.path, reporter.note)
        #: the record holds what the newest checkpoint does
        self.resumed = False

    def method_class(self) -> type[Method]:
        """The class of the run's method."""
        return method_class(self.resolved.method_reference)

    # --- state -------------------------------------------------------------------------------------------------------

    def begin(self, task: int) -> list[nn.Parameter]:
        """Begins a task in domain and method; returns the domain's own parameters for the optimiser, if trained."""
        shared = self.domain.begin_task(None if self.joint else task, self.method.output_scope)
        self.method.begin_task(task)
        return shared if self.method.trains_rows else []

    def groups(self, shared: list[nn.Parameter]) -> list[ParamGroup]:
        """Everything that the begun task trains: the method's own parameters, and the domain's as `begin` gave them."""
        return [*self.method.trained(), ParamGroup("outputs", shared, self.resolved.sections["method"].head_lr)]

    def tensors(self) -> dict[str, Tensor]:
        """All state that outlives a step."""
        out = {f"domain.{k}": v for k, v in self.domain.state_dict().items()}
        out.update({f"method.{k}": v for k, v in self.method.state_dict().items()})
        return out

    def restore(self, tensors: dict[str, Tensor], finished: int) -> None:
        """Restores `tensors` after the tasks it covers were begun."""
        self.domain.load_state_dict(_part(tensors, "domain."))
        self.method.load_state_dict(_part(tensors, "method."))
        self.method.restored(finished)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def execute(self, record: dict[str, Any]) -> dict[str, Any]:
        """Runs what is left of the run and returns its record."""
        stages = 1 if self.joint else self.n_tasks
        self.domain.before_tasks()
        first, partial = self._resume(record)
        if self.resolved.earlier is not None:
            before, step = self.resolved.earlier.get("environment") or {}, partial[1]["step"] if partial else 0
            left = first < stages  # else all was made before
            record["environment"] = continued(record["environment"], before, first, step) if left else before
            if (first or step) and (other := changes(record["environment"], before)):
                self.reporter.note(f"it goes on in another environment, which its record will say: {other}")
            if record["environment"] != before:
                self.folder.write_record(record)  # a kill inside a task leaves what it was made in
        self.resumed = True
        self.trackers.start(record, partial[1]["step"] if partial else 0)
        for task in range(first, stages):
            self._stage(record, task, stages, partial if task == first else None)
            partial = None
        record.update(status="finished", error=None, finished=now())
        self.folder.write_record(record)
        return record

    def _resume(self, record: dict[str, Any]) -> tuple[int, Checkpoint | None]:
        """Restores the newest checkpoint; returns the task to go on with and a mid-task checkpoint if there is one."""
        first, boundary, partial = self.processes.from_main(self._newest)
        if boundary is not None:
            tasks, matrix, measured = (boundary[1][key] for key in ("tasks", "matrix", "measured"))
            record["tasks"] = Growing(tasks)
            record["matrix"] = {**matrix, "rows": Growing(matrix["rows"])}
            record["measured"] = {**measured, "tasks": Growing(measured["tasks"])}
            for task in range(first):
                self.begin(task)
            self.restore(boundary[0], first)
        if first or partial:
            where = f"task {first + 1}" + (f", step {partial[1]['step']}" if partial else "")
            self.reporter.note(f"resuming at {where}")
        return first, partial

    def _newest(self) -> tuple[int, Checkpoint | None, Checkpoint | None]:
        """The first task that is not finished, the checkpoint before it, and one inside it."""
        done = self.folder.finished_tasks()
        try:
            partial = self.folder.load_checkpoint(PARTIAL)
        except DamagedCheckpoint as damage:  # it saves time only: the steps it covers are taken again, the same
            self.reporter.warn(f"{str(damage).partition(';')[0]}; going on from the start of its task")
            partial = None
        boundary = self.folder.load_checkpoint(f"task_{done[-1]}") if done else None
        first = done[-1] + 1 if done else 0
        if partial is not None and partial[1]["task"] != first:
            partial = None  # left over from a task that was finished since
        self.folder.keep_only(*([f"task_{done[-1]}"] if done else []), *([PARTIAL] if partial else []))
        return first, boundary, partial

    def _stage(self, record: dict[str, Any], task: int, stages: int, partial: Checkpoint | None) -> None:
        key = None if self.joint else task
        reset_peak(self.device)
        clock = Stopwatch()
        shared = self.begin(task)
        self.method.prepare(task)
        own = [p for g in self.method.trained() for p in g.params]
        trained = sum(p.numel() for p in {id(p): p for p in [*own, *shared]}.values())
        begin_seconds = clock.read()
        steps, fit = 0, {"final_loss": None, "seconds": 0.0}
        if self.method.takes_steps(task):
            name = "all tasks" if self.joint else self.domain.tasks[task].name
            steps = self.domain.steps_per_epoch(key) * self.train.epochs
            self.reporter.begin_task(key, stages, name, steps)
            fit = self._fit(task, self.groups(shared), steps, partial)
        else:
            self.reporter.begin_task(key, stages, self.domain.tasks[task].name, 0)
            trained = 0
        clock = Stopwatch()
        self.method.end_task(task)
        end_seconds = clock.read()

        clock = Stopwatch()
        seen = range(self.n_tasks) if self.joint else range(task + 1)
        row = self.domain.evaluate(seen)
        for measure, values in row.items():
            if not _finite(values):
                raise UserError(f"{measure} is not finite after task {task + 1} ({values}); it is not recorded")
        facts = {} if self.joint else self.domain.tasks[task].facts
        diagnostics = self.method.diagnostics()
        if not _finite(diagnostics):
            raise self._diverged(f"the updates are too large for a number after task {task + 1} ({diagnostics})")
        record["matrix"]["rows"].append({"after_task": seen[-1], **row})
        record["tasks"].append(
            {
                "task": key,
                "name": "all tasks" if self.joint else f"task {task + 1}",
                **facts,
                "steps": steps,
                "final_loss": fit["final_loss"],
                "parameters_trained": trained,
                "parameters_stored": self.method.stored_parameters() + self.domain.stored_parameters(),
                "diagnostics": diagnostics,
            }
        )
        eval_seconds = clock.read()
        measured = record["measured"]
        measured["tasks"].append(
            {
                "task": key,
                # all that the method does, what it does before and after its steps told apart too
                "train_seconds": begin_seconds + float(fit["seconds"] or 0.0) + end_seconds,
                "begin_seconds": begin_seconds,
                "end_seconds": end_seconds,
                "eval_seconds": eval_seconds,
                "peak_mib": peak_mib(self.device),
            }
        )
        measured["wall_seconds"] = sum(t["train_seconds"] + t["eval_seconds"] for t in measured["tasks"])
        self.trackers.task(record)  # before the checkpoint: what is told twice replaces itself, what is not is lost
        self.folder.save_checkpoint(
            f"task_{task}", self.tensors(), {k: record[k] for k in ("tasks", "matrix", "measured")}
        )
        self.folder.write_record(record)
        self.folder.keep_only(f"task_{task}")
        self.reporter.end_task(self.domain.summary(row))

    def _fit(
        self,
        task: int,
        groups: list[ParamGroup],
        steps: int,
        partial: Checkpoint | None,
    ) -> dict[str, Any]:
        """Takes the optimiser steps of one task from its start or from a mid-task checkpoint."""
        key = None if self.joint else task
        params = [p for g in groups for p in g.params]
        for p in params:
            p.grad = None
        optimizer = make_optimizer(self.train, groups, self.device) if params else None
        self.scaler = self.fresh_scaler()
        start, loss_sum, loss_count, seconds = 0, 0.0, 0, 0.0
        if partial is not None:
            tensors, state = partial
            self.restore(tensors, task)
            if optimizer is not None:
                load_optimizer(optimizer, tensors)
            if state.get("scaler"):
                self.scaler.load_state_dict(state["scaler"])
            start, loss_sum, loss_count = state["step"], state["loss_sum"], state["loss_count"]
            seconds = state["seconds"]
        per_epoch = steps // self.train.epochs
        self.folder.open_log(task, start)
        clock, saved = Stopwatch(), 0.0
        with Stop() as stop:
            for step, batch in enumerate(self.domain.batches(key, start), start=start):
                torch.manual_seed(derive_seed(self.resolved.general.seed, "step", task, step))
                if step % per_epoch == 0:
                    loss_sum, loss_count = 0.0, 0
                factor = lr_factor(self.train, step, per_epoch)
                ended, where = (step + 1) % per_epoch == 0, f"task {task + 1}, step {step}"
                value, penalty = self.step(batch, optimizer, factor, where, ended)
                if optimizer is not None and step % self.train.log_every == 0:
                    entry = {
                        "task": task,
                        "step": step,
                        "epoch": step // per_epoch,
                        "loss": value,
                        "penalty": 0.0 if penalty is None else penalty.item(),
                        "lr_factor": factor,
                    }
                    self.folder.log(**entry)
                    self.trackers.log(entry)
                loss_sum, loss_count = loss_sum + value, loss_count + 1
                self.reporter.step(step + 1, value)
                stopping = self.processes.any(stop.requested)
                due = clock.read() - saved >= self.train.checkpoint_seconds and step + 1 < steps
                if due or stopping:
                    extra = {} if optimizer is None else optimizer_tensors(optimizer)
                    self.folder.save_checkpoint(
                        PARTIAL,
                        {**self.tensors(), **extra},
                        {
                            "task": task,
                            "step": step + 1,
                            "loss_sum": loss_sum,
                            "loss_count": loss_count,
                            "scaler": self.scaler.state_dict(),
                            "seconds": seconds + clock.read(),
                        },
                    )
                    saved = clock.read()
                if stopping:
                    raise KeyboardInterrupt
        self.processes.check_equal(params, f"the weights after task {task + 1}")
        # the loss of the last step is from before its update
        if not all(bool(torch.isfinite(p).all()) for p in params):
            raise self._diverged(f"a weight is not finite after task {task + 1}, step {steps - 1}")
        return {
            "final_loss": loss_sum / loss_count if loss_count else None,
            "seconds": seconds + clock.read(),
        }


def check_capabilities(resolved: Resolved) -> None:
    """UserError for a method that requires what its domain does not offer."""
    requires = method_class(resolved.method_reference).requires
    lacking = [c for c in requires if c not in domain_class(resolved.domain).capabilities]
    if lacking:
        raise UserError(
            f"method {resolved.method} needs {', '.join(lacking)}, which the domain {resolved.domain} does not offer"
        )


def _chosen_on_itself(resolved: Resolved, domain: Domain) -> list[str]:
    """The caveat of settings that a sweep chose on what the run reports; UserError unless that is allowed."""
    if resolved.check_stream is None:
        return []
    names = item_names(task.facts for task in domain.tasks)
    caveat = resolved.check_stream(domain.identity()["data"], names, domain.pictures())
    return [caveat] if caveat else []


def run(resolved: Resolved, out: str | Path | RunFolder, reporter: Reporter | None = None) -> dict[str, Any]:
    """Runs, or resumes, one method on one stream; returns the record.

    A finished run returns at once. Raises UserError for the user's mistakes (a NaN loss included) and RunFailed for
    anything else that stops a run; what was recorded before stays, and the record says why.
    """
    reporter = reporter or Reporter(quiet=True)
    given = out if isinstance(out, RunFolder) else RunFolder(Path(out))
    path = given.path
    resolved, trackers = without_trackers(resolved)
    check_capabilities(resolved)
    if not isinstance(given, MirroredFolder):
        check_apart(resolved, path)
    processes = join(resolved.general.device)
    if processes.count > 1 and resolved.train.on_oom == "split":
        raise UserError("train.on_oom=split is for one process; set train.micro_batch_size instead")
    folder = given if processes.main else Spectator(path)
    with contextlib.ExitStack() as held:

        def earlier() -> dict[str, Any] | None:
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is a file; --out must be a folder")
            held.enter_context(folder.locked())
            old = folder.read_record()
            if old is not None:
                moved_keys(old, resolved, path, "choose another --out")
                check_plugins(old["run"], resolved.plugins, f"the run in {path}", "choose another --out")
            return old

        old = processes.from_main(earlier)
        here = located(resolved, path, old)
        doubtful = False
        if old is not None and old["status"] == "finished":
            why, doubtful = processes.from_main(lambda: look(old, here, path))
            if why:
                reporter.warn(unchecked(path, why))
            if not doubtful:
                reporter.note(f"{path} is finished already")
                return old
        work = Run(dataclasses.replace(here, earlier=old), folder, reporter, processes=processes)
        if old is None:
            for line in work.domain.check_new():
                reporter.note(line)
        for task in range(1 if work.joint else work.n_tasks):
            if work.method.takes_steps(task):  # a task that is too small is found now, not after the tasks before it
                key = None if work.joint else task
                if work.method.asks_task_loss():
                    work.domain.check_loss(key, work.method.output_scope)
                work.domain.steps_per_epoch(key)
        general = resolved.general
        caveats = [*work.method.caveats(), *processes.from_main(lambda: _chosen_on_itself(resolved, work.domain))]
        lines = processes.from_main(work.domain.repeated)
        repeated = {"repeated_pictures": lines} if lines else {}
        record = new_record(
            {
                "preset": resolved.preset,
                "domain": resolved.domain,
                "method": resolved.method,
                "label": general.label or resolved.method,
                "table": resolved.table,
                "seed": general.seed,
                "n_tasks": work.n_tasks,
                "joint": work.joint,
                "caveats": caveats,
                "tuning": resolved.tuning,
                **({"tuned_on": resolved.tuned_on} if resolved.tuned_on else {}),
                **resolved.plugin_sources(),
                **({"extends": work.domain.extends} if work.domain.extends else {}),
            },
            resolved.tree(),
            work.domain.matrix_kind,
            config_hash=resolved.hash(),
            sources=resolved.sources,
            identity=as_json(
                {
                    **work.domain.identity(),
                    "epochs": resolved.train.epochs,
                    "batch_size": resolved.train.batch_size,
                    "precision": general.precision,
                }
            ),
            content=processes.from_main(work.domain.content),
            network={"parameters": work.domain.adapted_parameters(), **work.domain.facts(), **repeated},
            environment={
                **environment(),
                **({"places": places} if (places := relative_places(resolved, path, old)) else {}),
                "device": device_name(work.device),
                "threads": torch.get_num_threads(),
                **({"processes": processes.count} if processes.count > 1 else {}),
            },
        )
        if old is not None:
            check_same(old, record, path)
            if doubtful:
                reporter.note(f"{path} is finished already")
                return old
            if "content" not in old and record["content"]:
                reporter.warn(unchecked(path, OLDER))
            for moved in moved_keys(old, resolved, path, ""):
                reporter.note(f"{moved} is another place now, with the same content")
            # an earlier place or name is no other run; what began without hashes of content was not checked
            record.update({key: old[key] for key in ("created", "config_hash", "identity")})
            if "content" not in old:
                del record["content"]
        elif repeated:
            reporter.warn(f"same pictures: {'; '.join(repeated['repeated_pictures'])}")
        for note in record["network"].get("notes", ()) if processes.main else ():
            reporter.warn(note)
        folder.bind(record)
        folder.write_config(resolved.tree())
        if old is None:
            folder.write_record(record)
        if processes.main:
            work.trackers = held.enter_context(tracking(trackers, path, record, reporter.note))

        def told(status: str, error: str | None = None) -> dict[str, Any]:
            """The record of a run that stopped: what the old one says, as long as no checkpoint was taken up."""
            kept = ("tasks", "matrix", "measured", "environment")
            parts = {} if old is None or work.resumed else {key: old[key] for key in kept if key in old}
            return {**record, **parts, "status": status, "error": error}

        try:
            return work.execute(record)
        except KeyboardInterrupt:
            folder.write_record(told("interrupted"))
            raise
        except UserError as error:
            folder.write_record(told("failed", str(error)))
            raise
        except OSError:
            raise  # a full or vanished disk: nothing more can be written, what is there is complete
        except Exception as error:
            if is_out_of_memory(error):
                text = (
                    f"out of memory on {work.device}; lower eval.batch_size if it was an evaluation, else set "
                    f"train.micro_batch_size below {work.domain.micro_batch_size or resolved.train.batch_size} "
                    "(the same steps, with one more forward pass) or train.on_oom=split"
                )
                folder.write_record(told("failed", text))
                raise UserError(text) from error
            # torch notices a killed loader process by a signal, which may come while a step is computed
            lost = lost_process(error)
            if lost is not None:
                folder.write_record(told("failed", lost))
                raise UserError(lost) from error
            line = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            folder.write_record(told("failed", line))
            if processes.main:
                (path / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
            raise RunFailed(
                f"{resolved.method}, seed {general.seed}: {line} (details in {path / 'traceback.txt'})"
            ) from error
