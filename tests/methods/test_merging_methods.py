"""Methods that learn each concept apart or merge what they learn: toy cases with their numbers, and what must hold."""

from __future__ import annotations

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
from dualcl.methods.orthogonal_adaptation import OrthogonalAdaptation, OrthogonalAdaptationConfig


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


@pytest.fixture
def toy() -> Callable[..., Any]:
    """toy(method class, configuration, weight, n_tasks, inputs) -> the method on one Linear without a bias."""

    def make(cls: Any, config: Any, weight: Tensor, n_tasks: int = 2, inputs: Any = None) -> Any:
        model = nn.Sequential(OrderedDict(k=nn.Linear(*reversed(weight.shape), bias=False))).requires_grad_(False)
        model.k.weight.copy_(weight)
        site = Site("k", "k", model.k, 0, len(weight))
        domain: Any = SimpleNamespace(attach=lambda method: None, sites=lambda: {"k": site}, model=model)
        domain.concept_inputs = lambda task, own=False: inputs[task]
        return cls(config, domain, n_tasks, 0)

    return make


def taught(method: Any, task: int, a: Tensor, b: Tensor | None = None) -> Tensor:
    """The weight after a task that ended with these factors."""
    method.begin_task(task)
    update = method.updates["k"]
    with torch.no_grad():
        update.A.copy_(a)
        if b is not None:
            update.B.copy_(b)
    method.end_task(task)
    weight: Tensor = update.site.weight.clone()
    return weight


def drawn(work: Any, tasks: Any) -> list[dict[str, Tensor]]:
    """Teaches tasks with factors A that are drawn; the product of each task at each site."""
    found = []
    for task in tasks:
        if len(work.domain.tokens.rows) <= task:
            work.begin(task)
        else:
            work.method.begin_task(task)
        with torch.no_grad():
            for i, update in enumerate(work.method.updates.values()):
                update.A.copy_(torch.randn(update.A.shape, generator=torch.Generator().manual_seed(100 * task + i)))
        found.append({name: u.product() for name, u in work.method.updates.items()})
        work.method.end_task(task)
    return found


def weights(work: Any) -> dict[str, Tensor]:
    return {name: u.site.weight.clone() for name, u in work.method.updates.items()}


# --- orthogonal_adaptation --------------------------------------------------------------------------------------------


def test_two_concepts_on_rows_of_the_identity(toy: Callable[..., Any]) -> None:
    w = rows([1.0, 1, 1, 1], [2, 2, 2, 2])
    method = toy(OrthogonalAdaptation, OrthogonalAdaptationConfig(rank=2, merge_weight=0.5), w)
    method.bases[4] = torch.eye(4, dtype=torch.float64)
    method.chosen = lambda task, d: torch.tensor([[0, 2], [1, 3]][task])
    one, two = rows([1.0, 0, 2, 0], [3, 0, 4, 0]), rows([0.0, 5, 0, 6], [0, 7, 0, 8])
    assert torch.equal(taught(method, 0, rows([1.0, 2], [3, 4])), w + 0.5 * one)
    assert torch.equal(one @ two.T, torch.zeros(2, 2))
    assert torch.equal(taught(method, 1, rows([5.0, 6], [7, 8])), w + 0.5 * one + 0.5 * two)


def test_a_concept_is_learnt_on_the_pretrained_weights(toy: Callable[..., Any]) -> None:
    w = rows([0.1, 0.2, 0.3, 0.4])
    method = toy(OrthogonalAdaptation, OrthogonalAdaptationConfig(rank=1), w)
    assert not torch.equal(taught(method, 0, rows([3.0])), w)
    method.begin_task(1)
    assert torch.equal(method.updates["k"].site.weight, w)
    assert method.updates["k"].A.abs().max() == 0
    assert [p.shape for g in method.trained() for p in g.params] == [(1, 1)]
    assert not method.updates["k"].B.requires_grad
    method.restored(1)  # in the middle of the second task
    assert torch.equal(method.updates["k"].site.weight, w)
    assert method.updates["k"].active


@pytest.mark.parametrize("given", ["disjoint", "random"])
def test_rows_are_of_one_orthogonal_matrix_and_shared_or_not(toy: Callable[..., Any], given: Any) -> None:
    method = toy(OrthogonalAdaptation, OrthogonalAdaptationConfig(rank=16, rows=given), torch.zeros(64, 128), 10)
    basis = method.basis(128)
    torch.testing.assert_close(basis @ basis.T, torch.eye(128, dtype=torch.float64), rtol=0, atol=1e-12)
    chosen = [method.chosen(task, 128).tolist() for task in range(10)]
    assert all(len(set(c)) == 16 for c in chosen)
    common = [len({*chosen[i]} & {*chosen[j]}) for i in range(10) for j in range(i)]
    if given == "disjoint":  # 8 blocks: the ninth concept gets the first one's
        assert sorted(common) == [0] * 43 + [16] * 2
        assert chosen[8:] == chosen[:2]
        assert [method.shared_rows(t) for t in (7, 8)] == [0, 16]
        assert "there are 8 blocks of 16 rows" in str(method.caveats())
    else:
        assert sum(common) / 45 == pytest.approx(16 * 16 / 128, abs=0.6)
        assert "blocks" not in str(method.caveats())


def test_the_demos_basis_is_half_of_it(toy: Callable[..., Any]) -> None:
    norms = []
    for quirks in ((), ("half_basis",)):
        config = OrthogonalAdaptationConfig(rank=2, reference_quirks=quirks)
        method = toy(OrthogonalAdaptation, config, torch.zeros(4, 8))
        method.begin_task(0)
        norms.append(method.updates["k"].B.norm(dim=1).tolist())
    assert norms == [pytest.approx([1, 1]), pytest.approx([0.5, 0.5])]


def test_on_its_own_directions_a_concept_is_left_alone_in_any_order(
    concepts: Callable[..., Any], tmp_path: Path
) -> None:
    sets = ("stream.tasks=3", "method.rank=4", "method.merge_weight=1")
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        work = concepts("orthogonal_adaptation", tmp_path / str(order[0]), *sets)
        start = weights(work)
        for task in range(3):
            work.domain.begin_task(task)
        products = dict(zip(order, drawn(work, order), strict=True))
        found.append(weights(work))
        for task in range(3):
            b = work.method.basis(128)[work.method.chosen(task, 128)].float()
            for name, now in found[-1].items():
                alone = start[name] + products[task][name]
                torch.testing.assert_close(now @ b.T, alone @ b.T, rtol=0, atol=1e-5)
                assert (now - alone).abs().max() > 0.1
    for name, now in found[0].items():
        torch.testing.assert_close(now, found[1][name], rtol=0, atol=1e-5)


def test_concepts_on_the_same_directions_disturb_one_another(concepts: Callable[..., Any], tmp_path: Path) -> None:
    """The control: without the isolation the property above does not hold."""
    work = concepts("orthogonal_adaptation", tmp_path, "method.rank=4", "method.merge_weight=1")
    work.method.chosen = lambda task, d: torch.arange(4)
    start = weights(work)
    first, _ = drawn(work, range(2))
    b = work.method.basis(128)[:4].float()
    away = [((now - start[n] - first[n]) @ b.T).abs().max() for n, now in weights(work).items()]
    assert min(away) > 0.5


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (OrthogonalAdaptationConfig, {"merge_weight": 0.0}, "method.merge_weight must be positive, got 0.0"),
        (OrthogonalAdaptationConfig, {"rows": "same"}, "method.rows must be disjoint or random, got 'same'"),
        (
            OrthogonalAdaptationConfig,
            {"one_adapter": True},
            "method.one_adapter is an ablation of lora and clora; orthogonal_adaptation has none",
        ),
        (
            OrthogonalAdaptationConfig,
            {"reference_quirks": ("half",)},
            "unknown name 'half' in method.reference_quirks; did you mean 'half_basis'? (quirks: half_basis)",
        ),
    ],
)
def test_wrong_values_are_named(config: Any, given: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        config(**given)
    assert str(error.value) == message
