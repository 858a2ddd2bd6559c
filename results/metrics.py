"""Metrics as pure functions of a recorded matrix; the only place where a formula, its name or its direction is written.

Accuracy functions take `acc`, made by `accuracies`: `acc[i][j]` is the accuracy in percent on task j's test set after
task i (zero-based, j <= i, all classes seen so far as candidates, no task id); a missing row is None. What cannot be
computed from the rows that exist is None, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum
from typing import Any

Cells = list["list[float] | None"]


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
class MatrixKind:
    """What a kind of recorded matrix offers to tables and plots."""

    #: columns of the table, before the columns of cost
    columns: tuple[str, ...]
    #: the two metrics of the trade-off plots
    quality: str
    forgetting: str
    #: what a cell of the matrix is, for axis labels
    cell_title: str
    cell_range: tuple[float, float]
    #: names of the per-task lists of a row, all of one length
    row_fields: tuple[str, ...]
    compute: Callable[[Mapping[str, Any], int], dict[str, float | None]]
    cells: Callable[[Mapping[str, Any], int], Cells]


KINDS: dict[str, MatrixKind] = {
    "accuracy": MatrixKind(
        columns=("A_last", "A_avg", "F_step", "F_max", "plasticity"),
        quality="A_last",
        forgetting="F_max",
        cell_title="accuracy [%]",
        cell_range=(0.0, 100.0),
        row_fields=("correct", "total"),
        compute=_accuracy_metrics,
        cells=accuracies,
    )
}


def run_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """All metrics of one record (the parsed record.json): those of its matrix, then those of cost."""
    kind = KINDS[record["matrix"]["kind"]]
    return {**kind.compute(record["matrix"], record["run"]["n_tasks"]), **cost_metrics(record)}
