"""What all sets of photographs share: their keys, their words (nouns, prompts), and ConceptData of files on disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import is_file, read_names, read_text
from dualcl.benchmark.core.safe_yaml import read_yaml
from dualcl.benchmark.core.settings import positive
from dualcl.benchmark.core.text import composed
from dualcl.datasets.concepts import NOUN, TOKEN, Concept, ConceptData, check_template, concepts_hash
from dualcl.datasets.reading.folders import (
    OnBadImage,
    bad_images,
    check_on_bad_image,
    folder_notes,
    folder_set,
)
from dualcl.datasets.reading.split import stable_order
from dualcl.datasets.reading.views import open_image

#: the DreamBooth set's list of class nouns and evaluation prompts
CLASSES_FILE = "prompts_and_classes.txt"
#: class nouns that get that file's live-subject prompts
LIVE_NOUNS = ("cat", "dog")
#: images with a shorter side below this are noted in the record
SMALL_SIDE = 64


@dataclass(frozen=True)
class PhotosConfig:
    """Keys below `data.` of all sets of photographs."""

    limit: int | None = field(default=None, metadata={"help": "only this many images per concept"})
    min_images: int = field(default=1, metadata={"help": "a concept with fewer images is an error"})
    on_bad_image: OnBadImage = field(default="stop", metadata={"help": "a file that cannot be read: stop or skip"})
    validation: int = field(
        default=0, metadata={"help": "keep the last so many concepts for `dualcl sweep`; all other runs leave them out"}
    )
    tuning: bool = field(
        default=False, metadata={"help": "tune hyper-parameters: teach the validation concepts and no others"}
    )

    def __post_init__(self) -> None:
        positive("data.limit", self.limit)
        positive("data.min_images", self.min_images)
        check_on_bad_image(self.on_bad_image)
        positive("data.validation", self.validation, 0)
        if self.tuning and not self.validation:
            raise UserError("data.tuning=true needs validation concepts; set data.validation=N, in all other runs too")
        if self.limit is not None and self.limit < self.min_images:
            raise UserError(f"data.limit={self.limit} leaves fewer images than data.min_images={self.min_images}")

    @property
    def spares_concepts(self) -> bool:
        """Whether validation concepts come on top of those that are reported on, which are chosen by number."""
        return False


@dataclass(frozen=True)
class Words:
    """The words that go with a concept; see `Concept`."""

    noun: str = ""
    prompts: tuple[str, ...] = ()
    eval_prompts: tuple[str, ...] = ()


def names_or_file(key: str, chosen: list[str] | None, root: str) -> list[str] | None:
    """`chosen`, or the names in the file that it names where `root` has no such folder: as they are recorded."""
    if not chosen or len(chosen) > 1 or Path(chosen[0]).stem == chosen[0] or not is_file(chosen[0]):
        return chosen
    return chosen if (Path(root).expanduser() / chosen[0]).is_dir() else read_names(Path(chosen[0]), key)


def chosen_folders(key: str, chosen: Sequence[str] | None, there: Sequence[str], root: Path) -> list[str]:
    """The `chosen` folders (None: all) out of those that are there; UserError naming `key` for an unknown one."""
    if chosen is None:
        return list(there)
    if not chosen:
        raise UserError(f"{key} is empty; name at least one folder of {root}")
    known, names = {composed(folder): folder for folder in there}, [composed(name) for name in chosen]
    for name in names:
        if name not in known:
            raise UserError(f"{key}: {root} has no folder {name!r}; {nearest(name, there, 'folders')}")
        if names.count(name) > 1:
            raise UserError(f"{key} names {name!r} twice; name each folder once")
    return [known[name] for name in names]


def check_numbers(key: str, numbers: Sequence[int] | None) -> None:
    """UserError unless `numbers` is None or names at least one thing, each once."""
    if numbers is not None and (not numbers or len(set(numbers)) < len(numbers)):
        raise UserError(f"{key} must name at least one number and each once, got {list(numbers)}")


def without_validation(concepts: Sequence[str], config: PhotosConfig) -> list[str]:
    """The concepts that a run teaches: all but the last `data.validation`, or under `data.tuning` only those."""
    left = len(concepts) - config.validation
    if left < 1:
        raise UserError(
            f"data.validation={config.validation} leaves none of the {len(concepts)} concepts to report on; lower it"
        )
    return list(concepts[left:] if config.tuning else concepts[:left])


def photo_concepts(
    name: str,
    root: Path,
    files: Mapping[str, Sequence[str]],
    words: Mapping[str, Words],
    config: PhotosConfig,
    split_name: str,
    notes: Sequence[str] = (),
    captions: Mapping[str, str] | None = None,
) -> ConceptData:
    """ConceptData of {concept: images below `root`}, all of them decoded once; see `PhotosConfig` for what is refused.

    `files` also holds the validation concepts, last; of these and the others only those that the run teaches are read.
    Facts: images and shortest side (pixels) of each concept, the sha256 of all files, and warnings in words.
    """
    files = {concept: files[concept] for concept in without_validation(list(files), config)}
    bad = bad_images(root, [image for images in files.values() for image in images], config.on_bad_image)
    concepts, warnings = [], []
    sides: dict[str, int] = {}
    digest = hashlib.sha256()
    for concept, images in files.items():
        good = [image for image in images if image not in bad]
        if not good:
            raise UserError(f"no image of the concept {concept!r} in {root} can be read; replace them")
        if config.limit is not None:
            good = [good[i] for i in sorted(stable_order(good, "limit")[: config.limit])]
        if len(good) < config.min_images:
            raise UserError(
                f"the concept {concept!r} in {root} has {len(good)} image(s), data.min_images is {config.min_images}; "
                "add images or lower it"
            )
        if len(good) == 1:
            warnings.append(f"{concept}: one image only")
        shorter = {image: _shorter_side(root / image) for image in good}
        sides[concept] = min(shorter.values())
        warnings += [f"{image}: its shorter side has {n} pixels only" for image, n in shorter.items() if n < SMALL_SIDE]
        for image in good:
            digest.update(hashlib.sha256((root / image).read_bytes()).digest())
        given = words.get(concept, Words())
        image_set = folder_set(root, good, np.zeros(len(good), dtype=np.int64))
        texts = tuple((captions or {}).get(image, "") for image in good)
        concepts.append(
            Concept(
                concept,
                given.noun,
                image_set,
                given.prompts,
                given.eval_prompts,
                captions=texts if any(texts) else (),
            )
        )
    if captioned := [c for c in concepts if c.captions]:
        split_name += "+captions"
        used = sum(bool(text) for c in captioned for text in c.captions)
        lacking = sum(len(c.images) for c in concepts) - used
        rest = f", the other {lacking} have none and are taught with the prompt" if lacking else ""
        notes = [
            *notes,
            f"captions of {used} image(s) are used as their prompts{rest} (data.use_captions=false: without)",
        ]
    if config.validation:
        split_name += f"+{'validation' if config.tuning else 'without'}-{config.validation}"
    if config.limit is not None:
        split_name += f"+limit-{config.limit}"
    return ConceptData(
        name=name,
        concepts=tuple(concepts),
        split_name=split_name,
        split_hash=concepts_hash(concepts),
        skipped=tuple(sorted(bad)),
        notes=(*notes, *folder_notes((), "concept", sorted(bad))),
        facts={
            "images": {c.name: len(c.images) for c in concepts},
            "shortest_side": sides,
            "images_sha256": digest.hexdigest(),
            "warnings": warnings,
        },
    )


def _shorter_side(path: Path) -> int:
    with open_image(path) as image:
        return min(image.size)


def read_words(path: Path, concepts: Sequence[str], known: Mapping[str, Words]) -> dict[str, Words]:
    """`known` words with those of a YAML file on top: {concept: {noun: ..., prompts: [...], eval_prompts: [...]}}."""
    content = read_yaml(read_text(path), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping such as {{dog: {{noun: dog, prompts: [a photo of {TOKEN}]}}}}")
    out, folders = dict(known), {composed(folder): folder for folder in concepts}
    for key, given in content.items():
        if isinstance(key, bool) or key is None:
            raise UserError(f"{path}: a key is read as {key}, not as text; where it is a folder's name, quote it")
        if (name := composed(str(key))) not in folders:
            raise UserError(f"{path}: there is no concept folder {name!r}; {nearest(name, folders)}")
        concept = folders[name]
        if not isinstance(given, dict):
            raise UserError(f"{path}: {concept} must have keys such as noun and prompts, got {given!r}")
        fields: dict[str, Any] = {str(name): _word(path, concept, str(name), value) for name, value in given.items()}
        out[concept] = replace(out.get(concept, Words()), **fields)
    return out


def _word(path: Path, concept: str, key: str, value: Any) -> str | tuple[str, ...]:
    """The value of a key of a concept, checked."""
    if key == "noun":
        if not isinstance(value, str):
            raise UserError(f"{path}: noun of {concept} must be text, got {value!r}")
        return value.strip()
    if key not in ("prompts", "eval_prompts"):
        hint = nearest(key, ("noun", "prompts", "eval_prompts"), "keys")
        raise UserError(f"{path}: unknown key {key!r} of {concept}; {hint}")
    templates = [value] if isinstance(value, str) else value
    if not isinstance(templates, list) or not all(isinstance(t, str) for t in templates):
        raise UserError(f"{path}: {key} of {concept} must be a list of prompts, got {value!r}")
    for template in templates:
        check_template(template, f"{path}, {key} of {concept}")
    return tuple(templates)


def read_classes(path: Path, scenes: bool = False) -> dict[str, Words]:
    """Words by subject from the DreamBooth set's prompts_and_classes.txt; `scenes`: with its prompts for evaluation.

    Its live-subject prompts go to cats and dogs, its object prompts to all others. UserError when a list is missing.
    """
    text = read_text(path)
    table = re.search(r"^subject_name\s*,\s*class\s*$\n((?:^[^,\n]+,[^,\n]+$\n?)+)", text, flags=re.MULTILINE)
    if table is None:
        raise UserError(f"{path} has no list of subjects below a line `subject_name,class`; mend or remove it")
    rows = [line.split(",") for line in table[1].splitlines()]
    nouns = {subject.strip(): noun.strip() for subject, noun in rows}
    if not scenes:
        return {subject: Words(noun) for subject, noun in nouns.items()}
    objects, live = (_templates(path, text, title) for title in ("Object Prompts", "Live Subject Prompts"))
    return {s: Words(noun, eval_prompts=live if noun in LIVE_NOUNS else objects) for s, noun in nouns.items()}


def _templates(path: Path, text: str, title: str) -> tuple[str, ...]:
    """Templates of one of the file's lists, written as Python: 'a {0} {1} in the snow'.format(...)."""
    section = re.search(rf"^{title}\s*$(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"""^\s*(['"])(.*)\1\.format\(""", section[1], flags=re.MULTILINE) if section else []
    templates = tuple(line.replace("{0}", TOKEN).replace("{1}", NOUN) for _, line in lines)
    if not templates:
        raise UserError(f"{path} has no prompts below `{title}`; mend it, or set data.scenes=false")
    for template in templates:
        check_template(template, f"{path}, {title}")
    return templates
