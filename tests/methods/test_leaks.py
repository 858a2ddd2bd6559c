"""What no method may know: the task of an image it judges, its neighbours, other tasks' data, all test data.

Every registered method runs a whole stream on data that raise when they are looked at out of turn. The checks
themselves are tested at the end, on methods that leak.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.domain import Domain
from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.domains.customization import Customization
from dualcl.benchmark.grids.sweep import plan_sweep
from dualcl.benchmark.runs import method_check as check
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.datasets import dataset_class
from dualcl.datasets.base import ClassData, ImageSet
from dualcl.datasets.concepts import ConceptData
from dualcl.methods import MethodInfo, available_methods, method_class
from dualcl.methods.base import Method, register_method

METHODS = {
    domain: sorted(n for n, i in available_methods().items() if domain in i.domains)
    for domain in ("classification", "customization")
}
CASES = [pytest.param(domain, name, id=f"{domain}-{name}") for domain, names in METHODS.items() for name in names]
CLASSIFICATION = METHODS["classification"]
CUSTOMIZATION = METHODS["customization"]


# --- guarded data -----------------------------------------------------------------------------------------------------


class Leak(AssertionError):
    """Data that were looked at out of turn."""


class Guard:
    """Says which parts of which tasks' data may be looked at now, and notes each look."""

    def __init__(self) -> None:
        self.task_of: dict[int, int] = {}  #: of each class or concept in natural order
        self.open: set[tuple[str, int]] = set()
        self.looks: set[tuple[str, int]] = set()
        self.leaks: list[tuple[str, int]] = []

    def look(self, part: str, label: int) -> None:
        """Notes a look; raises Leak unless it is that part's and task's turn. Also kept, as an error can be caught."""
        look = part, self.task_of.get(label, -1)
        if look not in self.open:
            self.leaks.append(look)
            raise Leak(f"{part} data of task {look[1]} was looked at when {sorted(self.open)} was open")
        self.looks.add(look)

    @contextlib.contextmanager
    def only(self, *parts: tuple[str, int]) -> Iterator[None]:
        """Opens these and nothing else; afterwards everything is closed."""
        self.open = set(parts)
        try:
            yield
        finally:
            self.open = set()


@dataclasses.dataclass(frozen=True)
class GuardedImages:
    """Loads images by leave of the guard."""

    images: ImageSet
    part: str
    labels: np.ndarray
    guard: Guard
    noise: bool = False

    def __call__(self, i: int) -> Image.Image:
        """Image i, or noise in its place."""
        self.guard.look(self.part, int(self.labels[i]))
        image = self.images.load(i)
        if self.noise:
            pixels = np.random.default_rng(i).integers(0, 256, (image.height, image.width, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
        return image

    def as_set(self) -> ImageSet:
        """The images with this in the place of their `load`."""
        return dataclasses.replace(self.images, load=self)


def guarded_classes(data: ClassData, guard: Guard, noise: bool) -> ClassData:
    """`data` behind `guard`; test images are noise when asked for."""
    train = GuardedImages(data.train, "train", data.train.labels, guard)
    test = GuardedImages(data.test, "test", data.test.labels, guard, noise)
    return dataclasses.replace(data, train=train.as_set(), test=test.as_set())


def guarded_concepts(data: ConceptData, guard: Guard) -> ConceptData:
    """`data` behind `guard`."""
    concepts = [
        dataclasses.replace(c, images=GuardedImages(c.images, "train", np.full(len(c.images), j), guard).as_set())
        for j, c in enumerate(data.concepts)
    ]
    return dataclasses.replace(data, concepts=tuple(concepts))


class GuardedRun(check.Watched):
    """The real run; says to the guard whose turn it is.

    Decoded images and features of them are dropped at each turn, so that a second look is a second load.
    """

    def __init__(self, resolved: Any, folder: Path, domain: Any, guard: Guard) -> None:
        self.guard = guard
        super().__init__(resolved, RunFolder(folder), Reporter(quiet=True), domain)

    def begin(self, task: int) -> list[nn.Parameter]:
        """Opens the task's training data, of all tasks for joint training: that is its definition."""
        self.forget()
        self.guard.open = {("train", t) for t in (range(self.n_tasks) if self.joint else [task])}
        return super().begin(task)

    def evaluate(self, seen: Any) -> dict[str, Any]:
        """Opens the test data of the tasks seen; in customization all photographs, which images are compared with."""
        self.forget()
        parts = [("test", t) for t in seen]
        if isinstance(self.domain, Customization):
            parts = [("train", t) for t in range(self.n_tasks)]
        with self.guard.only(*parts):
            row = super().evaluate(seen)
        self.forget()
        return row

    def forget(self) -> None:
        """Drops what the domain keeps of images."""
        domain: Any = self.domain
        if isinstance(domain, Customization):
            domain._pixels.clear()
            domain.evaluator._real.clear()
            domain._entries = None
            return
        loaders = list(domain._test_loaders.values())
        if domain._train_loader is not None:
            loaders.append(domain._train_loader[1])
        for loader in loaders:
            loader.close()
        domain.network.forget()


@pytest.fixture(scope="module")
def guarded(tiny, stream_of, small_diffusion, tmp_path_factory) -> Callable[..., GuardedRun]:
    """guarded(domain, method, other_test=False) -> its run on guarded data, not begun.

    `other_test`: test images are noise, and their labels those of other images of the task.
    """

    def make(domain: str, name: str, other_test: bool = False) -> GuardedRun:
        guard = Guard()
        resolved = tiny(name) if domain == "classification" else resolve(stream_of(name), name)
        data = dataset_class(resolved.data_name, domain).load(resolved.sections["data"])
        torch.manual_seed(0)
        cpu = torch.device("cpu")
        if domain == "customization":
            built: Any = Customization(resolved, cpu, guarded_concepts(data, guard), copy.deepcopy(small_diffusion))
            guard.task_of = {c: task for task, c in enumerate(built.stream.order)}
        else:
            built = Classification(resolved, cpu, guarded_classes(data, guard, other_test))
            guard.task_of = {c: task.index for task in built.stream.tasks for c in task.classes}
            if other_test:
                tests = [dataclasses.replace(t.test, labels=t.test.labels[::-1].copy()) for t in built.stream.tasks]
                tasks = [dataclasses.replace(t, test=s) for t, s in zip(built.stream.tasks, tests, strict=True)]
                built.stream = dataclasses.replace(built.stream, tasks=tuple(tasks))
        return GuardedRun(resolved, tmp_path_factory.mktemp(name), built, guard)

    return make


@pytest.fixture(scope="module")
def finished(guarded) -> Callable[[str, str], GuardedRun]:
    """finished(domain, method) -> its run on guarded data, run once to the end of the stream."""
    runs: dict[tuple[str, str], GuardedRun] = {}

    def get(domain: str, name: str) -> GuardedRun:
        if (domain, name) not in runs:
            runs[domain, name] = whole(guarded(domain, name))
        return runs[domain, name]

    return get


def whole(work: GuardedRun) -> GuardedRun:
    """Runs the stream to its end."""
    record = work.execute(check.empty_record())
    assert record["status"] == "finished"
    return work


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- the checks -------------------------------------------------------------------------------------------------------


def check_turns(work: GuardedRun) -> None:
    """Training data only in their own task, test data only in an evaluation of their task or of later ones."""
    assert work.guard.leaks == []
    tasks = range(work.n_tasks)
    parts = ("train",) if isinstance(work.domain, Customization) else ("train", "test")
    parts = () if "requests" in work.method.requires else parts  # they have no photographs
    assert work.guard.looks == {(part, t) for part in parts for t in tasks}


def check_test_data(work: GuardedRun, other: GuardedRun, images: torch.Tensor) -> None:
    """`other` saw other test images and labels: it has learnt the same, bit for bit, and answers the same."""
    one, two = work.state(), other.state()
    assert one.keys() == two.keys()
    assert [n for n, t in one.items() if not torch.equal(t, two[n])] == []
    assert torch.equal(work.domain.predict(images), other.domain.predict(images))


def no_other(folder: Path, kind: type[Run]) -> Run:
    raise AssertionError("these properties need one run alone")


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("domain", "name"), CASES)
def test_a_method_sees_each_task_s_data_in_its_turn_only(domain, name, finished):
    check_turns(finished(domain, name))


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_test_images_and_labels_change_nothing_that_is_learnt(name, guarded, finished, images):
    check_test_data(finished("classification", name), whole(guarded("classification", name, True)), images)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_hiding_the_task_changes_no_answer(name, finished, images):
    work = finished("classification", name)
    domain: Any = work.domain
    check.task_id(work, no_other)
    with work.guard.only(*(("test", t) for t in range(3))):
        row, current, scope = work.domain_evaluate([0, 1, 2]), domain._current, domain._scope
        try:
            for domain._current, domain._scope in ((0, "task"), (1, "seen"), (None, "task")):
                assert work.domain_evaluate([0, 1, 2]) == row
        finally:
            domain._current, domain._scope = current, scope
        assert {k: v[::-1] for k, v in work.domain_evaluate([2, 1, 0]).items()} == row
        assert [work.domain_evaluate([t])["correct"][0] for t in range(3)] == row["correct"]


@pytest.mark.parametrize("name", CUSTOMIZATION)
def test_hiding_the_task_changes_no_image(name, finished):
    check.task_id(finished("customization", name), no_other)


def test_evaluation_takes_no_task_id():
    assert list(inspect.signature(Classification.predict).parameters) == ["self", "images"]
    assert list(inspect.signature(Domain.evaluate).parameters) == ["self", "seen"]
    prompted = [n for n in CLASSIFICATION if "prefixes" in method_class(n).requires]
    assert len(prompted) >= 4
    for name in CLASSIFICATION:
        assert list(inspect.signature(method_class(name).features).parameters) == ["self", "images", "network"]
        assert list(inspect.signature(method_class(name).scores).parameters) == ["self", "features"]
    for name in prompted:
        assert list(inspect.signature(method_class(name).provide).parameters) == ["self", "query", "training"]


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_a_prediction_does_not_depend_on_batch_neighbours(name, finished, images):
    work = finished("classification", name)
    logits = work.domain.predict(images)
    assert logits.shape == (7, 7)
    assert (logits - logits[0]).abs().max() > 1e-3  # the images do differ
    check.neighbours(work, no_other, 1e-5)


@pytest.mark.parametrize("name", CUSTOMIZATION)
def test_a_generated_image_does_not_depend_on_batch_neighbours(name, finished):
    work = finished("customization", name)
    drawn = check.draw(work.domain, check.prompts(work.domain)).int()
    assert min((drawn[i] - drawn[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 20  # the images do differ
    check.neighbours(work, no_other, 1e-5)


@pytest.mark.parametrize(("domain", "name"), CASES)
def test_an_evaluation_changes_nothing(domain, name, finished):
    check.evaluation(finished(domain, name), no_other)


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_sweep_loads_no_test_image(tiny_preset, image_tree, tmp_path, capsys):
    root = tmp_path / "images"
    root.mkdir()
    (root / "train").symlink_to(image_tree / "train")
    for file in (image_tree / "val").rglob("*.png"):
        target = root / "val" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("no image: whoever opens it fails")
    preset = tmp_path / "own.yaml"
    space = "search: {points: 2, methods: {lora: {rank: [1, 2]}}}"
    preset.write_text(f'extends: {tiny_preset}\ndata: {{root: "{root}", verify: false}}\n{space}\n')
    assert main(["sweep", str(preset), "lora", "--out", str(tmp_path / "sweep"), "--quiet"]) == 0
    tree = json.loads((tmp_path / "sweep" / "lora" / "sweep.json").read_text())
    assert [p["finished"] for p in tree["points"]] == [1, 1]
    capsys.readouterr()
    assert main(["run", str(preset), "lora", "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert "cannot read the image" in capsys.readouterr().err


def test_a_sweep_reads_no_photograph_of_the_concepts_that_are_reported_on(image_tree, tmp_path):
    root = tmp_path / "concepts"
    names = sorted(p.name for p in (image_tree / "train").iterdir())
    root.mkdir()
    for name in names[-2:]:
        (root / name).symlink_to(image_tree / "train" / name)
    for name in names[:-2]:
        (root / name).mkdir()
        (root / name / "0.png").write_text("no image: whoever opens it fails")
    sweep = plan_sweep("concept-folder", "lora", None, None, [f"data.root={root}", "data.validation=2"], tmp_path)
    for run in sweep.plan:
        data = dataset_class("concept-folder").load(run.resolved.sections["data"])
        assert [c.name for c in data.concepts] == names[-2:]
    reported = resolve("concept-folder", "lora", [f"data.root={root}", "data.validation=2"])
    with pytest.raises(Exception, match="cannot read the image"):
        dataset_class("concept-folder").load(reported.sections["data"])


# --- the checks catch methods that leak -------------------------------------------------------------------------------


class Leaking(Method):
    """Trains the classifier's or the tokens' rows only, and looks where it must not."""

    #: when it looks, and at what: (domain, task) -> nothing
    phase = ""
    look: Any = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.at("__init__", 0)

    def at(self, phase: str, task: int) -> None:
        self.task = task
        if phase == type(self).phase and task < self.n_tasks:
            type(self).look(self.domain, task)

    def begin_task(self, task: int) -> None:
        self.at("begin_task", task)

    def prepare(self, task: int) -> None:
        self.at("prepare", task)

    def loss(self, batch: Any) -> torch.Tensor:
        self.at("loss", self.task)
        return super().loss(batch)

    def end_task(self, task: int) -> None:
        self.at("end_task", task)

    def diagnostics(self) -> dict[str, Any]:
        self.at("diagnostics", self.task)
        return {}


@register_method("leaking", domains=("classification", "customization"), summary="", source="")
class Registered(Leaking):
    """Takes the place of each leaking method in the registry."""


@pytest.fixture
def leaking(monkeypatch, guarded) -> Callable[..., GuardedRun]:
    """leaking(domain, class, other_test=False) -> a run of a method that is registered for this test, not begun."""

    def make(domain: str, cls: type[Leaking], other_test: bool = False) -> GuardedRun:
        about = {"domains": ("classification", "customization"), "summary": "", "source": ""}
        info = MethodInfo(name="leaking", module=__name__, class_name="Registered", **about)
        monkeypatch.setitem(available_methods(), "leaking", info)
        cls.name = "leaking"
        monkeypatch.setitem(globals(), "Registered", cls)
        return guarded(domain, "leaking", other_test)

    return make


def look_at_training(domain: Any, task: int) -> None:
    next(domain.training_features(task))


def look_at_test(domain: Any, task: int) -> None:
    next(domain._test_loader(task).eval_batches(4))


PHASES = ("__init__", "begin_task", "prepare", "loss", "end_task", "diagnostics")
LOOKS = {
    "earlier": lambda domain, task: task and look_at_training(domain, task - 1),
    "future": lambda domain, task: task < 2 and look_at_training(domain, task + 1),
    "own test": look_at_test,
    "kept features": lambda domain, task: task and domain._predictions(task - 1),
}


@pytest.mark.parametrize(
    ("phase", "look"),
    [(p, n) for p in PHASES for n in LOOKS if p != "__init__" or n not in ("earlier", "kept features")],
)
def test_a_look_out_of_turn_is_caught_whenever_it_happens(phase, look, leaking):
    cls = type("Registered", (Leaking,), {"phase": phase, "look": staticmethod(LOOKS[look])})
    with pytest.raises(Leak, match="was looked at"):
        whole(leaking("classification", cls))


def test_a_look_whose_error_is_swallowed_is_caught(leaking):
    def look(domain: Any, task: int) -> None:
        with contextlib.suppress(AssertionError):
            look_at_test(domain, task)

    work = whole(
        leaking("classification", type("Registered", (Leaking,), {"phase": "loss", "look": staticmethod(look)}))
    )
    assert set(work.guard.leaks) == {("test", 0), ("test", 1), ("test", 2)}
    with pytest.raises(AssertionError):
        check_turns(work)


@pytest.mark.parametrize("step", [-1, 1])
@pytest.mark.parametrize("phase", ["begin_task", "loss", "diagnostics"])
def test_a_look_at_another_concept_is_caught(phase, step, leaking):
    def look(domain: Any, task: int) -> None:
        if 0 <= task + step < 2:
            domain.pixels(task + step)

    cls = type("Registered", (Leaking,), {"phase": phase, "look": staticmethod(look)})
    with pytest.raises(Leak, match="was looked at"):
        whole(leaking("customization", cls))


def test_what_is_learnt_from_test_labels_is_caught(leaking, images):
    def look(domain: Any, task: int) -> None:
        with torch.no_grad():
            domain.heads[task].bias += float(domain.stream.tasks[task].test.labels[0])

    cls = type("Registered", (Leaking,), {"phase": "end_task", "look": staticmethod(look)})
    honest = type("Registered", (Leaking,), {})
    runs = [whole(leaking("classification", honest, other)) for other in (False, True)]
    check_test_data(*runs, images)
    runs = [whole(leaking("classification", cls, other)) for other in (False, True)]
    with pytest.raises(AssertionError, match=r"heads\.0\.bias"):
        check_test_data(*runs, images)


class Hooked(Leaking):
    """Changes what a layer of the model gives, in training and evaluation."""

    layer: Any = None
    change: Any = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros(()))
        # values: what is added to every key of a layer cancels in its softmax
        layer = next(site.module for name, site in self.domain.sites().items() if name.split(".")[-1] in ("v", "to_v"))
        direction = torch.linspace(-1, 1, layer.out_features)
        layer.register_forward_hook(lambda _, __, out: type(self).change(self, out, direction))


def by_task(method: Any, out: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return out + direction * (3 * (method.domain._current or 0))


def by_neighbours(method: Any, out: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return out + 3 * out.mean(0, keepdim=True)


def by_calls(method: Any, out: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        method.calls += 1
    return out


#: the property that catches each
CAUGHT = {by_task: check.task_id, by_neighbours: check.neighbours, by_calls: check.evaluation}


@pytest.mark.parametrize("domain", METHODS)
@pytest.mark.parametrize("change", [by_task, by_neighbours, by_calls])
def test_a_leak_at_evaluation_is_caught(domain, change, leaking):
    work = whole(leaking(domain, type("Registered", (Hooked,), {"change": staticmethod(change)})))
    with pytest.raises(check.Broken):
        CAUGHT[change](work, no_other)
    for other in CAUGHT.keys() - {change}:
        CAUGHT[other](work, no_other)
