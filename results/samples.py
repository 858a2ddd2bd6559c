"""Pictures made of the images that runs keep in their `samples` folders: contact sheets, and methods side by side.

Layout (see README.md), in a run folder: `samples/after_<i>/<concept>_<slug>/<k>.png` and `samples/real/...` likewise,
tasks and concepts counted from 1. Runs without are passed over; an image that cannot be read leaves its place
empty and is named in a note.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dualcl.results.files import slugs
from dualcl.results.fonts import PLAIN, drawable, file_for
from dualcl.results.records import Record

FOLDER = "samples"
#: side of a picture on a sheet, in pixels; smaller ones are enlarged by whole factors, larger ones reduced
TILE = 96
#: pictures per concept: real ones, generated ones on a contact sheet, generated ones per method
REAL, ON_SHEET, PER_METHOD = 3, 4, 2
#: most columns of the strip that follows one concept through the stream
STAGES = 12
#: strips of so many concepts are on the page, the others are linked
SHOWN_CONCEPTS = 10
#: contact sheets per stream: of more runs, those of the first seeds have one
MAX_SHEETS = 200
#: of requests: columns of targets, and of what is retained on each side
TARGETS, RETAINED = 12, 6
#: no image of a run is larger
MAX_SIDE = 8192

_GAP, _GROUP_GAP, _MARGIN, _LABEL = 2, 14, 8, 140
_BLACK, _GREY, _PALE = "#1B1B1B", "#6A6F78", "#ECEEF1"
#: the bar below a picture: nearest to its own concept's photographs, or to another's; told apart without colour too
_RIGHT, _WRONG, _BAR = "#009E73", "#D55E00", 4

Tiles = Sequence["Image.Image | None"]


@dataclass(frozen=True)
class Picture:
    """An image at the size of a tile, the texts stored with it, and whether it was reduced to that size."""

    tile: Image.Image
    text: Mapping[str, str]
    reduced: bool

    def judged(self) -> Image.Image:
        """The tile, its last rows a bar that says whether it is nearest to its own concept's photographs, where known.

        The bar of a picture that is nearest to another's is broken.
        """
        if not (near := self.text.get("nearest")):
            return self.tile
        return self._barred(near == self.text.get("concept"))

    def read(self) -> Image.Image:
        """The tile with a bar that says whether the judge sees what was asked for, broken where not; none unjudged."""
        told = self.text.get("shown")
        return self._barred(told == "yes") if told in ("yes", "no") else self.tile

    def _barred(self, right: bool) -> Image.Image:
        tile = self.tile.copy()
        draw, width = ImageDraw.Draw(tile), tile.width
        draw.rectangle((0, tile.height - _BAR - 1, width, tile.height), fill="white")
        for left in (0,) if right else range(0, width, 12):
            end = width if right else min(width, left + 7)
            draw.rectangle((left, tile.height - _BAR, end - 1, tile.height - 1), fill=_RIGHT if right else _WRONG)
        return tile


@dataclass(frozen=True)
class Sheet:
    """A finished picture of the report."""

    #: file name without suffix
    name: str
    #: contact: one run; strip: one concept, all methods; stages: one concept after every task
    kind: str
    title: str
    #: what a reader who cannot see it should know
    description: str
    image: Image.Image
    photos: bool
    #: whether the page shows it, or only links to it
    shown: bool = True

    @functools.cached_property
    def png(self) -> bytes:
        """The sheet as a PNG file."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", compress_level=9)
        return buffer.getvalue()

    def for_page(self) -> tuple[str, bytes]:
        """(media type, bytes): photographs as JPEG, a tenth of the size; enlarged pixels as PNG."""
        if not self.photos:
            return "image/png", self.png
        buffer = io.BytesIO()
        self.image.save(buffer, "JPEG", quality=88)
        return "image/jpeg", buffer.getvalue()


def _tile(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side > TILE:
        image = ImageOps.contain(image, (TILE, TILE), Image.Resampling.LANCZOS)
    elif (factor := TILE // side) > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image


def _read(path: Path) -> Picture:
    """Raises any of many exceptions for a file that is no sound PNG."""
    with Image.open(path, formats=["PNG"]) as image:
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"larger than {MAX_SIDE} pixels")
        picture = image.convert("RGB")
        text = {str(k): v for k, v in image.info.items() if isinstance(v, str)}
    return Picture(_tile(picture), text, max(picture.size) > TILE)


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Entries of a folder by the number that the pattern's group finds in their names; none for a missing folder."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return {}
    return {int(found[1]): path for path in entries if (found := re.fullmatch(pattern, path.name))}


@dataclass
class RunSamples:
    """The images of one finished run, read when asked for; indices of tasks and concepts count from 0."""

    record: Record
    #: images that were asked for and could not be read
    unreadable: list[str] = field(default_factory=list)
    #: concepts whose images before and after do not share their seeds
    reseeded: set[int] = field(default_factory=set)
    _cache: dict[Path, Picture | None] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the images lie."""
        return self.record.directory / FOLDER

    def files(self, stage: str, concept: int) -> dict[int, Path]:
        """Image files of a concept by their number, ascending; `stage` is "real" or "after_<number>"."""
        place = _numbered(self.folder / stage, r"(\d+)_.*").get(concept + 1)
        return dict(sorted(_numbered(place, r"(\d+)\.png").items())) if place else {}

    def picture(self, path: Path | None) -> Picture | None:
        """The picture in a file; None, and an entry in `unreadable`, when there is no sound one."""
        if path is None:
            return None
        if path not in self._cache:
            try:
                self._cache[path] = _read(path)
            except Exception:  # Pillow raises a dozen kinds on damaged files
                self._cache[path] = None
                self.unreadable.append(path.relative_to(self.folder).as_posix())
        return self._cache[path]

    def forget(self) -> None:
        """Frees the pictures read so far."""
        self._cache.clear()

    def real(self, concept: int, n: int) -> list[Picture]:
        """The first `n` real images of a concept that can be read."""
        found = (self.picture(path) for path in list(self.files("real", concept).values())[:n])
        return [picture for picture in found if picture]

    def after(self, task: int, concept: int) -> dict[int, Path]:
        """Files of the images generated for a concept after a task."""
        return self.files(f"after_{task + 1}", concept)

    def pairs(self, concept: int, n: int) -> list[tuple[Picture | None, Picture | None]]:
        """The first `n` images right after learning (none in joint training) and after the last task, by number."""
        then = {} if self.record.joint else self.after(concept, concept)
        now = self.after(self.record.n_tasks - 1, concept)
        numbers = sorted(then.keys() | now.keys())[:n]
        found = [(self.picture(then.get(k)), self.picture(now.get(k))) for k in numbers]
        if any(a.text.get("seed") != b.text.get("seed") for a, b in found if a and b):
            self.reseeded.add(concept)
        return found

    def stored(self, concept: int, key: str) -> str:
        """The text `key` of a concept's first image that has it; "" without."""
        for pair in self.pairs(concept, 1):
            for picture in pair:
                if picture and picture.text.get(key):
                    return picture.text[key]
        return ""

    def name(self, concept: int) -> str:
        """What the record, or else an image, calls a concept."""
        names = self.record.data["network"].get("concepts")
        if isinstance(names, list) and concept < len(names):
            return str(names[concept])
        return self.stored(concept, "concept")

    def prompt(self, concept: int) -> str:
        """The prompt of a concept's first image, as stored with it."""
        return self.stored(concept, "prompt")

    def note(self) -> str:
        """One line on images that are missing, or were asked for and cannot be read; "" when there are none."""
        missing = []
        rows = {row["after_task"]: row for row in self.record.data["matrix"]["rows"]}
        for concept in range(self.record.n_tasks):
            for task in dict.fromkeys([concept, self.record.n_tasks - 1]):
                wanted = (rows[task]["generated"][concept] or 0) if task in rows else 0
                if (there := len(self.after(task, concept))) < wanted:
                    missing.append(f"after_{task + 1}/{concept + 1}_* ({there} of {wanted})")
        lacking = [*missing, *self.unreadable]
        parts = []
        if lacking:
            shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            parts.append(f"images missing or unreadable in {self.folder}: {shown}")
        if self.reseeded:
            numbers = ", ".join(str(concept + 1) for concept in sorted(self.reseeded))
            parts.append(f"images before and after do not share their seeds for concept {numbers}")
        return f"{self.record.label} seed {self.record.seed}: {'; '.join(parts)}" if parts else ""


# --- drawing ----------------------------------------------------------------------------------------------------------


@cache
def _font(size: int, file: str = str(PLAIN)) -> Any:
    return ImageFont.truetype(file, size)


def _lines(text: str, font: Any, width: float, most: int) -> list[str]:
    """Text wrapped to `width` pixels, long words cut; what does not fit `most` lines ends in an ellipsis."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())[:1000]
    lines: list[str] = []
    while text and len(lines) < most:
        n = next((i for i in range(1, len(text) + 1) if font.getlength(text[:i]) > width), len(text) + 1) - 1
        n = max(n, 1)
        if n < len(text) and (blank := text.rfind(" ", 1, n + 1)) > 0:
            n = blank
        lines.append(text[:n].rstrip())
        text = text[n:].lstrip()
    if text and lines:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last + "…"
    return lines


@dataclass(frozen=True)
class _Group:
    """Columns under one heading, with a caption each ("" for none)."""

    title: str
    captions: tuple[str, ...]

    @property
    def width(self) -> int:
        return len(self.captions) * (TILE + _GAP) - _GAP


@dataclass(frozen=True)
class _Row:
    label: str
    #: smaller, below the label
    detail: str
    #: tiles by group
    cells: Sequence[Tiles]


class _Sheet:
    """A canvas that grows downwards."""

    def __init__(self, width: int) -> None:
        self.image = Image.new("RGB", (width, 64), "white")
        self.y = _MARGIN

    def room(self, height: int) -> ImageDraw.ImageDraw:
        """Makes room for `height` pixels below `y`."""
        if (wanted := self.y + height + _MARGIN) > self.image.height:
            larger = Image.new("RGB", (self.image.width, wanted + 1024), "white")
            larger.paste(self.image, (0, 0))
            self.image = larger
        return ImageDraw.Draw(self.image)

    def text(self, x: int, y: int, text: str, size: int, width: int, most: int, colour: str = _BLACK) -> int:
        """Draws wrapped text; returns its height."""
        text = drawable(text.encode("utf-8", "replace").decode())
        font = _font(size, file_for(text))
        lines = _lines(text, font, width, most)
        step = round(size * 1.3)
        draw = self.room(y - self.y + step * len(lines))
        for i, line in enumerate(lines):
            draw.text((x, y + i * step), line, fill=colour, font=font)
        return step * len(lines)

    def tiles(self, x: int, tiles: Tiles) -> None:
        """Draws a row of tiles; a place without one is marked."""
        draw = self.room(TILE)
        for i, tile in enumerate(tiles):
            left = x + i * (TILE + _GAP)
            if tile is not None:
                at = left + (TILE - tile.width) // 2, self.y + (TILE - tile.height) // 2
                self.image.paste(tile, at)
            else:
                draw.rectangle((left, self.y, left + TILE - 1, self.y + TILE - 1), fill=_PALE)
                draw.text((left + TILE // 2, self.y + TILE // 2), "–", fill=_GREY, font=_font(13), anchor="mm")

    def done(self) -> Image.Image:
        """The canvas, cut to what is drawn."""
        return self.image.crop((0, 0, self.image.width, self.y + _MARGIN))


def _grid(
    title: str, groups: Sequence[_Group], rows: Sequence[_Row], real: Tiles = (), legend: str = ""
) -> Image.Image:
    """Rows of tiles in groups of columns, with labels on the left; `real` is a row of its own above the headings."""
    starts, x = [], _MARGIN + _LABEL
    for group in groups:
        starts.append(x)
        x += group.width + _GROUP_GAP
    least = _MARGIN + _LABEL + len(real) * (TILE + _GAP)
    sheet = _Sheet(max(x - _GROUP_GAP, least) + _MARGIN)
    inner = sheet.image.width - 2 * _MARGIN
    sheet.y += sheet.text(_MARGIN, sheet.y, title, 15, inner, 2) + 6
    if legend:
        sheet.y += sheet.text(_MARGIN, sheet.y, legend, 11, inner, 2, _GREY) + 6
    if real:
        sheet.text(_MARGIN, sheet.y, "real images", 13, _LABEL - 8, 2)
        sheet.tiles(_MARGIN + _LABEL, real)
        sheet.y += TILE + 8
    heads = [sheet.text(x, sheet.y, group.title, 13, group.width, 3) for x, group in zip(starts, groups, strict=True)]
    sheet.y += max(heads) + 2
    if any(caption for group in groups for caption in group.captions):
        for x, group in zip(starts, groups, strict=True):
            for i, caption in enumerate(group.captions):
                sheet.text(x + i * (TILE + _GAP), sheet.y, caption, 11, TILE, 1, _GREY)
        sheet.y += 16
    for row in rows:
        height = sheet.text(_MARGIN, sheet.y, row.label, 13, _LABEL - 8, 5)
        left = max((TILE - height) // 15, 0)
        sheet.text(_MARGIN, sheet.y + height + 2, row.detail, 11, _LABEL - 8, left, _GREY)
        for x, tiles in zip(starts, row.cells, strict=True):
            sheet.tiles(x, tiles)
        sheet.y += TILE + _GAP
    return sheet.done()


def _fill(pictures: Sequence[Picture | None], n: int) -> list[Image.Image | None]:
    tiles = [picture.judged() if picture else None for picture in pictures[:n]]
    return [*tiles, *[None] * (n - len(tiles))]


def _halves(samples: RunSamples, concept: int, n: int) -> tuple[Tiles, Tiles]:
    pairs = samples.pairs(concept, n)
    return _fill([then for then, _ in pairs], n), _fill([now for _, now in pairs], n)


def _widest(rows: Sequence[_Row], group: int) -> int:
    """How many columns of a group some row fills."""
    return max((i + 1 for row in rows for i, tile in enumerate(row.cells[group]) if tile is not None), default=0)


def _trimmed(
    title: str, groups: Sequence[tuple[str, int]], rows: Sequence[_Row], real: Tiles = (), legend: str = ""
) -> Image.Image:
    """A grid of (heading, columns) without groups that no row fills, `columns` being the most."""
    kept = [i for i in range(len(groups)) if _widest(rows, i)]
    return _grid(
        title,
        [_Group(groups[i][0], ("",) * groups[i][1]) for i in kept],
        [_Row(r.label, r.detail, [r.cells[i][: groups[i][1]] for i in kept]) for r in rows],
        real,
        legend,
    )


def method_name(record: Record) -> str:
    """A run's label, with joint training marked as the upper bound that it is."""
    return f"{record.label} (upper bound)" if record.joint else record.label


def _concept(samples: Sequence[RunSamples], concept: int) -> str:
    name = next((name for s in samples if (name := s.name(concept))), "")
    return f"{concept + 1} {name}".rstrip()


def _real(runs: Sequence[RunSamples], concept: int, n: int) -> list[Image.Image]:
    for samples in runs:
        if found := samples.real(concept, n):
            return [picture.tile for picture in found]
    return []


def _legend(runs: Sequence[RunSamples], concept: int) -> str:
    """What the bars say, where there are any."""
    judged = any(samples.stored(concept, "nearest") for samples in runs)
    return "bar: nearest to this concept's real images (whole) or to another's (broken)" if judged else ""


def contact_sheet(samples: RunSamples) -> Image.Image | None:
    """One run: a row per concept; real images, right after learning, after the last task. None without images."""
    record = samples.record
    rows = []
    for concept in range(record.n_tasks):
        cells = [_fill(samples.real(concept, REAL), REAL), *_halves(samples, concept, ON_SHEET)]
        rows.append(_Row(_concept([samples], concept), samples.prompt(concept), cells))
    if not (widest := max(_widest(rows, 1), _widest(rows, 2))):
        return None
    after = f"after all {record.n_tasks} concepts" if record.n_tasks > 1 else "after the only concept"
    groups = [("real images", REAL), ("right after learning the concept", widest), (f"{after}, same seeds", widest)]
    if record.joint:
        groups[2] = ("all concepts learnt at once", widest)
    title = f"{method_name(record)}, seed {record.seed} ({record.preset})"
    return _trimmed(title, groups, rows, (), _legend([samples], 0))


def requests_sheet(samples: RunSamples) -> Image.Image | None:
    """One run of requests: a row after each, the pretrained model first; targets so far, and what is to be retained.

    One image of each, always from the same noise. None for a stream of concepts, or without images.
    """
    record = samples.record
    network = record.data["network"]
    if not network.get("requests") or record.joint:
        return None
    retained = network.get("retained") or []
    first = record.n_tasks
    sides = [
        [(first + r, str(one.get("name", ""))) for r, one in enumerate(retained) if one.get("side") == side]
        for side in ("inside", "across")
    ]
    spread = [side if len(side) <= RETAINED else side[:: -(-len(side) // RETAINED)] for side in sides]
    targets = [(j, samples.name(j)) for j in range(min(first, TARGETS))]
    columns = [("targets so far", targets), ("retained: same attributes", spread[0]), ("retained: others", spread[1])]
    columns = [(title, things) for title, things in columns if things]
    rows = []
    for after in range(first + 1):
        label = "before" if after == 0 else f"after {after} {samples.name(after - 1)}"
        cells = []
        for _, things in columns:
            wanted = [at for at, _ in things if at >= first or at < after or after == 0]
            found = {at: samples.picture(samples.files(f"after_{after}", at).get(0)) for at in wanted}
            pictures = [found.get(at) for at, _ in things]
            cells.append([picture.read() if picture else None for picture in pictures])
        rows.append(_Row(label, "", cells))
    if not any(tile for row in rows for tiles in row.cells for tile in tiles):
        return None
    groups = [_Group(title, tuple(name for _, name in things)) for title, things in columns]
    title = f"{method_name(record)}, seed {record.seed} ({record.preset}): request after request, same seeds"
    told = any(p and p.text.get("shown") for p in samples._cache.values())
    legend = (
        "bar: the judge sees what the prompt asks for (whole) or not (broken); a target should be gone" if told else ""
    )
    return _grid(title, groups, rows, (), legend)


def method_strip(runs: Sequence[RunSamples], concept: int) -> Image.Image | None:
    """One concept: a row per run; right after learning, after the last task. None without images."""
    rows = [_Row(method_name(s.record), "", _halves(s, concept, PER_METHOD)) for s in runs]
    if not (widest := max(_widest(rows, 0), _widest(rows, 1))):
        return None
    groups = [("right after learning", widest), ("after the last concept", widest)]
    real = _real(runs, concept, 2 * widest)
    return _trimmed(_concept(runs, concept), groups, rows, real, _legend(runs, concept))


def stages_strip(runs: Sequence[RunSamples], concept: int) -> Image.Image | None:
    """One concept followed through the stream: a row per run, a column per task from its own on, always the same seed.

    None unless some run kept images of a task between the concept's own and the last.
    """
    runs = [samples for samples in runs if not samples.record.joint]
    n_tasks = min((samples.record.n_tasks for samples in runs), default=0)
    between = [t for t in range(concept + 1, n_tasks - 1) if any(s.after(t, concept) for s in runs)]
    if not between:
        return None
    step = (len(between) - 1) / (STAGES - 3)
    inner = between if len(between) <= STAGES - 2 else [between[round(i * step)] for i in range(STAGES - 2)]
    tasks = [concept, *inner, n_tasks - 1]
    rows = []
    for samples in runs:
        number = min(samples.after(concept, concept), default=0)
        pictures = [samples.picture(samples.after(task, concept).get(number)) for task in tasks]
        rows.append(_Row(samples.record.label, "", [_fill(pictures, len(tasks))]))
    groups = [_Group("after learning concept", tuple(str(task + 1) for task in tasks))]
    title, real = f"{_concept(runs, concept)}: one image, same seed", _real(runs, concept, REAL)
    return _grid(title, groups, rows, real, _legend(runs, concept))


# --- the pictures of a report -----------------------------------------------------------------------------------------


def draw_samples(records: Sequence[Record], prefix: str) -> tuple[list[Sheet], list[str]]:
    """All pictures of one stream's finished runs, and a note per run that lacks images; both empty without samples.

    Methods are compared at the smallest seed that most of them have images for. `prefix` begins every file name.
    """
    contacts: list[tuple[RunSamples, Image.Image]] = []
    requests: list[tuple[RunSamples, Image.Image]] = []
    runs = [RunSamples(record) for record in sorted(records, key=lambda r: (r.joint, r.label, r.seed))]
    runs = [samples for samples in runs if samples.folder.is_dir()]
    notes = []
    if len(runs) > MAX_SHEETS:
        notes.append(f"contact sheets of {MAX_SHEETS} of {len(runs)} runs, the first seeds")
        kept = {id(samples) for samples in sorted(runs, key=lambda s: s.record.seed)[:MAX_SHEETS]}
        runs = [samples for samples in runs if id(samples) in kept]
    for samples in runs:
        if (image := contact_sheet(samples)) is not None:
            contacts.append((samples, image))
            if (asked := requests_sheet(samples)) is not None:
                requests.append((samples, asked))
        samples.forget()
    seeds = [samples.record.seed for samples, _ in contacts]
    seed = min(seeds, key=lambda s: (-seeds.count(s), s), default=0)
    compared = [samples for samples, _ in contacts if samples.record.seed == seed]
    photos = any(p.reduced for samples in compared[:1] for then_now in samples.pairs(0, 1) for p in then_now if p)
    sheets: list[Sheet] = []

    def add(name: str, kind: str, title: str, description: str, image: Image.Image | None, shown: bool) -> None:
        if image is not None:
            sheets.append(Sheet(f"{prefix}-{name}", kind, title, description, image, photos, shown))

    n_concepts = min((samples.record.n_tasks for samples in compared), default=0)
    if n_concepts:
        add(
            f"stages-{_concept(compared, 0)}",
            "stages",
            f"Concept {_concept(compared, 0)} after every concept, seed {seed}",
            "Images of the first concept, one row per method, one column per concept learnt since, same seed.",
            stages_strip(compared, 0),
            True,
        )
    for j in range(n_concepts):
        add(
            f"concept-{_concept(compared, j)}",
            "strip",
            f"Concept {_concept(compared, j)}, seed {seed}",
            f"Images of concept {j + 1}, one row per method: right after learning it, and after the last concept.",
            method_strip(compared, j),
            j < SHOWN_CONCEPTS,
        )
    first: dict[str, int] = {}
    for samples, image in requests:
        record = samples.record
        title = f"{method_name(record)}, seed {record.seed}: request after request"
        add(
            f"requests-{record.label}-seed{record.seed}",
            "contact",
            title,
            f"{title}: a row after each request, the pretrained model first; columns: the targets so far, and what is "
            "to be retained.",
            image,
            first.setdefault(record.label, record.seed) == record.seed,
        )
    for samples, image in contacts:
        record = samples.record
        title = f"{method_name(record)}, seed {record.seed}"
        add(
            f"sheet-{record.label}-seed{record.seed}",
            "contact",
            title,
            f"{title}: real images, images right after learning and after the last concept, one row per concept.",
            image,
            first.setdefault(record.label, record.seed) == record.seed,
        )
    named = zip(sheets, slugs([sheet.name for sheet in sheets]), strict=True)
    return [replace(sheet, name=name) for sheet, name in named], [*notes, *(n for s in runs if (n := s.note()))]
