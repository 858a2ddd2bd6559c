"""Metrics as pure functions of a recorded matrix; the only place where a formula, its name or its direction is written.

Accuracy functions take `acc`, made by `accuracies`: `acc[i][j]` is the accuracy in percent on task j's test set after
task i (zero-based, j <= i, all classes seen so far as candidates, no task id); a missing row is None. Functions of
distances take the recorded rows as `after_task` -> row. What cannot be computed from the rows that exist is None, never
0.

A new measure is one `Measure` in KINDS; README.md in this folder has an example.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import fsum
from typing import Any

from dualcl.results.record_type import Curve, Field, MatrixKind, Measure, Results, last_mean, optional_field, whole

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


def a_avg_weighted(matrix: Mapping[str, Any], n_tasks: int) -> float | None:
    """A_avg_weighted (PILOT): mean over i of correct over all test samples seen after task i, percent."""
    shares = {r["after_task"]: 100.0 * sum(r["correct"]) / sum(r["total"]) for r in matrix["rows"] if sum(r["total"])}
    return _mean([*shares.values()]) if len(shares) == n_tasks else None


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


#: distances are recorded raw, and shown times this
MMD_SCALE = 1e3

Rows = Mapping[int, Mapping[str, Any]]


def _rows(matrix: Mapping[str, Any]) -> Rows:
    return {row["after_task"]: row for row in matrix["rows"]}


def a_mmd(rows: Rows, n_tasks: int) -> float | None:
    """A_mmd (C-LoRA, arXiv 2304.06027): mean over j of MMD(phi(X_j), phi(G[N][j])), x 10^3."""
    mean = last_mean(rows, n_tasks, "mmd")
    return None if mean is None else MMD_SCALE * mean


def f_mmd(rows: Rows, n_tasks: int) -> float | None:
    """F_mmd (C-LoRA, arXiv 2304.06027): mean over j < N of MMD(phi(G[j][j]), phi(G[N][j])), x 10^3."""
    values = whole(rows[n_tasks - 1]["drift"][:-1]) if n_tasks - 1 in rows else None
    return MMD_SCALE * _mean(values) if values else None


def image_similarity(rows: Rows, n_tasks: int) -> float | None:
    """Mean cosine between images generated after the last task and real ones, mean over concepts (cf. CLIP-I)."""
    return last_mean(rows, n_tasks, "image_similarity")


def text_similarity(rows: Rows, n_tasks: int) -> float | None:
    """Mean cosine between images generated after the last task and their prompt, mean over concepts (cf. CLIP-T)."""
    return last_mean(rows, n_tasks, "text_similarity")


def _share(correct: Sequence[int | None], generated: Sequence[int | None]) -> float | None:
    right, total = whole(correct), whole(generated)
    return 100.0 * sum(right) / sum(total) if right and total and sum(total) else None


def of_requests(matrix: Mapping[str, Any]) -> bool:
    """Whether targets were unlearnt: they have no real images of their own that an image could be nearest to."""
    return any("target_shown" in row for row in matrix["rows"])


def concept_accuracy(rows: Rows, n_tasks: int) -> float | None:
    """Images generated right after learning that are nearest to their own concept's real images, percent.

    Undefined for one concept, as there is no other to be nearer to; not asked of requests to unlearn.
    """
    if n_tasks < 2 or len(rows) < n_tasks:
        return None
    learnt = [rows[j] for j in range(n_tasks)]
    return _share([row["nearest_correct"][-1] for row in learnt], [row["generated"][-1] for row in learnt])


def concept_accuracy_last(rows: Rows, n_tasks: int) -> float | None:
    """Images generated after the last task that are nearest to their own concept's real images, percent.

    Undefined as `concept_accuracy` is.
    """
    if n_tasks < 2 or n_tasks - 1 not in rows:
        return None
    return _share(rows[n_tasks - 1]["nearest_correct"], rows[n_tasks - 1]["generated"])


def _of_concepts(measure: Callable[[Rows, int], float | None], results: Results) -> float | None:
    return None if of_requests(results.matrix) else measure(results.rows, results.n_tasks)


def attribute_accuracy(rows: Rows, n_tasks: int) -> float | None:
    """Attributes right on the images generated right after learning, percent, mean over concepts."""
    if len(rows) < n_tasks:
        return None
    values = whole([rows[j]["attribute_share"][-1] for j in range(n_tasks)])
    return 100.0 * _mean(values) if values else None


def attribute_accuracy_last(rows: Rows, n_tasks: int) -> float | None:
    """Attributes right on the images generated after the last task, percent, mean over concepts."""
    mean = last_mean(rows, n_tasks, "attribute_share")
    return None if mean is None else 100.0 * mean


def last_retained(rows: Rows, n_tasks: int, field: str) -> float | None:
    """What was measured after the last task, percent: the last entry of a list that has nothing else."""
    values = rows.get(n_tasks - 1, {}).get(field) or [None]
    return None if values[-1] is None else 100.0 * values[-1]


def unlearning_accuracy(rows: Rows, n_tasks: int) -> float | None:
    """UA (arXiv 2511.07970): images after the last request that do not show their target, percent, over targets."""
    mean = last_mean(rows, n_tasks, "target_shown")
    return None if mean is None else 100.0 * (1.0 - mean)


def of_pretrained(rows: Rows, n_tasks: int, field: str) -> float | None:
    """What is retained after the last request in percent of what the pretrained model shows."""
    now, before = (last_retained(rows, n_tasks, name) for name in (field, f"{field}_before"))
    return 100.0 * now / before if now is not None and before else None


def unlearning_mean(rows: Rows, n_tasks: int) -> float | None:
    """Harmonic mean of UA, RA-I and RA-C, percent; 0 where one of them is 0."""
    three = [
        unlearning_accuracy(rows, n_tasks),
        *(last_retained(rows, n_tasks, f"retained_{where}") for where in ("inside", "across")),
    ]
    values = [value for value in three if value is not None]
    if len(values) < len(three):
        return None
    return statistics.harmonic_mean(values)


def unlearnt(matrix: Mapping[str, Any], n_tasks: int) -> list[list[float | None] | None]:
    """Percent of images of target j, after request i, that do not show it: N rows of i + 1."""
    rows = [_rows(matrix).get(i, {}).get("target_shown") for i in range(n_tasks)]
    return [row and [None if value is None else 100.0 * (1.0 - value) for value in row] for row in rows]


def _retained_rows(field: str) -> Callable[[Mapping[str, Any], int], list[list[float | None] | None]]:
    return lambda matrix, n_tasks: [[last_retained(_rows(matrix), i + 1, field)] for i in range(n_tasks)]


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


def right_concepts(matrix: Mapping[str, Any], n_tasks: int) -> list[list[float | None] | None]:
    """Images generated for concept j after task i that are nearest to its own real images, percent: N rows of i + 1.

    None of requests to unlearn.
    """
    rows = _rows(matrix)
    if of_requests(matrix):
        return [None] * n_tasks
    counts = {i: zip(row["nearest_correct"], row["generated"], strict=True) for i, row in rows.items()}
    return [[_share([n], [total]) for n, total in counts[i]] if i in counts else None for i in range(n_tasks)]


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


def _n_train(results: Results) -> float | None:
    tasks, size = results.record.get("tasks") or [], (results.record.get("network") or {}).get("parameters")
    trained = [t["parameters_trained"] for t in tasks if t.get("parameters_trained") is not None]
    return 100.0 * max(trained) / size if trained and size else None


def _n_store(results: Results) -> float | None:
    tasks, size = results.record.get("tasks") or [], (results.record.get("network") or {}).get("parameters")
    stored = tasks[-1].get("parameters_stored") if tasks else None
    return 100.0 * stored / size if stored is not None and size else None


def _peak(results: Results) -> float | None:
    tasks = (results.record.get("measured") or {}).get("tasks") or []
    return max((t["peak_mib"] for t in tasks if t.get("peak_mib") is not None), default=None)


#: of every kind
COSTS = (
    Measure(
        "N_train", "N_train", "%", "lower",
        "parameters trained for one task (the largest task) in percent of the adapted network",
        _n_train, latex=r"$N_{\mathrm{train}}$", decimals=3, exact=True,
    ),
    Measure(
        "N_store", "N_store", "%", "lower",
        "parameters stored after the last task in percent of the adapted network",
        _n_store, latex=r"$N_{\mathrm{store}}$", decimals=3, exact=True,
    ),
    Measure(
        "time_s", "time", "s", "lower", "wall time of the whole run, evaluation included",
        lambda results: (results.record.get("measured") or {}).get("wall_seconds"), decimals=1,
    ),
    Measure("peak_mib", "peak memory", "MiB", "lower", "largest memory use of any task", _peak, decimals=0),
)  # fmt: skip
COST = tuple(measure.key for measure in COSTS)


def _counts(name: str, what: str, nullable: bool = False) -> Field:
    return Field(name, "integer", what, "images", nullable=nullable)


def _values(name: str, what: str, unit: str) -> Field:
    return Field(name, "number", what, unit, nullable=True)


_SHARE = Field("attribute_share", "number", "share of attributes right on the images", required=False, nullable=True)


def _share_of(name: str, what: str) -> Field:
    return Field(name, "number", what, required=False, nullable=True)


#: requests: what is followed over them, beside the curves of the kind
UNLEARNING = (
    Curve("targets gone", "UA [%], over targets so far", unlearnt, "UA"),
    Curve("retained, inside", "RA-I [%]", _retained_rows("retained_inside"), "RA_I"),
    Curve("retained, across", "RA-C [%]", _retained_rows("retained_across"), "RA_C"),
)

KINDS: dict[str, MatrixKind] = {
    "accuracy": MatrixKind(
        heading="Classification",
        item="task",
        notation="R[i][j] is the accuracy on task j after learning task i, with all classes seen so far as candidates "
        "and no task id given; N is the number of tasks. A dash means undefined (forgetting needs two tasks; joint "
        "training has no tasks to forget).",
        fields=(_counts("correct", "test images predicted correctly"), _counts("total", "test images")),
        measures=(
            Measure(
                "A_last", "A_last", "%", "higher",
                "accuracy after the last task, mean over tasks: mean over j of R[N][j] (A_N in the C-LoRA paper)",
                lambda results: a_last(results.cells), latex=r"$A_{\mathrm{last}}$", compared=True,
            ),
            Measure(
                "A_last_weighted", "A_last over images", "%", "higher",
                "accuracy after the last task over all test samples together (larger tasks weigh more)",
                lambda results: a_last_weighted(results.matrix, results.n_tasks),
                latex=r"$A_{\mathrm{last}}^{\mathrm{images}}$", beside="A_last",
            ),
            Measure(
                "A_avg", "A_avg", "%", "higher",
                "average incremental accuracy, mean over tasks: mean over i of the mean over j ≤ i of R[i][j]",
                lambda results: a_avg(results.cells), latex=r"$A_{\mathrm{avg}}$", compared=True,
            ),
            Measure(
                "A_avg_weighted", "A_avg over images", "%", "higher",
                "average incremental accuracy over images, as in PILOT: mean over i of the accuracy after task i over "
                "all test samples seen so far together (larger tasks weigh more)",
                lambda results: a_avg_weighted(results.matrix, results.n_tasks),
                latex=r"$A_{\mathrm{avg}}^{\mathrm{images}}$", beside="A_avg",
            ),
            Measure(
                "F_step", "F_step", "points", "lower",
                "mean drop from one task to the next (as in the public CODA-Prompt code): "
                "1/(N-1) Σ_{i=2..N} 1/(i-1) Σ_{j<i} (R[i-1][j] - R[i][j])",
                lambda results: f_step(results.cells), latex=r"$F_{\mathrm{step}}$", compared=True,
            ),
            Measure(
                "F_max", "F_max", "points", "lower",
                "drop from the best earlier accuracy to the last (Chaudhry et al. 2018; PILOT, mammoth): "
                "mean over j < N of (max_{i<N} R[i][j]) - R[N][j]",
                lambda results: f_max(results.cells), latex=r"$F_{\max}$", compared=True,
            ),
            Measure(
                "BWT", "BWT", "points", "higher",
                "backward transfer (Lopez-Paz and Ranzato 2017): mean over j < N of R[N][j] - R[j][j]",
                lambda results: bwt(results.cells), column=False,
            ),
            Measure(
                "plasticity", "plasticity", "%", "higher",
                "accuracy on each task right after learning it: mean over j of R[j][j]",
                lambda results: plasticity(results.cells),
            ),
        ),
        quality="A_last",
        forgetting="F_max",
        cell_title="accuracy [%]",
        cell_range=(0.0, 100.0),
        curves=(Curve("after every task", "accuracy [%], mean over tasks so far", accuracies, "A_last"),),
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
        fields=(
            _values("mmd", "squared MMD to the real images, not scaled", ""),
            _values("drift", "squared MMD to the images right after learning, not scaled", ""),
            _values("image_similarity", "mean cosine to the real images", ""),
            _values("text_similarity", "mean cosine to the prompt", ""),
            _counts("nearest_correct", "generated images nearest to their own concept", True),
            _counts("generated", "generated images", True),
        ),
        measures=(
            Measure(
                "concept_accuracy_last", "concept acc. last", "%", "higher",
                "images generated after the last task that are nearer to the real images of their concept (cosine of φ "
                "to their mean) than to those of any other concept of the stream; chance is 100 / N",
                lambda results: _of_concepts(concept_accuracy_last, results), decimals=1, compared=True,
                may_lack=True,
            ),
            Measure(
                "concept_accuracy", "concept acc.", "%", "higher",
                "the same right after learning a concept, mean over them: what was learnt, forgotten or not",
                lambda results: _of_concepts(concept_accuracy, results), decimals=1, may_lack=True,
            ),
            Measure(
                "attribute_accuracy_last", "attributes last", "%", "higher",
                "attributes of a concept that the judge sees on the images generated after the last task, mean over "
                "its images and over concepts; a network that learns nothing has about the share of a guess",
                lambda results: attribute_accuracy_last(results.rows, results.n_tasks), decimals=1,
                field=_SHARE,
            ),
            Measure(
                "attribute_accuracy", "attributes", "%", "higher",
                "the same right after learning a concept",
                lambda results: attribute_accuracy(results.rows, results.n_tasks), decimals=1,
                field=_SHARE,
            ),
            Measure(
                "prior_accuracy", "prior", "%", "higher",
                "attributes named by captions of what is not taught that the judge sees on their images after the last "
                "task: what is left of the pretrained model, which concept accuracy does not see",
                lambda results: last_retained(results.rows, results.n_tasks, "prior_share"), decimals=1,
                field=_share_of("prior_share", "share of attributes that captions of other things name, last entry"),
            ),
            # of requests to unlearn, which have no concept accuracy: what a table shows first
            Measure(
                "UA", "UA", "%", "higher",
                "images of the targets' prompts after the last request on which the judge does not see the target, "
                "mean over targets (arXiv 2511.07970). A broken model has 100: read RA-I and RA-C beside it",
                lambda results: unlearning_accuracy(results.rows, results.n_tasks), decimals=1,
                field=_share_of("target_shown", "share of images on which the request's target is seen"),
            ),
            Measure(
                "RA_I", "RA-I", "%", "higher",
                "images after the last request that show what they should, of values that no request unlearns of the "
                "attributes that requests are of",
                lambda results: last_retained(results.rows, results.n_tasks, "retained_inside"), decimals=1,
                field=_share_of("retained_inside", "the same of what is to be retained, of the requests' attributes"),
            ),
            Measure(
                "RA_C", "RA-C", "%", "higher",
                "the same of values of other attributes",
                lambda results: last_retained(results.rows, results.n_tasks, "retained_across"), decimals=1,
                field=_share_of("retained_across", "the same of other attributes"),
            ),
            Measure(
                "H_UA_RA", "H(UA, RA)", "%", "higher",
                "harmonic mean of UA, RA-I and RA-C (ours): low for a broken model, and for one that unlearnt nothing",
                lambda results: unlearning_mean(results.rows, results.n_tasks), decimals=1, may_lack=True,
            ),
            Measure(
                "RA_I_kept", "RA-I kept", "%", "higher",
                "RA-I in percent of that of the pretrained model",
                lambda results: of_pretrained(results.rows, results.n_tasks, "retained_inside"), decimals=1,
                field=_share_of("retained_inside_before", "retained_inside of the pretrained model"),
            ),
            Measure(
                "RA_C_kept", "RA-C kept", "%", "higher",
                "RA-C in percent of that of the pretrained model",
                lambda results: of_pretrained(results.rows, results.n_tasks, "retained_across"), decimals=1,
                field=_share_of("retained_across_before", "retained_across of the pretrained model"),
            ),
            Measure(
                "A_mmd", "A_mmd", "×10³", "lower",
                "distance to the real images after the last task (C-LoRA paper): "
                "mean over j of MMD(φ(X_j), φ(G[N][j])) × 10³",
                lambda results: a_mmd(results.rows, results.n_tasks), latex=r"$A_{\mathrm{mmd}}$", compared=True,
            ),
            Measure(
                "F_mmd", "F_mmd", "×10³", "lower",
                "how far the generated images moved since their concept was learnt (C-LoRA paper): "
                "mean over j < N of MMD(φ(G[j][j]), φ(G[N][j])) × 10³",
                lambda results: f_mmd(results.rows, results.n_tasks), latex=r"$F_{\mathrm{mmd}}$", compared=True,
            ),
            Measure(
                "image_similarity", "image sim.", "cosine", "higher",
                "similarity of the images generated after the last task to the real ones: mean cosine of φ over all "
                "pairs, mean over concepts, not scaled (CLIP-I in the literature, where φ is CLIP)",
                lambda results: image_similarity(results.rows, results.n_tasks), decimals=3,
            ),
            Measure(
                "text_similarity", "text sim.", "cosine", "higher",
                "similarity of the images generated after the last task to their prompt without the concept's token: "
                "mean cosine, mean over concepts, not scaled (CLIP-T in the literature); undefined where φ has no text "
                "part",
                lambda results: text_similarity(results.rows, results.n_tasks), decimals=3, may_lack=True,
            ),
        ),
        quality="A_mmd",
        forgetting="F_mmd",
        cell_title="MMD to the real images × 10³",
        cell_range=None,
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
            Curve(
                "pictures of the right concept",
                "nearest to their own concept's real images [%],\nmean over concepts so far",
                right_concepts,
                "concept_accuracy_last",
            ),
        ),
        cells=distances,
        problem=_mmd_row_problem,
        row_fields=("target_shown_before",),
    ),
}  # fmt: skip

#: all measures, those of cost last
METRICS: dict[str, Measure] = {m.key: m for m in (*(m for kind in KINDS.values() for m in kind.measures), *COSTS)}


def cost_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """What a run cost: N_train and N_store (percent of the adapted network), time_s, peak_mib; None where not recorded.

    N_train is the largest number of parameters trained for any task, N_store what is stored after the last one.
    """
    results = Results(record)
    return {measure.key: measure.value(results) for measure in COSTS}


def _mean_as_recorded(name: str) -> Callable[[Results], float | None]:
    return lambda results: last_mean(_rows(results.matrix), results.n_tasks, name)


def declared_measures(matrix: Mapping[str, Any]) -> list[Measure]:
    """The measures of a plug-in that a record itself declares (`matrix.measures`), without those known here."""
    kind = KINDS[matrix["kind"]]
    taken = {*METRICS, *kind.row_fields}
    return [
        Measure(
            f"{name} (plug-in)" if name in taken else name,
            f"{name} (plug-in)" if name in taken else name,
            about["unit"], about["better"], str(about.get("definition") or f"{name}, a measure of a plug-in"),
            _mean_as_recorded(name),
            optional_field(name), decimals=3,
        )
        for name, about in (matrix.get("measures") or {}).items()
        if not kind.knows(name, about)
    ]  # fmt: skip


def measures_of(record: Mapping[str, Any]) -> list[Measure]:
    """The measures of one record: those of its matrix, those that it declares, those of cost."""
    matrix = record["matrix"]
    return [*KINDS[matrix["kind"]].measures, *declared_measures(matrix), *COSTS]


def run_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """All metrics of one record (the parsed record.json) by key, in the order of `measures_of`."""
    results = Results(record, KINDS[record["matrix"]["kind"]])
    return {measure.key: measure.value(results) for measure in measures_of(record)}
