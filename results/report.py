"""The report: tables, plots and one self-contained HTML page, rebuilt from records alone."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.results.data import need_parquet
from dualcl.results.files import write_text
from dualcl.results.late import late
from dualcl.results.published.render import blocks_for, legend, stream_blocks
from dualcl.results.records import Record
from dualcl.results.statistics import CONFIDENCE
from dualcl.results.tables import Summary, rare_collections, summarise
from dualcl.results.writers import csv, latex, markdown, text

#: of tables
TABLE_FORMATS = ("text", "md", "csv", "tex")
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


def _names(summary: Summary) -> set[str]:
    """All names that pictures may show."""
    tasks = (task for record in summary.records for task in record.data["tasks"])
    shown = (str(task.get(key) or "") for task in tasks for key in ("name", "concept"))
    return {*shown, *(name for r in summary.records for name in (r.label, r.table))}


def _can_print(marks: str) -> bool:
    try:
        marks.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


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


def render(summary: Summary, form: str = "text", *, ascii_only: bool = False, width: int | None = None) -> str:
    """All tables in one of TABLE_FORMATS; `ascii_only` and `width` concern text. UserError for another format."""
    if form not in TABLE_FORMATS:
        raise UserError(f"unknown table format {form!r}; {nearest(form, TABLE_FORMATS, 'formats')}")
    if form == "text":
        return text.render(summary, ascii_only=ascii_only, width=width)
    return {"md": markdown, "csv": csv, "tex": latex}[form].render(summary)


def _published(summary: Summary, form: str, *, ascii_only: bool = False, width: int | None = None) -> str:
    """Published numbers beside the tables, never in them: text, md or tex."""
    blocks = blocks_for(summary)
    if form == "text":
        return text.published_section(blocks, ascii_only=ascii_only, width=width)
    return markdown.published_section(blocks) if form == "md" else latex.published(blocks)


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
    streams = not _only_overview(summary, all_plots)
    out = Path(out)
    files = ReportFiles(out, warnings=summary.warnings, notes=_notes(summary, all_plots))
    try:
        out.mkdir(parents=True, exist_ok=True)
        if pictured := "png" in formats or "html" in formats:
            drawing = late("writers.pictures")
            pictures = drawing.Pictures()
            drawing.draw_sheets(pictures, summary, out if "png" in formats else None, streams=streams)
            files.samples = [out / link for samples in pictures.samples for link in samples.links]
            files.warnings += [note for samples in pictures.samples for note in samples.notes]
            files.notes += late("fonts").lacking(_names(summary))
        for form in ("md", "csv", "tex"):
            if form in formats:
                written = render(summary, form)
                if form == "md" and files.samples:
                    written += "\n" + "\n".join(
                        markdown.images(table.preset, [(sheet.title, link) for sheet, link in s.linked], s.notes)
                        for table, s in zip(summary.tables, pictures.samples, strict=True)
                        if s.sheets or s.notes
                    )
                if with_published and form != "csv":
                    written += "\n" + _published(summary, form)
                files.tables.append(write_text(out / f"table.{form}", written))
        if "csv" in formats:
            files.runs = write_text(out / "runs.csv", csv.runs(summary.records))
            files.differences = write_text(out / "differences.csv", csv.differences(summary.tables))
            if with_published:
                files.published = write_text(out / "published.csv", csv.published(summary))
        if "parquet" in formats:
            write = late("writers.parquet").write_parquet
            files.parquet = [write(summary.records, what, out / f"{what}.parquet") for what in PARQUET]
        if "png" in formats:
            drawing.draw_plots(pictures, summary, out / "plots", (".png", ".svg"), streams=streams)
            files.plots = pictures.paths
        elif pictured:
            with tempfile.TemporaryDirectory() as folder:
                drawing.draw_plots(pictures, summary, Path(folder), (".svg",), streams=streams)
        if "html" in formats:
            blocks = blocks_for(summary) if with_published else None
            page = late("writers.html").page(summary, pictures, _shown_in_full(summary), blocks, files.notes)
            files.html = write_text(out / "report.html", page)
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
    found = render(summary, form, ascii_only=ascii_only, width=width)
    if with_published and form != "csv":
        found += "\n" + _published(summary, form, ascii_only=ascii_only, width=width)
    return found


def terminal_stream(name: str) -> str:
    """The published numbers of one stream (see `published.streams`) for stdout; UserError when it has none."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    found = text.published(stream_blocks(name), ascii_only=not _can_print("±–"), width=width)
    return "\n".join([found, *legend(), ""])
