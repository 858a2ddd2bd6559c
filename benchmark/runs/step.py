"""One optimiser step: rates, gradients, scaler, clipping, what to do when memory is short."""

from __future__ import annotations

import contextlib
import gc
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualcl.benchmark.core.devices import is_out_of_memory
from dualcl.benchmark.core.domain import Domain
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.processes import Processes
from dualcl.benchmark.core.settings import TrainConfig
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.methods.base import Method, ParamGroup


def lr_factor(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Factor on every learning rate at optimiser step `step` of a task."""
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "coda":
        # the scheduler of the CODA-Prompt code counts from the second epoch, so that the first value comes twice
        epoch = max(step // steps_per_epoch - 1, 0)
        return math.cos(99 * math.pi * epoch / (200 * max(train.epochs - 1, 1)))
    if train.schedule == "milestones":
        return float(0.1 ** sum(step // steps_per_epoch >= epoch for epoch in train.milestones))
    return 0.5 * (1 + math.cos(math.pi * step / (train.epochs * steps_per_epoch)))


def make_optimizer(train: TrainConfig, groups: list[ParamGroup], device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of one task."""
    params = [
        {"params": g.params, "lr": g.lr, "base_lr": g.lr, "weight_decay": g.weight_decay} for g in groups if g.params
    ]
    fused = device.type in ("cpu", "cuda")
    if train.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=0.9, fused=fused)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(params, betas=(0.9, 0.999), fused=fused)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{i}.{k}": torch.as_tensor(v)
        for i, slots in state.items()
        for k, v in slots.items()
        if v is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            state.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class NonFiniteLoss(UserError):
    """A loss or weight that is NaN or infinite: the run stops, earlier tasks are kept."""


class Steps:
    """How a run takes one optimiser step, and takes it again in smaller passes where memory was short."""

    train: TrainConfig
    domain: Domain
    method: Method
    processes: Processes
    device: torch.device
    precision: str
    scaler: torch.amp.GradScaler
    folder: RunFolder
    reporter: Reporter

    def fresh_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss, as small gradients vanish in float16; a fresh one for each task, as a resumed run has."""
        return torch.amp.GradScaler(self.device.type, init_scale=2.0**12, enabled=self.precision == "fp16")

    def step(
        self, batch: Any, optimizer: torch.optim.Optimizer | None, factor: float, where: str, ended: bool = False
    ) -> tuple[float, Tensor | None]:
        """One optimiser step with every learning rate times `factor`; returns the loss and the penalty in it.

        The method hears of it, and whether it `ended` an epoch.
        Raises NonFiniteLoss, which says `where`, before anything is changed. Under `train.on_oom=split` a step that
        runs out of memory is taken again with half the micro-batch.
        """
        with self._attention():
            loss, penalty = self._gradients(batch, optimizer, where)
        if optimizer is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            self.processes.average(params)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            if self.train.grad_clip is not None:
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(params, self.train.grad_clip)
            self.scaler.step(optimizer)
            self.scaler.update()
        self.method.stepped(ended)
        return loss, penalty

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        """Plain attention where it is the faster one, until the backward is done, which may run passes again.

        On a CPU the backward of fused attention in bf16 makes a step half as slow again as plain products do.
        """
        plain = self.device.type == "cpu" and self.precision != "fp32"
        return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()

    def _gradients(
        self, batch: Any, optimizer: torch.optim.Optimizer | None, where: str
    ) -> tuple[float, Tensor | None]:
        if self.train.on_oom == "stop":
            return self._backward(batch, optimizer, where)
        drawn, counters = torch.get_rng_state(), [c.clone() for c in self._counters()]
        while True:
            try:
                return self._backward(batch, optimizer, where)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._halve_micro_batch(where):
                    raise
            # only now is the exception gone, whose traceback holds the tensors of the step
            self._free_memory(optimizer)
            torch.set_rng_state(drawn)
            for counter, before in zip(self._counters(), counters, strict=True):
                counter.copy_(before)

    def _backward(self, batch: Any, optimizer: torch.optim.Optimizer | None, where: str) -> tuple[float, Tensor | None]:
        task_loss = self.method.loss(batch)
        penalty = self.method.penalty()
        loss = task_loss if penalty is None else task_loss + penalty
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} at {where}")
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
        return value, penalty

    def _counters(self) -> list[Tensor]:
        """What `Method.loss` may change on its way."""
        return [b for b in self.method.buffers() if not b.is_floating_point()]

    def _halve_micro_batch(self, where: str) -> bool:
        """Whether there was anything to halve."""
        size = self.domain.micro_batch_size or self.train.batch_size
        if size == 1:
            return False
        self.domain.micro_batch_size = math.ceil(size / 2)
        self.reporter.note(f"out of memory at {where}: on with train.micro_batch_size={self.domain.micro_batch_size}")
        return True

    def _free_memory(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _diverged(self, what: str) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"{what}; earlier tasks are kept in {self.folder.path}. "
            "Lower method.lr, method.head_lr or the penalty's weight, or set train.grad_clip"
        )
