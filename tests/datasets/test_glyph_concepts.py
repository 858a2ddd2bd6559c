import pickle
from itertools import combinations, pairwise

import numpy as np
import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets.drawing.captions import INK_AND_PAPER, RENDITION_WORDS, caption_names
from dualcl.datasets.drawing.glyphs import (
    COLOURS,
    CONCEPT_FACES,
    CONCEPT_GLYPHS,
    CONCEPT_OBJECTS,
    PRETRAINING_GLYPHS,
    STREAM_GLYPHS,
    glyph_mask,
)
from dualcl.datasets.glyph_concepts import (
    BROAD,
    FACES,
    INKS,
    OBJECTS,
    GlyphConcepts,
    appearances,
    concept_glyphs,
    concept_look,
)

KINDS = ("mixed", "objects", "faces")


def load(**options):
    return GlyphConcepts.load(GlyphConcepts.Config(**options))


def pixels(concept):
    return np.stack([np.asarray(concept.images.load(i)) for i in range(len(concept.images))])


def test_the_default_is_ten_concepts_of_eight_small_images():
    data = load()
    assert len(data.concepts) == 10
    for concept in data.concepts:
        images = pixels(concept)
        assert images.shape == (8, 32, 32, 3)
        assert len({image.tobytes() for image in images}) == 8
        assert concept.images.labels.tolist() == [0] * 8
        assert (concept.noun, concept.prompts, concept.eval_prompts) == ("symbol", (), ())
    assert data.split_name == "glyph-concepts:mixed-10x8-seed0"


def test_no_concept_was_in_any_pretraining():
    assert set(OBJECTS) == set(CONCEPT_OBJECTS)
    assert set(FACES) <= set(CONCEPT_FACES)
    used = {CONCEPT_GLYPHS[name] for name in (*OBJECTS, *FACES)}
    assert len(used) == len(OBJECTS) + len(FACES)
    assert not used & set(PRETRAINING_GLYPHS.values())
    assert not used & set(STREAM_GLYPHS.values())
    assert not used & set(caption_names().values())
    # not by name either: a model may know words that it was captioned with
    assert not {a.name for kind in KINDS for a in appearances(kind, 0)} & set(caption_names())
    for kind in KINDS:
        assert {CONCEPT_GLYPHS[a.glyph] for a in appearances(kind, 5)} <= used


def test_objects_and_faces_take_turns():
    mixed = concept_glyphs("mixed")
    assert mixed[::2] == OBJECTS
    assert mixed[1::2] == FACES[: len(OBJECTS)]
    assert concept_glyphs("faces") == FACES
    assert concept_glyphs("objects") == OBJECTS


def test_chosen_glyphs_differ_visibly():
    shapes = {name: np.asarray(glyph_mask(CONCEPT_GLYPHS[name], 32), dtype=float) / 255 for name in (*OBJECTS, *FACES)}
    differences = {(a, b): np.abs(shapes[a] - shapes[b]).mean() for a, b in combinations(shapes, 2)}
    assert min(differences.values()) > 0.02
    # those of one default stream more so
    default = [a.glyph for a in appearances("mixed", 0)[:10]]
    assert min(np.abs(shapes[a] - shapes[b]).mean() for a, b in combinations(default, 2)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_neighbours_have_inks_of_their_own(kind, seed):
    looks = appearances(kind, seed)
    assert len({a.name for a in looks}) == len(looks)
    for start in range(len(looks) - len(INKS) + 1):
        assert len({a.ink for a in looks[start : start + len(INKS)]}) == len(INKS)
    assert all(a.ink != b.ink for a, b in pairwise(looks))
    assert all((a.rendition == "solid") == (a.glyph not in BROAD) for a in looks)
    assert {a.rendition for a in looks} <= set(RENDITION_WORDS)


def luma(colour):
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def test_the_ink_stands_apart_from_every_paper():
    for look in appearances("faces", 1):
        ink = COLOURS[look.ink]
        drawn = [concept_look(look, i, 1) for i in range(20)]
        for one in drawn:
            assert one.ink == one.second_ink == ink
            for paper in (one.paper, one.second_paper):
                assert abs(luma(paper) - luma(ink)) > 20
                assert distance(paper, ink) > 85
        named = {min(COLOURS, key=lambda c: distance(COLOURS[c], one.paper)) for one in drawn}
        assert named == {paper for i, paper in INK_AND_PAPER if i == look.ink}
        assert {one.background for one in drawn} == {"plain", "gradient"}


def test_a_concept_keeps_its_look_and_changes_its_pose():
    for look in appearances("mixed", 0)[:4]:
        drawn = [concept_look(look, i, 0) for i in range(40)]
        assert {one.rendition for one in drawn} == {look.rendition}
        angles = np.array([one.angle for one in drawn])
        assert abs(angles.mean() - look.tilt) < 2.5
        assert 1 < angles.std() < 8
        assert len({one.scale for one in drawn}) == 40
        assert len({one.paper for one in drawn[:8]}) >= 4


def test_the_same_config_draws_the_same_and_each_key_counts():
    data = load(concepts=3, per_concept=3)
    again = load(concepts=3, per_concept=3)
    assert data.facts == again.facts
    assert data.split_hash == again.split_hash
    for options in ({"draw_seed": 1}, {"kind": "faces"}, {"size": 48}, {"per_concept": 4}, {"skip": 1}):
        other = load(**{"concepts": 3, "per_concept": 3, **options})
        assert other.split_hash != data.split_hash
        assert other.facts["pixels_sha256"] != data.facts["pixels_sha256"]
    assert pixels(load(concepts=1, per_concept=2, size=48).concepts[0]).shape == (2, 48, 48, 3)


def test_more_images_or_concepts_leave_the_others_as_they_are():
    few, many = load(concepts=2, per_concept=3), load(concepts=4, per_concept=5)
    for a, b in zip(few.concepts, many.concepts, strict=False):
        assert a.name == b.name
        assert a.images.ids == b.images.ids[:3]
        assert np.array_equal(pixels(a), pixels(b)[:3])


def test_skipped_concepts_leave_others():
    default, others = load(), load(skip=10)
    assert not {c.name for c in default.concepts} & {c.name for c in others.concepts}
    assert not set(default.facts["looks"]) & set(others.facts["looks"])
    assert len(others.concepts) == 10
    assert others.split_name.endswith("+skip-10")
    both = load(concepts=20)
    assert [c.name for c in both.concepts] == [c.name for c in (*default.concepts, *others.concepts)]
    assert np.array_equal(pixels(both.concepts[10]), pixels(others.concepts[0]))


def test_options_out_of_range_are_named():
    with pytest.raises(UserError, match=r"data\.skip=15 and data\.concepts=10 need 25 .* data\.kind=mixed has 24"):
        GlyphConcepts.Config(skip=15)
    with pytest.raises(UserError, match=r"data\.kind=objects has 12"):
        GlyphConcepts.Config(kind="objects", concepts=13)
    for key in ("concepts", "per_concept", "size"):
        with pytest.raises(UserError, match=f"data.{key}"):
            GlyphConcepts.Config(**{key: 0})
    for key in ("skip", "draw_seed"):
        with pytest.raises(UserError, match=f"data.{key}"):
            GlyphConcepts.Config(**{key: -1})


def test_images_can_be_sent_to_another_process():
    images = load(concepts=1, per_concept=2).concepts[0].images
    sent = pickle.loads(pickle.dumps(images))
    assert np.array_equal(np.asarray(sent.load(1)), np.asarray(images.load(1)))
