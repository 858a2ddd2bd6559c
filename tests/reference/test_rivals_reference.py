"""Classification methods against their public code, see README.md here.

`rivals_recorder.py` runs the public code from a checkout; what it gave is stored (`rivals/NAME.safetensors`). Ours gets
the same features or images, weights, adapters and random numbers, and the options that follow the public code's habits.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.domain import Images
from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.benchmark.runs.step import lr_factor, make_optimizer
from dualcl.datasets.base import ArrayImages, ClassData, ImageSet
from dualcl.datasets.reading.loader import Batch
from dualcl.methods import method_class
from dualcl.methods.fecam import correlations
from dualcl.methods.shared.symmetric import unpack

_spec = importlib.util.spec_from_file_location("rivals_recorder", Path(__file__).with_name("rivals_recorder.py"))
assert _spec is not None
assert _spec.loader is not None
theirs = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = theirs
_spec.loader.exec_module(theirs)

LIMIT = 1e-5
Numbers = dict[str, Tensor]
Patch = pytest.MonkeyPatch


class Features:
    """A domain whose images are features: what the methods that read nothing else ask for."""

    name = "classification"
    capabilities = ("features",)
    device = torch.device("cpu")

    def __init__(self, width: int, tasks: list[range], given: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self.ranges, self.given, self.trained_rows = tasks, given, {}  # type: ignore[var-annotated]

        def network(images: Images, **rest: Any) -> Tensor:
            return images.pixels

        self.network: Any = network
        self.network.width = width

    def attach(self, method: Any) -> None:
        self.method = method

    def outputs(self, task: int) -> range:
        return self.ranges[task]

    def read(self, x: Tensor) -> Tensor:
        features: Tensor = self.method.features(Images(x), self.network)
        return features

    def training_features(self, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.given(task)
        return iter(zip(self.read(x).split(16), y.split(16), strict=True))

    def output_rows(self, task: int) -> tuple[Tensor, Tensor]:
        return self.trained_rows[task]

    def rows(self, features: Tensor) -> Tensor:
        weight, bias = (torch.cat(parts) for parts in zip(*self.trained_rows.values(), strict=True))
        return torch.nn.functional.linear(features, weight, bias)


def drawn(width: int, features: Callable[[list[int], str], tuple[Tensor, Tensor]]) -> Any:
    """The domain of the three tasks' drawn features."""
    outputs = [theirs.outputs(task) for task in range(3)]
    return Features(width, outputs, lambda task: features(list(outputs[task]), "train"))


def last_fifth(labels: Tensor, generator: Any) -> Tensor:
    """Held out as theirs: the last fifth of what their shuffling gave, not a fifth of each class."""
    return torch.arange(len(labels)) >= int(0.8 * len(labels))


def built(name: str, domain: Any, n_tasks: int, **options: Any) -> Any:
    """The method on a domain."""
    cls = method_class(name)
    return cls(cls.Config(**options), domain, n_tasks, 0)


# --- RanPAC -----------------------------------------------------------------------------------------------------------


def ranpac(patch: Patch, quirks: bool, folder: Path, own: tuple[str, ...] = ()) -> Numbers:
    domain = drawn(theirs.RANPAC_D, theirs.ranpac_features)
    method = built("ranpac", domain, 3, width=theirs.RANPAC_M, reference_quirks=own)
    method.layer = theirs.ranpac_layer()
    patch.setattr("dualcl.methods.ranpac.held_out", last_fifth)
    errors = theirs.noted(patch, sys.modules["dualcl.methods.shared.ridge"], "ridge_errors")
    out: Numbers = {}
    for task in range(3):
        method.begin_task(task)
        method.end_task(task)
        out[f"{task}/logits"] = method.scores(domain.read(theirs.ranpac_features([], "test")[0]))
        out[f"{task}/gram"] = unpack(method.ridge.gram, theirs.RANPAC_M).clone()
        out[f"{task}/cross"] = method.ridge.cross.clone()
        out[f"{task}/solution"] = method.solved[:, : method.seen].clone()
        out[f"{task}/errors"] = errors[-1] * theirs.SIZES[task] / theirs.SPLIT[-1]  # theirs: the mean over all classes
        out[f"{task}/ridge"] = torch.tensor(method.chosen)
    return out


def ranpac_pilot(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    found = ranpac(patch, quirks, folder, ("cosine_scores",) if quirks else ())
    return {key: value for key, value in found.items() if key.endswith(("solution", "logits"))}


# --- FeCAM ------------------------------------------------------------------------------------------------------------


def fecam(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    tasks = [range(0, 10), range(10, 20)]
    kept: list[Tensor] = []

    def ended(**options: Any) -> tuple[Any, Any]:
        domain = Features(theirs.FECAM_D, tasks, lambda task: theirs.fecam_features(task, "train"))
        method = built("fecam", domain, 2, **options)
        for task in range(2):
            method.begin_task(task)
            method.end_task(task)
        return domain, method

    real = correlations
    patch.setattr("dualcl.methods.fecam.correlations", lambda *given: kept.append(real(*given)) or kept[-1])
    domain, method = ended()
    test = torch.cat([theirs.fecam_features(t, "test")[0] for t in range(2)])
    covariances = [method.gaussians.covariance(c) for c in range(4)]
    out = {
        "means": method.gaussians.means,
        "distances": -method.scores(domain.read(test)),
        "correlations": torch.stack(kept),
        "correlations 10": torch.stack([real(c, 10.0, 10.0) for c in covariances]),
    }
    _, method = ended(covariance="common")
    return {**out, "common": unpack(method.common, theirs.FECAM_D)}


# --- SLCA -------------------------------------------------------------------------------------------------------------


def slca(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    domain: Any = drawn(theirs.SLCA_D, theirs.slca_features)
    domain.full_parameters = dict
    own = ("restart_rows", "equal_tasks") if quirks else ()
    options = {"align_epochs": theirs.SLCA_EPOCHS, "align_lr": theirs.SLCA_LR, "reference_quirks": own}
    method = built("slca", domain, 3, **options)
    alignment = sys.modules["dualcl.methods.shared.alignment"]
    losses, out = theirs.noted(patch, alignment, "alignment_loss"), {}  # type: Any, Numbers
    for task in range(3):
        source = theirs.Source(f"slca {task}")
        patch.setattr(torch, "randn", lambda *shape, generator: source.normal(*shape))  # noqa: B023 - used at once
        patch.setattr(torch, "randperm", lambda n, generator: source.order(n))  # noqa: B023
        domain.trained_rows[task] = theirs.slca_rows(task)
        losses.clear()
        method.begin_task(task)
        method.end_task(task)
        if task:
            out[f"{task}/losses"] = torch.stack([v.detach() for v in losses])
        out[f"{task}/rows"] = method.aligner.rows[: theirs.SPLIT[task + 1]].clone()
        out[f"{task}/logits"] = method.scores(theirs.slca_features([0, 4, 6], "test")[0])
    gaussians = method.aligner.gaussians
    out["means"] = gaussians.means
    out["covariances"] = torch.stack([gaussians.covariance(c) + 1e-4 * torch.eye(theirs.SLCA_D) for c in range(7)])
    return out


# --- with a small ViT -------------------------------------------------------------------------------------------------


class Suite:
    """A run of the suite on the drawn ViT and images."""

    def __init__(self, method: str, folder: Path, *sets: str) -> None:
        preset = folder / "parity.yaml"
        kwargs = ", ".join(f"{k}: {v}" for k, v in theirs.VIT.items())
        preset.write_text(
            f"""
domain: classification
data: {{name: image-folder, root: {json.dumps(str(folder))}}}
stream: {{sizes: {list(theirs.SIZES)}, class_order: natural}}
train: {{epochs: {theirs.EPOCHS}, batch_size: {theirs.BATCH}, schedule: constant, optimizer: sgd}}
input: {{workers: 0, augment: none, preprocess: none}}
backbone: {{name: vit_tiny_patch16_224, pretrained: false, kwargs: {{{kwargs}}}}}
"""
        )
        resolved = resolve(str(preset), method, sets)
        parts = []
        for part in ("train", "test"):
            images, labels = theirs.pictures(list(range(7)), part)
            parts.append(ImageSet(tuple(map(str, range(len(labels)))), labels.numpy(), ArrayImages(images), "none"))
        data = ClassData("parity", tuple(f"class {i}" for i in range(7)), *parts, "parity", "none")
        self.domain = Classification(resolved, torch.device("cpu"), data=data)
        self.domain.model.load_state_dict(theirs.weights(self.domain.model.state_dict()))
        self.run = Run(resolved, RunFolder(folder), Reporter(quiet=True), domain=self.domain)
        self.method: Any = self.run.method

    def begin(self, task: int) -> list[Any]:
        """Begins a task with the drawn classifier rows."""
        shared = self.run.begin(task)
        self.domain.set_output_rows(task, *theirs.head_rows(task))
        return shared

    def steps(self, task: int, shared: list[Any]) -> Tensor:
        """The task's steps by the runner; their losses."""
        given, losses = theirs.epoch(task), []
        optimizer = make_optimizer(self.run.train, self.run.groups(shared), self.run.device)
        for step in range(theirs.EPOCHS * len(given)):
            x, y = given[step % len(given)]
            batch = Batch(x, y, torch.arange(len(y)), torch.zeros(len(y), dtype=torch.bool))
            factor = lr_factor(self.run.train, step, len(given))
            losses.append(self.run.step(batch, optimizer, factor, f"step {step}")[0])
        return torch.tensor(losses)

    def logits(self) -> Tensor:
        """Scores of the test images."""
        return self.domain.predict(theirs.pixels(list(range(7)), "test")[0])


def options(**given: Any) -> list[str]:
    """Assignments to the method's options."""
    return [f"method.{name}={json.dumps(value)}" for name, value in given.items()]


def inflora(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    own = ("first_below",) if quirks else ()
    lr = {"lr": theirs.INFLORA_LR, "head_lr": theirs.INFLORA_LR}
    given = options(rank=theirs.RANK, epsilon=theirs.INFLORA_EPSILON, reference_quirks=own, **lr)
    suite, out = Suite("inflora", folder, *given, "train.optimizer=adam", "train.schedule=coda"), {}  # type: Any, Numbers
    method = suite.method
    for task in range(3):
        shared = suite.begin(task)
        method.prepare(task)
        out[f"{task}/b"] = torch.stack([k.B.T @ k.B for _, k, _ in method.readers]).detach()
        before = [u.summed.clone() for _, k, v in method.readers for u in (k, v)]
        out[f"{task}/losses"] = suite.steps(task, shared)
        method.end_task(task)
        after = [u.summed for _, k, v in method.readers for u in (k, v)]
        out[f"{task}/updates"] = torch.stack([b - a for a, b in zip(before, after, strict=True)])
        rests = [method.rest(i) for i in range(theirs.DEPTH)]
        out[f"{task}/left out"] = torch.stack([r @ r.T for r in rests])
        out[f"{task}/complements"] = method.complements.double()
        out[f"{task}/logits"] = suite.logits()
    return out


def sdlora(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    own = ("product_norm", "shared_alpha", "restart_alpha") if quirks else ()
    given = options(rank=theirs.RANK, lr=theirs.SDLORA_LR, head_lr=theirs.SDLORA_LR, reference_quirks=own)
    suite, out = Suite("sdlora", folder, *given), {}  # type: Any, Numbers
    updates = list(suite.method.updates.values())
    for task in range(3):
        shared = suite.begin(task)
        with torch.no_grad():
            for site, update in enumerate(updates):
                update.own_right.copy_(theirs.sdlora_start(task, site))
        out[f"{task}/losses"] = suite.steps(task, shared)
        suite.method.end_task(task)
        at = slice(task * theirs.RANK, (task + 1) * theirs.RANK)
        out[f"{task}/left"] = torch.stack([u.left[:, at] for u in updates])
        out[f"{task}/right"] = torch.stack([u.right[at] for u in updates])
        out[f"{task}/magnitudes"] = suite.method.alphas[0].detach()[: task + 1].clone()
        out[f"{task}/rows"] = theirs.joined(suite.domain.heads)
        out[f"{task}/logits"] = suite.logits()
    return out


def set_sides(sides: Any, task: int) -> None:
    """Sets a stack of bottlenecks."""
    for block, side in enumerate(sides):
        for part, value in theirs.bottleneck(task, block).items():
            with torch.no_grad():
                getattr(side, part).copy_(value)


def one_step(suite: Suite, task: int, out: Numbers) -> None:
    """Loss and gradient of a batch."""
    x, y = theirs.epoch(task)[0]
    loss = suite.method.loss(Batch(x, y, torch.arange(len(y)), torch.zeros(len(y), dtype=torch.bool)))
    penalty = suite.method.penalty()
    loss = loss if penalty is None else loss + penalty
    loss.backward()
    out[f"{task}/loss"] = loss.detach()
    out[f"{task}/gradient"] = torch.stack([side.up.grad for side in suite.method.adapters[-1]])


def ease(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    suite, out = Suite("ease", folder, *options(bottleneck=theirs.SIDE)), {}  # type: Any, Numbers
    for task in range(3):
        suite.begin(task)
        set_sides(suite.method.adapters[-1], task)
        with torch.no_grad():
            suite.method.rows[-1].rows.copy_(theirs.proxy_rows(task, theirs.SIZES[task]))
        one_step(suite, task, out)
        suite.method.end_task(task)
        out[f"{task}/means"] = suite.method.completed.flatten(1)
        out[f"{task}/logits"] = suite.logits()
    return out


def aper(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    suite, out = Suite("aper", folder, *options(bottleneck=theirs.SIDE)), {}  # type: Any, Numbers
    for task in range(3):
        suite.begin(task)
        if task == 0:
            set_sides(suite.method.adapters[0], 0)
            with torch.no_grad():
                suite.method.rows[-1].rows.copy_(theirs.proxy_rows(0, theirs.SIZES[0]))
            one_step(suite, 0, out)
        suite.method.end_task(task)
        out[f"{task}/means"] = suite.method.means[: suite.method.known].flatten(1).clone()
        out[f"{task}/logits"] = suite.logits()
    return out


def alignment_draws(patch: Patch, name: str) -> None:
    """The random numbers of an alignment, as many as the public codes of MOS and TUNA draw."""
    source = theirs.Source(name)
    patch.setattr("dualcl.methods.shared.alignment.DRAWS", theirs.ALIGN_DRAWS)
    patch.setattr(torch, "randn", lambda *shape, generator: source.normal(*shape))
    patch.setattr(torch, "randperm", lambda n, generator: source.order(n))


def mos(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    own = ("feature_loss",) if quirks else ()
    align = {"align_epochs": theirs.ALIGN_EPOCHS, "align_lr": theirs.ALIGN_LR}
    given = options(bottleneck=theirs.SIDE, mixture=0.0, reference_quirks=own, **align)
    suite, out = Suite("mos", folder, *given), {}  # type: Any, Numbers
    for task in range(3):
        suite.begin(task)
        set_sides(suite.method.adapters[-1], task)
        one_step(suite, task, out)
        with patch.context() as drawing:
            alignment_draws(drawing, f"mos {task}")
            suite.method.end_task(task)
        out[f"{task}/rows"] = suite.method.aligner.rows[: theirs.SPLIT[task + 1]].clone()
        out[f"{task}/scores"] = suite.domain.predict(theirs.mos_test())
    object.__setattr__(suite.method.config, "mixture", 0.1)
    suite.method.stepped(False)
    return {**out, "mixture": torch.stack([side.up for side in suite.method.adapters[-1]]).detach()}


def tuna(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    own = ("no_universal", "rising_decay") if quirks else ()
    align = {"align_epochs": 5, "align_lr": theirs.ALIGN_LR}
    patch.setitem(theirs.VIT, "depth", theirs.TUNA_DEPTH)
    given = options(bottleneck=theirs.SIDE, orthogonality=theirs.TUNA_REG, reference_quirks=own, **align)
    suite, out = Suite("tuna", folder, *given), {}  # type: Any, Numbers
    method = suite.method
    for task in range(3):
        suite.begin(task)
        set_sides(method.adapters[-1], task)
        with torch.no_grad():
            method.rows[-1].rows.copy_(theirs.proxy_rows(task, theirs.SIZES[task]))
        one_step(suite, task, out)
        with patch.context() as drawing:
            alignment_draws(drawing, f"tuna {task}")
            method.end_task(task)
        out[f"{task}/rows"] = method.all_rows().detach().clone()
        if task:
            out[f"{task}/scores"] = suite.logits()
    method.merges = True
    method.restored(3)
    return {**out, "merged": torch.stack([side.up for side in method.universal])}


# --- MoAL -------------------------------------------------------------------------------------------------------------


def moal(patch: Patch, quirks: bool, folder: Path) -> Numbers:
    domain: Any = drawn(theirs.MOAL_D, theirs.moal_features)
    domain.network.blocks, domain.sites = 1, lambda: {"block": SimpleNamespace(d_in=theirs.MOAL_D)}
    own = ("shrunk_start",) if quirks else ()
    method = built("moal", domain, 3, width=theirs.MOAL_H, bottleneck=2, reference_quirks=own)
    method.layer = theirs.moal_layer()
    patch.setattr("dualcl.methods.moal.held_out", last_fifth)
    patch.setattr("dualcl.methods.moal.carried", lambda old, *rest: old + theirs.moal_drift(method.task))
    out: Numbers = {}
    for task in range(3):
        method.begin_task(task)
        method.prepare(task)
        method.end_task(task)
        known = theirs.SPLIT[task + 1]
        out[f"{task}/solution"] = method.solved[:, :known].clone()
        out[f"{task}/means"] = method.means[:known].clone()
        out[f"{task}/logits"] = method.scores(domain.read(theirs.moal_features([], "test")[0]))
    return {**out, "ridge": method.chosen}


# --- comparison -------------------------------------------------------------------------------------------------------

OURS: dict[str, Callable[[Patch, bool, Path], Numbers]] = {
    "ranpac": ranpac,
    "ranpac_pilot": ranpac_pilot,
    "fecam": fecam,
    "slca": slca,
    "inflora": inflora,
    "sdlora": sdlora,
    "ease": ease,
    "aper": aper,
    "mos": mos,
    "tuna": tuna,
    "moal": moal,
}
#: limits of single quantities, by the end of their name, where 1e-5 is not what can be asked
LIMITS = {
    ("inflora", "b"): 5e-5,  # directions of float32 sums, between singular values that are near one another
    ("inflora", "updates"): 1e-3,  # what the steps changed: Adam blows rounding errors of the smallest gradients up
}
#: what differs by more than its limit without the quirks
WITHOUT = {
    "ranpac_pilot": {f"{task}/logits" for task in range(3)},
    "slca": {f"{task}/{what}" for task in (1, 2) for what in ("losses", "rows", "logits")},
    "inflora": {"0/left out"}
    | {f"{task}/{what}" for task in (1, 2) for what in ("b", "losses", "updates", "left out", "logits")},
    "sdlora": {
        f"{task}/{what}" for task in range(3) for what in ("losses", "left", "right", "magnitudes", "rows", "logits")
    },
    "mos": {f"{task}/{what}" for task in range(3) for what in ("loss", "gradient")},
    "tuna": {f"{task}/{what}" for task in (1, 2) for what in ("rows", "scores")},
    "moal": {f"{task}/{what}" for task in range(3) for what in ("solution", "logits")},
}


def compared(
    name: str,
    public: Numbers,
    patch: Patch,
    folder: Path,
    relative_difference: Callable[[Any, Any], float],
    quirks: bool = True,
) -> dict[str, float]:
    """The relative difference of every quantity."""
    mine = OURS[name](patch, quirks, folder)
    assert mine.keys() == public.keys()
    return {key: relative_difference(mine[key], public[key]) for key in public}


def beyond(name: str, found: dict[str, float]) -> dict[str, float]:
    """What is above its limit."""
    return {k: v for k, v in found.items() if v > LIMITS.get((name, k.rsplit("/")[-1]), LIMIT)}


@pytest.mark.parametrize("name", list(OURS))
def test_stored(
    name: str,
    stored: Callable[..., Any],
    monkeypatch: Patch,
    tmp_path: Path,
    relative_difference: Callable[[Any, Any], float],
) -> None:
    public, metadata = stored(f"rivals/{name}")
    assert metadata["seed"] == str(theirs.SEED)
    assert beyond(name, compared(name, public, monkeypatch, tmp_path, relative_difference)) == {}


@pytest.mark.parametrize("name", list(WITHOUT))
def test_without_the_quirks_it_differs_where_it_should(
    name: str,
    stored: Callable[..., Any],
    monkeypatch: Patch,
    tmp_path: Path,
    relative_difference: Callable[[Any, Any], float],
) -> None:
    public, _ = stored(f"rivals/{name}")
    found = compared(name, public, monkeypatch, tmp_path, relative_difference, quirks=False)
    assert {k for k, v in found.items() if v > 1e-3} == WITHOUT[name]
    assert set(beyond(name, found)) == WITHOUT[name]


def table(stored: Callable[..., Any], folder: Path, relative_difference: Callable[[Any, Any], float]) -> str:
    """Markdown: the largest difference of each quantity over the tasks, with the quirks and without."""
    lines = ["| method | quantity | limit | difference | without the quirks |", "| --- | --- | ---: | ---: | ---: |"]
    for name in OURS:
        worst: dict[str, list[float]] = {}
        for quirks in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                found = compared(name, stored(f"rivals/{name}")[0], patch, folder, relative_difference, quirks)
            for key, value in found.items():
                worst.setdefault(key.rsplit("/")[-1], [0.0, 0.0])[not quirks] = max(
                    value, worst.get(key.rsplit("/")[-1], [0.0, 0.0])[not quirks]
                )
        for what, (on, off) in worst.items():
            known = f"{off:.1e}" if off > LIMITS.get((name, what), LIMIT) else ""
            lines.append(f"| {name} | {what} | {LIMITS.get((name, what), LIMIT):.0e} | {on:.1e} | {known} |")
    return "\n".join(lines)


@pytest.mark.reference
@pytest.mark.parametrize("name", list(OURS))
def test_live(
    name: str,
    checkout: Callable[[str, str], Path],
    monkeypatch: Patch,
    tmp_path: Path,
    relative_difference: Callable[[Any, Any], float],
    writes_reference: bool,
    store: Callable[..., None],
) -> None:
    rival = theirs.RIVALS[name]
    root = checkout(rival.variable, rival.repository)
    public = theirs.recorded(name, root)
    found = compared(name, public, monkeypatch, tmp_path, relative_difference)
    assert beyond(name, found) == {}
    if writes_reference:
        metadata = {
            "repository": rival.repository,
            "commit": rival.commit,
            "sources_sha256": theirs.digest(root, rival.sources),
            "seed": theirs.SEED,
            "versions": {m.__name__: m.__version__ for m in (torch, timm, np)},
        }
        store(f"rivals/{name}", public, metadata)


def test_the_table_is_written_on_demand(
    writes_reference: bool,
    stored: Callable[..., Any],
    tmp_path: Path,
    relative_difference: Callable[[Any, Any], float],
    write_table: Callable[[str, str], None],
) -> None:
    if not writes_reference:
        pytest.skip("writes only with --write-reference")
    write_table("rivals", table(stored, tmp_path, relative_difference))
