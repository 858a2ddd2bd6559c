"""STAMINA's masks: toy cases with their numbers, and what must hold of both domains' runs."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Site
from dualcl.benchmark.core.errors import UserError
from dualcl.methods.stamina import Mask, Stamina, StaminaConfig

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))


WEIGHT = torch.tensor([[1.0, 2, 3], [4, 5, 6]])


@pytest.fixture
def toy() -> Callable[..., Any]:
    """toy(n_tasks, **settings) -> the method on one Linear of 3 inputs and 2 outputs; its loss is the mean square."""

    def make(n_tasks: int = 2, weight: Tensor = WEIGHT, **settings: Any) -> Any:
        model = nn.Sequential(OrderedDict(k=nn.Linear(*reversed(weight.shape), bias=False))).requires_grad_(False)
        model.k.weight.copy_(weight)
        site = Site("k", "k", model.k, 0, len(weight))
        domain: Any = SimpleNamespace(attach=lambda method: None, sites=lambda: {"k": site}, model=model)
        domain.loss = lambda batch: model(batch).square().mean()
        return Stamina(StaminaConfig(rank=1, mask_rank=2, **settings), domain, n_tasks, 0)

    return make


def logits(method: Any, wanted: Tensor) -> None:
    """Fixes the logits of the only mask."""
    method.masks[0].logits = lambda: wanted


def factors(method: Any, a: list[float], b: list[float]) -> Any:
    update = method.updates["k"]
    with torch.no_grad():
        update.A.copy_(torch.tensor(a)[:, None])
        update.B.copy_(torch.tensor([b]))
    return update


def test_a_mask_of_the_identity_makes_rank_two_of_rank_one(toy: Callable[..., Any]) -> None:
    method = toy()
    method.begin_task(0)
    update = factors(method, [1.0, 2.0], [3.0, 4.0, 5.0])
    logits(method, torch.tensor([[1.0, -1, -1], [-1, 1, -1]]))
    before = update.site.weight.clone()
    method.end_task(0)
    moved = torch.tensor([[3.0, 0, 0], [0, 8, 0]])
    assert torch.equal(update.summed, moved)
    assert torch.equal(update.site.weight, before + moved)
    assert int(torch.linalg.matrix_rank(moved)) == 2
    assert method.diagnostics() == pytest.approx(
        {"update_norm": math.sqrt(73), "summed_norm": math.sqrt(73), "density": 2 / 6, "used_before": 0.0}
    )
    method.begin_task(1)
    factors(method, [1.0, 1.0], [1.0, 1.0, 1.0])
    logits(method, torch.tensor([[1.0, 1, 1], [-1, -1, -1]]))
    method.end_task(1)
    assert torch.equal(update.summed, moved + torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
    assert method.diagnostics()["used_before"] == pytest.approx(1 / 3)


def test_all_on_is_lora_and_all_off_moves_no_bit(toy: Callable[..., Any]) -> None:
    for sign, open_ in ((math.inf, 1.0), (-math.inf, 0.0)):
        method = toy(sparsity=0.5)
        method.begin_task(0)
        update = factors(method, [0.3, 0.7], [0.1, 0.2, 0.9])
        product, before = update.product(), update.site.weight.clone()
        logits(method, torch.full((2, 3), sign))
        loss = method.loss(X)
        assert torch.equal(update.instead.detach(), open_ * product)
        loss.backward()
        found = [update.A.grad.clone(), update.B.grad.clone()]
        update.A.grad = update.B.grad = update.instead = None
        method.domain.loss(X).backward()  # by the side path of LoRA
        for own, plain in zip(found, (update.A.grad, update.B.grad), strict=True):
            torch.testing.assert_close(own, open_ * plain, rtol=1e-5, atol=1e-6)
        assert method.penalty().item() == 0.5 * open_
        method.end_task(0)
        assert torch.equal(update.site.weight, before + product if open_ else before)


def test_a_fresh_mask_is_on_in_88_of_100_entries_and_learns_by_a_sigmoid() -> None:
    update: Any = SimpleNamespace(A=torch.zeros(300, 1), site=SimpleNamespace(d_out=300, d_in=400))
    mask = Mask(update, 2)
    mask.start(torch.Generator().manual_seed(0))
    drawn = mask.sample(torch.Generator().manual_seed(1), 0.5)
    assert set(drawn.detach().unique().tolist()) == {0.0, 1.0}
    assert drawn.detach().mean() == pytest.approx(1 / (1 + math.exp(-2)), abs=2e-3)
    assert mask.hard().min() == 1  # without noise every entry is on
    fixed = torch.linspace(-3, 3, 7).requires_grad_()
    mask.logits = lambda: fixed  # type: ignore[method-assign]
    mask.sample(torch.Generator().manual_seed(2), 0.5).sum().backward()
    noise = torch.rand(7, generator=torch.Generator().manual_seed(2)).logit()
    soft = ((fixed.detach() + noise) / 0.5).sigmoid()
    torch.testing.assert_close(fixed.grad, soft * (1 - soft) / 0.5)


def test_a_step_draws_by_its_number_and_the_temperature_falls(toy: Callable[..., Any]) -> None:
    method, drawn, temperatures = toy(anneal_steps=2), [], []
    method.begin_task(0)
    factors(method, [1.0, 1.0], [1.0, 1.0, 1.0])
    for steps in (0, 1, 0, 3):
        method.steps.fill_(steps)
        temperatures.append(method.temperature())
        method.loss(X)
        assert int(method.steps) == steps + 1
        drawn.append(method.updates["k"].instead.detach().clone())
    assert temperatures == pytest.approx([1.0, math.sqrt(0.1), 1.0, 0.1])
    assert torch.equal(drawn[0], drawn[2])
    assert not all(torch.equal(drawn[0], d) for d in drawn)
    method.begin_task(1)
    assert int(method.steps) == 0


def test_masks_learn_with_the_factors_and_sparsity_closes_them(build: Callable[..., Any]) -> None:
    density = {}
    for weight in (0.0, 10.0):
        domain, method = build("stamina", "method.rank=2", f"method.sparsity={weight}", "method.mask_lr=0.1")
        rows = domain.begin_task(0)
        method.begin_task(0)
        groups = method.trained()
        adam = torch.optim.Adam([{"params": rows}, *({"params": g.params, "lr": g.lr} for g in groups)], lr=1e-2)
        batch = next(iter(domain.batches(0, 0)))
        for _ in range(30):
            adam.zero_grad()
            penalty = method.penalty()
            loss = method.loss(batch)
            (loss if penalty is None else loss + penalty).backward()
            adam.step()
        if weight == 0:
            assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for g in groups for p in g.params)
        method.end_task(0)
        density[weight] = method.diagnostics()["density"]
    assert density[10.0] < 0.5 * density[0.0]
    assert density[0.0] > 0.8


def test_micro_batches_under_one_mask_add_up_to_the_batch(build: Callable[..., Any]) -> None:
    found = []
    for size in (None, 1):
        domain, method = build("stamina", "method.rank=2")
        rows = domain.begin_task(0)
        method.begin_task(0)
        domain.micro_batch_size = size
        with torch.no_grad():
            rows[0].normal_(generator=torch.Generator().manual_seed(9))
            for i, u in enumerate(method.updates.values()):
                u.A.copy_(torch.randn(u.A.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        method.loss(next(iter(domain.batches(0, 0)))).backward()
        found.append([p.grad for g in method.trained() for p in g.params])
        assert all(g is not None and float(g.abs().max()) > 0 for g in found[-1][: 2 * len(method.updates)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_an_image_is_drawn_under_the_hard_masks_alone(
    concepts: Callable[..., Any], empty_record: Any, tmp_path: Path
) -> None:
    work = concepts("stamina", tmp_path, "method.lr=1e-2")
    record = work.execute(empty_record())
    assert all(u.instead is None and not u.active for u in work.method.updates.values())
    facts = [t["diagnostics"] for t in record["tasks"]]
    assert all(0 < f["density"] <= 1 for f in facts)
    assert facts[0]["used_before"] == 0 < facts[1]["used_before"] <= 1
    assert "not a reproduction of STAMINA" in work.method.caveats()[0]


def test_what_it_stores(toy: Callable[..., Any]) -> None:
    """Factors and the MLP of a mask are 3 * (2 + 3) = 15 numbers a task, the delta is 6."""
    method = toy()
    method.begin_task(0)
    method.end_task(0)
    assert method.stored_parameters() == 6
    wide = toy(weight=torch.zeros(40, 30))
    for task in range(2):
        wide.begin_task(task)
        wide.end_task(task)
        assert wide.stored_parameters() == (task + 1) * 3 * (40 + 30)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_rank": 0}, "method.mask_rank must be at least 1, got 0"),
        ({"mask_lr": -1.0}, "method.mask_lr must not be negative, got -1.0"),
        ({"sparsity": -1.0}, "method.sparsity must not be negative, got -1.0"),
        ({"anneal_steps": 0}, "method.anneal_steps must be at least 1, got 0"),
        ({"one_adapter": True}, "method.one_adapter is an ablation of lora and clora; stamina has none"),
        ({"align": True}, "method.align is an option of lora, clora and inflora; stamina has none"),
    ],
)
def test_wrong_values_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        StaminaConfig(**given)
    assert str(error.value) == message
