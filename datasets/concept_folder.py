"""A user's own concepts: one folder of photographs per concept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.text import composed
from dualcl.datasets.base import register_dataset
from dualcl.datasets.concepts import ConceptData
from dualcl.datasets.reading.captions import read_captions
from dualcl.datasets.reading.folders import class_folders, folder_notes, no_loose_images, read_folders
from dualcl.datasets.reading.photos import (
    CLASSES_FILE,
    PhotosConfig,
    Words,
    chosen_folders,
    names_or_file,
    photo_concepts,
    read_classes,
    read_words,
)


@register_dataset(
    "concept-folder", domain="customization", summary="your photographs, one folder per concept (data.root=DIR)"
)
class ConceptFolder:
    """A tree `<concept>/*.jpg` (or png, webp, ...), with sub-folders where you like.

    Class nouns and prompts come from `data.prompts`, and nouns from the DreamBooth set's prompts_and_classes.txt where
    that lies at the root.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config(PhotosConfig):
        """Keys below `data.`."""

        root: str = field(default="", metadata={"help": "the folder with the concepts' folders"})
        concepts: list[str] | None = field(
            default=None, metadata={"help": "only these folders, in this order, or a file of names; default: all"}
        )
        noun: str = field(default="", metadata={"help": "class noun of concepts for which no file names one"})
        prompts: str = field(
            default="", metadata={"help": "YAML: {concept: {noun: dog, prompts: [...], eval_prompts: [...]}}"}
        )
        use_captions: bool = field(
            default=True, metadata={"help": "teach an image with name.txt, name.caption or metadata.jsonl beside it"}
        )
        scenes: bool = field(
            default=False, metadata={"help": "evaluate on the scenes of prompts_and_classes.txt, not on eval.prompt"}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            object.__setattr__(self, "concepts", names_or_file("data.concepts", self.concepts, self.root))

    @classmethod
    def load(cls, config: Config) -> ConceptData:
        """Finds and verifies the images and reads the words; UserError names the folder or file that is wrong."""
        if not config.root:
            raise UserError("data.root is not set; give the folder with your concepts: --set data.root=DIR")
        root = Path(config.root).expanduser()
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise UserError(f"data.root={root} {what}; give the folder with your concepts")
        there = class_folders(root)
        if not there:
            raise UserError(f"{root} has no concept folders; put the images of each concept in a folder there")
        folders = chosen_folders("data.concepts", config.concepts, there, root)
        words = read_classes(root / CLASSES_FILE, config.scenes) if (root / CLASSES_FILE).exists() else {}
        if config.scenes and not words:
            raise UserError(f"data.scenes=true needs {root / CLASSES_FILE}, which is not there; name prompts instead")
        if config.prompts:
            words = read_words(Path(config.prompts).expanduser(), there, words)
        listed = {composed(name): given for name, given in words.items()}
        words = {folder: listed.get(composed(folder), Words()) for folder in folders}
        words = {folder: w if w.noun else replace(w, noun=config.noun.strip()) for folder, w in words.items()}
        split_name = f"concept-folder:{len(folders)}"
        found = read_folders(root, folders, "concept")
        if config.concepts is None:
            no_loose_images(root, "concept")
        files = {folder: f.images for folder, f in found.items()}
        captions = read_captions(root, found) if config.use_captions else {}
        notes = folder_notes(found.values(), "concept")
        return photo_concepts(cls.name, root, files, words, config, split_name, notes, captions)
