"""Diffusion classifier scores in parameter and function space: toy cases with their numbers, and what must hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dualcl.benchmark.core.errors import UserError
from dualcl.methods.dsc import DSC, DSCConfig
from dualcl.methods.ewc_dc import EWCDC, EWCDCConfig, evidence


def rows(*values: float) -> Tensor:
    return torch.tensor([values])


def drawn(work: Any, task: int) -> None:
    """Begins a task, with factors A that are drawn."""
    work.begin(task)
    with torch.no_grad():
        for i, update in enumerate(work.method.updates.values()):
            update.A.copy_(0.3 * torch.randn(update.A.shape, generator=torch.Generator().manual_seed(100 * task + i)))


# --- numbers by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("errors", "p", "contrast"),
    [
        ((0.0, math.log(3)), (0.75, 0.25), -math.log(3)),
        ((0.0, 1.0, 2.0), (0.665241, 0.244728, 0.090031), -1.5),
    ],
)
def test_scores_and_their_contrast(errors: Any, p: Any, contrast: float) -> None:
    scores = -rows(*errors)
    assert scores.softmax(1)[0].tolist() == pytest.approx(p, abs=1e-6)
    assert evidence(scores, "contrast").item() == pytest.approx(contrast)
    assert evidence(scores, "likelihood").item() == pytest.approx(-math.log(p[0]), abs=1e-5)


@pytest.mark.parametrize(("kind", "fisher"), [("likelihood", 0.25), ("contrast", 1.0)])
def test_fisher_of_one_number(kind: str, fisher: float) -> None:
    theta = torch.zeros(1, requires_grad=True)
    (grad,) = torch.autograd.grad(evidence(-torch.stack([theta, torch.zeros(1)], 1), kind), theta)
    assert grad.square().item() == pytest.approx(fisher)


def weighing(weight: float) -> Any:
    return SimpleNamespace(noise_weights=lambda batch: torch.tensor([weight]))


@pytest.mark.parametrize(("shape", "p"), [((4, 8, 8), 0.563653), ((4, 64, 64), 0.9999999)])
def test_errors_are_summed_over_the_latent(shape: tuple[int, ...], p: float) -> None:
    """A difference of 1e-3 in the mean squared error; of the mean itself p would be 0.50025."""
    predictions = torch.stack([torch.zeros(shape), torch.full(shape, math.sqrt(1e-3))])[None]
    batch = SimpleNamespace(target=torch.zeros(1, *shape))
    method: Any = SimpleNamespace(config=EWCDCConfig(), scored=weighing(1.0))
    assert EWCDC.logits(method, predictions, batch).softmax(1)[0, 0].item() == pytest.approx(p, abs=1e-6)
    method.config = EWCDCConfig(temperature=float(math.prod(shape)))
    assert EWCDC.logits(method, predictions, batch).softmax(1)[0, 0].item() == pytest.approx(0.50025, abs=1e-6)


def test_what_a_student_pays() -> None:
    method: Any = SimpleNamespace(config=DSCConfig(score_weight=2.0, distill_weight=3.0), scored=weighing(0.5))
    method.logits = lambda x, batch: EWCDC.logits(method, x, batch)
    batch = SimpleNamespace(target=torch.zeros(1, 1, 1, 1))
    made = [torch.tensor(v).sqrt().view(1, 3, 1, 1, 1) for v in ([0.0, 1, 2], [0.0, math.log(2), 50], [4.0, 0, 4])]
    student, one, two = made
    # the errors of a velocity, half of which are those of the noise
    logs = torch.tensor([0.0, -0.5, -1]).log_softmax(0)
    first, second = torch.tensor([0.0, -math.log(2) / 2, -25]).softmax(0), torch.tensor([-2.0, 0, -2]).softmax(0)
    away = ((math.sqrt(2) - math.sqrt(50)) ** 2 + 1) / 2  # own concept to the first teacher, c_k to the second
    wanted = 2 * -float(first @ logs + second @ logs) + 3 * away
    assert DSC.distance(method, student, one, two, batch).item() == pytest.approx(wanted, rel=1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_without_penalty_and_consolidation_it_is_lora_with_one_adapter(
    concepts: Callable[..., Any], empty_record: Any, tmp_path: Path
) -> None:
    found = []
    for name, sets in (
        ("lora", ("method.one_adapter=true",)),
        ("ewc_dc", ("method.lambda_=0",)),
        ("dsc", ("method.consolidation_steps=0",)),
    ):
        work = concepts(name, tmp_path / name, "method.lr=1e-2", *sets)
        work.execute(empty_record())
        found.append(work.tensors())
    assert [sorted(t) for t in found[1:]] == [sorted(found[0])] * 2
    for other in found[1:]:
        assert [n for n, t in found[0].items() if not torch.equal(t, other[n])] == []


def test_fisher_is_the_mean_over_pictures_of_squared_gradients(concepts: Callable[..., Any], tmp_path: Path) -> None:
    sets = ("method.fisher_batches=2", "method.decay=0.5", "stream.tasks=3", "method.candidates=1")
    work = concepts("ewc_dc", tmp_path, *sets)
    method, domain = work.method, work.domain
    total: Any = 0
    for task in range(3):
        if task:
            work.begin(task)
        else:
            drawn(work, task)
        squares, count = 0, 0
        before = method.flat().detach().clone()
        for step, batch in zip(range(2), domain.batches(task, 0), strict=False):
            others = torch.randperm(task, generator=method.generator("candidates", task, step))[:1].tolist()
            prompts = [*domain.prompts(task), "a photo", *(domain.prompts(k)[0] for k in others)]
            assert len(prompts) == min(task + 2, 3)
            for one in domain.samples(batch):
                errors = domain.errors(one, prompts)[0] * domain.predictions(one, prompts)[0, 0].numel()
                (errors[0] - errors[1:].mean()).backward()
                squares = squares + torch.cat([p.grad.reshape(-1) for p in method.factors]).square()
                count += 1
                for p in method.factors:
                    p.grad = None
        total = total * 0.5 + squares / count
        method.end_task(task)
        torch.testing.assert_close(method.fisher, total, rtol=2e-3, atol=1e-6)
        assert method.fisher.max() > 0
        assert torch.equal(method.anchor, before)
        assert method.facts["fisher_samples"] == count == 4
        assert 0 < method.facts["score_entropy"] < math.log(3)
    assert method.stored_parameters() == 2 * len(before)


def test_the_penalty_is_on_what_moves_from_the_last_task_s_end(concepts: Callable[..., Any], tmp_path: Path) -> None:
    work = concepts("ewc_dc", tmp_path, "method.lambda_=6")
    drawn(work, 0)
    assert work.method.penalty() is None
    work.method.end_task(0)
    work.begin(1)
    assert work.method.penalty().item() == 0
    with torch.no_grad():
        work.method.fisher.fill_(2.0)
        for p in work.method.factors:
            p += 0.5
    assert work.method.penalty().item() == pytest.approx(6 / 2 * 2 * 0.25 * len(work.method.flat()))
    work.method.penalty().backward()
    for p in work.method.factors:
        torch.testing.assert_close(p.grad, torch.full_like(p, 6.0), rtol=1e-5, atol=0)


def test_consolidation_brings_the_model_nearer_to_its_teachers_which_stay(
    concepts: Callable[..., Any], tmp_path: Path
) -> None:
    sets = ("train.steps=12", "method.consolidation_steps=10", "method.consolidation_lr=2e-2", "method.temperature=100")
    work = concepts("dsc", tmp_path, *sets)
    method, domain, loss, said = work.method, work.domain, [], []
    plain = method.distance

    def heard(student: torch.Tensor, *given: Any) -> torch.Tensor:
        said.append(torch.distributions.Categorical(logits=method.logits(student.detach(), given[-1])).entropy().mean())
        loss.append(plain(student, *given))
        return loss[-1]

    method.distance = heard
    drawn(work, 0)
    first = method.flat().detach().clone()
    method.end_task(0)
    assert method.facts == {}
    assert loss == []
    assert torch.equal(method.teacher_0, first)
    drawn(work, 1)  # the first task's factors are gone
    start, rows_ = method.flat().detach().clone(), domain.tokens.rows[1].detach().clone()
    batch = next(iter(domain.batches(1, 0)))
    prompts = ["a photo", domain.prompts(0)[0], domain.prompts(1)[0]]
    taught = []
    for flat in (start, first):
        with method.holding(flat):
            assert torch.equal(method.flat(), flat)
            taught.append(domain.predictions(batch, prompts))
    assert torch.equal(method.flat(), start)
    assert (taught[0] - taught[1]).abs().max() > 1e-3
    with torch.no_grad():
        before = plain(domain.predictions(batch, prompts), *taught, batch).item()
    facts = method.consolidate(1)
    with torch.no_grad():
        after = plain(domain.predictions(batch, prompts), *taught, batch).item()
    assert loss[0].item() == pytest.approx(before, rel=1e-5)  # c_k is the only earlier concept
    assert after < before
    assert facts["consolidations"] == len(loss) == 10
    assert facts["consolidation_loss"] == pytest.approx(sum(x.item() for x in loss) / 10)
    assert facts["score_entropy_consolidating"] == pytest.approx(sum(x.item() for x in said) / 10)
    assert 0.01 < facts["score_entropy_consolidating"] < math.log(3)
    assert any("the last adapter draws all concepts" in caveat for caveat in method.caveats())
    assert facts["moved"] == pytest.approx(float((method.flat() - start).detach().norm()), rel=1e-5)
    assert torch.equal(method.teacher_0, first)
    assert torch.equal(domain.tokens.rows[1], rows_)
    assert all(p.grad is None for p in [*method.factors, *domain.tokens.rows])


def test_what_would_go_wrong_after_the_first_task_is_refused_before_it(
    concepts: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("ewc_dc", "dsc"):
        with pytest.raises(UserError, match="the model takes 24; shorten it"):
            concepts(name, tmp_path / name, f"method.pretrained_prompt={'a photo ' * 60}")


def test_consolidation_that_ends_in_no_numbers_is_refused(concepts: Callable[..., Any], tmp_path: Path) -> None:
    work = concepts("dsc", tmp_path, "method.consolidation_steps=3", "method.consolidation_lr=1e30")
    drawn(work, 0)
    work.method.end_task(0)
    drawn(work, 1)
    with pytest.raises(UserError, match=r"after task 2 end in factors that are not finite; lower method.consolidation"):
        work.method.end_task(1)


@pytest.mark.parametrize(
    ("config", "given", "read"),
    [
        (EWCDCConfig, {}, True),
        (EWCDCConfig, {"lambda_": 0.0}, False),
        (DSCConfig, {}, True),
        (DSCConfig, {"score_weight": 0.0}, False),
        (DSCConfig, {"consolidation_steps": 0}, False),
        (DSCConfig, {"consolidation_steps": 0, "lambda_": 1.0}, True),
    ],
)
def test_temperature_and_prompt_are_idle_where_no_score_is_read(config: Any, given: Any, read: bool) -> None:
    idle = config(**given).idle()
    assert ("temperature" not in idle, "pretrained_prompt" not in idle) == (read, read)


def test_the_teachers_of_a_run_are_what_each_task_ended_with(
    concepts: Callable[..., Any], empty_record: Any, tmp_path: Path
) -> None:
    work = concepts("dsc", tmp_path, "method.lr=1e-2", "method.lambda_=1e-3", "stream.tasks=3")
    record = work.execute(empty_record())
    method = work.method
    assert torch.equal(method.teacher_2, method.flat())
    assert not torch.equal(method.teacher_1, method.teacher_0)
    assert method.stored_parameters() == 4 * len(method.flat())
    facts = [t["diagnostics"] for t in record["tasks"]]
    assert [f.get("consolidations") for f in facts] == [None, 2, 2]  # the task has two steps
    assert all(f["fisher_samples"] == 4 for f in facts)
    assert "up to 100 further steps" in str(method.caveats())
    for name, update in method.updates.items():  # the model is the last one
        delta = update.site.weight - update.w_init
        torch.testing.assert_close(delta, update.product(), rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (EWCDCConfig, {"temperature": 0.0}, "method.temperature must be positive, got 0.0"),
        (EWCDCConfig, {"lambda_": -1.0}, "method.lambda_ must not be negative, got -1.0"),
        (EWCDCConfig, {"decay": 2.0}, "method.decay must be between 0 and 1, got 2.0"),
        (EWCDCConfig, {"fisher": "own"}, "method.fisher must be contrast or likelihood, got 'own'"),
        (EWCDCConfig, {"fisher_batches": 0}, "method.fisher_batches must be at least 1, got 0"),
        (EWCDCConfig, {"candidates": -1}, "method.candidates must not be negative, got -1"),
        (DSCConfig, {"consolidation_lr": -1.0}, "method.consolidation_lr must not be negative, got -1.0"),
        (
            DSCConfig,
            {"one_adapter": False},
            "ewc_dc and dsc train one pair of factors on; leave method.one_adapter true",
        ),
        (
            DSCConfig,
            {"align": True},
            "method.align is an option of lora, clora and inflora; ewc_dc and dsc have none",
        ),
        (
            DSCConfig,
            {"score_weight": 0.0, "distill_weight": 0.0},
            "method.score_weight and method.distill_weight are both 0, which leaves nothing to take steps for; "
            "raise one, or set method.consolidation_steps=0",
        ),
    ],
)
def test_wrong_values_are_named(config: Any, given: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        config(**given)
    assert str(error.value) == message
