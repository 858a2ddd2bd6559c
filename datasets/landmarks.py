"""Waterfalls, or other landmarks, of Google Landmarks v2 (Weyand et al., 2020), fetched image by image."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from dualcl.benchmark.core.bar import Bar
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import write_json
from dualcl.benchmark.core.reading import read_json
from dualcl.benchmark.core.settings import positive
from dualcl.datasets.base import register_dataset
from dualcl.datasets.concepts import ConceptData
from dualcl.datasets.reading.download import download
from dualcl.datasets.reading.photos import PhotosConfig, Words, check_numbers, photo_concepts
from dualcl.datasets.reading.split import stable_order
from dualcl.datasets.reading.verify import why_unreadable

METADATA_URL = "https://s3.amazonaws.com/google-landmark/metadata"
#: of every training image its address; of every landmark its category; of every landmark the images of the clean set
ADDRESSES, CATEGORIES, CLEAN = "train.csv", "train_label_to_category.csv", "train_clean.csv"
#: what `prepare` has chosen and fetched
CHOICE = "concepts.json"
FALLS = re.compile(r"\b(water)?falls?\b", re.IGNORECASE)
#: as images are called; what is not called so must not become a path
IMAGE_NAME = re.compile(r"[0-9a-z]{3,64}")
#: no photograph is larger, whatever an address sends; nor is a file of metadata
MAX_IMAGE, MAX_METADATA = 256 * 2**20, 4 * 2**30
#: landmarks looked at per one that is wanted, as images vanish from the web
CANDIDATES = 4


@register_dataset(
    "landmarks",
    domain="customization",
    summary="10 waterfalls of Google Landmarks v2 with at least 15 photographs each",
    needs_prepare=True,
)
class Landmarks:
    """Landmarks of the training set, with the images of its clean version only.

    By default those whose category has the word waterfall(s) or fall(s) in its name: the one with most images first, of
    equally many the smaller number. Concepts are called by number and category.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config(PhotosConfig):
        """Keys below `data.`."""

        root: str = field(
            default="data/landmarks", metadata={"help": "the folder with train/ and the metadata", "volatile": True}
        )
        limit: int | None = field(default=20, metadata={"help": "only this many images per landmark; none: all"})
        min_images: int = field(default=15, metadata={"help": "landmarks with fewer images are not taken"})
        concepts: int = field(default=10, metadata={"help": "how many landmarks, when none are named"})
        landmarks: list[int] | None = field(
            default=None, metadata={"help": "landmark numbers, in this order; default: waterfalls with most images"}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            positive("data.concepts", self.concepts)
            check_numbers("data.landmarks", self.landmarks)

        @property
        def spares_concepts(self) -> bool:
            """Unless they are named."""
            return self.landmarks is None

    @classmethod
    def load(cls, config: Config) -> ConceptData:
        """Decodes the images that `prepare` fetched; UserError when a landmark or an image is missing."""
        root = Path(config.root).expanduser()
        choice = _read_choice(root)
        if config.landmarks is None:
            wanted = config.concepts + config.validation
            chosen = choice["by_rule"][:wanted]
            if len(chosen) < wanted:
                raise UserError(
                    f"{root} has {len(chosen)} of {wanted} landmarks; {_mend(root, validation=config.validation)}"
                )
        else:
            chosen = config.landmarks
        files: dict[str, list[str]] = {}
        words: dict[str, Words] = {}
        for number in chosen:
            found = choice["landmarks"].get(str(number))
            if found is None:
                raise UserError(f"{root} has no images of landmark {number}; {_mend(root, chosen)}")
            category = found["category"]
            name = f"{number} {category}"
            files[name] = [_place(image) for image in found["images"]]
            words[name] = Words("waterfall" if FALLS.search(category) else "landmark")
            missing = next((f for f in files[name] if not (root / f).is_file()), None)
            if missing is not None:
                raise UserError(f"{root / missing} is missing; {_mend(root, config.landmarks)}")
        rule = "falls-most-images" if config.landmarks is None else "given"
        split_name = f"landmarks-v2-clean:{rule}-{len(chosen)}"
        return photo_concepts(cls.name, root, files, words, config, split_name)

    @classmethod
    def prepare(cls, config: Config) -> None:
        """Downloads the metadata (half a GB), chooses the landmarks, and fetches their images from the web.

        The official archives spread each landmark over 500 GB, so the images come from their own addresses (Wikimedia
        Commons, in full size); what is there already, unpacked from those archives or fetched before, is kept. Images
        that are gone or cannot be decoded are left out.
        """
        root = Path(config.root).expanduser()
        for name in (CATEGORIES, CLEAN, ADDRESSES):
            download(f"{METADATA_URL}/{name}", root / name, None, max_bytes=MAX_METADATA)
        categories = {int(row["landmark_id"]): _category(row["category"]) for row in _table(root / CATEGORIES)}
        clean = {
            int(row["landmark_id"]): [image for image in row["images"].split() if IMAGE_NAME.fullmatch(image)]
            for row in _table(root / CLEAN)
        }
        if config.landmarks is None:
            falls = [n for n, c in categories.items() if FALLS.search(c) and len(clean.get(n, ())) >= config.min_images]
            wanted = config.concepts + config.validation
            candidates = sorted(falls, key=lambda n: (-len(clean[n]), n))[: CANDIDATES * wanted]
        else:
            for number in config.landmarks:
                if not clean.get(number):
                    raise UserError(f"data.landmarks: {number} has no images in {root / CLEAN}; choose another")
            candidates, wanted = list(config.landmarks), len(config.landmarks)
        asked = {image for number in candidates for image in clean[number]}
        addresses = {row["id"]: row["url"] for row in _table(root / ADDRESSES) if row["id"] in asked}
        choice = _read_choice(root) if (root / CHOICE).is_file() else {"landmarks": {}, "by_rule": []}
        done: list[int] = []
        for number in candidates:
            category = categories.get(number, "")
            images = _fetch_landmark(root, f"{number} {category}", clean[number], addresses, config.limit)
            if len(images) < config.min_images:
                if config.landmarks is not None:
                    raise UserError(
                        f"landmark {number} ({category}) has {len(images)} images that can be had, data.min_images is "
                        f"{config.min_images}; lower it or choose another"
                    )
                continue
            choice["landmarks"][str(number)] = {"category": category, "images": images}
            done.append(number)
            if len(done) == wanted:
                break
        if len(done) < wanted:
            raise UserError(
                f"only {len(done)} of {wanted} waterfalls have {config.min_images} images that can be had; lower "
                "data.concepts, data.validation or data.min_images, or name landmarks: --set data.landmarks=[...]"
            )
        if config.landmarks is None:
            choice["by_rule"] = done
        write_json(root / CHOICE, choice)
        cls.load(config)


def _mend(root: Path, landmarks: list[int] | None = None, validation: int = 0) -> str:
    named = f" --set data.landmarks={json.dumps(landmarks, separators=(',', ':'))}" if landmarks else ""
    named += f" --set data.validation={validation}" if validation else ""
    return f"run: dualcl prepare landmarks-10 --root {root}{named}"


def _place(image: str) -> str:
    """The path of an image in the official archives."""
    return f"train/{image[0]}/{image[1]}/{image[2]}/{image}.jpg"


def _category(address: str) -> str:
    """`http://commons.wikimedia.org/wiki/Category:Niagara_Falls` -> `Niagara Falls`."""
    return unquote(address.rpartition("Category:")[2]).replace("_", " ").strip()


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of one of the metadata files; UserError when it is damaged."""
    columns = {ADDRESSES: ("id", "url"), CATEGORIES: ("landmark_id", "category"), CLEAN: ("landmark_id", "images")}
    csv.field_size_limit(2**24)  # the images of one landmark are one field
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if any(row.get(column) is None for column in columns[path.name]):
                    raise ValueError(f"a row lacks {' or '.join(columns[path.name])}")
                if not row.get("landmark_id", "0").isdigit():
                    raise ValueError(f"the landmark {row['landmark_id'][:40]!r} is no number")
                yield row
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and run again") from error


def _fetch_landmark(
    root: Path, name: str, images: list[str], addresses: dict[str, str], limit: int | None
) -> list[str]:
    """Fetches up to `limit` of a landmark's images, in a stable random order; returns those that are good, sorted."""
    good: list[str] = []
    total = len(images) if limit is None else min(limit, len(images))
    with Bar(name, total, "images") as bar:
        for index in stable_order(images, "landmarks"):
            if len(good) == total:
                break
            if _fetch_image(root / _place(images[index]), addresses.get(images[index])):
                good.append(images[index])
                bar.update()
    if len(good) < total:
        print(f"{name}: {len(good)} of {total} images can be had", file=sys.stderr)
    return sorted(good)


def _fetch_image(path: Path, address: str | None) -> bool:
    """Fetches the image unless it is there; whether it is now, and can be decoded."""
    if path.is_file():
        return why_unreadable(path) is None
    if address is None or urlsplit(address).scheme not in ("http", "https"):
        return False
    try:
        download(address, path, None, max_bytes=MAX_IMAGE)
    except UserError as error:
        if isinstance(error.__cause__, HTTPError) and error.__cause__.code in (404, 410):
            return False
        raise
    if why_unreadable(path) is not None:
        path.unlink()
        return False
    return True


def _read_choice(root: Path) -> dict[str, Any]:
    path = root / CHOICE
    if not path.is_file():
        raise UserError(f"the landmarks are not at {root}; {_mend(root)}")
    try:
        choice = read_json(path)
        if not all(IMAGE_NAME.fullmatch(image) for e in choice["landmarks"].values() for image in e["images"]):
            raise ValueError("an image has no image's name")
        return {
            "by_rule": [int(number) for number in choice["by_rule"]],
            "landmarks": {
                number: {"category": str(entry["category"]), "images": [str(image) for image in entry["images"]]}
                for number, entry in choice["landmarks"].items()
            },
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; remove it and {_mend(root)}") from error
