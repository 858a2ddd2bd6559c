"""DreamBooth's subjects, CelebA-HQ and Google Landmarks from small copies in the official layout, served here."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets import dreambooth, landmarks
from dualcl.datasets.celeba_hq import CelebAHQ
from dualcl.datasets.dreambooth import DreamBoothSubjects
from dualcl.datasets.landmarks import Landmarks
from dualcl.datasets.reading.download import download


def refuses(match: str, call, *args: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def picture(path: Path, value: int, size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size + 2), (value % 256, value // 256, 0)).save(path, quality=100)


def test_a_download_without_a_checksum_is_kept(site, tmp_path):
    folder, address = site
    (folder / "list.csv").write_text("a,b\n")
    path = tmp_path / "got" / "list.csv"
    assert download(f"{address}/list.csv", path, None).read_text() == "a,b\n"
    (folder / "list.csv").write_text("changed")
    assert download(f"{address}/list.csv", path, None).read_text() == "a,b\n"
    assert [p.name for p in path.parent.iterdir()] == ["list.csv"]


# --- DreamBooth -------------------------------------------------------------------------------------------------------

SUBJECTS = [f"subject{i:02d}" for i in range(30)]


def make_subjects(folder: Path, subjects: list[str] = SUBJECTS, images: int = 4) -> None:
    for i, subject in enumerate(subjects):
        for k in range(images):
            picture(folder / subject / f"{k:02d}.jpg", 8 * i + k)
    rows = "\n".join(f"{s},{'dog' if i % 2 else 'vase'}" for i, s in enumerate(subjects))
    lists = "".join(
        f"{title}\n\nprompt_list = [\n'{prompt}'.format(unique_token, class_token),\n]\n\n"
        for title, prompt in (("Object Prompts", "a wet {0} {1}"), ("Live Subject Prompts", "a {0} {1} in a hat"))
    )
    (folder / "prompts_and_classes.txt").write_text(f"Classes\n\nsubject_name,class\n{rows}\n\nPrompts\n\n{lists}")
    (folder / "references_and_licenses.txt").write_text("thanks")


def pack(made: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made, made.name)


@pytest.fixture
def subjects(site, monkeypatch) -> Path:
    """The folder `dataset` of a small DreamBooth archive, which is served; `pack` it again after a change."""
    folder, address = site
    made = folder / "dreambooth-main"
    make_subjects(made / "dataset")
    (made / "README.md").write_text("about")
    pack(made, folder / "main.tar.gz")
    monkeypatch.setattr(dreambooth, "URL", f"{address}/main.tar.gz")
    return made / "dataset"


@pytest.mark.usefixtures("subjects")
def test_dreambooth_is_prepared_and_loaded(tmp_path):
    root = tmp_path / "data" / "dreambooth"
    config = DreamBoothSubjects.Config(root=str(root))
    refuses(rf"not at {root}; run: dualcl prepare dreambooth --root {root}", DreamBoothSubjects.load, config)
    DreamBoothSubjects.prepare(config)
    assert sorted(p.name for p in root.parent.iterdir()) == ["dreambooth", "dreambooth.tar.gz"]
    assert (root / "references_and_licenses.txt").is_file()

    data = DreamBoothSubjects.load(config)
    assert [c.name for c in data.concepts] == SUBJECTS
    assert [c.noun for c in data.concepts[:2]] == ["vase", "dog"]
    assert all(len(c.images) == 4 and c.eval_prompts == () for c in data.concepts)
    assert data.concepts[5].images.load(3).getpixel((9, 9))[0] == pytest.approx(43, abs=3)

    chosen = DreamBoothSubjects.Config(root=str(root), subjects=["subject07", "subject02"], scenes=True)
    few = DreamBoothSubjects.load(chosen)
    assert [c.name for c in few.concepts] == ["subject07", "subject02"]
    assert [c.eval_prompts for c in few.concepts] == [("a {token} {noun} in a hat",), ("a wet {token} {noun}",)]
    assert few.split_hash != data.split_hash
    (root.parent / "dreambooth.tar.gz").unlink()
    DreamBoothSubjects.prepare(config)  # nothing to do
    assert not (root.parent / "dreambooth.tar.gz").exists()


@pytest.mark.usefixtures("subjects")
def test_what_is_missing_of_dreambooth_is_named_and_fetched_again(tmp_path):
    root = tmp_path / "dreambooth"
    config = DreamBoothSubjects.Config(root=str(root))
    DreamBoothSubjects.prepare(config)
    (root / "subject03").rename(tmp_path / "elsewhere")
    refuses(r"lacks 1 of 30 subjects \(subject03\)", DreamBoothSubjects.load, config)
    lost = DreamBoothSubjects.Config(root=str(root), subjects=["subject03"])
    refuses(r"has no folder 'subject03'", DreamBoothSubjects.load, lost)
    others = DreamBoothSubjects.Config(root=str(root), subjects=["subject04"])
    assert len(DreamBoothSubjects.load(others).concepts) == 1
    DreamBoothSubjects.prepare(config)
    assert len(list((root / "subject03").iterdir())) == 4


def test_dreambooth_archives_that_are_not_it_are_refused(subjects, site, tmp_path):
    folder, _ = site
    for path in (subjects / "subject09").glob("0[1-3].jpg"):
        path.unlink()
    pack(subjects.parent, folder / "main.tar.gz")
    config = DreamBoothSubjects.Config(root=str(tmp_path / "few" / "dreambooth"))
    refuses(r"subject09 has 1 images, not 4 or more", DreamBoothSubjects.prepare, config)
    make_subjects(subjects, SUBJECTS[:29])
    pack(subjects.parent, folder / "main.tar.gz")
    config = DreamBoothSubjects.Config(root=str(tmp_path / "short" / "dreambooth"))
    refuses(r"lists 29 subjects, not 30", DreamBoothSubjects.prepare, config)
    subjects.rename(subjects.parent / "other")
    pack(subjects.parent, folder / "main.tar.gz")
    config = DreamBoothSubjects.Config(root=str(tmp_path / "other" / "dreambooth"))
    refuses(r"has no folder dataset", DreamBoothSubjects.prepare, config)


# --- CelebA-HQ --------------------------------------------------------------------------------------------------------

#: identity -> how many images of it
PEOPLE = {7: 3, 12: 5, 30: 5, 41: 2, 55: 4}


def make_celeba(root: Path, below: str = "CelebAMask-HQ") -> None:
    identities, mapping, index = [], ["idx\torig_idx\torig_file"], 0
    for person, count in PEOPLE.items():
        for k in range(count):
            original = 1000 * person + k
            identities.append(f"{original:06d}.jpg {person}")
            mapping.append(f"{index}\t{original - 1}\t{original:06d}.jpg")
            picture(root / below / "CelebA-HQ-img" / f"{index}.jpg", person)
            index += 1
    identities.append("000001.jpg 2880")  # of CelebA, not of CelebA-HQ
    (root / "identity_CelebA.txt").write_text("\n".join(identities) + "\n")
    (root / below / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(mapping) + "\n")


def celeba(root: Path, **options: object) -> CelebAHQ.Config:
    return CelebAHQ.Config(**{"root": str(root), "min_images": 3, "concepts": 3, **options})


@pytest.mark.parametrize("below", ["CelebAMask-HQ", "."])
def test_celeba_identities_with_most_images_then_the_smallest_number(tmp_path, below):
    make_celeba(tmp_path, below)
    CelebAHQ.prepare(celeba(tmp_path))
    data = CelebAHQ.load(celeba(tmp_path))
    assert [c.name for c in data.concepts] == ["id12", "id30", "id55"]
    assert [len(c.images) for c in data.concepts] == [5, 5, 4]
    assert {c.noun for c in data.concepts} == {"person"}
    for concept in data.concepts:
        seen = {concept.images.load(i).getpixel((5, 5))[0] for i in range(len(concept.images))}
        assert max(abs(v - int(concept.name[2:])) for v in seen) <= 3
    assert data.split_name == "celeba-hq:most-images-min-3-3"


def test_celeba_identities_by_number(tmp_path):
    make_celeba(tmp_path)
    data = CelebAHQ.load(celeba(tmp_path, identities=[41, 7], min_images=2))
    assert [c.name for c in data.concepts] == ["id41", "id7"]
    assert data.split_name == "celeba-hq:given-2"
    refuses(r"no image of 2880", CelebAHQ.load, celeba(tmp_path, identities=[2880]))
    refuses(r"'id41' .* has 2 image\(s\), data\.min_images is 3", CelebAHQ.load, celeba(tmp_path, identities=[41]))
    refuses(r"5 identities with 2 images or more", CelebAHQ.load, celeba(tmp_path, min_images=2, concepts=6))
    with pytest.raises(UserError, match=r"data\.identities must name .* each once"):
        celeba(tmp_path, identities=[7, 7])


def test_celeba_says_what_to_put_where(tmp_path):
    config = celeba(tmp_path)
    refuses(
        r"by hand, .*licence.*CelebA-HQ-img/ \(unpack CelebAMask-HQ\.zip.* and identity_CelebA\.txt .*dualcl prepare",
        CelebAHQ.prepare,
        config,
    )
    make_celeba(tmp_path)
    (tmp_path / "identity_CelebA.txt").rename(tmp_path / "kept")
    refuses(r"put in .*: identity_CelebA\.txt \(CelebA's identity", CelebAHQ.prepare, config)
    (tmp_path / "kept").rename(tmp_path / "identity_CelebA.txt")
    (tmp_path / "CelebAMask-HQ" / "CelebA-HQ-img" / "3.jpg").unlink()
    refuses(r"CelebA-HQ-img/3\.jpg is missing; unpack", CelebAHQ.prepare, config)
    (tmp_path / "CelebAMask-HQ" / "CelebA-HQ-to-CelebA-mapping.txt").unlink()
    refuses(r"CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping\.txt \(it is in", CelebAHQ.prepare, config)


def test_damaged_celeba_lists_are_named(tmp_path):
    make_celeba(tmp_path)
    identities = tmp_path / "identity_CelebA.txt"
    text = identities.read_text()
    identities.write_text(text.replace("012002.jpg 12\n", ""))
    refuses(r"lacks 012002\.jpg, an image of", CelebAHQ.load, celeba(tmp_path))
    identities.write_text(text + "<html>\n")
    refuses(r"identity_CelebA\.txt line \d+ is '<html>'", CelebAHQ.load, celeba(tmp_path))
    identities.write_text("")
    refuses(r"identity_CelebA\.txt has no rows", CelebAHQ.load, celeba(tmp_path))


# --- Google Landmarks -------------------------------------------------------------------------------------------------

#: landmark -> (category, images in the clean set)
PLACES = {
    3: ("Skógafoss_Falls", 5),
    8: ("Eiffel_Tower", 9),
    11: ("Waterfalls_in_Utopia", 6),
    14: ("Fallsview_Park", 8),
    20: ("Bridal_Veil_Fall_%28Nowhere%29", 5),
}


def image_name(landmark: int, k: int) -> str:
    return f"{landmark:08x}{k:08x}"


@pytest.fixture
def places(site, monkeypatch) -> Path:
    """The folder with a small Google Landmarks: metadata, and the images at addresses of their own."""
    folder, address = site
    categories, clean, rows = ["landmark_id,category"], ["landmark_id,images"], ["id,url,landmark_id"]
    for number, (category, count) in PLACES.items():
        categories.append(f"{number},http://commons.wikimedia.org/wiki/Category:{category}")
        names = [image_name(number, k) for k in range(count)]
        clean.append(f"{number},{' '.join(names)}")
        for k, name in enumerate(names):
            rows.append(f"{name},{address}/photos/{number}-{k}.jpg,{number}")
            picture(folder / "photos" / f"{number}-{k}.jpg", 10 * number + k)
    rows.append(f"ffff000000000000,{address}/photos/unclean.jpg,3")
    for name, lines in (("train.csv", rows), ("train_label_to_category.csv", categories), ("train_clean.csv", clean)):
        (folder / name).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(landmarks, "METADATA_URL", address)
    return folder


def falls(root: Path, **options: object) -> Landmarks.Config:
    return Landmarks.Config(**{"root": str(root), "min_images": 4, "concepts": 3, **options})


@pytest.mark.usefixtures("places")
def test_waterfalls_with_most_images_are_prepared_and_loaded(tmp_path):
    config = falls(tmp_path)
    refuses(rf"the landmarks are not at {tmp_path}; run: dualcl prepare landmarks-10", Landmarks.load, config)
    Landmarks.prepare(config)
    data = Landmarks.load(config)
    # neither the tower nor "Fallsview", which has no word "falls"
    assert [c.name for c in data.concepts] == [
        "11 Waterfalls in Utopia",
        "3 Skógafoss Falls",
        "20 Bridal Veil Fall (Nowhere)",
    ]
    assert [len(c.images) for c in data.concepts] == [6, 5, 5]
    assert {c.noun for c in data.concepts} == {"waterfall"}
    name = image_name(11, 2)
    place = f"train/0/0/0/{name}.jpg"
    assert place in data.concepts[0].images.ids
    at = data.concepts[0].images.ids.index(place)
    assert np.asarray(data.concepts[0].images.load(at))[0, 0, 0] == pytest.approx(112, abs=3)
    assert data.split_name == "landmarks-v2-clean:falls-most-images-3+limit-20"
    assert len(Landmarks.load(falls(tmp_path, concepts=2)).concepts) == 2
    refuses(r"has 3 of 4 landmarks; run: dualcl prepare", Landmarks.load, falls(tmp_path, concepts=4))


def test_photographs_that_are_gone_or_damaged_are_left_out(places, tmp_path, capsys):
    for k in range(2):
        (places / "photos" / f"3-{k}.jpg").unlink()
    (places / "photos" / "11-0.jpg").write_text("<html>")
    Landmarks.prepare(falls(tmp_path, concepts=2))
    data = Landmarks.load(falls(tmp_path, concepts=2))
    # the third best takes the place of the second, of which too few are left
    assert [c.name[:2] for c in data.concepts] == ["11", "20"]
    assert [len(c.images) for c in data.concepts] == [5, 5]
    assert f"train/0/0/0/{image_name(11, 0)}.jpg" not in data.concepts[0].images.ids
    assert "3 Skógafoss Falls: 3 of 5 images can be had" in capsys.readouterr().err
    refuses(r"only 2 of 3 waterfalls have 4 images", Landmarks.prepare, falls(tmp_path))


def test_landmarks_by_number_join_those_that_are_there(places, tmp_path):
    Landmarks.prepare(falls(tmp_path, concepts=1))
    refuses(
        r"no images of landmark 8; run: dualcl prepare landmarks-10 --root .* --set data\.landmarks=\[8,3\]",
        Landmarks.load,
        falls(tmp_path, landmarks=[8, 3]),
    )
    chosen = falls(tmp_path, landmarks=[8, 3], limit=4)
    Landmarks.prepare(chosen)
    data = Landmarks.load(chosen)
    assert [(c.name, c.noun, len(c.images)) for c in data.concepts] == [
        ("8 Eiffel Tower", "landmark", 4),
        ("3 Skógafoss Falls", "waterfall", 4),
    ]
    assert [c.name[:2] for c in Landmarks.load(falls(tmp_path, concepts=1)).concepts] == ["11"]
    refuses(r"99 has no images in", Landmarks.prepare, falls(tmp_path, landmarks=[99]))
    (places / "photos" / "20-1.jpg").unlink()
    few = falls(tmp_path, landmarks=[20], min_images=5)
    refuses(r"landmark 20 \(Bridal .*\) has 4 images that can be had, data\.min_images is 5", Landmarks.prepare, few)


@pytest.mark.usefixtures("places")
def test_what_is_there_is_not_fetched_again(site, tmp_path):
    folder, _ = site
    Landmarks.prepare(falls(tmp_path))
    for path in (folder / "photos").iterdir():
        path.unlink()
    Landmarks.prepare(falls(tmp_path))
    lost = tmp_path / "train/0/0/0" / f"{image_name(3, 1)}.jpg"
    lost.unlink()
    refuses(rf"{image_name(3, 1)}\.jpg is missing; run: dualcl prepare", Landmarks.load, falls(tmp_path))


@pytest.mark.usefixtures("places")
def test_nothing_but_the_web_is_read_and_nothing_outside_is_written(site, tmp_path):
    folder, address = site
    secret = folder / "photos" / "3-0.jpg"
    text = (folder / "train.csv").read_text().replace(f"{address}/photos/3-0.jpg", secret.as_uri())
    (folder / "train.csv").write_text(text)
    clean = (folder / "train_clean.csv").read_text().replace(image_name(3, 1), "../../../etc")
    (folder / "train_clean.csv").write_text(clean)
    config = falls(tmp_path, landmarks=[3], min_images=3)
    Landmarks.prepare(config)
    ids = Landmarks.load(config).concepts[0].images.ids
    assert ids == tuple(f"train/0/0/0/{image_name(3, k)}.jpg" for k in (2, 3, 4))


@pytest.mark.usefixtures("places")
def test_damaged_landmark_files_are_named(tmp_path):
    Landmarks.prepare(falls(tmp_path))
    choice = tmp_path / "concepts.json"
    good = choice.read_text()
    for bad in ("{", "[]", '{"by_rule": [3], "landmarks": {"3": {}}}'):
        choice.write_text(bad)
        refuses(r"concepts\.json is damaged; remove it and run", Landmarks.load, falls(tmp_path))
    choice.write_text(good)
    assert json.loads(good)["by_rule"] == [11, 3, 20]
    (tmp_path / "train_clean.csv").write_text("<html>\nno\n")
    refuses(r"train_clean\.csv is damaged \(a row lacks landmark_id", Landmarks.prepare, falls(tmp_path))
    (tmp_path / "train_clean.csv").write_text("landmark_id,images\nthree,0001\n")
    refuses(r"train_clean\.csv is damaged \(the landmark 'three' is no number", Landmarks.prepare, falls(tmp_path))


def test_landmark_options():
    for wrong in ([], [3, 3]):
        with pytest.raises(UserError, match=r"data\.landmarks must name"):
            Landmarks.Config(landmarks=wrong)
    with pytest.raises(UserError, match=r"data\.limit=10 leaves fewer images than data\.min_images=15"):
        Landmarks.Config(limit=10)
