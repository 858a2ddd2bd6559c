"""Does a small world rank methods as the published full size does? Kendall's tau-b, for each reading of the weights."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.results.files import slugs, write_text
from dualcl.results.late import late
from dualcl.results.published import WEIGHTS, stream
from dualcl.results.published.differences import is_of
from dualcl.results.records import Record
from dualcl.results.tables import Summary, Table
from dualcl.results.writers.markdown import markdown_text

#: methods below which a rank correlation says nothing
FEWEST = 8
#: what is called agreement
GOAL = 0.8
DRAWS = 2000
#: share of the draws inside the interval
LEVEL = 0.95


@dataclass(frozen=True)
class Prediction:
    """How one table ranks the methods that have published numbers under one reading of the weights."""

    reading: str
    #: label -> (published, mean over sources; ours, mean over seeds), percent
    points: Mapping[str, tuple[float, float]]
    #: pairs of methods that some one source has both of, and how many there are in all
    pairs: int
    all_pairs: int
    tau: float | None
    interval: tuple[float, float] | None
    #: pairs in another order than published: (better there, better here)
    swapped: tuple[tuple[str, str], ...]

    @property
    def line(self) -> str:
        """One honest sentence."""
        n = len(self.points)
        what = f"{WEIGHTS.get(self.reading, self.reading)}: n = {n}"
        if self.tau is None:
            return f"{what}, too few pairs to rank"
        told = f"{what}, {self.pairs} of {self.all_pairs} pairs, tau-b {self.tau:.2f}"
        told += f" ({LEVEL:.0%} {self.interval[0]:.2f} to {self.interval[1]:.2f})" if self.interval else ""
        if n < FEWEST:
            return f"{told}; fewer than {FEWEST} methods, so no verdict"
        wrong = ", ".join(f"{a} above {b} there" for a, b in self.swapped)
        return f"{told}; {'agrees' if self.tau >= GOAL else f'below {GOAL}'}" + (
            f"; out of order: {wrong}" if wrong else ""
        )


def predictions(table: Table, name: str) -> list[Prediction]:
    """A prediction per reading of the weights of the published stream `name`, by the quality of the table's kind.

    Methods are compared within one source only, since sources differ in protocol; numbers whose weights were not
    named are left out. UserError where the stream has no published numbers, or the table no accuracies.
    """
    if table.kind.quality != "A_last":
        raise UserError(f"{table.preset} has no accuracies to compare with those published for {name}")
    numbers = [n for n in stream(name) if n.metric == "A_last" and n.weights_reading and n.dualcl_method]
    groups: dict[str, list[Record]] = {}
    for record in table.records:
        groups.setdefault(record.label, []).append(record)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for number in numbers:
        for label, group in groups.items():
            if is_of(number, group[0].data["run"]["method"], group[0].data["config"].get("method", {})):
                found.setdefault(number.weights_reading, {}).setdefault(number.source, {})[label] = float(number.value)
    made = [_prediction(table, reading, list(sources.values()), groups) for reading, sources in found.items()]
    return [p for p in made if len(p.points) > 1]


def write_predictions(summary: Summary, name: str, out: Path) -> list[str]:
    """Writes prediction.md and a plot for every table with accuracies into `out`; returns the sentences.

    Raises UserError as `predictions` does, and where no table has accuracies.
    """
    tables = [t for t in summary.tables if t.rows and t.kind.quality == "A_last"]
    if not tables:
        raise UserError(f"there are no accuracies here to compare with those published for {name}")
    plots, told, text = late("plots"), [], []
    out.mkdir(parents=True, exist_ok=True)
    for table, slug in zip(tables, slugs([t.preset for t in tables]), strict=True):
        found = predictions(table, name)
        lines = [p.line for p in found] or [f"fewer than two methods have numbers on {name} under the same weights"]
        told += [f"{table.preset} and {name}, {line}" for line in lines]
        text += [f"### {table.preset} and {name}", "", *(f"- {markdown_text(line)}" for line in lines), ""]
        if (
            figure := plots.prediction(
                table.preset, name, [(WEIGHTS.get(p.reading, p.reading), p.points) for p in found]
            )
        ) is not None:
            plots.save_figure(figure, out / f"prediction-{slug}.png")
            text += [f"![ours against published](prediction-{slug}.png)", ""]
    about = (
        f"Kendall's tau-b of A_last. Pairs are compared within one source; intervals: {DRAWS} draws of seeds and of "
        f"test images. Numbers whose weights their source does not name are left out; below {FEWEST} methods there is "
        "no verdict."
    )
    write_text(out / "prediction.md", "\n".join([*text, markdown_text(about), ""]))
    return told


def _prediction(
    table: Table, reading: str, sources: Sequence[Mapping[str, float]], groups: Mapping[str, list[Record]]
) -> Prediction:
    labels = sorted({label for source in sources for label in source})
    ours = {label: statistics.fmean(r.metrics["A_last"] or 0.0 for r in groups[label]) for label in labels}
    theirs = {label: statistics.fmean(s[label] for s in sources if label in s) for label in labels}
    gaps = {}
    for a, b in itertools.combinations(labels, 2):
        if both := [s[a] - s[b] for s in sources if a in s and b in s]:
            gaps[a, b] = statistics.fmean(both)
    tau = _tau(gaps, ours)
    rng = numpy_generator(0, "prediction", table.preset, reading)
    draws = [] if tau is None else [_tau(gaps, {x: _redrawn(groups[x], rng) for x in labels}) for _ in range(DRAWS)]
    known = sorted(v for v in draws if v is not None)
    tail = (1 - LEVEL) / 2
    interval = (float(np.quantile(known, tail)), float(np.quantile(known, 1 - tail))) if known else None
    swapped = [(a, b) if gap > 0 else (b, a) for (a, b), gap in gaps.items() if gap * (ours[a] - ours[b]) < 0]
    points = {label: (theirs[label], ours[label]) for label in labels}
    return Prediction(reading, points, len(gaps), math.comb(len(labels), 2), tau, interval, tuple(swapped))


def _tau(gaps: Mapping[tuple[str, str], float], ours: Mapping[str, float]) -> float | None:
    """Kendall's tau-b over the pairs of `gaps`, None where all of one side are tied."""
    theirs = [np.sign(gap) for gap in gaps.values()]
    mine = [np.sign(ours[a] - ours[b]) for a, b in gaps]
    untied = sum(map(abs, theirs)) * sum(map(abs, mine))
    return float(sum(x * y for x, y in zip(theirs, mine, strict=True)) / math.sqrt(untied)) if untied else None


def _redrawn(group: Sequence[Record], rng: np.random.Generator) -> float:
    """A_last with other seeds (drawn with replacement) and other test images (binomial, task by task)."""
    values = []
    for i in rng.integers(len(group), size=len(group)):
        row: Mapping[str, Any] = group[i].data["matrix"]["rows"][-1]
        share = np.divide(row["correct"], row["total"])
        values.append(100 * float(np.mean(rng.binomial(row["total"], share) / np.asarray(row["total"]))))
    return statistics.fmean(values)
