"""Plots of one data stream, legible in print and for colour-blind readers; each a function of records -> Figure.

A function returns None when the records hold nothing for it to draw. No window is ever opened (Agg canvas), and
pyplot's global state stays untouched.
"""

from __future__ import annotations

import io
import itertools
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil, inf, isfinite, lcm, nan
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.text import Text

from dualcl.results.files import write_bytes
from dualcl.results.fonts import drawable, families
from dualcl.results.metrics import METRICS, UNLEARNING
from dualcl.results.record_type import Curve, MatrixKind, Measure
from dualcl.results.records import Record
from dualcl.results.statistics import Ranking

#: Okabe and Ito's palette without black (joint training, text) and with yellow last, for it is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C", "#C9B800")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titley": 1.0,  # nothing is above the axes: no need to look for it at every drawing
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "dualcl",  # ids that do not change from one report to the next
    "figure.dpi": 100,
}
_JOINT = "#000000"
#: more methods than this do not fit a plot: it shows the best, and says so
MAX_METHODS = 40
#: seeds per panel of training losses: more lines hide each other
MAX_LINES = 20
#: losses drawn per line: more do not fit a panel's pixels
MAX_POINTS = 2000
#: streams in an overview: more do not fit a page
MAX_STREAMS = 150


@dataclass(frozen=True)
class Style:
    """How a method is drawn, the same in every plot of a stream."""

    colour: str
    marker: str
    line: Any


def styles(records: Sequence[Record]) -> dict[str, Style]:
    """A style per label that is drawn: no two of MAX_METHODS have both colour and marker in common."""
    drawn = sorted(label for label, group in _by_label(records).items() if not group[0].joint)
    period = lcm(len(COLOURS), len(MARKERS))  # then the pairs of colour and marker would begin again
    return {
        label: Style(
            COLOURS[i % len(COLOURS)],
            MARKERS[(i + i // period) % len(MARKERS)],
            LINES[(i + i // len(COLOURS)) % len(LINES)],
        )
        for i, label in enumerate(drawn)
    }


def _height(labels: Iterable[str], least: float = 4.4) -> float:
    """Inches of a figure whose legend holds these labels and joint training, below one another."""
    return max(least, 0.3 + 0.205 * (1 + sum(1 + _shown(label).count("\n") for label in labels)))


def _shown(name: str, width: int = 26) -> str:
    """A name as matplotlib can show it: wrapped, no mathematics, and no leading `_` (which hides a legend entry)."""
    return textwrap.fill(" " * name.startswith("_") + drawable(name), width, drop_whitespace=False).replace("$", r"\$")


def _unlabelled(axes: Any) -> None:
    """Says where the labels that a panel does not have would be, or every drawing measures all ticks to place them."""
    axes.xaxis.set_label_coords(0.5, 0)
    axes.yaxis.set_label_coords(0, 0.5)


def _all_by_label(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.joint, r.label, r.seed)):
        if record.finished:
            groups.setdefault(record.label, []).append(record)
    return groups


def _by_label(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The finished runs of every method that is drawn: all, or the MAX_METHODS best beside joint training."""
    groups = _all_by_label(records)
    methods = [label for label, group in groups.items() if not group[0].joint]
    if len(methods) <= MAX_METHODS:
        return groups
    metric = METRICS[records[0].kind.quality]
    sign = -1 if metric.higher_is_better else 1
    order = {
        label: sign * statistics.fmean(v) if (v := _known(groups[label], metric.key)) else inf for label in methods
    }
    left_out = {*sorted(methods, key=lambda label: (order[label], label))[MAX_METHODS:]}
    return {label: group for label, group in groups.items() if label not in left_out}


def _moments(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _known(group: Sequence[Record], metric: str) -> list[float]:
    return [v for r in group if (v := r.metrics.get(metric)) is not None]


def _title(records: Sequence[Record], what: str) -> str:
    groups = _all_by_label(records)
    counts = sorted({len(group) for group in groups.values()})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    methods = sum(not group[0].joint for group in groups.values())
    best = f", best {MAX_METHODS} of {methods} methods" if methods > MAX_METHODS else ""
    return f"{_shown(records[0].table, 60)}: {what} ({seeds} seed{'' if counts == [1] else 's'}{best})"


def _joint_lines(axes: Any, records: Sequence[Record], metric: str) -> list[Any]:
    handles = []
    for label, group in _by_label([r for r in records if r.joint]).items():
        if values := _known(group, metric):
            mean, std = _moments(values)
            handles.append(
                axes.axhline(mean, color=_JOINT, ls=(0, (4, 2)), lw=1.3, label=_shown(f"{label} (upper bound)"))
            )
            if std:
                axes.axhspan(mean - std, mean + std, color=_JOINT, alpha=0.08, lw=0)
    return handles


def _row_means(record: Record, curve: Curve) -> list[float | None]:
    """The mean of every row of the curve's cells; None for a row that is missing, empty or not whole."""
    means: list[float | None] = []
    for row in curve.cells(record.data["matrix"], record.n_tasks):
        known = [value for value in row or [] if value is not None]
        means.append(statistics.fmean(known) if known and len(known) == len(row or []) else None)
    return means


def _draw_lines(
    axes: Any, series: Mapping[str, Sequence[Sequence[float | None]]], look: Mapping[str, Style]
) -> list[Any]:
    """A line per label over tasks 1, 2, ..., band: standard deviation over seeds; handles, the highest end first.

    `series[label][seed][task]`; a task is drawn where some seed has a value.
    """
    lines = {}
    for label, seeds in series.items():
        columns = [[v for v in column if v is not None] for column in zip(*seeds, strict=False)]
        if points := [(i + 1, *_moments(column)) for i, column in enumerate(columns) if column]:
            lines[label] = points
    handles = []
    for label in sorted(lines, key=lambda name: -lines[name][-1][1]):
        x, mean, std = (list(column) for column in zip(*lines[label], strict=True))
        style = look[label]
        (line,) = axes.plot(
            x, mean, color=style.colour, marker=style.marker, ls=style.line, ms=6, lw=1.6, mec="white", mew=0.4,
            label=_shown(label),
        )  # fmt: skip
        low, high = [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(x, low, high, color=style.colour, alpha=0.13, lw=0)
        handles.append(line)
    if lines:
        tasks = max(point[0] for points in lines.values() for point in points)
        axes.set_xticks(_numbers(tasks, 20))
    return handles


def _numbers(n: int, most: int) -> list[int]:
    """Which of the numbers 1 to n an axis shows: at most so many steps, of 1, 2, 5, 10, ..., and the first."""
    steps = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    step = next(step for step in steps if n <= most * step)
    return list(range(1, n + 1)) if step == 1 else [1, *range(step, n + 1, step)]


def _curves(records: Sequence[Record], curve: Curve) -> Figure | None:
    series = {
        label: [_row_means(r, curve) for r in group]
        for label, group in _by_label([r for r in records if not r.joint]).items()
    }
    if not any(value is not None for seeds in series.values() for means in seeds for value in means):
        return None
    kind = records[0].kind
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(7.6, _height(series)), layout="constrained")
        axes = figure.subplots()
        handles = _joint_lines(axes, records, curve.metric)
        handles += _draw_lines(axes, series, styles(records))
        axes.set(xlabel=f"{kind.item}s learnt", ylabel=curve.title)
        axes.set_title(_title(records, curve.heading), loc="left")
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2)
    return figure


def quality_curves(records: Sequence[Record]) -> Figure | None:
    """Mean of the matrix row after every task (accuracy, or MMD to the real images), with a band over seeds.

    Joint training is a horizontal line. The legend is in the order of the last values. A row in which some concept was
    not evaluated is left out.
    """
    return _curves(records, records[0].kind.curves[0])


def drift_curves(records: Sequence[Record]) -> Figure | None:
    """How far earlier tasks' results have moved since they were learnt, after every task; kinds that record it apart.

    Mean over the concepts before the last one learnt; its last point is F_mmd.
    """
    curves = records[0].kind.curves
    return _curves(records, curves[1]) if len(curves) > 1 else None


def nearest_curves(records: Sequence[Record]) -> Figure | None:
    """Share of generated images that are nearest to their own concept, after every task; kinds that count them."""
    curves = records[0].kind.curves
    return _curves(records, curves[2]) if len(curves) > 2 else None


def unlearning_curves(records: Sequence[Record]) -> Figure | None:
    """UA, RA-I and RA-C after every request, a panel each; a broken model has all of UA and nothing of RA."""
    groups = _by_label([r for r in records if not r.joint])
    found = [{label: [_row_means(r, c) for r in group] for label, group in groups.items()} for c in UNLEARNING]
    known = [any(v is not None for seeds in one.values() for means in seeds for v in means) for one in found]
    if not any(known):
        return None
    shown = [(curve, one) for curve, one, there in zip(UNLEARNING, found, known, strict=True) if there]
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(3.4 * len(shown) + 1.6, _height(groups, 3.6)), layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (curve, series) in zip(panels, shown, strict=True):
            handles = _draw_lines(axes, series, styles(records))
            axes.set(xlabel="requests unlearnt", ylabel=curve.title, ylim=(-3, 103))
            axes.set_title(curve.heading, loc="left")
        figure.suptitle(_title(records, "after every request"), x=0.01, ha="left")
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2)
    return figure


def _mean_cells(group: Sequence[Record]) -> list[list[float | None] | None]:
    """The matrix averaged over seeds; what some seed lacks is averaged over the others."""
    out: list[list[float | None] | None] = []
    matrices = [r.cells() for r in group]
    for i in range(min(r.n_tasks for r in group)):
        rows = [row for m in matrices if (row := m[i]) is not None]
        columns = [[v for v in column if v is not None] for column in zip(*rows, strict=True)]
        out.append([statistics.fmean(column) if column else None for column in columns] if rows else None)
    return out


def heat_maps(records: Sequence[Record]) -> Figure | None:
    """One task x task map per method, mean over seeds: down, the task learnt last; across, the task tested.

    Bright is better; what was not evaluated stays blank.
    """
    groups = {k: g for k, g in _by_label(records).items() if not g[0].joint and any(r.cells()[0] for r in g)}
    if not groups:
        return None
    kind = records[0].kind
    maps = {label: _mean_cells(group) for label, group in groups.items()}
    values = [value for cells in maps.values() for row in cells for value in row or [] if value is not None]
    low, high = kind.cell_range or (min(0.0, *values), max(values))
    high = high if high > low else low + 1.0  # all cells equal
    size = max(abs(low), high)
    decimals = 0 if kind.cell_range or size >= 100 else 1 if size >= 10 else 2
    columns = min(3, len(groups))
    rows = ceil(len(groups) / columns)
    with matplotlib.rc_context(_RC), matplotlib.rc_context({"axes.grid": False}):
        figure = Figure(figsize=(3.1 * columns + 0.9, 2.95 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        shades = matplotlib.colormaps["cividis" if kind.higher_is_better else "cividis_r"]
        for axes, (label, cells) in zip(grid.flat, maps.items(), strict=False):
            n = len(cells)
            table = [[nan if v is None else v for v in [*(row or []), *[None] * (n - len(row or []))]] for row in cells]
            image = axes.pcolormesh(table, cmap=shades, vmin=low, vmax=high, edgecolors="white", linewidth=0.4)
            if n <= 12:
                for i, row in enumerate(cells):
                    for j, value in enumerate(row or []):
                        if value is None:
                            continue
                        dark = ((value - low) / (high - low) < 0.48) == kind.higher_is_better
                        axes.text(
                            j + 0.5, i + 0.5, f"{value:.{decimals}f}", ha="center", va="center",
                            fontsize=9 if n <= 6 else 6.5, color="white" if dark else "black", in_layout=False,
                        )  # fmt: skip
            ticks = _numbers(n, 10)
            axes.tick_params(length=0, labelsize=7.5)
            axes.set_xticks([t - 0.5 for t in ticks], [str(t) for t in ticks])
            axes.set_yticks([t - 0.5 for t in ticks], [str(t) for t in ticks])
            _unlabelled(axes)
            axes.invert_yaxis()
            axes.set_aspect("equal")
            axes.spines[:].set_visible(False)
            axes.set_title(_shown(label, 36), loc="left", fontsize=9.5)
        for axes in grid.flat[len(groups) :]:
            axes.set_visible(False)
        figure.supxlabel(f"{kind.item} tested", fontsize=9)
        figure.supylabel(f"after {kind.item}", fontsize=9)
        figure.suptitle(_title(records, kind.cell_title), fontsize=10, x=0.01, ha="left")
        figure.colorbar(
            image,
            ax=grid,
            shrink=min(1.0, 0.75 if rows > 1 else 0.9),
            aspect=30,
            label=kind.cell_title + ("" if kind.higher_is_better else " (lower is better)"),
        )
    return figure


def _mark_better(axes: Any, across: Measure, up: Measure) -> None:
    """A pale wedge in the corner where both metrics are best."""
    x, y = float(across.higher_is_better), float(up.higher_is_better)
    box = axes.get_window_extent()
    wedge = Ellipse((x, y), 0.24 * box.height / box.width, 0.24, transform=axes.transAxes, zorder=0.5)
    wedge.set(facecolor="#009E73", alpha=0.16, linewidth=0)
    axes.add_patch(wedge)
    axes.annotate(
        "better", (x, y), xytext=(6 - 12 * x, 6 - 12 * y), xycoords="axes fraction", textcoords="offset points",
        ha="right" if x else "left", va="top" if y else "bottom", fontsize=8, color="#006B4E", zorder=0.6,
    )  # fmt: skip


def _scatter(records: Sequence[Record], across: str, *, log: bool) -> Figure | None:
    look, up = styles(records), records[0].kind.quality
    points, hidden = {}, []
    for label, group in _by_label([r for r in records if not r.joint]).items():
        x, y = _known(group, across), _known(group, up)
        if not x or not y:
            continue
        if log and statistics.fmean(x) <= 0:
            hidden.append(label)  # a log axis has no place for it
            continue
        points[label] = (*_moments(x), *_moments(y))
    if not points:
        return None
    one, two = METRICS[across], METRICS[up]
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(7.6, _height(points)), layout="constrained")
        axes = figure.subplots()
        handles = _joint_lines(axes, records, up)
        for label in sorted(points, key=lambda name: -points[name][2]):
            x_mean, x_std, y_mean, y_std = points[label]
            style = look[label]
            axes.errorbar(x_mean, y_mean, xerr=x_std, yerr=y_std, fmt="none", ecolor=style.colour, elinewidth=1.1)
            handles += axes.plot(
                x_mean,
                y_mean,
                ls="",
                marker=style.marker,
                color=style.colour,
                ms=8,
                mec="black",
                mew=0.6,
                label=_shown(label),
            )
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            # a narrow range has no power of ten in it
            if max(p[0] for p in points.values()) < 10 * min(p[0] for p in points.values()):
                axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
                axes.tick_params(axis="x", which="minor", labelsize=7)
        axes.set(
            xlabel=f"{one.title} [{one.unit}] ({'higher' if one.higher_is_better else 'lower'} is better)",
            ylabel=f"{two.title} [{two.unit}] ({'higher' if two.higher_is_better else 'lower'} is better)",
        )
        axes.set_title(_title(records, f"{two.title} against {one.title}"), loc="left")
        axes.margins(0.13)  # the corner that is marked stays free
        _mark_better(axes, one, two)
        if hidden:
            axes.set_xlabel(axes.get_xlabel() + f"\nnothing stored, not shown: {_shown(', '.join(hidden), 70)}")
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def quality_forgetting(records: Sequence[Record]) -> Figure | None:
    """The kind's quality against its forgetting (A_last and F_max; A_mmd and F_mmd), error bars over seeds."""
    return _scatter(records, records[0].kind.forgetting, log=False)


def quality_storage(records: Sequence[Record]) -> Figure | None:
    """The kind's quality metric against N_store on a logarithmic axis, error bars over seeds."""
    return _scatter(records, "N_store", log=True)


#: what bounds a stream's methods, by the method's name; `joint` is told from its record
_BOUNDS = {
    "classification": {
        "ncm": "class means, frozen",
        "fecam": "covariances too, frozen",
        "finetune_pp": "all weights in sequence",
    },
    "customization": {"custom_diffusion": "K and V in sequence"},
}
#: what they are compared by; the first orders them
_LEADING = {
    "classification": ("A_last",),
    "customization": ("concept_accuracy_last", "attribute_accuracy_last"),
}


def bounds(records: Sequence[Record]) -> Figure | None:
    """Every method between the stream's bounds: chance, what is frozen, plain fine-tuning in sequence, joint training.

    Accuracy after the last task, the mean and a stroke for every seed; in customization the share of pictures that are
    nearest to their own concept's, and, where a judge sees attributes, the share of those. None without joint training.
    """
    domain = records[0].data["run"]["domain"]
    groups, told = _by_label(records), _BOUNDS.get(domain, {})
    panels = [
        (metric, {label: statistics.fmean(v) for label, v in values.items()}, values)
        for metric in _LEADING["classification" if domain == "classification" else "customization"]
        if (values := {label: v for label, group in groups.items() if (v := _known(group, metric))})
        and any(groups[label][0].joint for label in values)
    ]
    #: label -> what it is
    bound = {label: "all tasks at once" if group[0].joint else told[label]
             for label, group in groups.items() if group[0].joint or label in told}  # fmt: skip
    if not panels or not (order := [label for label in panels[0][1] if label not in bound]):
        return None
    order.sort(key=lambda label: panels[0][1][label])
    look, top = styles(records), len(order) - 0.5
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(2.4 + 5.2 * len(panels) ** 0.6, 1.8 + 0.24 * len(order)), layout="constrained")
        for place, (metric, means, values) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), place + 1)
            lines = [
                # what a bound is, once
                (
                    means[label],
                    label if place else f"{label}: {what}",
                    _JOINT if groups[label][0].joint else "#777777",
                )
                for label, what in bound.items()
                if label in means
            ]
            if chance := _chance(records[0], metric):
                lines.append((chance, "chance", "#BBBBBB"))
            _draw_bounds(axes, lines, top + 0.5, inches=5.2 * len(panels) ** -0.4)
            for height, label in enumerate(order):
                if label not in means:
                    continue
                seeds, style = values[label], look[label]
                axes.plot(seeds, [height] * len(seeds), color=style.colour, marker="|", ms=7)
                axes.plot(means[label], height, color=style.colour, marker=style.marker, ms=7)
                axes.text(101.5, height, f"{means[label]:.1f}", va="center", fontsize=8)
            axes.set_yticks(range(len(order)), ["" if place else _shown(label) for label in order])
            # a line at 100 is seen whole
            axes.set(xlim=(0, 101), ylim=(-0.7, top + 0.5 + 0.8 * (len(bound) + 1)))
            several = any(len(values[label]) > 1 for label in order if label in values)
            axes.set_xlabel(f"{METRICS[metric].title} [{METRICS[metric].unit}]" + "; strokes: single seeds" * several)
            axes.spines["left"].set_visible(False)
        figure.axes[0].set_title(_title(records, "between its bounds"), loc="left")
    return figure


def _draw_bounds(axes: Any, lines: Sequence[tuple[float, str, str]], above: float, inches: float) -> None:
    """Broken lines at (place, text, colour), their texts above one another from the height `above` on.

    `inches`: about what the axes are wide. A text on the left of its line crosses none, as those end below; it may
    begin a little before the axes do, where no label is.
    """
    for i, (at, text, colour) in enumerate(sorted(lines, key=lambda line: line[0])):
        said = f"{_shown(text, 60)}  {at:.1f}"
        height, left = above + 0.8 * i, i > 0 and at > 5 * len(said) / inches - 9
        axes.plot((at, at), (-0.7, height), color=colour, lw=1.4, ls=(0, (4, 2)), zorder=1)
        axes.text(
            at + (-0.8 if left else 0.8), height, said, va="center",
            ha="right" if left else "left", fontsize=8, color="#333333", zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def _chance(record: Record, metric: str) -> float | None:
    """Percent that guessing has; None where that is not known."""
    if metric == "A_last":
        return 100 / len(order) if (order := record.data["identity"].get("class_order")) else None
    return 100 / record.n_tasks if metric == "concept_accuracy_last" else None


def prediction(
    preset: str, name: str, readings: Sequence[tuple[str, Mapping[str, tuple[float, float]]]]
) -> Figure | None:
    """Methods by published A_last on the left and by ours on the right, joined: a panel per reading of the weights."""
    readings = [(reading, points) for reading, points in readings if len(points) > 1]
    if not readings:
        return None
    most = max(len(points) for _, points in readings)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(4.4 * len(readings), 1.0 + 0.28 * most), layout="constrained")
        for axes, (reading, points) in zip(figure.subplots(1, len(readings), squeeze=False)[0], readings, strict=True):
            places = [{x: i for i, x in enumerate(sorted(points, key=lambda x: -points[x][side]))} for side in (0, 1)]
            for label, values in points.items():
                heights = [place[label] for place in places]
                axes.plot((0, 1), heights, color=COLOURS[heights[0] != heights[1]], marker="o", markersize=4)
                for x, sign in ((0, -1), (1, 1)):
                    text = f"{_shown(label)}  {values[x]:.1f}"
                    axes.text(x + 0.06 * sign, heights[x], text, ha=("right", "left")[x], va="center", fontsize=8)
            axes.set(xlim=(-1.1, 2.1), ylim=(most - 0.5, -0.5), xticks=(0, 1), yticks=())
            axes.set_xticklabels([f"published\n{_shown(name)}", f"ours\n{_shown(preset)}"])
            axes.set_title(_shown(reading, 40))
            axes.grid(visible=False)
            axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def _loss_series(record: Record) -> tuple[list[int], list[float], list[int]]:
    """(steps counted over all tasks, losses, first step of every task but the first) from log.jsonl."""
    steps = {t.get("task"): int(t.get("steps") or 0) for t in record.data["tasks"]}
    x: list[int] = []
    y: list[float] = []
    bounds: list[int] = []
    offset, task = 0, None
    for index, line in enumerate(record.log(MAX_POINTS)):
        if index and line["task"] != task:
            offset = max(offset + steps.get(task, 0), x[-1] if x else 0)
            bounds.append(offset)
            x.append(offset)
            y.append(nan)  # breaks the line
        task = line["task"]
        if isinstance(line.get("loss"), (int, float)) and isfinite(line["loss"]):
            x.append(offset + int(line["step"]))
            y.append(float(line["loss"]))
    return x, y, bounds


def loss_curves(records: Sequence[Record]) -> Figure | None:
    """Training loss against steps from log.jsonl: a panel per method, a thin line per seed, tasks set apart.

    Of more than MAX_LINES seeds, the first are drawn.
    """
    look = styles(records)
    groups = {}
    what = "training loss"
    for label, group in _by_label(records).items():
        series = list(islice((s for r in group if (s := _loss_series(r))[0]), MAX_LINES))
        if series:
            groups[label] = series
        if len(group) > MAX_LINES == len(series):
            what = f"training loss of the first {MAX_LINES} seeds"
    losses = [y for series in groups.values() for _, ys, _ in series for y in ys if isfinite(y)]
    if not losses:
        return None
    columns = min(3, len(groups))
    rows = ceil(len(groups) / columns)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(3.1 * columns + 0.5, 1.9 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, (label, series) in zip(grid.flat, groups.items(), strict=False):
            colour = look[label].colour if label in look else _JOINT
            for xs, ys, _ in series:
                axes.plot(xs, ys, color=colour, lw=0.8, alpha=0.75)
            for bound in series[0][2]:
                axes.axvline(bound, color="#AAAAAA", lw=0.6, ls=(0, (2, 2)))
            axes.grid(visible=False, axis="x")
            axes.set_title(_shown(label, 36), loc="left", fontsize=9.5)
            axes.tick_params(labelsize=7.5)
            _unlabelled(axes)
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        if min(losses) > 0 and max(losses) > 50 * min(losses):
            grid.flat[0].set_yscale("log")
        for axes in grid.flat[len(groups) :]:
            axes.set_visible(False)
        figure.supxlabel(f"optimiser step (dotted: next {records[0].kind.item})", fontsize=9)
        figure.supylabel("training loss", fontsize=9)
        figure.suptitle(_title(records, what), fontsize=10, x=0.01, ha="left")
    return figure


def _norms(record: Record, key: str) -> list[float | None]:
    values = [(task.get("diagnostics") or {}).get(key) for task in record.data["tasks"]]
    return [v if isinstance(v, (int, float)) and isfinite(v) else None for v in values]


def update_norms(records: Sequence[Record]) -> Figure | None:
    """Frobenius norm of every task's weight update, and of the sum of all updates so far, where methods record it."""
    panels = {"update_norm": "of the {}'s update", "summed_norm": "of the sum of all updates"}
    groups = _by_label([r for r in records if not r.joint])
    series = {key: {label: [_norms(r, key) for r in group] for label, group in groups.items()} for key in panels}
    known = {label for one in series.values() for label, seeds in one.items() if any(any(norms) for norms in seeds)}
    if not known:
        return None
    look, item = styles(records), records[0].kind.item
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(7.6, _height(known, 3.2)), layout="constrained")
        handles: list[Any] = []
        for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            drawn = _draw_lines(axes, series[key], look)
            handles = handles or drawn
            axes.set_ylim(bottom=0)
            axes.set(xlabel=item)
            axes.set_title(title.format(item), loc="left", fontsize=9.5)
        figure.supylabel("Frobenius norm", fontsize=9)
        figure.suptitle(_title(records, "size of the weight updates"), fontsize=10, x=0.01, ha="left")
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2)
    return figure


def overview(
    means: Mapping[str, Mapping[str, float]], kind: MatrixKind, title: str, names: Mapping[str, str] | None = None
) -> Figure:
    """A map of streams (down) x methods (across): `means[stream][label]` of the kind's quality; bright is better.

    At most MAX_STREAMS streams and MAX_METHODS methods, as the title says. `names`: how labels are written, where that
    is not the label itself.
    """
    metric = METRICS[kind.quality]
    streams, every = list(means)[:MAX_STREAMS], list(dict.fromkeys(label for row in means.values() for label in row))
    labels = every[:MAX_METHODS]
    values = [v for stream in streams for label in labels if (v := means[stream].get(label)) is not None]
    shade = "cividis" if metric.higher_is_better else "cividis_r"
    left_out = [f"{len(streams)} of {len(means)} streams"] if len(means) > len(streams) else []
    left_out += [f"{len(labels)} of {len(every)} methods"] if len(every) > len(labels) else []
    with matplotlib.rc_context(_RC), matplotlib.rc_context({"axes.grid": False}):
        figure = Figure(figsize=(2.6 + 0.42 * len(labels), 2.2 + 0.16 * len(streams)), layout="constrained")
        axes = figure.subplots()
        table = [[means[stream].get(label, nan) for label in labels] for stream in streams]
        image = axes.pcolormesh(
            table, cmap=shade, vmin=min(values), vmax=max(values), edgecolors="white", linewidth=0.3
        )
        axes.set_xticks([i + 0.5 for i in range(len(labels))], [_shown((names or {}).get(n, n)) for n in labels])
        axes.set_yticks([i + 0.5 for i in range(len(streams))], [_shown(name, 40) for name in streams])
        axes.tick_params(length=0, labelsize=7)
        axes.tick_params(axis="x", rotation=90)
        _unlabelled(axes)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_title(f"{title} ({', '.join(left_out)})" if left_out else title, loc="left")
        figure.colorbar(image, ax=axes, aspect=40, label=f"{metric.title} [{metric.unit}]")
    return figure


def _levels(spans: Sequence[tuple[float, float]]) -> list[int]:
    """The first free line for each span, so that none touches another on its line."""
    ends: list[float] = []
    out = []
    for low, high in spans:
        level = next((i for i, end in enumerate(ends) if end < low), len(ends))
        ends[level : level + 1] = [high]
        out.append(level)
    return out


def critical_difference_diagram(ranking: Ranking, title: str, names: Mapping[str, str] | None = None) -> Figure:
    """Mean ranks on an axis, best to the left; a bar joins methods that are not told apart (Demsar, JMLR 2006).

    `names`: how labels are written, where that is not the label itself.
    """
    labels, ranks = list(ranking.ranks), list(ranking.ranks.values())
    shown = [_shown((names or {}).get(label, label), 28) for label in labels]
    k, left = len(labels), (len(labels) + 1) // 2
    right_end = max(float(k), 1 + ranking.critical_difference)
    span, tall = right_end - 1, max(text.count("\n") for text in shown) + 1
    edge = 0.015 * span
    spans = [(ranking.ranks[group[0]] - edge, ranking.ranks[group[-1]] + edge) for group in ranking.groups]
    levels = _levels(spans)
    first = 1.0 + 0.5 * (max(levels, default=-1) + 1)
    row = 0.4 + 0.55 * tall
    bottom = first + row * (left - 1) + 0.7 * tall
    with matplotlib.rc_context(_RC), matplotlib.rc_context({"axes.grid": False}):
        figure = Figure(figsize=(7.6, 1.25 + 0.24 * (bottom + 2.2)), layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set(xlim=(1 - 0.75 * span, right_end + 0.75 * span), ylim=(bottom, -2.6))
        axes.plot([1, right_end], [0, 0], color="black", lw=1.2)
        for tick in range(1, k + 1):
            axes.plot([tick, tick], [0, -0.3], color="black", lw=1.0)
            axes.text(tick, -0.42, f"{tick}", ha="center", va="bottom", fontsize=8.5)
        axes.text(1 - 0.05 * span, -0.05, "best", ha="right", va="center", fontsize=8.5, color="#555555")
        axes.text(right_end + 0.05 * span, -0.05, "worst", ha="left", va="center", fontsize=8.5, color="#555555")
        end = 1 + ranking.critical_difference
        axes.plot([1, end], [-1.75, -1.75], color="black", lw=1.4, marker="|", ms=7, mew=1.4)
        critical = f"critical difference {ranking.critical_difference:.2f}"
        axes.text((1 + end) / 2, -1.95, critical, ha="center", va="bottom", fontsize=8.5)
        for i, (rank, text) in enumerate(zip(ranks, shown, strict=True)):
            on_left = i < left
            y = first + row * (i if on_left else k - 1 - i)
            x = 1 - 0.06 * span if on_left else right_end + 0.06 * span
            axes.plot([rank, rank, x], [0, y, y], color="#555555", lw=0.9)
            side, away = ("right", -0.015) if on_left else ("left", 0.015)
            value = f"{text}  ({rank:.2f})" if on_left else f"({rank:.2f})  {text}"
            axes.text(x + away * span, y, value, ha=side, va="center", fontsize=9)
        for (low, high), level in zip(spans, levels, strict=True):
            y = 0.45 + 0.5 * level
            axes.plot([low, high], [y, y], color="#0072B2", lw=4.2, solid_capstyle="butt", zorder=3)
        test = "Nemenyi" if ranking.differs else "Friedman finds no difference"
        axes.set_title(
            f"{title}\nbars join what is not told apart ({100 * ranking.confidence:g} %, {test})", loc="left"
        )
    return figure


@dataclass(frozen=True)
class Plot:
    """A plot of the report."""

    draw: Callable[[Sequence[Record]], Figure | None]
    title: str
    #: what a reader who cannot see it should know
    description: str


PLOTS: dict[str, Plot] = {
    "bounds": Plot(
        bounds,
        "Between the bounds",
        "A line per method, a point at its accuracy after the last task, a stroke at that of every seed; dashed lines: "
        "chance, what is frozen, plain fine-tuning in sequence, joint training.",
    ),
    "curve": Plot(
        quality_curves,
        "After every task",
        "Line plot: mean over the tasks learnt so far after every task, one line per method, band: standard deviation.",
    ),
    "nearest": Plot(
        nearest_curves,
        "Pictures of the right concept",
        "Line plot: share of the images of the concepts learnt so far that are nearest to their own concept's real "
        "images, after every concept; dashed: joint training.",
    ),
    "drift": Plot(
        drift_curves,
        "Drift since learning",
        "Line plot: how far what is generated for earlier concepts has moved since they were learnt, mean over them, "
        "after every concept; lower is better.",
    ),
    "unlearning": Plot(
        unlearning_curves,
        "After every request",
        "Line plots, one line per method: UA, images without their target, and RA-I and RA-C, images that still show "
        "what no request unlearns, of the requests' attributes and of others.",
    ),
    "matrix": Plot(
        heat_maps,
        "Task by task",
        "Heat maps, one per method: down the task learnt last, across the task tested, mean over seeds.",
    ),
    "forgetting": Plot(
        quality_forgetting,
        "Quality against forgetting",
        "Scatter plot, one point per method with error bars over seeds; the shaded corner is better.",
    ),
    "storage": Plot(
        quality_storage,
        "Quality against storage",
        "Scatter plot, one point per method, parameters stored on a logarithmic axis; the shaded corner is better.",
    ),
    "loss": Plot(
        loss_curves,
        "Training loss",
        "Line plots of the training loss against optimiser steps, one panel per method, one line per seed.",
    ),
    "updates": Plot(
        update_norms,
        "Size of the weight updates",
        "Two line plots: Frobenius norm of every task's weight update, and of the sum of all updates so far.",
    ),
}


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes the figure as the suffix of `path` says (.png at 200 dpi, .svg); returns `path`.

    The figure is laid out for the first file, and stays so: `savefig` would do that again, with a drawing, each time.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(_RC):
        figure.dpi = 200
        for text in figure.findobj(Text):
            if not text.get_text().isascii():
                text.set_fontfamily(families(text.get_text()))
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
            figure.set_layout_engine("none")
        if path.suffix == ".svg":
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        else:
            FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": "dualcl"})
    return write_bytes(path, buffer.getvalue())
