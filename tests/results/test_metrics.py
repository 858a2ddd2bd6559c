from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualcl.results.metrics import (
    COST,
    KINDS,
    METRICS,
    UNLEARNING,
    a_avg,
    a_avg_weighted,
    a_last,
    a_last_weighted,
    a_mmd,
    accuracies,
    attribute_accuracy,
    attribute_accuracy_last,
    bwt,
    concept_accuracy,
    concept_accuracy_last,
    cost_metrics,
    distances,
    drifts,
    f_max,
    f_mmd,
    f_step,
    image_similarity,
    plasticity,
    right_concepts,
    run_metrics,
    text_similarity,
)

UNLEARNT = ("UA", "RA_I", "RA_C", "H_UA_RA", "RA_I_kept", "RA_C_kept")
CONCEPTS = (
    "A_mmd",
    "F_mmd",
    "image_similarity",
    "text_similarity",
    "concept_accuracy",
    "concept_accuracy_last",
    "attribute_accuracy",
    "attribute_accuracy_last",
    "prior_accuracy",
    *UNLEARNT,
)
#: a busy machine is no failure
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ALL = ("A_last", "A_last_weighted", "A_avg", "A_avg_weighted", "F_step", "F_max", "BWT", "plasticity")
# after 1: 90; after 2: 70 80; after 3: 60 50 100
HAND = [[90.0], [70.0, 80.0], [60.0, 50.0, 100.0]]


def matrix(rows: dict[int, list[tuple[int, int]]]) -> dict[str, Any]:
    return {
        "kind": "accuracy",
        "rows": [
            {"after_task": i, "correct": [c for c, _ in cells], "total": [t for _, t in cells]}
            for i, cells in rows.items()
        ],
    }


def test_every_metric_on_a_matrix_worked_out_by_hand() -> None:
    assert a_last(HAND) == pytest.approx((60 + 50 + 100) / 3)
    assert a_avg(HAND) == pytest.approx((90 + 75 + 70) / 3)
    # one step: 90 -> 70 is 20; next: (70 -> 60, 80 -> 50) is (10 + 30) / 2 = 20
    assert f_step(HAND) == pytest.approx(20)
    # best before the end: 90 and 80
    assert f_max(HAND) == pytest.approx(((90 - 60) + (80 - 50)) / 2)
    assert bwt(HAND) == pytest.approx(((60 - 90) + (50 - 80)) / 2)
    assert plasticity(HAND) == pytest.approx((90 + 80 + 100) / 3)


def test_forgetting_definitions_differ_on_a_steady_loss() -> None:
    # one point lost per task, ten tasks: CODA-Prompt's code says 1, max-minus-final says 5
    steady = [[90.0 - (i - j) for j in range(i + 1)] for i in range(10)]
    assert f_step(steady) == pytest.approx(1)
    assert f_max(steady) == pytest.approx(5)
    assert bwt(steady) == pytest.approx(-5)


def test_f_max_takes_the_best_row_before_the_last_even_when_it_came_later() -> None:
    acc = [[50.0], [80.0, 60.0], [70.0, 90.0, 10.0]]
    assert f_max(acc) == pytest.approx(((80 - 70) + (60 - 90)) / 2)
    assert bwt(acc) == pytest.approx(((70 - 50) + (90 - 60)) / 2)


def test_weighted_and_plain_last_accuracy_differ_on_unequal_tasks() -> None:
    recorded = matrix({0: [(9, 10)], 1: [(9, 10), (10, 100)]})
    assert a_last(accuracies(recorded, 2)) == pytest.approx((90 + 10) / 2)
    assert a_last_weighted(recorded, 2) == pytest.approx(100 * 19 / 110)
    assert a_avg_weighted(recorded, 2) == pytest.approx((90 + 100 * 19 / 110) / 2)
    assert a_avg_weighted(matrix({1: [(9, 10), (10, 100)]}), 2) is None


def test_one_task_has_no_forgetting() -> None:
    metrics = KINDS["accuracy"].compute(matrix({0: [(3, 4)]}), 1)
    assert {k for k, v in metrics.items() if v is None} == {"F_step", "F_max", "BWT"}
    assert metrics["A_last"] == metrics["A_avg"] == metrics["plasticity"] == 75


def test_joint_training_has_a_last_row_only() -> None:
    metrics = KINDS["accuracy"].compute(matrix({2: [(1, 2), (1, 2), (2, 2)]}), 3)
    assert metrics["A_last"] == pytest.approx(200 / 3)
    assert metrics["A_last_weighted"] == pytest.approx(400 / 6)
    assert all(metrics[key] is None for key in ("A_avg", "F_step", "F_max", "BWT", "plasticity"))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_missing_rows_make_metrics_undefined_not_wrong(missing: int) -> None:
    rows = {i: [(1, 2)] * (i + 1) for i in range(3) if i != missing}
    metrics = KINDS["accuracy"].compute(matrix(rows), 3)
    assert (metrics["A_last"] is None) == (missing == 2)
    assert all(metrics[key] is None for key in ("A_avg", "F_step", "F_max", "BWT", "plasticity"))


def test_an_empty_test_set_is_a_missing_row() -> None:
    assert accuracies(matrix({0: [(0, 0)], 1: [(1, 2), (2, 2)]}), 2) == [None, [50.0, 100.0]]


@st.composite
def matrices(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    n = draw(st.integers(1, 6))
    totals = draw(st.lists(st.integers(1, 50), min_size=n, max_size=n))
    rows = {i: [(draw(st.integers(0, t)), t) for t in totals[: i + 1]] for i in range(n)}
    order = draw(st.permutations(list(rows)))
    return matrix({i: rows[i] for i in order}), n


@PATIENT
@given(matrices())
def test_relations_that_hold_for_every_matrix(case: tuple[dict[str, Any], int]) -> None:
    recorded, n = case
    before = copy.deepcopy(recorded)
    acc = accuracies(recorded, n)
    metrics = KINDS["accuracy"].compute(recorded, n)
    assert recorded == before
    assert set(metrics) == set(ALL)
    last, learnt = metrics["A_last"], metrics["plasticity"]
    weighted = metrics["A_last_weighted"]
    assert last is not None
    assert learnt is not None
    assert weighted is not None
    assert acc[-1] is not None
    assert min(acc[-1]) - 1e-9 <= weighted <= max(acc[-1]) + 1e-9
    if n == 1:
        return
    forgotten, steps, transfer = metrics["F_max"], metrics["F_step"], metrics["BWT"]
    assert forgotten is not None
    assert steps is not None
    assert transfer is not None
    assert forgotten >= -transfer - 1e-9  # the best earlier accuracy is at least the first
    assert last == pytest.approx(learnt + (n - 1) / n * transfer, abs=1e-9)
    assert -100 <= steps <= 100
    assert -100 <= forgotten <= 100


@PATIENT
@given(matrices())
def test_two_tasks_leave_one_definition_of_forgetting(case: tuple[dict[str, Any], int]) -> None:
    recorded, n = case
    acc = accuracies(recorded, n)[:2]
    if len(acc) == 2:
        assert f_step(acc) == pytest.approx(f_max(acc))
        assert -(bwt(acc) or 0) == pytest.approx(f_max(acc))


@PATIENT
@given(st.integers(1, 6), st.floats(0, 100))
def test_a_constant_matrix_forgets_nothing(n: int, value: float) -> None:
    acc: list[list[float] | None] = [[value] * (i + 1) for i in range(n)]
    assert a_last(acc) == a_avg(acc) == plasticity(acc) == pytest.approx(value)
    if n > 1:
        assert f_step(acc) == f_max(acc) == bwt(acc) == 0


def test_costs_are_percent_of_the_network_largest_task_and_last_store() -> None:
    record = {
        "network": {"parameters": 1000},
        "tasks": [
            {"parameters_trained": 30, "parameters_stored": 10},
            {"parameters_trained": 20, "parameters_stored": 40},
        ],
        "measured": {"wall_seconds": 7.5, "tasks": [{"peak_mib": 100.0}, {"peak_mib": None}, {"peak_mib": 90.0}]},
    }
    assert cost_metrics(record) == {"N_train": 3.0, "N_store": 4.0, "time_s": 7.5, "peak_mib": 100.0}
    assert set(cost_metrics({}).values()) == {None}


def test_every_metric_has_a_title_a_direction_and_a_definition() -> None:
    lower = {"F_step", "F_max", "A_mmd", "F_mmd", "N_train", "N_store", "time_s", "peak_mib"}
    assert {m.key for m in METRICS.values() if not m.higher_is_better} == lower
    assert set(METRICS) == {*ALL, *CONCEPTS, *COST}
    for kind in KINDS.values():
        assert set(kind.columns) | {kind.quality, kind.forgetting} <= set(METRICS)
        assert METRICS[kind.quality].higher_is_better == kind.higher_is_better
        assert {curve.metric for curve in kind.curves} <= set(METRICS)
    record = {"run": {"n_tasks": 1}, "matrix": matrix({0: [(1, 2)]})}
    assert set(run_metrics(record)) == {*ALL, *COST}
    record = {"run": {"n_tasks": 3}, "matrix": {"kind": "mmd", "rows": list(GENERATED.values())}}
    assert set(run_metrics(record)) == {*CONCEPTS, *COST}


# after concept 1; after 2, where concept 1 was passed over; after 3
GENERATED: dict[int, dict[str, Any]] = {
    0: {
        "after_task": 0,
        "mmd": [0.010],
        "drift": [0.0],
        "image_similarity": [0.9],
        "text_similarity": [0.3],
        "nearest_correct": [8],
        "generated": [8],
        "attribute_share": [0.9],
    },
    1: {
        "after_task": 1,
        "mmd": [None, 0.020],
        "drift": [None, 0.0],
        "image_similarity": [None, 0.8],
        "text_similarity": [None, 0.2],
        "nearest_correct": [None, 5],
        "generated": [None, 8],
        "attribute_share": [None, 0.8],
    },
    2: {
        "after_task": 2,
        "mmd": [0.040, 0.030, 0.005],
        "drift": [0.030, 0.010, 0.0],
        "image_similarity": [0.6, 0.7, 0.95],
        "text_similarity": [0.1, 0.2, 0.3],
        "nearest_correct": [2, 4, 8],
        "generated": [8, 8, 16],
        "attribute_share": [0.5, 0.6, 0.7],
        "prior_share": [None, None, 0.875],
    },
}

#: the same of requests to unlearn
ASKED: dict[int, dict[str, Any]] = {
    0: {
        **GENERATED[0],
        "target_shown": [0.25],
        "target_shown_before": [1.0],
        "retained_inside": [0.75],
        "retained_inside_before": [0.75],
        "retained_across": [0.8],
        "retained_across_before": [0.8],
    },
    1: {
        **GENERATED[1],
        "target_shown": [None, 0.5],
        "target_shown_before": [None, 0.5],
        "retained_inside": [None, 0.6],
        "retained_inside_before": [None, 0.75],
        "retained_across": [None, 0.7],
        "retained_across_before": [None, 0.8],
    },
    2: {
        **GENERATED[2],
        "target_shown": [0.5, 0.25, 0.0],
        "target_shown_before": [1.0, 0.5, 1.0],
        "retained_inside": [None, None, 0.3],
        "retained_inside_before": [None, None, 0.75],
        "retained_across": [None, None, 0.6],
        "retained_across_before": [None, None, 0.8],
    },
}


def test_every_concept_metric_on_rows_worked_out_by_hand() -> None:
    assert a_mmd(GENERATED, 3) == pytest.approx(1000 * (0.040 + 0.030 + 0.005) / 3)
    assert f_mmd(GENERATED, 3) == pytest.approx(1000 * (0.030 + 0.010) / 2)  # the last concept had no time to drift
    assert image_similarity(GENERATED, 3) == pytest.approx((0.6 + 0.7 + 0.95) / 3)
    assert text_similarity(GENERATED, 3) == pytest.approx(0.2)
    assert concept_accuracy(GENERATED, 3) == pytest.approx(100 * (8 + 5 + 8) / (8 + 8 + 16))
    assert concept_accuracy_last(GENERATED, 3) == pytest.approx(100 * (2 + 4 + 8) / 32)
    assert attribute_accuracy(GENERATED, 3) == pytest.approx(100 * (0.9 + 0.8 + 0.7) / 3)
    assert attribute_accuracy_last(GENERATED, 3) == pytest.approx(60)
    recorded = {"kind": "mmd", "rows": list(GENERATED.values())}
    assert KINDS["mmd"].compute(recorded, 3)["prior_accuracy"] == pytest.approx(87.5)
    assert distances(recorded, 3) == [[10], [None, 20], [40, 30, 5]]
    assert drifts(recorded, 3) == [[], [None], [30, 10]]
    assert right_concepts(recorded, 3) == [[100], [None, 62.5], [25, 50, 50]]
    assert distances({"rows": [GENERATED[2]]}, 3) == [None, None, [40, 30, 5]]


def test_every_metric_of_requests_on_rows_worked_out_by_hand() -> None:
    values = KINDS["mmd"].compute({"kind": "mmd", "rows": list(ASKED.values())}, 3)
    assert values["UA"] == pytest.approx(75)  # not shown: 0.5, 0.75, 1
    assert (values["RA_I"], values["RA_C"]) == (pytest.approx(30), pytest.approx(60))
    assert values["H_UA_RA"] == pytest.approx(3 / (1 / 75 + 1 / 30 + 1 / 60))
    assert (values["RA_I_kept"], values["RA_C_kept"]) == (pytest.approx(40), pytest.approx(75))
    recorded = {"kind": "mmd", "rows": list(ASKED.values())}
    assert [curve.cells(recorded, 3) for curve in UNLEARNING] == [
        [[75], [None, 50], [50, 75, 100]],
        [[75], [pytest.approx(60)], [30]],
        [[80], [70], [60]],
    ]
    # nothing is taught that an image could be nearest to
    assert (values["concept_accuracy"], values["concept_accuracy_last"]) == (None, None)
    assert right_concepts(recorded, 3) == [None, None, None]
    # nor where no judge knows what was asked for
    unseen = [{**row, "target_shown": [None] * (i + 1)} for i, row in ASKED.items()]
    values = KINDS["mmd"].compute({"kind": "mmd", "rows": unseen}, 3)
    assert (values["UA"], values["concept_accuracy"], values["concept_accuracy_last"]) == (None, None, None)


def test_the_mean_over_unlearning_is_low_for_a_broken_model_and_for_one_that_is_as_it_was() -> None:
    def mean(gone: float, inside: float, across: float) -> float | None:
        row = {**ASKED[2], "target_shown": [1 - gone] * 3}
        row |= {"retained_inside": [None, None, inside], "retained_across": [None, None, across]}
        return KINDS["mmd"].compute({"kind": "mmd", "rows": [row]}, 3)["H_UA_RA"]

    assert mean(1.0, 0.0, 0.0) == 0
    assert mean(0.0, 0.9, 0.9) == 0
    assert mean(0.9, 0.9, 0.9) == pytest.approx(90)


@pytest.mark.parametrize(
    ("rows", "undefined"),
    [
        # joint training: a last row without drift
        ({2: {**GENERATED[2], "drift": [None] * 3}}, {"F_mmd", "concept_accuracy", "attribute_accuracy"}),
        # not yet at the end
        ({0: GENERATED[0], 1: GENERATED[1]}, set(CONCEPTS)),
        # features without a text part
        ({**GENERATED, 2: {**GENERATED[2], "text_similarity": [None] * 3}}, {"text_similarity"}),
    ],
)
def test_concept_metrics_without_their_values_are_undefined(
    rows: dict[int, dict[str, Any]], undefined: set[str]
) -> None:
    metrics = KINDS["mmd"].compute({"kind": "mmd", "rows": list(rows.values())}, 3)
    assert {key for key, value in metrics.items() if value is None} == {*undefined, *UNLEARNT}


def test_one_concept_has_no_drift_and_none_to_be_mistaken_for() -> None:
    metrics = KINDS["mmd"].compute({"kind": "mmd", "rows": [GENERATED[0]]}, 1)
    assert {key for key, value in metrics.items() if value is None} == {
        "F_mmd",
        "concept_accuracy",
        "concept_accuracy_last",
        "prior_accuracy",
        *UNLEARNT,
    }
    assert metrics["A_mmd"] == pytest.approx(10)
