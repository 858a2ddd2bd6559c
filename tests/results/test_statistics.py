from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Mapping

import pytest
from scipy import stats

from dualcl.benchmark.core.errors import UserError
from dualcl.results.statistics import Ranking, compare, critical_difference, holm, paired, rank_methods

BASE = {0: 40.0, 1: 42.0, 2: 41.0, 3: 39.0}


def draws(shift: float, noise: float, seed: int, n: int = 6) -> dict[int, float | None]:
    source = random.Random(seed)
    return {s: 50 + shift + source.gauss(0, noise) for s in range(n)}


def test_differences_by_hand() -> None:
    found = paired("a", {0: 42.0, 1: 43.0, 2: 44.0}, BASE)  # differences 2, 1, 3
    assert found.seeds == (0, 1, 2)
    assert (found.method_mean, found.baseline_mean) == (43, 41)
    assert (found.mean, found.std) == (2, 1)
    # t = 2 sqrt(3) on 2 degrees of freedom, whose distribution is 1/2 + t / (2 sqrt(2 + t^2))
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-12)
    (alone,) = compare({"a": {0: 42.0, 1: 43.0, 2: 44.0}}, BASE)
    half = 4.302652729911275 / math.sqrt(3)  # the tabled t(0.975, 2) over sqrt(n), std 1
    assert (alone.low, alone.high) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert alone.level == pytest.approx(0.95)
    assert alone.p_holm == found.p
    assert not alone.significant


@pytest.mark.parametrize(("n", "shift", "noise"), [(2, 1.0, 1.0), (3, 0.0, 2.0), (5, 4.0, 0.5), (30, -0.3, 1.0)])
def test_a_single_comparison_is_scipys_paired_t_test(n: int, shift: float, noise: float) -> None:
    a, b = draws(shift, noise, 1, n), draws(0, noise, 2, n)
    reference = stats.ttest_rel(list(a.values()), list(b.values()))
    for confidence in (0.9, 0.95, 0.99):
        (found,) = compare({"a": a}, b, confidence)
        interval = reference.confidence_interval(confidence)
        assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
        assert found.significant == (reference.pvalue < 1 - confidence)


def test_holms_correction_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])  # never above 1
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([]) == []


def test_an_interval_leaves_zero_out_exactly_where_the_difference_is_significant() -> None:
    marked = kept = 0
    for seed in range(120):
        source = random.Random(seed)
        methods = {
            f"m{i}": draws(source.choice([0, 0.5, 1, 2, 4]), source.choice([0.3, 1, 3]), 100 * seed + i, 4)
            for i in range(source.randint(1, 8))
        }
        base = draws(0, 0.5, -seed - 1, 4)
        for found in compare(methods, base):
            assert found.low is not None
            assert found.high is not None
            assert found.p_holm is not None
            assert found.p is not None
            assert found.level is not None
            assert found.significant == (found.p_holm < 0.05)
            assert found.significant == (not found.low <= 0 <= found.high)
            assert found.p_holm >= found.p
            assert 0.95 - 1e-12 <= found.level <= 1 - 0.05 / len(methods) + 1e-12
            marked += found.significant
            kept += not found.significant and found.p < 0.05
    assert marked > 50
    assert kept > 20  # single tests that the correction undoes


def test_the_step_where_holm_stops_sets_the_level_of_the_rest() -> None:
    # single p about 0.001, 0.03 and 0.04: the second fails at 0.025, so that the third is not tested at 0.05
    def shifted(p: float) -> dict[int, float | None]:
        spread = [-1.0, 0.0, 1.0, 0.0]
        std = math.sqrt(2 / 3)
        mean = float(stats.t.isf(p / 2, 3)) * std / 2
        return {seed: BASE[seed] + mean + spread[seed] for seed in BASE}

    found = {d.label: d for d in compare({"c": shifted(0.04), "a": shifted(0.001), "b": shifted(0.03)}, BASE)}
    assert [found[k].p for k in "abc"] == pytest.approx([0.001, 0.03, 0.04], rel=1e-9)
    assert [found[k].p_holm for k in "abc"] == pytest.approx([0.003, 0.06, 0.06], rel=1e-9)
    assert [found[k].significant for k in "abc"] == [True, False, False]
    assert [1 - (found[k].level or 0) for k in "abc"] == pytest.approx([0.05 / 3, 0.025, 0.025], rel=1e-9)


def test_the_order_of_methods_changes_nothing() -> None:
    methods = {f"m{i}": draws(i / 2, 1, i, 4) for i in range(5)}
    methods["twin"] = dict(methods["m3"])
    base = draws(0, 1, 99, 4)
    forward = {d.label: d for d in compare(methods, base)}
    assert forward == {d.label: d for d in compare(dict(reversed(methods.items())), base)}
    assert (forward["twin"].low, forward["twin"].p_holm) == (forward["m3"].low, forward["m3"].p_holm)
    backwards = {label: dict(reversed(values.items())) for label, values in methods.items()}
    assert forward == {d.label: d for d in compare(backwards, base)}


def test_only_shared_seeds_with_two_values_count() -> None:
    method = {1: 43.0, 2: None, 3: float("nan"), 4: 99.0, 0: 42.5}
    found = paired("a", method, {**BASE, 5: 1.0})
    assert found.seeds == (0, 1)
    assert found.mean == pytest.approx(1.75)
    one = paired("a", {3: 41.0, 9: 1.0}, BASE)
    assert (one.seeds, one.mean, one.std, one.p) == ((3,), 2.0, None, None)
    none = paired("a", {9: 1.0, 0: None}, BASE)
    assert (none.seeds, none.mean, none.method_mean, none.p) == ((), None, None, None)


def test_comparisons_without_two_shared_seeds_are_no_part_of_the_family() -> None:
    good = draws(1, 1, 5, 4)
    with_others = compare({"good": good, "one": {0: 1.0}, "none": {}}, draws(0, 1, 6, 4))
    (alone,) = compare({"good": good}, draws(0, 1, 6, 4))
    assert with_others[0] == alone
    assert all(d.low is None and d.p_holm is None and not d.significant for d in with_others[1:])


def test_identical_runs_and_constant_differences_have_no_test_but_count() -> None:
    same = dict(BASE)
    off = {seed: value + 0.1 for seed, value in BASE.items()}  # 0.1 as far as floats go
    good = draws(9, 1, 5, 4)
    found = {d.label: d for d in compare({"same": same, "off": off, "good": good}, BASE)}
    assert (found["same"].mean, found["same"].std, found["same"].constant) == (0.0, 0.0, True)
    assert (found["off"].mean, found["off"].std) == (pytest.approx(0.1), 0.0)
    for label in ("same", "off"):
        assert found[label].p is None
        assert found[label].low is None
        assert not found[label].significant
    assert found["good"].p is not None
    assert found["good"].p_holm == pytest.approx(3 * found["good"].p)


@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0, 95.0, float("nan")])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(UserError, match=r"between 0\.5 and 1"):
        compare({}, BASE, confidence)


@pytest.mark.parametrize(
    ("methods", "q05", "q10"),
    # Demsar, JMLR 2006, table 5(a)
    [
        (2, 1.960, 1.645), (3, 2.343, 2.052), (4, 2.569, 2.291), (5, 2.728, 2.459), (6, 2.850, 2.589),
        (7, 2.949, 2.693), (8, 3.031, 2.780), (9, 3.102, 2.855), (10, 3.164, 2.920),
    ],
)  # fmt: skip
def test_critical_differences_agree_with_the_published_table(methods: int, q05: float, q10: float) -> None:
    factor = math.sqrt(methods * (methods + 1) / (6 * 14))
    # the table is rounded, k = 3 down from 2.3437
    assert critical_difference(methods, 14) / factor == pytest.approx(q05, abs=1.1e-3)
    assert critical_difference(methods, 14, 0.9) / factor == pytest.approx(q10, abs=1.1e-3)


def ranked(table: list[list[float]], names: str = "abcdefgh", higher: bool = True, confidence: float = 0.95) -> Ranking:
    streams: dict[str, Mapping[str, Mapping[int, float | None]]] = {
        f"s{i}": {name: {0: value} for name, value in zip(names, row, strict=False)} for i, row in enumerate(table)
    }
    found = rank_methods(streams, higher, confidence)
    assert isinstance(found, Ranking), found
    return found


def test_ranks_by_hand_with_ties() -> None:
    found = ranked([[90, 80, 80, 10], [70, 70, 70, 70], [50, 60, 40, 30]])
    # ranks: 1 2.5 2.5 4; 2.5 each; 2 1 3 4
    assert found.ranks == pytest.approx({"a": 5.5 / 3, "b": 2.0, "c": 8 / 3, "d": 10.5 / 3})
    assert list(found.ranks) == ["a", "b", "c", "d"]
    assert found.friedman_p == pytest.approx(
        stats.friedmanchisquare([90, 70, 50], [80, 70, 60], [80, 70, 40], [10, 70, 30]).pvalue
    )
    assert ranked([[1, 2, 3], [1, 2, 3], [1, 2, 3]], higher=False).ranks == {"a": 1, "b": 2, "c": 3}
    assert ranked([[1, 2, 3], [1, 2, 3], [1, 2, 3]]).ranks == {"c": 1, "b": 2, "a": 3}


def test_methods_that_never_differ_are_one_group() -> None:
    found = ranked([[5, 5, 5], [6, 6, 6], [7, 7, 7]])
    assert (found.friedman_p, found.differs) == (1.0, False)
    assert found.groups == (("a", "b", "c"),)
    # rounding does not part what is equal
    assert ranked([[0.1 + 0.2, 0.3, 0.3]] * 3).ranks == {"a": 2, "b": 2, "c": 2}


def test_groups_are_the_longest_runs_within_the_critical_difference() -> None:
    rows = [[float(9 - i) for i in range(5)]] * 10  # ranks 1 to 5 in every stream; q = 2.728, width 1.93
    found = ranked(rows)
    assert found.critical_difference == pytest.approx(2.7278 * math.sqrt(30 / 60), abs=1e-3)
    assert found.differs
    assert found.groups == (("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"))
    apart = ranked([[9.0, 8.0, 7.0]] * 30)  # width 0.61
    assert apart.groups == ()


def test_without_friedmans_consent_nothing_is_told_apart() -> None:
    found = ranked([[3, 2, 1], [1, 2, 3], [3, 2, 1]])
    assert found.friedman_p > 0.05
    assert found.groups == (tuple(found.ranks),)


def test_ranks_take_the_mean_over_the_seeds_that_all_have() -> None:
    stream: Mapping[str, Mapping[int, float | None]] = {
        "a": {0: 10.0, 1: 90.0},  # better on average, worse on the shared seed
        "b": {0: 20.0, 2: None},
        "c": {0: 15.0, 1: None},
    }
    found = rank_methods({"x": stream, "y": stream, "z": stream}, True)
    assert isinstance(found, Ranking)
    assert list(found.ranks) == ["b", "c", "a"]


def test_streams_that_share_too_little_are_left_out_or_named() -> None:
    whole: Mapping[str, Mapping[int, float | None]] = {k: {0: float(i)} for i, k in enumerate("abc")}
    poor: Mapping[str, Mapping[int, float | None]] = {"a": {0: 1.0}, "b": {0: None}}
    found = rank_methods({"1": whole, "2": whole, "3": whole, "poor": poor}, True)
    assert isinstance(found, Ranking)
    assert (found.streams, found.left_out) == (("1", "2", "3"), ("poor",))
    few = rank_methods({"1": whole, "2": whole}, True)
    assert few == "2 streams have 3 methods in common, ranks need 3 streams with 3"
    assert "have 1 methods in common" in str(rank_methods({"1": whole, "2": whole, "poor": poor}, True))
    later: Mapping[str, Mapping[int, float | None]] = {k: {i: float(i)} for i, k in enumerate("abc")}
    assert "seed in common in 2 of 3 streams" in str(rank_methods({"1": whole, "2": whole, "3": later}, True))


def test_scipy_waits_until_it_is_needed() -> None:
    code = (
        "import sys; from dualcl.results.statistics import compare; compare({'a': {0: 1.0}}, {0: 2.0});"
        "assert not any(m.startswith('scipy') for m in sys.modules);"
        "compare({'a': {0: 1.0, 1: 3.0}}, {0: 2.0, 1: 2.5}); assert 'scipy.stats' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd="/")
