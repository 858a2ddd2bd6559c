"""What a full study costs: seconds, storage and files from what was measured, and the page and jobs made of it.

Times are those of a CPU (`speed/*.json`) and ratios between methods those of recorded comparisons; a GPU was not
measured and is one factor. Everything that is assumed stands in this file as a constant.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.config import load_preset
from dualcl.benchmark.errors import UserError
from dualcl.benchmark.reading import read_json
from dualcl.results.records import FILE_NAME, find_records

#: assumed: how much faster one GPU is than the CPU measured (2 threads, fp32)
GPU_SPEEDUP = 200.0
#: training and test images of the data sets; DomainNet: about, for the lists differ
IMAGES = {"imagenet-r": (24_000, 6_000), "cifar100": (50_000, 10_000), "domainnet": (290_000, 125_000)}
#: assumed: Stable Diffusion over the quarter-size model measured, by parameters of the U-Net
FULL_SIZE = 860 / 215
#: assumed: a pass at 512 px over one at 256 px, by pixels
FULL_PIXELS = 4.0
#: assumed: memory of a job [GiB]
MEMORY_GIB = {"classification": 8.0, "customization": 16.0}
SEEDS = 5
CLASSIFICATION = ("imagenet-r-5", "imagenet-r-10", "imagenet-r-20", "cifar100-10", "cifar100-20", "domainnet-5")
CUSTOMIZATION = ("celeba-hq-10", "landmarks-10", "dreambooth")
#: rows of `speed/*.json`: milliseconds of a step over `setup.batch` images
STEPS = {
    "clora": ("clora.json", "clora-bare"),
    "l2p": ("prompts-steps.json", "step-l2p-coda_prompt"),
    "dualprompt": ("prompts-steps.json", "step-dualprompt-coda_prompt"),
    "coda_prompt": ("prompts-steps.json", "step-coda_prompt-coda_prompt"),
}
#: methods without a measurement of their own: as this one
AS = {"finetune": "finetune_pp", "coda_prompt_small": "coda_prompt"}
AS_CONCEPTS = {"finetune": "custom_diffusion", "l2": "ewc"}
#: measured in results/photos and results/concepts: training of a method over that of this one
BASE, BASE_CONCEPTS = "clora", "lora"


@dataclass(frozen=True)
class Cost:
    """A run on the CPU measured."""

    preset: str
    domain: str
    method: str
    train_seconds: float
    eval_seconds: float
    #: where the method's speed comes from
    source: str

    @property
    def seconds(self) -> float:
        """Of the whole run, on the CPU measured."""
        return self.train_seconds + self.eval_seconds


def _row(folder: Path, file: str, name: str, measure: str = "time") -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A row of a result of `dualcl bench`, and its setup. UserError without it."""
    try:
        value = read_json(folder / "speed" / file)
        return next(r for r in value["rows"] if (r["name"], r["measure"]) == (name, measure)), value["setup"]
    except (OSError, ValueError, KeyError, StopIteration):
        raise UserError(f"{folder / 'speed' / file} has no {measure} of {name}; measure it with dualcl bench") from None


def ratios(records: Path, base: str) -> dict[str, float]:
    """Training time of every method over that of `base`: the fastest run of each, which other work disturbed least."""
    times: dict[str, list[float]] = {}
    for record in find_records([records]):
        seconds = sum(task["train_seconds"] for task in record.data["measured"]["tasks"])
        times.setdefault(record.label, []).append(seconds)
    return {label: min(found) / min(times[base]) for label, found in times.items()}


def _classification(folder: Path) -> list[Cost]:
    factors = ratios(folder / "photos" / "records", BASE)
    factors.update({name: factors[like] for name, like in AS.items()})
    per_image: dict[str, float] = {}
    for method, (file, name) in STEPS.items():
        row, setup = _row(folder, file, name)
        per_image[method] = row["ours"] / 1e3 / setup["batch"]
    growth = read_json(folder / "speed" / "growth.json")["rows"]
    per_test_image = statistics.median(
        1 / row["eval_images_per_s"] for row in growth if row["axis"] in ("tasks", "classes")
    )
    costs = []
    for preset, method in itertools.product(CLASSIFICATION, sorted(factors)):
        values = load_preset(preset).values
        train, test = IMAGES[values["data.name"][0]]
        epochs, tasks = int(values["train.epochs"][0]), int(values["stream.tasks"][0])
        own = per_image.get(method)
        seconds = per_image[BASE] * factors[method] if own is None else own
        passes = epochs if method != "ncm" else 1
        # a test image passes once in each evaluation after its task; joint training is evaluated once
        looked_at = test * (1 if method == "joint" else (tasks + 1) / 2)
        source = "step measured" if own else f"x {factors[method]:.2f} of {BASE}, as on photographs"
        costs.append(
            Cost(preset, "classification", method, train * passes * seconds, looked_at * per_test_image, source)
        )
    return costs


def _customization(folder: Path) -> list[Cost]:
    factors = {k: v for k, v in ratios(folder / "concepts" / "records", BASE_CONCEPTS).items() if "," not in k}
    factors.update({name: factors[like] for name, like in AS_CONCEPTS.items()})
    row, setup = _row(folder, "customization-lora.json", "dreambooth-lora")
    per_image = row["ours"] / 1e3 / setup["batch"] * FULL_SIZE
    row, setup = _row(folder, "sampling.json", "sampling-one-by-one")
    per_denoising = 1 / row["ours"] / setup["steps"] * FULL_SIZE * FULL_PIXELS
    costs = []
    for preset, method in itertools.product(CUSTOMIZATION, sorted(factors)):
        values = {key: value for key, (value, _) in load_preset(preset).values.items()}
        concepts = int(values["stream.tasks"])
        steps = int(values["train.steps"]) * concepts
        rows = 1 if method == "joint" else (concepts + 1) / 2
        images = int(values["eval.n"]) * concepts * rows
        train = steps * int(values["train.batch_size"]) * per_image * factors[method]
        evaluation = images * int(values["eval.steps"]) * per_denoising
        source = f"x {factors[method]:.2f} of {BASE_CONCEPTS}, as on pictographs"
        costs.append(Cost(preset, "customization", method, train, evaluation, source))
    return costs


def study(folder: Path) -> list[Cost]:
    """One run of every method on every stream of a full study; `folder` is that of the results. Raises UserError."""
    return [*_classification(folder), *_customization(folder)]


def simulated_jobs(folder: Path, count: int = 1000, speedup: float = GPU_SPEEDUP) -> list[dict[str, Any]]:
    """The jobs of a grid for a scheduler: seed after seed of the study, one GPU each, `count` in all."""
    costs = study(folder)
    jobs = (
        {
            "name": f"{cost.preset}/{cost.method}-seed{seed}",
            "seconds": round(cost.seconds / speedup, 1),
            "gpus": 1.0,
            "memory_gib": MEMORY_GIB[cost.domain],
        }
        for seed in itertools.count()
        for cost in costs
    )
    return list(itertools.islice(jobs, count))


# --- storage ----------------------------------------------------------------------------------------------------------

PARTS = ("record.json", "log.jsonl", "config.yaml", "checkpoints", "samples")


def folder_sizes(run: Path) -> dict[str, Any]:
    """Bytes of a run's folder by part, and its files and folders (inodes). UserError when it is no run."""
    if not (run / FILE_NAME).is_file():
        raise UserError(f"{run} is no run folder: it has no {FILE_NAME}")
    sizes, inodes = dict.fromkeys((*PARTS, "other"), 0), 1
    for place, folders, names in os.walk(run):
        inodes += len(folders) + len(names)
        for name in names:
            path = Path(place, name)
            part = path.relative_to(run).parts[0]
            sizes[part if part in sizes else "other"] += path.lstat().st_size
    return {**sizes, "inodes": inodes}


def measure_storage(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """What `storage.json` holds: a row per run folder, with what was stored and how long its log is."""
    rows = []
    for record in find_records(runs):
        config, tasks = record.data["config"], record.data["tasks"]
        rows.append(
            {
                "domain": record.data["run"]["domain"],
                "method": record.label,
                "backbone": (config.get("backbone") or config.get("base") or {}).get("name", "glyph-diffusion"),
                "tasks": record.n_tasks,
                "parameters_stored": tasks[-1]["parameters_stored"],
                "log_lines": len(record.log()),
                **folder_sizes(record.directory),
            }
        )
    return rows


# --- the page ---------------------------------------------------------------------------------------------------------

INTRODUCTION = """# Scale

What a full study would cost, from what was measured on a small machine. **Measured** are the seconds of training
steps and evaluations on two threads of one CPU (`speed/*.json`), the ratios between methods in recorded comparisons at
a small size ([photos](photos/README.md), [concepts](concepts/README.md); the fastest seed of each), the sizes of real
run folders (`scale/storage.json`), and time and memory of a report on 10,000 records (`scale/report*.json`).
**Assumed** are the sizes of the data sets, that cost grows in proportion to images, epochs, parameters of the U-Net and
pixels, and how much faster a GPU is: no GPU was measured, so GPU-hours are CPU-hours over a factor, and every figure in
them scales with it.
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [*(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)), ""]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.0f}" if seconds >= 36_000 else f"{seconds / 3600:.1f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.3f}"


def _times(costs: Sequence[Cost]) -> list[str]:
    rows = []
    for preset in (*CLASSIFICATION, *CUSTOMIZATION):
        own = [cost for cost in costs if cost.preset == preset]
        seconds = sorted(cost.seconds for cost in own)
        total = sum(seconds) * SEEDS
        share = sum(cost.eval_seconds for cost in own) / sum(seconds)
        spread = (seconds[0], statistics.median(seconds), seconds[-1])
        rows.append([preset, str(len(own) * SEEDS), *map(_hours, spread), f"{100 * share:.0f} %", _hours(total)])
        rows[-1].append(_hours(total / GPU_SPEEDUP))
    everything = sum(cost.seconds for cost in costs) * SEEDS
    rows.append(["all", str(len(costs) * SEEDS), "", "", "", "", _hours(everything), _hours(everything / GPU_SPEEDUP)])
    head = ["stream", "runs", "least h", "median h", "most h", "evaluation", "CPU h", f"GPU h at {GPU_SPEEDUP:g}x"]
    factors = ", ".join(f"{_hours(everything / f)} at {f}x" for f in (50, 100, 200, 400))
    return [
        "## Time",
        "",
        f"Every method on every stream with {SEEDS} seeds. Hours are those of the CPU measured (2 threads), for one "
        "run and for all; the last column is that over the assumed factor.",
        "",
        *_table(head, rows),
        f"GPU-hours of the whole, by the factor: {factors}.",
        "",
        "What the methods' times rest on:",
        "",
        *(f"- {domain}: {'; '.join(found)}" for domain, found in _sources(costs).items()),
        "",
    ]


def _sources(costs: Sequence[Cost]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for cost in costs:
        found.setdefault(cost.domain, {})[f"{cost.method} {cost.source}"] = None
    return {domain: list(lines) for domain, lines in found.items()}


def _storage(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["run folder", "tasks", "record KiB", "log B/line", "checkpoint MiB", "B/parameter", "samples MiB", "inodes"]
    cells = [
        [
            f"{row['method']} on {row['backbone']}",
            str(row["tasks"]),
            f"{row['record.json'] / 1024:.1f}",
            f"{row['log.jsonl'] / max(row['log_lines'], 1):.0f}",
            _mib(row["checkpoints"]),
            f"{row['checkpoints'] / row['parameters_stored']:.1f}",
            _mib(row["samples"]),
            str(row["inodes"]),
        ]
        for row in rows
    ]
    kept = [row for row in rows if not row["samples"]]
    many = 10_000
    record = statistics.median(row["record.json"] for row in rows) * many
    inodes = statistics.median(row["inodes"] for row in kept) * many
    largest = max(rows, key=lambda row: row["checkpoints"])
    lines = 24_000 // 128 * 50 // 10
    log = statistics.median(row["log.jsonl"] / max(row["log_lines"], 1) for row in rows) * lines
    sampled = max(rows, key=lambda row: row["samples"])
    return [
        "## Storage",
        "",
        "Real run folders after their last task (small data: only record and log grow with it).",
        "",
        *_table(head, cells),
        f"- A log has a line per {10} steps: {lines:,} for ImageNet-R in 50 epochs at a batch of 128, so "
        f"{log / 2**20:.2f} MiB a run and {log * many / 2**30:.1f} GiB for 10,000; records of 10,000 runs: "
        f"{record / 2**20:,.0f} MiB.",
        f"- Checkpoints of 10,000 finished runs as large as {largest['method']} on {largest['backbone']}: "
        f"{largest['checkpoints'] * many / 2**40:.2f} TiB. While a run trains, the checkpoint within its task lies "
        "beside that one and, as it is replaced, its predecessor, each with Adam's two moments of what is trained: "
        "three to seven times as much. A reader needs record.json and log.jsonl alone; checkpoints of finished runs "
        "may be deleted, unless images or exports are wanted.",
        "- DreamBooth on Stable Diffusion stores the U-Net, 860 M parameters: 3.2 GiB a run (4 bytes each, derived) "
        "and 9.6 GiB more within a task, twice that while the checkpoint there is replaced.",
        f"- Inodes: {inodes:,.0f} for 10,000 runs without images (median of these folders), "
        f"{sampled['inodes'] * many:,} with the images of {sampled['method']} on {sampled['backbone']}.",
        "",
    ]


def _breaks(report: Sequence[Mapping[str, Any]], grid: Mapping[str, Any] | None) -> list[str]:
    lines = ["## What breaks first", ""]
    lines += [
        "1. **Images.** A run of ten concepts keeps an image per prompt, concept and evaluation: with `eval.n=16` that "
        "is 880 files, so 10,000 runs are nine million inodes. Quotas of shared file systems are often one million "
        "(assumed): the limit is about 1,100 such runs; keep fewer (`eval.save=needed`, `eval.every`) or pack folders "
        "of finished runs.",
        "2. **Checkpoints.** With methods that store the whole network the disk fills long before anything else: see "
        "above. The limit is runs at once x the size within a task, plus finished runs x the size after it.",
        "3. **The metadata server.** A checkpoint is about ten operations (create, sync, rename, remove), one each "
        "minute and run: 1,000 runs at once are about 170 a second, below what a shared file system answers "
        "(thousands, assumed). `train.checkpoint_seconds` lowers it.",
    ]
    if not report:
        lines.append("4. **The report.** Not measured yet: `dualcl bench report DIR --format json`.")
    else:
        figures = "; ".join(
            f"{r['streams']} x {r['methods']} x {r['seeds']} like {r['like']}: {r['records']:,} records, "
            f"{r['seconds']:.0f} s, {r['mib']:.0f} MiB, page and files {r['written_mib']:.0f} MiB"
            for r in report
        )
        lines.append(
            f"4. **The report** (streams x methods x seeds). {figures}. Above 1,000 runs it "
            "shows one run per method in full and, on more than three streams, an overview in place of each stream's "
            f"plots. Memory grows with the records: one GiB holds about {_records_per_gib(report):,} of these."
        )
    lines.append("5. **The scheduler's head.** " + _head(grid))
    return [*lines, ""]


def _records_per_gib(report: Sequence[Mapping[str, Any]]) -> int:
    worst = max(report, key=lambda row: row["mib"] / row["records"])
    # what Python and matplotlib take without records stays in: the estimate is on the safe side
    return int(worst["records"] * 1024 / worst["mib"] // 1000 * 1000)


def _head(grid: Mapping[str, Any] | None) -> str:
    if grid is None:
        return "Not measured yet: the simulated grid below has not been run."
    return (
        f"{grid['overhead_per_job_seconds']:.2f} s of overhead per job at {grid['jobs']:,} jobs, which a job of "
        "minutes does not feel."
    )


def _simulation(grid: Mapping[str, Any] | None, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    total = sum(job["seconds"] for job in jobs)
    lines = [
        "## The simulated grid",
        "",
        f"`scale/jobs.json`: {len(jobs):,} jobs of this study, {_hours(total)} GPU-hours at {GPU_SPEEDUP:g}x, the "
        f"longest {_hours(max(job['seconds'] for job in jobs))} h. The scheduler ran them as sleeping jobs on a clock "
        "that goes faster.",
        "",
    ]
    if grid is None:
        return [*lines, "Not run yet: there is no `scale/simulated-grid.json`.", ""]
    ratio = grid["scheduled_seconds"] / grid["predicted_seconds"]
    rows = [
        ["jobs", f"{grid['jobs']:,}"],
        ["nodes", str(grid["nodes"])],
        ["clock", f"{grid['speedup']:g}x"],
        ["predicted h", _hours(grid["predicted_seconds"])],
        ["scheduled h", _hours(grid["scheduled_seconds"])],
        ["scheduled over predicted", f"{ratio:.3f}"],
        ["jobs retried", str(grid["retried"])],
        ["overhead per job, real s", f"{grid['overhead_per_job_seconds']:.3f}"],
    ]
    return [*lines, *_table(["quantity", "value"], rows)]


def _optional(path: Path) -> dict[str, Any] | None:
    """A JSON file, None where there is none. UserError for a broken one."""
    if not path.is_file():
        return None
    try:
        value: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    return value


def scale_page(folder: Path) -> str:
    """SCALE.md, to lie in `folder`, the folder of the results; what is not measured yet is said. Raises UserError."""
    costs = study(folder)
    storage = _optional(folder / "scale" / "storage.json")
    grid = _optional(folder / "scale" / "simulated-grid.json")
    lines = [INTRODUCTION, *_times(costs)]
    lines += _storage(storage["rows"]) if storage else ["## Storage", "", "Not measured yet.", ""]
    reports = [_optional(path) or {"rows": []} for path in sorted((folder / "scale").glob("report*.json"))]
    lines += _breaks([row for report in reports for row in report["rows"]], grid)
    lines += _simulation(grid, simulated_jobs(folder))
    return "\n".join(lines).rstrip("\n") + "\n"


def jobs_text(jobs: Sequence[Mapping[str, Any]]) -> str:
    """The jobs as a JSON file, a line each."""
    return "[\n" + ",\n".join(json.dumps(job) for job in jobs) + "\n]\n"
