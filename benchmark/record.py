"""Run folders: the record, the log and the checkpoints, written so that a kill at any moment loses nothing recorded."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from dualcl.benchmark.errors import UserError
from dualcl.results.records import VERSION, load_record

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "record.json"


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name only when it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def as_json(value: Any) -> Any:
    """`value` as it comes back from a JSON file (tuples as lists), for comparing with one."""
    return json.loads(json.dumps(value))


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically. NaN is an error: JSON has none."""
    with atomic_write(path) as handle:
        handle.write(json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def _checksum(blob: bytes, state: Mapping[str, Any]) -> str:
    return hashlib.sha256(blob + json.dumps(state, sort_keys=True).encode()).hexdigest()


class RunFolder:
    """One run on disk: config.yaml, record.json, log.jsonl, checkpoints/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log: IO[str] | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and holds it; UserError when it cannot be written or another process has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / ".lock", "w")  # noqa: SIM115 - held for the whole run
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; choose another --out") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{self.path} is in use by another dualcl process; wait for it or choose another --out"
                ) from None
            for litter in self.path.glob(".*.part"):  # of a killed process: this one holds the folder
                litter.unlink()
            try:
                yield
            finally:
                self.close()

    def close(self) -> None:
        """Closes the log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def read_record(self) -> dict[str, Any] | None:
        """The record, or None when there is none yet."""
        path = self.path / RECORD
        return load_record(path).data if path.exists() else None

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replaces the record."""
        write_json(self.path / RECORD, record)

    def write_config(self, tree: Mapping[str, Any]) -> None:
        """Writes the resolved configuration."""
        with atomic_write(self.path / "config.yaml") as handle:
            handle.write(yaml.safe_dump(dict(tree), sort_keys=False).encode())

    # --- log ---------------------------------------------------------------------------------------------------------

    def open_log(self, task: int, step: int) -> None:
        """Opens log.jsonl for appending after dropping lines at or beyond (task, step), which will be written again."""
        self.close()
        path = self.path / "log.jsonl"
        kept: list[str] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # a line cut by a kill; nothing valid follows
                if (entry["task"], entry["step"]) < (task, step):
                    kept.append(line)
        with atomic_write(path) as handle:
            handle.write("".join(f"{line}\n" for line in kept).encode())
        self._log = open(path, "a", encoding="utf-8")  # noqa: SIM115 - `close` closes it

    def log(self, **entry: Any) -> None:
        """Appends one line."""
        if self._log is not None:
            self._log.write(json.dumps(entry) + "\n")
            self._log.flush()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def save_checkpoint(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes checkpoints/<name>: safetensors with their checksum, and a JSON state; replaces an older one."""
        from safetensors.torch import save

        target, partial = self.checkpoints / name, self.checkpoints / f".{name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        blob = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        with atomic_write(partial / "state.safetensors") as handle:
            handle.write(blob)
        write_json(partial / "state.json", {**state, "sha256": _checksum(blob, state)})
        aside = self.checkpoints / f".{name}.old"
        if target.exists():
            # a directory cannot be replaced in one step: the old one steps aside, and readers look there too
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(target, aside)
        os.replace(partial, target)
        shutil.rmtree(aside, ignore_errors=True)

    def load_checkpoint(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, state) of checkpoints/<name>, None when there is none; UserError when it is damaged."""
        from safetensors.torch import load

        folder = self.checkpoints / name
        if not folder.exists():
            folder = self.checkpoints / f".{name}.old"
            if not folder.exists():
                return None
        try:
            state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if not isinstance(state, dict):
                raise ValueError("state.json is no JSON object")
            wanted = state.pop("sha256", None)
            blob = (folder / "state.safetensors").read_bytes()
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoint {folder} cannot be read ({error}); delete that folder to go on from the one before"
            ) from None
        if _checksum(blob, state) != wanted:
            raise UserError(
                f"checkpoint {folder} is damaged (checksum differs); delete {folder} to go on "
                "from the one before, or the run folder to start afresh"
            )
        return load(blob), state

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
        "tasks": [],
        "matrix": {"kind": kind, "rows": []},
        "measured": {"tasks": [], "wall_seconds": 0.0},
        "created": now(),
        "finished": None,
    }
