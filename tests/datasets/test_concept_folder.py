import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets.concept_folder import ConceptFolder
from dualcl.datasets.concepts import ConceptData
from dualcl.datasets.reading.captions import as_template
from dualcl.datasets.reading.photos import read_classes

MakeTree = Callable[..., Path]


def load(root: Path | str, **options: object) -> ConceptData:
    return ConceptFolder.load(ConceptFolder.Config(root=str(root), **options))


def refuses(match: str, root: Path | str, **options: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def tree(make_tree: MakeTree) -> Path:
    return make_tree({"rex": 4, "mug": 5, ".thumbnails": 2})


#: the layout of the DreamBooth set's own file
CLASSES = """Classes

subject_name,class
rex,dog
mug, coffee cup

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
"a {0} {1} on top of a mirror".format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def test_each_folder_is_a_concept(tree):
    (tree / "rex" / "notes.txt").write_text("a good dog")
    data = load(tree)
    assert [c.name for c in data.concepts] == ["mug", "rex"]
    rex = data.concepts[1]
    assert rex.images.ids == tuple(f"rex/img{i:02d}.png" for i in range(4))
    assert rex.images.labels.tolist() == [0] * 4
    assert (rex.noun, rex.prompts, rex.eval_prompts) == ("", (), ())
    with Image.open(tree / "rex" / "img02.png") as image:
        assert np.array_equal(np.asarray(rex.images.load(2)), np.asarray(image))
    assert data.split_name == "concept-folder:2"
    assert data.facts["images"] == {"mug": 5, "rex": 4}


def test_chosen_folders_come_in_the_given_order(tree, make_tree):
    make_tree({"cup": 1})
    assert [c.name for c in load(tree, concepts=["rex", "cup"]).concepts] == ["rex", "cup"]
    refuses(r"data\.concepts: .* has no folder 'rx'; did you mean 'rex'", tree, concepts=["rx"])
    refuses(r"names 'rex' twice", tree, concepts=["rex", "rex"])
    refuses(r"data\.concepts is empty", tree, concepts=[])


def test_chosen_folders_may_stand_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["zo\u00eb", "mug.txt", "rex"]
    for name in (*names, "other"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name / "1.png")
    (tmp_path / "list.txt").write_text("zoe\u0308\nmug.txt\n\nrex\n", encoding="utf-8")
    config = ConceptFolder.Config(root="photos", concepts=["list.txt"])
    assert config.concepts == ["zoe\u0308", "mug.txt", "rex"]  # as recorded
    assert [c.name for c in ConceptFolder.load(config).concepts] == names
    (tmp_path / "mug.txt").write_text("rex")
    (tmp_path / "other").write_text("rex")
    for name in ("mug.txt", "other"):  # a folder of that name, or no path of a file: the concept itself
        assert ConceptFolder.Config(root="photos", concepts=[name]).concepts == [name]
    (tmp_path / "list.txt").write_text("rex\nrexx\n")
    refuses("no folder 'rexx'; did you mean 'rex'", "photos", concepts=["list.txt"])


def test_photographs_are_upright_rgb(tmp_path):
    folder = tmp_path / "tree" / "rex"
    folder.mkdir(parents=True)
    sideways = Image.new("RGB", (8, 4), (200, 0, 0))
    exif = sideways.getexif()
    exif[0x0112] = 6  # the camera lay on its side
    sideways.save(folder / "a.jpg", exif=exif)
    Image.new("LA", (6, 6), (0, 0)).save(folder / "b.png")
    Image.new("RGB", (5, 9), (0, 90, 0)).save(folder / "c.webp")
    Image.new("L", (90, 70), 7).save(folder / "d.BMP")
    data = load(folder.parent)
    images = data.concepts[0].images
    loaded = [images.load(i) for i in range(4)]
    assert [i.size for i in loaded] == [(4, 8), (6, 6), (5, 9), (90, 70)]
    assert {i.mode for i in loaded} == {"RGB"}
    assert loaded[1].getpixel((0, 0)) == (255, 255, 255)
    assert data.facts["shortest_side"] == {"rex": 4}
    assert data.facts["warnings"] == [
        "rex/a.jpg: its shorter side has 4 pixels only",
        "rex/b.png: its shorter side has 6 pixels only",
        "rex/c.webp: its shorter side has 5 pixels only",
    ]


def test_one_image_is_enough_but_noted(make_tree):
    root = make_tree({"rex": 1, "mug": 2})
    assert "rex: one image only" in load(root).facts["warnings"]
    assert not [w for w in load(root).facts["warnings"] if w.startswith("mug: ")]
    refuses(r"'rex' .* has 1 image\(s\), data\.min_images is 2", root, min_images=2)


def test_missing_and_empty_folders(tmp_path, make_tree):
    refuses("data.root is not set", "")
    refuses("nowhere does not exist", tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    refuses("file is a file", tmp_path / "file")
    root = make_tree({".": 2})
    refuses("has no concept folders; put the images of each concept in a folder there", root)
    make_tree({"rex": 1})
    (root / "empty").mkdir()
    refuses("concept folder .*tree/empty has no images", root)


def test_a_damaged_image_stops_or_is_skipped(tree):
    damaged = tree / "rex" / "img01.png"
    damaged.write_bytes(damaged.read_bytes()[:-60])
    refuses(r"rex/img01\.png \(.*truncated.*data\.on_bad_image=skip", tree)
    data = load(tree, on_bad_image="skip")
    assert data.skipped == ("rex/img01.png",)
    assert "rex/img01.png" not in data.concepts[1].images.ids
    for path in (tree / "rex").iterdir():
        path.write_text("<html>404</html>")
    refuses(r"no image of the concept 'rex' .* can be read", tree, on_bad_image="skip")


def test_limit_takes_a_part_that_stays(tree):
    few, more = load(tree, limit=2), load(tree, limit=3)
    assert [len(c.images) for c in few.concepts] == [2, 2]
    for a, b in zip(few.concepts, more.concepts, strict=True):
        assert set(a.images.ids) < set(b.images.ids)
    assert few.split_name == "concept-folder:2+limit-2"
    assert len({few.split_hash, more.split_hash, load(tree).split_hash}) == 3


def test_validation_concepts_are_taught_in_sweeps_and_nowhere_else(tree, make_tree):
    make_tree({"cup": 1, "vase": 2})
    kept, tuned = load(tree, validation=2), load(tree, validation=2, tuning=True)
    assert [c.name for c in kept.concepts] == ["cup", "mug"]
    assert [c.name for c in tuned.concepts] == ["rex", "vase"]
    assert (kept.split_name, tuned.split_name) == ("concept-folder:4+without-2", "concept-folder:4+validation-2")
    assert len({d.split_hash for d in (kept, tuned, load(tree))}) == 3
    assert len({d.facts["images_sha256"] for d in (kept, tuned, load(tree))}) == 3
    order = ["vase", "mug", "cup"]
    assert [c.name for c in load(tree, concepts=order, validation=1, tuning=True).concepts] == ["cup"]
    refuses(r"data\.validation=4 leaves none of the 4 concepts to report on", tree, validation=4)
    refuses(r"data\.tuning=true needs validation concepts; set data\.validation=N", tree, tuning=True)
    refuses(r"data\.validation must be at least 0, got -1", tree, validation=-1)


def test_changed_pixels_change_fingerprint_and_content_hash(tree):
    before = load(tree)
    Image.new("RGB", (99, 99)).save(tree / "rex" / "img00.png")
    after = load(tree)
    assert after.split_hash == before.split_hash
    assert after.facts["images_sha256"] != before.facts["images_sha256"]
    assert after.concepts[0].images.fingerprint == before.concepts[0].images.fingerprint
    assert after.concepts[1].images.fingerprint != before.concepts[1].images.fingerprint


def test_nouns_come_from_the_dreambooth_list(tree):
    (tree / "prompts_and_classes.txt").write_text(CLASSES)
    data = load(tree)
    assert {c.name: c.noun for c in data.concepts} == {"rex": "dog", "mug": "coffee cup"}
    assert all(c.prompts == c.eval_prompts == () for c in data.concepts)
    mug, rex = load(tree, scenes=True).concepts
    assert rex.eval_prompts == ("a {token} {noun} wearing a red hat",)
    assert mug.eval_prompts == (
        "a {token} {noun} in the jungle",
        "a {token} {noun} on top of a mirror",
        "a cube shaped {token} {noun}",
    )
    assert mug.prompts == rex.prompts == ()


def test_a_mangled_dreambooth_list_is_named(tree):
    path = tree / "prompts_and_classes.txt"
    path.write_text("nothing")
    refuses(r"prompts_and_classes\.txt has no list of subjects", tree)
    path.write_text(CLASSES.replace("Live Subject Prompts", "Pets"))
    assert load(tree).concepts[1].noun == "dog"
    refuses(r"has no prompts below `Live Subject Prompts`", tree, scenes=True)
    path.write_text(CLASSES.replace("a {0} {1} wearing", "a {1} wearing"))
    refuses(r"Live Subject Prompts: the prompt 'a {noun} wearing a red hat' lacks {token}", tree, scenes=True)
    path.write_bytes(b"\xff\xfe\x00")
    refuses(r"is not UTF-8", tree)
    path.unlink()
    refuses(r"data\.scenes=true needs .*prompts_and_classes\.txt", tree, scenes=True)


def test_windows_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf" + CLASSES.replace("\n", "\r\n").encode())
    words = read_classes(path, scenes=True)
    assert words["mug"].noun == "coffee cup"
    assert len(words["mug"].eval_prompts) == 3


def test_words_from_a_file_go_before_the_list_and_the_default(tree, make_tree, tmp_path):
    make_tree({"cup": 1})
    (tree / "prompts_and_classes.txt").write_text(CLASSES)
    words = tmp_path / "words.yaml"
    words.write_text(
        "rex: {noun: puppy, prompts: ['a photo of {token}', 'a {token} {noun}']}\n"
        "mug: {eval_prompts: '{token} at sea'}\n"
    )
    cup, mug, rex = load(tree, prompts=str(words), noun="thing").concepts
    assert (rex.noun, rex.prompts, rex.eval_prompts) == ("puppy", ("a photo of {token}", "a {token} {noun}"), ())
    assert (mug.noun, mug.prompts, mug.eval_prompts) == ("coffee cup", (), ("{token} at sea",))
    assert (cup.noun, cup.prompts) == ("thing", ())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rex: {prompts: [a photo of a dog]}", r"words\.yaml, prompts of rex: .* lacks {token}"),
        ("rex: {eval_prompts: ['{token} {size}']}", r"eval_prompts of rex: .* has {size}"),
        ("rx: {noun: dog}", r"no concept folder 'rx'; did you mean 'rex'"),
        ("rex: {nouns: dog}", r"unknown key 'nouns' of rex; did you mean 'noun'"),
        ("rex: {noun: [dog]}", r"noun of rex must be text"),
        ("rex: {prompts: 3}", r"prompts of rex must be a list of prompts"),
        ("rex: dog", r"rex must have keys such as noun"),
        ("[rex]", r"must be a mapping"),
        ("rex: {noun: dog", r"is not valid YAML"),
    ],
)
def test_wrong_words_are_named(tree, tmp_path, text, match):
    (tmp_path / "words.yaml").write_text(text)
    refuses(match, tree, prompts=str(tmp_path / "words.yaml"))


def test_a_missing_words_file_is_named(tree):
    refuses(r"cannot read gone\.yaml \(No such file", tree, prompts="gone.yaml")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"limit": 0}, r"data\.limit"),
        ({"min_images": 0}, r"data\.min_images"),
        ({"on_bad_image": "ignore"}, r"data\.on_bad_image"),
        ({"limit": 2, "min_images": 3}, r"data\.limit=2 leaves fewer images than data\.min_images=3"),
    ],
)
def test_wrong_options_name_the_key(options, named):
    with pytest.raises(UserError, match=named):
        ConceptFolder.Config(root="x", **options)


def test_what_is_left_out_is_told_and_half_understood_folders_are_refused(tree, make_tree):
    (tree / "rex" / "x.jxl").write_text("x")
    make_tree({"rex/garden": 1})
    data = load(tree)
    assert data.facts["images"] == {"mug": 5, "rex": 5}
    assert len(data.notes) == 2
    assert "1 .jxl (rex/x.jxl" in data.notes[0]
    make_tree({".": 1})
    refuses(r"has 1 image\(s\) beside its concept folders", tree)
    assert len(load(tree, concepts=["rex"]).concepts) == 1


def test_folders_are_found_by_names_of_another_unicode_form_and_by_numbers_as_written(make_tree, tmp_path):
    root = make_tree({unicodedata.normalize("NFD", "café"): 1, "001": 1, "1e3": 1, "010": 1})
    words = tmp_path / "words.yaml"
    words.write_text("café: {noun: cup}\n001: {noun: dog}\n1e3: {noun: cat}\n", encoding="utf-8")
    data = load(root, concepts=["café", "001", "1e3"], prompts=str(words))
    assert [c.noun for c in data.concepts] == ["cup", "dog", "cat"]
    words.write_text("yes: {noun: dog}")
    refuses(r"a key is read as True, not as text; .* quote it", root, prompts=str(words))


def test_captions_beside_images_are_read_and_tell_in_hash_and_notes(tree):
    plain = load(tree)
    (tree / "rex" / "img00.txt").write_text("a rex in snow\n")
    (tree / "rex" / "img01.caption").write_text("rex asleep")
    (tree / "mug" / "metadata.jsonl").write_text('{"file_name": "img04.png", "text": "a mug", "more": 1}\n')
    (tree / "metadata.jsonl").write_text('{"file_name": "rex/img03.png", "text": "rex runs"}\n')
    mug, rex = load(tree).concepts
    assert rex.captions == ("a rex in snow", "rex asleep", "", "rex runs")
    assert mug.captions == ("", "", "", "", "a mug")
    assert "captions of 4 image(s) are used as their prompts, the other 5 have none" in load(tree).notes[0]
    first = load(tree).split_hash
    (tree / "rex" / "img00.txt").write_text("rex in snow")
    assert len({plain.split_hash, first, load(tree).split_hash}) == 3
    without = load(tree, use_captions=False)
    assert (without.split_hash, without.split_name) == (plain.split_hash, plain.split_name)
    assert not any(c.captions for c in without.concepts)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"img00.txt": "a rex", "img00.caption": "rex"}, r"img00\.caption is a second caption of rex/img00\.png"),
        (
            {"img00.txt": "a rex", "metadata.jsonl": '{"file_name": "img00.png", "text": "x"}'},
            r"metadata\.jsonl is a second caption",
        ),
        ({"img00.txt": ""}, r"img00\.txt has 0 lines"),
        ({"img00.txt": "a\nb"}, r"img00\.txt has 2 lines"),
        ({"metadata.jsonl": "{"}, r"metadata\.jsonl, line 1 is no JSON"),
        ({"metadata.jsonl": '{"file_name": "img00.png"}'}, r"line 1 must have file_name and text"),
        ({"metadata.jsonl": '{"file_name": "gone.png", "text": "x"}'}, r"names 'gone\.png', which is not there"),
    ],
)
def test_captions_that_are_not_understood_are_refused(tree, files, match):
    for name, text in files.items():
        (tree / "rex" / name).write_text(text)
    refuses(match, tree)


@pytest.mark.parametrize(
    ("caption", "template"),
    [
        ("a {token} at sea", "a {token} at sea"),
        ("a <C1> at sea", "a {token} at sea"),
        ("a Dog beside a dog", "a {token} {noun} beside a dog"),
        ("sks rex, grass", "sks {token}, grass"),
        ("a hotdog", None),
    ],
)
def test_where_the_concept_stands_in_a_caption(caption, template):
    assert as_template(caption, "<c1>", "dog", ["rex"]) == template
