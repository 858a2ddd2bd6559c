"""The contract between method and domain: what used to give wrong numbers, and what a pass may be given."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.domain import Images
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains.kept_features import KeptNetwork
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.methods import available_methods, method_class
from dualcl.methods.base import Method, ParamGroup, register_method

RANDOM_RIDGE = Path(__file__).with_name("random_ridge.py")
SHORT = ("train.epochs=1", "stream.tasks=2")
HOOKS = ("begin_task", "prepare", "loss", "penalty", "stepped", "end_task", "features", "scores", "diagnostics")


def executed(resolved: Any, folder: Path, record: dict[str, Any]) -> Run:
    work = Run(resolved, RunFolder(folder), Reporter(quiet=True))
    work.execute(record)
    return work


# --- the five faults --------------------------------------------------------------------------------------------------


class HookedScale(Method):
    """Scales the last norm's output by a learnt vector through a forward hook, as an adapter from outside does."""

    name = "hooked_scale"
    requires = ("features",)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.scale = nn.Parameter(torch.ones(self.domain.network.width))  # type: ignore[attr-defined]
        norm: Any = self.domain.model.norm
        norm.register_forward_hook(lambda module, args, out: out * self.scale)

    def trained(self) -> list[ParamGroup]:
        return [ParamGroup("scale", [self.scale], 1e-2)]


def test_features_under_a_hook_are_those_of_the_hook_and_its_parameter_learns(build: Callable[..., Any]) -> None:
    domain, class_means = build("ncm", "train.epochs=3", "input.augment=flip", "head.init=linear")
    domain.begin_task(0)
    class_means.begin_task(0)
    class_means.end_task(0)
    domain.evaluate([0])  # the features of the frozen network are kept from here on
    method = HookedScale(class_means.config, domain, 3, 0)
    with torch.no_grad():
        method.scale.copy_(torch.where(torch.arange(domain.network.width) % 2 == 0, -1.0, 1.0))
    kept = domain._predictions(0)
    assert domain.evaluate([0]) == domain.evaluate([0])
    domain.network.forget()
    assert all(torch.equal(a, b) for a, b in zip(kept, domain._predictions(0), strict=True))
    method.loss(next(iter(domain.batches(0, 0)))).backward()
    assert method.scale.grad is not None
    assert method.scale.grad.norm() > 0


def test_a_ridge_read_out_is_the_same_in_bfloat16(empty_record: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    """A method from a file: means of three seeds within 0.5 points, at most 2 % of the predictions differ."""
    accuracy, predicted, passes = {}, {}, {}
    for precision in ("fp32", "bf16"):
        for seed in range(3):
            tiny = ("data.classes=10", "stream.tasks=2", "data.train_per_class=20", "method.width=1000")
            sets = [f"precision={precision}", f"seed={seed}", "input.workers=0", "device=cpu", *tiny]
            folder = RunFolder(tmp_path / f"{precision}{seed}")
            work = Run(resolve("glyphs", str(RANDOM_RIDGE), sets), folder, Reporter(quiet=True))
            dtypes: set[torch.dtype] = set()
            for block in work.domain.model.blocks:  # type: ignore[union-attr]
                block.mlp.fc1.register_forward_hook(lambda module, args, out, seen=dtypes: seen.add(out.dtype))  # type: ignore[union-attr, operator]
            row = work.execute(empty_record())["matrix"]["rows"][-1]
            accuracy[precision, seed] = 100 * sum(row["correct"]) / sum(row["total"])
            domain: Any = work.domain
            predicted[precision, seed] = torch.cat([p for t in range(work.n_tasks) for p in domain._predictions(t)])
            passes[precision, seed] = dtypes
            assert domain.stored_parameters() == 0
    assert all(passes["fp32", s] == {torch.float32} and passes["bf16", s] == {torch.bfloat16} for s in range(3))
    mean = {p: sum(accuracy[p, s] for s in range(3)) / 3 for p in ("fp32", "bf16")}
    print(f"random_ridge, A_last of seeds 0, 1, 2: {accuracy}")
    assert mean["fp32"] > 40
    assert abs(mean["fp32"] - mean["bf16"]) <= 0.5
    differ = [float((predicted["fp32", s] != predicted["bf16", s]).float().mean()) for s in range(3)]
    assert max(differ) <= 0.02, differ


class ClassGaussians(Method):
    """What SLCA keeps of its classes, as buffers of full size; a counter, and a buffer that is no state."""

    name = "class_gaussians"
    requires = ("features",)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        domain: Any = self.domain
        classes, d = sum(len(domain.outputs(t)) for t in range(3)), domain.network.width
        self.register_buffer("means", torch.zeros(classes, d))
        self.register_buffer("covariances", torch.zeros(classes, d, d))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(d), persistent=False)
        self.scale = nn.Parameter(torch.zeros(3))
        self.again = self.scale


def test_buffers_count_as_stored_once_each(build: Callable[..., Any]) -> None:
    domain, other = build("ncm")
    method = ClassGaussians(other.config, domain, 3, 0)
    assert method.stored_parameters() == 7 * 32 + 7 * 32 * 32 + 3


def test_what_a_method_does_before_and_after_its_steps_is_on_the_clock(
    tiny: Callable[..., Any],
    empty_record: Callable[[], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls: Any = method_class("ewc")
    spent: dict[str, list[float]] = {"prepare": [], "end_task": []}
    for name, found in spent.items():
        plain = getattr(cls, name)

        def timed(self: Any, task: int, plain: Any = plain, found: list[float] = found) -> None:
            start = time.monotonic()
            plain(self, task)
            time.sleep(0.05)
            found.append(time.monotonic() - start)

        monkeypatch.setattr(cls, name, timed)
    record = empty_record()
    executed(tiny("ewc", *SHORT), tmp_path, record)
    tasks = record["measured"]["tasks"]
    for task, before, after in zip(tasks, spent["prepare"], spent["end_task"], strict=True):
        assert task["begin_seconds"] >= before
        assert task["end_seconds"] >= after
        assert task["train_seconds"] >= task["begin_seconds"] + task["end_seconds"]
    told = record["measured"]["wall_seconds"]
    assert told == pytest.approx(sum(t["train_seconds"] + t["eval_seconds"] for t in tasks))


def test_a_method_hears_of_each_step_and_of_ends_of_epochs(
    tiny: Callable[..., Any],
    empty_record: Callable[[], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[bool] = []
    monkeypatch.setattr(method_class("linear_probe"), "stepped", lambda self, ended: heard.append(ended))
    executed(tiny("linear_probe", "train.epochs=2"), tmp_path, empty_record())
    assert heard == 2 * [False, False, True] + 4 * [False, True]


# --- precision --------------------------------------------------------------------------------------------------------

CASES = [(domain, name) for name, info in available_methods().items() for domain in info.domains]


@pytest.mark.parametrize(("domain", "name"), CASES)
def test_the_network_alone_runs_in_reduced_precision(
    domain: str,
    name: str,
    tiny: Callable[..., Any],
    concepts: Callable[..., Run],
    empty_record: Callable[[], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls: Any = method_class(name)
    called = set()
    for hook in HOOKS:
        plain = getattr(cls, hook)

        def watched(self: Any, *given: Any, plain: Any = plain, hook: str = hook) -> Any:
            called.add(hook)
            assert not torch.is_autocast_enabled("cpu"), f"{hook} is called under autocast"
            out = plain(self, *given)
            assert not isinstance(out, torch.Tensor) or out.dtype == torch.float32, f"{hook} gives {out.dtype}"
            return out

        monkeypatch.setattr(cls, hook, watched)
    if domain == "classification":
        work = Run(tiny(name, *SHORT, "precision=bf16"), RunFolder(tmp_path), Reporter(quiet=True))
        inside: Any = work.domain.model.blocks[1].mlp.fc1  # type: ignore[union-attr, index]
    else:
        work = concepts(name, tmp_path, "precision=bf16")
        inside = work.domain.model.get_submodule(next(iter(work.domain.sites().values())).module_name)
    seen = set()
    inside.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    work.execute(empty_record())
    assert seen == {torch.bfloat16}
    assert called >= {"begin_task", "prepare", "end_task", "diagnostics"}
    if domain == "classification":
        assert called >= {"features", "scores"}
    assert work.method.takes_steps(0) == ("loss" in called)


# --- side modules -----------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """An adapter of rank 4 that counts the tokens it sees."""

    def __init__(self, seed: int, width: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(4, width, generator=generator) / 6)
        self.up = nn.Parameter(torch.randn(width, 4, generator=generator) / 2)
        self.tokens: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.tokens.append(x.shape[1])
        return torch.relu(x @ self.down.T) @ self.up.T


def by_hand(model: Any, pixels: torch.Tensor, sides: dict[int, Bottleneck]) -> torch.Tensor:
    """A ViT with its blocks written out, all tokens to the end."""
    x = model._pos_embed(model.patch_embed(pixels))
    for i, block in enumerate(model.blocks):
        x = x + block.attn(block.norm1(x))
        side = sides[i](x) if i in sides else 0
        x = x + block.mlp(block.norm2(x)) + side
    return model.norm(x)[:, 0]


@pytest.fixture
def network(build: Callable[..., Any]) -> Callable[..., Any]:
    def make(*sets: str, requires: tuple[str, ...] = ("features", "sides", "prefixes")) -> Any:
        domain, _ = build("ncm", *sets)
        domain.attach(SimpleNamespace(requires=requires, reads_rows=True))
        return domain

    return make


def test_side_modules_are_added_to_what_the_mlp_adds(network: Callable[..., Any]) -> None:
    domain = network()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sides = {1: Bottleneck(1), 4: Bottleneck(2)}
    plain = domain.network(Images(pixels))
    given = domain.network(Images(pixels), sides=sides)
    assert [sides[i].tokens for i in (1, 4)] == [[5], [1]]  # the last block computes the class token alone
    torch.testing.assert_close(given, by_hand(copy.deepcopy(domain.model), pixels, sides), rtol=1e-5, atol=1e-5)
    assert (given - plain).abs().max() > 0.01
    assert torch.equal(domain.network(Images(pixels)), plain)  # what a pass adds is gone with it
    grads = torch.autograd.grad(given.square().sum(), [p for i in (1, 4) for p in sides[i].parameters()])
    assert all(g.abs().max() > 0 for g in grads)


def test_passes_of_one_loss_have_their_own_additions_under_checkpointing(network: Callable[..., Any]) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointing, size in (("false", "null"), ("true", "null"), ("true", "1")):
        domain = network(f"backbone.gradient_checkpointing={checkpointing}")
        domain.micro_batch_size = None if size == "null" else int(size)
        one, two = {0: Bottleneck(1), 4: Bottleneck(2)}, {0: Bottleneck(3)}
        keys = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
        first = domain.network(Images(pixels), sides=one)
        second = domain.network(Images(pixels), sides=two, prefixes={2: (keys, keys)})
        params = [keys, *(p for side in (*one.values(), *two.values()) for p in side.parameters())]
        found.append([*torch.autograd.grad((first * second).sum(), params)])
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0], rtol=1e-4, atol=1e-5)


def test_additions_that_were_not_asked_for_and_keys_of_prefixed_passes_are_refused(network: Callable[..., Any]) -> None:
    domain = network(requires=("features",))
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match='a pass with sides needs "sides"'):
        domain.network(Images(pixels), sides={0: Bottleneck(0)})
    with pytest.raises(ValueError, match="a pass with prefixes has no key"):
        domain.network(Images(pixels), prefixes={0: (torch.zeros(1, 1, 32),) * 2}, key="x")


def test_blocks_that_order_their_parts_otherwise_take_no_side_modules(build: Callable[..., Any]) -> None:
    domain, _ = build("ncm")
    domain.model.blocks[2].__class__ = type("ResPostBlock", (type(domain.model.blocks[2]),), {})
    network = KeptNetwork(domain.model, domain, 32)
    with pytest.raises(UserError, match=r"blocks\.2 is a ResPostBlock, which takes no side modules"):
        network.allow(("sides",))


# --- what rivals need -------------------------------------------------------------------------------------------------


@register_method("branched", domains=("classification",), summary="", source="")
class Branched(Method):
    """As EASE: an adapter per task, an image read under all of them, class means for a read-out of its own."""

    requires = ("features", "sides")
    frozen = True
    reads_rows = False

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.task, self.finished = 0, 0
        outputs, width = [self.classifier.outputs(t) for t in range(self.n_tasks)], self.classifier.network.width
        self.adapters = nn.ModuleList(Bottleneck(seed, width) for seed in range(self.n_tasks))
        self.adapters.requires_grad_(False)
        self.head = nn.Parameter(torch.zeros(max(map(len, outputs)), width))
        self.register_buffer("means", torch.zeros(outputs[-1].stop, self.n_tasks, width))

    @property
    def classifier(self) -> Any:
        return self.domain

    def begin_task(self, task: int) -> None:
        self.task = task
        self.adapters.requires_grad_(False)
        self.adapters.zero_grad(set_to_none=True)
        self.adapters[task].requires_grad_(True)
        with torch.no_grad():
            self.head.zero_()

    def trained(self) -> list[ParamGroup]:
        return [ParamGroup("adapter", [*self.adapters[self.task].parameters(), self.head], 0.05)]

    def features(self, images: Images, network: Any) -> torch.Tensor:
        own = [self.task] if images.training else range(self.task + 1)
        sides = [dict.fromkeys(range(network.blocks), self.adapters[i]) for i in own]
        keys = [("adapter", i) if i < self.finished else None for i in own]
        return torch.stack([network(images, sides=s, key=k) for s, k in zip(sides, keys, strict=True)], 1)

    def loss(self, batch: Any) -> torch.Tensor:
        found = self.features(self.classifier.images(batch), self.classifier.network)[:, 0]
        labels = self.classifier.targets(batch) - self.classifier.outputs(self.task).start
        return nn.functional.cross_entropy(found @ self.head.T, labels)

    def end_task(self, task: int) -> None:
        self.finished = task + 1
        pairs = list(self.classifier.training_features(task))
        found, labels = torch.cat([f for f, _ in pairs]), torch.cat([y for _, y in pairs])
        assert found.shape[1:] == (task + 1, self.classifier.network.width)
        for output in self.classifier.outputs(task):
            self.means[output, : task + 1] = found[labels == output].mean(0)

    def restored(self, finished: int) -> None:
        self.finished = finished

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        seen, n = self.classifier.outputs(self.task).stop, features.shape[1]
        parts = [nn.functional.normalize(x, dim=-1) for x in (features, self.means[:seen, :n])]
        return torch.einsum("bnd,cnd->bc", *parts)


@register_method("aligned", domains=("classification",), summary="", source="")
class Aligned(Method):
    """As SLCA: all rows are set anew after each task, and those before alignment come back when the next one begins."""

    requires = ("features",)
    frozen = True
    rewrites_rows = True

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        domain: Any = self.domain
        self.register_buffer("unaligned", torch.zeros(domain.outputs(self.n_tasks - 1).stop, domain.network.width + 1))

    def begin_task(self, task: int) -> None:
        domain: Any = self.domain
        for j in range(task):
            at = domain.outputs(j)
            domain.set_output_rows(j, self.unaligned[at.start : at.stop, :-1], self.unaligned[at.start : at.stop, -1])

    def end_task(self, task: int) -> None:
        domain: Any = self.domain
        at = domain.outputs(task)
        weight, bias = domain.output_rows(task)
        self.unaligned[at.start : at.stop] = torch.cat([weight, bias[:, None]], 1)
        for j in range(task + 1):
            weight, bias = domain.output_rows(j)
            domain.set_output_rows(j, weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-6), 0 * bias)


@pytest.mark.parametrize("name", ["branched", "aligned"])
def test_rivals_with_branches_and_with_rows_that_are_set_anew_keep_every_promise(name: str, tmp_path: Path) -> None:
    """As files from outside, by `dualcl check`."""
    cls: Any = {"branched": Branched, "aligned": Aligned}[name]
    text = "from __future__ import annotations\nfrom typing import Any\nimport torch\nfrom torch import nn\n"
    text += "from dualcl.benchmark.core.domain import Images\n"
    text += "from dualcl.methods.base import Method, ParamGroup, register_method\n\n"
    parts = [Bottleneck, cls] if name == "branched" else [cls]
    file = tmp_path / f"{name}.py"
    file.write_text(text + "\n\n".join(inspect.getsource(part) for part in parts), encoding="utf-8")
    assert main(["check", str(file)]) == 0


def test_finished_branches_are_computed_once(build: Callable[..., Any]) -> None:
    domain, other = build("ncm")
    method = Branched(other.config, domain, 3, 0)
    passes: list[int] = []
    domain.model.patch_embed.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    for task in range(3):
        domain.begin_task(task)
        method.begin_task(task)
        method.loss(next(iter(domain.batches(task, 0)))).backward()
        method.end_task(task)
        passes.clear()
        row = domain.evaluate(range(task + 1))
    # task 2: nine, six and six images under three adapters; the first two tasks' under the first two were kept
    kept = 2 * (9 + 6)
    assert sum(passes) == 3 * (9 + 6 + 6) - kept + 2 * 4  # and a batch of each key that was kept, to compare bits
    assert row == domain.evaluate(range(3))
    assert domain.stored_parameters() == 0


# --- names that went --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "successor"),
    [
        ({"takes_steps": False}, r"takes_steps is a method now: takes_steps\(self, task\)"),
        ({"set_prefix_provider": lambda self: None}, r"is features\(self, images, network\) now"),
        ({"requires": ("prefix",)}, '"prefix" is "prefixes" now'),
    ],
)
def test_the_old_contract_is_answered_in_one_line(body: dict[str, Any], successor: str) -> None:
    with pytest.raises(UserError, match=successor) as caught:
        type("Old", (Method,), body)
    assert "\n" not in str(caught.value)
