"""The public CODA-Prompt code (L2P++, DualPrompt, CODA-P), from a checkout: its learners' own steps and evaluation.

Its model fixes the size and downloads the weights; both come from `setup` here.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

with contextlib.suppress(ImportError):  # torchvision's wheel beside a torch without CUDA
    import dualcl.benchmark.core.compat  # noqa: F401

# isort: split
import timm
import timm.layers
import timm.models
from safetensors.torch import load_file

VERSIONS = {"timm": timm.__version__}
LEARNERS = {"l2p": "L2P", "dualprompt": "DualPrompt", "coda_prompt": "CODAPrompt"}
PROMPTS = {"l2p": "L2P", "dualprompt": "DualPrompt", "coda_prompt": "CodaPrompt"}
LETTERS = {"prompts": "e_p", "keys": "e_k", "attention": "e_a", "general": "g_p"}


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], float]]:
    """Works of a learner at its first task: step, loss (of a step) and evaluation of `setup["test_batches"]` batches.

    Raises FileNotFoundError or ImportError when `setup["checkout"]` is not that code.
    """
    device = torch.device(setup["device"])
    learners, zoo = _public_code(setup["checkout"], device)
    learner = _learner(setup, learners, zoo, device)
    tensors = load_file(setup["batch"])
    images, labels = tensors["images"], tensors["labels"]
    loader = [(images, labels, torch.zeros_like(labels)) for _ in range(setup["test_batches"])]

    def train() -> float:
        learner.model.train()
        value, _ = learner.update_model(images.to(device), labels.to(device))
        return float(value)

    def step() -> int:
        train()
        return len(labels)

    def evaluation() -> int:
        learner.validation(loader, verbal=False)
        return len(labels) * len(loader)

    return {"step": step, "loss": train, "evaluation": evaluation}


def _public_code(checkout: str, device: torch.device) -> tuple[Any, Any]:
    """(learners.prompt, models.zoo), on a machine without a GPU and with a timm of today."""
    for name, members in {
        "registry": {"register_model": getattr(timm.models, "register_model", None)},
        "layers": {"trunc_normal_": timm.layers.trunc_normal_, "DropPath": timm.layers.DropPath},
        "helpers": {
            "named_apply": getattr(timm.models, "named_apply", None),
            "adapt_input_conv": getattr(timm.models, "adapt_input_conv", None),
        },
    }.items():
        module = types.ModuleType(f"timm.models.{name}")
        vars(module).update(members)
        sys.modules[module.__name__] = module
    if device.type != "cuda":
        # a copy: its running sum of losses is a leaf that a move to the GPU would have copied
        Tensor.cuda = lambda self, *_, **__: self.clone()  # type: ignore[method-assign]
    sys.path.insert(0, checkout)
    try:
        return importlib.import_module("learners.prompt"), importlib.import_module("models.zoo")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("learners", "models"):
            raise FileNotFoundError(f"{checkout} is no checkout of CODA-Prompt: it has no {error.name}") from None
        raise


def _learner(setup: Mapping[str, Any], learners: Any, zoo: Any, device: torch.device) -> Any:
    """Its learner at the first task, with the weights, prompts and classifier rows of the other side."""
    method, vit, param = setup["method"], setup["vit"], setup["param"]
    n_tasks, classes, width = setup["tasks"], setup["classes_per_task"], vit["embed_dim"]

    class Model(zoo.ViTZoo):
        """Its model, but for the size and the weights."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.prompt_flag, self.task_id = method, None
            self.prompt = getattr(zoo, PROMPTS[method])(width, n_tasks, param, key_dim=width)
            self.last = nn.Linear(width, n_tasks * classes)
            self.feat = zoo.VisionTransformer(**vit, ckpt_layer=0, drop_path_rate=0)
            self.feat.load_state_dict(load_file(setup["weights"]))

    class Learner(getattr(learners, LEARNERS[method])):  # type: ignore[misc]
        """Its learner on that model."""

        def create_model(self) -> nn.Module:
            return Model()

    learner = Learner(
        {
            "prompt_param": [n_tasks, param],
            "out_dim": n_tasks * classes,
            "overwrite": True,
            "batch_size": setup["batch_size"],
            "tasks": [list(range(t * classes, (t + 1) * classes)) for t in range(n_tasks)],
            "top_k": 1,
            "memory": 0,
            "DW": False,
            "gpuid": [(device.index or 0) if device.type == "cuda" else -1],
            "schedule_type": "cosine",
            "schedule": [50],
            "optimizer": "Adam",
            "lr": 1e-3,
            "momentum": 0.9,
            "weight_decay": 0,
        }
    )
    learner.model.task_id = 0
    learner.add_valid_output_dim(classes)
    learner.data_weighting(None)
    _fill(learner.model, load_file(setup["start"]), setup["blocks"])
    return learner


@torch.no_grad()
def _fill(model: Any, start: Mapping[str, Tensor], blocks: Mapping[str, list[int]]) -> None:
    """Sets what the first task trains."""
    rows = len(start["head.bias"])
    model.last.weight[:rows] = start["head.weight"].to(model.last.weight.device)
    model.last.bias[:rows] = start["head.bias"].to(model.last.bias.device)
    for name, values in start.items():
        if name.startswith("head."):
            continue
        for block, value in zip(blocks["general" if name == "general" else "expert"], values, strict=True):
            whole = getattr(model.prompt, f"{LETTERS[name]}_{block}")
            whole.view(-1)[: value.numel()] = value.reshape(-1).to(whole.device)  # the first task's come first
