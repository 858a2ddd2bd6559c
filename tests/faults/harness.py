"""Commands whose undisturbed outcome is known, ways to harm them, and the verdict on what comes after."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from dualcl.benchmark.models.bundled import bundled_backbones, bundled_diffusion
from dualcl.results.records import comparable

SURVIVED, CLEAR, LOST = "survived", "clear error", "lost"
#: a mend is named by one of these words
MENDS = re.compile(r"\b(delete|put|replace|remove|restore|choose|give|save|check|lower|mend|call|free|must)\b")
#: what torch itself logs, such as where a killed loader process was noticed
LOGGED = re.compile(r"[WE]\d{4} [\d:.]+ \d+ torch/")

QUICK = ("threads=1", "train.epochs=1", "train.checkpoint_seconds=0", "train.log_every=1")
GLYPHS = (*QUICK, "data.train_per_class=5", "data.test_per_class=2", "data.classes=4", "stream.tasks=2")
GLYPHS += ("train.batch_size=5", "input.workers=0")
CONCEPTS = (*QUICK, "data.concepts=2", "data.per_concept=2", "train.steps=3", "train.batch_size=2", "eval.n=2")
CONCEPTS += ("eval.steps=2", "prior.n=2", "prior.steps=2")


@dataclass(frozen=True)
class Job:
    """A `dualcl` command without its --out. `needs` are its inputs, by name, below the world's folder."""

    name: str
    argv: tuple[str, ...]
    needs: tuple[str, ...] = ()


def run_job(name: str, preset: str, method: str, *sets: str, needs: tuple[str, ...] = ()) -> Job:
    """`dualcl run` with settings."""
    return Job(name, ("run", preset, method, "--quiet", "--set", *sets), needs)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code or minus a signal (None: not in time), and all it printed."""

    code: int | None
    text: str

    def clear(self, names: Sequence[str]) -> bool:
        """Whether this is exit code 2 with one line that says what is wrong: it holds one of `names`, no traceback."""
        lines = [line for line in self.text.splitlines() if line.strip() and not LOGGED.match(line)]
        errors = [line for line in lines if line.startswith("dualcl: error: ")]
        return (
            self.code == 2
            and errors == lines[-1:]
            and not any("Traceback" in line for line in lines)
            and any(name in errors[0] for name in names)
        )


@dataclass(frozen=True)
class Site:
    """A place where a command changes files, or begins or ends a step or an evaluation."""

    number: int
    name: str
    path: str

    @property
    def moment(self) -> str:
        """What a run does here."""
        if self.name == "step" or "log.jsonl" in self.path:
            return "training"
        if self.name == "evaluate" or "/samples/" in self.path:
            return "evaluation"
        if "/checkpoints" in self.path:
            return "checkpoint"
        return "record" if re.search(r"record\.json|config\.yaml|\.lock", self.path) else "other files"

    @property
    def kind(self) -> tuple[str, str]:
        """Equal for sites that do the same to the same file."""
        return self.name, re.sub(r"\.\d+\.(part|tmp)$", r".\1", self.path)


class World:
    """A folder with inputs, references and a server that forks commands."""

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        self.cache = self.place / "cache"
        self.count = 0
        self.jobs: dict[str, Job] = {}
        self._known: dict[str, tuple[dict[str, Any], list[Site], Path]] = {}
        self._seconds: dict[str, float] = {}
        for folder in ("tries", "told", "caches"):
            (self.place / folder).mkdir()
        self.make_inputs()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DUALCL_CACHE": str(self.cache)}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.place,
            env=environment,
        )
        assert self._answer() == "ready"

    def close(self) -> None:
        """Ends the server."""
        self.server.kill()
        self.server.communicate()

    # --- inputs and jobs --------------------------------------------------------------------------------------------

    def make_inputs(self) -> None:
        """Images, weights, a base model, prompts and presets of a user, and the jobs that read them."""
        inputs = self.place / "inputs"
        chance = np.random.default_rng(0)
        for part, count in (("train", 4), ("val", 2)):
            for label in range(4):
                folder = inputs / "images" / part / f"shade{label}"
                folder.mkdir(parents=True)
                for k in range(count):
                    pixels = chance.integers(60 * label, 60 * label + 70, (40, 40, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{k}.png")
        for name in ("cat", "dog"):
            folder = inputs / "photos" / name
            folder.mkdir(parents=True)
            for k in range(2):
                Image.fromarray(chance.integers(0, 256, (70, 70, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        words = {"cat": {"noun": "star", "prompts": ["a photo of {token}", "one {token}"]}, "dog": {"noun": "heart"}}
        (inputs / "words.yaml").write_text(yaml.safe_dump(words))
        shutil.copy(bundled_backbones()["glyph-vit"].with_suffix(".safetensors"), inputs / "vit.safetensors")
        shutil.copytree(bundled_diffusion()["glyph-diffusion"], inputs / "base")
        preset = {
            "domain": "classification",
            "data": {"name": "image-folder", "root": str(inputs / "images")},
            "stream": {"tasks": 2},
            "train": {"epochs": 1, "batch_size": 3, "checkpoint_seconds": 0, "log_every": 1},
            "input": {"workers": 0},
            "backbone": {"name": "glyph-vit", "weights": str(inputs / "vit.safetensors")},
            "threads": 1,
        }
        (inputs / "mine.yaml").write_text(yaml.safe_dump(preset))
        jobs = [run_job(f"glyphs {m}", "glyphs", m, *GLYPHS) for m in ("clora", "coda_prompt", "ewc", "ncm")]
        for method in ("clora", "custom_diffusion", "textual_inversion"):
            jobs.append(run_job(f"concepts {method}", "glyph-concepts", method, *CONCEPTS))
        kept = ("input.cache_mib=0", "input.cache_gib=1")  # decoded images go to the disk cache
        mine = str(inputs / "mine.yaml")
        jobs.append(run_job("own images", mine, "clora", *kept, needs=("images", "vit.safetensors")))
        photos = ("data.name=concept-folder", f"data.root={inputs / 'photos'}", f"data.prompts={inputs / 'words.yaml'}")
        own = [s for s in CONCEPTS if not s.startswith("data.")]
        own += [*photos, f"base.model={inputs / 'base'}", "eval.features=glyph-vit"]
        jobs.append(run_job("own photographs", "glyph-concepts", "clora", *own))
        self.jobs = {job.name: job for job in jobs}

    def report_job(self) -> Job:
        """`dualcl report` on a finished run."""
        return Job("report", ("report", str(self.reference(self.jobs["glyphs clora"])[2])))

    # --- commands ---------------------------------------------------------------------------------------------------

    def fresh(self, template: Path | None = None) -> Path:
        """A folder that is not there yet, or a copy of `template`."""
        self.count += 1
        out = self.place / "tries" / f"{self.count:05d}"
        if template is not None:
            shutil.copytree(template, out, symlinks=True)
        return out

    def own_cache(self, out: Path) -> dict[str, Any]:
        """For `call`: an empty cache, so that sites have the numbers they have in the reference."""
        cache = self.place / "caches" / out.name
        return {"roots": [out, cache], "environment": {"DUALCL_CACHE": str(cache)}}

    def start(self, job: Job, out: Path, what: str = "", at: int = -1, **more: Any) -> int:
        """The process id of a command that has just begun; `wait` must follow. See `server.Harm` for `what` and `at`.

        more: sets (further settings), roots, trace, environment, gate, wall, steady, told (of several on one folder).
        """
        request = {
            "argv": [*job.argv, *more.get("sets", ()), "--out", str(out)],
            "told": str(self._told(out, more.get("told", ""))),
            "roots": [str(p) for p in more.get("roots", [out])],
            "what": what,
            "at": at,
            "trace": more.get("trace"),
            "environment": more.get("environment", {}),
            "gate": more.get("gate"),
            "wall": more.get("wall", []),
            "steady": more.get("steady", []),
        }
        return int(self._ask(request))

    def wait(self, process: int, out: Path, seconds: float = 120.0, told: str = "") -> Ended:
        """Waits for a command; one that hangs is killed."""
        code = self._ask({"process": process, "seconds": seconds})
        if code is None:
            os.kill(process, signal.SIGKILL)
            self._ask({"process": process, "seconds": 10.0})
        return Ended(code, self._told(out, told).read_text(errors="replace"))

    def call(self, job: Job, out: Path, what: str = "", at: int = -1, **more: Any) -> Ended:
        """Runs a command to its end."""
        return self.wait(self.start(job, out, what, at, **more), out)

    def _told(self, out: Path, which: str) -> Path:
        return self.place / "told" / f"{out.name}{which}"

    def discard(self) -> None:
        """Removes the folders of all tries but the references."""
        kept = {folder for *_, folder in self._known.values()}
        for place in ("tries", "told", "caches"):
            for path in (self.place / place).iterdir():
                if path not in kept:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.server.stdout is not None
        return json.loads(self.server.stdout.readline())

    # --- what must come out -----------------------------------------------------------------------------------------

    def reference(self, job: Job) -> tuple[dict[str, Any], list[Site], Path]:
        """Of the undisturbed command: its outcome, its sites (those of an empty cache too), and its folder."""
        if job.name not in self._known:
            out, trace = self.fresh(), self.place / f"{len(self._known)}.trace"
            began = time.monotonic()
            done = self.call(job, out, trace=str(trace), **self.own_cache(out))
            self._seconds[job.name] = time.monotonic() - began
            assert done.code == 0, f"{job.name} without any harm: {done.text}"
            sites = [Site(*json.loads(line)) for line in trace.read_text().splitlines()]
            self._known[job.name] = outcome(out), sites, out
        return self._known[job.name]

    def seconds(self, job: Job) -> float:
        """How long the undisturbed command took."""
        self.reference(job)
        return self._seconds[job.name]

    def inputs(self, job: Job) -> list[Path]:
        """Files that the run reads beside its own folder: the user's, and those of the cache."""
        words = " ".join(job.argv)
        given = [p for p in (self.place / "inputs").iterdir() if str(p) in words or p.name in job.needs]
        files = [f for p in given for f in ([p] if p.is_file() else p.rglob("*"))]
        cached = self.cache.rglob("*") if {"custom_diffusion", "own images"} & {*job.argv, job.name} else ()
        return sorted(f for f in (*files, *cached) if f.is_file() and f.suffix != ".md")

    def midway(self, job: Job) -> Path:
        """The folder of a run killed in its second task: the first has its checkpoint, and the second where it can."""
        _, sites, _ = self.reference(job)
        first = [s.number for s in sites if s.name == "evaluate"][1]
        renamed = [s for s in sites[first:] if s.name == "rename"]
        partial = [s for s in renamed if s.path.endswith("checkpoints/partial")]
        at = (partial or [s for s in renamed if s.path.endswith("record.json")])[0].number + 4
        out = self.place / f"midway-{job.name.replace(' ', '-')}"
        if not out.exists():
            assert self.call(job, self.fresh()).code == 0  # fills the cache
            assert self.call(job, out, "kill", at, **self.own_cache(out)).code == -signal.SIGKILL
            assert (out / "checkpoints" / "task_0").is_dir()
        return out

    def judge(
        self, job: Job, out: Path, names: Sequence[str] = (), mend: Callable[[], object] = lambda: None, **more: Any
    ) -> tuple[str, str]:
        """Calls the command again without harm: its verdict, and what was wrong or said.

        It must end with the undisturbed outcome; or with an error that names one of `names` and a mend, and do so
        after `mend()`, or after the deletion that it asks for.
        """
        again = self.call(job, out, **more)
        said = again.text.strip().splitlines()[-1] if again.text.strip() else ""
        if again.code == 0:
            wrong = self.differences(job, out)
            return (LOST, f"differs in {wrong}") if wrong else (SURVIVED, "")
        if again.code is None:
            return LOST, "hangs"
        if not (again.clear(names) and MENDS.search(said)):
            return LOST, f"exit code {again.code}: {said}"
        forgotten = set()
        if (asked := re.search(r"\bdelete (/\S+?)(,|;|$| to )", said)) is not None:
            victim = Path(asked[1])
            forgotten = {victim.name} if victim.name == "log.jsonl" else set()
            shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        else:
            mend()
        mended = self.call(job, out, **more)
        if mended.code != 0:
            return LOST, f"after the mend of {said!r}: exit code {mended.code}: {mended.text[-300:]}"
        wrong = [name for name in self.differences(job, out) if name not in forgotten]
        return (LOST, f"after the mend of {said!r}: differs in {wrong}") if wrong else (CLEAR, said)

    def differences(self, job: Job, out: Path) -> list[str]:
        """Files of a finished command that are not those of the undisturbed one."""
        wanted, found = self.reference(job)[0], outcome(out)
        return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def outcome(out: Path) -> dict[str, Any]:
    """All of a command's files that must not depend on what happened on the way, by path."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir():
            found[name] = None
        elif name == "record.json":
            found[name] = comparable(json.loads(path.read_bytes()))
        elif path.name == "state.json":
            state = json.loads(path.read_bytes())
            found[name] = {key: value for key, value in state.items() if key not in ("measured", "sha256")}
        elif name != ".lock":
            found[name] = path.read_bytes()
    return found
