"""The public subjects of DreamBooth (Ruiz et al., 2023): 30 objects and pets, 4 to 6 photographs each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets.base import register_dataset
from dualcl.datasets.concepts import ConceptData
from dualcl.datasets.reading.download import download
from dualcl.datasets.reading.folders import class_folders, folder_notes, read_folders
from dualcl.datasets.reading.photos import (
    CLASSES_FILE,
    PhotosConfig,
    Words,
    chosen_folders,
    names_or_file,
    photo_concepts,
    read_classes,
)
from dualcl.datasets.reading.unpack import extract_tar

#: made anew for every request, so it has no checksum: `prepare` counts and decodes what it holds
URL = "https://codeload.github.com/google/dreambooth/tar.gz/refs/heads/main"
ARCHIVE = "dreambooth.tar.gz"
N_SUBJECTS = 30
MIN_IMAGES = 4


@register_dataset(
    "dreambooth",
    domain="customization",
    summary="the 30 public DreamBooth subjects, 4 to 6 photographs each",
    needs_prepare=True,
)
class DreamBoothSubjects:
    """The subjects by name, with the class nouns of the set's own list. The photographs carry several licences:
    see references_and_licenses.txt beside them.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config(PhotosConfig):
        """Keys below `data.`."""

        root: str = field(
            default="data/dreambooth", metadata={"help": "the folder with the subjects' folders", "volatile": True}
        )
        subjects: list[str] | None = field(
            default=None, metadata={"help": "only these subjects, in this order, or a file of names; default: all"}
        )
        scenes: bool = field(
            default=False, metadata={"help": "evaluate on the set's 25 scenes per subject, not on eval.prompt"}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            object.__setattr__(self, "subjects", names_or_file("data.subjects", self.subjects, self.root))

    @classmethod
    def load(cls, config: Config) -> ConceptData:
        """Finds and decodes the photographs; UserError when subjects or images are missing."""
        root = Path(config.root).expanduser()
        words = _listed(root, config.scenes)
        there = [folder for folder in class_folders(root) if folder in words]
        if config.subjects is None and len(there) != len(words):
            missing = next(iter(sorted(set(words) - set(there))))
            raise UserError(
                f"data.root={root} lacks {len(words) - len(there)} of {len(words)} subjects ({missing}); {_mend(root)}"
            )
        chosen = chosen_folders("data.subjects", config.subjects, there, root)
        split_name = f"dreambooth:{len(chosen)}"
        found = read_folders(root, chosen, "concept")
        files = {folder: f.images for folder, f in found.items()}
        notes = folder_notes(found.values(), "concept")
        return photo_concepts(cls.name, root, files, words, config, split_name, notes)

    @classmethod
    def prepare(cls, config: Config) -> None:
        """Downloads the official archive, unpacks its data set to `data.root`, and counts and decodes the images."""
        root = Path(config.root).expanduser().resolve()
        if not _complete(root):
            archive = download(URL, root.parent / ARCHIVE, None, max_bytes=2 * 2**30)
            unpacked = root.with_name(root.name + ".unpacked")
            shutil.rmtree(unpacked, ignore_errors=True)
            extract_tar(archive, unpacked, max_bytes=2 * 2**30, max_files=10_000)
            unpacked_sets = sorted(unpacked.glob("*/dataset"))
            if not unpacked_sets:
                raise UserError(f"{archive} has no folder dataset, so it is not DreamBooth's; remove it and run again")
            root.mkdir(parents=True, exist_ok=True)
            for entry in sorted(unpacked_sets[0].iterdir()):
                # a folder of an earlier, unfinished unpacking
                if (root / entry.name).is_dir():
                    shutil.rmtree(root / entry.name)
                entry.replace(root / entry.name)
            shutil.rmtree(unpacked)
        subjects = _listed(root)
        if len(subjects) != N_SUBJECTS:
            raise UserError(f"{root / CLASSES_FILE} lists {len(subjects)} subjects, not {N_SUBJECTS}; {_mend(root)}")
        read = read_folders(root, sorted(subjects), "concept")
        few = [(subject, len(f.images)) for subject, f in read.items() if len(f.images) < MIN_IMAGES]
        if few:
            raise UserError(f"{root / few[0][0]} has {few[0][1]} images, not {MIN_IMAGES} or more; {_mend(root)}")
        cls.load(config)


def _mend(root: Path) -> str:
    return f"remove {root.parent / ARCHIVE} if it is there, and run: dualcl prepare dreambooth --root {root}"


def _listed(root: Path, scenes: bool = False) -> dict[str, Words]:
    if not (root / CLASSES_FILE).is_file():
        raise UserError(f"the DreamBooth subjects are not at {root}; run: dualcl prepare dreambooth --root {root}")
    return read_classes(root / CLASSES_FILE, scenes)


def _complete(root: Path) -> bool:
    return (root / CLASSES_FILE).is_file() and all((root / subject).is_dir() for subject in _listed(root))
