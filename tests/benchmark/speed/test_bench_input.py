import argparse
from pathlib import Path

import numpy as np
import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.speed import input as bench_input
from dualcl.benchmark.speed.input_work import photograph_like, work, write_images
from dualcl.benchmark.speed.pairs import PEERS
from dualcl.benchmark.speed.worker import load_adapter

SETUP = {
    "size": 16,
    "resize": 18,
    "interpolation": "bilinear",
    "batch": 4,
    "workers": 0,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jpeg")
    write_images(folder, 10, 60, 45, None)
    return folder


def test_both_sides_make_the_same_evaluation_batches_and_as_many_training_images(root: Path, tmp_path: Path):
    settings = {**SETUP, "root": str(root)}
    peer = load_adapter(PEERS / "torchvision_input.py").make(settings)
    for cache_size in (None, 24):
        own = {**settings, "cache": str(tmp_path), "gib": 1, "cache_size": cache_size}
        ours = load_adapter(PEERS / "dualcl_input.py").make(own)
        assert ours["magnitude"]() == pytest.approx(peer["magnitude"](), abs=1e-6)
        for name in ("train", "train", "evaluation"):
            assert ours[name]() == peer[name]() == 10
    assert len(list((tmp_path / "decoded").iterdir())) == 2


def test_differences_are_none_where_nothing_is_reduced(root: Path):
    job = {**SETUP, "root": str(root), "make": None}
    whole, reduced = (work({**job, "cache_size": size}) for size in (45, 24))
    assert whole["images"] == reduced["images"] == 10
    assert whole["crop_difference_pixel"] == whole["crop_difference_mean"] == 0
    assert 0 < reduced["crop_difference_mean"] < reduced["crop_difference_worst"] < reduced["crop_difference_pixel"]
    assert whole["evaluation_difference"] == 0


def test_made_images_are_made_the_same_again_and_photographs_fill_mosaics(root: Path, tmp_path: Path):
    one, again, other = (np.asarray(photograph_like(40, 30, numpy_generator(seed))) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    write_images(tmp_path / "mosaics", 2, 100, 70, str(root))
    assert len(list((tmp_path / "mosaics").rglob("*.jpg"))) == 2
    with pytest.raises(UserError, match="holds no images"):
        write_images(tmp_path / "none", 1, 20, 20, str(tmp_path / "empty"))


def test_both_sides_of_a_row_do_a_work_of_their_adapters_on_the_same_images(root: Path, tmp_path: Path):
    parser = argparse.ArgumentParser()
    bench_input.add_arguments(parser)
    args = parser.parse_args(["--cache-size=24", "--quantities=train"])
    settings = {**SETUP, "root": str(root)}
    facts = work({**settings, "make": None, "cache_size": 24})
    rows = bench_input.comparisons(args, settings, str(tmp_path), facts)
    assert sorted(row.name for row in rows) == sorted(bench_input.NAMES)
    for row in rows:
        for side in (row.ours, row.peer):
            assert load_adapter(PEERS / f"{side.adapter}.py").make(dict(side.setup))[side.work]() == 10
    assert [row.ours.setup["cache_size"] for row in rows] == [24, 24, None]
    assert f"{facts['crop_difference_mean']:.2f} of 255" in rows[0].note


def test_a_root_that_is_not_there_is_one_line(tmp_path: Path, capsys):
    assert main(["bench", "input", f"--root={tmp_path / 'none'}"]) == 2
    assert "--root" in capsys.readouterr().err


def test_help_names_the_quantities():
    parser = argparse.ArgumentParser()
    bench_input.add_arguments(parser)
    assert all(name in parser.format_help() for name in bench_input.NAMES)
