"""A few faults of every kind, always the same ones; `campaign.py` tries many. See README.md."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness import World

GLYPHS, CONCEPTS = "glyphs clora", "concepts custom_diffusion"


def lost(world: World, kind: str, jobs: list[str], kills: int = 4, most: int = 1, seed: str = "") -> list[Any]:
    """Faults of a kind after which something was lost; at least one was tried."""
    from campaign import Plan, tried
    from harness import LOST

    found = list(tried(world, kind, Plan(kills, random.Random(f"{kind}{seed}"), jobs, most)))
    assert found
    return [attempt for attempt in found if attempt.verdict == LOST]


@pytest.mark.parametrize(
    ("kind", "jobs", "most"),
    [
        ("SIGKILL at a random time", [GLYPHS], 1),
        ("SIGKILL at a chosen moment", [GLYPHS, CONCEPTS, "report"], 1),
        ("disk full (ENOSPC)", [GLYPHS], 2),
        ("read-only (EROFS)", [GLYPHS], 1),
        ("truncated files", ["own images"], 2),
        ("bit-flipped files", [GLYPHS], 3),
        ("damaged record of a finished run", [GLYPHS], 1),
        ("two processes on one folder", [GLYPHS], 1),
        ("clock jumps", [GLYPHS], 1),
        ("a stopping signal", [GLYPHS], 1),
        ("loss not finite", [GLYPHS], 1),
    ],
)
def test_nothing_is_lost(world: World, kind: str, jobs: list[str], most: int) -> None:
    assert lost(world, kind, jobs, most=most) == []


def test_loader_process_killed(world: World) -> None:
    assert lost(world, "a loader process killed", []) == []


def test_real_small_disk(world: World) -> None:
    from campaign import small_disk

    with small_disk(world, 64) as disk:
        if disk is None:
            pytest.skip("this process may not mount a tmpfs")
    assert lost(world, "a real small disk", [GLYPHS], most=1) == []


def test_harness_sees_what_is_wrong(world: World) -> None:
    """The verdict is no constant: a run whose image, log or record was changed at its end is lost."""
    from harness import LOST

    job = world.jobs[GLYPHS]
    for name in ("log.jsonl", "checkpoints/task_1/state.safetensors", "config.yaml"):
        out = world.fresh(world.reference(job)[2])
        file = out / name
        file.write_bytes(file.read_bytes()[:-1])
        assert world.judge(job, out)[0] == LOST
    out = world.fresh(world.reference(job)[2])
    (out / ".left.part").write_text("litter in an undisturbed run's folder is swept by the next call")
    assert world.judge(job, out)[0] == "survived"
    (out / "left").write_text("")
    assert world.judge(job, out)[0] == LOST


@pytest.mark.slow
def test_campaign() -> None:
    command = [sys.executable, str(Path(__file__).with_name("campaign.py")), "--kills", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
