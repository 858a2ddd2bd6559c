"""Run folders: the record, the log and the checkpoints, written so that a kill at any moment loses nothing recorded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import Growing, _checksum, atomic_write, now, sync_folder, write_json
from dualcl.benchmark.core.lock import hold
from dualcl.benchmark.core.reading import read_json
from dualcl.benchmark.runs.mirror import Mirror, is_url, local_copy, talking_to
from dualcl.results.records import VERSION, load_record, record_checksum

RECORD = "record.json"
#: name of the checkpoint inside a task
PARTIAL = "partial"


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read, or whose checksum differs."""


class RunFolder:
    """One run on disk: config.yaml, record.json, log.jsonl, checkpoints/."""

    def __init__(self, path: Path, *, patient: bool = False) -> None:
        self.path = path
        #: waits for another process that has the folder, instead of refusing
        self.patient = patient
        self._log: IO[str] | None = None
        #: over the lines of the log so far; None where none was opened
        self._logged: hashlib._Hash | None = None
        #: no line of the open log is of a later (task, step)
        self._last = (-1, -1)
        #: checkpoint -> checksum of the log when it was written
        self._logged_at: dict[str, str] = {}
        #: configuration and data of the run, hashed
        self._owner: str | None = None

    def bind(self, record: Mapping[str, Any]) -> None:
        """Ties checkpoints to the configuration and the data of `record`: those of other ones are refused."""
        tied = json.dumps([record["config_hash"], record["identity"]], sort_keys=True)
        self._owner = hashlib.sha256(tied.encode()).hexdigest()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and holds it; UserError when it cannot be written or another process has it."""
        with hold(self.path, patient=self.patient):
            # of a killed process: this one holds the folder
            for litter in (*self.path.glob(".*.part"), *(self.path / "samples").rglob(".*.part")):
                litter.unlink()
            try:
                yield
            finally:
                self.close()

    def close(self) -> None:
        """Closes the log."""
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def read_record(self) -> dict[str, Any] | None:
        """The record, or None when there is none yet."""
        path = self.path / RECORD
        return load_record(path).data if path.exists() else None

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replaces the record."""
        write_json(self.path / RECORD, {**record, "sha256": record_checksum(record)})
        sync_folder(self.path)

    def write_config(self, tree: Mapping[str, Any]) -> None:
        """Writes the resolved configuration."""
        with atomic_write(self.path / "config.yaml") as handle:
            handle.write(yaml.safe_dump(dict(tree), sort_keys=False).encode())

    # --- log ---------------------------------------------------------------------------------------------------------

    def open_log(self, task: int, step: int) -> None:
        """Opens log.jsonl for appending after dropping lines at or beyond (task, step), which will be written again.

        UserError when the lines before are not those that the checkpoint at (task, step) knew.
        """
        path = self.path / "log.jsonl"
        if self._log is not None and self._last < (task, step) and path.exists():
            return  # all lines are of before
        self.close()
        kept: list[bytes] = []
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    if (entry["task"], entry["step"]) < (task, step):
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError):
                    break  # a line cut by a kill; nothing valid follows
        self._logged = hashlib.sha256(b"".join(kept))
        known = self._logged_at.get(PARTIAL if step else f"task_{task - 1}")
        if path.exists() and known not in (None, self._logged.hexdigest()):
            raise UserError(
                f"{path} is damaged: its lines before task {task + 1}, step {step} are not those that were written; "
                "put it back, or delete it to go on without them"
            )
        with atomic_write(path) as handle:
            handle.write(b"".join(kept))
        self._log = open(path, "a", encoding="utf-8")  # noqa: SIM115 - `close` closes it
        self._last = task, step - 1

    def log(self, **entry: Any) -> None:
        """Appends one line."""
        if self._log is not None and self._logged is not None:
            line = json.dumps(entry) + "\n"
            self._log.write(line)
            self._log.flush()
            self._logged.update(line.encode())
            self._last = entry["task"], entry["step"]

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def save_checkpoint(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes checkpoints/<name>: safetensors with their checksum, and a JSON state; replaces an older one."""
        target, partial = self.checkpoints / name, self.checkpoints / f".{name}.part"
        if self._log is not None:
            os.fsync(self._log.fileno())  # lines that the checkpoint is past are not written again
        own = {"run": self._owner, "log": None if self._logged is None else self._logged.hexdigest()}
        state = {**state, **{k: v for k, v in own.items() if v is not None}}
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        blob = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        with atomic_write(partial / "state.safetensors") as handle:
            handle.write(blob)
        write_json(partial / "state.json", {**state, "sha256": _checksum(blob, state)})
        sync_folder(partial)
        aside = self.checkpoints / f".{name}.old"
        if target.exists():
            # a directory cannot be replaced in one step: the old one steps aside, and readers look there too
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(target, aside)
        os.replace(partial, target)
        sync_folder(self.checkpoints)  # before anything that it replaces goes
        shutil.rmtree(aside, ignore_errors=True)

    def load_checkpoint(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, state) of checkpoints/<name>, None when there is none.

        Raises DamagedCheckpoint, and UserError when it is one of a run with other data or another configuration.
        """
        folder = self.checkpoints / name
        if not folder.exists():
            folder = self.checkpoints / f".{name}.old"
            if not folder.exists():
                return None
        mend = f"delete {folder} to go on from the checkpoint before it, or from the start where there is none"
        try:
            state: dict[str, Any] = read_json(folder / "state.json")
            if not isinstance(state, dict):
                raise ValueError("state.json is no JSON object")
            wanted = state.pop("sha256", None)
            blob = (folder / "state.safetensors").read_bytes()
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"checkpoint {folder} cannot be read ({error}); {mend}") from None
        if _checksum(blob, state) != wanted:
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged (checksum differs); {mend}")
        owner = state.pop("run", None)
        if None not in (owner, self._owner) and owner != self._owner:
            raise UserError(
                f"checkpoint {folder} is of a run with another configuration or other data; "
                f"choose another --out, or delete {self.checkpoints} to start afresh"
            )
        if (logged := state.pop("log", None)) is not None:
            self._logged_at[name] = str(logged)
        try:
            return load(blob), state
        except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
            raise DamagedCheckpoint(f"checkpoint {folder} holds no safetensors ({error}); {mend}") from None

    def finished_tasks(self) -> list[int]:
        """Tasks with a checkpoint, ascending."""
        names = (p.name.removeprefix(".").removesuffix(".old") for p in self.checkpoints.glob("*task_*"))
        return sorted({int(n.removeprefix("task_")) for n in names if n.removeprefix("task_").isdigit()})

    def keep_only(self, *names: str) -> None:
        """Removes all checkpoints but these, and what killed processes left; a kill in between does no harm."""
        kept = {name if (self.checkpoints / name).exists() else f".{name}.old" for name in names}
        for folder in sorted(self.checkpoints.glob("*")):
            if folder.name in kept:
                continue
            gone = folder
            if not folder.name.endswith(".gone"):
                # files go one by one: half a folder under its own name would be taken for a damaged checkpoint
                gone = folder.with_name(f".{folder.name}.gone")
                os.replace(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)


class Spectator(RunFolder):
    """A run folder as the other processes of a run have it: they leave it alone."""

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Left to the main process, as all else here."""

    def write_config(self, tree: Mapping[str, Any]) -> None:
        """Nothing."""

    def open_log(self, task: int, step: int) -> None:
        """Nothing."""

    def save_checkpoint(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Nothing."""

    def keep_only(self, *names: str) -> None:
        """Nothing."""


class MirroredFolder(RunFolder):
    """A run folder whose files go to a URL after every checkpoint and record."""

    def __init__(self, url: str, *, patient: bool = False) -> None:
        super().__init__(local_copy(url), patient=patient)
        self.mirror = Mirror(url, self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the local copy, which is pulled first and pushed in the end.

        Raises RunFailed when the last push fails: the same command on this machine makes up for it.
        """
        with super().locked():
            with talking_to(self.mirror.url):
                self.mirror.pull()
            try:
                yield
            finally:
                self.mirror.push_at_last()

    def save_checkpoint(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """As RunFolder's, and pushes."""
        super().save_checkpoint(name, tensors, state)
        self.mirror.push_if_possible()

    def write_record(self, record: Mapping[str, Any]) -> None:
        """As RunFolder's, and pushes."""
        super().write_record(record)
        self.mirror.push_if_possible()


def run_folder(place: str | Path, *, patient: bool = False) -> RunFolder:
    """The run folder at a path or a URL."""
    if is_url(place):
        return MirroredFolder(str(place), patient=patient)
    return RunFolder(Path(place), patient=patient)


def discard(folder: RunFolder) -> None:
    """Removes the local copy of a run that is finished at its URL; any other folder stays."""
    if isinstance(folder, MirroredFolder):
        shutil.rmtree(folder.path, ignore_errors=True)


def new_record(
    run: Mapping[str, Any], config: Mapping[str, Any], kind: str = "accuracy", **parts: Any
) -> dict[str, Any]:
    """An empty record of the current version."""
    return {
        "format": "dualcl-record",
        "version": VERSION,
        "status": "running",
        "error": None,
        "run": dict(run),
        "config": dict(config),
        **parts,
        "tasks": Growing(),
        "matrix": {"kind": kind, "rows": Growing()},
        "measured": {"tasks": Growing(), "wall_seconds": 0.0},
        "created": now(),
        "finished": None,
    }
