import pickle

import numpy as np
import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets import available_datasets, dataset_class
from dualcl.datasets.base import ArrayImages, ImageSet, make_class_order
from dualcl.datasets.concepts import Concept, ConceptData, check_template, concepts_hash, make_concept_stream


def concept(name: str, n: int = 2, **words: object) -> Concept:
    pixels = np.full((n, 2, 2, 3), len(name), dtype=np.uint8)
    images = ImageSet(tuple(f"{name}/{i}" for i in range(n)), np.zeros(n, dtype=np.int64), ArrayImages(pixels), "x")
    return Concept(name, "thing", images, **words)


def toy(*names: str) -> ConceptData:
    return ConceptData("toy", tuple(concept(n) for n in names), "all", "hash")


FIVE = ("ant", "bee", "cow", "dog", "eel")


@pytest.mark.parametrize(
    ("order", "seed", "expected"),
    [
        ("natural", 3, (0, 1, 2, 3, 4)),
        ("shuffle", 3, make_class_order(5, "shuffle", 3)),
        ([4, 2, 0, 1, 3], 0, (4, 2, 0, 1, 3)),
    ],
)
def test_the_stream_is_the_order_and_its_first_concepts(order, seed, expected):
    data = toy(*FIVE)
    every = make_concept_stream(data, None, order, seed)
    assert every.order == expected
    assert [c.name for c in every.concepts] == [FIVE[i] for i in expected]
    first = make_concept_stream(data, 2, order, seed)
    assert first.order == expected[:2]
    assert first.concepts == every.concepts[:2]
    assert first.data is data


def test_another_seed_is_another_order():
    orders = {make_concept_stream(toy(*FIVE), None, "shuffle", seed).order for seed in range(8)}
    assert len(orders) > 3


def test_wrong_streams():
    with pytest.raises(UserError, match=r"stream\.tasks is 6 but toy has only 5 concepts; give at most 5"):
        make_concept_stream(toy(*FIVE), 6)
    with pytest.raises(UserError, match=r"stream\.tasks must be at least 1"):
        make_concept_stream(toy(*FIVE), 0)
    with pytest.raises(UserError, match=r"stream\.class_order must name every concept 0\.\.4 once"):
        make_concept_stream(toy(*FIVE), 2, [0, 1])
    with pytest.raises(UserError, match="natural, shuffle"):
        make_concept_stream(toy(*FIVE), 2, "backwards")


def test_data_that_cannot_be_taught_is_refused():
    with pytest.raises(UserError, match="two concepts called 'ant'"):
        toy("ant", "bee", "ant")
    with pytest.raises(UserError, match="toy has no concepts"):
        toy()
    with pytest.raises(UserError, match="concept 'ant' of toy has no images"):
        ConceptData("toy", (concept("ant", 0),), "all", "hash")
    for key in ("prompts", "eval_prompts"):
        with pytest.raises(UserError, match=r"concept 'ant': the prompt 'a photo' lacks \{token\}"):
            ConceptData("toy", (concept("ant", **{key: ("{token}", "a photo")}),), "all", "hash")


@pytest.mark.parametrize("template", ["a photo of {token}", "{token}", "a {token} {noun} in the snow"])
def test_templates(template):
    check_template(template, "here")


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("a photo of {noun}", "lacks {token}"),
        ("", "lacks {token}"),
        ("a {token} {colour}", r"has {colour}; only {token} and {noun}"),
        ("a {token} {}", r"has {}"),
        ("a {token", "is no template"),
        ("a {token} }", "is no template"),
    ],
)
def test_wrong_templates_are_named(template, match):
    with pytest.raises(UserError, match=match) as caught:
        check_template(template, "eval.prompt")
    assert str(caught.value).startswith("eval.prompt: ")
    assert "\n" not in str(caught.value)


def test_the_hash_is_of_concepts_and_their_images_only():
    ant, bee = concept("ant"), concept("bee")
    assert concepts_hash([ant, bee]) == concepts_hash([bee, ant])
    assert concepts_hash([ant, bee]) == concepts_hash([concept("ant", prompts=("{token}",)), bee])
    hashes = [concepts_hash(c) for c in ([ant], [bee], [ant, bee], [concept("ant", 3), bee])]
    assert len(set(hashes)) == 4
    # the image ids alone do not tell whose they are
    assert concepts_hash([Concept("bee", "", ant.images)]) != concepts_hash([ant])


def test_concepts_can_be_sent_to_another_process():
    data = pickle.loads(pickle.dumps(toy(*FIVE)))
    assert data.concepts[1].images.load(0).getpixel((0, 0)) == (3, 3, 3)


def test_every_customization_set_is_found_without_importing_it():
    there = {name: info for name, info in available_datasets().items() if info.domain == "customization"}
    assert {"glyph-concepts", "concept-folder", "dreambooth", "celeba-hq", "landmarks"} <= set(there)
    for name, info in there.items():
        cls = dataset_class(name, "customization")
        assert cls.name == name
        assert hasattr(cls, "prepare") == info.needs_prepare
    with pytest.raises(UserError, match="did you mean 'glyph-concepts'"):
        dataset_class("glyph-concept", "customization")
    with pytest.raises(UserError, match="unknown data set"):
        dataset_class("glyphs", "customization")
