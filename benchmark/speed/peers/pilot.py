"""LAMDA-PILOT (L2P, DualPrompt, CODA-Prompt), from a checkout: its learners' own training loop over one batch.

It wants the timm of its time (0.6.12; 0.6.13 from Python 3.11 on), easydict, scipy and tqdm: an environment of its own.
Its model fixes ViT-B/16 at 224 px and downloads the weights; these come from `setup` here. Options are those of its
exps/*_inr.json.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

with contextlib.suppress(ImportError):  # torchvision's wheel beside a torch without CUDA
    import dualcl.benchmark.core.compat  # noqa: F401

# isort: split
import timm
from safetensors.torch import load_file

VERSIONS = {"timm": timm.__version__}


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], int]]:
    """Works of a learner at its first task: step, and evaluation of `setup["test_batches"]` batches.

    Raises FileNotFoundError or ImportError when `setup["checkout"]` is not that code or a package of it is missing.
    """
    vit = setup["vit"]
    if (vit["embed_dim"], vit["depth"], vit["patch_size"], vit["img_size"]) != (768, 12, 16, 224):
        raise ValueError("its sizes are fixed: it runs with ViT-B/16 at 224 px only")
    method, device = setup["method"], torch.device(setup["device"])
    options = Path(setup["checkout"], "exps", f"{method}_inr.json")
    if not options.is_file():
        raise FileNotFoundError(f"{setup['checkout']} is no checkout of LAMDA-PILOT: it has no exps/{options.name}")
    classes = setup["classes_per_task"]
    learner = _learner(setup, json.loads(options.read_text(encoding="utf-8")), method, device)
    learner._cur_task, learner._known_classes, learner._total_classes = 0, 0, classes
    learner._network.to(device)
    optimizer = learner.get_optimizer()
    if hasattr(learner, "data_weighting"):
        learner.data_weighting()
    tensors = load_file(setup["batch"])
    images, labels = tensors["images"], tensors["labels"]
    batch = (torch.arange(len(labels)), images, labels)
    logging.disable(logging.CRITICAL)

    def step() -> int:
        # an epoch of one batch
        learner._init_train([batch], None, optimizer, None)
        return len(labels)

    def evaluation() -> int:
        learner._compute_accuracy(learner._network, [batch] * setup["test_batches"])
        return len(labels) * setup["test_batches"]

    return {"step": step, "evaluation": evaluation}


class _Torch:
    """torch, but for zeros that are no leaf: its running sum of losses is one that only a move to a GPU would copy."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, **kwargs: Any) -> Tensor:
        """A copy of `torch.zeros`."""
        return torch.zeros(*args, **kwargs).clone()


def _learner(setup: Mapping[str, Any], options: dict[str, Any], method: str, device: torch.device) -> Any:
    """Its learner with the other side's weights."""
    sys.path.insert(0, setup["checkout"])
    module = importlib.import_module(f"models.{method}")
    if method == "coda_prompt" and device.type != "cuda":
        vars(importlib.import_module("backbone.vit_coda_promtpt"))["torch"] = _Torch()
    classes = setup["tasks"] * setup["classes_per_task"]
    learner = module.Learner(
        {
            **options,
            "pretrained": False,
            "nb_classes": classes,
            "nb_tasks": setup["tasks"],
            "device": [device],
            "batch_size": setup["batch_size"],
            "tuned_epoch": 1,
        }
    )
    weights = load_file(setup["weights"])
    for name in ("backbone", "original_backbone"):
        if getattr(learner._network, name, None) is not None:
            _load(getattr(learner._network, name), weights)
    return learner


def _load(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads the backbone; positions of prompted inputs, of which there are more, are left as they are."""
    own = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    missing = sorted(set(weights) - set(fitting) - {"pos_embed"})
    if missing:
        raise ValueError(f"its model does not take the weight {missing[0]}")
    model.load_state_dict(fitting, strict=False)
