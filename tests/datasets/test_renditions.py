import numpy as np
import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.datasets import available_datasets
from dualcl.datasets.base import make_class_stream
from dualcl.datasets.drawing.glyphs import CONCEPT_GLYPHS, PRETRAINING_GLYPHS, RENDITIONS, STREAM_GLYPHS
from dualcl.datasets.drawing.renditions import CLUTTER, GLYPHS, sample_rendition
from dualcl.datasets.drawing.renditions import RENDITIONS as KINDS
from dualcl.datasets.renditions import Renditions

SMALL = {"train_per_class": 4, "test_per_class": 2, "classes": 3}


def pixels(images):
    return np.stack([np.asarray(images.load(i)) for i in range(len(images))])


def test_no_pictograph_is_in_two_parts_and_no_rendition_both_known_and_new():
    reported, tuning, pretraining = (set(GLYPHS[part].values()) for part in ("reported", "tuning", "pretraining"))
    assert len(reported) == len(tuning) == 20
    assert not reported & tuning
    assert not pretraining & (reported | tuning | set(CONCEPT_GLYPHS.values()))
    assert reported == set(STREAM_GLYPHS.values())
    assert pretraining | tuning == set(PRETRAINING_GLYPHS.values())
    assert set(KINDS["known"]) | set(KINDS["new"]) == set(RENDITIONS)
    assert not set(KINDS["known"]) & set(KINDS["new"])


@pytest.mark.parametrize("kinds", ["known", "new"])
def test_looks_are_of_the_renditions_asked_for_and_every_one_comes(kinds):
    looks = [sample_rendition(numpy_generator(0, "test", i), kinds) for i in range(200)]
    assert {look.rendition for look in looks} == set(KINDS[kinds])
    assert {look.clutter for look in looks} == set(range(CLUTTER + 1))


def test_the_same_config_gives_the_same_pixels_and_every_key_changes_them():
    def drawn(**more):
        return Renditions.load(Renditions.Config(**{**SMALL, **more}))

    first, again = drawn(), drawn()
    assert pixels(first.train).shape == (12, 48, 48, 3)
    assert np.array_equal(pixels(first.train), pixels(again.train))
    assert first.split_hash == again.split_hash
    others = [drawn(draw_seed=1), drawn(renditions="known"), drawn(glyphs="tuning"), drawn(size=32)]
    assert len({first.train.fingerprint, *(o.train.fingerprint for o in others)}) == 5
    assert len({first.split_name, *(o.split_name for o in others[:3])}) == 4
    assert not {x.tobytes() for x in pixels(first.train)} & {x.tobytes() for x in pixels(first.test)}
    # more of them begin with the same
    more = drawn(train_per_class=6).train
    assert np.array_equal(pixels(more)[:4], pixels(first.train)[:4])


def test_the_stream_is_ten_tasks_of_two_classes():
    data = Renditions.load(Renditions.Config(train_per_class=2, test_per_class=1))
    stream = make_class_stream(data, 10)
    assert [len(task.classes) for task in stream.tasks] == [2] * 10
    assert available_datasets()["renditions"].domain == "classification"


@pytest.mark.parametrize("wrong", [{"train_per_class": 0}, {"size": 8}, {"draw_seed": -1}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(UserError, match=r"data\."):
        Renditions.Config(**wrong)
