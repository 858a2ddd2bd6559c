"""Continual unlearning: the toy numbers of its add-ons, its two base losses, and what its data sets ask for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains import customization
from dualcl.benchmark.exports.export import export
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.runs.restore import restore
from dualcl.benchmark.runs.runner import run
from dualcl.datasets.concepts import Concept, ConceptData, Request, Retained, concepts_hash
from dualcl.datasets.drawing.portrait_captions import caption_words
from dualcl.datasets.drawing.portraits import CAPTIONED
from dualcl.datasets.portraits_unlearn import PHRASES, PortraitsUnlearn, split
from dualcl.datasets.unlearn_prompts import UnlearnPrompts
from dualcl.methods.shared.low_rank import without_updates
from dualcl.methods.shared.site_delta import SiteDelta, directions, most_important
from dualcl.methods.shared.ties import ties
from dualcl.methods.unlearning import Unlearning

UNLEARNERS = ("concept_ablation", "esd")


def begun(work: Any, task: int = 0) -> Any:
    """The method, in its task."""
    work.begin(task)
    work.method.prepare(task)
    return work.method


def steps(
    work: Any, task: int, kind: type[torch.optim.Optimizer] = torch.optim.Adam, n: int = 2, lr: float = 1e-2
) -> None:
    """A few optimiser steps."""
    params = [p for group in work.method.trained() for p in group.params]
    optimizer = kind(params, lr=lr)  # type: ignore[call-arg]
    for batch, _ in zip(work.domain.batches(task, 0), range(n), strict=False):
        optimizer.zero_grad()
        penalty = work.method.penalty()
        (work.method.loss(batch) + (0 if penalty is None else penalty)).backward()
        optimizer.step()


# --- toys -------------------------------------------------------------------------------------------------------------


def test_a_direction_is_taken_out_exactly_and_with_the_published_ridge_nearly() -> None:
    delta = SiteDelta(nn.Linear(2, 2, bias=False))
    delta.start()
    delta.Z.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    delta.held = directions(torch.tensor([[5.0, 0.0]]), 1).float()
    assert delta.update().tolist() == [[0, 2], [0, 4]]
    c = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    ridge = torch.eye(2, dtype=torch.float64) - c @ torch.linalg.inv(c.T @ c + 1e-4 * torch.eye(1)) @ c.T
    assert float(ridge[0, 0]) == pytest.approx(9.999e-5, rel=1e-4)  # theirs: an entry is left


def test_directions_leave_out_near_copies_and_what_adds_nothing() -> None:
    rows = torch.tensor([[2.0, 0, 0, 0], [2.0, 0.1, 0, 0], [1.0, 1, 0, 0], [3.0, -1, 0, 0], [0, 0, 1, 0]])
    q = directions(rows, 4)
    assert q.shape == (4, 3)
    torch.testing.assert_close(q.T @ q, torch.eye(3, dtype=torch.float64))
    assert torch.equal(directions(rows, 2), q[:, :2])  # the first ones
    assert directions(rows[:0], 4).shape == (4, 0)


def test_adam_steps_on_projected_gradients_leave_the_subspace() -> None:
    delta = SiteDelta(nn.Linear(2, 1, bias=False))
    c = torch.tensor([1.0, 2.0]) / 5**0.5
    moved = {}
    for alone in (True, False):
        delta.start()
        delta.gradients_alone, delta.held = alone, directions(c[None], 1).float()
        optimizer = torch.optim.Adam([delta.Z], lr=1.0)
        (delta.update() * torch.tensor([[-3.0, -1.0]])).sum().backward()  # a step up the gradient (3, 1)
        assert delta.Z.grad is not None
        torch.testing.assert_close(delta.Z.grad, torch.tensor([[-2.0, 1.0]]))
        optimizer.step()
        moved[alone] = float(delta.update().detach()[0] @ c)
        delta.Z.grad = None
    assert moved[True] == pytest.approx(-0.447, abs=1e-3)
    assert moved[False] == pytest.approx(0, abs=1e-6)


def test_the_entries_that_matter_most() -> None:
    weights, gradients = torch.tensor([2.0, -1, 0.5]), torch.tensor([0.1, 1, -3])
    assert most_important(weights, gradients, 1 / 3).tolist() == [False, False, True]
    assert most_important(weights, gradients, 1 / 3, one_more=True).tolist() == [False, True, True]
    assert most_important(weights, gradients, 1.0, one_more=True).all()


def test_ties_of_two_updates() -> None:
    one, other = torch.tensor([1.0, -2, 0.5]), torch.tensor([3.0, 1, -0.5])
    assert ties(torch.stack([one, other]), 1.0).tolist() == [2, -2, 0]
    assert ties(torch.stack([one, other]), 1.0, zero_follows=True).tolist() == [2, -2, -0.5]
    assert ties(torch.stack([one.abs(), other]), 1.0).tolist() == [2, 1.5, 0]
    assert ties(torch.stack([one.abs(), other]), 1.0, zero_follows=True).tolist() == [2, 1.5, 0.5]


# --- base losses ------------------------------------------------------------------------------------------------------


class Told:
    """A domain whose predictions are numbers: 3 under a target, 1 under the empty prompt, 2 under an anchor."""

    kept = ()

    def targets_of(self, prompts: Any) -> tuple[str, ...]:
        return tuple(f"target {p}" for p in prompts)

    def paired_predictions(self, batch: Any, prompts: Any) -> torch.Tensor:
        value = {"": 1.0, "target a": 3.0, "a": 2.0}
        return torch.tensor([value[p] for p in prompts]).view(-1, 1, 1, 1)

    def noise_weights(self, batch: Any) -> torch.Tensor:
        return torch.tensor([0.5, 0.25])


@pytest.mark.parametrize(
    ("name", "sets", "goal"),
    [("esd", (), -1.0), ("esd", ("method.eta=0.5",), 0.0), ("concept_ablation", (), 2.0),
     ("concept_ablation", ("method.teacher=previous",), 2.0)],
)  # fmt: skip
def test_goals_by_hand(concepts: Callable[..., Any], tmp_path: Path, name: str, sets: Any, goal: float) -> None:
    method = concepts(name, tmp_path, *sets).method
    method.offered = Told()
    batch = type("Batch", (), {"prompts": ["a", "a"]})()
    assert method.goal(batch, ("target a",) * 2).flatten().tolist() == [goal] * 2
    assert float(method.loss(batch)) == (3 - goal) ** 2
    method.config = replace(method.config, distance="noise")
    assert float(method.loss(batch)) == (0.5 + 0.25) / 2 * (3 - goal) ** 2


def test_the_teacher_is_the_network_before_the_request(concepts: Callable[..., Any], tmp_path: Path) -> None:
    work = concepts("concept_ablation", tmp_path, "method.teacher=previous")
    method = begun(work)
    batch = next(work.domain.batches(0, 0))
    targets = work.domain.targets_of(batch.prompts)
    before = work.domain.paired_predictions(batch, batch.prompts).detach()
    steps(work, 0)
    assert torch.equal(method.goal(batch, targets), before)
    now = work.domain.paired_predictions(batch, batch.prompts)
    assert (now - before).abs().max() > 1e-4
    direct = work.domain.predictions(batch, [batch.prompts[0]])[:, 0]
    torch.testing.assert_close(now, direct, rtol=1e-5, atol=1e-6)
    with without_updates(method.each()):
        assert not work.domain.paired_predictions(batch, targets).requires_grad
    assert all(d.active for d in method.each())
    with pytest.raises(ValueError, match="1 prompts for 2 samples"):
        work.domain.paired_predictions(batch, [""])


def test_esd_learns_from_pictures_of_the_target_that_the_network_makes(
    concepts: Callable[..., Any], tmp_path: Path
) -> None:
    work = concepts("esd", tmp_path)
    domain = work.domain
    work.begin(0)
    anchors = domain._training_entries(0)
    work.method.prepare(0)
    entries = domain._training_entries(0)
    assert entries.prompts == anchors.prompts  # of the anchor still: the target's come from them
    assert not torch.equal(entries.mean, anchors.mean)
    again = domain.sample(
        domain.targets_of(["a photo of " + domain.request(0).anchor] * 2),
        [customization.torch_generator(0, "target", 0, k) for k in range(2)],
    )
    assert torch.equal(domain._of_target, again)
    work.begin(1)
    assert domain._of_target is None


@pytest.mark.parametrize("name", UNLEARNERS)
def test_unlearning_moves_the_target_and_methods_get_the_same(
    name: str, concepts: Callable[..., Any], tmp_path: Path, empty_record: Any
) -> None:
    drawn = []
    work = concepts(name, tmp_path, "method.lr=1e-3", "eval.n=2")
    generate = work.domain.evaluator._generate
    work.domain.evaluator._generate = lambda j, p: drawn.append((j, tuple(p))) or generate(j, p)
    before = [d.base.weight.clone() for d in work.method.each()]
    record = work.execute(empty_record())
    targets = [work.domain.request(j).target for j in range(2)]
    evaluated = [0, 1, 0, 0, 1]  # by the pretrained network, then after each request
    assert drawn == [(j, (f"a photo of {targets[j]}",) * 2) for j in evaluated]
    assert all(not torch.equal(b, d.base.weight) for b, d in zip(before, work.method.each(), strict=True))
    assert all(not d.Z.any() and not d.active for d in work.method.each())
    rows = record["matrix"]["rows"]
    assert rows[1]["drift"][0] > 0
    # no judge knows these words: nothing is told
    assert [row["target_shown"] for row in rows] == [[None], [None, None]]
    assert not any("target_shown_before" in row for row in rows)
    assert not any(key.startswith("retained") for key in rows[1])
    shown = sorted(p.relative_to(tmp_path / "samples").as_posix() for p in (tmp_path / "samples").rglob("*heart/0.png"))
    assert shown == [f"after_{i}/3_a-photo-of-heart/0.png" for i in range(3)]


# --- what holds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_what_is_kept_gives_the_same_keys_and_values_whatever_the_optimiser(
    concepts: Callable[..., Any], tmp_path: Path, kind: Any
) -> None:
    work = concepts("concept_ablation", tmp_path, "method.project=2", "method.select=0.5", "method.weight_decay=0.1")
    domain, method = work.domain, work.method
    for task in range(2):
        begun(work, task)
        inputs = method.to_hold(task)
        assert len(inputs) == 1 + task + 2  # the start token, the earlier target, what is to be kept
        assert method.facts["held_directions"] == len(inputs)
        before = [d.base.weight.detach().clone() for d in method.each()]
        steps(work, task, kind, n=2, lr=0.05 if kind is not torch.optim.SGD else 10.0)
        method.end_task(task)
        updates = [delta.base.weight - weight for weight, delta in zip(before, method.each(), strict=True)]
        assert max(float(moved.abs().max()) for moved in updates) > 1e-3  # few entries of some site are selected
        for moved in updates:
            assert (inputs @ moved.T).abs().max() <= 1e-5 * inputs.norm(dim=1).max()
    start = domain.start_input()
    assert torch.equal(start[0], domain.diffusion.encode_text(["a photo of cat"]).states[0, 0])
    (own,) = domain.word_inputs(domain.target_prompts(1)[:1])
    text = domain.diffusion.encode_text(domain.target_prompts(1)[:1]).states[0]
    ids = domain.diffusion.vocabularies[0].ids(["a photo of", *domain.target_prompts(1)])
    first, end = (int((row == domain.diffusion.vocabularies[0].tokenizer.eos_token_id).int().argmax()) for row in ids)
    torch.testing.assert_close(own, text[first:end].mean(0))  # "a photo of" is the anchor's too


def test_only_the_selected_entries_move(concepts: Callable[..., Any], tmp_path: Path) -> None:
    work = concepts("concept_ablation", tmp_path, "method.select=0.1")
    method = begun(work)
    total = sum(d.Z.numel() for d in method.each())
    assert method.facts["selected"] == round(0.1 * total)
    before = [d.base.weight.detach().clone() for d in method.each()]
    steps(work, 0)
    masks = [d.mask.bool() for d in method.each()]
    method.end_task(0)
    moved = [d.base.weight != w for d, w in zip(method.each(), before, strict=True)]
    assert not any((m & ~mask).any() for m, mask in zip(moved, masks, strict=True))
    assert 0 < sum(int(m.sum()) for m in moved) <= round(0.1 * total)


def test_penalties_by_hand(concepts: Callable[..., Any], tmp_path: Path) -> None:
    work = concepts("concept_ablation", tmp_path, "method.l1=3", "method.l2=5", "method.reference=pretrained")
    method = begun(work)
    for number, delta in enumerate(method.each()):
        delta.Z.data.fill_(-2.0 if number == 0 else 0.0)
    first, total = method.each()[0].Z.numel(), sum(d.Z.numel() for d in method.each())
    assert method.penalty().item() == pytest.approx((3 * 2 + 5 * 4) * first / total, rel=1e-5)
    method.end_task(0)
    begun(work, 1)
    assert method.penalty().item() == pytest.approx((3 * 2 + 5 * 4) * first / total, rel=1e-3)  # since ever
    assert concepts("esd", tmp_path / "plain").method.penalty() is None


def test_quirks_reach_what_they_change(concepts: Callable[..., Any], tmp_path: Path) -> None:
    found = {}
    for quirk, *sets in (
        ("one_more", "method.select=0.1"),
        ("project_gradients", "method.project=2"),
        ("hold_start_token",),
        ("ties_zero", "method.merge=true", "method.density=1"),
    ):
        for quirks in ("", quirk):
            given = (*sets, f"method.reference_quirks=[{quirks}]")
            work = concepts("concept_ablation", tmp_path / (quirk + quirks), *given)
            method = begun(work)
            held = None if method.each()[0].held is None else method.each()[0].held.clone()
            torch.manual_seed(0)
            steps(work, 0)
            updates = [d.update().detach().clone() for d in method.each()]
            found[quirks or f"not {quirk}"] = (method, updates, held)
            assert any(quirks in c for c in method.caveats()) or not quirks
    assert found["one_more"][0].facts["selected"] == found["not one_more"][0].facts["selected"] + 1
    for name, least, most in (("project_gradients", 1e-3, 1), ("not project_gradients", 0, 1e-6)):
        _, updates, held = found[name]
        assert least <= max(float((u @ held).abs().max()) for u in updates) <= most
    pairs = zip(found["hold_start_token"][1], found["not hold_start_token"][1], strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
    for name in ("ties_zero", "not ties_zero"):
        method = found[name][0]
        method.end_task(0)
        # a second request that took the first one's update back
        method.register_buffer("learnt_1", -method.get_buffer("learnt_0"))
        merged = torch.cat([m.reshape(-1) for m in method.merged(2)])
        assert bool(merged.any()) == (name == "ties_zero")


def test_one_merged_request_is_that_request_and_two_are_their_ties(
    concepts: Callable[..., Any], tmp_path: Path
) -> None:
    plain, merged = (
        concepts("concept_ablation", tmp_path / name, *sets)
        for name, sets in (("a", ()), ("b", ("method.merge=true", "method.density=1")))
    )
    for work in (plain, merged):
        begun(work)
        steps(work, 0)
        work.method.end_task(0)
    start = merged.method.pretrained
    for a, b in zip(plain.method.each(), merged.method.each(), strict=True):
        torch.testing.assert_close(a.base.weight, b.base.weight, rtol=0, atol=1e-7)
    begun(merged, 1)
    assert all(torch.equal(d.base.weight, w) for d, w in zip(merged.method.each(), start, strict=True))
    steps(merged, 1)
    merged.method.end_task(1)
    learnt = [merged.method.get_buffer(f"learnt_{j}").split([w.numel() for w in start]) for j in range(2)]
    for i, (delta, w) in enumerate(zip(merged.method.each(), start, strict=True)):
        torch.testing.assert_close(
            delta.base.weight.detach(), w + ties(torch.stack([one[i].view_as(w) for one in learnt]), 1.0)
        )
    assert merged.method.stored_parameters() == 2 * plain.method.stored_parameters()


def test_the_start_token_teaches_nothing_and_moves_all_the_same() -> None:
    delta = SiteDelta(nn.Linear(3, 2, bias=False))
    x = torch.randn(1, 4, 3)
    grads = []
    for held in (True, False):
        delta.start()
        delta.holds_start = held
        delta.Z.data.fill_(0.5)
        out = delta(x)
        torch.testing.assert_close(out, F.linear(x, delta.base.weight + 0.5))
        out.sum().backward()
        grads.append(delta.Z.grad.clone())  # type: ignore[union-attr]
        delta.Z.grad = None
    torch.testing.assert_close(grads[0], x[0, 1:].sum(0).expand(2, 3))
    torch.testing.assert_close(grads[1], x[0].sum(0).expand(2, 3))


def test_whole_weights_are_exported(
    stream_of: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve(stream_of("concept_ablation"), "concept_ablation", ("train.steps=1", "method.lr=1e-2"))
    run(resolved, tmp_path / "run")
    monkeypatch.setattr(customization, "prior_images", lambda *given: pytest.fail("pictures are for training"))
    export(tmp_path / "run", "merged", tmp_path / "whole")
    unlearnt: Any = restore(tmp_path / "run")
    assert unlearnt.domain.evaluator._before == ({}, {})  # nothing is drawn for a run that is used
    whole, plain = (load(BaseConfig(**given)) for given in ({"model": str(tmp_path / "whole")}, {}))
    moved = 0
    for name, site in unlearnt.domain.sites().items():
        assert torch.equal(whole.sites()[name].weight, site.weight)
        moved += not torch.equal(plain.sites()[name].weight, site.weight)
    assert moved == len(unlearnt.domain.sites())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("method.select=0",), "method.select must be above 0"),
        (("method.l2=-1",), "method.l2 must not be negative"),
        (("method.teacher=old",), "method.teacher must be"),
        (("method.reference_quirks=[one_more]",), "the quirk one_more is for a method.select below 1"),
        (("method.reference_quirks=[ties_zero]",), "the quirk ties_zero is for method.merge=true"),
        (("method.reference_quirks=[project_gradients]",), "is for a method.project above 0"),
        (("method.merge=true", "method.l1=1", "method.reference=pretrained"), "nothing without method.merge=false"),
    ],
)
def test_wrong_settings_are_named(stream_of: Callable[[str], str], sets: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(stream_of("concept_ablation"), "concept_ablation", sets)


def test_nothing_to_keep_is_told_before_a_step(concepts: Callable[..., Any], tmp_path: Path) -> None:
    work = concepts("esd", tmp_path, "method.project=2", "data.keep=[]")
    with pytest.raises(UserError, match=r"method\.project=2 needs things to keep"):
        begun(work)


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_the_portraits_requests_keep_apart_what_is_unlearnt_tuned_on_kept_and_measured() -> None:
    known = set(caption_words())
    for attribute in CAPTIONED:
        parts = {part: split(attribute, part, 0) for part in ("reported", "tuning")}
        ours, tuned = parts["reported"], parts["tuning"]
        if attribute in PHRASES:
            assert len({*ours.targets, *tuned.targets, *ours.kept, *ours.measured}) == len(CAPTIONED[attribute]) == 16
            assert (len(ours.targets), len(tuned.targets), len(ours.measured)) == (5, 5, 4)
        assert not {*ours.measured} & {*tuned.measured, *ours.kept, *tuned.targets, *ours.targets}
        assert not {*tuned.measured} & {*tuned.targets, *tuned.kept}
        assert ours.measured
        assert tuned.measured
    for targets in ("reported", "tuning"):
        data = PortraitsUnlearn.load(PortraitsUnlearn.Config(targets=targets))
        assert len(data.concepts) == 10
        texts = [p for c in data.concepts for p in (*c.prompts, *c.eval_prompts, c.request.target, c.request.anchor)]  # type: ignore[union-attr]
        texts += [*data.kept, *(p for r in data.retained for p in r.prompts)]
        assert {w for t in texts for w in t.replace("{token}", "").split()} <= known
        taught = {p.replace("{token}", c.request.target) for c in data.concepts for p in c.prompts}  # type: ignore[union-attr]
        assert not taught & {p for r in data.retained for p in r.prompts}
        assert {r.side for r in data.retained} == {"inside", "across"}
        for one in data.retained:
            (value,) = one.attributes.values()
            assert all(value in p for p in one.prompts)
    with pytest.raises(UserError, match=r"data\.requests=11: there are 10"):
        PortraitsUnlearn.Config(requests=11)


def test_requests_in_words(tmp_path: Path) -> None:
    file = tmp_path / "asked.txt"
    file.write_text("grumpy cat = cat\n\nVan Gogh = painter\nR2D2=robot\n")
    config = UnlearnPrompts.Config(requests=[str(file)], keep=["a dog"], retained=["a cow"], validation=1)
    assert config.requests == ["grumpy cat = cat", "Van Gogh = painter", "R2D2=robot"]
    data = UnlearnPrompts.load(config)
    assert [c.request for c in data.concepts] == [Request("grumpy cat", "cat"), Request("Van Gogh", "painter")]
    assert (data.kept, data.retained) == (("a dog",), (Retained("a cow", ("a cow",)),))
    tuned = UnlearnPrompts.load(UnlearnPrompts.Config(requests=config.requests, validation=1, tuning=True))
    assert [c.name for c in tuned.concepts] == ["R2D2"]
    for given, message in (
        ({}, "data.requests is not set"),
        ({"requests": ["cat"]}, "'cat' is no request; write TARGET = ANCHOR"),
        ({"requests": ["a = b"], "validation": 1}, "leaves none of 1"),
        ({"requests": ["a = b"], "tuning": True}, "needs data.validation=N"),
        ({"requests": ["a = b"], "keep": ["c"], "retained": ["c"]}, "keeps 'c' and measures it"),
        ({"requests": ["a = b"], "retained": ["c", "c"]}, "retain two things called 'c'"),
    ):
        with pytest.raises(UserError, match=message):
            UnlearnPrompts.load(UnlearnPrompts.Config(**given))  # type: ignore[arg-type]


def test_what_is_retained_is_measured_by_a_judge_that_knows_it(
    concepts_preset: str, small_diffusion: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tuple(Concept(t, "", request=Request(t, "symbol"), attributes={"what": t}) for t in ("umbrella", "cat"))
    things = (
        Retained("sun", ("a sun", "the sun"), "inside", {"what": "sun"}),
        Retained("red", ("a red house",), "across", {"ink": "red"}),
        Retained("blue", ("a blue house",), "across", {"ink": "blue"}),
    )
    data = ConceptData("asked", asked, "asked", concepts_hash(asked), retained=things)
    resolved = resolve(concepts_preset, "finetune", ("eval.n=2", "stream.class_order=natural"))
    domain = customization.Customization(
        resolved, torch.device("cpu"), data=data, diffusion=copy.deepcopy(small_diffusion)
    )
    domain.folder = tmp_path
    shows: dict[str, Any] = {"what": "umbrella", "ink": "red"}
    features = type(domain.evaluator.features)
    monkeypatch.setattr(features, "attributes", lambda self, images: [shows] * len(images))
    monkeypatch.setattr(
        customization, "prior_images", lambda *given: (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "")
    )
    domain._picture_requests()
    domain.before_tasks()
    domain.begin_task(0)
    shows = {"what": "sun", "ink": "red"}
    row = domain.evaluate([0])
    assert (row["target_shown"], row["target_shown_before"]) == ([0.0], [1.0])
    assert (row["retained_inside"], row["retained_inside_before"]) == ([1.0], [0.0])
    assert (row["retained_across"], row["retained_across_before"]) == ([0.5], [0.5])
    domain.begin_task(1)
    shows = {"ink": "grey"}
    row = domain.evaluate([0, 1])
    assert row["target_shown"] == [None, None]  # the judge does not know what is asked
    assert "target_shown_before" not in row
    assert "retained_inside" not in row
    assert row["retained_across"] == [None, 0.0]
    # a run that goes on reads what the pretrained model drew, and does not draw it again
    drawn = []
    monkeypatch.setattr(type(domain), "sample", lambda self, *given: drawn.append(given))
    before = domain.evaluator._before
    shows = {"what": "umbrella", "ink": "red"}
    domain.evaluator._before = {}, {}
    domain.before_tasks()
    assert drawn == []
    assert domain.evaluator._before == before
    (tmp_path / "samples/after_0/1_umbrella/0.png").write_bytes(b"no picture")
    assert domain.evaluator._earlier(0, "umbrella", 2) is None
    assert domain.evaluator._earlier(1, "cat", 2) is not None
    monkeypatch.setattr(features, "judged", {"what": ("umbrella", "cat", "sun"), "ink": ("red", "grey")})
    with pytest.raises(UserError, match=r"say ink=blue of 'blue', which .* cannot judge; it knows: grey, red; leave"):
        domain.check_new()


def test_there_is_a_base_class_without_a_goal() -> None:
    with pytest.raises(NotImplementedError):
        Unlearning.goal(None, None, ())  # type: ignore[arg-type]
