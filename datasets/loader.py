"""From an ImageSet to batches of tensors: decoding, views, augmentation; resumable at any step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast, get_args

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dualcl.benchmark.environment import usable_cpus
from dualcl.benchmark.errors import UserError, nearest
from dualcl.benchmark.seeding import numpy_generator
from dualcl.datasets.base import ImageSet
from dualcl.datasets.cache import GIB, Decoded, PixelStore, open_store, prepared

T = TypeVar("T")
R = TypeVar("R")

Augment = Literal["none", "flip", "crop_flip"]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
#: longer : shorter side beyond which an image is cropped before it is resized, so that a 1 x 20000 strip stays small
MAX_ASPECT = 16
MAX_AUTO_WORKERS = 8
#: of the files that are taken for images, whatever they are called
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
#: of an image, where Pillow too gives up: a file of kilobytes can ask for gigabytes
MAX_PIXELS = 178_956_970


@dataclass(frozen=True)
class View:
    """How an image becomes a tensor of shape (3, size, size).

    Evaluation: the shorter side is resized to `resize` (None: to `size`), then the centre is cropped. `augment` is for
    training only: "flip" mirrors half of the evaluation views, "crop_flip" is torchvision's RandomResizedCrop of the
    full image, then a mirror image for half of them. With `cache_size` those crops are cut at the same places out of
    the image reduced to that shorter side (a smaller one stays as it is), which is quick to keep and to read: see
    `reduced`. `mean` and `std` are in units of pixels in [0, 1]. Raises UserError naming the field below `input.`.
    """

    size: int
    resize: int | None = None
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    augment: Augment = "none"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    cache_size: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"the input size must be at least 1, got {self.size}")
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"input.resize must be at least the input size ({self.size}), got {self.resize}")
        if self.interpolation not in RESAMPLING:
            raise UserError(
                f"unknown input.interpolation {self.interpolation!r}; {nearest(self.interpolation, RESAMPLING)}"
            )
        if self.augment not in get_args(Augment):
            raise UserError(f"unknown input.augment {self.augment!r}; {nearest(self.augment, get_args(Augment))}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise UserError(f"input.{name} must be 3 numbers (red, green, blue), got {getattr(self, name)}")
        if min(self.std) <= 0:
            raise UserError(f"input.std must be positive, got {self.std}")
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise UserError(
                f"input.crop_scale must be (least, most) with 0 < least <= most <= 1, got {self.crop_scale}"
            )
        if not (len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1]):
            raise UserError(f"input.crop_ratio must be (least, most) with 0 < least <= most, got {self.crop_ratio}")
        if self.cache_size is not None:
            if self.augment != "crop_flip":
                raise UserError(
                    f"input.cache_size is for input.augment=crop_flip, not for {self.augment}; set it to null"
                )
            if self.cache_size < self.size:
                raise UserError(
                    f"input.cache_size must be at least the input size ({self.size}), got {self.cache_size}"
                )


@dataclass
class Batch:
    """Images ready for a model.

    `images` float32 (B, 3, S, S), normalised; `labels` int64 (B,); `indices` int64 (B,), positions in the ImageSet;
    `flipped` bool (B,), which images were mirrored.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    flipped: Tensor


def open_image(source: str | Path | IO[bytes]) -> Image.Image:
    """Opens an image in one of FORMATS, of 1 to MAX_PIXELS pixels. Raises OSError otherwise."""
    try:
        # not any format: Pillow gives PostScript, whatever the file is called, to an interpreter
        image = Image.open(source, formats=FORMATS)
    except OSError:
        raise
    except Exception as error:
        raise _as_os_error(error) from error
    pixels = image.width * image.height
    if not 0 < pixels <= MAX_PIXELS:
        image.close()
        raise OSError(f"too many pixels: {pixels}, at most {MAX_PIXELS}" if pixels else "it has no pixels")
    return image


def _as_os_error(error: Exception) -> OSError:
    """One kind of error for the nearly every kind that Pillow's decoders raise on damaged files."""
    text = " ".join(str(error).split()) or type(error).__name__
    return OSError(f"too many pixels: {text}" if isinstance(error, Image.DecompressionBombError) else text)


def decode_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The whole image, upright (EXIF) and RGB, transparency over white; the first frame of an animation.

    Any bit depth up to 16 is scaled to 8. Raises OSError when the file is damaged, truncated, no image, too large (see
    `open_image`), or has pixels without a defined range (floating point).
    """
    with open_image(source) as opened:
        try:
            return _decoded(opened)
        except OSError:
            raise
        except Exception as error:
            raise _as_os_error(error) from error


def _decoded(opened: Image.Image) -> Image.Image:
    opened.load()
    try:
        image = ImageOps.exif_transpose(opened)
    except Exception:  # a damaged EXIF block (many error types) says nothing of the pixels, which are there
        image = opened
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise OSError("its pixels need more than 16 bits; save it with 8 or 16 bits per channel")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise OSError("its pixels are floating-point numbers; save it with 8 or 16 bits per channel")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    # convert() copies even when the mode is right: the result outlives the file
    return image.convert("RGB")


def check_blocks(source: str | Path) -> None:
    """Raises OSError when a block of a PNG differs from its checksum: decoding alone overlooks some of these."""
    try:
        with Image.open(source) as image:
            image.verify()
    except Exception as error:  # Pillow raises nearly every type on damaged files
        raise error if isinstance(error, OSError) else OSError(str(error)) from None


def evaluation_view(image: Image.Image, view: View) -> Image.Image:
    """Shorter side to `view.resize` (or `view.size`), then the centre; equal to torchvision's Resize + CenterCrop."""
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        image = _centre(image, *(min(side, MAX_ASPECT * min(width, height)) for side in (width, height)))
        width, height = image.size
    image = _resized(image, view.resize or view.size, view.interpolation)
    return _centre(image, view.size, view.size)


def _resized(image: Image.Image, shorter: int, interpolation: str) -> Image.Image:
    width, height = image.size
    longer = int(shorter * max(width, height) / min(width, height))
    target = (shorter, longer) if width <= height else (longer, shorter)
    return image if image.size == target else image.resize(target, RESAMPLING[interpolation])


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def reduced(image: Image.Image, view: View) -> Decoded:
    """The pixels that random crops are cut from: shorter side at most `view.cache_size` (None: the whole image).

    A small crop of a reduced image is enlarged from fewer pixels than one of the whole image; by how much they differ
    is measured by `dualcl bench input`. A `cache_size` that no image exceeds changes nothing.
    """
    full = image.size
    if view.cache_size is not None and min(full) > view.cache_size:
        image = _resized(image, view.cache_size, "lanczos")  # the filter that leaves most of the detail
    return Decoded(np.asarray(image), full)


def random_resized_crop(image: Image.Image | Decoded, view: View, rng: np.random.Generator) -> Image.Image:
    """A crop of random area and aspect ratio resized to (size, size), as torchvision's RandomResizedCrop draws it.

    Of a reduced image it is the same part, to a fraction of a pixel.
    """
    full = image.full if isinstance(image, Decoded) else image.size
    columns, rows = image.pixels.shape[1::-1] if isinstance(image, Decoded) else full
    left, top, width, height = _draw_crop(*full, view, rng)
    # multiplied before it is divided: exact at the far edges, and everywhere when the image is whole
    box = [x * columns / full[0] for x in (left, left + width)] + [y * rows / full[1] for y in (top, top + height)]
    x, y, end_x, end_y = int(box[0]), int(box[2]), math.ceil(box[1]), math.ceil(box[3])
    # cut out before it is resized, so that the edges of the crop do not see what lies beyond
    if isinstance(image, Decoded):
        cut = Image.fromarray(image.pixels[y:end_y, x:end_x])
    else:
        cut = image.crop((x, y, end_x, end_y))
    inner = box[0] - x, box[2] - y, box[1] - x, box[3] - y
    return cut.resize((view.size, view.size), RESAMPLING[view.interpolation], box=inner)


def _draw_crop(width: int, height: int, view: View, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop of an image."""
    for _ in range(10):
        area = width * height * rng.uniform(*view.crop_scale)
        ratio = math.exp(rng.uniform(math.log(view.crop_ratio[0]), math.log(view.crop_ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    ratio = min(max(width / height, view.crop_ratio[0]), view.crop_ratio[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


#: (training pass, index): which crop of which image; no pass means the evaluation view
_Key = tuple["_Pass | None", int]
#: of one batch: indices (B,), which are mirrored bool (B,), training pass
_Step = tuple[np.ndarray, np.ndarray, "_Pass | None"]


@dataclass(frozen=True)
class _Pass:
    """One pass over a task's data: with a sample's index, all that its randomness depends on."""

    seed: int
    task: int
    epoch: int

    def generator(self, purpose: str, *key: int) -> np.random.Generator:
        return numpy_generator(self.seed, purpose, self.task, self.epoch, *key)


def in_threads(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`work` of each item, in order, from threads: Pillow gives up the GIL while it decodes and resizes.

    An error or an interrupt drops what has not begun, instead of finishing it first.
    """
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _evaluated(image: Image.Image, view: View) -> np.ndarray:
    """Pixels uint8 (S, S, 3) of the evaluation view."""
    return np.asarray(evaluation_view(image, view))


class _Views(Dataset[Any]):
    """Decodes whole batches in the loader workers; arrays go back by pipe, as /dev/shm is tiny in many containers."""

    def __init__(self, images: ImageSet, view: View) -> None:
        self.images = images
        self.view = view

    def view_of(self, key: _Key) -> np.ndarray:
        """Pixels uint8 (3, S, S) of one sample."""
        the_pass, index = key
        image = self.images.load(index)
        if the_pass is None:
            return _evaluated(image, self.view).transpose(2, 0, 1)
        source = image if self.view.cache_size is None else reduced(image, self.view)
        crop = random_resized_crop(source, self.view, the_pass.generator("crop", index))
        return np.asarray(crop).transpose(2, 0, 1)

    def __getitems__(self, keys: list[_Key]) -> np.ndarray | UserError:
        # handed back, not raised: a DataLoader would wrap the one-line message in the worker's traceback
        try:
            size = self.view.size
            return np.stack([self.view_of(key) for key in keys]) if keys else np.empty((0, 3, size, size), np.uint8)
        except UserError as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


class KeptImages:
    """The decoded images of a whole set in the disk cache, for the loaders of its parts (`ImageLoader(kept=...)`).

    Evaluation views, and with `view.cache_size` what random crops are cut from, are two files; each is filled when it
    is first asked for. `gib` bounds all files of the cache together, 0 keeps nothing.
    """

    def __init__(self, images: ImageSet, view: View, *, gib: float, workers: int | Literal["auto"] = "auto") -> None:
        self.images = images
        self.view = view
        self.gib = gib
        self.workers = loader_workers(workers)
        self.rows = {name: row for row, name in enumerate(images.ids)}
        self._stores: dict[bool, PixelStore | None] = {}

    def store(self, crops: bool) -> PixelStore | None:
        """The evaluation views, or what crops are cut from; None where that is not kept."""
        if crops not in self._stores:
            view = self.view
            of = "crops" if crops else "views"
            self._stores[crops] = None
            if self.gib > 0 and (view.cache_size is not None or not crops) and len(self.rows) == len(self.images):
                key = {
                    "images": [self.images.fingerprint, list(self.images.ids)],
                    "of": [of, view.cache_size] if crops else [of, view.size, view.resize, view.interpolation],
                    "decoder": [PIL.__version__, features.version("jpg")],
                }
                decode = self._reduced if crops else self._viewed
                self._stores[crops] = open_store(
                    key, len(self.images), decode, limit=int(self.gib * GIB), workers=self.workers
                )
        return self._stores[crops]

    def _reduced(self, index: int) -> Decoded:
        return reduced(self.images.load(index), self.view)

    def _viewed(self, index: int) -> Decoded:
        image = self.images.load(index)
        return Decoded(_evaluated(image, self.view), image.size)

    def close(self) -> None:
        """Gives the files free; they are opened again when asked for."""
        for store in self._stores.values():
            if store is not None:
                store.close()
        self._stores.clear()


class ImageLoader:
    """Batches of an ImageSet, for training and for evaluation, on `device`.

    When the whole set fits in `cache_mib` at evaluation size it is decoded once, in threads, and evaluation and
    training batches (unless `crop_flip`) are cut from that array. What is larger, and what random crops of
    `view.cache_size` are cut from, is read in threads from `kept`, the disk cache of a set that holds these images.
    Without either, `workers` processes decode each batch anew. The next batches are made while one is used.
    What is in a batch depends on none of this. `close` frees the array.
    """

    def __init__(
        self,
        images: ImageSet,
        view: View,
        *,
        workers: int | Literal["auto"] = "auto",
        cache_mib: int = 1024,
        kept: KeptImages | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if workers != "auto" and workers < 0:
            raise UserError(f"input.workers must be auto or at least 0, got {workers}")
        if cache_mib < 0:
            raise UserError(f"input.cache_mib must not be negative, got {cache_mib}")
        self.images = images
        self.view = view
        self.workers = loader_workers(workers)
        self.cached = len(images) * 3 * view.size**2 <= cache_mib * 2**20
        self.device = torch.device(device)
        self._kept = kept
        self._labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
        self._views = _Views(images, view)
        self._decoded: Tensor | None = None
        #: by device: 255, mean and std
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def steps_per_epoch(self, batch_size: int, drop_last: bool = False) -> int:
        """Batches in one pass; UserError when `drop_last` would leave none."""
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, got {batch_size}")
        full, rest = divmod(len(self.images), batch_size)
        if drop_last and full == 0:
            raise UserError(
                f"the batch size {batch_size} is more than the {len(self.images)} training images of a task, and "
                "short batches are dropped: lower the batch size, or keep the last short batch"
            )
        return full + (rest > 0 and not drop_last)

    def train_batches(
        self,
        *,
        seed: int,
        task: int,
        epochs: int,
        batch_size: int,
        start_step: int = 0,
        drop_last: bool = False,
        rows: Callable[[int], slice] | None = None,
    ) -> Iterator[Batch]:
        """Batches from optimiser step `start_step` to the end of the last epoch.

        Of a batch of n images only `rows(n)` are made, the others are 0; None: all.

        Order, crops and mirror images are functions of (seed, task, epoch, sample): batches from step k on equal
        batches k, k + 1, ... of an undisturbed pass bit for bit.
        """
        per_epoch = self.steps_per_epoch(batch_size, drop_last)
        plan = self._plan(range(start_step, epochs * per_epoch), per_epoch, batch_size, seed, task)
        return self._batches(plan, self.view.augment == "crop_flip", rows)

    def eval_batches(self, batch_size: int, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Every image once, in natural order, in the evaluation view; with share (i, n) every n-th batch from i on."""
        self.steps_per_epoch(batch_size)
        starts = range(0, len(self.images), batch_size)[share[0] :: share[1]]
        chunks = (np.arange(i, min(i + batch_size, len(self.images))) for i in starts)
        return self._batches(((c, np.zeros(len(c), dtype=bool), None) for c in chunks), False)

    def views(self, indices: Sequence[int]) -> Tensor:
        """Pixels uint8 (n, 3, S, S) of the images at `indices` in the evaluation view, a copy."""
        if self._decoded is not None:
            return self._decoded[torch.as_tensor(indices, dtype=torch.int64)]
        out = torch.empty((len(indices), 3, self.view.size, self.view.size), dtype=torch.uint8)
        found = in_threads(lambda i: self._views.view_of((None, i)), (int(i) for i in indices), self.workers)
        for row, pixels in zip(out, found, strict=True):
            row.copy_(torch.from_numpy(np.ascontiguousarray(pixels)))
        return out

    def normalise(self, pixels: Tensor) -> Tensor:
        """Images float32 (B, 3, S, S) for a model from uint8 pixels, on their device; the same bits on each."""
        scale, mean, std = self._constants_on(pixels.device)
        return pixels.to(torch.float32).div_(scale).sub_(mean).div_(std)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """255, mean and std, (3, 1, 1): tensors, for a GPU multiplies by the inverse of a plain number to divide."""
        if device not in self._constants:
            values = ((255.0,) * 3, self.view.mean, self.view.std)
            scale, mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1).to(device) for v in values)
            self._constants[device] = scale, mean, std
        return self._constants[device]

    def close(self) -> None:
        """Frees the decoded images; they are decoded again when asked for."""
        self._decoded = None

    def _plan(self, steps: range, per_epoch: int, batch_size: int, seed: int, task: int) -> Iterator[_Step]:
        current: _Pass | None = None
        for step in steps:
            epoch, place = divmod(step, per_epoch)
            if current is None or current.epoch != epoch:
                current = _Pass(seed, task, epoch)
                order = current.generator("order").permutation(len(self.images))
                mirrored = current.generator("flip").random(len(self.images)) < 0.5
                if self.view.augment == "none":
                    mirrored[:] = False
            indices = order[place * batch_size : (place + 1) * batch_size]
            yield indices, mirrored[indices], current

    def _batches(
        self, plan: Iterator[_Step], crops: bool, rows: Callable[[int], slice] | None = None
    ) -> Iterator[Batch]:
        """The batches of a plan, from where their pixels are to be had at the least cost."""
        # what makes pixels runs ahead of the batches that come back, in the same order
        ahead: deque[_Step] = deque()

        def begun() -> Iterator[_Step]:
            for step in plan:
                ahead.append(step)
                yield step

        def own(of_batch: np.ndarray) -> np.ndarray:
            return of_batch if rows is None else of_batch[rows(len(of_batch))]

        def keys(step: _Step) -> list[_Key]:
            return [(step[2] if crops else None, int(i)) for i in own(step[0])]

        made: Iterator[Tensor]
        pixels_of = self._reader(crops)
        if pixels_of is None:
            arrays = self._in_workers(map(keys, begun()))
            made = (self._rows(array, own(ahead[0][1])) for array in arrays)
        else:
            made = prepared(
                lambda step: self._rows(map(pixels_of, keys(step)), own(step[1])),
                begun(),
                self.workers,
                max(1, self.workers),
            )
        for pixels in made:
            indices, flipped, _ = ahead.popleft()
            yield self._batch(pixels, indices, flipped, None if rows is None else rows(len(indices)))

    def _reader(self, crops: bool) -> Callable[[_Key], np.ndarray] | None:
        """Pixels uint8 (3, S, S) of a key out of memory or of the disk cache; None where neither has them."""
        if self.cached and not crops:
            decoded = self._pixels().numpy()
            return lambda key: decoded[key[1]]
        store = None if self._kept is None else self._kept.store(crops)
        if self._kept is None or store is None:
            return None
        row_of = [self._kept.rows[name] for name in self.images.ids]

        def pixels_of(key: _Key) -> np.ndarray:
            the_pass, index = key
            kept = store[row_of[index]]
            if the_pass is None:
                return kept.pixels.transpose(2, 0, 1)
            crop = random_resized_crop(kept, self.view, the_pass.generator("crop", index))
            return np.asarray(crop).transpose(2, 0, 1)

        return pixels_of

    def _pixels(self) -> Tensor:
        """The whole set at evaluation size, uint8 (N, 3, S, S), decoded at the first call."""
        if self._decoded is None:
            decoded = np.empty((len(self.images), 3, self.view.size, self.view.size), dtype=np.uint8)

            def fill(index: int) -> None:
                decoded[index] = self._views.view_of((None, index))

            for _ in in_threads(fill, range(len(self.images)), self.workers):
                pass
            self._decoded = torch.from_numpy(decoded)
        return self._decoded

    def _in_workers(self, keys: Iterator[list[_Key]]) -> Iterator[np.ndarray]:
        """Pixels uint8 (B, 3, S, S) of each list of keys, decoded in worker processes."""
        loader: DataLoader[Any] = DataLoader(
            self._views,
            batch_sampler=cast(Any, keys),
            num_workers=self.workers,
            collate_fn=_unchanged,
            # its base seed would come from the global generator and move it; nothing here draws from it
            generator=torch.Generator(),
        )
        try:
            for array in loader:
                if isinstance(array, UserError):
                    raise array
                yield array
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that decodes images was killed ({str(error).splitlines()[0].rstrip('. ')}), perhaps as "
                "memory ran out; lower input.workers, and call the same command again to go on"
            ) from error

    def _rows(self, images: Iterable[np.ndarray], flipped: np.ndarray) -> Tensor:
        """Pixels uint8 (3, S, S) as one batch, mirrored as told: normalised on a CPU, pinned bytes for a GPU.

        One image after another, as that stays in the processor's cache, and in NumPy, which leaves the cores to others.
        """
        shape = len(flipped), 3, self.view.size, self.view.size
        on_cpu = self.device.type == "cpu"
        dtype = torch.float32 if on_cpu else torch.uint8
        rows = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        scale, mean, std = (c.numpy() for c in self._constants_on(torch.device("cpu")))
        for row, image, mirror in zip(rows.numpy(), images, flipped, strict=True):
            np.copyto(row, image[..., ::-1] if mirror else image)
            if on_cpu:
                row /= scale
                row -= mean
                row /= std
        return rows

    def _batch(self, made: Tensor, indices: np.ndarray, flipped: np.ndarray, rows: slice | None) -> Batch:
        if self.device.type != "cpu":
            # bytes, not floats, are moved, and nothing makes the host wait for the device
            made = self.normalise(made.to(self.device, non_blocking=True))
        images = made
        if rows is not None:
            images = made.new_zeros(len(indices), *made.shape[1:])
            images[rows] = made
        chosen = torch.from_numpy(indices)
        return Batch(images, self._labels[chosen], chosen, torch.from_numpy(flipped))


def loader_workers(asked: int | Literal["auto"]) -> int:
    """Processes or threads that make batches."""
    return min(usable_cpus(), MAX_AUTO_WORKERS) if asked == "auto" else asked
