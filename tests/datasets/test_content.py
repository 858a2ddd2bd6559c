"""Pictures by content: digests that do not know the place, and pictures that are there more than once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualcl.benchmark.core import content
from dualcl.datasets.base import ArrayImages, ClassData, ImageSet
from dualcl.datasets.concept_folder import ConceptFolder
from dualcl.datasets.image_folder import ImageFolder
from dualcl.datasets.reading.content import hashes, pictures, repeated, words


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/ and val/ of two classes, three different pictures each."""
    rng = np.random.default_rng(0)
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "tree" / folder).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "tree" / folder / f"{i}.png")
    return tmp_path / "tree"


def load(root: Path, **keys: object) -> ClassData:
    return ImageFolder.load(ImageFolder.Config(root=str(root), **keys))


def test_the_digest_is_of_pictures_and_names_wherever_they_lie(root: Path, tmp_path: Path) -> None:
    first = pictures(load(root))[0]
    shutil.copytree(root, tmp_path / "elsewhere")
    assert pictures(load(tmp_path / "elsewhere"))[0] == first
    (tmp_path / "elsewhere" / "val" / "b" / "2.png").rename(tmp_path / "elsewhere" / "val" / "b" / "3.png")
    assert pictures(load(tmp_path / "elsewhere"))[0] != first
    assert pictures(load(root, limit=2))[0] != first


def test_only_what_is_read_counts(root: Path) -> None:
    first = pictures(load(root, classes=1))[0]
    shutil.copy(root / "train" / "a" / "0.png", root / "train" / "b" / "0.png")
    assert pictures(load(root, classes=1))[0] == first


def test_words_are_names_of_classes_and_what_concepts_say(root: Path, tmp_path: Path) -> None:
    before = words(load(root))
    (root / "class_names.json").write_text('{"a": "apple"}')
    assert words(load(root)) != before
    plain, dogs = (
        words(ConceptFolder.load(ConceptFolder.Config(root=str(root / "train"), noun=noun))) for noun in ("", "dog")
    )
    assert plain != dogs


def test_arrays_by_their_pixels_and_a_load_of_its_own_by_its_fingerprint(root: Path) -> None:
    pixels = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    images = ImageSet(("x", "y"), np.zeros(2, dtype=np.int64), ArrayImages(pixels), "one")
    assert len(set(hashes(images) or ())) == 1
    assert hashes(images.subset([1])) == (hashes(images) or [])[1:]

    def own(mark: str) -> str:
        blank = ImageSet(("x",), np.zeros(1, dtype=np.int64), lambda i: Image.new("RGB", (4, 4)), mark)
        return pictures(ClassData("own", ("a",), blank, blank, "s", "h"))[0]

    assert own("one") == own("one") != own("two")


def test_files_are_read_again_only_when_they_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "RACY", -60.0)  # these are new, and count as settled
    reads: list[str] = []
    read = content._sha256
    monkeypatch.setattr(content, "_sha256", lambda path: (reads.append(path.name), read(path))[1])
    first = content.file_hashes(root / "val" / "a", ["0.png", "1.png"])
    assert content.file_hashes(root / "val" / "a", ["1.png", "0.png"]) == first[::-1]
    assert len(reads) == 2
    shutil.copy(root / "val" / "a" / "2.png", root / "val" / "a" / "1.png")
    assert content.file_hashes(root / "val" / "a", ["0.png", "1.png"])[1] != first[1]
    assert reads[2:] == ["1.png"]


def test_a_file_changed_just_now_is_not_trusted_to_its_times(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = content.file_hashes(root / "val" / "a", ["0.png"])
    monkeypatch.setattr(content, "_sha256", lambda path: "other")
    assert content.file_hashes(root / "val" / "a", ["0.png"]) == ["other"] != first


def test_nothing_is_said_of_different_pictures(root: Path) -> None:
    assert repeated(pictures(load(root))[1]) == []


def test_a_test_part_that_is_the_training_part(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").symlink_to(root / "train")
    (line,) = repeated(pictures(load(root))[1])
    assert line == (
        "the whole test part, which tells nothing of new pictures, is identical to training pictures "
        "(val/a/0.png, val/a/1.png, ...)"
    )


def test_some_pictures_in_both_parts_in_two_classes_and_twice(root: Path) -> None:
    shutil.copy(root / "train" / "a" / "1.png", root / "val" / "a" / "9.png")
    shutil.copy(root / "train" / "a" / "0.png", root / "train" / "b" / "9.png")
    shutil.copy(root / "train" / "b" / "0.png", root / "train" / "b" / "8.png")
    assert repeated(pictures(load(root))[1]) == [
        "1 of 7 test pictures identical to training pictures (val/a/9.png)",
        "1 in two classes or more (train/a/0.png, train/b/9.png)",
        "1 twice in one of the classes (train/b/8.png)",
    ]


def test_a_picture_of_two_concepts(root: Path) -> None:
    shutil.copy(root / "train" / "a" / "0.png", root / "train" / "b" / "9.png")
    data = ConceptFolder.load(ConceptFolder.Config(root=str(root / "train")))
    assert repeated(pictures(data)[1]) == ["1 in two concepts or more (a/0.png, b/9.png)"]
