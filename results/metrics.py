"""Metrics as pure functions of a recorded matrix; the only place where a formula, its name or its direction is written.

Accuracy functions take `acc`, made by `accuracies`: `acc[i][j]` is the accuracy in percent on task j's test set after
task i (zero-based, j <= i, all classes seen so far as candidates, no task id); a missing row is None. Functions of
distances take the recorded rows as `after_task` -> row. What cannot be computed from the rows that exist is None, never
0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum
from typing import Any

Cells = list["list[float] | None"]
#: a matrix to be drawn: row i holds tasks 0..i, None where not evaluated; None for a missing row
Grid = Sequence["Sequence[float | None] | None"]


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def _complete(acc: Cells) -> list[list[float]] | None:
    rows = [row for row in acc if row is not None]
    return rows if rows and len(rows) == len(acc) else None


def accuracies(matrix: Mapping[str, Any], n_tasks: int) -> Cells:
    """Recorded counts as percent: N rows, row i of length i + 1, None where a row is missing or a test set is empty."""
    acc: Cells = [None] * n_tasks
    for row in matrix["rows"]:
        if row["total"] and all(row["total"]):
            pairs = zip(row["correct"], row["total"], strict=True)
            acc[row["after_task"]] = [100.0 * correct / total for correct, total in pairs]
    return acc


def a_last(acc: Cells) -> float | None:
    """A_last (A_N in C-LoRA, arXiv 2304.06027): mean over j of R[N][j], percent."""
    return _mean(acc[-1]) if acc and acc[-1] else None


def a_last_weighted(matrix: Mapping[str, Any], n_tasks: int) -> float | None:
    """A_last_weighted: correct over all test samples after the last task, percent; larger tasks weigh more."""
    for row in matrix["rows"]:
        if row["after_task"] == n_tasks - 1 and sum(row["total"]):
            return 100.0 * sum(row["correct"]) / sum(row["total"])
    return None


def a_avg(acc: Cells) -> float | None:
    """A_avg (average incremental accuracy; iCaRL, Rebuffi et al. 2017): mean over i of mean over j <= i of R[i][j]."""
    rows = _complete(acc)
    return _mean([_mean(row) for row in rows]) if rows else None


def f_step(acc: Cells) -> float | None:
    """F_step (CODA-Prompt's public code): 1/(N-1) sum_{i=2..N} 1/(i-1) sum_{j<i} (R[i-1][j] - R[i][j]); points."""
    rows = _complete(acc)
    if rows is None or len(rows) < 2:
        return None
    return _mean(
        [
            _mean([before - after for before, after in zip(old, new, strict=False)])  # new has one task more
            for old, new in pairwise(rows)
        ]
    )


def f_max(acc: Cells) -> float | None:
    """F_max (Chaudhry et al. 2018; PILOT, mammoth): mean over j < N of (max_{i<N} R[i][j]) - R[N][j]; points."""
    rows = _complete(acc)
    if rows is None or len(rows) < 2:
        return None
    n = len(rows)
    return _mean([max(rows[i][j] for i in range(j, n - 1)) - rows[-1][j] for j in range(n - 1)])


def bwt(acc: Cells) -> float | None:
    """BWT (backward transfer; GEM, Lopez-Paz and Ranzato 2017): mean over j < N of R[N][j] - R[j][j]; points."""
    rows = _complete(acc)
    if rows is None or len(rows) < 2:
        return None
    return _mean([rows[-1][j] - rows[j][j] for j in range(len(rows) - 1)])


def plasticity(acc: Cells) -> float | None:
    """Plasticity (accuracy right after learning): mean over j of R[j][j], percent."""
    rows = _complete(acc)
    return _mean([row[-1] for row in rows]) if rows else None


def _accuracy_metrics(matrix: Mapping[str, Any], n_tasks: int) -> dict[str, float | None]:
    acc = accuracies(matrix, n_tasks)
    return {
        "A_last": a_last(acc),
        "A_last_weighted": a_last_weighted(matrix, n_tasks),
        "A_avg": a_avg(acc),
        "F_step": f_step(acc),
        "F_max": f_max(acc),
        "BWT": bwt(acc),
        "plasticity": plasticity(acc),
    }


#: distances are recorded raw, and shown times this
MMD_SCALE = 1e3

Rows = Mapping[int, Mapping[str, Any]]


def _rows(matrix: Mapping[str, Any]) -> Rows:
    return {row["after_task"]: row for row in matrix["rows"]}


def _whole(values: Sequence[float | None]) -> list[float] | None:
    """The values when there are some and none is missing."""
    known = [value for value in values if value is not None]
    return known if known and len(known) == len(values) else None


def _last_mean(rows: Rows, n_tasks: int, field: str) -> float | None:
    values = _whole(rows[n_tasks - 1][field]) if n_tasks - 1 in rows else None
    return _mean(values) if values else None


def a_mmd(rows: Rows, n_tasks: int) -> float | None:
    """A_mmd (C-LoRA, arXiv 2304.06027): mean over j of MMD(phi(X_j), phi(G[N][j])), x 10^3."""
    mean = _last_mean(rows, n_tasks, "mmd")
    return None if mean is None else MMD_SCALE * mean


def f_mmd(rows: Rows, n_tasks: int) -> float | None:
    """F_mmd (C-LoRA, arXiv 2304.06027): mean over j < N of MMD(phi(G[j][j]), phi(G[N][j])), x 10^3."""
    values = _whole(rows[n_tasks - 1]["drift"][:-1]) if n_tasks - 1 in rows else None
    return MMD_SCALE * _mean(values) if values else None


def image_similarity(rows: Rows, n_tasks: int) -> float | None:
    """Mean cosine between images generated after the last task and real ones, mean over concepts (cf. CLIP-I)."""
    return _last_mean(rows, n_tasks, "image_similarity")


def text_similarity(rows: Rows, n_tasks: int) -> float | None:
    """Mean cosine between images generated after the last task and their prompt, mean over concepts (cf. CLIP-T)."""
    return _last_mean(rows, n_tasks, "text_similarity")


def _share(correct: Sequence[int | None], generated: Sequence[int | None]) -> float | None:
    right, total = _whole(correct), _whole(generated)
    return 100.0 * sum(right) / sum(total) if right and total and sum(total) else None


def concept_accuracy(rows: Rows, n_tasks: int) -> float | None:
    """Images generated right after learning that are nearest to their own concept's real images, percent.

    Undefined for one concept: there is no other to be nearer to.
    """
    if n_tasks < 2 or len(rows) < n_tasks:
        return None
    learnt = [rows[j] for j in range(n_tasks)]
    return _share([row["nearest_correct"][-1] for row in learnt], [row["generated"][-1] for row in learnt])


def concept_accuracy_last(rows: Rows, n_tasks: int) -> float | None:
    """Images generated after the last task that are nearest to their own concept's real images, percent."""
    if n_tasks < 2 or n_tasks - 1 not in rows:
        return None
    return _share(rows[n_tasks - 1]["nearest_correct"], rows[n_tasks - 1]["generated"])


def _mmd_metrics(matrix: Mapping[str, Any], n_tasks: int) -> dict[str, float | None]:
    rows = _rows(matrix)
    return {
        "A_mmd": a_mmd(rows, n_tasks),
        "F_mmd": f_mmd(rows, n_tasks),
        "image_similarity": image_similarity(rows, n_tasks),
        "text_similarity": text_similarity(rows, n_tasks),
        "concept_accuracy": concept_accuracy(rows, n_tasks),
        "concept_accuracy_last": concept_accuracy_last(rows, n_tasks),
    }


def _scaled_rows(matrix: Mapping[str, Any], n_tasks: int, field: str) -> list[list[float | None] | None]:
    rows = _rows(matrix)
    return [
        [None if value is None else MMD_SCALE * value for value in rows[i][field]] if i in rows else None
        for i in range(n_tasks)
    ]


def distances(matrix: Mapping[str, Any], n_tasks: int) -> list[list[float | None] | None]:
    """MMD between the real images of concept j and those generated for it after task i, x 10^3: N rows of i + 1."""
    return _scaled_rows(matrix, n_tasks, "mmd")


def drifts(matrix: Mapping[str, Any], n_tasks: int) -> list[list[float | None] | None]:
    """MMD between concept j's images right after learning it and after task i, x 10^3: row i has j < i only."""
    return [row and row[:-1] for row in _scaled_rows(matrix, n_tasks, "drift")]


def _mmd_row_problem(row: Mapping[str, Any], n_tasks: int, joint: bool) -> str | None:
    """What is wrong with where a row has no value; None when it is in order."""
    after, seen = row["after_task"], [value is not None for value in row["mmd"]]
    for field in ("image_similarity", "nearest_correct", "generated"):
        if [value is not None for value in row[field]] != seen:
            return f"{field} and mmd are not there for the same concepts"
    texts = [value is not None for value in row["text_similarity"]]
    if any(texts) and texts != seen:  # none at all: the features have no text part
        return "text_similarity and mmd are not there for the same concepts"
    if any(value is not None and (joint or not there) for value, there in zip(row["drift"], seen, strict=True)):
        return "drift is there for a concept that has none"
    if not seen[-1] or (after == n_tasks - 1 and not all(seen)):
        return "a concept lacks its evaluation right after learning or after the last task"
    counts = zip(row["nearest_correct"], row["generated"], strict=True)
    if not all(0 <= right <= total for right, total in counts if right is not None):
        return "nearest_correct is more than generated"
    return None


def cost_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """What a run cost: N_train and N_store (percent of the adapted network), time_s, peak_mib; None where not recorded.

    N_train is the largest number of parameters trained for any task, N_store what is stored after the last one.
    """
    tasks, size = record.get("tasks") or [], (record.get("network") or {}).get("parameters")
    measured = record.get("measured") or {}
    trained = [t["parameters_trained"] for t in tasks if t.get("parameters_trained") is not None]
    stored = tasks[-1].get("parameters_stored") if tasks else None
    peaks = [t["peak_mib"] for t in measured.get("tasks") or [] if t.get("peak_mib") is not None]
    return {
        "N_train": 100.0 * max(trained) / size if trained and size else None,
        "N_store": 100.0 * stored / size if stored is not None and size else None,
        "time_s": measured.get("wall_seconds"),
        "peak_mib": max(peaks, default=None),
    }


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: direction, unit and the definition that the report prints."""

    key: str
    title: str
    latex: str
    unit: str
    higher_is_better: bool
    definition: str
    decimals: int = 2
    #: a count, equal in every seed unless something is odd: no "± 0"
    exact: bool = False


METRICS: dict[str, Metric] = {
    m.key: m
    for m in (
        Metric(
            "A_last",
            "A_last",
            r"$A_{\mathrm{last}}$",
            "%",
            True,
            "accuracy after the last task, mean over tasks: mean over j of R[N][j] (A_N in the C-LoRA paper)",
        ),
        Metric(
            "A_last_weighted",
            "A_last weighted",
            r"$A_{\mathrm{last}}^{w}$",
            "%",
            True,
            "accuracy after the last task over all test samples together (larger tasks weigh more)",
        ),
        Metric(
            "A_avg",
            "A_avg",
            r"$A_{\mathrm{avg}}$",
            "%",
            True,
            "average incremental accuracy: mean over i of the mean over j ≤ i of R[i][j]",
        ),
        Metric(
            "F_step",
            "F_step",
            r"$F_{\mathrm{step}}$",
            "points",
            False,
            "mean drop from one task to the next (as in the public CODA-Prompt code): "
            "1/(N-1) Σ_{i=2..N} 1/(i-1) Σ_{j<i} (R[i-1][j] - R[i][j])",
        ),
        Metric(
            "F_max",
            "F_max",
            r"$F_{\max}$",
            "points",
            False,
            "drop from the best earlier accuracy to the last (Chaudhry et al. 2018; PILOT, mammoth): "
            "mean over j < N of (max_{i<N} R[i][j]) - R[N][j]",
        ),
        Metric(
            "BWT",
            "BWT",
            r"BWT",
            "points",
            True,
            "backward transfer (Lopez-Paz and Ranzato 2017): mean over j < N of R[N][j] - R[j][j]",
        ),
        Metric(
            "plasticity",
            "plasticity",
            "plasticity",
            "%",
            True,
            "accuracy on each task right after learning it: mean over j of R[j][j]",
        ),
        Metric(
            "A_mmd",
            "A_mmd",
            r"$A_{\mathrm{mmd}}$",
            "×10³",
            False,
            "distance to the real images after the last task (C-LoRA paper): "
            "mean over j of MMD(φ(X_j), φ(G[N][j])) × 10³",
        ),
        Metric(
            "F_mmd",
            "F_mmd",
            r"$F_{\mathrm{mmd}}$",
            "×10³",
            False,
            "how far the generated images moved since their concept was learnt (C-LoRA paper): "
            "mean over j < N of MMD(φ(G[j][j]), φ(G[N][j])) × 10³",
        ),
        Metric(
            "image_similarity",
            "image sim.",
            "image sim.",
            "cosine",
            True,
            "similarity of the images generated after the last task to the real ones: mean cosine of φ over all pairs, "
            "mean over concepts, not scaled (CLIP-I in the literature, where φ is CLIP)",
            3,
        ),
        Metric(
            "text_similarity",
            "text sim.",
            "text sim.",
            "cosine",
            True,
            "similarity of the images generated after the last task to their prompt without the concept's token: mean "
            "cosine, mean over concepts, not scaled (CLIP-T in the literature); undefined where φ has no text part",
            3,
        ),
        Metric(
            "concept_accuracy",
            "concept acc.",
            "concept acc.",
            "%",
            True,
            "images generated right after learning their concept that are nearer to its real images (cosine of φ to "
            "their mean) than to those of any other concept of the stream; chance is 100 / N",
            1,
        ),
        Metric(
            "concept_accuracy_last",
            "concept acc. last",
            "concept acc. last",
            "%",
            True,
            "the same after the last task, for all concepts",
            1,
        ),
        Metric(
            "N_train",
            "N_train",
            r"$N_{\mathrm{train}}$",
            "%",
            False,
            "parameters trained for one task (the largest task) in percent of the adapted network",
            3,
            True,
        ),
        Metric(
            "N_store",
            "N_store",
            r"$N_{\mathrm{store}}$",
            "%",
            False,
            "parameters stored after the last task in percent of the adapted network",
            3,
            True,
        ),
        Metric("time_s", "time", "time", "s", False, "wall time of the whole run, evaluation included", 1),
        Metric("peak_mib", "peak memory", "peak memory", "MiB", False, "largest memory use of any task", 0),
    )
}

COST = ("N_train", "N_store", "time_s", "peak_mib")


@dataclass(frozen=True)
class Curve:
    """A quantity that is followed over the tasks: the mean of a row of its cells after every task."""

    heading: str
    #: of the axis
    title: str
    cells: Callable[[Mapping[str, Any], int], Grid]
    #: the metric that the last point is, where joint training has one to draw as a line
    metric: str


@dataclass(frozen=True)
class MatrixKind:
    """What a kind of recorded matrix offers to tables and plots."""

    #: heading of its part of the report
    heading: str
    #: what a row and a column of the matrix stands for
    item: str
    #: the symbols in the definitions of its metrics
    notation: str
    #: columns of the table, before the columns of cost
    columns: tuple[str, ...]
    #: metrics whose differences between methods are tested
    compared: tuple[str, ...]
    #: the two metrics of the trade-off plots
    quality: str
    forgetting: str
    #: what a cell of the matrix is, for axis labels
    cell_title: str
    #: None: as far as the values go
    cell_range: tuple[float, float] | None
    higher_is_better: bool
    #: followed over the tasks: the quality, and the forgetting where it is recorded apart
    curves: tuple[Curve, ...]
    #: names of the per-task lists of a row, all of one length
    row_fields: tuple[str, ...]
    compute: Callable[[Mapping[str, Any], int], dict[str, float | None]]
    cells: Callable[[Mapping[str, Any], int], Grid]
    #: those lists whose entries may be null
    nullable: frozenset[str] = frozenset()
    #: (row, n_tasks, joint) -> what is wrong with the row, beyond its lengths and numbers
    problem: Callable[[Mapping[str, Any], int, bool], str | None] = lambda row, n_tasks, joint: None


_MMD_FIELDS = ("mmd", "drift", "image_similarity", "text_similarity", "nearest_correct", "generated")

KINDS: dict[str, MatrixKind] = {
    "accuracy": MatrixKind(
        heading="Classification",
        item="task",
        notation="R[i][j] is the accuracy on task j after learning task i, with all classes seen so far as candidates "
        "and no task id given; N is the number of tasks. A dash means undefined (forgetting needs two tasks; joint "
        "training has no tasks to forget).",
        columns=("A_last", "A_avg", "F_step", "F_max", "plasticity"),
        compared=("A_last", "A_avg", "F_step", "F_max"),
        quality="A_last",
        forgetting="F_max",
        cell_title="accuracy [%]",
        cell_range=(0.0, 100.0),
        higher_is_better=True,
        curves=(Curve("after every task", "accuracy [%], mean over tasks so far", accuracies, "A_last"),),
        row_fields=("correct", "total"),
        compute=_accuracy_metrics,
        cells=accuracies,
    ),
    "mmd": MatrixKind(
        heading="Customization",
        item="concept",
        notation="X_j are the real images of concept j, G[i][j] the images generated for it after learning concept i, "
        "always from the same prompts and seeds, and N is the number of concepts. φ are image features of unit length, "
        "and MMD is the squared maximum mean discrepancy (Gretton et al., JMLR 2012); features, kernel and estimator "
        "are named with each table, and values under different ones do not compare. A dash means undefined "
        "(forgetting needs two concepts; joint training has none to forget).",
        columns=(
            "A_mmd",
            "F_mmd",
            "image_similarity",
            "text_similarity",
            "concept_accuracy",
            "concept_accuracy_last",
        ),
        compared=("A_mmd", "F_mmd"),
        quality="A_mmd",
        forgetting="F_mmd",
        cell_title="MMD to the real images × 10³",
        cell_range=None,
        higher_is_better=False,
        curves=(
            Curve(
                "distance to the real images",
                "MMD to the real images × 10³,\nmean over concepts so far",
                distances,
                "A_mmd",
            ),
            Curve(
                "drift since learning",
                "MMD to the images right after learning × 10³,\nmean over earlier concepts",
                drifts,
                "F_mmd",
            ),
        ),
        row_fields=_MMD_FIELDS,
        compute=_mmd_metrics,
        cells=distances,
        nullable=frozenset(_MMD_FIELDS),
        problem=_mmd_row_problem,
    ),
}


def run_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """All metrics of one record (the parsed record.json): those of its matrix, then those of cost."""
    kind = KINDS[record["matrix"]["kind"]]
    return {**kind.compute(record["matrix"], record["run"]["n_tasks"]), **cost_metrics(record)}
