"""From an ImageSet to batches of tensors, resumable at any step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.datasets.base import ImageSet
from dualcl.datasets.reading.kept import KeptImages
from dualcl.datasets.reading.threads import in_threads, loader_workers, prepared
from dualcl.datasets.reading.views import View, evaluation_view, random_resized_crop, reduced


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
            return np.asarray(evaluation_view(image, self.view)).transpose(2, 0, 1)
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


def lost_process(error: BaseException) -> str | None:
    """What to tell the user when `error` says that a process which decodes images was killed; else None.

    Where a loader of torch was begun in the main thread, a signal handler raises it wherever that thread is.
    """
    said = str(error)
    if not isinstance(error, RuntimeError) or not said.startswith("DataLoader worker"):
        return None
    return (
        f"a process that decodes images was killed ({said.splitlines()[0].rstrip('. ')}), perhaps as memory ran out; "
        "lower input.workers, and call the same command again to go on"
    )


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
            # begun in the main thread, torch's handler of SIGCHLD would raise wherever that thread is, also inside
            # Thread.start, which leaves a KeyError or a thread's traceback; without it the loop below is told
            with ThreadPoolExecutor(1) as starter:
                arrays = starter.submit(iter, loader).result()
            for array in arrays:
                if isinstance(array, UserError):
                    raise array
                yield array
        except RuntimeError as error:
            text = lost_process(error)
            if text is None:
                raise
            raise UserError(text) from error

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
