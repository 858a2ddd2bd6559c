from pathlib import Path

import pytest
import torch

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs.runner import run

CROPS = ("input.augment=crop_flip", "train.epochs=2")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUALCL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


def test_a_run_from_kept_images_equals_one_that_decodes_each_time(tiny, tmp_path: Path, own_cache: Path):
    # the images have 32 pixels: nothing is reduced
    plain = run(tiny("finetune", *CROPS), tmp_path / "plain")
    assert not own_cache.exists()
    kept = run(tiny("finetune", *CROPS, "input.cache_size=32", "input.workers=2"), tmp_path / "kept")
    assert len(list(own_cache.iterdir())) == 1  # one file for all tasks
    losses = [[stage["final_loss"] for stage in record["tasks"]] for record in (plain, kept)]
    assert losses[0] == losses[1]
    assert plain["matrix"] == kept["matrix"]


def test_the_kept_size_is_part_of_what_a_record_says_of_its_pixels(build):
    identity = build("finetune", *CROPS)[0].identity()
    assert "cache_size" not in identity["preprocess"]  # as in older records
    other = build("finetune", *CROPS, "input.cache_size=48")[0].identity()
    assert other == {**identity, "preprocess": {**identity["preprocess"], "cache_size": 48}}


def test_the_bound_of_the_disk_cache_changes_no_result(tiny):
    assert tiny("finetune", "input.cache_gib=0").hash() == tiny("finetune").hash()
    assert tiny("finetune", "input.cache_size=48").hash() != tiny("finetune").hash()


@pytest.mark.parametrize("part", ["train", "test"])
def test_sets_larger_than_the_memory_are_read_from_disk(build, own_cache: Path, part):
    plain, _ = build("ncm", "input.cache_mib=0", "input.cache_gib=0")
    kept, _ = build("ncm", "input.cache_mib=0")

    def views(domain) -> list[torch.Tensor]:
        loaders = [domain._loader(getattr(task, part), part) for task in domain.stream.tasks]
        return [batch.images for loader in loaders for batch in loader.eval_batches(4)]

    expected = views(plain)
    assert not own_cache.exists()
    assert all(map(torch.equal, views(kept), expected))
    assert len(list(own_cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("input.cache_size=0", r"input\.cache_size"),
        ("input.cache_gib=-1", r"input\.cache_gib"),
        ("input.cache_gib=.inf", r"input\.cache_gib"),
    ],
)
def test_wrong_values_name_the_key(tiny, assignment, named):
    with pytest.raises(UserError, match=named):
        tiny("finetune", assignment)
