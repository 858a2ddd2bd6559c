import pickle
from collections import Counter

import numpy as np
import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.datasets.drawing.people import CHANGED, FAMILY, LOOK_ALIKES, NAMES, distance, part_of, people, sample_person
from dualcl.datasets.drawing.portrait_captions import caption, caption_words, sample_caption, sample_named
from dualcl.datasets.drawing.portraits import (
    ATTRIBUTES,
    CAPTIONED,
    HIDDEN,
    IDENTITY,
    draw_portrait,
    sample_attributes,
    sample_setting,
)
from dualcl.datasets.portraits import Portraits

#: everything plain, so that each change is seen
WHO = {
    **{name: values[0] for name, values in ATTRIBUTES.items()},
    "hair_colour": "ginger",
    "skin": "pale",
}


def load(**options):
    return Portraits.load(Portraits.Config(**options))


def draw(who, key=0):
    return draw_portrait(who, sample_setting(numpy_generator(key, "setting")))


def pixels(concept):
    return np.stack([np.asarray(concept.images.load(i)) for i in range(len(concept.images))])


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_looks_different(name):
    seen = {value: draw({**WHO, name: value}).astype(int) for value in ATTRIBUTES[name]}
    for a, one in seen.items():
        for b, other in seen.items():
            if a < b:
                changed = np.abs(one - other).max(-1)
                assert (changed > 40).sum() >= 8, (a, b)  # pixels


def test_a_drawing_is_a_function_of_its_seed():
    def make(key):
        rng = numpy_generator(key, "drawing")
        return draw_portrait(sample_attributes(rng), sample_setting(rng))

    first = make(1)
    assert first.shape == (48, 48, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, make(1))
    assert not np.array_equal(first, make(2))


def test_two_captioned_attributes_are_large_enough_to_unlearn_from():
    assert sum(len(values) >= 16 for values in CAPTIONED.values()) >= 2
    assert not set(CAPTIONED["emblem"]) & set(CAPTIONED["thing"])
    assert not set(CAPTIONED) & set(HIDDEN)


def test_pretraining_shows_every_value_and_no_one_of_a_stream():
    count = 1600
    rng = numpy_generator(0, "pretraining")
    shown = [sample_person(rng, "pretraining") for _ in range(count)]
    streams = {part: people(part, 50) for part in ("reported", "tuning")}
    assert not {p.name for p in streams["reported"]} & {p.name for p in streams["tuning"]}  # what --tuned-on goes by
    kept = {tuple(dict(p.looks)[h] for h in HIDDEN) for group in streams.values() for p in group}
    assert not kept & {tuple(who[h] for h in HIDDEN) for who in shown}
    for name, values in ATTRIBUTES.items():
        seen = Counter(who[name] for who in shown)
        assert set(seen) == set(values)
        assert min(seen.values()) > 0.6 * count / len(values)
    for part, group in streams.items():
        assert {part_of(dict(p.looks)) for p in group} == {part}
        assert len({p.looks for p in group}) == len({p.name for p in group}) == 50


@pytest.mark.parametrize("part", ["reported", "tuning"])
def test_relatives_wear_their_own_emblem_and_look_alikes_differ_from_each_other_in_no_word_but_it(part):
    group = [(p.family, dict(p.looks)) for p in people(part, 50)]
    assert Counter(family for family, _ in group) == dict.fromkeys(range(5), FAMILY)
    for i, (family, who) in enumerate(group):
        before = [other for f, other in group[:i] if f == family]
        assert all(who["emblem"] != other["emblem"] for other in before)
        assert all(who[name] == other[name] for other in before for name in ("hair_colour", "skin"))
        if i % FAMILY in LOOK_ALIKES:
            twin = before.pop()
            assert distance(who, twin, [*CHANGED, "skin", "hair_colour"]) == 0
            assert distance(who, twin, list(HIDDEN)) == len(HIDDEN)
        assert all(distance(who, other, CHANGED) >= 3 for other in before)
        assert all(distance(who, other) >= 5 for f, other in group[:i] if f != family)
        assert all(distance(who, other, list(HIDDEN)) != 1 for other in before)


def test_the_first_persons_stay_when_more_are_asked_for():
    assert people("reported", 50)[:10] == people("reported", 10)
    assert people("reported", 10) != people("reported", 10, seed=1)


def test_captions_are_true_and_plain():
    who = {**WHO, "hair": "plaits", "emblem": "apple", "hat": "top hat", "thing": "umbrella"}
    assert caption(who, []) == "a portrait of a person"
    assert caption(who, ["hair"]) == "a portrait of a person with hair in plaits"
    assert caption(who, ["hair", "hair_colour", "skin", "beard"]) == (
        "a portrait of a person with pale skin and ginger hair in plaits and no beard"
    )
    assert caption(who, ["hat", "shirt", "emblem", "thing", "expression"], kind="photo") == (
        "a photo of a smiling person wearing a top hat and a red shirt with an apple by an umbrella"
    )
    with pytest.raises(ValueError, match="nose"):
        caption(who, ["nose"])


def test_captions_name_three_to_six_attributes_and_each_often():
    rng = numpy_generator(0, "captions")
    named = [sample_named(rng) for _ in range(2000)]
    assert set(map(len, named)) == {0, 3, 4, 5, 6}
    seen = Counter(name for names in named for name in names)
    assert min(seen.values()) > 450
    words = set(caption_words())
    assert all(set(sample_caption(sample_attributes(rng), rng).split()) <= words for _ in range(300))
    assert set(caption(sample_attributes(rng), list(CAPTIONED)).split()) <= words


def test_what_is_left_of_the_model_is_asked_by_true_captions_of_strangers():
    reported, tuning = (load(people=part).prior for part in ("reported", "tuning"))
    assert len(reported) == len(tuning) == 48
    assert not {one.prompt for one in reported} & {one.prompt for one in tuning}
    for one in reported:
        assert one.attributes
        assert set(one.attributes) <= set(CAPTIONED)
        assert one.prompt == caption(one.attributes, one.attributes)
    assert load(prior_captions=0).prior == ()


def test_the_default_is_ten_persons_of_eight_pictures():
    data = load()
    assert [len(c.images) for c in data.concepts] == [8] * 10
    assert tuple(c.name for c in data.concepts) == NAMES["reported"][:10]
    assert {c.noun for c in data.concepts} == {"person"}
    assert data.split_name == "portraits:reported-10x8-seed0"
    for concept in data.concepts:
        images = pixels(concept)
        assert images.shape == (8, 48, 48, 3)
        assert len({image.tobytes() for image in images}) == 8
    looks = data.facts["looks"]
    assert set(looks["Ada"]) == {"family", *IDENTITY}


def test_another_config_is_another_split_and_the_same_is_the_same():
    one = load(concepts=3)
    assert one.split_hash == load(concepts=3).split_hash
    others = [load(concepts=3, people="tuning"), load(concepts=3, draw_seed=1), load(concepts=3, per_concept=7)]
    assert len({d.split_hash for d in (one, *others)}) == 4
    again = pickle.loads(pickle.dumps(one))
    assert np.array_equal(pixels(again.concepts[0]), pixels(one.concepts[0]))


@pytest.mark.parametrize(
    ("options", "told"),
    [({"concepts": 51}, "at most"), ({"concepts": 0}, "data.concepts"), ({"per_concept": 0}, "data.per_concept")],
)
def test_wrong_wishes_are_named(options, told):
    with pytest.raises(UserError, match=told):
        load(**options)
