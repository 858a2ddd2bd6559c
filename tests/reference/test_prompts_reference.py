"""L2P++, Deep L2P++, DualPrompt and CODA-P against the public CODA-Prompt code, see README.md here.

Both sides get the same ViT, images, prompts, keys and classifier rows, drawn by name from a seed. Theirs runs from a
checkout, their learner and scheduler included, or was stored; ours runs the runner's own steps. Three tasks are planned
and two are learnt, so that there are outputs and experts of the past and of the future.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before torchvision and timm

# isort: split
import timm

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.benchmark.runs.step import lr_factor, make_optimizer
from dualcl.datasets.base import ArrayImages, ClassData, ImageSet
from dualcl.datasets.reading.loader import Batch
from dualcl.methods.coda_prompt import CodaPromptConfig, projected_rows

VARIABLE, REPOSITORY, COMMIT = "DUALCL_REFERENCE_CODA_PROMPT", "https://github.com/GT-RIPL/CODA-Prompt", "6417d4f"
SEED = 0
WIDTH, DEPTH, HEADS, SIZE, PATCH = 48, 6, 4, 32, 8
SPLIT = (0, 3, 5, 7)  # outputs of the three tasks: 0-2, 3-4, 5-6
BATCH, EPOCHS, BATCHES = 8, 5, 2  # ten steps a task
LR = 1e-3
#: largest relative difference of one pass; of losses, logits and parameters along the steps; of what the steps changed,
#: where Adam blows the rounding error of the smallest gradients up to the size of a step
VALUES, TRAJECTORY, CHANGES = 1e-5, 1e-4, 5e-3
Numbers = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A method as both sides call it."""

    label: str
    method: str
    options: tuple[str, ...]
    quirks: tuple[str, ...]
    learner: str
    param: tuple[float, ...]
    blocks: tuple[int, ...]
    #: our parameter of each tensor that the public code keeps for the whole pool
    own: dict[str, str]
    penalty: str


CASES = {
    "l2p": Case(
        label="L2P++",
        method="l2p",
        options=("method.pool=8", "method.length=4"),
        quirks=("batch_key_loss",),
        learner="L2P",
        param=(8, 4, -1),
        blocks=(0,),
        own={"prompts": "prompts", "keys": "keys"},
        penalty="key loss",
    ),
    "l2p_deep": Case(
        label="Deep L2P++",
        method="l2p",
        options=("method.pool=8", "method.length=4", "method.deep=true"),
        quirks=("batch_key_loss",),
        learner="L2P",
        param=(8, 4, 1),
        blocks=(0, 1, 2, 3, 4),
        own={"prompts": "prompts", "keys": "keys"},
        penalty="key loss",
    ),
    "dualprompt": Case(
        label="DualPrompt",
        method="dualprompt",
        options=("method.general_length=2", "method.expert_length=4"),
        quirks=("sum_key_loss", "future_experts"),
        learner="DualPrompt",
        param=(3, 4, 2),
        blocks=(2, 3, 4),
        own={"prompts": "prompt", "keys": "key", "general": "general"},
        penalty="key loss",
    ),
    **{
        f"coda_prompt_{mu}": Case(
            label=f"CODA-P, mu = {mu}",
            method="coda_prompt",
            options=("method.pool=6", "method.length=4", f"method.mu={mu}"),
            quirks=("drop_remainder", "project_in_turn"),
            learner="CODAPrompt",
            param=(6, 4, mu),
            blocks=(0, 1, 2, 3, 4),
            own={"prompts": "prompts", "keys": "keys", "attention": "attention"},
            penalty="orthogonality penalty",
        )
        for mu in (0, 0.1)
    },
}
GENERAL_BLOCKS, SHARE = (0, 1), 2  # DualPrompt's; CODA-P's components of a task
LETTERS = {"prompts": "e_p", "keys": "e_k", "attention": "e_a", "general": "g_p"}


# --- what both sides are given ----------------------------------------------------------------------------------------


def draw(name: str, *shape: int) -> Tensor:
    """Standard normal float32 numbers, a function of the name."""
    return torch.from_numpy(np.random.default_rng([SEED, *name.encode()]).standard_normal(shape, dtype=np.float32))


def draw_uniform(name: str, *shape: int) -> Tensor:
    """Float32 numbers from uniform(0, 1), a function of the name."""
    return torch.from_numpy(np.random.default_rng([SEED, *name.encode()]).random(shape, dtype=np.float32))


def network(state: Numbers) -> Numbers:
    """Weights in the names and shapes of `state`, large enough that attention and features vary with the image."""

    def weight(name: str, shape: torch.Size) -> Tensor:
        drawn = draw(name, *shape)
        if len(shape) > 1 and name.endswith("weight"):
            return drawn / shape[1:].numel() ** 0.5
        return (1 + 0.1 * drawn) if "norm" in name and name.endswith("weight") else 0.2 * drawn

    return {name: weight(name, tensor.shape) for name, tensor in state.items()}


def batch(name: str, outputs: range) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S), each with a tint of its own, and labels (B,) among `outputs`."""
    images = 0.5 * draw(f"{name} images", BATCH, 3, SIZE, SIZE) + 1.5 * draw(f"{name} tints", BATCH, 3, 1, 1)
    labels = np.random.default_rng([SEED, *f"{name} labels".encode()]).integers(outputs.start, outputs.stop, BATCH)
    return images, torch.from_numpy(labels)


def outputs(task: int) -> range:
    return range(SPLIT[task], SPLIT[task + 1])


def batches(task: int) -> list[tuple[Tensor, Tensor]]:
    return [batch(f"task {task} batch {i}", outputs(task)) for i in range(BATCHES)]


def rows() -> tuple[Tensor, Tensor]:
    """Classifier weight (outputs, D) and bias (outputs,)."""
    return 0.1 * draw("classifier weight", SPLIT[-1], WIDTH), 0.1 * draw("classifier bias", SPLIT[-1])


def pool(case: Case) -> Numbers:
    """Prompts, keys, ... of the whole pool, each (blocks, pool, ...); general prompts (blocks, length, D)."""
    size, length = int(case.param[0]), int(case.param[1])
    shapes = {name: (len(case.blocks), size, *((length,) if name == "prompts" else ()), WIDTH) for name in case.own}
    if "general" in shapes:
        shapes["general"] = (len(GENERAL_BLOCKS), int(case.param[2]), WIDTH)
    name = f"{case.learner} {len(case.blocks)}"
    if case.method == "coda_prompt":
        return {k: 0.3 * draw(f"{name} {k}", *shape) for k, shape in shapes.items()}
    return {k: draw_uniform(f"{name} {k}", *shape) for k, shape in shapes.items()}


def component_draws(kind: str, task: int, block: int) -> Tensor:
    """The normal numbers from which a task's components of CODA-P are made, (SHARE, d)."""
    return draw(f"components {kind} {task} {block}", SHARE, 4 * WIDTH if kind == "prompts" else WIDTH)


def of_task(case: Case, name: str, whole: Tensor, task: int) -> Tensor:
    """What `task` trains of a tensor of the whole pool."""
    if case.method == "l2p" or name == "general":
        return whole
    share = SHARE if case.method == "coda_prompt" else 1
    return whole[:, task * share : (task + 1) * share]


def begun(case: Case, name: str, whole: Tensor) -> Tensor:
    """What the first two tasks train of a tensor of the whole pool."""
    if case.method == "l2p" or name == "general":
        return whole
    return torch.cat([of_task(case, name, whole, t) for t in (0, 1)], dim=1)


# --- their side -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def public_code(root: Path) -> Iterator[tuple[Any, Any]]:
    """(models.zoo, learners.prompt) of the checkout, on a machine without a GPU and with a timm of today."""
    shims = {name: types.ModuleType(name) for name in ("registry", "layers", "helpers")}
    for name, members in {
        "registry": {"register_model": timm.models.register_model},
        "layers": {"trunc_normal_": timm.layers.trunc_normal_, "DropPath": timm.layers.DropPath},
        "helpers": {
            "named_apply": timm.models.named_apply,
            "adapt_input_conv": getattr(timm.models, "adapt_input_conv", None),
        },
    }.items():
        vars(shims[name]).update(members)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in shims.items():
            patch.setitem(sys.modules, f"timm.models.{name}", module)
        for name in [m for m in sys.modules if m.split(".")[0] in ("models", "utils", "learners")]:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(root))
        # clone: their running sum of losses is a leaf that a move to the GPU would have copied
        patch.setattr(Tensor, "cuda", lambda self, *args, **kwargs: self.clone())
        try:
            yield importlib.import_module("models.zoo"), importlib.import_module("learners.prompt")
        finally:
            for name in [m for m in sys.modules if m.split(".")[0] in ("models", "utils", "learners")]:
                del sys.modules[name]


class Theirs:
    """A learner of the public code on the small ViT."""

    def __init__(self, case: Case, zoo: Any, learners: Any) -> None:
        self.case = case
        kind = {"L2P": zoo.L2P, "DualPrompt": zoo.DualPrompt, "CODAPrompt": zoo.CodaPrompt}[case.learner]

        class Small(zoo.ViTZoo):  # type: ignore[name-defined, misc]
            """Their model, but for the size that they fix."""

            def __init__(self) -> None:
                nn.Module.__init__(self)
                self.prompt_flag, self.task_id = case.learner, None
                self.prompt = kind(WIDTH, len(SPLIT) - 1, list(case.param), key_dim=WIDTH)
                self.last = nn.Linear(WIDTH, SPLIT[-1])
                self.feat = zoo.VisionTransformer(
                    img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS
                )

        class Learner(getattr(learners, case.learner)):  # type: ignore[misc]
            """Their learner, which also notes its losses."""

            def create_model(self) -> nn.Module:
                self.noted: list[Tensor] = []
                return Small()

            def update_model(self, inputs: Tensor, targets: Tensor) -> Any:
                loss, logits = super().update_model(inputs, targets)
                self.noted.append(loss)
                return loss, logits

        with self._draws(0):
            self.learner = Learner(
                {
                    "prompt_param": [len(SPLIT) - 1, list(case.param)],
                    "out_dim": SPLIT[-1],
                    "overwrite": True,
                    "batch_size": BATCH,
                    "tasks": [list(outputs(t)) for t in range(3)],
                    "top_k": 1,
                    "memory": 0,
                    "DW": False,
                    "gpuid": [-1],
                    "schedule_type": "cosine",
                    "schedule": [EPOCHS],
                    "optimizer": "Adam",
                    "lr": LR,
                    "momentum": 0.9,
                    "weight_decay": 0,
                }
            )
        self.model = self.learner.model
        self.model.feat.load_state_dict(network(self.model.feat.state_dict()))
        with torch.no_grad():
            for own, drawn in zip((self.model.last.weight, self.model.last.bias), rows(), strict=True):
                own.copy_(drawn)

    @contextlib.contextmanager
    def _draws(self, task: int) -> Iterator[None]:
        """Hands the drawn numbers to their Gram-Schmidt, row by row in the order in which it asks."""
        kinds = ("prompts", "keys", "attention") if task == 0 else ("keys", "attention", "prompts")
        asked = iter([row for b in self.case.blocks for kind in kinds for row in component_draws(kind, task, b)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda like: next(asked))
            yield
        assert self.case.method != "coda_prompt" or next(asked, None) is None

    def _parameters(self, name: str) -> list[nn.Parameter]:
        blocks = GENERAL_BLOCKS if name == "general" else self.case.blocks
        return [getattr(self.model.prompt, f"{LETTERS[name]}_{b}") for b in blocks]

    def whole(self, name: str, gradient: bool = False) -> Tensor:
        """A tensor of the whole pool, or its gradient."""
        return torch.stack([p.grad if gradient else p.detach() for p in self._parameters(name)]).clone()

    def fill(self, values: Numbers) -> None:
        """Sets prompts, keys, ... of the whole pool."""
        with torch.no_grad():
            for name, value in values.items():
                for own, drawn in zip(self._parameters(name), value, strict=True):
                    own.copy_(drawn)

    def begin(self, task: int) -> None:
        """What their trainer does before a task."""
        self.model.task_id = task
        self.learner.add_valid_output_dim(len(outputs(task)))
        if task > 0:
            with self._draws(task):
                self.model.prompt.process_task_count()

    def evaluate(self) -> Tensor:
        """Logits of the outputs seen so far."""
        images, _ = batch("evaluation", range(SPLIT[-1]))
        with torch.no_grad():
            return self.model(images)[:, : self.learner.valid_out_dim].clone()

    def one_pass(self) -> Numbers:
        """One training batch of the second task, everything drawn."""
        case, learner = self.case, self.learner
        for task in (0, 1):
            self.begin(task)
        learner.last_valid_out_dim = SPLIT[1]
        learner.data_weighting(None)
        learner.init_optimizer()
        self.fill(pool(case))
        out = {"evaluation logits": self.evaluate()}
        images, labels = batches(1)[0]
        _, penalty = self.model(images, train=True)
        total, masked = learner.update_model(images, labels)
        assert bool(torch.isneginf(masked[:, : SPLIT[1]]).all())
        out["training logits"] = masked[:, SPLIT[1] :].detach()
        out["cross entropy"] = learner.criterion(masked.detach(), labels, torch.ones(BATCH))
        if penalty.count_nonzero():
            out[case.penalty] = penalty.detach().sum()
        out["total loss"] = total
        gradients = {name: self.whole(name, gradient=True) for name in case.own}
        gradients["classifier"] = torch.cat([self.model.last.weight.grad, self.model.last.bias.grad[:, None]], dim=1)
        for name, gradient in gradients.items():
            now = gradient[SPLIT[1] : SPLIT[2]] if name == "classifier" else of_task(case, name, gradient, 1)
            # what the task does not own gets no gradient there either
            assert gradient.count_nonzero() == now.count_nonzero()
            out[f"gradient of {name}"] = now
        return out

    def steps(self) -> Numbers:
        """Two tasks of ten steps, as their trainer takes them."""
        out: Numbers = {}
        if self.case.method != "coda_prompt":
            self.fill(pool(self.case))
        for task in (0, 1):
            self.begin(task)
            if self.case.method == "coda_prompt":
                for name in self.case.own:
                    out[f"start of {name}, task {task + 1}"] = of_task(self.case, name, self.whole(name), task)
            loader = [(images, labels, task) for images, labels in batches(task)]
            self.learner.learn_batch(loader, None, "")
            out[f"evaluation logits after task {task + 1}"] = self.evaluate()
        out["losses"] = torch.stack(self.learner.noted)
        for name in self.case.own:
            out[f"final {name}"] = begun(self.case, name, self.whole(name))
        weight, bias = self.model.last.weight.detach(), self.model.last.bias.detach()
        out["final classifier"] = torch.cat([weight, bias[:, None]], dim=1)[: SPLIT[2]]
        untouched = torch.cat([rows()[0], rows()[1][:, None]], dim=1)[SPLIT[2] :]
        assert torch.equal(torch.cat([weight, bias[:, None]], dim=1)[SPLIT[2] :], untouched)
        return out


def theirs(case: Case, root: Path) -> Numbers:
    """All numbers of the public code."""
    with public_code(root) as (zoo, learners):
        return {**Theirs(case, zoo, learners).one_pass(), **Theirs(case, zoo, learners).steps()}


# --- our side ---------------------------------------------------------------------------------------------------------


class Ours:
    """A run of the suite on the same ViT."""

    def __init__(self, case: Case, folder: Path, quirks: tuple[str, ...]) -> None:
        self.case = case
        preset = folder / "parity.yaml"
        preset.write_text(
            f"""
domain: classification
data: {{name: image-folder, root: {json.dumps(str(folder))}}}
stream: {{tasks: 3, class_order: natural}}
train: {{epochs: {EPOCHS}, batch_size: {BATCH}, optimizer: adam, schedule: coda, drop_last: true}}
input: {{workers: 0, augment: none, preprocess: none}}
backbone:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {{img_size: {SIZE}, patch_size: {PATCH}, embed_dim: {WIDTH}, depth: {DEPTH}, num_heads: {HEADS}}}
"""
        )
        sets = [*case.options, f"method.lr={LR}", f"method.head_lr={LR}"]
        resolved = resolve(str(preset), case.method, [*sets, f"method.reference_quirks={json.dumps(quirks)}"])
        labels = np.arange(SPLIT[-1])
        none = ArrayImages(np.zeros((SPLIT[-1], SIZE, SIZE, 3), dtype=np.uint8))  # the batches are given, not loaded
        images = ImageSet(tuple(map(str, labels)), labels, none, "none")
        data = ClassData("parity", tuple(f"class {i}" for i in labels), images, images, "parity", "none")
        domain = Classification(resolved, torch.device("cpu"), data=data)
        domain.model.load_state_dict(network(domain.model.state_dict()))
        assert [t.outputs for t in domain.stream.tasks] == [outputs(t) for t in range(3)]
        self.run = Run(resolved, RunFolder(folder), Reporter(quiet=True), domain=domain)
        self.domain, self.method = domain, self.run.method

    def begin(self, task: int) -> list[nn.Parameter]:
        """Begins a task with the drawn classifier rows."""
        shared = self.run.begin(task)
        self.domain.set_output_rows(task, *(part[outputs(task).start : outputs(task).stop] for part in rows()))
        return shared

    def fill(self, values: Numbers, task: int) -> None:
        """Sets what `task` trains from tensors of the whole pool."""
        with torch.no_grad():
            for name, own in self.case.own.items():
                parameter = getattr(self.method, own)
                parameter.copy_(of_task(self.case, name, values[name], task).reshape(parameter.shape))

    def evaluate(self) -> Tensor:
        """Logits of the outputs seen so far."""
        return self.domain.predict(batch("evaluation", range(SPLIT[-1]))[0])

    def one_pass(self) -> Numbers:
        """One training batch of the second task, everything drawn."""
        case, method, values = self.case, self.method, pool(self.case)
        for task in (0, 1):
            self.begin(task)
            if case.method != "l2p" or task == 0:
                self.fill(values, task)
        if "future_experts" in method.config.reference_quirks:
            method.future_prompts.copy_(values["prompts"][:, 2:])
            method.future_keys.copy_(values["keys"][:, 2:])
        out = {"evaluation logits": self.evaluate()}
        seen: list[Tensor] = []
        hook = self.domain.heads[1].register_forward_hook(lambda module, given, logits: seen.append(logits.detach()))
        loss = method.loss(as_batch(*batches(1)[0]))
        penalty = method.penalty()
        hook.remove()
        total = loss if penalty is None else loss + penalty
        total.backward()
        out["training logits"] = seen[0]
        out["cross entropy"] = loss.detach()
        if penalty is not None:
            out[case.penalty] = penalty.detach()
        out["total loss"] = total.detach()
        for name, own in case.own.items():
            gradient = getattr(method, own).grad
            out[f"gradient of {name}"] = gradient.reshape(of_task(case, name, values[name], 1).shape)
        head = self.domain.heads[1]
        out["gradient of classifier"] = torch.cat([head.weight.grad, head.bias.grad[:, None]], dim=1)
        return out

    def steps(self, starts: Numbers) -> Numbers:
        """Two tasks of ten steps by the runner; CODA-P's components start as the public code made them (`starts`)."""
        case, method, run, out, losses = self.case, self.method, self.run, {}, []
        values = pool(case)
        for task in (0, 1):
            shared = self.begin(task)
            if case.method == "coda_prompt":
                self._start_components(task, starts, out)
            elif case.method != "l2p" or task == 0:
                self.fill({**values, "general": method.general} if task and "general" in values else values, task)
            if "future_experts" in method.config.reference_quirks:
                method.future_prompts.copy_(values["prompts"][:, task + 1 :])
                method.future_keys.copy_(values["keys"][:, task + 1 :])
            optimizer = make_optimizer(run.train, run.groups(shared), run.device)
            for step in range(EPOCHS * BATCHES):
                given = as_batch(*batches(task)[step % BATCHES])
                value, _ = run.step(given, optimizer, lr_factor(run.train, step, BATCHES), f"step {step}")
                losses.append(value)
            method.end_task(task)
            out[f"evaluation logits after task {task + 1}"] = self.evaluate()
        out["losses"] = torch.tensor(losses)
        for name, own in case.own.items():
            last, past = getattr(method, own).detach(), getattr(method, f"past_{name}", None)
            if past is not None:
                last = torch.cat([past, last.reshape(past.shape[0], -1, *past.shape[2:])], dim=1)
            out[f"final {name}"] = last.clone()
        state = self.domain.state_dict()
        out["final classifier"] = torch.cat(
            [torch.cat([state[f"heads.{t}.weight"], state[f"heads.{t}.bias"][:, None]], dim=1) for t in (0, 1)]
        )
        return out

    def _start_components(self, task: int, starts: Numbers, out: Numbers) -> None:
        """Makes the components from the drawn numbers, then goes on from the public code's own."""
        for name, own in self.case.own.items():
            past, parameter = getattr(self.method, f"past_{name}"), getattr(self.method, own)
            made = [
                projected_rows(component_draws(name, task, b).double(), past[i].flatten(1))
                for i, b in enumerate(self.case.blocks)
            ]
            key = f"start of {name}, task {task + 1}"
            out[key] = torch.stack(made).reshape(parameter.shape).float()
            with torch.no_grad():
                parameter.copy_(starts[key])


def as_batch(images: Tensor, labels: Tensor) -> Batch:
    """A batch as the loader makes them."""
    return Batch(images, labels, torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.bool))


def ours(case: Case, folder: Path, quirks: tuple[str, ...], starts: Numbers) -> Numbers:
    """All numbers of the suite."""
    return {**Ours(case, folder, quirks).one_pass(), **Ours(case, folder, quirks).steps(starts)}


# --- comparison -------------------------------------------------------------------------------------------------------


def with_changes(case: Case, numbers: Numbers, starts: Numbers) -> Numbers:
    """Adds what the steps changed: end less start."""
    start = {"classifier": torch.cat([rows()[0], rows()[1][:, None]], dim=1)[: SPLIT[2]]}
    for name in case.own:
        if case.method == "coda_prompt":
            start[name] = torch.cat([starts[f"start of {name}, task {t}"] for t in (1, 2)], dim=1)
        else:
            start[name] = begun(case, name, pool(case)[name])
    return {**numbers, **{f"change of {name}": numbers[f"final {name}"] - begin for name, begin in start.items()}}


def limit(quantity: str) -> float:
    """The largest relative difference that passes."""
    if quantity.startswith("change"):
        return CHANGES
    return TRAJECTORY if quantity.startswith(("final", "losses")) or " after " in quantity else VALUES


def compare(
    case: Case, folder: Path, public: Numbers, quirks: tuple[str, ...], relative_difference: Callable[[Any, Any], float]
) -> dict[str, float]:
    """The relative difference of every quantity."""
    mine = with_changes(case, ours(case, folder, quirks, public), public)
    other = with_changes(case, public, public)
    assert mine.keys() == other.keys()
    return {name: relative_difference(mine[name], other[name]) for name in other}


def table(found: dict[str, tuple[dict[str, float], dict[str, float]]]) -> str:
    """Markdown: differences of every quantity and method with the quirks, and those beyond the limit without."""
    names = sorted(
        {name for on, _ in found.values() for name in on}, key=lambda n: (limit(n), not n.startswith("start"), n)
    )
    lines = ["| quantity | limit | " + " | ".join(CASES[key].label for key in found) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(found))
    for name in names:
        cells = [f"{on[name]:.1e}" if name in on else "-" for on, _ in found.values()]
        lines.append(f"| {name} | {limit(name):.0e} | {' | '.join(cells)} |")
    lines += ["", "Without the quirks these differ by more than their limit, and nothing else does:", ""]
    lines += ["| method | quantity | difference without the quirks |", "| --- | --- | ---: |"]
    for key, (_, off) in found.items():
        lines += [f"| {CASES[key].label} | {n} | {v:.1e} |" for n, v in off.items() if v > limit(n)]
    return "\n".join(lines)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(checkout: Callable[[str, str], Path]) -> Path:
    return checkout(VARIABLE, REPOSITORY)


@pytest.fixture(scope="module")
def live(root: Path) -> dict[str, Numbers]:
    """Everything that the public code gives, by case."""
    return {key: theirs(case, root) for key, case in CASES.items()}


@pytest.mark.reference
@pytest.mark.parametrize("key", list(CASES))
def test_live(
    key: str, live: dict[str, Numbers], tmp_path: Path, relative_difference: Callable[[Any, Any], float]
) -> None:
    found = compare(CASES[key], tmp_path, live[key], CASES[key].quirks, relative_difference)
    assert {name: value for name, value in found.items() if value > limit(name)} == {}


@pytest.mark.reference
def test_live_code_leaves_a_remainder_of_the_pool_unused(root: Path) -> None:
    config = CodaPromptConfig(pool=7, reference_quirks=("drop_remainder",))
    with public_code(root) as (zoo, _):
        prompt = zoo.CodaPrompt(WIDTH, 3, [7, 4, 0.0], key_dim=WIDTH)
        for task in range(3):
            if task:
                prompt.process_task_count()
            made = int(prompt.e_k_0.detach().abs().sum(dim=1).count_nonzero())
            assert made == sum(config.share(t, 3) for t in range(task + 1))
    assert sum(CodaPromptConfig(pool=7).share(t, 3) for t in range(3)) == 7


@pytest.mark.reference
def test_live_outputs_are_stored_on_demand(
    writes_reference: bool,
    live: dict[str, Numbers],
    root: Path,
    tmp_path: Path,
    relative_difference: Callable[[Any, Any], float],
    store: Callable[..., None],
    write_table: Callable[[str, str], None],
) -> None:
    if not writes_reference:
        pytest.skip("stores only with --write-reference")
    digest = hashlib.sha256()
    for file in ("models/zoo.py", "models/vit.py", "learners/default.py", "learners/prompt.py", "utils/schedulers.py"):
        digest.update((root / file).read_bytes())
    metadata = {
        "repository": REPOSITORY,
        "commit": COMMIT,
        "sources_sha256": digest.hexdigest(),
        "seed": SEED,
        "versions": {m.__name__: m.__version__ for m in (torch, timm, np)},
    }
    store("prompts", {f"{key}/{name}": t for key, numbers in live.items() for name, t in numbers.items()}, metadata)
    found = {
        key: tuple(compare(case, tmp_path, live[key], quirks, relative_difference) for quirks in (case.quirks, ()))
        for key, case in CASES.items()
    }
    write_table("prompts", table(found))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def public(stored: Callable[[str], tuple[Numbers, dict[str, str]]]) -> dict[str, Numbers]:
    """What the public code gave, by case."""
    tensors, metadata = stored("prompts")
    assert metadata["seed"] == str(SEED)
    return {
        key: {name.removeprefix(f"{key}/"): t for name, t in tensors.items() if name.startswith(f"{key}/")}
        for key in CASES
    }


@pytest.mark.parametrize("key", list(CASES))
def test_stored(
    key: str, public: dict[str, Numbers], tmp_path: Path, relative_difference: Callable[[Any, Any], float]
) -> None:
    found = compare(CASES[key], tmp_path, public[key], CASES[key].quirks, relative_difference)
    assert {name: value for name, value in found.items() if value > limit(name)} == {}


@pytest.mark.parametrize(
    ("key", "quantities"),
    [
        ("l2p", {"key loss", "total loss", "gradient of keys"}),
        ("l2p_deep", {"key loss", "total loss", "gradient of keys"}),
        ("dualprompt", {"key loss", "total loss", "gradient of keys", "evaluation logits"}),
        ("coda_prompt_0.1", set()),
    ],
)
def test_without_the_quirks_one_pass_differs_where_it_should(
    key: str,
    quantities: set[str],
    public: dict[str, Numbers],
    tmp_path: Path,
    relative_difference: Callable[[Any, Any], float],
) -> None:
    mine = Ours(CASES[key], tmp_path, ()).one_pass()
    found = {name: relative_difference(mine[name], public[key][name]) for name in mine}
    assert {name for name, value in found.items() if value > 0.01} == quantities
    assert all(value <= VALUES for name, value in found.items() if name not in quantities)


@pytest.mark.parametrize("key", ["l2p", "l2p_deep", "dualprompt"])
def test_the_drawn_images_choose_differently(key: str, tmp_path: Path) -> None:
    """Else a wrong choice, or one for the whole batch, would pass."""
    case = CASES[key]
    suite = Ours(case, tmp_path, case.quirks)
    suite.one_pass()
    facts = suite.method.diagnostics()
    use = facts["prompt_use_in_evaluation"] if case.method == "l2p" else facts["expert_choice_in_evaluation"]
    per_sample = 5 if case.method == "l2p" else 1
    assert all(sum(counts) == BATCH * per_sample for counts in use.values())
    assert all(sum(0 < n < BATCH for n in counts) >= 2 for counts in use.values()), use
