"""InfLoRA's bases and SD-LoRA's magnitudes by hand, and what must hold of both in a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dualcl.benchmark.core.domain import Site
from dualcl.methods.inflora import designed, directions_needed, rest_of, spectrum
from dualcl.methods.sdlora import Directions


def test_b_avoids_what_earlier_tasks_need_by_hand() -> None:
    old = torch.eye(3, dtype=torch.float64)[:, :1]
    new = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]], dtype=torch.float64)
    rest = rest_of(old)
    assert spectrum(new, rest)[1].sqrt().tolist() == pytest.approx([5**0.5, 1])
    b = designed(new, rest, 1)
    assert b.abs().tolist() == [pytest.approx([0, 1 / math.sqrt(3), 0])]
    assert float((b @ old).abs().max()) == 0
    assert designed(new, rest, 3)[2].tolist() == [0, 0, 0]  # two directions are left


def test_the_first_basis_by_hand() -> None:
    moment = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    _, values = spectrum(moment, torch.eye(2, dtype=torch.float64))
    assert (values / values.sum()).tolist() == pytest.approx([0.8, 0.2])
    assert directions_needed(values, 5.0, 0.98) == 2
    assert directions_needed(values, 5.0, 0.98, first_below=True) == 1


def test_the_complement_says_the_same() -> None:
    basis, _ = torch.linalg.qr(torch.randn(4, 3, dtype=torch.float64))
    rest = rest_of(basis)
    assert rest.shape == (4, 1)
    torch.testing.assert_close(rest @ rest.T, torch.eye(4) - basis @ basis.T, rtol=0, atol=1e-12)


def test_outputs_for_what_earlier_tasks_need_stay(build: Callable[..., Any]) -> None:
    domain, method = build("inflora", "method.rank=4", "method.epsilon=0.5")
    for task in range(2):
        domain.begin_task(task)
        method.begin_task(task)
        method.prepare(task)
        rests = [method.rest(i).float() for i in range(5)]
        with torch.no_grad():
            for update in method.updates.values():
                update.A.normal_()
        if task == 0:
            method.end_task(0)
            assert 0 < method.diagnostics()["directions_needed"] < 32
    for i, (_, k, v) in enumerate(method.readers):
        spanned = torch.eye(32) - rests[i] @ rests[i].T
        for update in (k, v):
            assert update.B.norm() > 0.5
            torch.testing.assert_close(update.product() @ spanned, torch.zeros(32, 32), rtol=0, atol=1e-5)


def site() -> Site:
    linear = torch.nn.Linear(2, 2)
    return Site("x.q", "x", linear, 0, 2)


def test_directions_are_divided_by_their_norm_by_hand() -> None:
    one = Directions(site(), 2, 1, torch.nn.Parameter(torch.full((1,), 0.5)))
    one.left[:], one.right[:] = torch.eye(2), torch.eye(2)
    one.finished = one.begun = 1
    for product, wanted in ((False, 0.5 / math.sqrt(2)), (True, 0.25)):
        one.sizes[0] = one.norm(0, product)
        torch.testing.assert_close(one.A @ one.B, wanted * torch.eye(2))
    (one.A @ one.B).sum().backward()
    assert one.alpha.grad is not None
    assert float(one.alpha.grad[0]) == pytest.approx(1.0)  # the sum of D = I / 2
    assert one.left.grad is None
    rank1 = Directions(site(), 1, 1, torch.nn.Parameter(torch.ones(1)))
    rank1.left[:], rank1.right[:] = torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]])
    assert float(rank1.norm(0)) == pytest.approx(10)
    assert float(rank1.norm(0, product=True)) == pytest.approx(10)


def test_the_end_of_a_task_changes_no_answer(build: Callable[..., Any]) -> None:
    domain, method = build("sdlora", "method.rank=4")
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for task in range(2):
        domain.begin_task(task)
        method.begin_task(task)
        kept = [u.left.clone() for u in method.updates.values()]
        with torch.no_grad():
            for update in method.updates.values():
                update.own_left.normal_(0, 0.1)
        before = domain.network.run(pixels).detach()
        method.end_task(task)
        torch.testing.assert_close(domain.network.run(pixels).detach(), before, rtol=1e-4, atol=1e-5)
        for update, left in zip(method.updates.values(), kept, strict=True):
            assert torch.equal(update.left[:, : 4 * task], left[:, : 4 * task])
            norm = (update.left[:, 4 * task : 4 * task + 4] @ update.right[4 * task : 4 * task + 4]).norm()
            assert float(update.alpha[task].detach().abs()) == pytest.approx(float(norm), rel=1e-4)
