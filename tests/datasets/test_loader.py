import dualcl.benchmark.core.compat  # noqa: F401 - before torchvision

# isort: split
import multiprocessing
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.datasets.base import ImageSet
from dualcl.datasets.cifar100 import ArrayImages
from dualcl.datasets.reading.folders import FolderImages, folder_set
from dualcl.datasets.reading.kept import KeptImages
from dualcl.datasets.reading.loader import Batch, ImageLoader, lost_process
from dualcl.datasets.reading.views import View, decode_image, evaluation_view, random_resized_crop, reduced

N, SIZE = 11, 8


def noise(height: int, width: int, n: int = N) -> ImageSet:
    pixels = np.random.default_rng(1).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return ImageSet(tuple(map(str, range(n))), np.arange(n) % 3, ArrayImages(pixels), "noise")


def same(left: Iterable[Batch], right: Iterable[Batch]) -> bool:
    pairs = list(zip(left, right, strict=True))
    assert pairs
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in pairs
        for name in ("images", "labels", "indices", "flipped")
    )


def batches(view: View, **options: Any) -> list[Batch]:
    loader_options = {"cache_mib": options.pop("cache_mib", 1024), "workers": options.pop("workers", 0)}
    arguments = {"seed": 3, "task": 1, "epochs": 3, "batch_size": 4, **options}
    return list(ImageLoader(noise(10, 13), view, **loader_options).train_batches(**arguments))


@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip"])
def test_batches_from_a_step_equal_the_rest_of_an_undisturbed_pass(augment):
    view = View(SIZE, augment=augment)
    full = batches(view)
    assert [len(b.labels) for b in full] == [4, 4, 3] * 3
    for start in (1, 3, 8):
        assert same(full[start:], batches(view, start_step=start))
    assert batches(view, start_step=9) == []


@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip"])
def test_batches_depend_neither_on_workers_nor_on_the_cache(augment):
    view = View(SIZE, augment=augment, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    reference = batches(view)
    assert same(reference, batches(view, workers=2))
    assert same(reference, batches(view, cache_mib=0, workers=0))
    assert same(reference, batches(view, cache_mib=0, workers=2))


def test_a_loader_process_killed_while_a_step_is_computed_is_told_at_the_next_batches():
    loader = ImageLoader(noise(10, 13), View(SIZE, augment="crop_flip"), cache_mib=0, workers=2)
    steps = loader.train_batches(seed=3, task=1, epochs=500, batch_size=4)
    next(steps)
    multiprocessing.active_children()[0].kill()
    time.sleep(0.5)  # the step goes on undisturbed
    with pytest.raises(UserError, match=r"lower input\.workers"):
        list(steps)
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_loader_process_killed_while_loading_begins_leaves_threads_alone(monkeypatch):
    start, killed = threading._start_new_thread, []

    def killing(*args: Any) -> Any:
        started = start(*args)
        for child in multiprocessing.active_children()[:1]:
            killed.append(child.pid)
            child.kill()
            time.sleep(0.5)  # torch's handler would raise here, inside Thread.start
        return started

    loader = ImageLoader(noise(10, 13), View(SIZE, augment="crop_flip"), cache_mib=0, workers=2)
    monkeypatch.setattr(threading, "_start_new_thread", killing)
    with pytest.raises(UserError, match=r"lower input\.workers"):
        list(loader.eval_batches(batch_size=4))
    assert killed


@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
@pytest.mark.parametrize("options", [{}, {"cache_mib": 0}, {"cache_mib": 0, "workers": 2}])
def test_shares_of_batches_make_up_the_whole(augment, options):
    view = View(SIZE, augment=augment)
    whole = batches(view, **options)
    # the last batch has 3 images, so that one of 5 shares is empty in every batch
    shares = [batches(view, rows=lambda n, i=i: slice(n * i // 5, n * (i + 1) // 5), **options) for i in range(5)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(batch.images, torch.stack([part.images for part in parts]).sum(0))
        assert all(torch.equal(batch.labels, part.labels) for part in parts)
        assert all(int((part.images.flatten(1) != 0).any(1).sum()) <= 1 for part in parts)


@pytest.mark.parametrize("change", [{"seed": 4}, {"task": 2}])
def test_batches_depend_on_seed_and_task(change):
    view = View(SIZE, augment="crop_flip")
    assert not same(batches(view), batches(view, **change))


def test_every_epoch_shows_each_image_once_in_its_own_order_crop_and_mirroring():
    first, second = (batches(View(SIZE, augment="crop_flip"), batch_size=N, epochs=2)[i] for i in range(2))
    assert sorted(first.indices.tolist()) == sorted(second.indices.tolist()) == list(range(N))
    assert first.indices.tolist() != second.indices.tolist()
    by_index = [dict(zip(b.indices.tolist(), b.images, strict=True)) for b in (first, second)]
    assert not any(torch.equal(by_index[0][i], by_index[1][i]) for i in range(N))
    flips = [dict(zip(b.indices.tolist(), b.flipped.tolist(), strict=True)) for b in (first, second)]
    assert flips[0] != flips[1]


def test_reading_batches_leaves_the_global_generators_alone():
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    batches(View(SIZE, augment="crop_flip"), workers=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_pixels_are_bytes_over_255_normalised_and_mirrored_as_told():
    images = noise(SIZE, SIZE)
    view = View(SIZE, augment="flip", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    (batch,) = ImageLoader(images, view).train_batches(seed=0, task=0, epochs=1, batch_size=N)
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (N, 3, SIZE, SIZE)
    assert 0 < batch.flipped.sum() < N
    for image, index, flipped in zip(batch.images, batch.indices.tolist(), batch.flipped, strict=True):
        pixels = transforms.functional.to_tensor(images.load(index))
        pixels = pixels.flip(-1) if flipped else pixels
        assert torch.equal(image, transforms.functional.normalize(pixels, view.mean, view.std))


def test_training_on_mirrored_images_leaves_the_evaluation_images_alone():
    loader = ImageLoader(noise(10, 13), View(SIZE, augment="flip"))
    before = list(loader.eval_batches(4))
    list(loader.train_batches(seed=0, task=0, epochs=2, batch_size=4))
    assert same(before, loader.eval_batches(4))
    loader.close()
    assert same(before, loader.eval_batches(4))


@pytest.mark.parametrize("cache_mib", [0, 1024])
def test_evaluation_is_in_natural_order_and_does_not_depend_on_the_batch_size(cache_mib):
    loader = ImageLoader(noise(10, 13), View(SIZE, augment="crop_flip"), workers=1, cache_mib=cache_mib)
    (whole,) = loader.eval_batches(100)
    parts = list(loader.eval_batches(3))
    assert whole.indices.tolist() == list(range(N))
    assert whole.labels.tolist() == [i % 3 for i in range(N)]
    assert not whole.flipped.any()
    assert torch.equal(whole.images, torch.cat([b.images for b in parts]))


def test_an_empty_set_has_no_evaluation_batches():
    assert list(ImageLoader(noise(8, 8, n=0), View(SIZE)).eval_batches(4)) == []


@pytest.mark.parametrize("size", [(30, 20), (20, 31), (8, 8), (9, 300), (7, 5)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_view_equals_torchvision(size, interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    if max(size) > 16 * min(size):
        image = transforms.functional.center_crop(image, [min(s, 16 * min(size)) for s in size])
    view = View(SIZE, resize=11, interpolation=interpolation)
    mode = transforms.InterpolationMode(interpolation)
    expected = transforms.functional.center_crop(transforms.functional.resize(image, 11, mode), [SIZE, SIZE])
    assert np.array_equal(np.asarray(evaluation_view(image, view)), np.asarray(expected))


def test_a_strip_stays_small():
    assert evaluation_view(Image.new("RGB", (200_000, 1)), View(64, resize=72)).size == (64, 64)


def test_random_crops_have_the_areas_and_ratios_of_torchvision():
    # the crop is read off a picture whose channels are the coordinates
    side = 200
    x = np.broadcast_to(np.arange(side, dtype=np.uint8), (side, side))
    image = Image.fromarray(np.stack([x, x.T, x], axis=-1))
    view = View(2, interpolation="nearest", augment="crop_flip", crop_scale=(0.25, 0.5))
    centres, spans = [], []
    for i in range(400):
        corner = np.asarray(random_resized_crop(image, view, numpy_generator(0, i)), dtype=int)
        # nearest neighbours at 1/4 and 3/4 of the crop: half its width apart
        width, height = 2 * (corner[0, 1, 0] - corner[0, 0, 0]), 2 * (corner[1, 0, 1] - corner[0, 0, 1])
        spans.append((width * height / side**2, width / height))
        centres.append(corner[..., :2].mean(axis=(0, 1)) / side)
    areas, ratios = np.array(spans).T
    assert areas.min() == pytest.approx(0.25, abs=0.03)
    assert areas.max() == pytest.approx(0.5, abs=0.03)
    assert ratios.min() == pytest.approx(3 / 4, abs=0.06)
    assert ratios.max() == pytest.approx(4 / 3, abs=0.06)
    assert np.mean(centres, axis=0) == pytest.approx([0.5, 0.5], abs=0.03)


def test_an_image_too_narrow_for_any_crop_is_cropped_in_its_centre():
    image = Image.new("RGB", (1, 500))
    assert random_resized_crop(image, View(SIZE, augment="crop_flip"), numpy_generator(0)).size == (SIZE, SIZE)


def test_steps_per_epoch_and_short_batches():
    loader = ImageLoader(noise(8, 8), View(SIZE))
    assert [loader.steps_per_epoch(b) for b in (1, 4, 11, 12)] == [11, 3, 1, 1]
    assert [loader.steps_per_epoch(b, drop_last=True) for b in (1, 4, 11)] == [11, 2, 1]
    sizes = [
        len(b.labels)
        for b in loader.train_batches(seed=0, task=0, epochs=2, batch_size=4, drop_last=True, start_step=1)
    ]
    assert sizes == [4, 4, 4]
    with pytest.raises(UserError, match="batch size 12 is more than the 11"):
        loader.steps_per_epoch(12, drop_last=True)
    with pytest.raises(UserError, match="batch size must be at least 1"):
        loader.steps_per_epoch(0)


@pytest.mark.parametrize("cache_mib", [0, 1024])
def test_a_file_lost_after_loading_is_one_line(tmp_path: Path, cache_mib):
    images = ImageSet(("a.png",), np.zeros(1, dtype=np.int64), FolderImages(tmp_path, ("a.png",)), "x")
    with pytest.raises(UserError, match=r"cannot read the image .*a\.png") as caught:
        list(ImageLoader(images, View(SIZE), workers=1, cache_mib=cache_mib).eval_batches(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 0}, "input size"),
        ({"resize": 4}, "input.resize"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"augment": "crop"}, "input.augment"),
        ({"mean": (0.5,)}, "input.mean"),
        ({"std": (0.5, 0.0, 0.5)}, "input.std"),
        ({"crop_scale": (0.0, 1.0)}, "input.crop_scale"),
        ({"crop_scale": (0.5, 0.2)}, "input.crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "input.crop_ratio"),
    ],
)
def test_wrong_views_name_the_key(options, named):
    with pytest.raises(UserError, match=named):
        View(**{"size": SIZE, **options})


def test_wrong_loader_options_name_the_key():
    with pytest.raises(UserError, match=r"input\.workers"):
        ImageLoader(noise(8, 8), View(SIZE), workers=-1)
    with pytest.raises(UserError, match=r"input\.cache_mib"):
        ImageLoader(noise(8, 8), View(SIZE), cache_mib=-1)


# --- images kept on disk ----------------------------------------------------------------------------------------------


def photograph(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    """An image with the spectrum of photographs (1/f), an edge and a grain."""
    rng = np.random.default_rng(seed)
    falling = 1 / np.maximum(np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]), 1 / width)
    plane = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * falling, (height, width))
    plane = (
        128 + 45 * plane / plane.std() + 40 * (np.arange(width) > rng.integers(width)) + rng.normal(0, 3, plane.shape)
    )
    return Image.fromarray(np.repeat(np.clip(plane, 0, 255).astype(np.uint8)[..., None], 3, axis=2))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Nine JPEG files of three sizes, as a set."""
    root = tmp_path_factory.mktemp("photographs")
    names = [f"{k}.jpg" for k in range(9)]
    for k, name in enumerate(names):
        photograph(k, *((120, 90), (90, 120), (30, 20))[k % 3]).save(root / name, quality=90)
    return folder_set(root, names, np.arange(9) % 2)


KEPT = View(16, resize=18, augment="crop_flip", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), cache_size=40)


def kept_loader(images: ImageSet, view: View, part: list[int], workers: int = 2) -> ImageLoader:
    kept = KeptImages(images, view, gib=1, workers=workers)
    return ImageLoader(images.subset(part), view, workers=workers, cache_mib=0, kept=kept)


PLAN = {"seed": 3, "task": 1, "epochs": 2, "batch_size": 3}


def test_batches_are_the_same_from_disk_and_decoded_each_time(photographs: ImageSet, own_cache: Path):
    part = [8, 1, 5, 4, 0]
    plain = ImageLoader(photographs.subset(part), KEPT, workers=0, cache_mib=0)
    expected = list(plain.train_batches(**PLAN))
    for workers in (0, 2):
        loader = kept_loader(photographs, KEPT, part, workers)
        assert same(expected, loader.train_batches(**PLAN))
        assert same(expected[3:], loader.train_batches(**PLAN, start_step=3))
        assert same(plain.eval_batches(2), loader.eval_batches(2))
        assert len(list((own_cache / "decoded").iterdir())) == 2  # of the whole set, for all its parts


def test_batches_come_from_disk_without_the_files(photographs: ImageSet, tmp_path: Path):
    root = tmp_path / "copy"
    root.mkdir()
    for name in photographs.ids:
        (root / name).write_bytes((photographs.load.root / name).read_bytes())
    images = folder_set(root, photographs.ids, photographs.labels)
    loader = kept_loader(images, KEPT, [2, 3])
    training, evaluation = list(loader.train_batches(**PLAN)), list(loader.eval_batches(2))
    for name in photographs.ids:
        (root / name).unlink()
    assert same(training, loader.train_batches(**PLAN))
    assert same(evaluation, loader.eval_batches(2))


def test_a_changed_file_is_another_set(tmp_path: Path):
    def shown() -> torch.Tensor:
        images = folder_set(tmp_path, ["a.png"], [0])
        return next(kept_loader(images, KEPT, [0]).train_batches(**PLAN)).images

    photograph(0).save(tmp_path / "a.png")
    first = shown()
    photograph(1).save(tmp_path / "a.png")
    assert not torch.equal(first, shown())


def test_without_room_on_disk_batches_are_the_same(photographs: ImageSet, own_cache: Path, capsys):
    kept = KeptImages(photographs, KEPT, gib=1e-9, workers=1)
    loader = ImageLoader(photographs, KEPT, workers=0, cache_mib=0, kept=kept)
    expected = list(ImageLoader(photographs, KEPT, workers=0, cache_mib=0).train_batches(**PLAN))
    assert same(expected, loader.train_batches(**PLAN))
    assert same(expected, loader.train_batches(**PLAN))
    assert capsys.readouterr().err.count("not kept") == 1


def test_a_small_set_and_crops_of_whole_images_stay_off_the_disk(photographs: ImageSet, own_cache: Path):
    view = View(16, augment="crop_flip")
    kept = KeptImages(photographs, view, gib=1, workers=1)
    loader = ImageLoader(photographs, view, workers=0, kept=kept)
    assert list(loader.eval_batches(4))
    assert list(loader.train_batches(**PLAN))
    assert not (own_cache / "decoded").exists()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_a_kept_image_show_the_same_part(interpolation):
    """Levels of 255; without a reduction the crops are equal, so the difference is that of the lost detail."""
    differences = {}
    for cache_size in (40, 60, 90):
        view = View(32, augment="crop_flip", interpolation=interpolation, cache_size=cache_size)
        pairs = []
        for k in range(6):
            image = photograph(k)
            kept = reduced(image, view)
            assert min(kept.pixels.shape[:2]) == cache_size
            for draw in range(10):
                whole, near = (random_resized_crop(of, view, numpy_generator(k, draw)) for of in (image, kept))
                pairs.append(np.abs(np.asarray(whole, dtype=int) - np.asarray(near)))
        differences[cache_size] = np.stack(pairs)
    means = {size: d.mean() for size, d in differences.items()}
    assert differences[90].max() == 0
    assert 0 < means[60] < means[40] < 6
    # the edges move by a fraction of a pixel of the kept image at most: a shift by one is far worse
    shifted = [np.abs(np.diff(np.asarray(photograph(k).resize((80, 60)), dtype=int), axis=1)).mean() for k in range(6)]
    assert means[60] < np.mean(shifted) / 2


def test_an_image_smaller_than_the_kept_size_stays_as_it_is():
    image = photograph(0, 30, 20)
    assert np.array_equal(reduced(image, KEPT).pixels, np.asarray(image))
    view = View(16, augment="crop_flip")
    crops = [random_resized_crop(of, view, numpy_generator(5)) for of in (image, reduced(image, KEPT))]
    assert np.array_equal(*map(np.asarray, crops))


def test_evaluation_pixels_from_disk_are_those_of_torchvision(photographs: ImageSet):
    loader = kept_loader(photographs, View(16, resize=18, interpolation="bilinear"), list(range(9)))
    list(loader.eval_batches(4))
    shown = torch.cat([b.images for b in loader.eval_batches(4)])
    mode = transforms.InterpolationMode.BILINEAR
    usual = transforms.Compose([transforms.Resize(18, mode), transforms.CenterCrop(16), transforms.ToTensor()])
    expected = [usual(decode_image(photographs.load.root / name)) for name in photographs.ids]
    assert torch.equal(shown, torch.stack(expected))


def test_a_reader_who_leaves_in_mid_epoch_stops_the_makers(photographs: ImageSet):
    import threading

    before = threading.active_count()
    batches = kept_loader(photographs, KEPT, list(range(9))).train_batches(**{**PLAN, "epochs": 50})
    next(batches)
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cache_size": SIZE - 1, "augment": "crop_flip"}, r"input\.cache_size must be at least"),
        ({"cache_size": 20, "augment": "flip"}, r"input\.cache_size is for input\.augment=crop_flip"),
    ],
)
def test_wrong_cache_sizes_name_the_key(options, named):
    with pytest.raises(UserError, match=named):
        View(SIZE, **options)
