"""The long campaign: every kind of harm in both domains, and a table of what came of it.

    python tests/faults/campaign.py --kills 100 --seed 0

A kind is a generator of `Tried`, registered with `@kind`. Exit code 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness import CLEAR, LOST, SURVIVED, Ended, Job, Site, World


@dataclass(frozen=True)
class Tried:
    """One fault: its kind, the job, what exactly was done, the verdict, and what was wrong or said."""

    kind: str
    job: str
    what: str
    verdict: str
    said: str = ""


#: (verdict, what was wrong or said) by description
Attempts = Iterator[tuple[Job, str, tuple[str, str]]]


@dataclass(frozen=True)
class Plan:
    """How much of everything, and the source of all chances."""

    kills: int
    chance: random.Random
    jobs: Sequence[str]
    #: of sites and of places of damage, this many per job are tried (None: all)
    most: int | None = None

    def some(self, items: Sequence[object]) -> list[int]:
        """Indices of at most `most` items, by chance."""
        every = range(len(items))
        return list(every) if self.most is None else sorted(self.chance.sample(every, min(self.most, len(items))))


#: the name of `dualcl report` among the runs
REPORT = "report"
KINDS: dict[str, Callable[[World, Plan], Attempts]] = {}


def kind(name: str) -> Callable[[Callable[[World, Plan], Attempts]], Callable[[World, Plan], Attempts]]:
    """Registers a kind of fault under its name in the table."""

    def add(attempts: Callable[[World, Plan], Attempts]) -> Callable[[World, Plan], Attempts]:
        KINDS[name] = attempts
        return attempts

    return add


def tried(world: World, name: str, plan: Plan) -> Iterator[Tried]:
    """Tries one kind."""
    for job, what, (verdict, said) in KINDS[name](world, plan):
        yield Tried(name, job.name, what, verdict, said)
        world.discard()


def runs(world: World, plan: Plan) -> list[Job]:
    """The runs of the plan."""
    return [world.jobs[name] for name in plan.jobs if name != REPORT]


def commands(world: World, plan: Plan) -> list[Job]:
    """The runs of the plan, and the report."""
    return [*runs(world, plan), *([world.report_job()] if REPORT in plan.jobs else [])]


# --- killed -----------------------------------------------------------------------------------------------------------


@kind("SIGKILL at a random time")
def killed_at_times(world: World, plan: Plan) -> Attempts:
    """Runs killed after random delays, until a quarter of the kills is done."""
    for i in range(max(1, plan.kills // 4)):
        job = plan.chance.choice(runs(world, plan))
        out = world.fresh()
        world.reference(job)
        seconds = world.seconds(job)
        while True:
            process = world.start(job, out)
            time.sleep(seconds * plan.chance.uniform(0.05, 0.9))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            if world.wait(process, out).code == -signal.SIGKILL:
                break
            shutil.rmtree(out)  # it was faster
        yield job, f"time {i}", world.judge(job, out)


@kind("SIGKILL at a chosen moment")
def killed_at_moments(world: World, plan: Plan) -> Attempts:
    """Killed in training, evaluation, while a checkpoint, the record or a report is written; the moments in turn."""
    jobs = commands(world, plan)
    for i in range(plan.kills - plan.kills // 4):
        job = jobs[i % len(jobs)]
        sites = world.reference(job)[1]
        moments = sorted({site.moment for site in sites})
        site = plan.chance.choice([s for s in sites if s.moment == moments[i // len(jobs) % len(moments)]])
        out = world.fresh()
        own = world.own_cache(out)
        ended = world.call(job, out, "kill", site.number, **own)
        verdict = world.judge(job, out, **own) if ended.code == -signal.SIGKILL else (LOST, f"not killed: {ended}")
        yield job, f"{site.moment}: {site.name} {Path(site.path).name}", verdict


@kind("killed again and again")
def killed_often(world: World, plan: Plan) -> Attempts:
    """A run that is killed at random sites six times over."""
    for job in runs(world, plan):
        out, count = world.fresh(), len(world.reference(job)[1])
        sites = [plan.chance.randrange(8, count // 2) for _ in range(6)]
        codes = [world.call(job, out, "kill", site).code for site in sites]
        wrong = [code for code in codes if code not in (0, -signal.SIGKILL)]
        verdict = (LOST, f"ended with {wrong}") if wrong else world.judge(job, out)
        yield job, f"{codes.count(-signal.SIGKILL)} kills", verdict


# --- disks ------------------------------------------------------------------------------------------------------------


def refused(world: World, plan: Plan, error: str, *names: str) -> Attempts:
    """The disk refuses from each site on; what the user sees is one line, and the same command later succeeds."""
    for job in commands(world, plan):
        first: dict[tuple[str, str], Site] = {}
        for site in world.reference(job)[1]:
            if site.name in names:
                first.setdefault(site.kind, site)
        sites = list(first.values())
        for i in plan.some(sites):
            site, out = sites[i], world.fresh()
            own = world.own_cache(out)
            ended = world.call(job, out, error, site.number, **own)
            verdict: tuple[str, str]
            if ended.code == 0 and not (wrong := world.differences(job, out)):
                verdict = SURVIVED, ""  # a cache that cannot be written is done without
            elif ended.code == 0:
                verdict = LOST, f"exit code 0, but {wrong} differ"
            elif not ended.clear([str(out), str(own["roots"][1])]):
                verdict = LOST, f"exit code {ended.code}: {ended.text[-500:]}"
            else:
                verdict = world.judge(job, out)
            yield job, f"{site.name} {Path(site.path).name}", verdict


@kind("disk full (ENOSPC)")
def full(world: World, plan: Plan) -> Attempts:
    """Full from a site on."""
    return refused(world, plan, "ENOSPC", "open", "write", "fsync", "mkdir")


@kind("failing disk (EIO)")
def failing(world: World, plan: Plan) -> Attempts:
    """Writing and syncing fail from a site on."""
    return refused(world, plan, "EIO", "write", "fsync")


@kind("read-only (EROFS)")
def read_only(world: World, plan: Plan) -> Attempts:
    """The file system goes read-only at a site."""
    return refused(world, plan, "EROFS", "open", "write", "mkdir", "rename", "remove")


@contextlib.contextmanager
def small_disk(world: World, kib: int) -> Iterator[Path | None]:
    """A file system of that size; None where this process may not mount one."""
    place = world.place / f"disk{kib}"
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    """Changes the options of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@kind("a real small disk")
def really_full(world: World, plan: Plan) -> Attempts:
    """A tmpfs that is too small and then grows; one that is read-only and then is not."""
    for job in runs(world, plan):
        size = sum(p.stat().st_size for p in world.reference(job)[2].rglob("*") if p.is_file()) // 1024
        sizes = [24, size // 4, size // 2, size, size + size // 3]
        for kib in [max(24, sizes[i]) for i in plan.some(sizes)]:
            with small_disk(world, kib) as disk:
                if disk is None:
                    return
                out = disk / "run"
                ended = world.call(job, out)
                if ended.code == 0 and not world.differences(job, out):
                    verdict = SURVIVED, ""
                elif not ended.clear([str(disk)]):
                    verdict = LOST, f"exit code {ended.code}: {ended.text[-500:]}"
                else:
                    remount(disk, "size=1g")
                    verdict = world.judge(job, out)
                yield job, f"{kib} KiB", verdict
        with small_disk(world, 1 << 20) as disk:
            if disk is None:
                return
            out = disk / "run"
            shutil.copytree(world.midway(job), out)
            remount(disk, "ro")
            ended = world.call(job, out)
            remount(disk, "rw")
            said = LOST, f"exit code {ended.code}: {ended.text[-500:]}"
            yield job, "read-only mount", world.judge(job, out) if ended.clear([str(out)]) else said


# --- damaged files ----------------------------------------------------------------------------------------------------


def truncated(content: bytes, chance: random.Random) -> bytes:
    """The file's beginning."""
    return content[: chance.randrange(1, max(2, len(content)))]


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One bit is another."""
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncated,
    "bit-flipped": flipped,
    "empty": lambda content, chance: b"",
}


def damaged(world: World, plan: Plan, how: str) -> Attempts:
    """Each file of a run that was killed midway, of its inputs and of its caches."""
    for job in runs(world, plan):
        template = world.midway(job)
        inside = [p for p in sorted(template.rglob("*")) if p.is_file() and p.name != ".lock" and p.stat().st_size]
        outside = [p for p in world.inputs(job) if p.stat().st_size]
        files = [*inside, *outside]
        for i in plan.some(files):
            out = world.fresh(template)
            file = out / files[i].relative_to(template) if files[i] in inside else files[i]
            content, stat = file.read_bytes(), file.stat()
            file.write_bytes(DAMAGES[how](content, plan.chance))

            def put_back(file: Path = file, content: bytes = content, stat: os.stat_result = stat) -> None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

            # a library may name the part of a model that a file belongs to, and not the file
            names = [str(file), str(file.parent), str(file.parent.parent)]
            if files[i] in outside:  # of what changed behind its back a run knows the kind alone
                names += ["was begun with another", "another configuration"]
            verdict = world.judge(job, out, names, put_back)
            if file.is_relative_to(world.place / "inputs") or file.is_relative_to(world.cache):
                put_back()
            yield job, str(file.relative_to(out if file.is_relative_to(out) else world.place)), verdict


for _how in DAMAGES:
    KINDS[f"{_how} files"] = lambda world, plan, how=_how: damaged(world, plan, how)  # type: ignore[misc]


@kind("damaged record of a finished run")
def damaged_record(world: World, plan: Plan) -> Attempts:
    """A report never shows numbers of a damaged record; the run makes it anew once it is deleted."""
    for job in runs(world, plan):
        done = world.reference(job)[2]
        for how, change in DAMAGES.items():
            out = world.fresh(done)
            record = out / "record.json"
            content = record.read_bytes()
            record.write_bytes(change(content, plan.chance))
            shown = world.call(Job("", ("report", str(out), "--format", "md")), world.fresh())
            if shown.code == 0 and json.loads(record.read_bytes()) != json.loads(content):
                yield job, f"{how}: report", (LOST, "the report took it")
                continue
            yield job, how, world.judge(job, out, [str(record)], lambda r=record, c=content: r.write_bytes(c))  # type: ignore[misc]


# --- processes, clocks, numbers ---------------------------------------------------------------------------------------


@kind("two processes on one folder")
def together(world: World, plan: Plan) -> Attempts:
    """Both start at once: one refuses, or comes late and finds the run finished."""
    for job in runs(world, plan):
        for i in range(2 if plan.most is None else 1):
            out, gate = world.fresh(), world.place / f"gate{world.count}"
            second = replace(job, name=f"{job.name} again")
            told = [world.start(job, out, gate=str(gate)), world.start(second, out, gate=str(gate), told=".second")]
            gate.touch()
            ends = [world.wait(told[0], out), world.wait(told[1], out, told=".second")]
            refusals = [e for e in ends if e.code != 0]
            bad = [e for e in refusals if not (e.clear([str(out)]) and "in use by another" in e.text)]
            wrong = world.differences(job, out)
            if bad or len(refusals) > 1 or wrong:
                yield job, f"{i}", (LOST, f"{bad or refusals}, differs in {wrong}")
            else:
                yield job, f"{i}", (CLEAR if refusals else SURVIVED, "")


CLOCKS = {
    "wall clock back and forth": {"wall": [-86400.0, 3600.0, -7200.0, 90000.0]},
    "wall clock a year back": {"wall": [-3.2e7]},
    "monotonic clock hours on": {"steady": [7200.0]},
    "monotonic clock back and forth": {"steady": [-3600.0, 7200.0, -9000.0, 60.0]},
}


@kind("clock jumps")
def clocks(world: World, plan: Plan) -> Attempts:
    """The record is that of a right clock, no duration is negative, and mid-task checkpoints go on."""
    for job in runs(world, plan):
        for i in plan.some(list(CLOCKS)):
            name, jumps = list(CLOCKS.items())[i]
            out, trace = world.fresh(), world.place / f"clock{world.count}.trace"
            ended = world.call(job, out, trace=str(trace), **jumps)
            if ended.code != 0:
                yield job, name, (LOST, f"exit code {ended.code}: {ended.text[-300:]}")
                continue
            record = json.loads((out / "record.json").read_bytes())
            measured = record["measured"]
            seconds = [t[k] for t in measured["tasks"] for k in ("train_seconds", "eval_seconds")]
            saved = trace.read_text().count("/checkpoints/partial")
            usual = sum("/checkpoints/partial" in site.path for site in world.reference(job)[1])
            if min([*seconds, measured["wall_seconds"]]) < 0:
                yield job, name, (LOST, f"negative durations: {seconds}")
            elif saved < usual:
                yield job, name, (LOST, f"{saved} mid-task checkpoints, else {usual}")
            else:
                wrong = world.differences(job, out)
                yield job, name, (LOST, f"differs in {wrong}") if wrong else (SURVIVED, "")


@kind("a stopping signal")
def signals(world: World, plan: Plan) -> Attempts:
    """SIGTERM, SIGINT and SIGHUP: saved within seconds, exit code 130, and the same command goes on."""
    for job in runs(world, plan):
        sites = world.reference(job)[1]
        first = next(s.number for s in sites if s.moment in ("training", "evaluation"))
        for what in ("term", "int", "hup"):
            site, out = plan.chance.choice(sites[first:]), world.fresh()
            began = time.monotonic()
            ended = world.call(job, out, what, site.number, **world.own_cache(out))
            seconds = time.monotonic() - began
            name = f"SIG{what.upper()} at {site.name} {Path(site.path).name}"
            yield job, name, stopped(world, job, out, ended, seconds)


def stopped(world: World, job: Job, out: Path, ended: Ended, seconds: float) -> tuple[str, str]:
    """The verdict on a run that was asked to stop."""
    if ended.code == 0:  # after the last step: it was as good as finished
        wrong = world.differences(job, out)
        return (LOST, f"differs in {wrong}") if wrong else (SURVIVED, "")
    status = json.loads((out / "record.json").read_bytes())["status"]
    if ended.code != 130 or "Traceback" in ended.text or status != "interrupted":
        return LOST, f"exit code {ended.code}, status {status}: {ended.text[-500:]}"
    if seconds > world.seconds(job) + 10:
        return LOST, f"{seconds:.0f} s to stop"
    return world.judge(job, out)


@kind("a loader process killed")
def loader_killed(world: World, plan: Plan) -> Attempts:
    """One of the processes that decode images is killed: a clear error at most, and never a hang."""
    job = world.jobs["own images"]
    sets = ["input.workers=2", "input.cache_mib=0", "input.cache_gib=0", "input.augment=crop_flip", "train.epochs=3"]
    job = replace(job, name="loader processes", argv=(*job.argv, *sets))
    for i in range(6 if plan.most is None else 1):
        world.reference(job)
        out = world.fresh()
        process = world.start(job, out)
        victim = child_of(process, plan.chance.randrange(3))
        if victim is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        ended = world.wait(process, out, 60.0)
        if ended.code == 0:
            wrong = world.differences(job, out)
            yield job, f"{i}", (LOST, f"differs in {wrong}") if wrong else (SURVIVED, "")
        elif not ended.clear(["input.workers"]):
            yield job, f"{i}", (LOST, f"exit code {ended.code}: {ended.text[-500:]}")
        else:
            verdict, said = world.judge(job, out)
            yield job, f"{i}", (CLEAR if verdict == SURVIVED else LOST, said or ended.text)


def child_of(process: int, skip: int) -> int | None:
    """A forked child of a process, after `skip` others; None when it ended before it had so many."""
    seen: list[int] = []
    name = Path(f"/proc/{process}/comm")
    while len(seen) <= skip:
        try:
            tasks = list(Path(f"/proc/{process}/task").iterdir())
            found = [int(c) for t in tasks for c in (t / "children").read_text().split()]
            if name.read_text() == "" or Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return None
            seen += [c for c in found if c not in seen and Path(f"/proc/{c}/comm").read_text() == name.read_text()]
        except OSError:
            if not Path(f"/proc/{process}").exists():
                return None
        time.sleep(0.001)
    return seen[skip]


@kind("loss not finite")
def diverged(world: World, plan: Plan) -> Attempts:
    """A learning rate that no run survives: a clear error, the same one when it is called again."""
    for job in runs(world, plan):
        if job.argv[2] == "ncm":
            continue
        out = world.fresh()
        sets = ["method.head_lr=1e30", *(["method.lr=1e30"] if job.argv[2] != "textual_inversion" else [])]
        first, again = world.call(job, out, sets=sets), world.call(job, out, sets=sets)
        status = json.loads((out / "record.json").read_bytes())["status"]
        good = all(e.clear([str(out)]) for e in (first, again)) and status == "failed"
        yield job, "lr 1e30", (CLEAR, first.text) if good else (LOST, f"{status}: {first} {again}")


@kind("nobody reads stderr")
def unread(world: World, plan: Plan) -> Attempts:
    """The reader of a run's progress goes away: the run goes on."""
    job = world.jobs["glyphs clora"]
    out = world.fresh()
    argv = [word for word in job.argv if word != "--quiet"]
    code = "import sys; from dualcl.benchmark.cli import main; sys.exit(main())"
    environment = {**os.environ, "DUALCL_CACHE": str(world.cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *argv, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    assert process.stderr is not None
    process.stderr.close()
    ended = process.wait(120)
    wrong = world.differences(job, out)
    yield job, "closed pipe", (LOST, f"exit code {ended}, differs in {wrong}") if ended or wrong else (SURVIVED, "")


# --- the table --------------------------------------------------------------------------------------------------------


def table(found: Sequence[Tried]) -> str:
    """Counts by kind as a Markdown table."""
    rows = [("kind", "tried", "survived", "clear error", "lost")]
    by_kind = collections.Counter((t.kind, t.verdict) for t in found)
    for name in dict.fromkeys(t.kind for t in found):
        counts = [by_kind[name, verdict] for verdict in (SURVIVED, CLEAR, LOST)]
        rows.append((name, str(sum(counts)), *map(str, counts)))
    totals = [sum(t.verdict == verdict for t in found) for verdict in (SURVIVED, CLEAR, LOST)]
    rows.append(("all", str(len(found)), *map(str, totals)))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|---:|---:|---:|---:|", *lines[1:]])


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description="Harm runs in every way we know, and count what came of it.")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at times and moments (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(KINDS), help="these kinds alone")
    parser.add_argument("--jobs", nargs="*", help="these runs alone; 'report' is one")
    parser.add_argument("--most", type=int, help="at most this many sites or files of each run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        world = World(Path(place))
        jobs = args.jobs or [*world.jobs, REPORT]
        found = []
        for number, name in enumerate(KINDS):
            if args.only and name not in args.only:
                continue
            plan = Plan(args.kills, random.Random(f"{args.seed} {number}"), jobs, args.most)
            began = time.monotonic()
            for attempt in tried(world, name, plan):
                found.append(attempt)
                if attempt.verdict == LOST:
                    print(f"LOST: {attempt.kind}, {attempt.job}, {attempt.what}: {attempt.said}", flush=True)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        world.close()
    print(table(found))
    return int(any(t.verdict == LOST for t in found))


if __name__ == "__main__":
    sys.exit(main())
