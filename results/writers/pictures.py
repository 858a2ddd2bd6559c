"""The pictures of a report: plots, maps of streams and methods, ranks, contact sheets of generated images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dualcl.results import plots
from dualcl.results.files import slugs, write_bytes
from dualcl.results.metrics import METRICS
from dualcl.results.plots import Figure, Plot
from dualcl.results.samples import Sheet, draw_samples
from dualcl.results.statistics import Ranking
from dualcl.results.tables import Summary, sections


@dataclass(frozen=True)
class Samples:
    """The sheets of one table, their places relative to the report where they are files, and what lacks."""

    sheets: list[Sheet] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def linked(self) -> list[tuple[Sheet, str | None]]:
        """Every sheet with its place, None where it is no file."""
        links: Sequence[str | None] = self.links or [None] * len(self.sheets)
        return list(zip(self.sheets, links, strict=True))


@dataclass
class Pictures:
    """What was drawn for a summary: files, and for its page the last form of each."""

    paths: list[Path] = field(default_factory=list)
    #: by index of the table
    plots: dict[int, list[tuple[Plot, bytes]]] = field(default_factory=dict)
    #: by heading of the kind
    ranks: dict[str, bytes] = field(default_factory=dict)
    overviews: dict[str, bytes] = field(default_factory=dict)
    #: one per table
    samples: list[Samples] = field(default_factory=list)

    def save(self, figure: Figure, folder: Path, name: str, suffixes: Sequence[str]) -> bytes:
        """Writes a figure in all forms; the last of them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.paths += [plots.save_figure(figure, folder / f"{name}{suffix}") for suffix in suffixes]
        return self.paths[-1].read_bytes()


def draw_sheets(pictures: Pictures, summary: Summary, out: Path | None, *, streams: bool = True) -> None:
    """Contact sheets and strips per table, written into `out`/samples unless that is None; with `streams` alone."""
    for table, prefix in zip(summary.tables, slugs([table.preset for table in summary.tables]), strict=True):
        found = Samples()
        if streams and "generated" in table.kind.row_fields:
            sheets, notes = draw_samples(table.records, prefix)
            found = Samples(sheets, [], notes)
            for sheet in sheets if out is not None else []:
                assert out is not None
                (out / "samples").mkdir(exist_ok=True)
                path = write_bytes(out / "samples" / f"{sheet.name}.png", sheet.png)
                found.links.append(path.relative_to(out).as_posix())
        pictures.samples.append(found)


def draw_plots(
    pictures: Pictures, summary: Summary, folder: Path, suffixes: Sequence[str], *, streams: bool = True
) -> None:
    """The plots of every stream and the ranks over them; instead of the former, without `streams`, an overview."""
    if streams:
        for index, (table, slug) in enumerate(
            zip(summary.tables, slugs([t.preset for t in summary.tables]), strict=True)
        ):
            for name, plot in plots.PLOTS.items():
                if table.records and (figure := plot.draw(table.records)) is not None:
                    picture = pictures.save(figure, folder, f"{slug}-{name}", suffixes)
                    pictures.plots.setdefault(index, []).append((plot, picture))
    for kind, tables in sections(summary):
        ranking, title = summary.rankings.get(kind.heading), f"{METRICS[kind.quality].title}"
        if isinstance(ranking, Ranking):
            heading = f"{kind.heading}: mean ranks in {title} over {len(ranking.streams)} streams"
            figure = plots.critical_difference_diagram(ranking, heading, summary.names(kind))
            name = f"critical-difference-{kind.heading.lower()}"
            pictures.ranks[kind.heading] = pictures.save(figure, folder, name, suffixes)
        means = {t.preset: {r.label: s.mean for r in t.rows if (s := r.stats.get(kind.quality))} for t in tables}
        if not streams and any(means.values()):
            figure = plots.overview(means, kind, f"{kind.heading}: {title} by stream and method", summary.names(kind))
            name = f"overview-{kind.heading.lower()}"
            pictures.overviews[kind.heading] = pictures.save(figure, folder, name, suffixes)
