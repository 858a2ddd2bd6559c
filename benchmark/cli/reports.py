"""What the commands that end in a report share."""

from __future__ import annotations

from pathlib import Path

from dualcl.benchmark.cli.options import MORE_FORMATS, REPORT_FORMATS
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import parse_names
from dualcl.benchmark.core.text import say
from dualcl.results.data import need_parquet
from dualcl.results.report import build_report
from dualcl.results.tables import Summary


def formats_of(text: str | None) -> tuple[str, ...]:
    """What `--format` asks for; UserError for a form that there is not, or whose library is missing."""
    if text is None:
        return REPORT_FORMATS

    names = parse_names(text, "format")
    for name in names:
        if name not in (known := (*REPORT_FORMATS, *MORE_FORMATS)):
            raise UserError(f"unknown --format {name!r}; {nearest(name, known, 'formats')}")
    if "parquet" in names:  # said now, not after hours
        need_parquet()
    return tuple(names)


def write_report(
    summary: Summary, out: Path, formats: tuple[str, ...], with_published: bool = False, all_plots: bool = False
) -> None:
    """Writes a report and tells what it leaves out and where it is."""

    files = build_report(summary, out, formats, with_published=with_published, all_plots=all_plots)
    for note in files.notes:
        say(f"note: {note}")
    say(f"report: {files.html or files.out}")
