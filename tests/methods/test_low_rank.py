"""The low-rank core against eq. 2 of arXiv 2304.06027 computed directly."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Site
from dualcl.methods.shared.low_rank import AdaptedLinear, LowRankUpdate, inject

D_IN, D, RANK = 10, 8, 3  # one fused Linear of 3 x 8 rows


def fused(parts="qkv", dtype=torch.float64):
    """A model with one fused Linear, its direct weight, and the injected updates of `parts`."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(qkv=nn.Linear(D_IN, 3 * D))).to(dtype).requires_grad_(False)
    linear = model.qkv
    sites = {p: Site(p, "qkv", linear, "qkv".index(p) * D, ("qkv".index(p) + 1) * D) for p in parts}
    return model, linear.weight.clone(), inject(model, sites, RANK)


def begin(updates, seed):
    """Fresh factors, then trained ones: A is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for update in updates.values():
        update.start(generator)
        with torch.no_grad():
            update.A.copy_(torch.randn(update.A.shape, generator=generator))


def direct(updates, weight, s=None):
    """W_init + S + A B with the factors' graph, as a full matrix."""
    rows = []
    for i, part in enumerate("qkv"):
        own = weight[i * D : (i + 1) * D]
        if s is not None:
            own = own + s[part]
        rows.append(own + updates[part].A @ updates[part].B if part in updates else own)
    return torch.cat(rows)


@pytest.mark.parametrize("parts", ["qkv", "v", "qv"])
def test_what_stands_in_for_a_product_counts_in_its_place(parts):
    model, w_init, updates = fused(parts)
    begin(updates, seed=0)
    x, mix = torch.randn(2, 4, D_IN, dtype=torch.float64), torch.randn(2, 4, 3 * D, dtype=torch.float64)
    mask = torch.rand(D, D_IN, dtype=torch.float64).requires_grad_()
    last = updates["v"]
    last.instead = mask * (last.A @ last.B)  # the others, if any, keep their products
    inputs = [mask, *(p for u in updates.values() for p in (u.A, u.B))]
    weight = direct({n: u for n, u in updates.items() if n != "v"}, w_init)
    weight = torch.cat([weight[: 2 * D], weight[2 * D :] + mask * (last.A @ last.B)])
    fast, slow = model(x), F.linear(x, weight, model.qkv.base.bias)
    torch.testing.assert_close(fast, slow)
    for one, two in zip(*(torch.autograd.grad((y * mix).sum(), inputs) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("rows", [4, 20], ids=["side paths", "merged"])
@pytest.mark.parametrize("parts", ["qkv", "kv", "q", "qv"])
def test_adapters_and_folds_equal_the_direct_weight(parts, rows):
    model, w_init, updates = fused(parts)
    bias = model.qkv.base.bias
    s = {p: torch.zeros(D, D_IN, dtype=torch.float64) for p in "qkv"}
    x = torch.randn(2, rows, D_IN, dtype=torch.float64)
    for task in range(3):
        begin(updates, seed=task)
        assert model.qkv._merges(x, list(updates.values())) == (rows == 20 and parts != "q")
        factors = [p for u in updates.values() for p in (u.A, u.B)]
        mix = torch.randn(2, rows, 3 * D, dtype=torch.float64)
        inputs = [x.requires_grad_(), *factors]
        fast, slow = model(x), F.linear(x, direct(updates, w_init, s), bias)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
        for a, b in zip(
            torch.autograd.grad((fast * mix).sum(), inputs),
            torch.autograd.grad((slow * mix).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        for part, update in updates.items():
            s[part] = s[part] + (update.A @ update.B).detach()
            update.fold()
            torch.testing.assert_close(update.summed, s[part], rtol=0, atol=1e-10)
        folded = torch.cat([w_init[i * D : (i + 1) * D] + s[p] for i, p in enumerate("qkv")])
        torch.testing.assert_close(model.qkv.base.weight, folded, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(x), F.linear(x, folded, bias), rtol=0, atol=1e-10)


def test_inputs_without_gradient_and_frozen_factors_get_none():
    model, _, updates = fused("qv")
    begin(updates, seed=0)
    x = torch.randn(20, D_IN, dtype=torch.float64)
    updates["q"].A.requires_grad_(False)
    model(x).square().sum().backward()
    assert x.grad is None
    assert updates["q"].A.grad is None
    for p in (updates["q"].B, updates["v"].A, updates["v"].B):
        assert p.grad.abs().max() > 0


def test_sixteen_bit_inputs_never_meet_a_merged_weight():
    model, _, updates = fused(dtype=torch.float32)
    begin(updates, seed=0)
    active = list(updates.values())
    x = torch.randn(20, D_IN)
    assert model.qkv._merges(x, active)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not model.qkv._merges(x, active)
    assert not model.qkv._merges(x.bfloat16(), active)


def test_rows_outside_the_sites_stay_bit_equal():
    model, w_init, updates = fused("kv")
    x = torch.randn(5, D_IN, dtype=torch.float64)
    plain = F.linear(x, w_init, model.qkv.base.bias)
    begin(updates, seed=1)
    out = model(x)
    assert torch.equal(out[:, :D], plain[:, :D])
    assert (out[:, D:] - plain[:, D:]).abs().min() > 0
    for update in updates.values():
        update.fold()
    assert torch.equal(model.qkv.base.weight[:D], w_init[:D])
    assert not torch.equal(model.qkv.base.weight[D:], w_init[D:])


def test_a_fresh_adapter_changes_nothing_and_a_fold_only_rounds():
    model, w_init, updates = fused(dtype=torch.float32)
    x = torch.randn(5, D_IN)
    plain = F.linear(x, w_init, model.qkv.base.bias)
    for update in updates.values():
        update.start(torch.Generator().manual_seed(0))
    assert all(u.active and u.B.abs().max() > 0 for u in updates.values())
    assert torch.equal(model(x), plain)
    begin(updates, seed=2)
    before = model(x).detach()
    assert (before - plain).abs().max() > 0.1
    for update in updates.values():
        update.fold()
        update.start(torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-5, atol=1e-5)


def test_many_folds_do_not_drift_and_unfold_restores_bit_for_bit():
    model, w_init, updates = fused(dtype=torch.float32)
    for task in range(50):
        begin(updates, seed=task)
        for update in updates.values():
            update.fold()
    assert not torch.allclose(model.qkv.base.weight, w_init, atol=1)
    for i, update in enumerate(updates.values()):
        assert torch.equal(model.qkv.base.weight[i * D : (i + 1) * D], w_init[i * D : (i + 1) * D] + update.summed)
        update.unfold()
    assert torch.equal(model.qkv.base.weight, w_init)
    for update in updates.values():
        update.refold()
    assert not torch.equal(model.qkv.base.weight, w_init)


def test_the_bound_of_b_and_the_seed():
    site = Site("q", "q", nn.Linear(D_IN, D), 0, D)
    one, same, other = (LowRankUpdate(site, RANK) for _ in range(3))
    for update, seed in ((one, 1), (same, 1), (other, 2)):
        update.start(torch.Generator().manual_seed(seed))
    assert torch.equal(one.B, same.B)
    assert not torch.equal(one.B, other.B)
    assert one.A.abs().max() == 0
    assert 0.5 / D_IN**0.5 < one.B.abs().max() <= 1 / D_IN**0.5


@pytest.mark.parametrize(
    ("weights", "factors"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_factors_are_never_in_half_precision(weights, factors):
    update = LowRankUpdate(Site("q", "q", nn.Linear(D_IN, D).to(weights), 0, D), RANK)
    assert update.A.dtype == update.B.dtype == update.summed.dtype == factors


@pytest.mark.parametrize("rows", [4, 20], ids=["side paths", "merged"])
def test_the_backward_keeps_no_full_weight_gradient(rows):
    model, _, updates = fused(dtype=torch.float32)
    begin(updates, seed=0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        loss = model(torch.randn(rows, D_IN).requires_grad_(True)).sum()
    loss.backward()
    # the frozen weight itself may be kept, never a merged copy beside it
    assert kept.count((3 * D, D_IN)) + kept.count((D_IN, 3 * D)) == (rows == 4)
    assert isinstance(model.qkv, AdaptedLinear)
    assert model.qkv.base.weight.grad is None
    assert {tuple(p.grad.shape) for u in updates.values() for p in (u.A, u.B)} == {(D, RANK), (RANK, D_IN)}


def test_folding_keeps_the_rank() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 20, bias=False).requires_grad_(False)
    update = LowRankUpdate(Site("s", "s", linear, 0, 20), rank=2)
    update.start(torch.Generator().manual_seed(0))
    with torch.no_grad():
        update.A.normal_()
    exact = update.A.detach() @ update.B.detach()
    update.fold()
    assert torch.equal(update.summed, exact)
    assert int(torch.linalg.matrix_rank(update.summed)) == 2
