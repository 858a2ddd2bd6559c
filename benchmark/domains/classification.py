"""Rehearsal-free class-incremental learning on a frozen, pretrained ViT (timm)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualcl.benchmark.core.content import digest, file_hashes
from dualcl.benchmark.core.domain import Contents, Domain, Images, Place, ReadOut, Site, Task
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.settings import Resolved, positive
from dualcl.benchmark.domains.content import data_contents
from dualcl.benchmark.domains.kept_features import KeptNetwork
from dualcl.benchmark.models.vit import BackboneConfig, attention_sites, load_backbone
from dualcl.benchmark.models.vit_blocks import NO_SITES, Unserved, checkpoint_blocks, read_class_token_only
from dualcl.datasets import dataset_class
from dualcl.datasets.base import ClassData, ClassStream, ImageSet, given_order, make_class_stream, task_sizes
from dualcl.datasets.reading.content import Picture, pictures, repeated
from dualcl.datasets.reading.kept import KeptImages
from dualcl.datasets.reading.loader import Batch, ImageLoader
from dualcl.datasets.reading.views import View

PREPROCESS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
#: what a run says whose record does not
OLDER = "an older version"


@dataclass(frozen=True)
class StreamConfig:
    """How classes become tasks."""

    tasks: int = 5
    class_order: str | list[int] | list[str] = field(
        default="shuffle",
        metadata={
            "help": "shuffle, natural, coda (CODA-Prompt's), a list of all classes (numbers or names), a file of names"
        },
    )
    order_seed: int | None = field(default=None, metadata={"help": "seed of the class order; default: the run's seed"})
    sizes: tuple[int, ...] = field(default=(), metadata={"help": "classes of each task, in place of stream.tasks"})
    first: int | None = field(
        default=None, metadata={"help": "classes of the first task (init_cls of PILOT); the rest in equal parts"}
    )
    increment: int | None = field(
        default=None, metadata={"help": "classes of each further task (B50 Inc10: first 50, increment 10)"}
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_order", given_order(self.class_order))
        for key in ("first", "increment"):
            positive(f"stream.{key}", getattr(self, key))
        if self.sizes and (min(self.sizes) < 1 or (self.first, self.increment) != (None, None)):
            raise UserError(
                f"stream.sizes must be numbers of at least 1, without stream.first and stream.increment, got "
                f"{list(self.sizes)}"
            )
        positive("stream.tasks", self.tasks)
        positive("stream.order_seed", self.order_seed, 0)


@dataclass(frozen=True)
class InputConfig:
    """How images become tensors: one setting for all methods."""

    preprocess: Literal["backbone", "none", "half", "imagenet"] = field(
        default="backbone", metadata={"help": "backbone: the weights' own mean and std; none: pixels in [0, 1]"}
    )
    augment: Literal["none", "flip", "crop_flip"] = field(
        default="flip", metadata={"help": "training only; crop_flip: RandomResizedCrop and flip"}
    )
    resize: int | None = field(default=None, metadata={"help": "evaluation: shorter side before the centre crop"})
    interpolation: Literal["auto", "bilinear", "bicubic"] = field(
        default="auto", metadata={"help": "auto: as a file of weights says, else bicubic"}
    )
    mean: tuple[float, ...] | None = field(
        default=None, metadata={"help": "of red, green, blue in [0, 1], with input.std; null: as input.preprocess says"}
    )
    std: tuple[float, ...] | None = field(default=None, metadata={"help": "see input.mean"})
    cache_size: int | None = field(
        default=None,
        metadata={"help": "crop_flip: crops are cut from images kept with this shorter side; null: decoded each time"},
    )
    workers: int | Literal["auto"] = field(
        default="auto", metadata={"help": "loader processes or threads", "volatile": True}
    )
    cache_mib: int = field(
        default=1024, metadata={"help": "largest set of decoded images that is kept in memory", "volatile": True}
    )
    cache_gib: float = field(
        default=16.0, metadata={"help": "most disk space of all decoded images; 0 keeps none", "volatile": True}
    )

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None) or (self.mean is not None and self.preprocess != "backbone"):
            raise UserError("input.mean and input.std go together, and with input.preprocess=backbone alone")
        positive("input.resize", self.resize)
        positive("input.cache_size", self.cache_size)
        positive("input.cache_mib", self.cache_mib, 0)
        if not 0 <= self.cache_gib < math.inf:
            raise UserError(f"input.cache_gib must be a number of at least 0, got {self.cache_gib}")
        if isinstance(self.workers, int):
            positive("input.workers", self.workers, 0)


@dataclass(frozen=True)
class HeadConfig:
    """The classifier every method has: one linear row per class.

    Differs from the reference code (CODA-Prompt), whose rows start as `nn.Linear`'s: from zero, a row holds nothing but
    what its task taught it. With few steps per task random starts leave noise in the logits of all other tasks' images.
    """

    init: Literal["zeros", "linear"] = field(
        default="zeros", metadata={"help": "start of new rows; linear: nn.Linear's, as the reference code"}
    )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation."""

    batch_size: int = 128

    def __post_init__(self) -> None:
        positive("eval.batch_size", self.batch_size)


class Classification(Domain):
    """A ViT, a stream of disjoint classes, cross entropy, and accuracy over all classes seen so far.

    The backbone is always in evaluation mode: dropout and drop path of a frozen network would only add noise, and a
    sample's prediction must not depend on its batch.
    """

    name = "classification"
    capabilities = ("features", "prefixes", "sides", "logits", "exemplars")
    sections_config: ClassVar[dict[str, type]] = {
        "stream": StreamConfig,
        "backbone": BackboneConfig,
        "input": InputConfig,
        "head": HeadConfig,
        "eval": EvalConfig,
    }

    def __init__(self, resolved: Resolved, device: torch.device, data: ClassData | None = None) -> None:
        self.resolved = resolved
        self.device = device
        self.seed = resolved.general.seed
        order_seed = resolved.section("stream", StreamConfig).order_seed
        self.order_seed = self.seed if order_seed is None else order_seed
        if data is None:
            data = dataset_class(resolved.data_reference, self.name).load(resolved.sections["data"])
        self.stream = self.make_stream(resolved, data, self.order_seed)
        backbone_config = resolved.section("backbone", BackboneConfig)
        self.model, self.backbone = load_backbone(backbone_config)
        read_class_token_only(self.model)
        if backbone_config.gradient_checkpointing:
            checkpoint_blocks(self.model)
        self.model.to(device)
        self.precision = resolved.general.precision
        self._sites = attention_sites(self.model)
        self._network_size = sum(p.numel() for p in self.model.parameters())
        self.view = self._make_view()
        self.network = KeptNetwork(self.model, self, self.view.size)
        self.tasks = [
            Task(
                index=t.index,
                name=", ".join(t.names[:3]) + (", ..." if len(t.names) > 3 else ""),
                size=len(t.train),
                facts={"classes": list(t.names), "n_train": len(t.train), "n_test": len(t.test)},
            )
            for t in self.stream.tasks
        ]
        self.heads = nn.ModuleList()
        #: those of the begun task, or all
        self._learning: list[nn.Module] = []
        #: weight and bias of all heads, while an evaluation reads them
        self._joined: tuple[Tensor, Tensor] | None = None
        self._current: int | None = None
        self._scope: Literal["task", "seen"] = "task"
        self._train_loader: tuple[int | None, ImageLoader] | None = None
        self._test_loaders: dict[int, ImageLoader] = {}
        #: decoded images on disk, by part of the data
        self._kept: dict[str, KeptImages] = {}
        #: the training batch given out last
        self._latest: Batch | None = None
        #: whether features were looked at: those of the first step are the backbone's own
        self._looked = False

    @staticmethod
    def make_stream(resolved: Resolved, data: ClassData, order_seed: int) -> ClassStream:
        """The tasks that a configuration cuts the data into."""
        config = resolved.section("stream", StreamConfig)
        given = config.sizes, config.first, config.increment
        stream = make_class_stream(data, config.tasks, config.class_order, order_seed, *given)
        if len(stream.tasks) != config.tasks and resolved.sources.get("stream.tasks") == "--set":
            raise UserError(
                f"stream.tasks={config.tasks}, but other keys of stream make {len(stream.tasks)} tasks; leave it out"
            )
        return stream

    @classmethod
    def ordered(cls, resolved: Resolved, data: ClassData) -> list[tuple[str, ...]]:
        """Names of the classes of each task, in the order in which they are learnt."""
        seed = resolved.section("stream", StreamConfig).order_seed
        stream = cls.make_stream(resolved, data, resolved.general.seed if seed is None else seed)
        return [task.names for task in stream.tasks]

    # --- what is learnt ---------------------------------------------------------------------------------------------

    def sites(self) -> dict[str, Site]:
        """Q, K and V of every block."""
        if not self._sites:
            raise Unserved(
                f"backbone {self.backbone.name} has no qkv or q_proj/k_proj/v_proj Linear to adapt; choose a ViT",
                NO_SITES,
            )
        return dict(self._sites)

    def full_parameters(self) -> dict[str, nn.Parameter]:
        """All weights of the backbone."""
        return dict(self.model.named_parameters())

    def adapted_parameters(self) -> int:
        """Size of the backbone as loaded."""
        return self._network_size

    def begin_task(self, task: int | None, scope: Literal["task", "seen"] = "task") -> list[nn.Parameter]:
        """Adds classifier rows for the task's classes."""
        for index in range(len(self.tasks)) if task is None else [task]:
            if index != len(self.heads):
                raise RuntimeError(f"task {index} begun when {len(self.heads)} tasks were there")
            head = nn.Linear(self.network.width, len(self.stream.tasks[index].outputs))
            from_zero = self.resolved.section("head", HeadConfig).init == "zeros"
            bound = 0.0 if from_zero else 1 / math.sqrt(self.network.width)
            generator = torch_generator(self.seed, "head", index)
            with torch.no_grad():
                head.weight.uniform_(-bound, bound, generator=generator)
                head.bias.uniform_(-bound, bound, generator=generator)
            self.heads.append(head.to(self.device))
        self._current, self._scope = task, scope
        self.network.begin_task()
        for rows in self._learning:  # finished rows would keep their last gradients for good
            rows.requires_grad_(False).zero_grad(set_to_none=True)
        self._learning = [*self.heads] if task is None or scope == "seen" else [self.heads[task]]
        return [p for rows in self._learning for p in rows.requires_grad_(True).parameters()]

    def attach(self, method: ReadOut) -> None:
        """The method reads images from now on."""
        super().attach(method)
        self.network.allow(method.requires)

    def stored_parameters(self) -> int:
        """Classifier rows of all tasks begun, where the method reads them."""
        read = self.method is None or self.method.reads_rows
        return sum(p.numel() for p in self.heads.parameters()) if read else 0

    def state_dict(self) -> dict[str, Tensor]:
        """Classifier rows by task."""
        return {f"heads.{k}": v for k, v in self.heads.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores classifier rows of tasks that were begun."""
        self.heads.load_state_dict({k.removeprefix("heads."): v for k, v in state.items()})
        self.network.forget()

    # --- training ---------------------------------------------------------------------------------------------------

    def _train_images(self, task: int | None) -> ImageSet:
        if task is not None:
            return self.stream.tasks[task].train
        train = self.stream.data.train
        position = np.empty(len(self.stream.class_order), dtype=np.int64)
        position[list(self.stream.class_order)] = np.arange(len(self.stream.class_order))
        return train.subset(np.arange(len(train)), position[train.labels])

    def _loader(self, images: ImageSet, part: Literal["train", "test"] = "train") -> ImageLoader:
        config = self.resolved.section("input", InputConfig)
        if part not in self._kept:
            whole = self.stream.data.train if part == "train" else self.stream.data.test
            self._kept[part] = KeptImages(whole, self.view, gib=config.cache_gib, workers=config.workers)
        return ImageLoader(
            images,
            self.view,
            workers=config.workers,
            cache_mib=config.cache_mib,
            kept=self._kept[part],
            device=self.device,
        )

    def _training_loader(self, task: int | None) -> ImageLoader:
        if self._train_loader is None or self._train_loader[0] != task:
            if self._train_loader is not None:
                self._train_loader[1].close()
            self._train_loader = (task, self._loader(self._train_images(task)))
        return self._train_loader[1]

    def steps_per_epoch(self, task: int | None) -> int:
        """Batches in a pass over the task's training images."""
        train = self.resolved.train
        if train.steps is not None:
            raise UserError("train.steps counts steps per concept (customization); classes are counted by train.epochs")
        size, batch = len(self._train_images(task)), train.batch_size
        steps = size // batch if train.drop_last else math.ceil(size / batch)
        if steps == 0:
            raise UserError(
                f"train.batch_size={batch} with train.drop_last=true leaves no batch in a task of {size} images; "
                "lower it"
            )
        return steps

    def batches(self, task: int | None, start_step: int) -> Iterator[Batch]:
        """Augmented training batches from optimiser step `start_step` on."""
        train = self.resolved.train
        for batch in self._training_loader(task).train_batches(
            seed=self.seed,
            task=-1 if task is None else task,
            epochs=train.epochs,
            batch_size=train.batch_size,
            start_step=start_step,
            drop_last=train.drop_last,
            rows=self.processes.rows if self.processes.count > 1 else None,
        ):
            self.processes.total(batch.images)  # each process made its own
            self._latest = batch
            yield batch

    def check_loss(self, task: int | None, scope: Literal["task", "seen"]) -> None:
        """UserError where the cross entropy is over one class: it is 0, and nothing is learnt."""
        if task is None or scope == "seen":
            if len(self.stream.class_order) == 1:
                raise UserError(
                    f"the stream has one class ({self.stream.tasks[0].names[0]}): cross entropy over it is 0, and "
                    "nothing would be learnt; give it two or more"
                )
        elif len(names := self.stream.tasks[task].names) == 1:
            raise UserError(
                f"task {task + 1} has one class ({names[0]}), and the method's loss is over the task's classes: "
                "cross entropy over one class is 0, and nothing would be learnt; give each task two classes or more "
                "(stream.tasks, stream.sizes), or take a method whose loss is over all classes seen, such as replay, "
                "or that takes no steps, such as class means"
            )

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy over the current task's classes, or over all seen ones under scope "seen"."""
        features = self._of_step(batch)
        labels = self.targets(batch)
        if self._current is None or self._scope == "seen":
            return F.cross_entropy(self.rows(features), labels)
        self.check_loss(self._current, "task")
        outputs = self.stream.tasks[self._current].outputs
        return F.cross_entropy(self.heads[self._current](features), labels - outputs.start)

    def samples(self, batch: Batch) -> Iterator[Batch]:
        """The images of a batch one by one."""
        for i in range(len(batch.labels)):
            one = slice(i, i + 1)
            yield Batch(batch.images[one], batch.labels[one], batch.indices[one], batch.flipped[one])

    # --- forward passes ---------------------------------------------------------------------------------------------

    def images(self, batch: Batch) -> Images:
        """The images of a training batch; their place is known unless a method put the batch together or cropped it."""
        known = batch is self._latest and self.view.augment != "crop_flip"
        place = Place("train", self._current, batch.indices, batch.flipped) if known else None
        return Images(lambda: batch.images.to(self.device), training=True, place=place)

    def _read(self, images: Images) -> Tensor:
        """What the method reads of images; without one, the plain network's features."""
        return self.network(images) if self.method is None else self.method.features(images, self.network)

    def _of_step(self, batch: Batch) -> Tensor:
        """`_read` of a training batch; UserError where the network's features are no numbers before it learnt."""
        features = self._read(self.images(batch))
        if not self._looked:
            if not bool(features.detach().isfinite().all()):
                raise self._no_numbers("features", "the first training batch")
            self._looked = True
        return features

    def _no_numbers(self, what: str, where: str) -> UserError:
        return UserError(
            f"backbone {self.backbone.name}: {what} of {where} are NaN or infinite (precision {self.precision}); check "
            "its weights and precision, or lower method.lr where it was trained"
        )

    def rows(self, features: Tensor) -> Tensor:
        """(B, C) = features W' + b over all classes begun, float32."""
        return F.linear(features, *(self._joined or _joined(self.heads)))

    def ways(self) -> int:
        """Ways in which a training image is seen, as it is and mirrored, if fewer than it is seen; else 0."""
        ways = {"none": 1, "flip": 2}.get(self.view.augment, 0)
        return ways if self.resolved.train.epochs > ways else 0

    @torch.no_grad()
    def every_view(self, task: int | None, run: Callable[[Tensor], Tensor]) -> Tensor:
        """(ways, n, d): `run` of all the task's training images as they are and mirrored.

        In batches of their own, in a fixed order, so that a resumed run finds the same bits.
        """

        def views(batch: Batch) -> Tensor:
            images = batch.images.to(self.device)
            return torch.stack([run(way) for way in (images, images.flip(-1))[: self.ways()]])

        return torch.cat(self._of_each(self._training_loader(task), views), dim=1)

    def _of_each(self, loader: ImageLoader, run: Callable[[Batch], Tensor]) -> list[Tensor]:
        """`run` of every batch of the loader, augmentation off, in order; each batch is one process's work."""
        size = self.resolved.section("eval", EvalConfig).batch_size
        share = self.processes.index, self.processes.count
        with self.processes.apart():
            parts = self.processes.together(run(batch) for batch in loader.eval_batches(size, share))
        return [part.to(self.device) for part in parts]

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Scores (B, number of classes seen) of normalised images (B, 3, S, S). Takes no task id: there is none."""
        return self._scores(Images(images.to(self.device)))

    def _scores(self, images: Images) -> Tensor:
        features = self._read(images)
        return self.rows(features) if self.method is None else self.method.scores(features)

    # --- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, seen: Sequence[int]) -> dict[str, Any]:
        """Correct and total test images per seen task; all classes seen so far are candidates."""
        correct, total = [], []
        with self.network.evaluation(), self._counted(), self._rows_at_rest():
            for task in seen:
                predictions = torch.cat(self._predictions(task))
                if bool((predictions < 0).any()):
                    raise self._no_numbers("scores", f"test images of task {task + 1}")
                labels = torch.from_numpy(self.stream.tasks[task].test.labels)
                correct.append(int((predictions.cpu() == labels).sum()))
                total.append(len(labels))
        return {"correct": correct, "total": total}

    def _predictions(self, task: int) -> list[Tensor]:
        size, share = self.resolved.section("eval", EvalConfig).batch_size, self.processes
        n = self.test_size(task)
        chunks = torch.arange(n).split(size)[share.index :: share.count]
        decoded = InTurn(self._test_loader(task).eval_batches(size, (share.index, share.count)))

        def images(turn: int, rows: Tensor) -> Images:
            place = Place("test", task, rows, torch.zeros(len(rows), dtype=torch.bool))
            return Images(lambda: decoded[turn].images.to(self.device), place=place)

        with share.apart():
            return share.together(best(self._scores(images(*pair))) for pair in enumerate(chunks))

    @contextlib.contextmanager
    def _rows_at_rest(self) -> Iterator[None]:
        """Joins the rows once: the cost of a task's images does not grow with the number of tasks."""
        self._joined = _joined(self.heads)
        try:
            yield
        finally:
            self._joined = None

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """What a method counts of its images, it counts of those of all processes."""
        counters = [] if self.method is None else [b for b in self.method.buffers() if not b.is_floating_point()]
        before = [c.clone() for c in counters]
        yield
        for counter, old in zip(counters, before, strict=True):
            counter.copy_(old + self.processes.total(counter - old))

    def test_size(self, task: int | None) -> int:
        """Test images of a task."""
        return len(self._test_loader(0 if task is None else task).images)

    def _test_loader(self, task: int) -> ImageLoader:
        if task not in self._test_loaders:
            self._test_loaders[task] = self._loader(self.stream.tasks[task].test, "test")
        return self._test_loaders[task]

    # --- capability: features ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def training_features(self, task: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(what the method reads, output indices (B,)) of the task's training images in the evaluation view."""
        loader = self._training_loader(task)
        labels = torch.from_numpy(loader.images.labels).to(self.device)
        known = self.view.augment != "crop_flip"

        def read(batch: Batch) -> Tensor:
            place = Place("train", task, batch.indices, batch.flipped) if known else None
            return self._read(Images(batch.images.to(self.device), place=place))

        parts = self._of_each(loader, read)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise self._no_numbers("features", f"training images of task {(task or 0) + 1}")
        yield from zip(parts, labels.split([len(part) for part in parts]), strict=True)

    def outputs(self, task: int) -> range:
        """Output indices of the task's classes."""
        return self.stream.tasks[task].outputs

    def output_rows(self, task: int) -> tuple[Tensor, Tensor]:
        """Copies of the task's classifier rows: weight (n, D), bias (n,)."""
        head: Any = self.heads[task]
        return head.weight.detach().clone(), head.bias.detach().clone()

    def set_output_rows(self, task: int, weight: Tensor, bias: Tensor) -> None:
        """Sets the classifier rows of the task: weight (n, D), bias (n,); UserError where they are no numbers."""
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise self._no_numbers("classifier rows", f"task {task + 1}")
        head = self.heads[task]
        with torch.no_grad():
            head.weight.copy_(weight)  # type: ignore[operator]
            head.bias.copy_(bias)  # type: ignore[operator]

    # --- capabilities: logits, exemplars ----------------------------------------------------------------------------

    def logits(self, batch: Batch) -> Tensor:
        """Logits (B, number of classes begun) of a batch, float32, with gradient."""
        return self.rows(self._of_step(batch))

    def targets(self, batch: Batch) -> Tensor:
        """Output index (B,) of each image, on the domain's device."""
        return batch.labels.to(self.device)

    def frozen_logits(self) -> Callable[[Batch], Tensor]:
        """`logits` of a copy of the model and classifier as they are now, without gradient."""
        if self.method is not None and {"prefixes", "sides"} & set(self.method.requires):
            raise RuntimeError("a model with prompts or adapters cannot be copied: they belong to the method")
        model, heads = copy.deepcopy(self.model), copy.deepcopy(self.heads)
        for copied in (model, heads):
            copied.requires_grad_(False)
            copied.zero_grad(set_to_none=True)  # gradients of the last step are copied too

        @torch.no_grad()
        def logits(batch: Batch) -> Tensor:
            return F.linear(self.network.run(batch.images.to(self.device), model=model), *_joined(heads))

        return logits

    @property
    def exemplar_shape(self) -> tuple[int, int, int]:
        """Shape of a stored image: the evaluation view."""
        return 3, self.view.size, self.view.size

    def exemplars(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(pixels uint8 (n, 3, S, S) in the evaluation view, output indices (n,)) of the begun task's images."""
        labels = torch.from_numpy(self._train_images(self._current).labels[list(positions)])
        return self._training_loader(self._current).views(positions), labels

    def with_exemplars(self, batch: Batch, exemplars: Tensor, targets: Tensor) -> Batch:
        """A batch joined with stored images; their `indices` are -1.

        Half of the stored images are mirrored unless `input.augment` is none; no crop, for they are views already.
        """
        stored, labels = exemplars.to(self.device), targets.cpu()
        mirrored = torch.rand(len(labels)) < (0.0 if self.view.augment == "none" else 0.5)
        flip = mirrored.to(self.device).view(-1, 1, 1, 1)
        images = self._training_loader(self._current).normalise(torch.where(flip, stored.flip(-1), stored))
        return Batch(
            torch.cat([batch.images.to(self.device), images]),
            torch.cat([batch.labels, labels]),
            torch.cat([batch.indices, torch.full_like(labels, -1)]),
            torch.cat([batch.flipped, mirrored]),
        )

    # --- provenance -------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Data, split, order, weights and preprocessing."""
        data = self.stream.data
        order = json.dumps(self.stream.class_order)
        preprocess = dataclasses.asdict(self.view)
        if self.view.cache_size is None:
            del preprocess["cache_size"]  # older records have none
        return {
            "data": data.name,
            "split_name": data.split_name,
            "split_hash": data.split_hash,
            "class_order": list(self.stream.class_order),
            "class_order_hash": hashlib.sha256(order.encode()).hexdigest()[:16],
            "order_seed": self.order_seed,
            **self._sizes(),
            "backbone": self.backbone.name,
            "weights": self.backbone.weights,
            "weights_sha256": self.backbone.weights_sha256,
            "preprocess": preprocess,
        }

    def _sizes(self) -> dict[str, Any]:
        """Classes of each task, where they are not as equal as can be."""
        sizes = [len(task.classes) for task in self.stream.tasks]
        return {} if sizes == task_sizes(sum(sizes), len(sizes)) else {"task_sizes": sizes}

    def facts(self) -> dict[str, Any]:
        """What a reader of the record may want to know beyond the identity."""
        data = self.stream.data
        notes = {"notes": list(data.notes)} if data.notes else {}
        said = {"skipped_images": list(data.skipped), "class_names": list(data.class_names), **notes}
        return {**said, "prepared_as": self._prepared_as, **data.facts}

    @classmethod
    def contents(cls, resolved: Resolved, data: ClassData | None = None, known: Iterable[str] = ()) -> Contents:
        """The pictures, the names of classes, the file of weights."""
        found = data_contents(resolved, cls.name, data)
        weights = resolved.section("backbone", BackboneConfig).weights
        if weights is not None and (file := Path(weights)).is_file():
            # what lies beside it may say how its images are prepared; its own name says nothing
            names = [file.name, *["config.json"] * (file.parent / "config.json").is_file()]
            found["weights"] = lambda: digest([file_hashes(file.parent, names)])
        return found

    def content(self) -> dict[str, str]:
        """See Domain."""
        return {name: found() for name, found in self.contents(self.resolved, self.stream.data).items()}

    def pictures(self) -> list[Picture]:
        """See Domain; none of what is drawn."""
        return pictures(self.stream.data)[1] if "data" in self.contents(self.resolved) else []

    def repeated(self) -> list[str]:
        """See Domain."""
        return repeated(self.pictures())

    def summary(self, row: Mapping[str, Any]) -> str:
        """Mean accuracy over the tasks seen so far."""
        shares = [100 * c / t for c, t in zip(row["correct"], row["total"], strict=True)]
        return f"accuracy over {len(shares)} task{'s' * (len(shares) > 1)} so far {sum(shares) / len(shares):.1f} %"

    def _prepared(self) -> tuple[tuple[float, ...], tuple[float, ...], str, str]:
        """Mean, std and interpolation of the input, and who says so."""
        config, found = self.resolved.section("input", InputConfig), self.backbone
        file = self.resolved.section("backbone", BackboneConfig).weights
        earlier = self.resolved.earlier
        mean, std, said_by = found.mean, found.std, found.described_by
        # a run of a version that took ImageNet's for every file goes on as it was begun
        if file is not None and earlier is not None and earlier["network"].get("prepared_as", OLDER) == OLDER:
            mean, std, said_by = *PREPROCESS["imagenet"], OLDER
            found = dataclasses.replace(found, interpolation="bicubic")
        if config.mean is not None and config.std is not None:
            mean, std, said_by = config.mean, config.std, "input.mean"
        elif config.preprocess != "backbone":
            mean, std, said_by = *PREPROCESS[config.preprocess], "input.preprocess"
        elif said_by is None:
            raise UserError(
                f"backbone.weights: {file} does not say for which mean and std it was trained: no pretrained_cfg in "
                "its metadata, no config.json beside it, no tag in backbone.name; set input.mean and input.std"
            )
        says = file is not None and found.described_by is not None
        interpolation = (
            config.interpolation if config.interpolation != "auto" else found.interpolation if says else "bicubic"
        )
        return mean, std, interpolation, said_by

    def _make_view(self) -> View:
        config = self.resolved.section("input", InputConfig)
        mean, std, interpolation, self._prepared_as = self._prepared()
        return View(
            size=self.backbone.input_size,
            resize=config.resize,
            interpolation=interpolation,
            mean=tuple(mean),
            std=tuple(std),
            augment=config.augment,
            cache_size=config.cache_size,
        )


def _joined(heads: Iterable[nn.Module]) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of all rows."""
    weights, biases = zip(*((head.weight, head.bias) for head in heads), strict=True)
    return torch.cat(weights), torch.cat(biases)


def best(scores: Tensor) -> Tensor:
    """The output of the highest score in each row (B, C); -1 where that is NaN or infinite."""
    return scores.argmax(1).where(scores.amax(1).isfinite(), -1)


class InTurn:
    """The items of an iterator by number, asked for in rising order; nothing is made before the first is asked for."""

    def __init__(self, items: Iterator[Batch]) -> None:
        self._items = items
        self._next = 0

    def __getitem__(self, number: int) -> Batch:
        while True:
            item, self._next = next(self._items), self._next + 1
            if self._next > number:
                return item


DOMAIN = Classification
