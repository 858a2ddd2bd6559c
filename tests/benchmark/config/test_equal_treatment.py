"""Methods of one comparison differ in their own hyper-parameters only, and a preset says who chose those."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dualcl.benchmark.config.presets import bundled_presets, load_preset
from dualcl.benchmark.config.resolve import own_values, resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.settings import GeneralConfig, TrainConfig
from dualcl.benchmark.domains import domain_sections
from dualcl.benchmark.grids.sweep import plan_sweep, typed
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run, run
from dualcl.datasets import available_datasets
from dualcl.methods import available_methods, method_class
from dualcl.methods.base import Method

PRESETS = sorted(bundled_presets())
METHODS = sorted(available_methods())
CLASSIFICATION = [n for n in METHODS if "classification" in available_methods()[n].domains]
CUSTOMIZATION = [n for n in METHODS if "customization" in available_methods()[n].domains]
#: those of concepts; what methods of requests get, tests/methods/test_unlearning.py says
LEARNING = [n for n in CUSTOMIZATION if "requests" not in method_class(n).requires]
#: generative replay's is the number of images that it makes of a concept, glyph-concepts' that of those it draws
MEANT_OTHERWISE = {"per_concept"}


def shared_keys() -> dict[str, type]:
    """Every key of a section that is not the method's, over all domains and data sets, with its section's class."""
    keys: dict[str, type] = {f.name: GeneralConfig for f in dataclasses.fields(GeneralConfig)}
    keys.update({f"train.{f.name}": TrainConfig for f in dataclasses.fields(TrainConfig)})
    for info in available_datasets().values():
        for section, cls in domain_sections(info.domain, info.name).items():
            keys.update({f"{section}.{f.name}": cls for f in dataclasses.fields(cls)})
    return keys


SHARED = sorted(shared_keys())


# --- by configuration -------------------------------------------------------------------------------------------------


def test_what_is_shared_is_all_that_a_comparison_must_share():
    wanted = {"seed", "precision", "train.epochs", "train.steps", "train.batch_size", "train.optimizer", "data.root"}
    wanted |= {"train.schedule", "stream.tasks", "stream.class_order", "stream.order_seed", "backbone.name"}
    wanted |= {"backbone.weights", "base.model", "head.init", "input.preprocess", "input.augment", "input.resize"}
    wanted |= {"eval.n", "eval.steps", "eval.features", "eval.batch_size", "concept.prompt", "prior.n", "data.holdout"}
    assert wanted <= set(SHARED)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_no_key_of_a_shared_section(name):
    own = {f.name for f in dataclasses.fields(method_class(name).Config)} - MEANT_OTHERWISE
    shared = {key.rpartition(".")[2] for key in SHARED}
    assert own.isdisjoint(
        shared | {"steps", "epochs", "dataset", "order", "transform", "preprocessing", "augmentation"}
    )


@pytest.mark.parametrize("name", METHODS)
def test_no_assignment_to_a_method_reaches_a_shared_key(name, tmp_path, monkeypatch):
    # the nearest known key is looked for at each of hundreds of names: most of the time, and not what is tested here
    monkeypatch.setitem(resolve.__globals__, "nearest", lambda *given: "")
    preset = "glyphs" if name in CLASSIFICATION else "glyph-concepts"
    own = {f.name for f in dataclasses.fields(method_class(name).Config)}
    names = sorted({key.rpartition(".")[2] for key in SHARED} - own)
    assert len(names) > 50
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps({"extends": preset, "methods": {name: dict.fromkeys(SHARED, 1)}}))  # JSON is YAML
    other = next(n for n in (CLASSIFICATION if name in CLASSIFICATION else CUSTOMIZATION) if n != name)
    for refused, form, keys in (
        (lambda: resolve(preset, name, [f"method.{n}=1" for n in names]), "method.", names),
        (lambda: resolve(preset, name, [f"methods.{name}.{n}=1" for n in names]), "method.", names),
        # nor by way of another method's run, or of a preset
        (lambda: resolve(preset, other, [f"methods.{name}.{n}=1" for n in names]), f"methods.{name}.", names),
        (lambda: resolve(str(file), name), "method.", [n for n in SHARED if n not in own]),
    ):
        with pytest.raises(UserError) as caught:
            refused()
        assert [n for n in keys if f"unknown key '{form}{n}'" not in str(caught.value)] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_all_methods_of_a_preset_share_every_other_section(preset):
    domain = load_preset(preset).domain
    trees = {}
    for name in CLASSIFICATION if domain == "classification" else CUSTOMIZATION:
        tree = resolve(preset, name).tree()
        assert (tree.pop("method_name"), set(tree.pop("method"))) == (
            name,
            {f.name for f in dataclasses.fields(method_class(name).Config)},
        )
        trees[name] = tree
    first = next(iter(trees.values()))
    assert first["train"]
    assert [name for name, tree in trees.items() if tree != first] == []


# --- in a run ---------------------------------------------------------------------------------------------------------


def digest(*values: Any) -> str:
    """A hash of tensors and plain values."""
    out = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            out.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.numpy().tobytes())
        else:
            out.update(repr(value).encode())
    return out.hexdigest()


class WatchedRun(Run):
    """The real run; notes what the method gets."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.got: dict[str, Any] = {"batches": {}, "started": {}, "lr_factors": {}}

    def begin(self, task: int) -> Any:
        shared = super().begin(task)
        for t in range(self.n_tasks) if self.joint else [task]:
            self.got["started"][t] = digest(*self.new_rows(t))
        return shared

    def new_rows(self, task: int) -> list[torch.Tensor]:
        """What every method learns for the task: classifier rows."""
        domain: Any = self.domain
        return list(domain.heads[task].parameters())

    def step(self, batch: Any, optimizer: Any, factor: float, where: str, ended: bool = False) -> Any:
        self.got["batches"][where] = self.of_batch(batch)
        self.got["lr_factors"][where] = factor, type(optimizer).__name__
        return super().step(batch, optimizer, factor, where, ended)

    def of_batch(self, batch: Any) -> str:
        return digest(batch.images, batch.labels, batch.indices, batch.flipped)


@pytest.fixture(scope="module")
def images_run(tiny, tmp_path_factory) -> Callable[[str], tuple[WatchedRun, dict[str, Any]]]:
    """images_run(method) -> (its run on the stream, evaluated images and what they were judged with, all as hashes)."""

    def make(name: str) -> tuple[WatchedRun, dict[str, Any]]:
        resolved = tiny(name, "head.init=linear", "input.augment=flip", "train.epochs=2")
        work = WatchedRun(resolved, RunFolder(tmp_path_factory.mktemp(name)), Reporter(quiet=True))
        record = work.execute({"tasks": [], "matrix": {"rows": []}, "measured": {"tasks": []}})
        domain: Any = work.domain
        work.got["test"] = {
            t: [digest(b.images, b.labels, b.indices) for b in domain._test_loader(t).eval_batches(4)] for t in range(3)
        }
        work.got["judged"] = record["matrix"]["rows"][-1]["total"]
        work.got["identity"] = json.dumps(domain.identity(), sort_keys=True)
        return work, work.got

    return make


@pytest.fixture(scope="module")
def expected(images_run) -> dict[str, Any]:
    """What the linear probe got: it changes nothing but the classifier."""
    return images_run("linear_probe")[1]


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_methods_get_the_same(name, images_run, expected):
    work, got = images_run(name)
    for key in ("test", "judged", "identity", "started"):
        assert got[key] == expected[key]
    assert len(set(got["started"].values())) == 3
    if not work.joint:  # joint: all tasks at once, other batches of the same data
        learnt = [t for t in range(3) if work.method.takes_steps(t)]
        assert len(got["batches"]) == sum((6, 4, 4)[t] for t in learnt)  # two epochs of 3, 2 and 2 batches
        for what in ("batches", "lr_factors"):
            wanted = {k: v for k, v in expected[what].items() if k.startswith(tuple(f"task {t + 1}," for t in learnt))}
            assert got[what] == wanted


class WatchedConcepts(WatchedRun):
    """The same in customization: images and prompts of each step, noise, what is drawn at evaluation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.got.update(chosen={}, drawn={})
        domain: Any = self.domain
        chosen, generate = domain._chosen, domain.evaluator._generate

        def watched_choice(entries: Any, number: int, step: int, batch: int, purpose: str) -> Any:
            out = chosen(entries, number, step, batch, purpose)
            if purpose == "order":
                self.got["chosen"][number, step] = digest(out.mean, out.std, out.prompts)
            return out

        def watched_images(j: int, prompts: list[str]) -> Any:
            seeds = [domain.evaluator._seed(j, k) for k in range(len(prompts))]
            self.got["drawn"][j] = prompts, seeds, digest(domain.pixels(j))
            return generate(j, prompts)

        domain._chosen, domain.evaluator._generate = watched_choice, watched_images

    def new_rows(self, task: int) -> list[torch.Tensor]:
        """Token rows."""
        domain: Any = self.domain
        return [domain.tokens.rows[task]]

    def of_batch(self, batch: Any) -> str:
        return digest(batch.noisy, batch.target, batch.timesteps, batch.prompts, batch.weights)


@pytest.fixture(scope="module")
def concepts_run(sd_run) -> Callable[[str], WatchedConcepts]:
    """concepts_run(method) -> its run on two concepts."""

    def make(name: str) -> WatchedConcepts:
        plain = sd_run(name)
        work = WatchedConcepts(plain.resolved, plain.folder, Reporter(quiet=True), plain.domain)
        work.execute({"tasks": [], "matrix": {"rows": []}, "measured": {"tasks": []}})
        work.got["identity"] = json.dumps(work.domain.identity(), sort_keys=True)
        return work

    return make


@pytest.fixture(scope="module")
def expected_concepts(concepts_run) -> dict[str, Any]:
    """What textual inversion got: it changes nothing but its token."""
    return concepts_run("textual_inversion").got


@pytest.mark.parametrize("name", LEARNING)
def test_customization_methods_get_the_same(name, concepts_run, expected_concepts):
    work = concepts_run(name)
    got, expected = work.got, expected_concepts
    assert got["drawn"] == expected["drawn"]
    assert got["identity"] == expected["identity"]
    assert got["started"] == expected["started"]
    if work.joint:
        return
    if not work.method.takes_steps(0):
        assert not got["batches"]
        assert not got["lr_factors"]
        return
    assert got["lr_factors"] == expected["lr_factors"]
    replays = "replay" in work.method.requires
    tasks = (0,) if replays else (0, 1)  # what replay adds to a later task is the method
    for (task, step), images in expected["chosen"].items():
        if task in tasks:
            assert got["chosen"][task, step] == images
    if not replays and "prior" not in work.method.requires:  # prior images stand in the batch
        assert got["batches"] == expected["batches"]


# --- who tuned what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_who_tuned_each_method_it_sets_or_compares(preset):
    loaded = load_preset(preset)
    spoken_of = {key.split(".")[1] for key in loaded.values if key.startswith("methods.")}
    assert {*loaded.compare, *spoken_of} <= set(loaded.tuning)
    for name, line in loaded.tuning.items():
        resolved = resolve(preset, name)
        assert resolved.tuning == line
        if line.endswith("code default"):
            assert not own_values(resolved)


def test_a_line_covers_the_values_it_was_written_with_only(tmp_path):
    base, own, child = (tmp_path / f"{name}.yaml" for name in ("base", "own", "child"))
    base.write_text(
        "domain: classification\ndata: {name: glyphs}\n"
        "methods: {clora: {rank: 4}}\ntuning: {clora: a sweep, lora: none}\n"
    )
    own.write_text(f"extends: {base}\nmethods: {{clora: {{rank: 8, lr: 1e-2}}, ewc: {{lambda_: 3}}}}\n")
    child.write_text(f"extends: {own}\ntuning: {{ewc: my own sweep}}\n")
    assert resolve(str(base), "clora").tuning == "a sweep"
    assert resolve(str(own), "clora").tuning == "rank, lr by preset own, not tuned; the rest: a sweep"
    assert resolve(str(own), "ewc").tuning == "not tuned: values of preset own (methods.ewc)"
    assert resolve(str(own), "l2").tuning == "not tuned: code defaults"
    assert resolve(str(own), "lora").tuning == "none"
    assert resolve(str(child), "ewc").tuning == "my own sweep"
    given = resolve(str(child), "ewc", ["method.lambda=4", "methods.ewc.lr=1", "train.epochs=2"])
    assert given.tuning == "--set method.lambda_, method.lr; the rest: my own sweep"
    assert resolve(str(child), "ewc", ["methods.clora.lr=1"]).tuning == "my own sweep"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tuning: {clorra: by me}", "unknown method in tuning.clorra; did you mean 'clora'"),
        ("tuning: by me", "tuning must be a mapping of methods, got 'by me'"),
        ("tuning: {clora: 3}", "tuning.clora must be one line of text, got 3"),
        ('tuning: {clora: "two\\nlines"}', "tuning.clora must be one line of text"),
        ("search: 3", "search must hold points, methods and select"),
        ("search: {points: 2, method: {}}", "search must hold points, methods and select"),
        ("search: {points: 0, methods: {lora: {rank: [1]}}}", "search.points must be at least 1, got 0"),
        ("search: {points: 2, methods: {lorra: {rank: [1, 2]}}}", "unknown method in search.methods.lorra"),
        ("search: {points: 6, methods: {lora: [1, 2]}}", "search.methods.lora must map keys to lists"),
        ("search: {points: 6, methods: {lora: {rank: 4}}}", "search.methods.lora.rank must be a list of different"),
        (
            "search: {points: 6, methods: {lora: {rank: [4, 4]}}}",
            "search.methods.lora.rank must be a list of different",
        ),
        (
            "search: {points: 6, methods: {lora: {rank: [4, 8]}}}",
            "search.methods.lora has 2 points and search.points is 6",
        ),
        ("search: {points: 6, select: 3}", "search.select must be the name of a metric, got 3"),
        ("search: {points: 3}", "every method gets as many as the others"),
    ],
)
def test_mistakes_in_tuning_and_search_are_named(text, words, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: glyphs\n{text}\n")
    with pytest.raises(UserError) as caught:
        load_preset(str(own))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_record_says_who_tuned_and_the_hash_does_not_care(tiny_preset, tmp_path):
    own = tmp_path / "own.yaml"
    hashes = set()
    for line in ("by me", "by you"):
        own.write_text(f"extends: {tiny_preset}\ntuning: {{ncm: {line}}}\n")
        resolved = resolve(str(own), "ncm")
        hashes.add(resolved.hash())
        assert "tuning" not in resolved.flat()
    record = run(resolved, tmp_path / "run")
    assert record["run"]["tuning"] == "by you"
    assert {record["config_hash"]} == hashes


# --- search spaces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_search_spaces_are_of_equal_size_and_valid(preset, tmp_path):
    loaded = load_preset(preset)
    trained = {n for n in loaded.compare if method_class(n).takes_steps is Method.takes_steps}
    if loaded.domain == "classification":
        trained |= {
            "ewc",
            "l2",
            "lwf_mc",
            "er",
            "slca",
            "inflora",
            "sdlora",
            "ranpac",
            "fecam",
            "aper",
            "ease",
            "tuna",
            "mos",
        }
    assert trained <= set(loaded.search)
    for name, axes in loaded.search.items():
        own = {f.name for f in dataclasses.fields(method_class(name).Config)}
        assert set(axes) <= own
        config = resolve(preset, name).sections["method"]
        # what the preset takes is one of the points that others could have
        assert [k for k, values in axes.items() if getattr(config, k) not in values] == []
    sets = ["data.validation=2"] if preset in ("concept-folder", "dreambooth", "unlearn-prompts") else []
    sizes = {name: len(plan_sweep(preset, name, None, None, sets, tmp_path).points) for name in sorted(trained)}
    assert set(sizes.values()) == {loaded.points}


def test_a_sweep_chooses_by_what_the_preset_says(tmp_path):
    assert plan_sweep("portraits-tune", "lora", None, None, [], tmp_path).select == "concept_accuracy_last"
    assert plan_sweep("portraits-unlearn-tune", "esd", None, None, [], tmp_path).select == "H_UA_RA"
    assert plan_sweep("renditions-10", "lora", None, None, [], tmp_path).select == "A_last"
    told = plan_sweep("portraits-tune", "lora", None, None, [], tmp_path, select="A_mmd")
    assert told.select == "A_mmd"
    own = tmp_path / "own.yaml"
    own.write_text("extends: portraits-tune\nsearch: {select: A_mdm}\n")
    with pytest.raises(UserError, match=r"unknown metric search\.select of preset own: 'A_mdm'"):
        plan_sweep(str(own), "lora", None, None, [], tmp_path)


def test_a_key_of_another_section_cannot_be_searched(tmp_path):
    own = tmp_path / "own.yaml"
    for key in ("epochs", "train.epochs", "backbone.name"):
        own.write_text(f"extends: glyphs\nsearch: {{points: 6, methods: {{lora: {{{key}: [1, 2, 3, 4, 5, 6]}}}}}}\n")
        with pytest.raises(UserError, match=f"unknown key 'method.{key}'"):
            plan_sweep(str(own), "lora", None, None, [], tmp_path)


def test_values_of_a_space_are_written_as_one_types_them():
    values = (1e-3, 2.5e-5, 1e8, 0.5, 100.0, 3, True, None, "cosine", [0, 1], 1 / 3 * 1e-4, 0.0)
    texts = ["1e-3", "2.5e-5", "1e8", "0.5", "100.0", "3", "true", "null", "cosine", "[0, 1]", str(1 / 3 * 1e-4), "0.0"]
    assert [typed(v) for v in values] == texts
    assert [float(t) for t in texts[:5]] == list(values[:5])
