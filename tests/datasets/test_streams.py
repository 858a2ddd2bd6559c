import random
import subprocess
import sys

import numpy as np
import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets.base import ClassData, ImageSet, make_class_order, make_class_stream
from dualcl.datasets.cifar100 import ArrayImages


def images(n_classes: int, per_class: int) -> ImageSet:
    labels = np.repeat(np.arange(n_classes), per_class)
    pixels = np.zeros((len(labels), 2, 2, 3), dtype=np.uint8)
    pixels[..., 0] = labels[:, None, None]
    return ImageSet(tuple(f"c{label}/{i}" for i, label in enumerate(labels)), labels, ArrayImages(pixels), "x")


def toy(n_classes: int) -> ClassData:
    names = tuple(f"class {i}" for i in range(n_classes))
    return ClassData("toy", names, images(n_classes, 3), images(n_classes, 2), "all", "hash")


def test_coda_order_is_that_of_the_published_code():
    assert make_class_order(20, "coda", 0) == tuple(range(20))
    expected = list(range(20))
    random.seed(7)
    random.shuffle(expected)
    assert make_class_order(20, "coda", 7) == tuple(expected)


def test_orders():
    assert make_class_order(5, "natural", 3) == (0, 1, 2, 3, 4)
    assert sorted(make_class_order(50, "shuffle", 0)) == list(range(50))
    assert (
        make_class_order(50, "shuffle", 0) == make_class_order(50, "shuffle", 0) != make_class_order(50, "shuffle", 1)
    )
    assert make_class_order(3, [2, 0, 1], 9) == (2, 0, 1)


@pytest.mark.parametrize(
    ("order", "match"), [("random", "natural, shuffle, coda"), ([0, 1, 1], "names 1 twice"), ([0, 1, 5], "every class")]
)
def test_wrong_orders(order, match):
    with pytest.raises(UserError, match=match):
        make_class_order(3, order, 0)


def test_tasks_are_disjoint_complete_and_relabelled_by_position():
    data = toy(7)
    stream = make_class_stream(data, 3, "shuffle", 4)
    assert [len(task.classes) for task in stream.tasks] == [3, 2, 2]  # uneven: the first tasks get one more
    assert [c for task in stream.tasks for c in task.classes] == list(stream.class_order)
    assert [i for task in stream.tasks for i in task.outputs] == list(range(7))
    for task in stream.tasks:
        assert task.names == tuple(f"class {c}" for c in task.classes)
        for part, per_class in ((task.train, 3), (task.test, 2)):
            assert len(part) == per_class * len(task.classes)
            for i, (name, label) in enumerate(zip(part.ids, part.labels, strict=True)):
                original = stream.class_order[label]
                assert label in task.outputs
                assert name.startswith(f"c{original}/")
                assert part.load(i).getpixel((0, 0))[0] == original


def test_task_counts_out_of_range():
    with pytest.raises(UserError, match="has only 4 classes"):
        make_class_stream(toy(4), 5)
    with pytest.raises(UserError, match="at least 1"):
        make_class_stream(toy(4), 0)


def test_hugging_face_datasets_is_not_hidden():
    pytest.importorskip("datasets")
    code = "import dualcl.datasets.base, datasets; assert hasattr(datasets, 'load_dataset'), datasets.__file__"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_nothing_of_ours_is_importable_as_datasets_or_methods():
    # -I: without the current folder, which -c puts first
    code = (
        "import importlib.util, dualcl.datasets, dualcl.methods\n"
        "for name in ('datasets', 'methods'):\n"
        "    spec = importlib.util.find_spec(name)\n"
        "    assert spec is None or spec.origin != getattr(dualcl, name).__file__, spec.origin"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
