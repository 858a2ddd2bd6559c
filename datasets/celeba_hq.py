"""Identities of CelebA-HQ (Karras et al., 2018; the images of CelebAMask-HQ, Lee et al., 2020), fetched by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.settings import positive
from dualcl.datasets.base import register_dataset
from dualcl.datasets.concepts import ConceptData
from dualcl.datasets.reading.photos import PhotosConfig, Words, check_numbers, photo_concepts

IMAGES = "CelebA-HQ-img"
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
IDENTITIES = "identity_CelebA.txt"
NOUN = "person"


@register_dataset(
    "celeba-hq",
    domain="customization",
    summary="10 identities of CelebA-HQ with at least 15 photographs each (to be fetched by hand)",
    needs_prepare=True,
)
class CelebAHQ:
    """People of CelebA-HQ: by default the identities with the most images, of equally many the smaller number first.

    Concepts are called id<number>, after CelebA's identity numbers.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config(PhotosConfig):
        """Keys below `data.`."""

        root: str = field(
            default="data/celeba-hq",
            metadata={"help": f"the folder with {IMAGES}/ and {IDENTITIES}", "volatile": True},
        )
        min_images: int = field(default=15, metadata={"help": "identities with fewer images are not taken"})
        concepts: int = field(default=10, metadata={"help": "how many identities, when none are named"})
        identities: list[int] | None = field(
            default=None,
            metadata={"help": "identity numbers of CelebA, in this order; default: most images"},
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            positive("data.concepts", self.concepts)
            check_numbers("data.identities", self.identities)

        @property
        def spares_concepts(self) -> bool:
            """Unless they are named."""
            return self.identities is None

    @classmethod
    def load(cls, config: Config) -> ConceptData:
        """Picks the identities and decodes their images; UserError says which file must be put where."""
        root = Path(config.root).expanduser()
        below = _find(root)
        images = _images_by_identity(root, below)
        if config.identities is None:
            enough = [i for i, files in images.items() if len(files) >= config.min_images]
            wanted = config.concepts + config.validation
            chosen = sorted(enough, key=lambda i: (-len(images[i]), i))[:wanted]
            if len(chosen) < wanted:
                validation = f" and data.validation {config.validation}" if config.validation else ""
                raise UserError(
                    f"{root} has {len(chosen)} identities with {config.min_images} images or more, data.concepts is "
                    f"{config.concepts}{validation}; lower it or data.min_images"
                )
            rule = f"most-images-min-{config.min_images}"
        else:
            unknown = [i for i in config.identities if i not in images]
            if unknown:
                raise UserError(f"data.identities: CelebA-HQ has no image of {unknown[0]}; look in {IDENTITIES}")
            chosen, rule = list(config.identities), "given"
        files = {f"id{i}": [f"{below}{name}" for name in images[i]] for i in chosen}
        missing = next((name for names in files.values() for name in names if not (root / name).is_file()), None)
        if missing is not None:
            raise UserError(f"{root / missing} is missing; unpack CelebAMask-HQ.zip again at {root}")
        words = {name: Words(NOUN) for name in files}
        return photo_concepts(cls.name, root, files, words, config, f"celeba-hq:{rule}-{len(files)}")

    @classmethod
    def prepare(cls, config: Config) -> None:
        """Downloads nothing, as the licence must be agreed to by hand: says what to put where, and verifies it."""
        cls.load(config)


def _find(root: Path) -> str:
    """Where the images are below `root`: "" or the archive's own folder; UserError unless all three parts are there."""
    below = next((b for b in ("", "CelebAMask-HQ/") if (root / b / IMAGES).is_dir()), None)
    lacking = []
    if below is None:
        lacking.append(f"{IMAGES}/ (unpack CelebAMask-HQ.zip, github.com/switchablenorms/CelebAMask-HQ)")
    elif not (root / below / MAPPING).is_file():
        lacking.append(f"{below}{MAPPING} (it is in CelebAMask-HQ.zip)")
    if not (root / IDENTITIES).is_file():
        lacking.append(f"{IDENTITIES} (CelebA's identity annotations, mmlab.ie.cuhk.edu.hk/projects/CelebA.html)")
    if lacking:
        raise UserError(
            "CelebA-HQ must be fetched by hand, as its licence asks for your agreement: put in "
            f"{root}: {' and '.join(lacking)}; then run: dualcl prepare celeba-hq-10 --root {root}"
        )
    assert below is not None
    return below


def _images_by_identity(root: Path, below: str) -> dict[int, list[str]]:
    """{identity: its images, below the folder of the archive}, in the order of the mapping."""
    identity = dict(_rows(root / IDENTITIES, r"(\d+)\.\w+\s+(\d+)", "a line is such as `000001.jpg 2880`"))
    out: dict[int, list[str]] = {}
    mapping = root / below / MAPPING
    for index, original in _rows(mapping, r"(\d+)\s+\d+\s+(\d+)\.\w+", "a line is such as `0 119613 119614.jpg`"):
        if original not in identity:
            raise UserError(f"{root / IDENTITIES} lacks {original:06d}.jpg, an image of {mapping}; fetch it again")
        out.setdefault(identity[original], []).append(f"{IMAGES}/{index}.jpg")
    return out


def _rows(path: Path, pattern: str, example: str) -> list[tuple[int, int]]:
    """The two numbers that `pattern` finds in each line; the header may be anything."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check its permissions") from error
    out = []
    for number, line in enumerate(lines):
        match = re.fullmatch(pattern, line.strip())
        if match:
            out.append((int(match[1]), int(match[2])))
        elif number > 0 and line.strip():
            raise UserError(f"{path} line {number + 1} is {line.strip()[:60]!r}, but {example}; fetch the file again")
    if not out:
        raise UserError(f"{path} has no rows; {example}; fetch the file again")
    return out
