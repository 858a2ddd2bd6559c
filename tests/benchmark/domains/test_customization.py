"""The customization domain in the runner: batches, steps, resuming, one adapter, labels, sweeps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dualcl.benchmark.config.presets import bundled_presets, load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.settings import Resolved
from dualcl.benchmark.domains.concept_batches import ConceptBatch, Entries, square
from dualcl.benchmark.grids.sweep import SWEEP_CONCEPTS, plan_sweep
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.runner import run as run_whole
from dualcl.results.records import comparable


def fingerprint(batch: ConceptBatch) -> tuple[Any, ...]:
    """All of a batch, for comparing bit for bit."""
    tensors = (batch.noisy, batch.target, batch.timesteps, batch.weights)
    return (*(t.numpy().tobytes() for t in tensors), tuple(batch.prompts))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_task_and_step(sd_run: Callable[..., Any]) -> None:
    sets = ("train.steps=5", "stream.class_order=natural")
    found: dict[Any, list[Any]] = {}
    for seed in (0, 1):
        run = sd_run("custom_diffusion", f"seed={seed}", *sets)
        for task in (0, 1):
            run.begin(task)
            torch.manual_seed(99)  # must not matter
            found[seed, task] = [fingerprint(b) for b in run.domain.batches(task, 0)]
            assert len(found[seed, task]) == 5
    everything = [b for batches in found.values() for b in batches]
    assert len(set(everything)) == len(everything)
    run = sd_run("custom_diffusion", *sets)
    run.begin(0)
    for start in (0, 2, 4, 5):
        torch.manual_seed(start)
        assert [fingerprint(b) for b in run.domain.batches(0, start)] == found[0, 0][start:]


def test_every_photograph_comes_as_often_as_any_other(sd_run: Callable[..., Any]) -> None:
    run = sd_run("finetune", "train.steps=6")
    run.begin(0)
    names = torch.arange(3.0)[:, None, None, None].expand(3, 4, 8, 8)
    run.domain._entries = (0, Entries(names, torch.zeros_like(names), [(f"prompt {i}",) for i in range(3)]))
    seen = [int(p[-1]) for batch in run.domain.batches(0, 0) for p in batch.prompts]
    assert [sorted(seen[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert len({tuple(seen[i : i + 3]) for i in range(0, 12, 3)}) > 1


def test_joint_training_has_all_concepts_and_the_steps_of_all(
    sd_run: Callable[..., Any], empty_record: Callable[[], dict[str, Any]]
) -> None:
    run = sd_run("joint", "train.steps=3", "data.concepts=3", "method.head_lr=0.1")
    run.begin(0)
    assert run.domain.steps_per_epoch(None) == 9
    batches = list(run.domain.batches(None, 0))
    assert len(batches) == 9
    assert {p for b in batches for p in b.prompts} == {f"a photo of <c{i}>" for i in (1, 2, 3)}
    run = sd_run("joint", "train.steps=3", "data.concepts=3", "method.head_lr=0.1")
    before: list[torch.Tensor] = []
    real = run.groups

    def groups(shared: Any) -> Any:
        before.extend(p.detach().clone() for p in shared)
        return real(shared)

    run.groups = groups
    record = run.execute(empty_record())
    assert [t["steps"] for t in record["tasks"]] == [9]
    assert len(before) == 3
    assert all(bool((r != b).any()) for r, b in zip(run.domain.tokens.rows, before, strict=True))
    assert record["matrix"]["rows"][0]["generated"] == [1, 1, 1]


def test_steps_are_given_or_follow_from_passes_over_the_photographs(sd_run: Callable[..., Any]) -> None:
    domain = sd_run("finetune", "train.steps=null", "train.batch_size=2").domain
    assert (domain.steps_per_epoch(0), domain.steps_per_epoch(None)) == (2, 3)
    domain = sd_run("finetune", "train.steps=null", "train.batch_size=2", "input.augment=flip").domain
    assert (domain.steps_per_epoch(0), domain.steps_per_epoch(None)) == (3, 6)
    run = sd_run("finetune", "train.steps=null", "train.epochs=3", "train.batch_size=2")
    run.begin(0)
    assert len(list(run.domain.batches(0, 0))) == 6
    assert sd_run("finetune", "train.steps=7").domain.steps_per_epoch(1) == 7
    with pytest.raises(UserError, match=r"train\.steps=7 counts steps: set train\.epochs=1, got 2"):
        sd_run("finetune", "train.steps=7", "train.epochs=2").domain.steps_per_epoch(0)


def test_a_concepts_prompts_are_all_used(sd_run: Callable[..., Any]) -> None:
    from dataclasses import replace

    run = sd_run("finetune", "train.steps=8", "concept.n_tokens=2")
    stream = run.domain.stream
    prompts = ("a photo of {token}", "{token}, a {noun}")
    run.domain.stream = replace(stream, concepts=tuple(replace(c, prompts=prompts) for c in stream.concepts))
    run.begin(0)
    wanted = {"a photo of <c1> <c1>_1", "<c1> <c1>_1, a symbol"}
    assert set(run.domain.prompts(0)) == wanted
    assert {p for b in run.domain.batches(0, 0) for p in b.prompts} == wanted


@pytest.mark.parametrize(
    ("sets", "prompt"),
    [
        ((), "a photo of <c1>"),
        (("concept.class_noun=true",), "a photo of <c1> symbol"),
        (("concept.class_noun=true", "concept.prompt=a {noun} like {token}"), "a symbol like <c1>"),
        (("concept.placeholder=sks{number}",), "a photo of sks1"),
    ],
)
def test_how_a_concept_is_put_into_words(sd_run: Callable[..., Any], sets: tuple[str, ...], prompt: str) -> None:
    run = sd_run("finetune", *sets)
    run.begin(0)
    assert next(run.domain.batches(0, 0)).prompts == [prompt] * 2


def test_photographs_are_cropped_to_the_centre_square() -> None:
    from PIL import Image

    image = Image.new("RGB", (60, 20), (255, 0, 0))
    image.paste((0, 255, 0), (20, 0, 40, 20))
    found = square(image, 10)
    assert found.shape == (10, 10, 3)
    assert found.unique(dim=0).unique(dim=1).tolist() == [[[0, 255, 0]]]
    assert square(Image.new("RGB", (3, 2)), 16).shape == (16, 16, 3)


# --- resuming ---------------------------------------------------------------------------------------------------------


def interrupt(resolved: Resolved, out: Path, task: int, step: int) -> None:
    """Runs until just after a checkpoint of `step` steps of `task`."""
    real = RunFolder.save_checkpoint

    def save(self: RunFolder, name: str, tensors: Any, state: Any) -> None:
        real(self, name, tensors, state)
        if name == "partial" and (state["task"], state["step"]) == (task, step):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            run_whole(resolved, out)


def files(folder: Path) -> dict[str, bytes]:
    """Images, weights and log of a run."""
    kept = [*folder.rglob("*.png"), *folder.rglob("*.safetensors"), folder / "log.jsonl"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in kept}


@pytest.mark.parametrize(
    ("method", "sets"),
    [
        ("clora", ("method.lambda_=1000",)),
        ("clora", ("method.one_adapter=true", "concept.n_tokens=2")),
        ("custom_diffusion", ("input.augment=flip",)),
    ],
    ids=["clora", "one adapter", "custom diffusion"],
)
def test_a_killed_run_ends_as_an_undisturbed_one(
    sd_preset: str, tmp_path: Path, method: str, sets: tuple[str, ...]
) -> None:
    more = ("train.steps=3", "method.lr=0.05", "method.head_lr=0.05", "data.concepts=3")
    resolved = resolve(sd_preset, method, [*more, *sets])
    whole = run_whole(resolved, tmp_path / "whole")
    for task, step in ((0, 1), (1, 2), (2, 1)):
        interrupt(resolved, tmp_path / "run", task, step)
        record = json.loads((tmp_path / "run" / "record.json").read_text())
        assert (record["status"], len(record["matrix"]["rows"])) == ("interrupted", task)
    resumed = run_whole(resolved, tmp_path / "run")
    assert comparable(resumed) == comparable(whole)
    assert resumed["matrix"] == whole["matrix"]
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    images = [name for name in files(tmp_path / "run") if "/after_" in name]
    assert len(images) == 1 + 2 + 3


def test_prepare_comes_once_a_task_with_the_model_as_the_last_task_left_it(
    sd_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualcl.methods.finetune import Finetune

    seen: list[tuple[int, list[bytes]]] = []

    def weights(method: Finetune) -> list[bytes]:
        return [p.detach().numpy().tobytes() for p in method.parameters()]

    def prepare(self: Finetune, task: int) -> None:
        assert self.domain.tokens.placeholders[-1] == f"<c{task + 1}>"  # type: ignore[attr-defined]
        seen.append((task, weights(self)))

    left: list[list[bytes]] = []
    ended = Finetune.end_task

    def end_task(self: Finetune, task: int) -> None:
        ended(self, task)
        left.append(weights(self))

    monkeypatch.setattr(Finetune, "prepare", prepare)
    monkeypatch.setattr(Finetune, "end_task", end_task)
    resolved = resolve(sd_preset, "finetune", ["method.lr=0.01", "data.concepts=3"])
    run_whole(resolved, tmp_path / "whole")
    assert [task for task, _ in seen] == [0, 1, 2]
    undisturbed = dict(seen)
    assert undisturbed[1] == left[0] != undisturbed[0]
    assert undisturbed[2] == left[1] != left[0]
    seen.clear()
    interrupt(resolved, tmp_path / "run", 2, 1)
    assert seen == list(undisturbed.items())
    seen.clear()
    # in the middle of task 3: not for the tasks begun again, and with the weights from before its first step
    run_whole(resolved, tmp_path / "run")
    assert seen == [(2, undisturbed[2])]


# --- low-rank methods -------------------------------------------------------------------------------------------------


def test_without_its_penalty_clora_is_lora_bit_for_bit(sd_preset: str, tmp_path: Path) -> None:
    sets = ["train.steps=3", "method.lr=0.05", "method.head_lr=0.05"]
    run_whole(resolve(sd_preset, "lora", sets), tmp_path / "lora")
    run_whole(resolve(sd_preset, "clora", [*sets, "method.lambda_=0"]), tmp_path / "clora")
    run_whole(resolve(sd_preset, "clora", [*sets, "method.lambda_=1e4"]), tmp_path / "penalty")
    plain, zero, penalised = (files(tmp_path / name) for name in ("lora", "clora", "penalty"))
    assert plain == zero
    assert plain["checkpoints/task_1/state.safetensors"] != penalised["checkpoints/task_1/state.safetensors"]
    # the first concept has nothing to protect
    first = [name for name in plain if name.startswith("samples/after_1/")]
    assert len(first) == 1
    assert plain[first[0]] == penalised[first[0]]


def test_one_adapter_is_trained_on_and_evaluated_with(
    sd_run: Callable[..., Any], empty_record: Callable[[], dict[str, Any]]
) -> None:
    run = sd_run("lora", "method.one_adapter=true", "method.lr=0.05", "data.concepts=3")
    site, update = next(iter(run.method.updates.items()))
    module = run.domain.model.get_submodule(site)
    pretrained = update.site.weight.clone()
    x = torch.randn(5, update.site.d_in, generator=torch.Generator().manual_seed(0))
    factors: list[tuple[torch.Tensor, torch.Tensor]] = []
    real_begin, real_evaluate = run.method.begin_task, run.domain.evaluate

    def begin(task: int) -> None:
        real_begin(task)
        assert update.active
        assert update.A.requires_grad
        assert torch.equal(update.site.weight, pretrained)
        assert bool(update.A.any()) == (task > 0)
        if task:
            assert torch.equal(update.A, factors[-1][0])
            assert torch.equal(update.B, factors[-1][1])

    def evaluate(seen: Any) -> Any:
        factors.append((update.A.detach().clone(), update.B.detach().clone()))
        product = update.A.detach() @ update.B.detach()
        assert float(product.abs().max()) > 0
        assert torch.allclose(module(x), x @ (pretrained + product).T, atol=1e-6)
        assert not update.A.requires_grad
        return real_evaluate(seen)

    run.method.begin_task, run.domain.evaluate = begin, evaluate
    record = run.execute(empty_record())
    assert len(factors) == 3
    assert not torch.equal(factors[0][0], factors[1][0])
    assert not torch.equal(factors[1][1], factors[2][1])
    # one pair of factors, however many concepts
    stored = [t["parameters_stored"] for t in record["tasks"]]
    width = run.domain.diffusion.text_encoder.config.hidden_size
    assert [b - a for a, b in itertools.pairwise(stored)] == [width, width]


# --- labels and tables ------------------------------------------------------------------------------------------------


def test_a_preset_may_name_its_runs_and_the_table_they_stand_in(sd_preset: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f'extends: {sd_preset}\ntable: concepts\nlabel: "clora, mine"\n')
    record = run_whole(resolve(str(own), "textual_inversion"), tmp_path / "run")
    assert {k: record["run"][k] for k in ("preset", "table", "label", "method")} == {
        "preset": "own",
        "table": "concepts",
        "label": "clora, mine",
        "method": "textual_inversion",
    }
    # a preset that extends it has a table of its own again
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {own}\n")
    assert load_preset(str(child)).table == "child"
    record = run_whole(resolve(sd_preset, "textual_inversion"), tmp_path / "plain")
    assert (record["run"]["label"], record["run"]["table"]) == ("textual_inversion", "sd")


def test_the_bundled_ablations_stand_in_their_parents_table_under_names_of_their_own() -> None:
    loaded = [load_preset(name) for name in bundled_presets()]
    ablations = [p for p in loaded if p.table != p.name]
    assert len(ablations) >= 4
    for preset in ablations:
        assert preset.table in bundled_presets()
        assert load_preset(preset.table).domain == preset.domain
    labels = [(p.table, p.values["label"][0]) for p in ablations]
    assert len(set(labels)) == len(labels)


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_on_concepts_that_are_not_reported_on(tmp_path: Path) -> None:
    from dualcl.datasets import dataset_class

    sweep = plan_sweep("glyph-concepts", "clora", ["method.lambda_=1,10"], [0], [], tmp_path)
    assert sweep.measured_on == f"{SWEEP_CONCEPTS} other concepts (data.skip=10)"
    load = dataset_class("glyph-concepts").load
    reported = load(resolve("glyph-concepts", "clora").sections["data"])
    tuned = load(sweep.plan[0].resolved.sections["data"])
    assert len(tuned.concepts) == SWEEP_CONCEPTS
    assert len(reported.concepts) == 10
    assert {c.name for c in tuned.concepts}.isdisjoint(c.name for c in reported.concepts)
    assert {c.images.fingerprint for c in tuned.concepts}.isdisjoint(c.images.fingerprint for c in reported.concepts)
    # what is typed there is what is run
    assert "data.skip=10" in sweep.plan[0].sets
    given = plan_sweep("glyph-concepts", "clora", None, [0], ["data.skip=12", "data.concepts=4"], tmp_path)
    assert given.measured_on == "4 other concepts (data.skip=12)"
    more = plan_sweep("glyph-concepts", "clora", None, [0], ["data.concepts=12"], tmp_path)
    assert more.measured_on == "12 other concepts (data.skip=12)"
    for sets in (["data.skip=3"], ["data.skip=0"], ["data.skip=9", "data.concepts=1"]):
        with pytest.raises(UserError, match=r"data\.skip=\d .* holds concepts that are reported on, number 1 to 10"):
            plan_sweep("glyph-concepts", "clora", None, [0], sets, tmp_path)


def test_a_sweep_knows_the_concepts_that_a_preset_leaves_out(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: glyph-concepts\ndata: {skip: 6, concepts: 8}\nstream: {tasks: 8}\n")
    sweep = plan_sweep(str(own), "clora", None, [0], [], tmp_path)
    flat = sweep.plan[0].resolved.flat()
    assert (flat["data.skip"], flat["data.concepts"], flat["stream.tasks"]) == (14, SWEEP_CONCEPTS, SWEEP_CONCEPTS)
    before = plan_sweep(str(own), "clora", None, [0], ["data.skip=0", "data.concepts=6"], tmp_path)
    assert before.measured_on == "6 other concepts (data.skip=0)"
    with pytest.raises(UserError, match="number 7 to 14"):
        plan_sweep(str(own), "clora", None, [0], ["data.skip=0", "data.concepts=7"], tmp_path)


@pytest.mark.parametrize("preset", ["portraits-10", "portraits-tune", "portraits-50"])
def test_a_sweep_on_drawn_persons_runs_on_others(preset: str, tmp_path: Path) -> None:
    sweep = plan_sweep(preset, "clora", None, [0], [], tmp_path)
    assert sweep.plan[0].resolved.flat()["data.people"] == "tuning"
    assert sweep.measured_on == "other concepts (data.people=tuning)"


def test_a_sweep_on_photographs_runs_on_validation_concepts(tmp_path: Path) -> None:
    flat = plan_sweep("celeba-hq-10", "clora", None, [0], [], tmp_path).plan[0].resolved.flat()
    # chosen by rule: the five after the ten that are reported on
    assert [flat[f"data.{k}"] for k in ("concepts", "validation", "tuning")] == [10, SWEEP_CONCEPTS, True]
    assert flat["stream.tasks"] == SWEEP_CONCEPTS
    for preset, sets in (
        ("celeba-hq-10", ["data.identities=[1,2,3]"]),
        ("landmarks-10", ["data.landmarks=[1,2,3]"]),
        ("dreambooth", []),
        ("concept-folder", []),
    ):
        with pytest.raises(UserError, match="has no concepts but those that are reported on"):
            plan_sweep(preset, "clora", None, [0], sets, tmp_path)
        sweep = plan_sweep(preset, "clora", None, [0], [*sets, "data.validation=2"], tmp_path)
        assert sweep.measured_on == "2 validation concepts (data.validation=2, to be set in every run)"
        flat = sweep.plan[0].resolved.flat()
        assert flat["data.tuning"] is True
        assert flat["stream.tasks"] in (None, 2)


def test_captions_are_what_images_are_taught_with(sd_run: Callable[..., Any]) -> None:
    domain = sd_run("lora").domain
    first, second = domain.stream.concepts
    texts = ("a symbol at sea", "", "{token} alone")
    domain.stream = replace(domain.stream, concepts=(replace(first, captions=texts), second))
    domain.begin_task(0)
    assert domain._training_entries(0).prompts == [("a <c1> symbol at sea",), ("a photo of <c1>",), ("<c1> alone",)]
    assert domain.texts(0) == ("a photo of <c1>", "a <c1> symbol at sea", "<c1> alone")
    assert list(domain.facts()["captions"].values()) == ["a {token} {noun} at sea", "{token} alone"]
    for text, why in (
        ("at sea", "does not say where it stands"),
        ("<c2> at sea", "names <c2>, but the concept is <c1>"),
    ):
        domain.stream = replace(domain.stream, concepts=(replace(first, captions=(text, "", "")), second))
        with pytest.raises(UserError, match=why):
            domain._check_prompts()
