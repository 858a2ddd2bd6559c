import json
import os
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets.base import ClassData
from dualcl.datasets.image_folder import ImageFolder
from dualcl.datasets.reading import verify
from dualcl.datasets.reading.folders import SUFFIXES, class_folders, folder_set

MakeTree = Callable[..., Path]


def load(root: Path | str, **options: object) -> ClassData:
    return ImageFolder.load(ImageFolder.Config(root=str(root), **options))


def refuses(match: str, root: Path | str, **options: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def split_tree(make_tree: MakeTree) -> Path:
    return make_tree({"train/dog": 4, "train/cat": 5, "val/cat": 2, "val/dog": 3})


def test_train_and_val(split_tree):
    data = load(split_tree)
    assert data.class_names == ("cat", "dog")
    assert data.train.ids[0] == "train/cat/img00.png"
    assert data.train.labels.tolist() == [0] * 5 + [1] * 4
    assert data.test.labels.tolist() == [0] * 2 + [1] * 3
    assert all(name.startswith("val/") for name in data.test.ids)
    assert data.split_name == "folder:train/val"
    with Image.open(split_tree / "val" / "dog" / "img02.png") as image:
        assert np.array_equal(np.asarray(data.test.load(4)), np.asarray(image))


def test_with_both_the_test_set_is_test(make_tree):
    root = make_tree({f"{part}/{c}": 2 for part in ("train", "val", "test") for c in "ab"})
    assert load(root).split_name == "folder:train/test"
    # a competition's test folder has no labels
    for c in "ab":
        (root / "test" / c).rename(root / f"loose-{c}")
    assert load(root).split_name == "folder:train/val"


@pytest.mark.parametrize("above", ["", "train/"])
def test_one_tree_is_split_per_class_by_a_stable_hash(make_tree, above):
    data = load(make_tree({f"{above}{c}": 10 for c in "abc"}))
    assert data.split_name == "folder:hash-20%-seed0"
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(data.train) == 24
    assert not set(data.train.ids) & set(data.test.ids)
    # for ever, wherever the folder lies
    assert [name.removeprefix("train/") for name in data.test.ids[:4]] == [
        "a/img01.png",
        "a/img06.png",
        "b/img03.png",
        "b/img04.png",
    ]


def test_the_split_depends_on_its_seed_and_fraction_and_the_hash_tells(make_tree):
    root = make_tree(dict.fromkeys("ab", 10))
    hashes = {load(root, split_seed=s, val_fraction=f).split_hash for s in (0, 1) for f in (0.2, 0.5)}
    assert len(hashes) == 4
    assert load(root, split_seed=1, val_fraction=0.5).split_name == "folder:hash-50%-seed1"
    assert load(root).split_hash == load(root).split_hash


def test_a_new_image_moves_no_other_class(make_tree):
    root = make_tree({"a": 10, "b": 10})
    before = [name for name in load(root).test.ids if name.startswith("b")]
    make_tree({"a": 13})
    assert [name for name in load(root).test.ids if name.startswith("b")] == before


def test_a_class_called_train_is_a_class(make_tree):
    data = load(make_tree({"bus": 4, "car": 4, "train": 4}))
    assert data.class_names == ("bus", "car", "train")


def test_suffixes_in_any_case_and_other_files_ignored(make_tree):
    root = make_tree({"a": 4, "b": 4})
    make_tree({"a": 2, "b": 2}, suffix=".JPG")
    make_tree({"a": 1}, suffix=".TiFF")
    for name in ("README.md", ".DS_Store", "a/notes.txt", "a/._img00.png", "b/Thumbs.db"):
        (root / name).write_text("x")
    (root / ".ipynb_checkpoints").mkdir()
    (root / "__MACOSX").mkdir()
    data = load(root)
    assert data.class_names == ("a", "b")
    assert len(data.train) + len(data.test) == 13


def test_readable_class_names(split_tree):
    (split_tree / "class_names.json").write_text(json.dumps({"cat": "house cat"}))
    assert load(split_tree).class_names == ("house cat", "dog")
    (split_tree / "class_names.json").write_text("{")
    refuses(r"class_names\.json .*JSON", split_tree)
    (split_tree / "class_names.json").write_text('["cat"]')
    refuses(r"class_names\.json must be a JSON object", split_tree)


def test_holdout_replaces_the_test_set_by_training_images(split_tree):
    plain, data = load(split_tree), load(split_tree, holdout=0.4)
    assert data.split_name == "folder:train/val+holdout-40%"
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert set(data.train.ids) | set(data.test.ids) == set(plain.train.ids)
    assert not set(data.train.ids) & set(data.test.ids)
    assert data.split_hash != plain.split_hash


def test_limit_keeps_the_same_first_images_and_leaves_the_test_set(split_tree):
    two, three = load(split_tree, limit=2), load(split_tree, limit=3)
    assert two.train.labels.tolist() == [0, 0, 1, 1]
    assert set(two.train.ids) < set(three.train.ids)
    assert two.test.ids == load(split_tree).test.ids
    assert load(split_tree, limit=100).train.ids == load(split_tree).train.ids
    assert two.split_name == "folder:train/val+limit-2"


def test_a_limit_of_test_images_leaves_the_training_images(split_tree: Path) -> None:
    whole, one = load(split_tree), load(split_tree, test_limit=1)
    assert one.train.ids == whole.train.ids
    assert set(one.test.ids) < set(whole.test.ids)
    assert np.bincount(one.test.labels).tolist() == [1] * len(one.class_names)
    assert one.split_name == whole.split_name + "+test-limit-1"
    assert one.split_hash != whole.split_hash


def test_only_the_first_classes(make_tree):
    root = make_tree(dict.fromkeys("dcab", 5))
    data = load(root, classes=2)
    assert data.class_names == ("a", "b")
    assert set(data.train.labels.tolist()) == set(data.test.labels.tolist()) == {0, 1}
    refuses("data.classes is 9 but image-folder has only 4", root, classes=9)


def test_the_fingerprint_changes_with_an_image(split_tree):
    before = load(split_tree)
    Image.new("RGB", (9, 9)).save(split_tree / "train" / "cat" / "img00.png")
    after = load(split_tree)
    assert after.train.fingerprint != before.train.fingerprint
    assert after.test.fingerprint == before.test.fingerprint
    assert after.split_hash == before.split_hash


def test_the_fingerprint_changes_with_an_image_of_the_same_size_and_time(split_tree):
    before = load(split_tree)
    path = split_tree / before.train.ids[1]
    stat, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = folder_set(split_tree, before.train.ids, before.train.labels)
    assert after.fingerprint != before.train.fingerprint


def test_missing_and_empty_folders(tmp_path, make_tree):
    refuses("data.root is not set", "")
    refuses("nowhere does not exist", tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    refuses("file is a file", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    refuses("empty has no class folders", tmp_path / "empty")
    root = make_tree({"train/a": 2, "train/b": 2})
    (root / "val").mkdir()
    refuses("val has no class folders", root)
    (root / "train" / "c").mkdir()
    (root / "val").rmdir()
    refuses("class folder .*train/c has no images", root)


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the folder .*gone"):
        class_folders(tmp_path / "gone")


def test_classes_on_one_side_only(split_tree, make_tree):
    make_tree({"val/eel": 1})
    refuses(r"val/eel has no counterpart .*train/eel", split_tree)
    make_tree({"train/eel": 1, "train/fox": 1})
    refuses(r"train/fox has no counterpart .*val/fox", split_tree)


def test_a_class_too_small_to_split(make_tree):
    refuses(r"class 'b' has 1 image", make_tree({"a": 5, "b": 1}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def test_a_damaged_file_stops_before_training_or_is_skipped(split_tree):
    cut(split_tree / "train" / "cat" / "img01.png")
    refuses(r"train/cat/img01\.png \(.*truncated", split_tree)
    (split_tree / "val" / "dog" / "img00.png").write_bytes(b"")
    refuses(r"img01\.png .*\(1 more such file", split_tree)
    data = load(split_tree, on_bad_image="skip")
    assert data.skipped == ("train/cat/img01.png", "val/dog/img00.png")
    assert (len(data.train), len(data.test)) == (8, 4)
    assert not set(data.skipped) & {*data.train.ids, *data.test.ids}


def test_what_is_no_image_is_named(split_tree):
    target = split_tree / "train" / "cat" / "img00.png"
    target.write_text("<html>404</html>")
    refuses(r"img00\.png \(not an image", split_tree)
    target.write_bytes(b"")
    refuses(r"img00\.png \(empty file", split_tree)
    target.unlink()
    target.symlink_to(split_tree / "gone.png")
    refuses(r"img00\.png \(a link that leads nowhere\).*data\.on_bad_image=skip", split_tree)
    data = load(split_tree, on_bad_image="skip")
    assert data.skipped == ("train/cat/img00.png",)
    assert data.notes == ("1 image(s) left out that are damaged or missing (train/cat/img00.png)",)
    assert "train/cat/img00.png" not in data.train.ids


def test_images_can_be_sent_to_another_process(split_tree):
    images = load(split_tree, limit=1).train
    sent = pickle.loads(pickle.dumps(images))
    assert np.array_equal(np.asarray(sent.load(1)), np.asarray(images.load(1)))


def test_an_image_bomb_is_named(split_tree, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    refuses(r"img00\.png \(too many pixels", split_tree)


def test_a_class_with_nothing_readable_is_an_error(split_tree):
    for i in range(2):
        cut(split_tree / "val" / "cat" / f"img{i:02d}.png")
    refuses(r"no image in the class folder .*val/cat can be read", split_tree, on_bad_image="skip")


def test_without_verification_a_damaged_file_is_named_when_it_is_decoded(split_tree):
    cut(split_tree / "train" / "cat" / "img00.png")
    data = load(split_tree, verify=False)
    with pytest.raises(UserError, match=r"cannot read the image .*train/cat/img00\.png \(.*truncated"):
        data.train.load(0)


def decoded(monkeypatch: pytest.MonkeyPatch, root: Path) -> int:
    """How many files loading decodes."""
    seen: list[object] = []
    original = verify.decode_image
    with monkeypatch.context() as patch:
        patch.setattr(verify, "decode_image", lambda path: [seen.append(path), original(path)][1])
        load(root, on_bad_image="skip")
    return len(seen)


def test_verified_files_are_remembered_until_they_change(split_tree, monkeypatch):
    assert decoded(monkeypatch, split_tree) == 14
    assert decoded(monkeypatch, split_tree) == 0
    cut(split_tree / "train" / "cat" / "img00.png")
    assert decoded(monkeypatch, split_tree) == 1
    assert decoded(monkeypatch, split_tree) == 1  # a bad file is never remembered as good


@pytest.mark.parametrize("content", ["{", "[]", '{"train/cat/img00.png": 3}'])
def test_a_damaged_memory_is_made_again(split_tree, monkeypatch, own_cache, content):
    load(split_tree)
    (memory,) = (own_cache / "verified").iterdir()
    memory.write_text(content)
    assert decoded(monkeypatch, split_tree) == 14
    assert decoded(monkeypatch, split_tree) == 0


def test_an_unwritable_cache_is_no_error(split_tree, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DUALCL_CACHE", str(tmp_path / "file" / "below"))
    assert decoded(monkeypatch, split_tree) == 14
    assert decoded(monkeypatch, split_tree) == 14


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"val_fraction": 0.0}, "data.val_fraction"),
        ({"val_fraction": 1.0}, "data.val_fraction"),
        ({"holdout": 1.0}, "data.holdout"),
        ({"limit": 0}, "data.limit"),
        ({"test_limit": 0}, "data.test_limit"),
        ({"classes": 0}, "data.classes"),
        ({"on_bad_image": "ignore"}, "data.on_bad_image"),
    ],
)
def test_wrong_options_name_the_key(options, named):
    with pytest.raises(UserError, match=named):
        ImageFolder.Config(root="x", **options)


@pytest.mark.parametrize("part", ["valid", "validation", "Val", "TEST", "testing", "dev"])
def test_a_test_part_of_any_usual_name_is_used(make_tree, part):
    data = load(make_tree({"Train/a": 2, "Train/b": 2, f"{part}/a": 1, f"{part}/b": 1}))
    assert (len(data.train), len(data.test), data.split_name) == (4, 2, f"folder:Train/{part}")
    assert data.notes == ()


def test_of_several_test_parts_one_is_used_and_the_others_are_told(make_tree):
    root = make_tree({f"{part}/{c}": 2 for part in ("train", "valid", "Test", "more") for c in "ab"})
    data = load(root)
    assert data.split_name == "folder:train/Test"
    assert data.notes == tuple(
        f"train/ and Test/ are read; 4 image(s) in {part}/ left out" for part in ("more", "valid")
    )
    (root / "Test").rename(root / "VALID")
    assert load(root).split_name == "folder:train/valid"
    (root / "valid").rename(root / "Valid")
    refuses(r"has VALID/ and Valid/; which is meant", root)


def test_images_in_sub_folders_are_of_their_class_and_endings_tell(make_tree):
    root = make_tree({"train/a": 2, "train/a/s/t": 1, "train/b": 2, "val/a": 1, "val/b": 1})
    make_tree({"train/b": 1}, suffix=".jfif")
    make_tree({"train/b": 1}, suffix=".JPE")
    for name in (
        "a/x.jxl",
        "a/clip.mp4",
        "b/LICENSE",
        "b/Thumbs.db",
        "a/._x.jpg",
        "b/@eaDir/t.jpg",
        "a/__MACOSX/x.png",
    ):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_text("x")
    data = load(root)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert "train/a/s/t/img00.png" in data.train.ids
    assert len(data.notes) == 2
    for part in ("3 file(s) left out", "1 .jxl (train/a/x.jxl; to read them: pip install pillow-jxl-plugin)", "1 .mp4"):
        assert part in data.notes[0]
    assert data.notes[1] == "1 image(s) in sub-folders count as of their class (train/a/s/t/img00.png)"


def test_every_ending_read_is_one_that_pillow_opens(make_tree):
    assert {".jfif", ".jpe", ".webp", ".bmp", ".tif", ".png", ".jp2"} <= SUFFIXES
    assert not SUFFIXES & {".eps", ".ps", ".pdf", ".psd", ".txt", ".pfm", ".h5"}


@pytest.mark.parametrize(
    ("places", "match"),
    [
        (("a", "b", "."), r"has 2 image\(s\) beside its class folders \(img00\.png\)"),
        (("train/a", "val/a", "val"), r"val has 2 image\(s\) beside its class folders"),
        (("a", "b/train", "b/val"), r"b/train is a part of a split inside of a class"),
        (("data/a", "data/b"), r"data is the only class folder, and all its images are in folders below"),
        (("set/train/a", "set/val/a"), r"set/train is a part of a split inside"),
        (("val/a", "b"), r"val has folders of its own, and no train/ is beside it"),
    ],
)
def test_half_understood_trees_are_refused(make_tree, places, match):
    refuses(match, make_tree(dict.fromkeys(places, 2)))


def test_links_that_lead_nowhere_or_back_are_named(split_tree):
    (split_tree / "val" / "eel").symlink_to(split_tree / "gone")
    refuses(r"val/eel is a link that leads nowhere", split_tree)
    (split_tree / "val" / "eel").unlink()
    (split_tree / "val" / "cat" / "loop").symlink_to(split_tree / "val" / "cat")
    refuses(r"val/cat/loop is a link that leads back", split_tree)


def test_names_of_folders_are_one_in_both_unicode_forms(make_tree):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = make_tree({f"train/{nfc}": 2, "train/cafz": 2, f"val/{nfd}": 1, "val/cafz": 1})
    if not (root / "train" / nfd).exists():  # a file system that tells them apart
        (root / "class_names.json").write_text(json.dumps({nfd: "coffee"}))
        data = load(root)
        assert data.class_names == ("cafz", "coffee")
        assert data.test.labels.tolist() == [0, 1]
        make_tree({f"train/{nfd}": 1})
        refuses(r"two folders .* that differ in their Unicode form alone", root)


@pytest.mark.parametrize(
    ("names", "called"),
    [
        ('{"0": "Katze", "1": "Hund"}', ("Katze", "Hund")),
        ('{"cat": "x", "dog": "x"}', ("x", "x")),
        ('{"cat": "Katze", "owl": "Eule"}', ("Katze", "dog")),
    ],
)
def test_what_a_file_of_names_leaves_open_is_said(split_tree, names, called):
    (split_tree / "class_names.json").write_text(names)
    data = load(split_tree)
    assert data.class_names == called
    assert len(data.notes) == 1
    assert "class_names.json" in data.notes[0]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ('{"1": "Katze", "2": "Hund"}', "names no folder that is there, but '1'"),
        ('{"catt": "Katze"}', "did you mean 'cat'"),
        ('{"cat": "a", "cat": "b"}', "names the folder 'cat' twice"),
        ('{"cat": " "}', "an empty name"),
        ('{"cat": "a\\nb"}', "control characters"),
        ('{"cat": 3}', "must be a JSON object"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(split_tree, names, match):
    (split_tree / "class_names.json").write_text(names)
    refuses(match, split_tree)
