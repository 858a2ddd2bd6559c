"""Differences between methods over shared seeds, and ranks over data streams.

Values of a method come as seed -> value; None and NaN mean that the
metric is undefined there.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt

from dualcl.benchmark.core.errors import UserError
from dualcl.results.late import late

#: of intervals and of the mark of a significant difference
CONFIDENCE = 0.95
#: differences that agree up to this share of the values are the same: the rest is rounding
_SAME = 1e-9

Values = Mapping[int, "float | None"]


def check_confidence(confidence: float) -> float:
    """The level; UserError unless it is between 0.5 and 1, both excluded."""
    if not 0.5 < confidence < 1:
        raise UserError(f"confidence is {confidence:g}; give a level between 0.5 and 1, such as 0.95")
    return confidence


@dataclass(frozen=True)
class Difference:
    """A method minus the baseline in one metric, over the seeds where both have a value."""

    label: str
    seeds: tuple[int, ...]
    #: means over those seeds; None without any
    method_mean: float | None = None
    baseline_mean: float | None = None
    #: mean and standard deviation (ddof = 1; None for one seed) of the differences, seed by seed
    mean: float | None = None
    std: float | None = None
    #: of the two-sided paired t-test; None for fewer than two seeds, and where every seed has the same difference
    p: float | None = None
    #: corrected for all comparisons of the metric (Holm)
    p_holm: float | None = None
    #: confidence interval of the mean, and its own level: see `compare`
    low: float | None = None
    high: float | None = None
    level: float | None = None
    significant: bool = False

    @property
    def constant(self) -> bool:
        """Whether two or more seeds all have the same difference: nothing to estimate a spread from."""
        return self.std == 0.0


def paired(label: str, method: Values, baseline: Values) -> Difference:
    """The differences of two methods, tested on their own: p, but neither correction nor interval."""
    values = {
        seed: (float(a), float(b))
        for seed in sorted(method.keys() & baseline.keys())
        if (a := method[seed]) is not None and (b := baseline[seed]) is not None and isfinite(a) and isfinite(b)
    }
    if not values:
        return Difference(label, ())
    differences = [a - b for a, b in values.values()]
    noise = _SAME * max(abs(v) for pair in values.values() for v in pair)
    mean = statistics.fmean(differences)
    result = Difference(
        label,
        tuple(values),
        statistics.fmean(a for a, _ in values.values()),
        statistics.fmean(b for _, b in values.values()),
        0.0 if abs(mean) <= noise else mean,
    )
    if len(differences) < 2:
        return result
    std = statistics.stdev(differences)
    if std <= noise:
        return replace(result, std=0.0)
    n = len(differences)
    return replace(result, std=std, p=late("distributions").two_sided_p(mean / (std / sqrt(n)), n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scand. J. Statist. 1979), in the order given: p < 1 - confidence is significant."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for step, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[i]))
        corrected[i] = largest
    return corrected


def _error_rates(p_values: Sequence[float], alpha: float) -> list[float]:
    """The error rate at which Holm's procedure decides on each p; from the first that it keeps on, all share a rate."""
    rates = [alpha] * len(p_values)
    rate, last, stopped = alpha, -1.0, False
    for step, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if not stopped and p_values[i] != last:  # equal p, equal rate: the order of the rows decides nothing
            rate, last = alpha / (len(p_values) - step), p_values[i]
            stopped = p_values[i] >= rate
        rates[i] = rate
    return rates


def compare(methods: Mapping[str, Values], baseline: Values, confidence: float = CONFIDENCE) -> list[Difference]:
    """Every method against the baseline in one metric, as one family of paired two-sided t-tests.

    The family are the comparisons with two or more shared seeds; one whose difference is the same in every seed counts
    in it with p = 1, for it has no test. A difference is significant when its p, corrected after Holm, is below
    1 - confidence. Its interval has the level at which Holm's procedure decided on it (between 1 - (1 - confidence) / m
    and the confidence asked for, m comparisons), so that it leaves 0 out exactly where the difference is significant;
    the intervals together do not have the level. The order of the methods changes nothing.
    """
    alpha = 1 - check_confidence(confidence)
    found = [paired(label, values, baseline) for label, values in methods.items()]
    family = [i for i, difference in enumerate(found) if len(difference.seeds) > 1]
    p_values = [1.0 if (p := found[i].p) is None else p for i in family]
    for i, p, rate in zip(family, holm(p_values), _error_rates(p_values, alpha), strict=True):
        one = found[i]
        if one.mean is None or one.std is None or one.p is None:
            continue
        n = len(one.seeds)
        half = late("distributions").t_quantile(rate / 2, n - 1) * one.std / sqrt(n)
        found[i] = replace(
            one, p_holm=p, low=one.mean - half, high=one.mean + half, level=1 - rate, significant=p < alpha
        )
    return found


@dataclass(frozen=True)
class Ranking:
    """Mean ranks (1 is best) of methods over data streams; Friedman's test, then Nemenyi's critical difference."""

    #: the streams that count, and what had to stay out
    streams: tuple[str, ...]
    left_out: tuple[str, ...]
    #: best first
    ranks: dict[str, float]
    confidence: float
    friedman_p: float
    #: mean ranks that are this far apart differ
    critical_difference: float
    #: the largest groups of methods not told apart, two or more each, best first; one of all where Friedman's test
    #: finds no difference
    groups: tuple[tuple[str, ...], ...]

    @property
    def differs(self) -> bool:
        """Whether Friedman's test finds any difference: without it the critical difference says nothing."""
        return self.friedman_p < 1 - self.confidence


#: fewer streams or methods than this and there is nothing to rank
MIN_STREAMS = 3
MIN_METHODS = 3


def critical_difference(methods: int, streams: int, confidence: float = CONFIDENCE) -> float:
    """Nemenyi's critical difference of mean ranks, q * sqrt(k(k+1) / 6N) (Demsar, JMLR 2006).

    q is the quantile of the studentized range for k methods and infinitely many degrees of freedom over sqrt(2).
    """
    q = late("distributions").studentized_range(check_confidence(confidence), methods)
    return q / sqrt(2) * sqrt(methods * (methods + 1) / (6 * streams))


def _groups(ranks: Mapping[str, float], width: float) -> tuple[tuple[str, ...], ...]:
    """The longest runs of neighbours (`ranks` in ascending order) that span less than `width`."""
    labels, values = list(ranks), list(ranks.values())
    runs: list[tuple[int, int]] = []
    for start in range(len(labels)):
        end = max(i for i in range(start, len(labels)) if i == start or values[i] - values[start] < width - 1e-9)
        if end > start and (not runs or end > runs[-1][1]):
            runs.append((start, end))
    return tuple(tuple(labels[start : end + 1]) for start, end in runs)


def rank_methods(
    streams: Mapping[str, Mapping[str, Values]], higher_is_better: bool, confidence: float = CONFIDENCE
) -> Ranking | str:
    """Ranks the methods that streams share, by their mean over the seeds that all of them have; ties share a rank.

    `streams[name][method][seed]`. The stream with the fewest methods stays out as long as fewer than MIN_METHODS are
    shared and more than MIN_STREAMS streams are left; streams where the shared methods have no seed in common stay out
    too. Too little to rank: the reason, in words.
    """
    known = {
        name: {
            label: {seed: v for seed, v in values.items() if v is not None and isfinite(v)}
            for label, values in methods.items()
        }
        for name, methods in streams.items()
    }
    used = {name: {label: values for label, values in methods.items() if values} for name, methods in known.items()}

    def shared() -> list[str]:
        return [] if not used else sorted(set.intersection(*(set(methods) for methods in used.values())))

    while len(shared()) < MIN_METHODS and len(used) > MIN_STREAMS:
        del used[min(used, key=lambda name: (len(used[name]), name))]
    labels = shared()
    if len(streams) < MIN_STREAMS or len(labels) < MIN_METHODS:
        return (
            f"{len(streams)} streams have {len(labels)} methods in common, ranks need {MIN_STREAMS} streams with "
            f"{MIN_METHODS}"
        )
    means: dict[str, list[float]] = {}
    for name, methods in used.items():
        if seeds := set.intersection(*(set(methods[label]) for label in labels)):
            means[name] = [statistics.fmean(methods[label][seed] for seed in sorted(seeds)) for label in labels]
    if len(means) < MIN_STREAMS:
        return (
            f"the {len(labels)} shared methods have a seed in common in {len(means)} of {len(streams)} streams; ranks "
            f"need {MIN_STREAMS}"
        )
    # rounding must not part what is equal
    table = [[round(-v if higher_is_better else v, 9) for v in row] for row in means.values()]
    distributions = late("distributions")
    ranked = [distributions.ranks(row) for row in table]
    mean_ranks = {label: statistics.fmean(row[i] for row in ranked) for i, label in enumerate(labels)}
    ordered = dict(sorted(mean_ranks.items(), key=lambda item: (item[1], item[0])))
    all_tied = all(len(set(row)) == 1 for row in ranked)
    p = 1.0 if all_tied else distributions.friedman_p(table)
    width = critical_difference(len(labels), len(means), confidence)
    groups = _groups(ordered, width) if p < 1 - confidence else (tuple(ordered),)
    return Ranking(
        tuple(means), tuple(name for name in streams if name not in means), ordered, confidence, p, width, groups
    )
