"""The report: tables, plots and one self-contained HTML page, rebuilt from records alone."""

from __future__ import annotations

import base64
import html
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.results.data import need_parquet, write_parquet
from dualcl.results.files import slugs, write_bytes, write_text
from dualcl.results.metrics import COST, METRICS, MatrixKind, Metric
from dualcl.results.records import Record
from dualcl.results.statistics import CONFIDENCE, Ranking
from dualcl.results.tables import (
    Summary,
    Table,
    arrow,
    caveat_lines,
    cell,
    compared_rows,
    difference_metrics,
    difference_notes,
    difference_parts,
    difference_title,
    difference_unit,
    differences_csv,
    few_seeds,
    markdown_text,
    ranking_lines,
    rare_collections,
    render,
    row_name,
    runs_csv,
    sections,
    seeds_note,
    shared_seeds,
    summarise,
    unit,
)

if TYPE_CHECKING:
    from dualcl.results.plots import Plot
    from dualcl.results.samples import Sheet

REPORT_FORMATS = ("md", "csv", "tex", "html", "png")
#: those, and what needs an extra
FORMATS = (*REPORT_FORMATS, "parquet")
#: the frames that --format parquet writes
PARQUET = ("runs", "cells")
#: with more runs, the page shows one run of each method in full
LARGE = 1000
#: with more than LARGE runs on more streams than this, an overview is drawn in place of the streams' own pictures
FEW_STREAMS = 3


@dataclass
class ReportFiles:
    """What a report wrote, and what its reader should mind."""

    out: Path
    tables: list[Path] = field(default_factory=list)
    runs: Path | None = None
    differences: Path | None = None
    published: Path | None = None
    plots: list[Path] = field(default_factory=list)
    samples: list[Path] = field(default_factory=list)
    html: Path | None = None
    parquet: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: what the report leaves out for being large
    notes: list[str] = field(default_factory=list)


def _prefixes(summary: Summary) -> list[str]:
    """What the file names of a table's plots and samples begin with."""
    return slugs([table.preset for table in summary.tables])


def _only_overview(summary: Summary, all_plots: bool) -> bool:
    """Whether the streams' own pictures, about six seconds each, are left out."""
    return not all_plots and len(summary.records) > LARGE and len(summary.tables) > FEW_STREAMS


def _notes(summary: Summary, all_plots: bool) -> list[str]:
    """What a large report leaves out, and where it is."""
    lines = []
    if _only_overview(summary, all_plots):
        lines.append(
            f"{len(summary.tables)} streams are too many to draw each: plots and images of a stream are in a report on "
            "its runs alone, or here with --all-plots"
        )
    if len(summary.records) > LARGE:
        lines.append(
            f"of {len(summary.records)} runs, the first of every method is shown in full; every run has a row in "
            "runs.csv, with the path of its record"
        )
    return lines


def _draw(
    summary: Summary, folder: Path, suffixes: Sequence[str] = (".png", ".svg")
) -> tuple[list[Path], dict[tuple[int, str], bytes]]:
    """Writes all plots, SVG last; returns the paths, and the SVG by (table index, plot) for the page."""
    from dualcl.results.plots import PLOTS, save_figure

    paths: list[Path] = []
    pictures: dict[tuple[int, str], bytes] = {}
    for index, (table, slug) in enumerate(zip(summary.tables, _prefixes(summary), strict=True)):
        for name, plot in PLOTS.items():
            figure = plot.draw(table.records) if table.records else None
            if figure is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            for suffix in suffixes:
                paths.append(save_figure(figure, folder / f"{slug}-{name}{suffix}"))
            pictures[index, name] = paths[-1].read_bytes()
    return paths, pictures


def _draw_overviews(
    summary: Summary, folder: Path, suffixes: Sequence[str] = (".png", ".svg")
) -> tuple[list[Path], dict[str, bytes]]:
    """Writes a map of streams x methods per kind; the paths, and the last suffix's by heading."""
    from dualcl.results.plots import overview, save_figure

    paths: list[Path] = []
    pictures: dict[str, bytes] = {}
    for kind, tables in sections(summary):
        means = {
            table.preset: {row.label: stat.mean for row in table.rows if (stat := row.stats.get(kind.quality))}
            for table in tables
        }
        if not any(means.values()):
            continue
        title = f"{kind.heading}: {METRICS[kind.quality].title} by stream and method"
        figure = overview(means, kind, title, summary.names(kind))
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in suffixes:
            paths.append(save_figure(figure, folder / f"overview-{kind.heading.lower()}{suffix}"))
        pictures[kind.heading] = paths[-1].read_bytes()
    return paths, pictures


def _draw_ranks(
    summary: Summary, folder: Path, suffixes: Sequence[str] = (".png", ".svg")
) -> tuple[list[Path], dict[str, bytes]]:
    """Writes a critical difference diagram per kind that has ranks; the paths, and the last suffix's by heading."""
    paths: list[Path] = []
    pictures: dict[str, bytes] = {}
    for kind, _ in sections(summary):
        ranking = summary.rankings.get(kind.heading)
        if not isinstance(ranking, Ranking):
            continue
        from dualcl.results.plots import critical_difference_diagram, save_figure

        title = f"{kind.heading}: mean ranks in {METRICS[kind.quality].title} over {len(ranking.streams)} streams"
        figure = critical_difference_diagram(ranking, title, summary.names(kind))
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in suffixes:
            paths.append(save_figure(figure, folder / f"critical-difference-{kind.heading.lower()}{suffix}"))
        pictures[kind.heading] = paths[-1].read_bytes()
    return paths, pictures


@dataclass(frozen=True)
class _Samples:
    """The pictures of one table, their places relative to the report where they are files, and what lacks."""

    sheets: list[Sheet]
    links: list[str]
    notes: list[str]


def _draw_samples(summary: Summary, out: Path | None) -> list[_Samples]:
    """Contact sheets and strips per table, written into `out`/samples unless that is None; empty without samples."""
    found = []
    for table, prefix in zip(summary.tables, _prefixes(summary), strict=True):
        if "generated" not in table.kind.row_fields:
            found.append(_Samples([], [], []))
            continue
        from dualcl.results.samples import draw_samples

        sheets, notes = draw_samples(table.records, prefix)
        links = []
        for sheet in sheets if out is not None else []:
            assert out is not None
            (out / "samples").mkdir(exist_ok=True)
            links.append(write_bytes(out / "samples" / f"{sheet.name}.png", sheet.png()).relative_to(out).as_posix())
        found.append(_Samples(sheets, links, notes))
    return found


def _samples_markdown(summary: Summary, found: Sequence[_Samples]) -> str:
    """Links to the written sheets, and the notes on images that lack; "" without any."""
    lines = []
    for table, samples in zip(summary.tables, found, strict=True):
        if not samples.sheets and not samples.notes:
            continue
        lines += [f"### Images: {markdown_text(table.preset)}", ""]
        lines += [
            f"- [{markdown_text(sheet.title)}]({link})"
            for sheet, link in zip(samples.sheets, samples.links, strict=True)
        ]
        lines += [f"- {markdown_text(note)}" for note in samples.notes]
        lines.append("")
    return "\n".join(lines)


def assignments(record: Record) -> dict[str, Any]:
    """Keys that `--set` gave for a run, with their values."""
    found = {}
    for key, source in (record.data.get("sources") or {}).items():
        if not str(source).startswith("--set"):
            continue
        value: Any = record.data["config"]
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        found[key] = value
    return found


def set_words(values: Mapping[str, Any]) -> list[str]:
    """`--set key=value` for each, as words of a command."""
    pairs = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
    return [word for pair in pairs for word in ("--set", pair)]


def command(record: Record) -> str:
    """The shell command that repeats a run."""
    run = record.data["run"]
    words = ["dualcl", "run", str(run["preset"]), str(run["method"]), "--seed", str(run["seed"])]
    return shlex.join([*words, *set_words(assignments(record))])


def _can_print(marks: str) -> bool:
    try:
        marks.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


_STYLE = """
:root { color-scheme: light dark; --fg: #1b1b1b; --bg: #fff; --soft: #f3f4f6; --line: #d4d7dc; --dim: #5b616b;
  --mark: #0b5cad; --warn: #fff4d6 }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e6e6; --bg: #16181c; --soft: #22252b; --line: #3a3f47;
  --dim: #a3aab5; --mark: #7db8f5; --warn: #3d3318 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 2rem 0 .25rem }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem }
p { margin: .25rem 0 .75rem }
.dim, dt { color: var(--dim) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { border-bottom: 2px solid var(--line); vertical-align: bottom }
th span { display: block; font-weight: 400; color: var(--dim) }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--bg) }
td span { display: block; color: var(--dim); font-weight: 400 }
td.sig { font-weight: 700 }
td.best { font-weight: 700; color: var(--mark) }
tr.joint td { font-style: italic; color: var(--dim) }
ul.warn { background: var(--warn); padding: .6rem .6rem .6rem 1.8rem; border-radius: .4rem; overflow-wrap: anywhere }
h4 { font-size: .95rem; margin: 1.1rem 0 .25rem }
section { border-top: 3px solid var(--line); margin-top: 2rem }
section h2 { margin-top: .75rem }
figure { margin: 1rem 0; overflow-x: auto }
figcaption { color: var(--dim); font-size: .875rem }
figure img { display: block; width: 100%; min-width: 36rem; max-width: 56rem; height: auto; background: #fff;
  border-radius: .4rem; padding: .4rem }
figure.sheet { margin: .5rem 0 }
figure.sheet img { width: auto; min-width: 0; max-width: none; padding: 0 }
.strips { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start }
.strips figure { max-width: 100% }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .4rem 0; padding: .4rem .7rem }
summary { cursor: pointer }
pre { background: var(--soft); padding: .6rem; border-radius: .4rem; overflow-x: auto; font-size: .8rem }
code { font-size: .85em; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; font-size: .875rem; margin: .5rem 0 }
dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr } dd { margin-bottom: .35rem }
  tr > :first-child { max-width: 9rem; white-space: normal } }
@media print { figure, table { break-inside: avoid } details { border: 0 } }
"""


def _e(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    return "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in pairs if v not in (None, "")) + "</dl>"


def _items(lines: Iterable[str], kind: str = "") -> str:
    return f"<ul{kind}>" + "".join(f"<li>{_e(line)}</li>" for line in lines) + "</ul>"


def _html_head(metric: Metric, shown_unit: str) -> str:
    title = f"{_e(metric.title)} {arrow(metric)}<span>{_e(shown_unit)}</span>"
    return f'<th scope="col" title="{_e(metric.definition)}">{title}</th>'


def _html_table(table: Table, metrics: Sequence[Metric]) -> str:
    heads = "".join(_html_head(m, unit(table, m)) for m in metrics)
    rows = []
    for row in table.rows:
        cells = "".join(
            f"<td{' class=best' if row.label in table.best[m.key] else ''}>{_e(cell(table, row, m))}</td>"
            for m in metrics
        )
        joint = " class=joint" if row.joint else ""
        rows.append(f"<tr{joint}><td>{_e(row_name(row))}</td><td>{len(row.seeds)}</td>{cells}</tr>")
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">method</th><th scope="col">seeds</th>'
        f"{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _html_differences(table: Table) -> list[str]:
    """The paired differences to the baseline, where there are any to test."""
    found = table.differences
    if found is None or not found.shown:
        return []
    metrics = difference_metrics(table)
    heads = "".join(_html_head(m, difference_unit(m)) for m in metrics)
    rows = []
    for row in compared_rows(table):
        cells = ""
        for metric in metrics:
            difference = found.by_metric[metric.key][row.label]
            mean, interval, p = difference_parts(difference, metric)
            mark, few = "*" * difference.significant, few_seeds(table, row, difference)
            below = interval + ("" if difference.p_holm is None else f", p {p}")
            spread = f"<span>{_e(below)}</span>" if difference.mean is not None else ""
            cells += f"<td{' class=sig' if mark else ''}>{_e(mean + mark + few)}{spread}</td>"
        joint = " class=joint" if row.joint else ""
        rows.append(f"<tr{joint}><td>{_e(row_name(row))}</td><td>{len(shared_seeds(table, row))}</td>{cells}</tr>")
    return [
        f"<h4>{_e(difference_title(table))}</h4>",
        f'<div class="scroll"><table><thead><tr><th scope="col">method − {_e(found.baseline)}</th>'
        f'<th scope="col">seeds</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>',
        *(f'<p class="dim">{_e(line)}</p>' for line in difference_notes(table)),
    ]


def _html_ranks(summary: Summary, kind: MatrixKind, picture: bytes | None) -> list[str]:
    """The ranks over the streams of a kind, with their diagram; nothing for a single stream."""
    lines = ranking_lines(summary, kind)
    if not lines:
        return []
    parts = ["<h3>Ranks over streams</h3>", *(f"<p>{_e(line)}</p>" for line in lines)]
    if picture is not None:
        source = base64.b64encode(picture).decode()
        alt = "Critical difference diagram: mean ranks of the methods on an axis; bars join those not told apart."
        parts.append(f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{source}"></figure>')
    return parts


def _html_run(record: Record) -> str:
    data = record.data
    environment = data.get("environment") or {}
    shown = {k: v for k, v in data["identity"].items() if k != "class_order"}
    facts = [
        ("status", record.status),
        ("error", data.get("error")),
        ("directory", record.directory),
        ("config hash", data.get("config_hash")),
        ("created", data.get("created")),
        ("finished", data.get("finished")),
        *environment.items(),
        *((k, json.dumps(v, ensure_ascii=False) if isinstance(v, (dict, list)) else v) for k, v in shown.items()),
        (
            f"{'class' if record.kind.item == 'task' else record.kind.item} order",
            " ".join(map(str, data["identity"].get("class_order") or [])),
        ),
    ]
    config = json.dumps(data["config"], indent=2, ensure_ascii=False, default=str)
    return (
        f"<details><summary>{_e(record.label)}, seed {record.seed}, {_e(record.status)}</summary>"
        f"<p>Repeat: <code>{_e(command(record))}</code></p>{_pairs(facts)}"
        f"<details><summary>Configuration</summary><pre>{_e(config)}</pre></details></details>"
    )


def _published(summary: Summary, form: str, *, ascii_only: bool = False, width: int | None = None) -> str:
    """Published numbers beside the tables, never in them: text, md, tex, csv or html."""
    from dualcl.results.published import render as published
    from dualcl.results.tables import tex_text

    if form == "csv":
        return published.to_csv(summary)
    if form == "md":
        return published.section_markdown(summary)
    if form == "text":
        return published.section_text(summary, ascii_only=ascii_only, width=width)
    blocks = published.blocks_for(summary)
    return published.to_latex(blocks, tex_text) if form == "tex" else published.to_html(blocks)


def _html_sheet(sheet: Sheet, link: str | None, caption: bool = True) -> str:
    kind, data = sheet.for_page()
    title = f'<a href="{_e(link)}">{_e(sheet.title)}</a>' if link else _e(sheet.title)
    return (
        f"<figure class=sheet>{f'<figcaption>{title}</figcaption>' if caption else ''}"
        f'<img alt="{_e(sheet.description)}" src="data:{kind};base64,{base64.b64encode(data).decode()}"></figure>'
    )


def _html_samples(samples: _Samples) -> list[str]:
    """The images of one table: a concept through the stream, methods side by side, a contact sheet per method."""
    links: list[str | None] = [*samples.links] if samples.links else [None] * len(samples.sheets)
    pairs = list(zip(samples.sheets, links, strict=True))
    parts = []
    if pairs or samples.notes:
        parts.append("<h4>Generated images</h4>")
    if samples.notes:
        parts.append(_items(samples.notes, " class=warn"))
    if not pairs:
        return parts
    parts.append("<p>Prompts and seeds are the same before and after: only the weights differ.</p>")
    parts += [_html_sheet(sheet, link) for sheet, link in pairs if sheet.kind == "stages"]
    strips = [_html_sheet(sheet, link) for sheet, link in pairs if sheet.kind == "strip" and sheet.shown]
    parts.append(f'<div class="strips">{"".join(strips)}</div>')
    parts.append("<h4>Contact sheets</h4>")
    opened = " open"
    for sheet, link in pairs:
        if sheet.kind == "contact" and sheet.shown:
            file = f'<p><a href="{_e(link)}">{_e(link)}</a></p>' if link else ""
            shown = file + _html_sheet(sheet, link, False)
            parts.append(f"<details{opened}><summary>{_e(sheet.title)}</summary>{shown}</details>")
            opened = ""
    more = [f'<a href="{_e(link)}">{_e(sheet.title)}</a>' for sheet, link in pairs if not sheet.shown and link]
    if more:
        parts.append(f"<p>More: {', '.join(more)}</p>")
    return parts


def _html_definitions(kind: MatrixKind, tables: Sequence[Table]) -> list[str]:
    extra = [key for table in tables for record in table.records for key in record.metrics]
    keys = [key for key in dict.fromkeys([*kind.columns, *extra]) if key not in COST]
    pairs = [(f"{METRICS[k].title} {arrow(METRICS[k])}", METRICS[k].definition) for k in keys]
    return [f"<h3>What the columns mean</h3><p>{_e(kind.notation)}</p>", _pairs(pairs)]


def _html_table_part(
    table: Table, pictures: Mapping[str, bytes], samples: _Samples, plots: Mapping[str, Plot]
) -> list[str]:
    """All about one data stream but its runs."""
    parts = [f'<h3>{_e(table.preset)}</h3><p class="dim">{_e(table.subtitle)}. {_e(seeds_note(table))}</p>']
    if table.measured:
        parts.append(f'<p class="dim">{_e(table.measured)}.</p>')
    if table.warnings:
        parts.append(_items(table.warnings, " class=warn"))
    if table.rows:
        parts.append(_html_table(table, table.metrics))
        parts += [f'<p class="dim">{_e(line)}</p>' for line in caveat_lines(table)]
    if every := table.all_metrics:
        shown = _html_table(table, every)
        parts.append(f"<details><summary>All metrics of the matrix</summary>{shown}</details>")
    parts += _html_differences(table)
    if table.unfinished:
        parts.append("<h4>Without a result</h4>" + _items(table.unfinished))
    parts += _html_samples(samples)
    for name, plot in plots.items():
        if name in pictures:
            # an img isolates the ids of one SVG from those of the next, and runs no script
            source = base64.b64encode(pictures[name]).decode()
            parts.append(
                f"<h4>{_e(plot.title)}</h4><figure>"
                f'<img alt="{_e(plot.description)}" src="data:image/svg+xml;base64,{source}"></figure>'
            )
    return parts


def _html(
    summary: Summary,
    pictures: Mapping[tuple[int, str], bytes],
    found: Sequence[_Samples],
    ranks: Mapping[str, bytes],
    with_published: bool = False,
    overviews: Mapping[str, bytes] | None = None,
    notes: Sequence[str] = (),
) -> str:
    from dualcl.results.plots import PLOTS

    by_kind = sections(summary)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>dualcl report: {_e(', '.join(t.preset for t in summary.tables))}</title>",
        f"<style>{_STYLE}</style></head><body><h1>dualcl report</h1>",
        f'<p class="dim">{len(summary.records)} runs, '
        f"{sum(r.finished for r in summary.records)} finished. Arrows point to the better direction.</p>",
    ]
    if len(by_kind) > 1:
        links = [f'<a href="#{_e(kind.heading.lower())}">{_e(kind.heading)}</a>' for kind, _ in by_kind]
        parts.append(f"<nav>{' · '.join(links)}</nav>")
    if summary.problems:
        parts.append(_items(summary.problems, " class=warn"))
    if notes:
        parts.append(_items(notes, " class=warn"))
    for kind, tables in by_kind:
        parts.append(f'<section id="{_e(kind.heading.lower())}"><h2>{_e(kind.heading)}</h2>')
        if overviews and kind.heading in overviews:
            alt = "Map of streams (down) and methods (across): mean over seeds; bright is better."
            source = base64.b64encode(overviews[kind.heading]).decode()
            parts.append(f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{source}"></figure>')
        for table in tables:
            index = summary.tables.index(table)
            own = {name: picture for (at, name), picture in pictures.items() if at == index}
            parts += _html_table_part(table, own, found[index], PLOTS)
        parts += _html_ranks(summary, kind, ranks.get(kind.heading))
        parts += [*_html_definitions(kind, tables), "</section>"]
    if with_published:
        parts.append(_published(summary, "html"))
    parts.append("<section><h2>Costs</h2>")
    parts.append(_pairs((f"{METRICS[k].title} {arrow(METRICS[k])}", METRICS[k].definition) for k in COST))
    parts.append("</section><section><h2>Where every number comes from</h2>")
    by_table: dict[tuple[str, str], list[Record]] = {}
    for record in _shown_in_full(summary):
        by_table.setdefault((record.table, record.kind.heading), []).append(record)
    for table in summary.tables:
        parts.append(f"<h3>{_e(table.preset)}</h3>")
        parts += [_html_run(record) for record in by_table.get((table.preset, table.kind.heading), [])]
    return "\n".join([*parts, "</section></body></html>", ""])


def _shown_in_full(summary: Summary) -> list[Record]:
    """All runs, or the first run of every row where they are more than LARGE."""
    if len(summary.records) <= LARGE:
        return summary.records
    first: dict[tuple[str, str, str], Record] = {}
    for record in summary.records:
        first.setdefault((record.table, record.kind.heading, record.label), record)
    return [*first.values()]


def _summary(
    source: Iterable[str | os.PathLike[str]] | Summary, allow_mixed: bool, baseline: str | None, confidence: float
) -> Summary:
    if isinstance(source, Summary):
        return source
    return summarise(source, allow_mixed=allow_mixed, baseline=baseline, confidence=confidence)


@rare_collections()
def build_report(
    source: Iterable[str | os.PathLike[str]] | Summary,
    out: str | os.PathLike[str],
    formats: Sequence[str] = REPORT_FORMATS,
    allow_mixed: bool = False,
    baseline: str | None = None,
    confidence: float = CONFIDENCE,
    with_published: bool = False,
    all_plots: bool = False,
) -> ReportFiles:
    """Writes the files of a report on `source` into `out`, as far as `formats` asks.

    `source`: directories with runs below them, or what `summarise` made of them with its own settings; those here
    count for directories only.

    table.md/.csv/.tex; with csv also runs.csv and differences.csv; with png plots/*.png and *.svg, and samples/*.png
    (contact sheets of generated images); report.html; with parquet runs.parquet and cells.parquet (see `data`).
    Methods are compared with `baseline`, tested at `confidence` (see `make_table`, `statistics.compare`).
    `with_published` adds published numbers in sections of their own (and published.csv with csv).
    With more than LARGE runs on more than FEW_STREAMS streams, an overview takes the place of their pictures, unless
    `all_plots`; `ReportFiles.notes` says so.
    Raises UserError when there is nothing to report, when runs may not share a table or the baseline is not there (see
    `summarise`), for an unknown format, and when `out` cannot be written.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown report format {name!r}; {nearest(name, FORMATS, 'formats')}")
    if "parquet" in formats:
        need_parquet()
    summary = _summary(source, allow_mixed, baseline, confidence)
    drawn = replace(summary, tables=[]) if _only_overview(summary, all_plots) else summary
    out = Path(out)
    files = ReportFiles(out, warnings=summary.warnings, notes=_notes(summary, all_plots))
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = [_Samples([], [], [])] * len(summary.tables)
        if "png" in formats or "html" in formats:
            found[: len(drawn.tables)] = _draw_samples(drawn, out if "png" in formats else None)
            files.samples = [out / link for samples in found for link in samples.links]
            files.warnings += [note for samples in found for note in samples.notes]
        for form in ("md", "csv", "tex"):
            if form in formats:
                text = render(summary, form)
                if form == "md" and files.samples:
                    text += "\n" + _samples_markdown(summary, found)
                if with_published and form != "csv":
                    text += "\n" + _published(summary, form)
                files.tables.append(write_text(out / f"table.{form}", text))
        if "csv" in formats:
            files.runs = write_text(out / "runs.csv", runs_csv(summary.records))
            files.differences = write_text(out / "differences.csv", differences_csv(summary.tables))
            if with_published:
                files.published = write_text(out / "published.csv", _published(summary, "csv"))
        if "parquet" in formats:
            files.parquet = [write_parquet(summary.records, what, out / f"{what}.parquet") for what in PARQUET]
        pictures: dict[tuple[int, str], bytes] = {}
        ranks: dict[str, bytes] = {}
        overviews: dict[str, bytes] = {}
        if "png" in formats:
            files.plots, pictures = _draw(drawn, out / "plots")
            more, ranks = _draw_ranks(summary, out / "plots")
            files.plots += more
            if drawn is not summary:
                more, overviews = _draw_overviews(summary, out / "plots")
                files.plots += more
        elif "html" in formats:
            with tempfile.TemporaryDirectory() as folder:
                _, pictures = _draw(drawn, Path(folder), [".svg"])
                _, ranks = _draw_ranks(summary, Path(folder), [".svg"])
                if drawn is not summary:
                    _, overviews = _draw_overviews(summary, Path(folder), [".svg"])
        if "html" in formats:
            files.html = write_text(
                out / "report.html", _html(summary, pictures, found, ranks, with_published, overviews, files.notes)
            )
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error.strerror}; choose another --out") from None
    return files


def terminal_table(
    source: Iterable[str | os.PathLike[str]] | Summary,
    form: str = "text",
    *,
    allow_mixed: bool = False,
    baseline: str | None = None,
    confidence: float = CONFIDENCE,
    ascii_only: bool | None = None,
    width: int | None = None,
    with_published: bool = False,
) -> str:
    """All tables of `source` for stdout, as text, md, csv or tex; `source`, `baseline` and more as in `build_report`.

    `with_published` appends published numbers to any form but csv, whose columns are ours.

    What is None is looked up: whether stdout can print ± and arrows, and how wide the terminal is (no limit in a
    pipe). Raises as `summarise` does.
    """
    if ascii_only is None:
        ascii_only = not _can_print("±↑↓–×³−†")
    if width is None and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    summary = _summary(source, allow_mixed, baseline, confidence)
    text = render(summary, form, ascii_only=ascii_only, width=width)
    if with_published and form != "csv":
        text += "\n" + _published(summary, form, ascii_only=ascii_only, width=width)
    return text


def terminal_stream(name: str) -> str:
    """The published numbers of one stream (see `published.streams`) for stdout; UserError when it has none."""
    from dualcl.results.published.render import stream_text

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return stream_text(name, ascii_only=not _can_print("±–"), width=width)
