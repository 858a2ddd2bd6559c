"""C-LoRA against eq. 1-3 of arXiv 2304.06027 computed directly, and what it trains, keeps and costs."""

from __future__ import annotations

import pytest
import torch

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run, run
from dualcl.methods.clora import CLoRAConfig, self_regularisation
from dualcl.methods.lora import LoRAConfig

RANK = ("method.rank=2",)


def direct_l_forget(A, B, S):
    """Eq. 3 as written."""
    return (S.abs() * (A @ B)).square().sum()


def factors(d_out=7, d_in=9, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((d_out, rank), (rank, d_in), (d_out, d_in))
    ]


def saved_sizes(compute):
    """Sizes of the tensors that autograd keeps for the backward of `compute()`."""
    sizes: list[int] = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        compute()
    return sorted(sizes)


def move(method, seed=0, size=0.3):
    """Stands for training: factors away from where they started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in method.trained():
            for p in group.params:
                p.add_(size * torch.randn(p.shape, generator=generator))


def begun(build, tasks, *sets, name="clora"):
    """(domain, method) in the middle of task `tasks` - 1, every task's factors moved."""
    domain, method = build(name, *RANK, *sets)
    for task in range(tasks):
        domain.begin_task(task)
        method.begin_task(task)
        move(method, seed=task)
        if task < tasks - 1:
            method.end_task(task)
    return domain, method


# --- eq. 3 ----------------------------------------------------------------------------------------------------------


def test_self_regularisation_equals_eq_3_in_value_and_gradient():
    A, B, S = factors()
    for t in (A, B):
        t.requires_grad_()
    fast, slow = self_regularisation(A, B, S), direct_l_forget(A, B, S)
    assert slow > 1
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-10)
    for a, b in zip(torch.autograd.grad(3 * fast, (A, B)), torch.autograd.grad(3 * slow, (A, B)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda a, b: self_regularisation(a, b, S), (A, B))


def test_only_entries_that_moved_before_are_charged():
    A, B, S = factors()
    product = A @ B
    mask = torch.zeros_like(S)
    mask[2, 3] = -2.0
    assert self_regularisation(A, B, mask).item() == pytest.approx(4 * product[2, 3].item() ** 2)
    assert self_regularisation(A, B, torch.zeros_like(S)).item() == 0


def test_autograd_keeps_no_full_matrix():
    A, B, S = factors()
    for t in (A, B):
        t.requires_grad_()
    kept = saved_sizes(lambda: self_regularisation(A, B, S))
    assert kept == sorted([A.numel(), B.numel()])
    assert max(saved_sizes(lambda: direct_l_forget(A, B, S))) == S.numel()  # the check can fail


def test_penalty_keeps_no_full_matrix_of_any_site(build):
    _, method = begun(build, 2)
    sizes = saved_sizes(method.penalty)
    assert len(sizes) >= 2 * len(method.updates)
    assert max(sizes) < 32 * 32


# --- eq. 1 and 2 in the real domain ---------------------------------------------------------------------------------


def test_no_penalty_in_the_first_task_nor_with_lambda_zero(build):
    assert begun(build, 1)[1].penalty() is None
    assert begun(build, 2, "method.lambda_=0")[1].penalty() is None
    assert begun(build, 2)[1].penalty() > 0


def test_penalty_is_lambda_times_the_sum_over_all_sites(build):
    domain, method = begun(build, 3, "method.lambda_=7")
    assert set(method.updates) == set(domain.sites())
    assert len(method.updates) == 3 * domain.network.blocks
    expected = sum(direct_l_forget(u.A.double(), u.B.double(), u.summed.double()) for u in method.updates.values())
    assert method.penalty().item() == pytest.approx(7 * expected.item(), rel=1e-5)
    assert method.penalty().dtype == torch.float32


def test_the_penalty_keeps_the_new_update_off_the_old_entries(build):
    charged = {}
    for weight in (0, 1e4):
        domain, method = begun(build, 1, f"method.lambda_={weight}", "method.lr=0.01")
        method.end_task(0)
        head = domain.begin_task(1)
        method.begin_task(1)
        params = [p for g in method.trained() for p in g.params]
        optimizer = torch.optim.Adam([*params, *head], lr=0.01)
        for _ in range(6):
            for batch in domain.batches(1, 0):
                loss, penalty = domain.loss(batch), method.penalty()
                optimizer.zero_grad()
                (loss if penalty is None else loss + penalty).backward()
                optimizer.step()
        charged[weight] = sum(direct_l_forget(u.A, u.B, u.summed).item() for u in method.updates.values())
    assert charged[1e4] < 0.2 * charged[0]


def test_gradients_reach_the_current_factors_and_rows_only(build):
    domain, method = begun(build, 3)
    batch = next(domain.batches(2, 0))
    (domain.loss(batch) + method.penalty()).backward()
    allowed = {id(p) for u in method.updates.values() for p in (u.A, u.B)}
    allowed |= {id(p) for p in domain.heads[2].parameters()}
    everything = [*domain.model.named_parameters(), *domain.heads.named_parameters(), *method.named_parameters()]
    unique = {id(p): (n, p) for n, p in everything}
    reached = {i for i, (_, p) in unique.items() if p.grad is not None and p.grad.abs().max() > 0}
    assert len(unique) > len(allowed) + 4
    assert reached == allowed


def test_earlier_state_stays_bit_equal_through_optimiser_steps(build):
    domain, method = begun(build, 2)
    method.end_task(1)
    head = domain.begin_task(2)
    method.begin_task(2)
    own = [p for g in method.trained() for p in g.params]
    optimizer = torch.optim.AdamW([*own, *head], lr=0.05, weight_decay=0.1)
    free = {id(p) for p in (*own, *head)}
    held = {**dict(domain.model.named_parameters()), **dict(domain.model.named_buffers())}
    held |= {f"heads.{k}": v for k, v in domain.heads.named_parameters()}
    held |= {f"w_init.{k}": u.w_init for k, u in method.updates.items()}
    frozen = {k: (v, v.detach().clone()) for k, v in held.items() if id(v) not in free}
    assert any("summed" in k for k in frozen)
    assert any("heads.1" in k for k in frozen)
    started = [p.detach().clone() for p in own]
    for batch in domain.batches(2, 0):
        optimizer.zero_grad()
        (domain.loss(batch) + method.penalty()).backward()
        optimizer.step()
    assert all(torch.equal(now, before) for now, before in frozen.values())
    assert not any(torch.equal(p, before) for p, before in zip(own, started, strict=True))


def test_lambda_zero_is_lora_bit_for_bit(tiny, tmp_path):
    runs = {}
    for name, sets in (("lora", ()), ("clora", ("method.lambda_=0",))):
        folder = RunFolder(tmp_path / name)
        record = run(tiny(name, *RANK, "method.lr=0.01", *sets), folder.path)
        runs[name] = record["matrix"], folder.load_checkpoint("task_2")[0]
    assert runs["lora"][0] == runs["clora"][0]
    assert runs["lora"][1].keys() == runs["clora"][1].keys()
    assert all(torch.equal(v, runs["clora"][1][k]) for k, v in runs["lora"][1].items())
    assert max(v.abs().max() for k, v in runs["lora"][1].items() if "summed" in k) > 0


def test_runs_under_bf16(tiny, tmp_path):
    record = run(tiny("clora", *RANK, "precision=bf16", "method.lambda_=100"), tmp_path / "run")
    assert record["status"] == "finished"
    state, _ = RunFolder(tmp_path / "run").load_checkpoint("task_2")
    sums = [v for k, v in state.items() if k.endswith("summed")]
    assert {v.dtype for v in sums} == {torch.float32}
    assert all(torch.isfinite(v).all() and v.abs().max() > 0 for v in sums)


def test_cost_is_the_same_in_task_2_and_in_task_50(tiny, tmp_path):
    work = Run(tiny("clora", *RANK), RunFolder(tmp_path), Reporter(quiet=True))
    work.domain.begin_task(0, "task")
    batch = next(work.domain.batches(0, 0))

    def cost():
        state = work.method.state_dict()
        trained = [p for g in work.method.trained() for p in g.params]
        kept = saved_sizes(lambda: work.domain.loss(batch) + work.method.penalty())
        tensors = [*work.domain.model.parameters(), *work.domain.model.buffers()]
        return (
            len(state),
            sum(v.numel() for v in state.values()),
            len(trained),
            sum(p.numel() for p in trained),
            kept,
            len(tensors),
            sum(t.numel() for t in tensors),
        )

    costs = {}
    for task in range(50):
        work.method.begin_task(task)
        move(work.method, seed=task, size=0.01)
        if task in (1, 49):
            costs[task] = cost()
        work.method.end_task(task)
    assert costs[1] == costs[49]
    assert costs[1][3] == 5 * 3 * 2 * (32 + 32)


def test_stored_is_the_factors_or_one_delta_whichever_is_smaller(build):
    _, method = build("clora", "method.rank=6")
    stored = []
    for task in range(4):
        method.begin_task(task)
        method.end_task(task)
        stored.append(method.stored_parameters())
    sites = 5 * 3
    assert stored == [sites * n for n in (6 * 64, 12 * 64, 1024, 1024)]


def test_diagnostics_are_the_frobenius_norms(build):
    _, method = begun(build, 2)
    update = torch.stack([(u.A @ u.B).detach() for u in method.updates.values()]).norm().item()
    method.end_task(1)
    total = torch.stack([u.summed for u in method.updates.values()]).norm().item()
    facts = method.diagnostics()
    assert facts["update_norm"] == pytest.approx(update, rel=1e-5)
    assert facts["summed_norm"] == pytest.approx(total, rel=1e-5)
    assert facts["summed_norm"] != pytest.approx(facts["update_norm"], rel=1e-3)


# --- what other code of this name computes (methods/README.md) --------------------------------------------------------


def finished(build, tasks, size=0.3):
    """(method, factors) after `tasks` tasks: the factors (A_t, B_t) of every site, one list entry per task."""
    _, method = build("clora", *RANK)
    kept = {name: [] for name in method.updates}
    for task in range(tasks):
        method.begin_task(task)
        with torch.no_grad():  # independent updates of one size, as tasks that have nothing to do with one another
            generator = torch.Generator().manual_seed(task)
            for name, u in method.updates.items():
                for p in (u.A, u.B):
                    p.copy_(size * torch.randn(p.shape, generator=generator))
                kept[name].append((u.A.detach().clone(), u.B.detach().clone()))
        method.end_task(task)
    return method, kept


def added_apart(pairs):
    """(A_1 + ... + A_t) (B_1 + ... + B_t)."""
    return torch.stack([a for a, _ in pairs]).sum(0) @ torch.stack([b for _, b in pairs]).sum(0)


@pytest.mark.parametrize(("tasks", "drift", "charge"), [(1, 0, 1), (2, 1, 2), (5, 2, 5), (10, 3, 10)])
def test_the_product_of_summed_factors_is_not_the_sum_of_products(build, tasks, drift, charge):
    """With t independent updates its t (t - 1) cross terms outweigh the t true ones by sqrt(t - 1) in norm."""
    method, kept = finished(build, tasks)
    S = torch.stack([u.summed for u in method.updates.values()])
    direct = torch.stack([torch.stack([a @ b for a, b in pairs]).sum(0) for pairs in kept.values()])
    apart = torch.stack([added_apart(pairs) for pairs in kept.values()])
    torch.testing.assert_close(S, direct, rtol=0, atol=1e-5)
    assert ((apart - S).norm() / S.norm()).item() == pytest.approx(drift, rel=0.12, abs=1e-6)
    A, B, _ = factors(32, 32, 2)
    charged = [sum(direct_l_forget(A, B, s.double()) for s in sums).item() for sums in (S, apart)]
    assert charged[1] / charged[0] == pytest.approx(charge, rel=0.25)


def test_the_product_of_summed_factors_moves_the_model_when_a_task_ends(build):
    """Ours ends a task with the weight it was trained to; summed factors add the cross terms at that moment."""
    method, kept = finished(build, 2)
    for name, u in method.updates.items():
        trained = u.w_init + sum(a @ b for a, b in kept[name])
        torch.testing.assert_close(u.site.weight, trained, rtol=0, atol=1e-6)
        jump = (added_apart(kept[name]) - sum(a @ b for a, b in kept[name])).norm()
        assert 0.7 < jump / (kept[name][1][0] @ kept[name][1][1]).norm() < 2


def test_a_mean_over_layers_and_a_scaling_are_other_lambdas(build):
    """Mean over n sites: lambda / n. Penalty on unscaled factors of updates s A B: lambda s^-4."""
    _, method = begun(build, 3, "method.lambda_=7")
    terms = [direct_l_forget(u.A.double(), u.B.double(), u.summed.double()) for u in method.updates.values()]
    n = len(terms)
    assert n == 15
    assert method.penalty().item() == pytest.approx(7 * n * (sum(terms) / n).item(), rel=1e-5)
    A, B, S = factors()
    s = 1 / 10  # alpha 1, rank 10
    true = direct_l_forget(s * A, B, s * S)
    assert true.item() == pytest.approx(s**4 * direct_l_forget(A, B, S).item())


def test_bad_options_are_named(build):
    with pytest.raises(UserError, match=r"method\.lambda_ must not be negative, got -1"):
        CLoRAConfig(lambda_=-1)
    with pytest.raises(UserError, match=r"method\.rank must be at least 1, got 0"):
        LoRAConfig(rank=0)
    with pytest.raises(UserError, match=r"method\.rank=33 is more than the smallest side of a site, 32"):
        build("clora", "method.rank=33")
