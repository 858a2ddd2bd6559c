"""Run directories as the runner writes them, made from a matrix of correct answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

WriteRun = Callable[..., Path]
Values = Sequence["Sequence[float | None] | None"]

#: correct answers out of 100: rows after task 1, 2, 3
CORRECT = [[90], [70, 80], [60, 50, 100]]


def record_data(
    correct: Sequence[Sequence[int] | None] = CORRECT,
    *,
    label: str = "clora",
    method: str = "clora",
    seed: int = 0,
    preset: str = "glyphs",
    joint: bool = False,
    status: str = "finished",
    total: int = 100,
    trained: int = 2_000,
    stored: int = 5_000,
    seconds: float = 12.0,
) -> dict[str, Any]:
    n = len(correct)
    rows = [
        {"after_task": i, "correct": list(row), "total": [total] * len(row)}
        for i, row in enumerate(correct)
        if row is not None
    ]
    tasks: list[int | None] = [None] if joint else list(range(n))
    return {
        "format": "dualcl-record",
        "version": 1,
        "status": status,
        "error": "loss is NaN" if status == "failed" else None,
        "run": {
            "preset": preset,
            "domain": "classification",
            "method": method,
            "seed": seed,
            "n_tasks": n,
            "joint": joint,
            "label": label,
        },
        "config": {"preset": preset, "seed": seed, "train": {"epochs": 3}, "method": {"rank": 8}},
        "config_hash": f"abc{seed}",
        "sources": {"train.epochs": "preset glyphs", "method.rank": "--set", "seed": "--seed"},
        "identity": {
            "data": "glyphs",
            "split_name": "all",
            "split_hash": "5b1d",
            "class_order": [3, 1, 2, seed],
            "order_seed": seed,
            "backbone": "vit_tiny",
            "weights_sha256": "00ff",
            "preprocess": {"mean": 0.5, "size": 32},
        },
        "network": {"parameters": 100_000, "skipped_images": []},
        "tasks": [
            {
                "task": t,
                "name": f"task {t}",
                "classes": ["umbrella"],
                "n_train": 800,
                "n_test": total,
                "steps": 50,
                "final_loss": 0.5,
                "parameters_trained": trained,
                "parameters_stored": stored,
                "diagnostics": {},
            }
            for t in tasks
        ],
        "matrix": {"kind": "accuracy", "rows": rows},
        "measured": {
            "tasks": [{"task": t, "train_seconds": 1.0, "eval_seconds": 0.4, "peak_mib": 512.0} for t in tasks],
            "wall_seconds": seconds,
        },
        "environment": {"dualcl": "0.1.0", "commit": "c0ffee", "dirty": False, "torch": "2.4", "device": "cpu"},
        "created": "2030-01-01T00:00:00",
        "finished": "2030-01-01T00:01:00",
    }


def _write(
    root: Path,
    data: dict[str, Any],
    edit: Callable[[dict[str, Any]], object] | None,
    log: Sequence[dict[str, Any]],
    name: str,
) -> Path:
    if edit:
        edit(data)
    run = data["run"]
    folder = root / "runs" / (name or f"{run['preset']}-{run['label'].replace('/', '_')}-{run['seed']}")
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(data), encoding="utf-8")
    if log:
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    return folder


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """write_run(correct, edit=..., log=..., **record_data's keywords) -> the run directory, below tmp_path/runs."""

    def write(
        correct: Sequence[Sequence[int] | None] = CORRECT,
        *,
        edit: Callable[[dict[str, Any]], object] | None = None,
        log: Sequence[dict[str, Any]] = (),
        name: str = "",
        **keywords: Any,
    ) -> Path:
        return _write(tmp_path, record_data(correct, **keywords), edit, log, name)

    return write


#: distances to the real images: rows after concept 1, 2, 3
MMD = [[0.02], [0.05, 0.03], [0.09, 0.04, 0.02]]
DRIFT = [[0.0], [0.04, 0.0], [0.08, 0.01, 0.0]]
#: of 8 images each, those nearest to their own concept
NEAREST = [[8], [6, 8], [2, 7, 8]]
CONCEPTS = ("grinning face", "ghost", "rocket")
SIZE = 32


def concept_record(
    mmd: Values = MMD,
    drift: Values | None = DRIFT,
    nearest: Values = NEAREST,
    *,
    generated: int = 8,
    text_similarity: bool = True,
    **keywords: Any,
) -> dict[str, Any]:
    """A record of the customization domain; where `mmd` has None, nothing was evaluated."""
    data = record_data([None] * len(mmd), **{"preset": "glyph-concepts", **keywords})
    rows = []
    for i, row in enumerate(mmd):
        if row is None:
            continue
        seen = [value is not None for value in row]

        def where(values: Sequence[Any], seen: list[bool] = seen) -> list[Any]:
            return [value if there else None for value, there in zip(values, seen, strict=True)]

        rows.append(
            {
                "after_task": i,
                "mmd": list(row),
                "drift": where((drift[i] if drift else None) or [None] * len(row)),
                "image_similarity": where([0.8 - (value or 0.0) for value in row]),
                "text_similarity": where([0.25] * len(row)) if text_similarity else [None] * len(row),
                "nearest_correct": where(nearest[i] or []),
                "generated": where([generated] * len(row)),
            }
        )
    data["run"]["domain"] = "customization"
    data["matrix"] = {"kind": "mmd", "rows": rows}
    data["identity"].update(
        data="glyph-concepts",
        class_order=list(range(len(mmd))),
        backbone="glyph-diffusion",
        weights="bundled",
        preprocess={"size": SIZE, "crop": "centre square", "interpolation": "bicubic"},
        steps=200,
        features="glyph-vit",
        features_sha256="feed5eed" * 8,
        kernel="poly2",
        estimator="biased",
        eval={"n": generated, "steps": 15, "scheduler": "ddim", "guidance": 4.0, "prompt": "a photo of {token}"},
    )
    data["network"]["concepts"] = [CONCEPTS[i % len(CONCEPTS)] for i in range(len(mmd))]
    for index, task in enumerate(data["tasks"]):
        task.update(n_train=8, diagnostics={"update_norm": 1.0 + index, "summed_norm": 2.0 + index})
    return data


def _shape(image: Image.Image, concept: int, k: int) -> Image.Image:
    pen, side = ImageDraw.Draw(image), image.width
    box = (side // 6 + k % 3, side // 6, side - side // 6, side - side // 6 - k % 2)
    if concept % 3 == 0:
        pen.ellipse(box, fill=(200, 60, 40))
    elif concept % 3 == 1:
        pen.rectangle(box, fill=(40, 70, 190))
    else:
        pen.chord(box, 20, 290, fill=(30, 140, 80))
    return image


def drawing(concept: int, k: int, away: float = 0.0, size: int = SIZE) -> Image.Image:
    """Concept `concept` in rendition `k`; `away` (0 to 1) mixes in the next concept."""
    ground = Image.new("RGB", (size, size), (230 - 15 * (k % 4), 235, 215 + 10 * (k % 4)))
    own, other = _shape(ground.copy(), concept, k), _shape(ground, concept + 1, k)
    return Image.blend(own, other, min(max(away, 0.0), 1.0))


def save_png(path: Path, image: Image.Image, **text: str) -> None:
    """A PNG with text entries, in a folder that is made."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=info)


def write_samples(folder: Path, data: dict[str, Any], size: int = SIZE) -> None:
    """The images that a run with this record would have kept; the larger the drift, the more they look like others."""
    names = data["network"]["concepts"]
    slugs = [f"{j + 1}_{re.sub('[^a-z0-9]+', '-', name)}" for j, name in enumerate(names)]
    for row in data["matrix"]["rows"]:
        for j, n in enumerate(row["generated"]):
            away = 8 * (row["drift"][j] or 0.0)
            for k in range(n or 0):
                place = folder / f"samples/after_{row['after_task'] + 1}/{slugs[j]}"
                text = {"prompt": f"a photo of <c{j + 1}>", "seed": str(1000 * j + k), "concept": names[j]}
                save_png(place / f"{k}.png", drawing(j, k, away, size), **text, after_task=str(row["after_task"] + 1))
    for j, name in enumerate(names):
        for k in range(4):
            path = folder / f"samples/real/{slugs[j]}/{k}.png"
            save_png(path, drawing(j, k + 5, size=size), concept=name)


@pytest.fixture
def write_concept_run(tmp_path: Path) -> WriteRun:
    """write_concept_run(mmd, drift, samples=..., **concept_record's keywords) -> the run directory."""

    def write(
        *values: Any,
        edit: Callable[[dict[str, Any]], object] | None = None,
        log: Sequence[dict[str, Any]] = (),
        samples: bool = False,
        size: int = SIZE,
        name: str = "",
        **keywords: Any,
    ) -> Path:
        data = concept_record(*values, **keywords)
        folder = _write(tmp_path, data, edit, log, name)
        if samples:
            write_samples(folder, data, size)
        return folder

    return write
