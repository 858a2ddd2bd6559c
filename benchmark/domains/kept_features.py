"""The network as methods see it: its passes, their precision, and the features that are kept under a key."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dualcl.benchmark.core.devices import is_out_of_memory
from dualcl.benchmark.core.domain import Images, Place, Prefixes, Sides
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.vit_blocks import NO_PASS, NO_VECTOR, Additions, Unserved, backbone_name

#: part of the data, task, the method's key
_At = tuple[str, "int | None", Hashable]


class Sets(Protocol):
    """What the network needs of its domain."""

    device: torch.device

    def autocast(self) -> torch.autocast:
        """The precision of a pass."""

    def passed(self, n: int, run: Callable[[slice], Tensor]) -> Tensor:
        """`run(rows)` for all rows, shared out."""

    def test_size(self, task: int | None) -> int:
        """Test images of a task."""

    def ways(self) -> int:
        """In how many ways a training image can be seen, where passes over all of them save passes; else 0."""

    def every_view(self, task: int | None, run: Callable[[Tensor], Tensor]) -> Tensor:
        """(ways, n, d): `run` of all training images of a task as they are, and mirrored if there are two ways."""


@dataclass
class _Rows:
    values: Tensor
    filled: Tensor


class KeptNetwork:
    """A `dualcl.benchmark.core.domain.Network` of a timm ViT.

    Kept are, per set and key: the begun task's training views until the next task begins; each task's test images until
    an evaluation ends in which their key was not asked for. A broken promise is an error, not a number: what requires
    gradient is never kept, and each evaluation computes one batch of each key afresh and compares bits.
    """

    def __init__(self, model: Any, sets: Sets, image_size: int) -> None:
        self.model = model
        self.blocks = len(model.blocks)
        self._sets = sets
        self._additions = Additions(model)
        self._tests: dict[_At, _Rows] = {}
        #: None: learns, and is not kept
        self._views: dict[_At, Tensor | None] = {}
        self._asked: set[_At] = set()
        self._compared: set[Hashable] = set()
        self.width = self._width(torch.zeros(1, 3, image_size, image_size, device=sets.device))

    def __call__(
        self,
        images: Images,
        *,
        prefixes: Prefixes | None = None,
        sides: Sides | None = None,
        key: Hashable | None = None,
    ) -> Tensor:
        """Features (B, width) float32; see the protocol."""
        if key is not None and prefixes:
            raise ValueError("a pass with prefixes has no key: they may differ from image to image")
        kept = None if key is None or images.place is None else self._kept(images, images.place, sides, key)
        return self.run(images.pixels, prefixes, sides) if kept is None else kept

    def allow(self, requires: tuple[str, ...]) -> None:
        """Makes room in the blocks for the prefixes or side modules that a method asks for."""
        self._additions.allow(requires)

    def run(
        self, pixels: Tensor, prefixes: Prefixes | None = None, sides: Sides | None = None, model: Any = None
    ) -> Tensor:
        """A pass over pixels (B, 3, S, S), nothing kept; `model`: a copy of the network instead of it."""

        def features(rows: slice) -> Tensor:
            own = {block: (keys[rows], values[rows]) for block, (keys, values) in (prefixes or {}).items()}
            net = self.model if model is None else model
            with self._additions.given(own, sides or {}), self._sets.autocast():
                out: Tensor = net.forward_head(net.forward_features(pixels[rows]), pre_logits=True)
            return out.float()

        return self._sets.passed(len(pixels), features)

    @torch.no_grad()
    def _width(self, image: Tensor) -> int:
        """Length of an image's features; Unserved where the model gives no such vector."""
        name = backbone_name(self.model)
        try:
            out = self.run(image)
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError) as error:
            if is_out_of_memory(error):
                raise
            if isinstance(error, NotImplementedError):
                raise Unserved(
                    f"{name} gives no features for classification ({error}); choose another ViT", NO_VECTOR
                ) from error
            said = (str(error) or type(error).__name__).splitlines()[0][:160]
            raise Unserved(
                f"{name} does not take an image of {image.shape[-1]} px ({said}); see backbone.kwargs", NO_PASS
            ) from error
        if out.dim() != 2:
            raise Unserved(
                f"{name} gives features of shape {tuple(out.shape[1:])} for an image, not one vector; set "
                "backbone.kwargs.global_pool to one that timm knows for it",
                NO_VECTOR,
            )
        if not bool(out.isfinite().all()):
            raise UserError(f"{name} gives features that are NaN or infinite; check its weights")
        return int(out.shape[1])

    def begin_task(self) -> None:
        """The training images are others now."""
        self._views.clear()

    def forget(self) -> None:
        """Drops all that is kept."""
        self._views.clear()
        self._tests.clear()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around an evaluation: what it does not ask for is dropped at its end."""
        self._asked, self._compared = set(), set()
        yield
        self._tests = {at: rows for at, rows in self._tests.items() if at in self._asked}

    def _kept(self, images: Images, place: Place, sides: Sides | None, key: Hashable) -> Tensor | None:
        at = (place.part, place.task, key)
        if place.part == "test":
            return self._kept_test(images, place, sides, at)
        if at not in self._views:
            if not images.training or not self._sets.ways():
                return None
            with self._sets.autocast():
                learns = self._learns(images.pixels[:1], sides)
            self._views[at] = None if learns else self._sets.every_view(place.task, lambda x: self.run(x, None, sides))
        views = self._views[at]
        return None if views is None else views[place.flipped.long(), place.rows].to(self._sets.device)

    def _learns(self, pixels: Tensor, sides: Sides | None) -> bool:
        """Whether a pass has gradient: then its output is no one's to keep."""
        if not torch.is_grad_enabled():
            return False
        with self._additions.given({}, sides or {}):
            out: Tensor = self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)
        return out.requires_grad

    def _kept_test(self, images: Images, place: Place, sides: Sides | None, at: _At) -> Tensor:
        self._asked.add(at)
        if at not in self._tests:
            n = self._sets.test_size(place.task)
            self._tests[at] = _Rows(
                torch.empty(n, self.width, device=self._sets.device), torch.zeros(n, dtype=torch.bool)
            )
        rows = self._tests[at]
        if bool(rows.filled[place.rows].all()):
            values = rows.values[place.rows.to(rows.values.device)]
            if at[2] not in self._compared:
                self._compared.add(at[2])
                if not torch.equal(values, self.run(images.pixels, None, sides)):
                    raise UserError(
                        f"features kept under the key {at[2]!r} are not what the network gives now: the method changes "
                        "it; it must not say `frozen`, or must pass key=None or another key"
                    )
            return values
        values = self.run(images.pixels, None, sides)
        if not values.requires_grad:
            rows.values[place.rows.to(rows.values.device)] = values
            rows.filled[place.rows] = True
        return values
