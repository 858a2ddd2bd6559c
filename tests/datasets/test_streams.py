import random
import subprocess
import sys

import numpy as np
import pytest

from dualcl.benchmark.config.resolve import resolve
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


NAMES = ["owl", "cat", "caf\u00e9", "10"]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (["10", "caf\u00e9", "owl", "cat"], (3, 2, 0, 1)),
        (["10", "cafe\u0301", "owl", "cat"], (3, 2, 0, 1)),  # as some keyboards and file systems write it
        ([3, 2, 0, 1], (3, 2, 0, 1)),
    ],
)
def test_an_order_by_name(order, expected):
    assert make_class_order(4, order, 0, NAMES) == expected


@pytest.mark.parametrize(
    ("order", "match"),
    [
        (["owl", "cat", "cafe", "10"], r"no class 'cafe'; did you mean 'caf\u00e9'"),
        (["owl", "cat", "Cat", "10"], "no class 'Cat'"),
        (["owl", "cat", "10"], r"lacks 1 of 4 names \('caf\u00e9'\)"),
        (["owl", "cat", "owl", "10"], "names 'owl' 2 times"),
        (["0", "1", "2", "3"], "no class '0'"),
    ],
)
def test_wrong_orders_by_name(order, match):
    with pytest.raises(UserError, match=match):
        make_class_order(4, order, 0, NAMES)
    assert make_class_order(2, ["1", "0"], 0, ["0", "1"]) == (1, 0)  # names, though they look like numbers
    with pytest.raises(UserError, match="want quotes"):
        make_class_order(2, [10, 11], 0, ["10", "11"])


@pytest.mark.parametrize("order", [["owl", "cat", "cat"], ["cat", "owl"], ["cat", "owl", "dog"]])
def test_names_that_are_there_twice_want_numbers(order):
    match = r"stream\.class_order: class 0 and 2 are called 'cat'; give the order as numbers, as in \[2,0,1\]"
    with pytest.raises(UserError, match=match):
        make_class_order(3, order, 0, ["cat", "owl", "cat"])
    assert make_class_order(3, [2, 0, 1], 0, ["cat", "owl", "cat"]) == (2, 0, 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[owl,cat]", ["owl", "cat"]),
        ("owl,cat", ["owl", "cat"]),
        ("['1','0']", ["1", "0"]),
        ("[1,0]", [1, 0]),
        ("1,0", [1, 0]),
        ("order.txt", ["b c", "a", "#1"]),
        ("coda", "coda"),
    ],
)
def test_an_order_is_recorded_as_the_list_that_it_is(text, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "order.txt").write_bytes("\ufeffb c\r\na\r\n\r\n#1".encode())
    for preset, method in (("glyphs", "ncm"), ("concept-folder", "lora")):
        resolved = resolve(preset, method, [f"stream.class_order={text}"])
        assert resolved.tree()["stream"]["class_order"] == found


@pytest.mark.parametrize(
    "text", ["[1,cat]", "[001,cat]", "[no,cat]", "no-file.txt", "shufle", "empty.txt", "binary.txt"]
)
def test_an_order_that_is_not_understood_is_one_line(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"^stream\.class_order[^\n]*$"):
        resolve("glyphs", "ncm", [f"stream.class_order={text}"])


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"tasks": 3}, [4, 3, 3]),
        ({"sizes": [1, 7, 2]}, [1, 7, 2]),
        ({"tasks": 6, "first": 5}, [5, 1, 1, 1, 1, 1]),
        ({"tasks": 3, "first": 5}, [5, 3, 2]),
        ({"first": 4, "increment": 3}, [4, 3, 3]),
        ({"first": 5, "increment": 3}, [5, 3, 2]),
        ({"increment": 2}, [2] * 5),
        ({"tasks": 1, "first": 10}, [10]),
    ],
)
def test_tasks_of_the_sizes_asked_for(given, sizes):
    stream = make_class_stream(toy(10), **{"tasks": 5, **given})
    assert [len(task.classes) for task in stream.tasks] == [len(task.outputs) for task in stream.tasks] == sizes
    assert [c for task in stream.tasks for c in task.classes] == list(stream.class_order)
    assert [i for task in stream.tasks for i in task.outputs] == list(range(10))
    assert [len(task.train) for task in stream.tasks] == [3 * size for size in sizes]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"sizes": [5, 4]}, "stream.sizes add up to 9 but toy has 10 classes"),
        ({"sizes": [5, 6]}, "add up to 11"),
        ({"first": 11}, "stream.first is 11 but toy has only 10"),
        ({"first": 8, "tasks": 4}, "leaves 2 of 10 classes for 3 further tasks"),
        ({"first": 8, "tasks": 1}, "leaves 2 of 10 classes for 0 further tasks"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(given, match):
    with pytest.raises(UserError, match=match):
        make_class_stream(toy(10), **{"tasks": 5, **given})


@pytest.mark.parametrize("sets", ["stream.sizes=[3,0]", "stream.sizes=[3,1] stream.first=3", "stream.increment=0"])
def test_keys_of_sizes_that_contradict_each_other_are_refused(sets):
    with pytest.raises(UserError, match="stream"):
        resolve("glyphs", "ncm", sets.split())


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
