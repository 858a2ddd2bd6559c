"""One optimiser step: rates, gradients, scaler, clipping, what to do when memory is short."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dualcl.benchmark.core.settings import TrainConfig

if TYPE_CHECKING:
    from dualcl.methods.base import ParamGroup


def lr_factor(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Factor on every learning rate at optimiser step `step` of a task."""
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "coda":
        # the scheduler of the CODA-Prompt code counts from the second epoch, so that the first value comes twice
        epoch = max(step // steps_per_epoch - 1, 0)
        return math.cos(99 * math.pi * epoch / (200 * max(train.epochs - 1, 1)))
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
