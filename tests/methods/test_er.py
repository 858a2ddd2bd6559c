"""Experience replay: the reservoir's proportions, what is stored and what is learnt from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs.runner import Run, run
from dualcl.datasets.reading.loader import ImageLoader
from dualcl.datasets.reading.views import View
from dualcl.methods import available_methods
from dualcl.methods.er import ERConfig, reservoir


def begin(domain, method, task):
    domain.begin_task(task, method.output_scope)
    method.begin_task(task)
    method.prepare(task)


def learnt(domain, method, tasks):
    for task in range(tasks):
        begin(domain, method, task)
        method.end_task(task)


def views(domain, task):
    """The task's training images in the evaluation view, uint8, and their labels."""
    images = domain.stream.tasks[task].train
    pixels = [np.asarray(images.load(i)).transpose(2, 0, 1) for i in range(len(images))]
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(images.labels)


# --- the reservoir ----------------------------------------------------------------------------------------------------

SIZES, CAPACITY, SEEDS = (100, 300, 600), 50, 2000


@pytest.fixture(scope="module")
def memories():
    """memories[k] (SEEDS, CAPACITY): which samples, counted through all tasks, the memory holds after task k."""
    out = np.full((len(SIZES), SEEDS, CAPACITY), -1)
    for seed in range(SEEDS):
        held, seen = np.full(CAPACITY, -1), 0
        for task, size in enumerate(SIZES):
            generator = torch.Generator().manual_seed(1000 * task + seed)
            for slot, position in reservoir(CAPACITY, seen, size, generator).items():
                held[slot] = seen + position
            seen += size
            out[task, seed] = held
    return out


@pytest.mark.parametrize("task", range(3))
def test_after_every_task_each_sample_so_far_is_held_with_equal_probability(memories, task):
    n = sum(SIZES[: task + 1])
    assert memories[task].min() >= 0
    assert memories[task].max() < n
    assert all(len(set(held)) == CAPACITY for held in memories[task].tolist())
    p = CAPACITY / n
    counts = np.bincount(memories[task].ravel(), minlength=n)
    z = (counts - SEEDS * p) / math.sqrt(SEEDS * p * (1 - p))
    assert np.abs(z).max() < 4
    assert 0.85 < z.std() < 1.15  # and not more evenly than chance, as a ring or a share per class would be


@pytest.mark.parametrize("task", range(3))
def test_shares_of_tasks_follow_their_sizes(memories, task):
    n, start = sum(SIZES[: task + 1]), 0
    for size in SIZES[: task + 1]:
        held = ((memories[task] >= start) & (memories[task] < start + size)).sum(1)
        start += size
        # hypergeometric: CAPACITY drawn without replacement
        share = size / n
        sd = math.sqrt(CAPACITY * share * (1 - share) * (n - CAPACITY) / (n - 1))
        assert abs(held.mean() - CAPACITY * share) <= 4 * sd / math.sqrt(SEEDS)
        assert held.std() == pytest.approx(sd, rel=0.1)


def test_of_three_samples_a_memory_of_one_holds_each_in_a_third_of_all_runs():
    counts = [0, 0, 0]
    for seed in range(3000):
        counts[reservoir(1, 0, 3, torch.Generator().manual_seed(seed))[0]] += 1
    assert all(abs(c - 1000) < 4 * math.sqrt(3000 * 1 / 3 * 2 / 3) for c in counts)


def test_a_memory_with_room_for_all_holds_all_in_order():
    generator = torch.Generator().manual_seed(0)
    assert reservoir(10, 0, 4, generator) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert reservoir(10, 4, 6, generator) == {4 + i: i for i in range(6)}


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_it_says_that_it_stores_data(tiny, tmp_path):
    assert available_methods()["er"].stores_data
    record = run(tiny("er", "method.memory=8"), tmp_path / "run")
    assert record["run"]["caveats"] == ["stores up to 8 training images of earlier tasks"]
    assert [t["diagnostics"]["stored_images"] for t in record["tasks"]] == [8, 8, 8]


@pytest.mark.parametrize("cache", ["1024", "0"])
@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
def test_stored_pixels_are_those_of_the_evaluation_view(build, cache, augment):
    domain, method = build("er", f"input.cache_mib={cache}", f"input.augment={augment}")
    learnt(domain, method, 3)
    wanted = [views(domain, task) for task in range(3)]
    assert method.pixels.dtype == torch.uint8
    assert torch.equal(method.pixels, torch.cat([pixels for pixels, _ in wanted]))  # 35 images, room for 200
    assert torch.equal(method.targets, torch.cat([labels for _, labels in wanted]))


def test_a_full_memory_holds_distinct_images_with_their_own_labels(build):
    domain, method = build("er", "method.memory=9")
    known = {}
    for task in range(3):
        begin(domain, method, task)
        method.end_task(task)
        known.update({bytes(p.numpy()): int(y) for p, y in zip(*views(domain, task), strict=True)})
        assert method.held == 9
        held = [bytes(p.numpy()) for p in method.pixels]
        assert len(set(held)) == 9
        assert [known[p] for p in held] == method.targets.tolist()
        assert method.diagnostics()["per_output"] == torch.bincount(method.targets).tolist()
    assert method.targets.max() >= 3  # later tasks do come in


def test_which_images_are_stored_depends_on_the_seed_alone(build):
    first, again, other = (build("er", "method.memory=9") for _ in range(3))
    other[1].seed = 1
    for pair in (first, again, other):
        learnt(*pair, 2)
    assert torch.equal(first[1].pixels, again[1].pixels)
    assert not torch.equal(first[1].pixels, other[1].pixels)


def test_four_pixel_values_count_as_one_stored_number(build):
    domain, method = build("er", "method.memory=9")
    weights = domain.adapted_parameters()
    assert method.stored_parameters() == weights
    learnt(domain, method, 1)
    assert method.stored_parameters() == weights + 9 * 3 * 32 * 32 // 4


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_without_memory_it_is_finetuning(build):
    domain, method = build("er", "head.init=linear")
    begin(domain, method, 0)
    batch = next(domain.batches(0, 0))
    assert torch.equal(method.loss(batch), domain.loss(batch))


@pytest.mark.parametrize(("augment", "size"), [("none", None), ("flip", None), ("flip", 4), ("crop_flip", 99)])
def test_the_loss_is_the_mean_over_batch_and_stored_images(build, augment, size):
    extra = () if size is None else (f"method.replay_batch_size={size}",)
    domain, method = build("er", "head.init=linear", "method.memory=9", f"input.augment={augment}", *extra)
    learnt(domain, method, 1)
    begin(domain, method, 1)
    batch = next(domain.batches(1, 0))
    torch.manual_seed(5)
    loss = method.loss(batch)

    torch.manual_seed(5)
    n = min(size or len(batch.labels), 9)
    chosen = torch.randperm(9)[:n]
    mirrored = torch.rand(n) < 0.5
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (domain.view.mean, domain.view.std))
    stored = []
    for i, mirror in zip(chosen, mirrored, strict=True):
        pixels = method.pixels[i].flip(-1) if mirror and augment != "none" else method.pixels[i]
        stored.append((pixels / 255 - mean) / std)
    images = torch.cat([batch.images, torch.stack(stored)])
    labels = torch.cat([batch.labels, method.targets[chosen]])
    assert set(method.targets[chosen].tolist()) <= {0, 1, 2}
    torch.testing.assert_close(loss, cross_entropy(domain.predict(images), labels), rtol=1e-5, atol=0)
    assert len(method.pixels.unique(dim=0)) == 9  # the memory itself is not mirrored


def test_a_stored_image_is_seen_as_the_loader_shows_it(build):
    domain, method = build("er")
    learnt(domain, method, 1)
    begin(domain, method, 1)
    batch = next(domain.batches(1, 0))
    joined = domain.with_exemplars(batch, method.pixels[:15], method.targets[:15])
    shown = next(domain._loader(domain.stream.tasks[0].train).eval_batches(15))
    assert torch.equal(joined.images[6:], shown.images)
    assert torch.equal(joined.labels[6:], shown.labels)
    assert torch.equal(joined.images[:6], batch.images)
    assert joined.indices.tolist() == [*batch.indices.tolist(), *[-1] * 15]


def test_views_are_copies_whether_the_set_is_decoded_or_not(build):
    domain, _ = build("er")
    images = domain.stream.tasks[0].train
    loader = ImageLoader(images, View(size=16, resize=20), workers=0)
    fresh = loader.views([4, 0, 7])
    list(loader.eval_batches(5))
    kept = loader.views([4, 0, 7])
    assert torch.equal(fresh, kept)
    kept.zero_()
    assert torch.equal(loader.views([4, 0, 7]), fresh)


class Poisoned(Run):
    """The images of a task may not be read once it has ended."""

    def _stage(self, record, task, stages, partial):
        super()._stage(record, task, stages, partial)

        def poison(index):
            raise AssertionError(f"image {index} of task {task} was read after the task")

        object.__setattr__(self.domain.stream.tasks[task].train, "load", poison)
        self.domain._training_loader(task).close()


@pytest.mark.parametrize("cache", ["1024", "0"])
def test_earlier_images_are_replayed_but_never_read_again(tiny, executed, tmp_path, cache):
    sets = (f"input.cache_mib={cache}", "method.memory=9")
    poisoned = executed(tiny("er", *sets), tmp_path / "poisoned", Poisoned).tensors()
    plain = executed(tiny("er", *sets), tmp_path / "plain").tensors()
    assert [n for n, t in poisoned.items() if not torch.equal(t, plain[n])] == []
    finetuned = executed(tiny("finetune"), tmp_path / "finetune").tensors()
    assert not torch.equal(finetuned["domain.heads.0.weight"], plain["domain.heads.0.weight"])


def test_an_interrupted_run_ends_as_an_undisturbed_one(tiny, resumed):
    sets = ("train.checkpoint_seconds=0", "train.batch_size=3", "method.memory=9", "input.augment=flip")
    assert resumed(tiny("er", *sets), "task 3, step 2").keys() >= {"method.pixels", "method.targets", "method.seen"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": 0}, "method.memory must be at least 1, got 0"),
        ({"replay_batch_size": 0}, "method.replay_batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_named(given, message):
    with pytest.raises(UserError) as error:
        ERConfig(**given)
    assert str(error.value) == message
