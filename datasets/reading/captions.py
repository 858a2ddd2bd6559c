"""Captions beside images: name.txt or name.caption, as kohya's scripts read them, and metadata.jsonl, as diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import check_name, parse_json, read_text
from dualcl.benchmark.core.text import composed
from dualcl.datasets.concepts import NOUN, TOKEN
from dualcl.datasets.reading.folders import Found

ENDINGS = (".txt", ".caption")
METADATA = "metadata.jsonl"


def read_captions(root: Path, found: Mapping[str, Found]) -> dict[str, str]:
    """{image: its caption}, both below `root`; the files that hold them leave `found.others`.

    UserError for an image with two captions, and for one that is empty, of several lines, or of an image not there.
    """
    out: dict[str, str] = {}
    for folder, files in found.items():
        for image in files.images:
            for name in dict.fromkeys(str(Path(image).with_suffix(end)) for end in ENDINGS):
                if name in files.others:
                    lines = [line.strip() for line in read_text(root / name).splitlines() if line.strip()]
                    if len(lines) != 1:
                        raise UserError(f"{root / name} has {len(lines)} lines; a caption is one line of text")
                    _add(out, image, lines[0], root / name)
        for place in (folder, "."):
            path = root / place / METADATA
            if path.is_file():
                _from_metadata(out, path, root, place, files.images)
        files.others = [n for n in files.others if Path(n).name != METADATA and not _beside(n, files.images)]
    return out


def _beside(name: str, images: Sequence[str]) -> bool:
    path = Path(name)
    return path.suffix in ENDINGS and any(
        str(Path(image).with_suffix("")) == str(path.with_suffix("")) for image in images
    )


def _add(out: dict[str, str], image: str, caption: str, path: Path) -> None:
    check_name(caption, f"a caption in {path}")
    if image in out:
        raise UserError(f"{path} is a second caption of {image}; keep one of the two")
    out[image] = caption


def _from_metadata(out: dict[str, str], path: Path, root: Path, place: str, images: Sequence[str]) -> None:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where} is no JSON ({error}); mend it") from None
        name, text = (entry.get(key) if isinstance(entry, dict) else None for key in ("file_name", "text"))
        if not (isinstance(name, str) and isinstance(text, str) and text.strip()):
            raise UserError(f"{where} must have file_name and text, both text, got {line[:80]!r}")
        image = (Path(place) / name).as_posix()
        if image in images:
            _add(out, image, text.strip(), path)
        elif not (root / image).is_file():
            raise UserError(f"{where} names {name!r}, which is not there; mend it or take the line out")


def as_template(caption: str, placeholder: str, noun: str, names: Sequence[str]) -> str | None:
    """The caption with {token} where the concept stands; None where nothing tells where that is.

    That is {token} or the placeholder itself, else the class noun, which stays behind it, else one of the names.
    """
    text = composed(caption)
    if TOKEN in text:
        return text
    for word, instead in ((placeholder, TOKEN), (noun, f"{TOKEN} {NOUN}"), *((name, TOKEN) for name in names)):
        if word:
            pattern = rf"(?<!\w){re.escape(composed(word))}(?!\w)"
            if place := re.search(pattern, text, flags=re.IGNORECASE):
                return f"{text[: place.start()]}{instead}{text[place.end() :]}"
    return None
