import pickle
from dataclasses import replace

import numpy as np
import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets import available_datasets, dataset_class
from dualcl.datasets.base import make_class_stream
from dualcl.datasets.drawing.glyphs import (
    BACKGROUNDS,
    CONCEPT_GLYPHS,
    PRETRAINING_GLYPHS,
    RENDITIONS,
    STREAM_GLYPHS,
    Look,
    draw_glyph,
    font_path,
    glyph_mask,
    sample_look,
)
from dualcl.datasets.glyphs import Glyphs, draw_class

SMALL = Glyphs.Config(train_per_class=5, test_per_class=2, classes=4)


def pixels(images):
    return np.stack([np.asarray(images.load(i)) for i in range(len(images))])


def test_glyph_groups_are_disjoint_and_of_the_promised_sizes():
    groups = [set(g.values()) for g in (STREAM_GLYPHS, PRETRAINING_GLYPHS, CONCEPT_GLYPHS)]
    assert [len(g) for g in groups] == [len(STREAM_GLYPHS), len(PRETRAINING_GLYPHS), len(CONCEPT_GLYPHS)]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert len(STREAM_GLYPHS) == 20
    assert 60 <= len(PRETRAINING_GLYPHS) <= 120
    assert len(CONCEPT_GLYPHS) >= 40


def test_no_glyph_is_missing_blank_or_drawn_like_another():
    missing = glyph_mask(0x10FFFD, 64).tobytes()
    every = {**STREAM_GLYPHS, **PRETRAINING_GLYPHS, **CONCEPT_GLYPHS}
    masks = {name: glyph_mask(code, 64) for name, code in every.items()}
    assert not [name for name, mask in masks.items() if mask.tobytes() == missing]
    assert not [name for name, mask in masks.items() if np.asarray(mask).mean() < 5]
    assert len({mask.tobytes() for mask in masks.values()}) == len(every)


def test_font_is_matplotlibs_own():
    assert font_path().is_file()
    assert "mpl-data" in font_path().parts or "matplotlib" in str(font_path())


@pytest.mark.parametrize("rendition", RENDITIONS)
def test_each_rendition_shows_the_glyph(rendition):
    look = Look(rendition, (0, 0, 0), (60, 0, 0), "plain", (255, 255, 255), (255, 255, 255))
    anchor, king = (draw_glyph(STREAM_GLYPHS[n], look, 32) for n in ("anchor", "king"))
    assert anchor.shape == (32, 32, 3)
    assert anchor.dtype == np.uint8
    assert anchor.min() < 150
    assert (anchor[0, 0] == 255).all()
    assert np.abs(anchor.astype(int) - king).mean() > 10
    assert draw_glyph(STREAM_GLYPHS["king"], look, 64).shape == (64, 64, 3)


def test_renditions_and_backgrounds_differ_from_one_another():
    base = Look("solid", (0, 0, 0), (200, 0, 0), "plain", (255, 255, 255), (90, 90, 255))
    for key, values in (("rendition", RENDITIONS), ("background", BACKGROUNDS)):
        drawn = {draw_glyph(STREAM_GLYPHS["rook"], replace(base, **{key: v}), 32).tobytes() for v in values}
        assert len(drawn) == len(values)
    with pytest.raises(ValueError, match="no rendition"):
        draw_glyph(STREAM_GLYPHS["rook"], replace(base, rendition="engraved"), 32)


def test_pose_moves_the_glyph():
    base = Look("solid", (0, 0, 0), (0, 0, 0), "plain", (255, 255, 255), (255, 255, 255), scale=0.5)
    dark = [
        np.argwhere(draw_glyph(STREAM_GLYPHS["king"], replace(base, shift=s), 32)[..., 0] < 128).mean(0)
        for s in ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2))
    ]
    assert dark[1] - dark[0] == pytest.approx([0, 6.4], abs=0.7)
    assert dark[2] - dark[0] == pytest.approx([6.4, 0], abs=0.7)


def test_sampled_looks_cover_every_rendition_and_background():
    looks = [sample_look(np.random.default_rng(i)) for i in range(200)]
    assert {look.rendition for look in looks} == set(RENDITIONS)
    assert {look.background for look in looks} == set(BACKGROUNDS)


def test_same_config_same_pixels_and_other_seed_other_pixels():
    first = Glyphs.load(SMALL)
    draw_class.cache_clear()
    again, other = Glyphs.load(SMALL), Glyphs.load(replace(SMALL, draw_seed=1))
    assert (pixels(first.train) == pixels(again.train)).all()
    assert first.facts == again.facts
    assert first.split_hash == again.split_hash
    assert first.train.fingerprint == again.train.fingerprint
    assert not (pixels(first.train) == pixels(other.train)).all((1, 2, 3)).any()
    assert first.facts["pixels_sha256"] != other.facts["pixels_sha256"]
    assert first.split_hash != other.split_hash


def test_load_gives_balanced_named_parts_without_common_images():
    data = Glyphs.load(SMALL)
    assert data.class_names == ("umbrella", "snowman", "telephone", "teacup")
    assert np.bincount(data.train.labels).tolist() == [5] * 4
    assert np.bincount(data.test.labels).tolist() == [2] * 4
    everything = np.concatenate([pixels(data.train), pixels(data.test)])
    assert len({image.tobytes() for image in everything}) == 28
    assert data.train.load(0).mode == "RGB"
    assert data.train.load(0).size == (32, 32)


def test_more_images_or_fewer_classes_keep_the_others_as_they_are():
    small, large = Glyphs.load(replace(SMALL, classes=2)), Glyphs.load(replace(SMALL, train_per_class=7))
    assert set(small.train.ids) < set(large.train.ids)
    at = [large.train.ids.index(i) for i in small.train.ids]
    assert (pixels(large.train)[at] == pixels(small.train)).all()


def test_holdout_replaces_the_test_set_by_training_images():
    full, held = Glyphs.load(SMALL), Glyphs.load(replace(SMALL, holdout=0.4))
    assert set(held.train.ids) | set(held.test.ids) == set(full.train.ids)
    assert not set(held.train.ids) & set(held.test.ids)
    assert np.bincount(held.test.labels).tolist() == [2] * 4
    assert "holdout-40%" in held.split_name
    assert held.split_hash != full.split_hash


def test_more_classes_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"data\.classes is 21 but glyphs has only 20"):
        Glyphs.load(Glyphs.Config(train_per_class=1, test_per_class=1, classes=21))


def test_limit_keeps_some_training_images():
    full, few = Glyphs.load(SMALL), Glyphs.load(replace(SMALL, limit=2))
    assert np.bincount(few.train.labels).tolist() == [2] * 4
    assert set(few.train.ids) < set(full.train.ids)
    assert few.test.ids == full.test.ids


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_per_class", 0),
        ("test_per_class", 0),
        ("size", 8),
        ("draw_seed", -1),
        ("holdout", 1.0),
        ("holdout", -0.1),
        ("limit", 0),
        ("classes", 0),
    ],
)
def test_wrong_settings_name_the_key(key, value):
    with pytest.raises(UserError, match=rf"data\.{key}"):
        Glyphs.Config(**{key: value})


def test_registered_for_classification_and_cut_into_tasks():
    assert available_datasets()["glyphs"].domain == "classification"
    data = dataset_class("glyphs", "classification").load(Glyphs.Config(train_per_class=1, test_per_class=1))
    for tasks, per_task in ((5, 4), (10, 2)):
        assert [len(t.classes) for t in make_class_stream(data, tasks).tasks] == [per_task] * tasks


def test_images_can_be_sent_to_worker_processes():
    data = Glyphs.load(SMALL)
    sent = pickle.loads(pickle.dumps(data.train))
    assert (np.asarray(sent.load(3)) == np.asarray(data.train.load(3))).all()
