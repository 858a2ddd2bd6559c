"""InfLoRA's bases and SD-LoRA's magnitudes by hand, and what must hold of both in a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dualcl.benchmark.core.domain import Site
from dualcl.benchmark.core.errors import UserError
from dualcl.methods.inflora import InfLoRAConfig, designed, directions_needed, rest_of, spectrum
from dualcl.methods.lora import LoRA
from dualcl.methods.sdlora import Directions, SDLoRAConfig


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


@pytest.mark.parametrize(("left", "stored", "complement"), [(20, 12, 0), (10, 10, 1), (0, 0, 1), (32, 0, 0)])
def test_the_smaller_half_is_kept_and_means_the_same(
    left: int, stored: int, complement: int, build: Callable[..., Any]
) -> None:
    _, method = build("inflora", "method.rank=4")
    turned, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))
    rest = turned[:, :left]
    method.keep(1, rest)
    assert (int(method.columns[1]), int(method.complements[1])) == (stored, complement)
    again = method.rest(1)
    assert again.shape == (32, left)
    torch.testing.assert_close(again @ again.T, rest @ rest.T, rtol=0, atol=1e-6)  # kept in float32
    torch.testing.assert_close(again.T @ again, torch.eye(left, dtype=torch.float64), rtol=0, atol=1e-12)


def test_bases_grow_to_the_share_that_the_task_asks_for(build: Callable[..., Any]) -> None:
    domain, method = build("inflora", "method.rank=2", "method.epsilon=0.9")
    before = [torch.eye(32, dtype=torch.float64)] * 5
    for task in range(3):
        domain.begin_task(task)
        method.begin_task(task)
        method.prepare(task)
        method.end_task(task)
        for i, moment in enumerate(method.moments(task)):
            rest = method.rest(i)
            held = 1 - float((rest.T @ moment).square().sum() / moment.square().sum())
            assert held >= 0.9 + 0.1 * task / 3 - 1e-6
            assert rest.shape[1] <= before[i].shape[1]
            inside = rest - before[i] @ (before[i].T @ rest)  # what is left out was left out before
            assert float(inside.norm()) < 1e-5
            before[i] = rest
    kept = int(method.columns.sum()) * 32
    factors = sum(min(32 * 32, 2 * 3 * 64) for _ in method.updates)
    assert method.stored_parameters() == factors + kept


class KeysAndValues(LoRA):
    """LoRA on the sites of InfLoRA."""

    name = "keys_and_values"
    letters = "kv"

    def adapted(self, sites: dict[str, Site]) -> dict[str, Site]:
        return {name: site for name, site in sites.items() if name[-1] in self.letters}


class QueriesAndValues(KeysAndValues):
    """LoRA on the sites of SD-LoRA."""

    name = "queries_and_values"
    letters = "qv"


def begun(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    domain, method = pair
    domain.begin_task(0)
    method.begin_task(0)
    return domain, method


def lora_on(cls: type[LoRA], build: Callable[..., Any]) -> Any:
    """LoRA on some sites, in the first task of a stream of its own; same weights, same rows."""
    config = build("lora", "method.rank=4")[1].config
    domain, _ = build("ncm", "head.init=linear")
    return begun((domain, cls(config, domain, 3, 0)))[1]


def test_with_the_same_b_inflora_is_lora_on_keys_and_values(build: Callable[..., Any]) -> None:
    domain, method = begun(build("inflora", "method.rank=4", "head.init=linear"))
    plain = lora_on(KeysAndValues, build)
    assert method.updates.keys() == plain.updates.keys()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, update in method.updates.items():
            a = torch.empty(32, 4).normal_(0, 0.3, generator=generator)
            for own in (update, plain.updates[name]):
                own.A.copy_(a)
            update.B.copy_(plain.updates[name].B)
    batch = next(iter(domain.batches(0, 0)))
    one, two = method.loss(batch), plain.loss(batch)
    assert torch.equal(one, two)
    one.backward()
    two.backward()
    for name, update in method.updates.items():
        torch.testing.assert_close(update.A.grad, plain.updates[name].A.grad)
        assert float(update.A.grad.norm()) > 0
        assert update.B.grad is None
    assert {id(p) for g in method.trained() for p in g.params} == {id(u.A) for u in method.updates.values()}


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


def test_one_task_of_sdlora_is_lora_on_queries_and_values(build: Callable[..., Any]) -> None:
    domain, method = begun(build("sdlora", "method.rank=4", "head.init=linear"))
    plain = lora_on(QueriesAndValues, build)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, update in method.updates.items():
            a = torch.empty(32, 4).normal_(0, 0.3, generator=generator)
            update.own_left.copy_(a)
            plain.updates[name].A.copy_(a)
            plain.updates[name].B.copy_(update.own_right)
    batch = next(iter(domain.batches(0, 0)))
    one, two = method.loss(batch), plain.loss(batch)
    torch.testing.assert_close(one, two)
    one.backward()
    two.backward()
    for name, update in method.updates.items():
        lora = plain.updates[name]
        torch.testing.assert_close(update.own_left.grad, lora.A.grad)
        assert float(lora.A.grad.norm()) > 0
        torch.testing.assert_close(update.own_right.grad, lora.B.grad)
        torch.testing.assert_close(update.alpha.grad[0], (lora.A.grad * lora.A).sum(), rtol=1e-4, atol=1e-6)


def stepped(domain: Any, method: Any, task: int) -> None:
    """A task of one large step."""
    shared = domain.begin_task(task)
    method.begin_task(task)
    with torch.no_grad():
        for update in method.updates.values():
            update.own_left.normal_(0, 0.1, generator=torch.Generator().manual_seed(task))
    params = [*shared, *(p for g in method.trained() for p in g.params)]
    optimizer = torch.optim.SGD(params, lr=0.5)
    method.loss(next(iter(domain.batches(task, 0)))).backward()
    optimizer.step()
    optimizer.zero_grad()
    method.end_task(task)


def test_directions_stay_and_their_magnitudes_go_on_learning(build: Callable[..., Any]) -> None:
    domain, method = build("sdlora", "method.rank=4", "head.init=linear")
    stepped(domain, method, 0)
    first = {n: (u.left.clone(), u.right.clone(), u.sizes.clone()) for n, u in method.updates.items()}
    magnitudes = [a.detach().clone() for a in method.alphas]
    stepped(domain, method, 1)
    for name, update in method.updates.items():
        left, right, sizes = first[name]
        assert torch.equal(update.left[:, :4], left[:, :4])
        assert torch.equal(update.right[:4], right[:4])
        assert torch.equal(update.sizes[:1], sizes[:1])
    moved = [float(a.detach()[0] - old[0]) for a, old in zip(method.alphas, magnitudes, strict=True)]
    assert all(moved), moved
    assert method.stored_parameters() == 2 * (10 * 4 * 64 + 10)
    assert len(method.diagnostics()["magnitudes"]) == 2


@pytest.mark.parametrize("quirk", ["product_norm", "shared_alpha", "restart_alpha"])
def test_habits_of_the_public_code(quirk: str, build: Callable[..., Any]) -> None:
    domain, method = build("sdlora", "method.rank=4", f"method.reference_quirks={quirk}")
    assert len(method.alphas) == (1 if quirk == "shared_alpha" else 10)
    stepped(domain, method, 0)
    learnt = [float(a.detach()[0]) for a in method.alphas]
    domain.begin_task(1)
    method.begin_task(1)
    for update in method.updates.values():
        a, b = update.left[:, :4], update.right[:4]
        size = float(a.norm() * b.norm() if quirk == "product_norm" else (a @ b).norm())
        assert float(update.sizes[0]) == pytest.approx(size, rel=1e-5)
    now = [float(a.detach()[0]) for a in method.alphas]
    if quirk == "restart_alpha":
        assert now == pytest.approx([0.8] * 10)
        assert float(method.alphas[0].detach()[1]) == pytest.approx(0.8)
    else:
        assert now == learnt
    assert any(line.startswith(quirk) for line in method.caveats())


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("inflora", ()),
        ("inflora", ("method.align=true", "method.reference_quirks=first_below")),
        ("sdlora", ()),
        ("sdlora", ("method.reference_quirks=shared_alpha,restart_alpha",)),
    ],
)
def test_an_interrupted_run_ends_the_same(
    name: str, sets: tuple[str, ...], tiny: Callable[..., Any], resumed: Callable[..., Any]
) -> None:
    resumed(tiny(name, "method.rank=4", "train.checkpoint_seconds=0", *sets), "task 2, step 1")


@pytest.mark.parametrize(
    ("config", "given", "words"),
    [
        (InfLoRAConfig, {"epsilon": 0.0}, "epsilon must be above 0"),
        (InfLoRAConfig, {"epsilon": 1.5}, "epsilon must be above 0 and at most 1"),
        (InfLoRAConfig, {"one_adapter": True}, "one_adapter is an ablation of lora and clora"),
        (InfLoRAConfig, {"reference_quirks": ("below",)}, "unknown name 'below'"),
        (SDLoRAConfig, {"rank": 0}, "rank must be at least 1"),
        (SDLoRAConfig, {"reference_quirks": ("alpha",)}, "unknown name 'alpha'"),
    ],
)
def test_settings_are_checked(config: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(**given)


@pytest.mark.parametrize("name", ["inflora", "sdlora"])
def test_a_rank_that_no_site_has_is_refused(name: str, build: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"method\.rank=33 is more than the smallest side of a site, 32"):
        build(name, "method.rank=33")
