"""A plain timm ViT: frozen, as the least that any method must compute, or with the weights of Q, K and V trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

with contextlib.suppress(ImportError):  # torchvision's wheel beside a torch without CUDA
    import dualcl.benchmark.core.compat  # noqa: F401

# isort: split
import timm
from safetensors.torch import load_file

VERSIONS = {"timm": timm.__version__}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(setup: Mapping[str, Any]) -> Any:
    """The model with a classifier for the task's classes, all frozen but the classifier."""
    model: Any = timm.create_model(setup["backbone"], pretrained=False, **{**setup["kwargs"], "num_classes": 0})
    model.load_state_dict(load_file(setup["weights"]))
    model.requires_grad_(False)
    model.eval()
    model.head = nn.Linear(model.num_features, setup["classes_per_task"])
    return model.to(setup["device"])


def training(setup: Mapping[str, Any], model: nn.Module, trained: list[nn.Parameter]) -> Callable[[], int]:
    """Steps of Adam on `trained`, on the batch that both sides get; each returns the number of images."""
    tensors = load_file(setup["batch"])
    device = torch.device(setup["device"])
    optimizer = torch.optim.Adam(trained, lr=1e-3, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=setup["precision"] == "fp16")
    labels = tensors["labels"]

    def step() -> int:
        with _autocast(setup, device):
            loss = nn.functional.cross_entropy(model(tensors["images"].to(device)).float(), labels.to(device))
        loss.item()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return len(labels)

    return step


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], int]]:
    """Works: pass (forward, and backward to the input of the first block), step (trains Q, K and V of every block).

    A setup with `trains: "nothing"` has the first only, with `trains: "sites"` the second.
    """
    model = build(setup)
    if setup["trains"] == "sites":
        weights = [block.attn.qkv.weight.requires_grad_(True) for block in model.blocks]
        return {"step": training(setup, model, [*weights, *model.head.parameters()])}
    device = torch.device(setup["device"])
    images = load_file(setup["batch"])["images"].to(device)
    model.head = nn.Identity()

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].detach().requires_grad_(True), *args[1:]

    model.blocks[0].register_forward_pre_hook(enter)

    def through() -> int:
        with _autocast(setup, device):
            features = model(images)
        features.float().sum().backward()
        return len(images)

    return {"pass": through}


def _autocast(setup: Mapping[str, Any], device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=DTYPES[setup["precision"]], enabled=setup["precision"] != "fp32")
