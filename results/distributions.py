"""What of scipy the tests of `statistics` need; imported when there is something to test.

scipy itself imports `stats`, which is slow and only ranks need, when it is first asked for.
"""

from collections.abc import Sequence

import scipy


def two_sided_p(t: float, freedom: int) -> float:
    """Of Student's t."""
    return float(2 * scipy.special.stdtr(freedom, -abs(t)))


def t_quantile(rate: float, freedom: int) -> float:
    """The value that Student's t exceeds with probability `rate`."""
    return -float(scipy.special.stdtrit(freedom, rate))


def studentized_range(level: float, groups: int) -> float:
    """Quantile for infinitely many degrees of freedom."""
    return float(scipy.stats.studentized_range.ppf(level, groups, float("inf")))


def ranks(values: Sequence[float]) -> list[float]:
    """From 1, the least; ties share a mean."""
    return [float(rank) for rank in scipy.stats.rankdata(values)]


def friedman_p(table: Sequence[Sequence[float]]) -> float:
    """Of Friedman's test: rows are streams, columns methods."""
    return float(scipy.stats.friedmanchisquare(*zip(*table, strict=True)).pvalue)
