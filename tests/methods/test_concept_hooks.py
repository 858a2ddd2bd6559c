"""What the customization domain offers methods beyond its loss: errors, teachers, requests, own inputs, token rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains import customization
from dualcl.benchmark.domains.customization import Customization
from dualcl.benchmark.domains.prior import PriorConfig, prior_images
from dualcl.benchmark.exports.export import export
from dualcl.benchmark.runs import runner
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.restore import restore
from dualcl.benchmark.runs.runner import Run
from dualcl.datasets.concepts import Concept, ConceptData, Request, concepts_hash
from dualcl.methods.base import Method
from dualcl.methods.lora import LoRA
from dualcl.methods.shared.low_rank import without_updates
from dualcl.methods.shared.site_weights import SiteWeights

# --- methods as a stranger would write them ---------------------------------------------------------------------------


class DiffusionScores(LoRA):
    """arXiv 2410.00700 in function space: the concept that explains an image, as the model before the task has it."""

    name = "diffusion_scores"
    requires = ("errors",)

    def prepare(self, task: int) -> None:
        self.task = task
        self.teacher = self.domain.frozen() if task else None

    def loss(self, batch: Any) -> Tensor:
        loss = self.domain.loss(batch)
        if self.teacher is None:
            return loss
        prompts = [self.domain.prompts(j)[0] for j in range(self.task + 1)]
        ours = (-self.domain.errors(batch, prompts)).log_softmax(1)
        theirs = (-(self.teacher(batch, prompts) - batch.target[:, None]).square().mean((2, 3, 4))).softmax(1)
        return loss + F.kl_div(ours, theirs, reduction="batchmean")


class Ablation(SiteWeights):
    """arXiv 2303.13516: the target's prompts are to give what the anchor's give."""

    name = "ablation"
    requires = ("errors", "requests")

    def prepare(self, task: int) -> None:
        self.teacher = self.domain.frozen()

    def loss(self, batch: Any) -> Tensor:
        anchors = list(dict.fromkeys(batch.prompts))
        own = range(len(batch.prompts)), [anchors.index(p) for p in batch.prompts]
        goal = self.teacher(batch, anchors)[own]
        return F.mse_loss(self.domain.predictions(batch, self.domain.targets_of(anchors))[own], goal)


class Encoder(Method):
    """Photographs in, token rows out, without a step: mean colours through a fixed map."""

    name = "encoder"
    requires = ("token_rows",)

    def takes_steps(self, task: int) -> bool:
        return False

    def end_task(self, task: int) -> None:
        colours = self.domain.concept_images(task).float().div(255).mean((0, 1, 2))
        (rows,) = self.domain.token_rows(task)
        fixed = torch.randn(3, rows[0].numel(), generator=self.generator("map"))
        self.domain.set_token_rows(task, [(colours @ fixed).expand_as(rows)])


class Killed(Run):
    """Stops after the first step of the second task."""

    def step(self, batch: Any, optimizer: Any, factor: float, where: str, ended: bool = False) -> Any:
        if where == "task 2, step 1":
            raise KeyboardInterrupt
        return super().step(batch, optimizer, factor, where, ended)


@pytest.fixture
def toy(
    concepts_preset: str, small_diffusion: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """toy(method class, configuration's method, *assignments, folder, kind, data) -> a run on the small model."""

    def make(
        cls: type[Method], like: str, *sets: str, folder: str = "run", kind: type[Run] = Run, data: Any = None
    ) -> Any:
        monkeypatch.setattr(runner, "method_class", lambda name: cls)
        resolved = resolve(concepts_preset, like, sets)
        domain = Customization(resolved, torch.device("cpu"), data=data, diffusion=copy.deepcopy(small_diffusion))
        return kind(resolved, RunFolder(tmp_path / folder), Reporter(quiet=True), domain)

    return make


def learnt(work: Any, task: int, steps: int = 2) -> Any:
    """`work` in its task, after a few steps; the batch of the last."""
    work.domain.begin_task(task)
    work.method.begin_task(task)
    work.method.prepare(task)
    params = [p for g in work.method.trained() for p in g.params] + [work.domain.tokens.rows[task]]
    for batch in [b for b, _ in zip(work.domain.batches(task, 0), range(steps), strict=False)]:
        grads = torch.autograd.grad(work.method.loss(batch), params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= 0.5 * g / g.norm().clamp(min=1e-12)
    return batch


# --- predictions and errors -------------------------------------------------------------------------------------------

PROMPTS = ["a photo of <c1>", "", "a symbol"]


def test_predictions_are_the_networks_for_each_prompt_under_one_noise(toy: Callable[..., Any]) -> None:
    work = toy(LoRA, "lora")
    batch = learnt(work, 0)
    domain, found = work.domain, work.domain.predictions(batch, PROMPTS)
    assert (found.shape, found.dtype) == ((2, 3, *domain.diffusion.info.latent_shape), torch.float32)
    for j, prompt in enumerate(PROMPTS):
        context = domain.diffusion.encode_text([prompt] * 2).states
        direct = domain.model(batch.noisy, batch.timesteps, encoder_hidden_states=context).sample
        torch.testing.assert_close(found[:, j], direct, rtol=1e-5, atol=1e-6)
    errors = domain.errors(batch, PROMPTS)
    away = (found - batch.target[:, None]).square().mean((2, 3, 4))
    # this model predicts velocity
    torch.testing.assert_close(errors, away * domain.diffusion.scheduler.alphas_cumprod[batch.timesteps][:, None])
    assert domain.prompts(0) == (PROMPTS[0],)
    torch.testing.assert_close(away[:, 0].mean(), domain.loss(batch))
    assert len({round(float(e), 7) for e in errors.detach().flatten()}) == 6


def test_gradients_of_predictions_do_not_depend_on_micro_batches(toy: Callable[..., Any]) -> None:
    work = toy(LoRA, "lora")
    batch = learnt(work, 0)
    params = [work.domain.tokens.rows[0], *(p for g in work.method.trained() for p in g.params)]
    found = []
    for size in (None, 4, 1):
        work.domain.micro_batch_size = size
        out = work.domain.predictions(batch, PROMPTS)
        found.append([out.detach(), *torch.autograd.grad(out.square().mean(), params)])
    assert all(float(t.abs().max()) > 0 for t in found[0])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_frozen_copy_stays_as_it_was_and_copies_no_more_than_it_must(
    toy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = toy(LoRA, "lora")
    batch = learnt(work, 0)
    domain = work.domain
    domain.micro_batch_size = 1
    before = domain.predictions(batch, PROMPTS).detach()
    made, real = [], copy.deepcopy
    with monkeypatch.context() as patched:
        patched.setattr(customization.copy, "deepcopy", lambda *given: made.append(real(*given)) or made[-1])
        frozen = domain.frozen()
    twin = made[-1]
    assert twin.vae.decoder.conv_in.weight is domain.diffusion.vae.decoder.conv_in.weight
    embedding = twin.text_encoder.get_input_embeddings()
    assert embedding.base.weight is domain.tokens.base.weight
    assert embedding.rows[0] is not domain.tokens.rows[0]
    assert not any(p.requires_grad for p in twin.network.parameters())
    assert {id(p) for p in twin.network.parameters()}.isdisjoint(id(p) for p in domain.model.parameters())
    with torch.no_grad():
        domain.tokens.rows[0].add_(1)
        for update in work.method.updates.values():
            update.A.add_(0.1)
    kept = frozen(batch, PROMPTS)
    assert not kept.requires_grad
    torch.testing.assert_close(kept, before, rtol=1e-5, atol=1e-6)
    assert (domain.predictions(batch, PROMPTS) - before).abs().max() > 1e-3


def test_without_updates_the_network_is_that_of_the_finished_tasks(toy: Callable[..., Any]) -> None:
    work = toy(LoRA, "lora")
    batch = learnt(work, 0)
    work.method.end_task(0)
    before = work.domain.predictions(batch, PROMPTS).detach()
    learnt(work, 1)
    updates = work.method.updates
    now = work.domain.predictions(batch, PROMPTS)
    with without_updates(updates.values()):
        with without_updates(updates.values()):
            inside = work.domain.predictions(batch, PROMPTS)
        assert torch.equal(work.domain.predictions(batch, PROMPTS), inside)
    with pytest.raises(ZeroDivisionError), without_updates(updates.values()):
        _ = 1 / 0
    assert torch.equal(inside, before)
    assert not inside.requires_grad
    assert all(u.active for u in updates.values())
    again = work.domain.predictions(batch, PROMPTS)
    assert again.requires_grad
    assert torch.equal(again, now)
    assert (now - before).abs().max() > 1e-4


def test_scores_of_a_teacher_make_a_method_that_resumes(toy: Callable[..., Any], empty_record: Any) -> None:
    sets = ("method.lr=1e-2", "method.head_lr=1e-2")
    whole = toy(DiffusionScores, "lora", *sets, folder="whole")
    whole.execute(empty_record())
    plain = toy(LoRA, "lora", *sets, folder="plain")
    plain.execute(empty_record())
    ours, theirs = whole.tensors(), plain.tensors()
    assert torch.equal(ours["domain.rows.0"], theirs["domain.rows.0"])
    assert not torch.equal(ours["domain.rows.1"], theirs["domain.rows.1"])
    with pytest.raises(KeyboardInterrupt):
        toy(DiffusionScores, "lora", *sets, kind=Killed).execute(empty_record())
    again = toy(DiffusionScores, "lora", *sets)
    assert again.folder.load_checkpoint("partial")[1]["step"] == 1
    again.execute(empty_record())
    assert [n for n, t in again.tensors().items() if not torch.equal(t, ours[n])] == []


# --- precision --------------------------------------------------------------------------------------------------------


class Watched(DiffusionScores):
    """Notes whether autocast is on wherever the runner calls."""

    seen: ClassVar[list[tuple[str, bool]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name in ("begin_task", "prepare", "loss", "penalty", "end_task", "diagnostics"):
            Watched.seen.append((name, torch.is_autocast_enabled("cpu")))
        return super().__getattribute__(name)


def test_only_the_passes_are_in_reduced_precision(
    toy: Callable[..., Any], empty_record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = toy(Watched, "lora", "precision=bf16")
    domain, inside, outside = work.domain, set(), []
    for part, module in (("unet", domain.model.conv_out), ("text", _a_linear(domain.diffusion.text_encoder))):
        module.register_forward_hook(lambda m, a, out, part=part: inside.add((part, out.dtype)))
    vae = domain.diffusion.vae.decoder.conv_out
    vae.register_forward_hook(lambda m, a, out: inside.add(("vae", out.dtype)))
    real = domain.evaluator._mmd
    monkeypatch.setattr(
        domain.evaluator, "_mmd", lambda x, y: outside.append(torch.is_autocast_enabled("cpu")) or real(x, y)
    )
    Watched.seen.clear()
    work.execute(empty_record())
    assert inside == {(part, torch.bfloat16) for part in ("unet", "text", "vae")}
    assert {name for name, _ in Watched.seen} >= {"begin_task", "prepare", "loss", "penalty", "end_task"}
    assert not any(on for _, on in Watched.seen)
    assert outside
    assert not any(outside)
    batch = next(domain.batches(1, 0))
    assert {domain.loss(batch).dtype, domain.predictions(batch, [""]).dtype} == {torch.float32}


def _a_linear(module: Any) -> Any:
    return next(m for m in module.modules() if isinstance(m, torch.nn.Linear))


def test_a_merge_solves_in_double_precision_whatever_the_passes_are(
    concepts: Callable[..., Any], tmp_path: Path
) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        work = concepts("custom_diffusion_merge", tmp_path / precision, f"precision={precision}")
        method = work.method
        for task in (0, 1):
            work.begin(task)
            method.learnt(task).copy_(
                method.pretrained + 1e-2 * (task + 1) * torch.sin(torch.arange(len(method.flat())))
            )
        found[precision] = method.merged(2)
    assert torch.equal(found["fp32"], found["bf16"])


# --- own inputs, sites of the text alone ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "own"),
    [
        ((), 2),
        (("concept.n_tokens=2",), 3),
        (("concept.prompt={token} on green",), 4),
        (("concept.class_noun=true",), 3),
        (("concept.prompt=a {noun} like {token}",), 2),
    ],
)
def test_own_inputs_are_those_from_the_placeholder_on(
    concepts: Callable[..., Any], tmp_path: Path, sets: tuple[str, ...], own: int
) -> None:
    domain = concepts("lora", tmp_path, *sets).domain
    for task in (0, 1):
        domain.begin_task(task)
    whole = [domain.concept_inputs(j) for j in (0, 1)]
    part = [domain.concept_inputs(j, own=True) for j in (0, 1)]
    for all_of_it, kept in zip(whole, part, strict=True):
        assert len(kept) == own
        assert torch.equal(all_of_it[-own:], kept)
    # the text encoder is causal: what stands before is the same in all prompts
    assert torch.equal(whole[0][:-own], whole[1][:-own])
    assert (part[0] - part[1]).abs().sum(1).min() > 1e-3


def test_closed_forms_are_refused_where_a_site_reads_more_than_text(
    concepts_preset: str, small_diffusion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(small_diffusion)
    *text_only, mixed = model.sites()
    assert model.text_only == {*text_only, mixed}
    model.text_only = frozenset(text_only)
    resolved = resolve(concepts_preset, "custom_diffusion_merge")
    domain = Customization(resolved, torch.device("cpu"), diffusion=model)
    monkeypatch.setattr(customization, "prior_images", lambda *given: pytest.fail("images were made first"))
    with pytest.raises(UserError, match=rf"custom_diffusion_merge needs sites that read the text alone, {mixed} of"):
        runner.method_class("custom_diffusion_merge")(resolved.sections["method"], domain, 2, 0)
    LoRA(resolve(concepts_preset, "lora").sections["method"], domain, 2, 0)


# --- requests ---------------------------------------------------------------------------------------------------------


def requests(*pairs: tuple[str, str], **more: Any) -> ConceptData:
    """A data set of requests."""
    listed = tuple(Concept(t, "", request=Request(t, a), **more) for t, a in pairs)
    return ConceptData("asked", listed, "asked", concepts_hash(listed))


ASKED = (("umbrella", "symbol"), ("cat", "house"))


def test_what_is_unlearnt_becomes_its_anchor(toy: Callable[..., Any]) -> None:
    work = toy(Ablation, "finetune", "train.steps=40", "stream.class_order=natural", data=requests(*ASKED))
    domain = work.domain
    assert [domain.request(j) for j in (0, 1)] == [Request(*pair) for pair in ASKED]
    assert domain.begin_task(0) == []
    assert domain.prompts(0) == ("a photo of symbol",)
    assert domain.targets_of(["a photo of symbol"] * 2) == ("a photo of umbrella",) * 2
    work.method.prepare(0)
    (group,) = work.method.trained()
    adam, losses = torch.optim.Adam(group.params, 1e-3), []
    for batch in domain.batches(0, 0):
        assert batch.prompts == ["a photo of symbol"] * 2
        adam.zero_grad()
        loss = work.method.loss(batch)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_requests_are_unlearnt_one_after_another(
    toy: Callable[..., Any], empty_record: Any, small_diffusion: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALCL_CACHE", str(tmp_path / "first"))
    sets = ("method.lr=1e-3", "input.augment=flip", "stream.class_order=natural", "train.steps=null")
    work = toy(Ablation, "finetune", *sets, data=requests(*ASKED))
    domain, config = work.domain, PriorConfig(n=2, steps=1, guidance=1.0)  # as the preset has it
    record = work.execute(empty_record())
    assert [t["steps"] for t in record["tasks"]] == [2, 2]
    assert len(domain.tokens.rows) == 0
    assert domain.state_dict() == {}
    monkeypatch.setenv("DUALCL_CACHE", str(tmp_path / "second"))  # they are made again, by the model as it was
    hashes = {}
    for task, (_, anchor) in enumerate(ASKED):
        prompt = f"a photo of {anchor}"
        images, hashes[prompt] = prior_images(copy.deepcopy(small_diffusion), config, anchor, prompt=prompt)
        assert torch.equal(domain.pixels(task), images)
    assert domain.facts()["prior"]["images_sha256"] == hashes
    assert domain.facts()["requests"][1] == {"target": "cat", "anchor": "house", "kind": "object"}
    assert domain.identity()["reference"] == "pictures of the anchors"
    assert [t["n_train"] for t in record["tasks"]] == [2, 2]
    sizes = sum(p.numel() for p in domain.full_parameters().values())
    assert [t["parameters_stored"] for t in record["tasks"]] == [sizes, sizes]
    assert record["matrix"]["rows"][1]["drift"][0] > 0
    assert all(v is not None for v in record["matrix"]["rows"][1]["mmd"])


def test_each_picture_of_a_request_goes_with_the_prompt_that_made_it(toy: Callable[..., Any]) -> None:
    prompts = ("a photo of {token}", "a drawing of a {token}")
    work = toy(Ablation, "finetune", "train.steps=4", data=requests(*ASKED, prompts=prompts))
    domain = work.domain
    work.begin(0)
    named = dict(zip(domain.prompts(0), domain.targets_of(domain.prompts(0)), strict=True))
    assert all(a.replace(domain.request(0).anchor, domain.request(0).target) == t for a, t in named.items())
    entries = domain._training_entries(0)
    assert [p for (p,) in entries.prompts] == [p for p in named for _ in range(2)]
    for at, (prompt,) in enumerate(entries.prompts):
        images, _ = prior_images(domain.diffusion, PriorConfig(n=2, steps=1, guidance=1.0), "", prompt=prompt)
        assert any(torch.equal(domain.pixels(0)[at], image) for image in images)


def test_a_run_of_requests_is_recorded_restored_and_exported(
    concepts_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = requests(*ASKED)
    monkeypatch.setattr(customization, "dataset_class", lambda *given: SimpleNamespace(load=lambda config: data))
    monkeypatch.setattr(runner, "method_class", lambda name: Ablation)
    resolved = resolve(concepts_preset, "finetune", ("train.steps=1", "method.lr=1e-4", "eval.n=2"))
    record = runner.run(resolved, tmp_path / "run")
    assert record["status"] == "finished"
    monkeypatch.setattr(customization, "prior_images", lambda *given: pytest.fail("pictures are for training"))
    again: Any = restore(tmp_path / "run").domain
    assert set(again.stream.requests) == {Request(*pair) for pair in ASKED}
    export(tmp_path / "run", "merged", tmp_path / "merged")
    assert (tmp_path / "merged" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("cls", "like", "data", "message"),
    [
        (LoRA, "lora", requests(*ASKED), "method lora learns, asked holds requests to unlearn"),
        (Ablation, "finetune", None, "method ablation unlearns, glyph-concepts holds no requests"),
    ],
)
def test_a_method_and_a_stream_that_do_not_suit_each_other(
    toy: Callable[..., Any], cls: type[Method], like: str, data: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        toy(cls, like, data=data)


def test_wrong_requests_are_named(toy: Callable[..., Any], concepts: Callable[..., Any], tmp_path: Path) -> None:
    for given in (("cat", "cat"), ("", "cat"), ("cat", " ")):
        with pytest.raises(UserError, match="give two different things"):
            Request(*given)
    photographs = concepts("lora", tmp_path).domain.stream.concepts[0]
    with pytest.raises(UserError, match="mixes concepts to learn with requests to unlearn"):
        ConceptData("both", (photographs, *requests(*ASKED).concepts), "both", "")
    with pytest.raises(UserError, match=r"the prompt 'a photo of cat.* has \d+ tokens"):
        toy(Ablation, "finetune", "stream.tasks=1", data=requests(("cat " * 80, "house")))
    work = toy(Ablation, "finetune", data=requests(*ASKED))
    work.domain.begin_task(None)
    with pytest.raises(UserError, match="one after another"):
        work.domain.targets_of(["a photo of symbol"])


# --- token rows -------------------------------------------------------------------------------------------------------


def test_an_encoder_sets_rows_without_a_step_and_forgets_nothing(toy: Callable[..., Any], empty_record: Any) -> None:
    sets = ("stream.tasks=3", "concept.n_tokens=2")
    work = toy(Encoder, "textual_inversion", *sets, folder="whole")
    record = work.execute(empty_record())
    domain = work.domain
    assert [(t["steps"], t["parameters_trained"]) for t in record["tasks"]] == [(0, 0)] * 3
    assert [r["drift"] for r in record["matrix"]["rows"]] == [[0.0], [0.0, 0.0], [0.0, 0.0, 0.0]]
    rows = [domain.token_rows(j)[0] for j in range(3)]
    assert all(torch.equal(r, p) and len(r) == 2 for r, p in zip(rows, domain.tokens.rows, strict=True))
    assert not torch.equal(rows[0], rows[1])
    assert domain.concept_images(0).dtype == torch.uint8
    domain.check_tokens()

    class Interrupted(Run):
        def begin(self, task: int) -> Any:
            if task == 2:
                raise KeyboardInterrupt
            return super().begin(task)

    with pytest.raises(KeyboardInterrupt):
        toy(Encoder, "textual_inversion", *sets, kind=Interrupted).execute(empty_record())
    again = toy(Encoder, "textual_inversion", *sets)
    again.execute(empty_record())
    assert all(torch.equal(t, work.tensors()[n]) for n, t in again.tensors().items())


def test_rows_are_set_in_their_own_task_only(toy: Callable[..., Any]) -> None:
    work = toy(Encoder, "textual_inversion")
    domain = work.domain
    work.begin(0)
    (rows,) = domain.token_rows(0)
    domain.set_token_rows(0, [rows + 1])
    assert torch.equal(domain.tokens.rows[0], rows + 1)
    assert domain.tokens.rows[0].requires_grad
    for wrong in ([rows[0]], [], [rows, rows], [rows[:, :3]]):
        with pytest.raises(ValueError, match="wanted"):
            domain.set_token_rows(0, wrong)
    work.begin(1)
    with pytest.raises(RuntimeError, match="concept 1 may be set in its own task only"):
        domain.set_token_rows(0, [rows])
    domain.check_tokens()
    with torch.no_grad():
        domain.tokens.rows[0].add_(1)
    with pytest.raises(RuntimeError, match="concept 1 has changed"):
        domain.check_tokens()
