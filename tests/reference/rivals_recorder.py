"""Runs the public code of classification methods from a checkout, on small drawn inputs, and gives what it computed.

`RIVALS` names the methods with a checkout each; `recorded(name, root)` imports the public modules and calls their own
classes and functions on a CPU. Replaced are imports that are not installed or not needed, the GPU, data loaders (given
batches are handed on) and sources of random numbers (`draw` hands out the same numbers to both sides): no formula.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import io
import runpy
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

SEED = 0
SIZES = (3, 2, 2)
SPLIT = (0, 3, 5, 7)  # outputs of the three tasks: 0-2, 3-4, 5-6
Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class Rival:
    """A method's public code."""

    variable: str
    repository: str
    commit: str
    sources: tuple[str, ...]
    record: Callable[[Path], Numbers]


def outputs(task: int) -> range:
    return range(SPLIT[task], SPLIT[task + 1])


# --- what both sides are given ----------------------------------------------------------------------------------------


def draw(name: str, *shape: int) -> Tensor:
    """Standard normal float32 numbers, a function of the name."""
    return torch.from_numpy(np.random.default_rng([SEED, *name.encode()]).standard_normal(shape, dtype=np.float32))


def shuffled(name: str, n: int) -> Tensor:
    """A permutation of n numbers, a function of the name."""
    return torch.from_numpy(np.random.default_rng([SEED, *name.encode()]).permutation(n))


def vectors(name: str, classes: range, n: int, width: int) -> tuple[Tensor, Tensor]:
    """n features (B, width) of each class, correlated, with a mean and a spread of its own, and labels, shuffled."""
    parts = []
    for c in classes:
        mix = draw(f"{name} mix {c}", width, width) / width**0.5
        parts.append(draw(f"{name} {c}", n, width) @ (mix + torch.eye(width)) + 1.5 * draw(f"{name} mean {c}", width))
    order = shuffled(f"{name} order {classes}", n * len(classes))
    return torch.cat(parts)[order], torch.arange(classes.start, classes.stop).repeat_interleave(n)[order]


def batched(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(index, x, y) as the loaders of all these codes give them."""
    return list(zip(torch.arange(len(y)).split(size), x.split(size), y.split(size), strict=True))


class Manager:
    """A data manager: `get_dataset` gives the batches of the classes asked for, which `DataLoader` hands on."""

    def __init__(self, given: Callable[[list[int], str], tuple[Tensor, Tensor]], size: int = 16) -> None:
        self.given, self.size = given, size

    def get_total_classnum(self) -> int:
        return SPLIT[-1]

    def get_task_size(self, task: int) -> int:
        return SIZES[task]

    def get_dataset(self, classes: Any, source: str, mode: str, ret_data: bool = False, **rest: Any) -> Any:
        x, y = self.given([int(c) for c in classes], source)
        batches = Batches(batched(x, y, self.size))
        batches.labels = y.numpy()
        return (x, y, batches) if ret_data else batches


class Batches(list[tuple[Tensor, Tensor, Tensor]]):
    """Batches that bear the labels of all images."""

    labels: Any


# --- how their modules are imported -----------------------------------------------------------------------------------


class Anything:
    """What is imported and not used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


class Shim(types.ModuleType):
    """A module of which what is not given is `Anything`; `fallback` is asked first."""

    def __init__(self, name: str, *fallback: Any, **members: Any) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        vars(self).update(members)
        vars(self)["_fallback"] = fallback

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for other in vars(self)["_fallback"]:
            if hasattr(other, name):
                return getattr(other, name)
        return type(name, (Anything,), {})


#: what the public codes call their own packages and modules
THEIR_OWN = ("models", "utils", "convs", "backbone", "methods", "petl", "inc_net", "RanPAC", "resnet", "trainer")
#: what they import and what is run does not need
NOT_NEEDED = (
    "ipdb",
    "easydict",
    "einops",
    "continuum",
    "seaborn",
    "matplotlib",
    "matplotlib.pyplot",
)


@contextlib.contextmanager
def public(root: Path, *, double: bool = False) -> Iterator[pytest.MonkeyPatch]:
    """The checkout can be imported from, on a machine without a GPU and with a timm of today.

    `double`: in float64, so that what differs is the formula and not the rounding.
    """
    shims = {name: Shim(name) for name in NOT_NEEDED}
    shims["timm.models.layers"] = Shim("timm.models.layers", timm.layers)
    shims["timm.models.layers.weight_init"] = Shim("timm.models.layers.weight_init", timm.layers)
    shims["timm.models.helpers"] = Shim("timm.models.helpers", timm.models, timm.models._manipulate)
    shims["timm.models.registry"] = Shim("timm.models.registry", register_model=lambda made: made)

    def own(name: str) -> bool:
        return name.split(".")[0] in THEIR_OWN

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as quiet:
        patch.setattr(sys, "stderr", quiet)  # bars
        for name, module in shims.items():
            patch.setitem(sys.modules, name, module)
        for name in filter(own, list(sys.modules)):
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(root))
        real = Tensor.to
        patch.setattr(Tensor, "cuda", lambda self, *a, **k: self)
        patch.setattr(
            Tensor, "to", lambda self, *a, **k: self if "cuda" in (*a, k.get("device")) else real(self, *a, **k)
        )
        patch.setattr(nn.Module, "cuda", lambda self, *a, **k: self)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if double else torch.float32)
        try:
            yield patch
        finally:
            torch.set_default_dtype(before)
            for name in filter(own, list(sys.modules)):
                del sys.modules[name]


def handing_on(batches: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `DataLoader`: the batches are made."""
    return batches


class Same(nn.Module):
    """In place of a network: its features are what it is given; `wrap` puts them as the code wants them."""

    def __init__(self, width: int, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.out_dim, self.wrap = width, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x)


def functions(file: Path, **given: Any) -> SimpleNamespace:
    """The functions that a script defines, without running it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    space: dict[str, Any] = dict(given)
    exec(compile(tree, str(file), "exec"), space)
    return SimpleNamespace(**space)


def digest(root: Path, sources: tuple[str, ...]) -> str:
    """Of the files that ran."""
    found = hashlib.sha256()
    for file in sources:
        found.update((root / file).read_bytes())
    return found.hexdigest()


# --- RanPAC -----------------------------------------------------------------------------------------------------------

RANPAC_D, RANPAC_M = 6, 16


def ranpac_features(classes: list[int], source: str) -> tuple[Tensor, Tensor]:
    if source == "test":
        return draw("ranpac test", 9, RANPAC_D), torch.zeros(9, dtype=torch.int64)
    return vectors("ranpac", range(classes[0], classes[-1] + 1), 14, RANPAC_D)


def ranpac_layer() -> Tensor:
    return draw("ranpac layer", RANPAC_D, RANPAC_M)


def ranpac(root: Path) -> Numbers:
    """Its learner without phase 1: sums, the errors of all ridges, the ridge, the solution and logits of each task."""
    out: Numbers = {}
    with public(root) as patch:
        code, nets = importlib.import_module("RanPAC"), importlib.import_module("inc_net")
        patch.setattr(nets, "get_convnet", lambda args, pretrained: Same(RANPAC_D))
        patch.setattr(code, "DataLoader", handing_on)
        patch.setattr(torch, "randn", lambda *shape: ranpac_layer())
        errors, chosen = (
            noted(patch, torch.nn.functional, "mse_loss"),
            noted(patch, code.Learner, "optimise_ridge_parameter"),
        )
        args = {"model_name": "ncm", "batch_size": 16, "use_RP": True, "M": RANPAC_M, "convnet_type": "vit"}
        learner = code.Learner({**args, "device": ["cpu"]})
        learner.is_dil = learner.dil_init = False
        for task in range(3):
            learner.incremental_train(Manager(ranpac_features))
            learner.after_task()
            with torch.no_grad():
                out[f"{task}/logits"] = learner._network(ranpac_features([], "test")[0])["logits"].clone()
            out[f"{task}/gram"], out[f"{task}/cross"] = learner.G.clone(), learner.Q.clone()
            out[f"{task}/solution"] = learner._network.fc.weight.detach().T.clone()
            out[f"{task}/errors"] = torch.stack(errors[-17:])
            out[f"{task}/ridge"] = torch.tensor(float(chosen[-1]))
    return out


def ranpac_pilot(root: Path) -> Numbers:
    """LAMDA-PILOT's, its phase 1 left out: the solution and logits of each task."""
    out: Numbers = {}
    with public(root) as patch:
        code, nets = importlib.import_module("models.ranpac"), importlib.import_module("utils.inc_net")
        patch.setattr(nets, "get_backbone", lambda args, pretrained: Same(RANPAC_D))
        patch.setattr(code, "DataLoader", handing_on)
        patch.setattr(torch, "randn", lambda *shape: ranpac_layer())
        args = {"device": ["cpu"], "memory_size": 0, "memory_per_class": 0, "fixed_memory": False, "use_RP": True}
        args |= {"batch_size": 16, "init_lr": 0.1, "weight_decay": 0, "min_lr": 0, "optimizer": "sgd", "tuned_epoch": 0}
        args |= {"M": RANPAC_M, "nb_classes": SPLIT[-1], "backbone_type": "vit"}
        learner = code.Learner(args)
        learner._init_train = lambda *given: None
        for task in range(3):
            learner.incremental_train(Manager(ranpac_features))
            learner.after_task()
            out[f"{task}/solution"] = learner._network.fc.weight.detach().T.clone()
            with torch.no_grad():
                out[f"{task}/logits"] = learner._network(ranpac_features([], "test")[0])["logits"].clone()
    return out


def noted(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """What a function gives from now on, in a list that grows."""
    real, found = getattr(owner, name), []  # type: ignore[var-annotated]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found.append(real(*args, **kwargs))
        return found[-1]

    patch.setattr(owner, name, wrapper)
    return found


# --- FeCAM ------------------------------------------------------------------------------------------------------------

FECAM_D = 6


def fecam_features(task: int, part: str) -> tuple[Tensor, Tensor]:
    """Of ten classes, as many as a task of its script has."""
    return vectors(f"fecam {part}", range(10 * task, 10 * task + 10), 14 if part == "train" else 2, FECAM_D)


def fecam(root: Path) -> Numbers:
    """Its script for CIFAR-100 as it is; the functions of that for ImageNet-R; the mixture of common covariances."""

    class Scenario:
        def __init__(self, part: str, **given: Any) -> None:
            self.part = part

        def _tasks(self, tasks: range) -> Any:
            parts = [(*fecam_features(t, self.part), torch.full((1,), t)) for t in tasks]
            x, y = (torch.cat([p[i] for p in parts]) for i in (0, 1))
            return torch.utils.data.TensorDataset(x, y, torch.zeros(len(y)))

        def __iter__(self) -> Iterator[Any]:
            return (self._tasks(range(t, t + 1)) for t in range(2))

        def __getitem__(self, tasks: slice) -> Any:
            return self._tasks(range(tasks.stop))

    script, out = root / "FeCAM_vit_cifar100.py", {}
    with public(root) as patch:
        datasets = Shim("continuum.datasets", CIFAR100=lambda data_path, train, download: "train" if train else "test")
        patch.setitem(sys.modules, "continuum", Shim("continuum", ClassIncremental=Scenario))
        patch.setitem(sys.modules, "continuum.datasets", datasets)
        network = SimpleNamespace(forward_features=lambda x: x.unsqueeze(1))
        network.cuda = lambda: network
        patch.setattr(timm, "create_model", lambda *a, **k: network)
        found = runpy.run_path(str(script))
        out["means"] = torch.from_numpy(np.stack(found["class_mean_set"]))
        out["correlations"] = torch.from_numpy(np.stack(found["norm_cov_mat"]))
        out["distances"] = torch.from_numpy(found["maha_dist"].T.copy())
        other = functions(root / "FeCAM_vit_imagenet-r.py", np=np)
        shrunk = [other.shrink_cov(c) for c in found["cov_mat"][:4]]
        out["correlations 10"] = torch.from_numpy(np.stack(other.normalize_cov(shrunk)))
        base, mixed = importlib.import_module("models.base"), importlib.import_module("utils.maha_utils")
        learner = base.BaseLearner.__new__(base.BaseLearner)
        learner.args = {"dataset": "cifar100", "tukey": False, "shrink": False}
        learner._device, learner._network = "cpu", Same(FECAM_D)
        learner._network.extract_vector = lambda x: x
        for task in range(2):
            x, y = fecam_features(task, "train")
            loader = batched(torch.nn.functional.normalize(x), y, 16)
            learner._known_classes, learner._total_classes = 10 * task, 10 * task + 10
            making = mixed.compute_new_common_cov if task else mixed.compute_common_cov
            learner._common_cov = making(loader, learner)
        out["common"] = learner._common_cov
    return out


# --- SLCA -------------------------------------------------------------------------------------------------------------

SLCA_D, SLCA_EPOCHS, SLCA_LR = 6, 3, 0.05


def slca_features(classes: list[int], source: str) -> tuple[Tensor, Tensor]:
    parts = [vectors(f"slca {source}", range(c, c + 1), 9, SLCA_D) for c in classes]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def slca_rows(task: int) -> tuple[Tensor, Tensor]:
    """A task's rows as stage 1 would leave them."""
    return 0.3 * draw(f"slca weight {task}", SIZES[task], SLCA_D), 0.1 * draw(f"slca bias {task}", SIZES[task])


class Source:
    """The random numbers of an alignment, in the order in which both sides ask for them."""

    def __init__(self, name: str) -> None:
        self.name, self.asked, self.orders = name, 0, 0

    def normal(self, *shape: int) -> Tensor:
        self.asked += 1
        return draw(f"{self.name} normal {self.asked}", *shape)

    def order(self, n: int) -> Tensor:
        self.orders += 1
        return shuffled(f"{self.name} order {self.orders}", n)


def from_source(patch: pytest.MonkeyPatch, source: Source) -> None:
    """Draws of MultivariateNormal and torch.randperm come from `source`."""
    given = torch.distributions.multivariate_normal
    patch.setattr(given, "_standard_normal", lambda shape, dtype, device: source.normal(*shape))
    patch.setattr(torch, "randperm", lambda n, **k: source.order(n))


def slca(root: Path) -> Numbers:
    """Statistics and alignment of three tasks: Gaussians, losses of all steps, rows before and after, logits."""
    out: Numbers = {}
    with public(root) as patch:
        patch.setitem(sys.modules, "convs.vits", Shim("convs.vits"))
        patch.setitem(sys.modules, "convs.resnet", Shim("convs.resnet"))
        code, base = importlib.import_module("models.slca"), importlib.import_module("models.base")
        nets = importlib.import_module("utils.inc_net")
        patch.setattr(nets, "get_convnet", lambda args, pretrained: Same(SLCA_D, lambda x: {"features": x}))
        for module in (code, base):
            patch.setattr(module, "DataLoader", handing_on)
        for name in ("backup", "recall"):  # the state as of now, not of the first time
            assert hasattr(importlib.import_module("convs.linears").SimpleContinualLinear, name)
        args = {"model_name": "slca", "model_postfix": "", "prefix": "", "run_id": 0, "seed": 0, "convnet_type": ""}
        args |= {"device": ["cpu"], "lr": SLCA_LR, "ca_epochs": SLCA_EPOCHS, "ca_with_logit_norm": 0.1}
        learner = code.SLCA({**args, "memory_size": 0, "memory_per_class": 0, "fixed_memory": False})

        def stage_1(train: Any, test: Any) -> None:
            head = learner._network.fc.heads[-1][-1]
            with torch.no_grad():
                for own, given in zip((head.weight, head.bias), slca_rows(learner._cur_task), strict=True):
                    own.copy_(given)
            from_source(patch, Source(f"slca {learner._cur_task}"))

        learner._stage1_training = stage_1
        learner.save_checkpoint = lambda *a, **k: None
        losses = noted(patch, torch.nn.functional, "cross_entropy")
        manager = Manager(slca_features)
        manager.dataset_name = "parity"  # type: ignore[attr-defined]
        for task in range(3):
            losses.clear()
            learner.incremental_train(manager)
            if task:
                out[f"{task}/losses"] = torch.stack([v.detach() for v in losses])
            heads = [h[-1] for h in learner._network.fc.heads]
            out[f"{task}/rows"] = torch.cat([torch.cat([h.weight, h.bias[:, None]], 1) for h in heads]).detach().clone()
            with torch.no_grad():
                out[f"{task}/logits"] = learner._network(slca_features([0, 4, 6], "test")[0])["logits"].clone()
            learner.after_task()
        out["means"], out["covariances"] = torch.from_numpy(learner._class_means), learner._class_covs
    return out


# --- a small ViT ------------------------------------------------------------------------------------------------------

WIDTH, DEPTH, RANK = 16, 2, 2
VIT: dict[str, int] = {"img_size": 32, "patch_size": 16, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
EPOCHS, BATCH = 2, 8


def pictures(classes: list[int], source: str) -> tuple[np.ndarray, Tensor]:
    """Images (B, 32, 32, 3) uint8 with a tint of their class and of their own, and labels."""
    n = 6 if source == "train" else 3

    def of_class(c: int) -> np.ndarray:
        name = f"pictures {source} {c}"
        tint = 40 * draw(f"tint {c}", 1, 1, 1, 3) + 30 * draw(f"{name} tint", n, 1, 1, 3)
        return (128 + tint + 60 * draw(name, n, 32, 32, 3)).clamp(0, 255).round().to(torch.uint8).numpy()

    return np.concatenate([of_class(c) for c in classes]), torch.tensor(classes).repeat_interleave(n)


def pixels(classes: list[int], source: str) -> tuple[Tensor, Tensor]:
    """The same as networks read them, (B, 3, 32, 32) in [0, 1], in the default precision."""
    images, labels = pictures(classes, source)
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.get_default_dtype()) / 255, labels


def epoch(task: int) -> list[tuple[Tensor, Tensor]]:
    """All images of a task in batches, drawn anew."""
    x, y = pixels(list(outputs(task)), "train")
    return [(x[rows], y[rows]) for rows in shuffled(f"epoch {task}", len(y)).split(BATCH)]


def weights(state: Numbers) -> Numbers:
    """Weights in timm's names and shapes, large enough that attention and features vary with the image."""

    def weight(name: str, shape: torch.Size) -> Tensor:
        drawn = draw(f"vit {name}", *shape)
        if len(shape) > 1 and name.endswith("weight"):
            return 2 * drawn / shape[1:].numel() ** 0.5
        return (1 + 0.1 * drawn) if "norm" in name and name.endswith("weight") else 0.3 * drawn

    return {name: weight(name, tensor.shape) for name, tensor in state.items()}


def small_vit() -> nn.Module:
    """timm's ViT without a head, drawn."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    model.load_state_dict(weights(model.state_dict()))
    made: nn.Module = model.to(torch.get_default_dtype()).eval()
    return made


def head_rows(task: int) -> tuple[Tensor, Tensor]:
    """A task's rows at its start."""
    return 0.1 * draw(f"head weight {task}", SIZES[task], WIDTH), 0.1 * draw(f"head bias {task}", SIZES[task])


def joined(heads: Any) -> Tensor:
    """Rows (C, d + 1) of Linears, weights and biases."""
    return torch.cat([torch.cat([h.weight, h.bias[:, None]], 1) for h in heads]).detach().clone()


def fill(linear: Any, weight: Tensor, bias: Tensor) -> None:
    """Sets a Linear."""
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)


# --- InfLoRA ----------------------------------------------------------------------------------------------------------

INFLORA_LR, INFLORA_EPSILON = 1e-2, 0.9995


def inflora(root: Path) -> Numbers:
    """Its learner's `_train` for three tasks, in float64: B'B, losses, updates, what M leaves out, logits."""
    out: Numbers = {}
    with public(root, double=True) as patch:
        for name in ("models.zoo", "sklearn.cluster"):
            patch.setitem(sys.modules, name, Shim(name))
        code, nets = importlib.import_module("methods.inflora"), importlib.import_module("models.sinet_inflora")
        svd = np.linalg.svd  # numpy 1 gave arrays for tensors
        patch.setattr(np.linalg, "svd", lambda a, **k: svd(np.asarray(a), **k))
        net = nets.SiNet.__new__(nets.SiNet)
        nn.Module.__init__(net)
        net.image_encoder = nets.ViT_lora_co(**VIT, n_tasks=3, rank=RANK, num_classes=0, weight_init="skip")
        missing, unknown = net.image_encoder.load_state_dict(small_vit().state_dict(), strict=False)
        assert not unknown
        assert all("lora" in name or name.endswith("_grow") for name in missing)
        net.classifier_pool, net.numtask = nn.ModuleList(nn.Linear(WIDTH, n) for n in SIZES), 0
        learner = code.InfLoRA.__new__(code.InfLoRA)
        attentions = [m for m in net.modules() if isinstance(m, code.Attention_LoRA)]
        for module in attentions:
            module.init_param()
        vars(learner).update(
            _network=net, _device="cpu", _multiple_gpus=[0], _cur_task=-1, _known_classes=0, total_sessions=3,
            optim="adam", init_epoch=EPOCHS, epochs=EPOCHS, init_lr=INFLORA_LR, lrate=INFLORA_LR, init_weight_decay=0,
            weight_decay=0, lamb=INFLORA_EPSILON, lame=1.0, debug=False, feature_list=[], project_type=[],
        )  # fmt: skip
        losses = noted(patch, torch.nn.functional, "cross_entropy")
        real = learner.train_function

        def train_function(*given: Any) -> None:
            t = learner._cur_task
            b = [m.lora_A_k[t].weight for m in attentions]
            assert all(torch.equal(m.lora_A_k[t].weight, m.lora_A_v[t].weight) for m in attentions)
            out[f"{t}/b"] = torch.stack([w.T @ w for w in b]).detach()  # the sign of a row says nothing
            real(*given)

        learner.train_function = train_function
        for task in range(3):
            learner._cur_task, learner._known_classes = task, SPLIT[task]
            net.update_fc(SPLIT[task + 1])
            fill(net.classifier_pool[task], *head_rows(task))
            losses.clear()
            learner._train([(torch.arange(len(y)), x, y) for x, y in epoch(task)], None)
            out[f"{task}/losses"] = torch.stack([v.detach() for v in losses])
            made = [
                (getattr(m, f"lora_B_{k}")[task].weight, getattr(m, f"lora_A_{k}")[task].weight)
                for m in attentions
                for k in "kv"
            ]
            out[f"{task}/updates"] = torch.stack([b @ a for b, a in made]).detach()
            kinds = zip(learner.feature_mat, learner.project_type, strict=True)
            out[f"{task}/left out"] = torch.stack(
                [f if kind == "retain" else torch.eye(WIDTH) - f for f, kind in kinds]
            )
            out[f"{task}/complements"] = torch.tensor([float(kind == "retain") for kind in learner.project_type])
            with torch.no_grad():
                out[f"{task}/logits"] = net.interface(pixels(list(range(7)), "test")[0]).clone()
    return out


# --- SD-LoRA ----------------------------------------------------------------------------------------------------------

SDLORA_LR = 0.5


def sdlora_start(task: int, site: int) -> Tensor:
    """B (r, d) of a site at a task's start; sites: Q and V of each block."""
    return draw(f"sdlora {task} {site}", RANK, WIDTH) / WIDTH**0.5


def sdlora(root: Path) -> Numbers:
    """Its learner's `_train` for three tasks: losses, factors, magnitudes, rows, logits."""
    out: Numbers = {}
    with public(root) as patch, tempfile.TemporaryDirectory() as folder:
        patch.setitem(sys.modules, "backbone.base_vit", Shim("backbone.base_vit"))
        code, nets = importlib.import_module("models.sdlora"), importlib.import_module("utils.inc_net")
        lora = importlib.import_module("backbone.lora")
        load = torch.load
        patch.setattr(torch, "load", lambda file: load(file, weights_only=False))  # lists of Linears

        def backbone(task: int, **given: Any) -> Any:
            made = lora.LoRA_ViT_timm(small_vit(), r=RANK, num_classes=10, increment=0, filepath=f"{folder}/", **given)
            made.out_dim = WIDTH
            with torch.no_grad():
                for site, linear in enumerate(made.w_As):
                    linear.weight.copy_(sdlora_start(task, site))
            return made

        patch.setattr(nets, "get_backbone", lambda args, pretrained: backbone(0))
        args = {
            "device": ["cpu"],
            "memory_size": 0,
            "memory_per_class": 0,
            "fixed_memory": False,
            "backbone_type": "vit",
        }
        args |= {
            "init_lr": SDLORA_LR,
            "lrate": SDLORA_LR,
            "init_epoch": EPOCHS,
            "epochs": EPOCHS,
            "filepath": f"{folder}/",
        }
        args |= {"init_milestones": [99], "milestones": [99], "init_lr_decay": 0.1, "lrate_decay": 0.1}
        learner = code.Learner(args)
        learner._compute_accuracy = lambda *given: 0
        learner.update_network = lambda index: backbone(
            learner._cur_task, index=index, cur_task_index=learner._cur_task
        )
        losses = noted(patch, torch.nn.functional, "cross_entropy")
        for task in range(3):
            learner._cur_task, learner._known_classes = task, SPLIT[task]
            learner._network.update_fc(SPLIT[task + 1])
            fc = learner._network.fc
            with torch.no_grad():
                for own, given in zip((fc.weight, fc.bias), head_rows(task), strict=True):
                    own[SPLIT[task] :] = given
            losses.clear()
            learner._train([(torch.arange(len(y)), x, y) for x, y in epoch(task)], None)
            out[f"{task}/losses"] = torch.stack([v.detach() for v in losses])
            net = learner._network.backbone
            out[f"{task}/left"] = torch.stack([b.weight for b in net.w_Bs]).detach().clone()
            out[f"{task}/right"] = torch.stack([a.weight for a in net.w_As]).detach().clone()
            magnitudes = [*list(net.wrapped_param_prev)[:task], net.wrapped_param[0]]
            out[f"{task}/magnitudes"] = torch.cat([m.param for m in magnitudes]).detach().clone()
            out[f"{task}/rows"] = joined([fc])
            with torch.no_grad():
                out[f"{task}/logits"] = learner._network(pixels(list(range(7)), "test")[0])["logits"].clone()
            learner.after_task()
    return out


# --- bottlenecks beside the MLPs --------------------------------------------------------------------------------------

SIDE, UP = 3, 0.3  # width of the bottlenecks, size of what they add
PARTS = ("down", "down_bias", "up", "up_bias")


def bottleneck(task: int, block: int) -> Numbers:
    """A task's bottleneck as its steps would leave it."""
    shapes = {"down": (SIDE, WIDTH), "down_bias": (SIDE,), "up": (WIDTH, SIDE), "up_bias": (WIDTH,)}
    size = {"up": UP, "up_bias": UP}  # larger ones outweigh the image: each adapter's features would name its own task
    return {part: size.get(part, 1.0) * draw(f"side {task} {block} {part}", *shape) for part, shape in shapes.items()}


def proxy_rows(task: int, classes: int) -> Tensor:
    """Rows by cosine of a task that learns."""
    return draw(f"proxy {task}", classes, WIDTH)


def configured(**given: Any) -> SimpleNamespace:
    """What their adapters are told."""
    return SimpleNamespace(
        ffn_adapt=True, ffn_option="parallel", ffn_adapter_layernorm_option="none", ffn_adapter_init_option="lora",
        ffn_adapter_scalar="0.1", ffn_num=SIDE, d_model=WIDTH, vpt_on=False, vpt_num=0, _device="cpu", **given,
    )  # fmt: skip


def with_sides(module: Any, **given: Any) -> Any:
    """Their ViT with adapters, as small as ours and with its weights, whose names they change as here."""
    made = module.VisionTransformer(**VIT, num_classes=given.pop("classes", 0), tuning_config=configured(**given))
    state: Numbers = {}
    for name, value in small_vit().state_dict().items():
        for q, rows in zip("qkv", value.chunk(3), strict=True) if "qkv" in name else ():
            state[name.replace("qkv", f"{q}_proj")] = rows
        if "qkv" not in name:
            state[name.replace("mlp.", "")] = value
    missing, unknown = made.load_state_dict(state, strict=False)
    assert not unknown
    assert all("adapt" in name or name.startswith("head.") for name in missing)
    made.out_dim = WIDTH
    return made.eval()


def set_sides(adapters: Any, task: int) -> None:
    """Sets a stack of their adapters, in new tensors: sums of theirs may hold the old ones."""
    for block, adapter in enumerate(adapters):
        values = bottleneck(task, block)
        adapter.dropout = 0.0  # MOS leaves its network in training mode when it takes means
        for linear, name in ((adapter.down_proj, "down"), (adapter.up_proj, "up")):
            linear.weight.data, linear.bias.data = values[name], values[f"{name}_bias"]


def ups(adapters: Any) -> Tensor:
    """Gradients of W_up of a stack of their adapters."""
    return torch.stack([adapter.up_proj.weight.grad for adapter in adapters]).clone()


LEARNER = {"device": ["cpu"], "memory_size": 0, "memory_per_class": 0, "fixed_memory": False, "batch_size": 8}
LEARNER |= {"init_lr": 0.1, "weight_decay": 0, "min_lr": 0, "init_cls": SIZES[0], "increment": SIZES[1]}


def ease(root: Path) -> Numbers:
    """Its learner but for the steps: loss and gradient of a batch, all means, logits."""
    out: Numbers = {}
    with public(root) as patch:
        code, nets = importlib.import_module("models.ease"), importlib.import_module("utils.inc_net")
        patch.setattr(nets, "get_backbone", lambda *a: with_sides(importlib.import_module("backbone.vit_ease")))
        patch.setattr(code, "DataLoader", handing_on)
        real = nets.CosineLinear.forward_reweight  # of features of width 768, unless it is told
        patch.setattr(nets.CosineLinear, "forward_reweight", lambda *a, **k: real(*a, **k, out_dim=WIDTH))
        args = {**LEARNER, "backbone_type": "vit_ease", "model_name": "ease", "use_old_data": False, "alpha": 0.1}
        args |= {"use_init_ptm": False, "use_diagonal": False, "recalc_sim": True, "beta": 0, "moni_adam": False}
        learner = code.Learner({**args, "adapter_num": -1, "use_reweight": True})
        net = learner._network

        def train(*given: Any) -> None:
            task = learner._cur_task
            set_sides(net.backbone.cur_adapter, task)
            with torch.no_grad():
                net.proxy_fc.weight.copy_(proxy_rows(task, SIZES[task]))
            net.eval()  # no dropout
            x, y = epoch(task)[0]
            loss = torch.nn.functional.cross_entropy(net(x, test=False)["logits"], y - SPLIT[task])
            loss.backward()
            out[f"{task}/loss"], out[f"{task}/gradient"] = loss.detach(), ups(net.backbone.cur_adapter)

        learner._train = train
        for task in range(3):
            learner.incremental_train(Manager(pixels))
            out[f"{task}/means"] = net.fc.weight.detach().clone()
            with torch.no_grad():
                out[f"{task}/logits"] = net(pixels(list(range(7)), "test")[0], test=True)["logits"].clone()
            learner.after_task()
    return out


def aper(root: Path) -> Numbers:
    """Its learner with adapters but for the steps: loss and gradient of a batch, means, logits."""
    out: Numbers = {}
    with public(root) as patch:
        code, nets = importlib.import_module("models.aper_adapter"), importlib.import_module("utils.inc_net")
        vit = importlib.import_module("convs.vision_transformer_adapter")

        def convnet(args: Any, pretrained: bool = False) -> Any:
            made = with_sides(vit) if "_adapter" in args["convnet_type"] else small_vit()
            made.out_dim = WIDTH
            return made

        patch.setattr(nets, "get_convnet", convnet)
        patch.setattr(code, "DataLoader", handing_on)
        args = {**LEARNER, "convnet_type": "vit_adapter", "optimizer": "sgd", "tuned_epoch": 1, "backbone_type": "vit"}
        learner = code.Learner(args)

        def train(*given: Any) -> None:
            net = learner._network
            sides = [block.adaptmlp for block in net.convnet.blocks]
            set_sides(sides, 0)
            with torch.no_grad():
                net.fc.weight.copy_(proxy_rows(0, SIZES[0]))
            net.eval()
            x, y = epoch(0)[0]
            loss = torch.nn.functional.cross_entropy(net(x)["logits"], y)
            loss.backward()
            out["0/loss"], out["0/gradient"] = loss.detach(), ups(sides)

        learner._init_train = train
        for task in range(3):
            learner.incremental_train(Manager(pixels))
            out[f"{task}/means"] = learner._network.fc.weight.detach().clone()
            with torch.no_grad():
                out[f"{task}/logits"] = learner._network(pixels(list(range(7)), "test")[0])["logits"].clone()
            learner.after_task()
    return out


ALIGN_EPOCHS, ALIGN_LR = 3, 0.05
ALIGN_DRAWS = 5 * 8  # of a class in an epoch


def mos_test() -> Tensor:
    """Noise and blends of classes, whose adapter is found by asking again."""
    x, _ = pixels(list(range(7)), "test")
    noise = (0.5 + 0.4 * draw("mos noise", 40, *x.shape[1:])).clamp(0, 1)
    return torch.cat([(x + x.roll(7, 0)) / 2, 1 - x, noise])


def mos(root: Path) -> Numbers:
    """Its learner but for the steps, without the mixture in each pass: loss, alignment, scores; and one mixture."""
    out: Numbers = {}
    with public(root) as patch:
        code, nets = importlib.import_module("models.mos"), importlib.import_module("utils.inc_net")
        vit = importlib.import_module("backbone.vit_mos")
        patch.setattr(nets, "get_backbone", lambda *a: with_sides(vit, classes=SPLIT[-1], adapter_momentum=0))
        patch.setattr(nets.MOSNet, "feature_dim", property(lambda self: WIDTH))
        patch.setattr(code, "DataLoader", handing_on)
        args = {**LEARNER, "backbone_type": "vit_mos", "model_name": "mos", "ca_lr": ALIGN_LR, "optimizer": "sgd"}
        args |= {"crct_epochs": ALIGN_EPOCHS, "ensemble": True, "scheduler": "constant", "adapter_momentum": 0}
        learner = code.Learner({**args, "weight_decay": 5e-4, "reg": 0.1, "ca_storage_efficient_method": "covariance"})
        net = learner._network
        net.backbone.out_dim = WIDTH

        def train(*given: Any) -> None:
            task = learner._cur_task
            set_sides(net.backbone.cur_adapter, task)
            with torch.no_grad():
                for own, rows in zip((net.backbone.head.weight, net.backbone.head.bias), head_rows(task), strict=True):
                    own[SPLIT[task] : SPLIT[task + 1]] = rows
            net.backbone.eval()
            x, y = epoch(task)[0]
            found = net(x, adapter_id=task, train=True)
            logits = found["logits"][:, SPLIT[task] : SPLIT[task + 1]]
            loss = torch.nn.functional.cross_entropy(logits, y - SPLIT[task]) + learner.orth_loss(
                found["pre_logits"], y
            )
            net.zero_grad()
            loss.backward()
            out[f"{task}/loss"], out[f"{task}/gradient"] = loss.detach(), ups(net.backbone.cur_adapter)
            from_source(patch, Source(f"mos {task}"))

        learner._init_train = train
        said = []
        topk = torch.topk
        patch.setattr(torch, "topk", lambda scores, **k: said.append(scores) or topk(scores, **{**k, "k": 1}))
        for task in range(3):
            learner.incremental_train(Manager(pixels))
            rows = joined([net.backbone.head])[: SPLIT[task + 1]]
            out[f"{task}/rows"] = rows
            said.clear()
            x = mos_test()
            learner._eval_cnn(batched(x, torch.zeros(len(x), dtype=torch.int64), 99))
            out[f"{task}/scores"] = torch.cat(said)
            learner.after_task()
        net.backbone.config.adapter_momentum = 0.1
        net.backbone.adapter_list = net.backbone.adapter_list[:2]  # the third task's bottlenecks are being learnt
        net.backbone.adapter_merge()
        sides = net.backbone.cur_adapter
        out["mixture"] = torch.stack([side.up_proj.weight for side in sides]).detach().clone()
    return out


TUNA_DEPTH = 12  # its orthogonality has 12 blocks
TUNA_REG = 10.0  # so that it shows in the loss


def tuna(root: Path) -> Numbers:
    """Its learner, with steps of rate 0: loss and gradient, alignment, merged bottlenecks, scores."""
    out: Numbers = {}
    with public(root) as patch:
        patch.setitem(VIT, "depth", TUNA_DEPTH)
        code, nets = importlib.import_module("models.tuna"), importlib.import_module("utils.inc_net")
        patch.setattr(nets, "get_backbone", lambda *a: with_sides(importlib.import_module("backbone.vit_tuna")))
        patch.setattr(nets.TUNANet, "feature_dim", property(lambda self: WIDTH))
        patch.setattr(code, "DataLoader", handing_on)
        args = {**LEARNER, "backbone_type": "vit_tuna", "use_orth": True, "tuned_epoch": 1, "ca_lr": ALIGN_LR, "m": 0}
        args |= {
            "init_lr": 0.0,
            "crct_epochs": 5,
            "optimizer": "sgd",
            "scheduler": "constant",
            "reg": TUNA_REG,
            "decay": True,
        }
        learner = code.Learner({**args, "scale": 20, "ca_storage_efficient_method": "covariance", "weight_decay": 5e-4})
        net, losses = learner._network, []  # type: Any, list[Tensor]
        backward = Tensor.backward
        patch.setattr(Tensor, "backward", lambda self: losses.append(self.detach()) or backward(self))
        real = learner._init_train

        def init_train(train: Any, *given: Any) -> None:
            task = learner._cur_task
            set_sides(net.backbone.cur_adapter, task)
            with torch.no_grad():
                net.fc.heads[task][0].weight.copy_(proxy_rows(task, SIZES[task]))
            losses.clear()
            x, y = epoch(task)[0]
            real([(torch.arange(len(y)), x, y)], *given)
            out[f"{task}/loss"], out[f"{task}/gradient"] = losses[0], ups(net.backbone.cur_adapter)
            from_source(patch, Source(f"tuna {task}"))

        learner._init_train = init_train
        said = []
        topk = torch.topk
        patch.setattr(torch, "topk", lambda scores, **k: said.append(scores) or topk(scores, **{**k, "k": 1}))
        for task in range(3):
            learner.incremental_train(Manager(pixels))
            out[f"{task}/rows"] = torch.cat([head[0].weight for head in net.fc.heads]).detach().clone()
            learner._eval_cnn(batched(*pixels(list(range(7)), "test"), 99))
            if task:  # after the first it is another read-out
                out[f"{task}/scores"] = said[-1]
            learner.after_task()
        out["merged"] = torch.stack([side.up_proj.weight for side in net.backbone.merged_adapter]).detach()
    return out


# --- MoAL -------------------------------------------------------------------------------------------------------------

MOAL_D, MOAL_H = 6, 16


def moal_features(classes: list[int], source: str) -> tuple[Tensor, Tensor]:
    if source == "test":
        return draw("moal test", 9, MOAL_D), torch.zeros(9, dtype=torch.int64)
    x, y = vectors("moal", outputs(sum(classes[0] >= start for start in SPLIT[1:])), 14, MOAL_D)
    rows = torch.isin(y, torch.tensor(classes))
    return x[rows], y[rows]


def moal_layer() -> Tensor:
    return draw("moal layer", MOAL_D, MOAL_H)


def moal_drift(task: int) -> Tensor:
    """How far a task moves each old mean, in place of what a map is fitted to."""
    return 0.3 * draw(f"moal drift {task}", SPLIT[task], MOAL_D)


def moal(root: Path) -> Numbers:
    """Its learner's read-out of given features: the ridge, the solution, means and logits of each task."""
    out: Numbers = {}
    with public(root) as patch:
        patch.setattr(np, "mat", np.asmatrix, raising=False)
        code = importlib.import_module("models.adapt_ac_com_sdc_EMA_auto")
        nets = importlib.import_module("utils.AC_net")
        patch.setattr(nets, "get_backbone", lambda args, pretrained: Same(MOAL_D))
        loader = torch.utils.data.DataLoader

        def load(data: Any, **given: Any) -> Any:
            return data if isinstance(data, list) else loader(data, batch_size=8)

        patch.setattr(code, "DataLoader", load)
        net = nets.SimpleVitNet_AL({"device": ["cpu"], "backbone_type": "vit"}, True)
        learner = code.Learner.__new__(code.Learner)
        vars(learner).update(_network=net, _device="cpu", data_manager=Manager(moal_features), args={"batch_size": 8})
        vars(learner).update(_means=[], _cov_matrix=[], _std_deviations_matrix=[], batch_size=8, R=None)
        chosen = noted(patch, learner, "optimise_ridge_parameter")
        for task in range(3):
            learner._known_classes, learner._total_classes = SPLIT[task], SPLIT[task + 1]
            net.update_fc(SPLIT[task + 1], MOAL_H)
            batches = batched(*moal_features(list(outputs(task)), "train"), 8)
            learner._compute_means()
            if task == 0:
                net.ac_model.fc[0].weight = nn.Parameter(moal_layer().T)
                learner.cls_align(batches, net)
                out["ridge"] = torch.tensor(float(chosen[0]))
            else:
                moved = np.stack(learner._means[: SPLIT[task]]) + moal_drift(task).numpy()
                learner._means[: SPLIT[task]] = list(moved)
                learner._compute_relations()
                learner._build_feature_set()
                learner.IL_align(batches, net)
                learner.cali_weight(learner._feature_trainset, net)
            out[f"{task}/solution"] = net.ac_model.fc[-1].weight.detach().T.clone()
            out[f"{task}/means"] = torch.from_numpy(np.stack(learner._means))
            with torch.no_grad():
                out[f"{task}/logits"] = net(moal_features([], "test")[0])["logits"].clone()
    return out


# --- all --------------------------------------------------------------------------------------------------------------

RIVALS = {
    "ranpac": Rival(
        "DUALCL_REFERENCE_RANPAC",
        "https://github.com/RanPAC/RanPAC",
        "012927f",
        ("RanPAC.py", "inc_net.py", "utils/toolkit.py"),
        ranpac,
    ),
    "ranpac_pilot": Rival(
        "DUALCL_REFERENCE_PILOT",
        "https://github.com/LAMDA-CL/LAMDA-PILOT",
        "5240714",
        ("models/ranpac.py", "utils/inc_net.py", "backbone/linears.py"),
        ranpac_pilot,
    ),
    "fecam": Rival(
        "DUALCL_REFERENCE_FECAM",
        "https://github.com/dipamgoswami/FeCAM",
        "d2479b7",
        ("FeCAM_vit_cifar100.py", "FeCAM_vit_imagenet-r.py", "models/base.py", "utils/maha_utils.py"),
        fecam,
    ),
    "slca": Rival(
        "DUALCL_REFERENCE_SLCA",
        "https://github.com/GengDavid/SLCA",
        "169d4e6",
        ("models/slca.py", "models/base.py", "utils/inc_net.py", "convs/linears.py"),
        slca,
    ),
    "inflora": Rival(
        "DUALCL_REFERENCE_INFLORA",
        "https://github.com/liangyanshuo/InfLoRA",
        "e08b00e",
        ("methods/inflora.py", "models/sinet_inflora.py", "models/vit_inflora.py", "utils/schedulers.py"),
        inflora,
    ),
    "sdlora": Rival(
        "DUALCL_REFERENCE_SDLORA",
        "https://github.com/WuYichen-97/SD-Lora-CL",
        "8bacded",
        ("models/sdlora.py", "backbone/lora.py", "utils/inc_net.py"),
        sdlora,
    ),
    "ease": Rival(
        "DUALCL_REFERENCE_EASE",
        "https://github.com/sun-hailong/CVPR24-Ease",
        "6d67508",
        ("models/ease.py", "backbone/vit_ease.py", "backbone/linears.py", "utils/inc_net.py"),
        ease,
    ),
    "aper": Rival(
        "DUALCL_REFERENCE_APER",
        "https://github.com/zhoudw-zdw/RevisitingCIL",
        "a2e6b71",
        ("models/aper_adapter.py", "convs/vision_transformer_adapter.py", "convs/linears.py", "utils/inc_net.py"),
        aper,
    ),
    "mos": Rival(
        "DUALCL_REFERENCE_MOS",
        "https://github.com/sun-hailong/AAAI25-MOS",
        "8d5e07c",
        ("models/mos.py", "backbone/vit_mos.py", "backbone/linears.py", "utils/inc_net.py"),
        mos,
    ),
    "tuna": Rival(
        "DUALCL_REFERENCE_TUNA",
        "https://github.com/LAMDA-CL/ICCV2025-TUNA",
        "77d4f10",
        ("models/tuna.py", "backbone/vit_tuna.py", "backbone/linears.py", "utils/inc_net.py"),
        tuna,
    ),
    "moal": Rival(
        "DUALCL_REFERENCE_MOAL",
        "https://github.com/Zi-Jian-Gao/Moal",
        "d83d3d6",
        ("models/adapt_ac_com_sdc_EMA_auto.py", "utils/AC_net.py", "backbone/linears.py"),
        moal,
    ),
}


def recorded(name: str, root: Path) -> Numbers:
    """What the public code of a method gives, as float32 but for what is asked to 1e-5 of small differences."""
    found = RIVALS[name].record(root)
    return {key: value.detach().to("cpu", torch.float32) for key, value in found.items()}
