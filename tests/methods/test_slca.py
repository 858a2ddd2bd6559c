"""Class statistics, classifier alignment, and SLCA on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.grids.sweep import plan_sweep
from dualcl.benchmark.runs.method_check import PROPERTIES, check_method
from dualcl.methods import method_class
from dualcl.methods.shared.alignment import AlignConfig, aligned, alignment_loss, scales
from dualcl.methods.shared.class_statistics import ClassGaussians, Moments, class_moments, draws

# --- statistics -------------------------------------------------------------------------------------------------------


def test_parts_are_merged_by_hand() -> None:
    whole = Moments(torch.tensor([[0.0], [2.0]])).merge(Moments(torch.tensor([[4.0]])))
    assert (whole.count, whole.mean.tolist(), whole.scatter.tolist()) == (3, [2.0], [[8.0]])
    assert whole.covariance().tolist() == [[4.0]]


def test_any_batches_give_numpys_covariance() -> None:
    x, y = 100 + torch.randn(50, 4), 3 + torch.arange(50) % 3
    for size in (1, 7, 50):
        found = class_moments(zip(x.split(size), y.split(size), strict=True), range(3, 6))
        for output, part in zip((3, 4, 5), found, strict=True):
            own = x[y == output].double()
            torch.testing.assert_close(part.mean, own.mean(0))
            torch.testing.assert_close(part.covariance(), torch.cov(own.T), rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match=r"no training image for the outputs \[6, 7\]"):
        class_moments([(x, y)], range(3, 8))
    assert Moments(x[:1]).covariance().abs().max() == 0


def test_draws_have_the_mean_and_covariance_kept() -> None:
    kept = ClassGaussians(2, 2)
    kept.add([(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 1]))], range(1, 2))
    assert kept.means.tolist() == [[0, 0], [1, 0]]
    assert kept.covariances.tolist() == [[0, 0, 0], [2, 0, 0]]
    assert (kept.numbers(1), sum(b.numel() for b in kept.buffers())) == (5, 10)
    sigma = kept.covariance(1) + 1e-4 * torch.eye(2)
    factor = torch.linalg.cholesky(sigma).float()
    n = 100_000
    (found,) = draws(kept.means[1:], factor[None], n, torch.Generator().manual_seed(0))
    assert ((found.mean(0) - kept.means[1]).abs() <= 4 * (sigma.diagonal() / n).sqrt()).all()
    # standard error of a covariance of normal draws: sqrt((s_ii s_jj + s_ij^2) / n)
    errors = ((torch.outer(sigma.diagonal(), sigma.diagonal()) + sigma.square()) / n).sqrt()
    assert ((torch.cov(found.T.double()) - sigma).abs() <= 4 * errors).all()


# --- alignment --------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    loss = alignment_loss(torch.tensor([[3.0, 4.0, 0.0, 5.0]]), torch.tensor([3]), [2, 2])
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2) + math.exp(-4) + math.exp(-10)), abs=1e-6)
    assert float(loss) == pytest.approx(0.142971, abs=1e-6)


def test_the_scale_of_means_by_hand() -> None:
    assert scales([2, 3]).tolist() == pytest.approx([0.95, 0.95, 1, 1, 1])
    assert scales([4]).tolist() == [1] * 4


def test_rows_learn_what_the_gaussians_say() -> None:
    means, factors = 3 * torch.eye(4), 0.3 * torch.eye(4).expand(4, 4, 4)
    rows = torch.cat([0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(4, 1)], 1)
    config = AlignConfig(align_epochs=20)
    found = aligned(rows, means, factors, [2, 2], config, torch.Generator().manual_seed(0))
    assert (means @ found[:, :-1].T + found[:, -1]).argmax(1).tolist() == [0, 1, 2, 3]
    again = aligned(rows, means, factors, [2, 2], config, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)
    assert not found.requires_grad


def test_settings_are_checked() -> None:
    for name in ("align_epochs", "align_lr"):
        with pytest.raises(UserError, match=f"{name} must not be negative"):
            AlignConfig(**{name: -1})


# --- SLCA -------------------------------------------------------------------------------------------------------------

STEPS = ("train.epochs=2", "method.lr=1e-4", "method.head_lr=1e-2")


def test_without_alignment_it_is_finetune_pp(
    tiny: Callable[..., Any], executed: Callable[..., Any], tmp_path: Path
) -> None:
    one = executed(tiny("slca", *STEPS, "method.align_epochs=0"), tmp_path / "slca")
    two = executed(tiny("finetune_pp", *STEPS), tmp_path / "finetune_pp")
    assert one.tensors().keys() == two.tensors().keys()
    assert all(torch.equal(t, two.tensors()[n]) for n, t in one.tensors().items())
    assert one.method.caveats() == []
    assert one.method.stored_parameters() == two.method.stored_parameters()


def learnt(domain: Any, method: Any, shrink: float = 1.0) -> Any:
    """Two tasks, rows trained on features; those of task 0 are `shrink` times themselves when task 1 ends."""
    for task in range(2):
        shared = domain.begin_task(task)
        method.begin_task(task)
        optimizer = torch.optim.Adam(shared, lr=0.01)
        for x, y in list(domain.training_features(task)) * 10:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(domain.heads[task](x), y - domain.outputs(task).start).backward()
            optimizer.step()
        if task == 1:
            weight, bias = domain.output_rows(0)
            domain.set_output_rows(0, shrink * weight, shrink * bias)
            if method.aligner is not None:
                method.aligner.rows[: len(bias)] *= shrink
        method.end_task(task)
    return method


def test_alignment_brings_a_forgotten_task_back() -> None:
    found = {}
    for key in ("align_epochs=0", "align_epochs=5", "reference_quirks=restart_rows"):
        sets = ("data.classes=8", "data.train_per_class=20", "data.test_per_class=10", "stream.tasks=2", "device=cpu")
        resolved = resolve("glyphs", "slca", [*sets, f"method.{key}"])
        domain: Any = Classification(resolved, torch.device("cpu"))
        learnt(domain, method_class("slca")(resolved.sections["method"], domain, 2, 0), shrink=0.01)
        found[key] = [c / n for c, n in zip(*domain.evaluate(range(2)).values(), strict=True)]
        assert domain.output_rows(0)[0].norm() < 0.1  # as they were trained
    print(f"accuracy of both tasks: {found}")
    lost, *back = found.values()
    assert lost[0] < 0.2
    assert all(tasks[0] > 0.6 and tasks[1] > 0.6 for tasks in back)


def test_what_is_stored_is_a_triangle_of_each_class(build: Callable[..., Any]) -> None:
    domain, method = build("slca")
    learnt(domain, method)
    backbone = sum(p.numel() for p in domain.full_parameters().values())
    gaussians = 5 * (32 + 32 * 33 // 2)
    assert method.stored_parameters() == backbone + gaussians
    assert "stores a mean and a covariance of every class" in method.caveats()[0]
    again = learnt(*build("slca", "method.reference_quirks=restart_rows"))
    assert again.stored_parameters() == backbone + gaussians + 5 * 33
    assert "two sets of rows" in again.caveats()[1]


def test_quirks_change_rows_and_nothing_else_of_the_state(build: Callable[..., Any]) -> None:
    rows = {}
    for quirk in ("[]", "restart_rows", "equal_tasks"):
        method = learnt(*build("slca", f"method.reference_quirks={quirk}"))
        rows[quirk] = method.aligner.rows[:5].clone()
    assert not torch.equal(rows["[]"], rows["equal_tasks"])  # three classes, then two
    assert torch.equal(rows["[]"], rows["restart_rows"])  # nothing was aligned after the first task yet


def test_an_interrupted_run_ends_the_same(tiny: Callable[..., Any], resumed: Callable[..., Any]) -> None:
    resumed(tiny("slca", "train.checkpoint_seconds=0"), "task 2, step 1")


# --- alignment as an option -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "clora", "inflora"])
def test_alignment_changes_no_step_of_another_method(
    name: str, tiny: Callable[..., Any], executed: Callable[..., Any], tmp_path: Path
) -> None:
    plain = executed(tiny(name), tmp_path / "plain")
    own = executed(tiny(name, "method.align=true"), tmp_path / "aligned")
    tensors = own.tensors()
    assert all(torch.equal(t, tensors[n]) for n, t in plain.tensors().items())
    extra = {n.removeprefix("method.aligner.") for n in tensors.keys() - plain.tensors().keys()}
    assert extra == {"rows", "gaussians.means", "gaussians.covariances"}
    rows = torch.cat([torch.cat([h.weight, h.bias[:, None]], 1) for h in own.domain.heads])
    assert not torch.equal(own.method.aligner.rows, rows)
    assert own.method.stored_parameters() == plain.method.stored_parameters() + 7 * (32 + 32 * 33 // 2)
    (said,) = set(own.method.caveats()) - set(plain.method.caveats())
    assert said.startswith("stores a mean and a covariance of every class")


@pytest.mark.parametrize("name", ["lora", "clora", "inflora"])
def test_a_method_that_aligns_keeps_every_promise(name: str) -> None:
    found = [said for said in check_method(name, ["method.align=true"]) if said[0] == "classification"]
    assert len(found) == 1 + len(PROPERTIES)
    assert [(what, problem) for _, what, problem, _ in found if problem] == []


@pytest.mark.parametrize("name", ["lora", "clora", "inflora"])
def test_alignment_can_be_searched(name: str, tiny_preset: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    axes = "align: [true], align_lr: [1e-2, 3e-2]"
    own.write_text(f"extends: {tiny_preset}\nsearch: {{points: 2, methods: {{{name}: {{{axes}}}}}}}\n")
    over = ["method.align=true", "method.align_lr=1e-2,3e-2"]
    for preset, given in ((str(own), None), (tiny_preset, over)):
        points = plan_sweep(preset, name, given, None, [], tmp_path / "out").points
        configs = [point.runs[0].resolved.sections["method"] for point in points]
        assert [(c.align, c.align_lr) for c in configs] == [(True, 1e-2), (True, 3e-2)]
        assert len({point.runs[0].resolved.hash() for point in points}) == 2
    # a grid whose points would be one run under two names
    with pytest.raises(UserError, match=r"method.align_lr does nothing without method.align=true"):
        plan_sweep(tiny_preset, name, ["method.align=false,true", over[1]], None, [], tmp_path / "out")


def test_plain_runs_keep_the_hash_that_they_had_before_alignment(tiny: Callable[..., Any]) -> None:
    keys = {"method.align", "method.align_epochs", "method.align_lr"}
    for name in ("lora", "clora"):
        resolved = tiny(name)
        assert keys <= set(resolved.flat())
        assert not keys & set(resolved.telling(resolved.flat()))
        assert "method.align" in (given := tiny(name, "method.align=true")).telling(given.flat())


def test_without_classes_there_is_no_alignment(concepts: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="alignment needs features of classes, and customization has none"):
        concepts("lora", tmp_path, "method.align=true")
