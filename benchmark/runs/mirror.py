"""Run folders at a URL (s3://, gs://, sftp://, file://, ... through fsspec): a local copy, mirrored there.

A run works in a folder on this machine. It is pulled before the start and pushed after every checkpoint and record.
Files are uploaded under new names (`PATH.SHA`), then a new manifest that says what belongs to the folder; only then do
older manifests and files go. So a kill at any moment leaves a whole state at the URL, and no file system needs to
replace or rename anything. A writer that finds a newer manifest of another one ends without touching what is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualcl.benchmark.core.errors import RunFailed, UserError
from dualcl.benchmark.core.files import atomic_write, cache_dir, write_json
from dualcl.benchmark.core.text import say

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: the plan of a grid
PLAN = "grid.json"
#: a copy of a run kept at a URL has this file: who wrote the last of it, and when
REMOTE = ".remote.json"
_NOTE = ".mirror.json"
_MANIFEST = re.compile(r"manifest-(\d{8})-([0-9a-f]{8})\.json")
#: pauses in seconds before the last push, which must succeed, is tried again
_AGAIN = (2.0, 10.0)
#: files that `report` and `status` read
_SMALL = ("record.json", "log.jsonl", "config.yaml")


def is_url(text: str | Path) -> bool:
    """Whether `text` names a place that fsspec opens, and no folder."""
    return isinstance(text, str) and "://" in text


def local_copy(url: str, kind: str = "runs") -> Path:
    """The folder of this machine where the run at `url` is worked on; kind "records": where records below it go."""
    name = re.sub(r"[^\w.-]+", "-", url.rstrip("/"))[-60:].strip("-")
    return cache_dir() / "mirror" / kind / f"{name}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:12]}"


def open_url(url: str) -> tuple[AbstractFileSystem, str]:
    """(file system, path) of a URL; UserError when nothing installed opens it."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {url}: {error}") from None
    return fs, str(path).rstrip("/")


@dataclass(frozen=True)
class Manifest:
    """What a folder at a URL consists of: SHA-256 by path; the `number`-th state, written by `writer` on `host`."""

    number: int
    writer: str
    host: str
    written: float
    files: Mapping[str, str]

    @property
    def name(self) -> str:
        """Its file name."""
        return f"manifest-{self.number:08d}-{self.writer}.json"

    def encode(self) -> bytes:
        """As it is stored, with a checksum."""
        tree: dict[str, Any] = {
            "format": "dualcl-mirror",
            "version": 1,
            "number": self.number,
            "writer": self.writer,
            "host": self.host,
            "written": self.written,
            "files": dict(self.files),
        }
        return json.dumps({**tree, "sha256": _checksum(tree)}, indent=1).encode()

    @staticmethod
    def decode(blob: bytes) -> Manifest | None:
        """None when it is not whole."""
        try:
            tree = json.loads(blob)
            told = tree.pop("sha256")
            if told != _checksum(tree) or tree["format"] != "dualcl-mirror" or tree["version"] != 1:
                return None
            files = {str(path): str(sha) for path, sha in tree["files"].items()}
            return Manifest(tree["number"], str(tree["writer"]), str(tree["host"]), tree["written"], files)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _checksum(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _stored(path: str, sha: str) -> str:
    return f"{path}.{sha[:16]}"


class Mirror:
    """A folder at a URL, and the local folder that is its copy."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.fs, self.root = open_url(url)
        self.writer = uuid.uuid4().hex[:8]
        self._at = Manifest(0, self.writer, "", 0.0, {})
        self._hashed: dict[str, tuple[int, int, str]] = {}

    def newest(self) -> Manifest | None:
        """The state at the URL: the newest manifest that is whole."""
        for name in sorted(self._names(), reverse=True):
            with contextlib.suppress(FileNotFoundError):
                if (manifest := Manifest.decode(self.fs.cat_file(f"{self.root}/{name}"))) is not None:
                    return manifest
        return None

    def _names(self) -> list[str]:
        self.fs.invalidate_cache()
        try:
            listed = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        return [name for path in listed if _MANIFEST.fullmatch(name := str(path).rpartition("/")[2])]

    # --- to here ------------------------------------------------------------------------------------------------------

    def pull(self, only: Iterable[str] | None = None) -> None:
        """Makes the local folder the state at the URL (or the files `only` of it); a newer local one is kept.

        UserError for a file that is missing there or damaged.
        """
        there = self.newest()
        note = self.folder / _NOTE
        known = _read(note)
        if there is None:
            if known:  # the URL was emptied: the local copy is of a run that is no more
                shutil.rmtree(self.folder)
                self.folder.mkdir()
            return
        self._at = there
        if known == {"number": there.number, "writer": there.writer}:
            return
        note.unlink(missing_ok=True)  # until all is there, the copy is of nothing
        wanted = {p: sha for p, sha in there.files.items() if only is None or p in set(only)}
        for path, sha in wanted.items():
            target = _inside(self.folder, path)
            if not target.is_file() or _sha(target) != sha:
                self._fetch(path, sha, target)
        for path in self._scan():
            if path not in wanted:
                (self.folder / path).unlink()
        if only is None:
            for empty in sorted((p for p in self.folder.glob("checkpoints/*") if p.is_dir()), reverse=True):
                with contextlib.suppress(OSError):
                    empty.rmdir()
        write_json(note, {"number": there.number, "writer": there.writer})
        write_json(self.folder / REMOTE, {"host": there.host, "written": there.written})

    def _fetch(self, path: str, sha: str, target: Path) -> None:
        stored = f"{self.url}/{_stored(path, sha)}"
        digest = hashlib.sha256()
        try:
            with self.fs.open(f"{self.root}/{_stored(path, sha)}", "rb") as source, atomic_write(target) as out:
                while block := source.read(2**22):
                    digest.update(block)
                    out.write(block)
        except FileNotFoundError:
            raise UserError(f"{stored} is missing; remove {self.url} to start that run afresh") from None
        if digest.hexdigest() != sha:
            target.unlink()
            raise UserError(f"{stored} is damaged (checksum differs); remove {self.url} to start that run afresh")

    # --- to there -----------------------------------------------------------------------------------------------------

    def push(self, *, tidy: bool = False) -> None:
        """Makes the URL's state that of the local folder; `tidy` also removes what killed writers left there.

        UserError when another process has written there since.
        """
        files = self._scan()
        if files != self._at.files:
            self._refuse_others()
            for path, sha in files.items():
                if self._at.files.get(path) != sha:
                    self._upload(path, sha)
            self._refuse_others()
            before, now = self._at, Manifest(self._at.number + 1, self.writer, socket.gethostname(), time.time(), files)
            self.fs.pipe_file(f"{self.root}/{now.name}", now.encode())
            self._at = now
            write_json(self.folder / _NOTE, {"number": now.number, "writer": self.writer})
            self._refuse_others()
            self._remove(before.name, *(_stored(p, s) for p, s in before.files.items() if files.get(p) != s))
        if tidy:
            self._refuse_others()
            kept = {self._at.name, *(_stored(p, s) for p, s in files.items())}
            found = (str(path).removeprefix(f"{self.root}/") for path in self.fs.find(self.root))
            self._remove(*(path for path in found if path not in kept))

    def _upload(self, path: str, sha: str) -> None:
        source, target = self.folder / path, f"{self.root}/{_stored(path, sha)}"
        with contextlib.suppress(FileNotFoundError):
            if self.fs.size(target) == source.stat().st_size:
                return  # of a push that was cut later on; another's manifest may name it, so it is not touched
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(source), target)

    def _refuse_others(self) -> None:
        later = [name for name in self._names() if int(name[9:17]) >= self._at.number and name != self._at.name]
        if later and (there := self.newest()) is not None and there.name in later:
            raise UserError(
                f"{there.host} has written to {self.url} since; this process leaves its work in {self.folder}"
            )

    def _remove(self, *paths: str) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.root}/{path}")

    def _scan(self) -> dict[str, str]:
        """SHA-256 of every local file by path, but for hidden ones; a file that looks the same is not read again."""
        out = {}
        for here, below, names in os.walk(self.folder):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(n for n in names if not n.startswith(".")):
                file = Path(here, name)
                path, facts = file.relative_to(self.folder).as_posix(), file.stat()
                seen = (facts.st_size, facts.st_mtime_ns)
                if self._hashed.get(path, ())[:2] != seen:
                    self._hashed[path] = (*seen, _sha(file))
                out[path] = self._hashed[path][2]
        return out

    def push_if_possible(self) -> None:
        """As `push`; where the URL does not answer it says so, and the next push makes up for this one."""
        try:
            self.push()
        except UserError:
            raise
        except Exception as error:  # file systems raise what they like
            say(f"dualcl: cannot write to {self.url} now ({type(error).__name__}: {error}); going on")

    def push_at_last(self) -> None:
        """Pushes and tidies, with more than one try; RunFailed when the last one fails."""
        for pause in (*_AGAIN, None):
            try:
                return self.push(tidy=True)
            except UserError:
                raise
            except Exception as error:
                if pause is None:
                    raise RunFailed(
                        f"cannot write to {self.url} ({type(error).__name__}: {error}); all is kept in "
                        f"{self.folder}, the same command on this machine writes it"
                    ) from error
                time.sleep(pause)


def _inside(folder: Path, path: str) -> Path:
    """`folder / path`, which must not lie elsewhere: a manifest is a file like any other."""
    parts = path.split("/")
    if "" in parts or any(part.startswith(".") for part in parts) or "\\" in path:
        raise UserError(f"a manifest names the file {path!r}, which is none of a run")
    return folder / path


def _sha(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def talking_to(url: str) -> Iterator[None]:
    """Turns whatever a file system raises into a UserError that names the URL."""
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        raise UserError(f"cannot read {url}: {type(error).__name__}: {error}") from error


# --- many runs --------------------------------------------------------------------------------------------------------


def pull_records(url: str) -> Path:
    """Fetches plan and records of all runs below a URL, as far as they changed; returns the folder they are in.

    Checkpoints and pictures stay there.
    """
    url = url.rstrip("/")
    folder = local_copy(url, "records")
    folder.mkdir(parents=True, exist_ok=True)
    with talking_to(url):
        fs, root = open_url(url)
        fs.invalidate_cache()
        runs = set()
        for found in map(str, fs.find(root)):
            here, _, name = found.rpartition("/")
            below = here.removeprefix(root).strip("/")
            if found == f"{root}/{PLAN}":
                with atomic_write(folder / PLAN) as handle:
                    handle.write(fs.cat_file(found))
            elif _MANIFEST.fullmatch(name):
                runs.add(below)
        for below in sorted(runs):
            place = _inside(folder, below) if below else folder
            place.mkdir(parents=True, exist_ok=True)
            Mirror(f"{url}/{below}".rstrip("/"), place).pull(_SMALL)
    return folder


def push_files(folder: Path, url: str) -> None:
    """Uploads a file, or a folder's files, under their own names: what is made again at will, as a report."""
    with talking_to(url):
        fs, root = open_url(url)
        for file in [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file()):
            target = f"{root}/{file.name if file == folder else file.relative_to(folder).as_posix()}"
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(file), target)


def local_and_url(place: Path | str) -> tuple[Path, str | None]:
    """The folder to read records from, and the URL of which it is a copy, if it is one."""
    return (place, None) if isinstance(place, Path) else (local_copy(place, "records"), place)


def fetched(places: Iterable[Path | str]) -> list[Path]:
    """Folders as they are; of URLs the folders that their records were fetched into."""
    return [place if isinstance(place, Path) else pull_records(place) for place in places]
