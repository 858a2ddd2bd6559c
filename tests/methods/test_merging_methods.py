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
from dualcl.methods.lora_merge import LoRAMerge, LoRAMergeConfig, orthogonal_columns, orthogonal_rows
from dualcl.methods.loraclr import LoRACLR, LoRACLRConfig, contrast
from dualcl.methods.mix_of_show import MixOfShow, MixOfShowConfig
from dualcl.methods.orthogonal_adaptation import OrthogonalAdaptation, OrthogonalAdaptationConfig
from dualcl.methods.shared.ties import ties


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


# --- lora_merge -------------------------------------------------------------------------------------------------------


def test_ties_trims_elects_and_averages() -> None:
    one = rows([1.0, -2, 0.5], [3, 1, -0.5])
    two = rows([1.0, 2, 0.5], [3, 1, -0.5])
    assert ties(one, 1.0).tolist() == [2, -2, 0]
    assert ties(two, 1.0).tolist() == [2, 1.5, 0]
    assert ties(one, 1.0, zero_follows=True).tolist() == [2, -2, -0.5]
    assert ties(two, 1.0, zero_follows=True).tolist() == [2, 1.5, 0.5]
    assert ties(one, 1 / 3).tolist() == [3, -2, 0]  # the largest entry of each alone
    assert ties(one[:1], 1.0).tolist() == one[0].tolist()
    many = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ties(many, 0.5), ties(many.flatten(1), 0.5).view(5, 6))


@pytest.mark.parametrize(
    ("rule", "quirks", "merged"),
    [
        ("sum", (), [-0.5, 0.0]),
        ("magnitude", (), [-1.5, 2.0]),
        ("mean", (), [-0.25, 0.0]),
        ("ties", (), [-1.5, 0.0]),
        ("ties", ("ties_zero",), [-1.5, -2.0]),
        ("sum", ("factor_sum",), [-1.0, 0.0]),
    ],
)
def test_two_updates_are_merged_by_a_rule(
    toy: Callable[..., Any], rule: Any, quirks: tuple[str, ...], merged: list[float]
) -> None:
    w = rows([10.0, 20.0])
    config = LoRAMergeConfig(rank=1, rule=rule, density=1.0, reference_quirks=quirks)
    method = toy(LoRAMerge, config, w)
    assert torch.equal(taught(method, 0, rows([1.0]), rows([1.0, -2])), w + rows([1.0, -2]))
    method.begin_task(1)
    on = w if rule in ("mean", "ties") else w + rows([1.0, -2])
    assert torch.equal(method.updates["k"].site.weight, on)
    assert torch.equal(taught(method, 1, rows([1.0]), rows([-1.5, 2])), w + torch.tensor([merged]).float())


def test_added_factors_are_not_added_products(toy: Callable[..., Any]) -> None:
    found = []
    for quirks in ((), ("factor_sum",)):
        method = toy(LoRAMerge, LoRAMergeConfig(rank=1, rule="sum", reference_quirks=quirks), rows([0.0]))
        taught(method, 0, rows([2.0]), rows([1.0]))
        found.append(taught(method, 1, rows([4.0]), rows([3.0])).item())
    assert found == [2 + 12, 4 * 6]


def test_a_sum_is_lora_bit_for_bit(concepts: Callable[..., Any], empty_record: Any, tmp_path: Path) -> None:
    found = {}
    for name, sets in (("lora", ()), ("lora_merge", ("method.rule=sum",)), ("lora_merge", ("method.rule=magnitude",))):
        work = concepts(name, tmp_path / str(len(found)), "method.lr=1e-2", *sets)
        work.execute(empty_record())
        found[len(found)] = work.tensors()
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())
    assert not all(torch.equal(t, found[2][n]) for n, t in found[0].items())


def test_the_larger_of_updates_that_do_not_meet_is_their_sum(toy: Callable[..., Any]) -> None:
    method = toy(LoRAMerge, LoRAMergeConfig(rank=1, rule="magnitude"), torch.zeros(1, 4))
    taught(method, 0, rows([1.0]), rows([3.0, 0, -1, 0]))
    assert taught(method, 1, rows([1.0]), rows([0.0, 5, 0, 7])).tolist() == [[3, 5, -1, 7]]


def test_a_new_start_is_orthogonal_to_all_earlier_ones_or_to_columns_of_the_last(toy: Callable[..., Any]) -> None:
    config = LoRAMergeConfig(rank=2, orthogonal_init=True)
    method, earlier = toy(LoRAMerge, config, torch.zeros(3, 8), 4), []
    for task in range(4):
        method.begin_task(task)
        b = method.updates["k"].B.detach().clone()
        if task:
            assert (b @ torch.cat(earlier).T).abs().max() < 1e-6
            torch.testing.assert_close(b @ b.T, torch.eye(2) / 3, rtol=0, atol=1e-6)
        earlier.append(b + 0.1 * torch.randn(2, 8, generator=torch.Generator().manual_seed(task)))  # it is learnt
        method.updates["k"].B.data.copy_(earlier[-1])
        method.end_task(task)
    with pytest.raises(
        UserError, match=r"5 tasks of rank 2 need 10 inputs, a site has 8; lower method.rank, or take 4"
    ):
        toy(LoRAMerge, config, torch.zeros(3, 8), 5)
    column = orthogonal_columns(rows([3.0], [4.0]), torch.Generator().manual_seed(0)).flatten().tolist()
    assert [abs(x) for x in column] == pytest.approx([0.8, 0.6])
    assert column[0] * column[1] < 0
    config = LoRAMergeConfig(rank=2, orthogonal_init=True, reference_quirks=("unit_columns",))
    method = toy(LoRAMerge, config, torch.zeros(3, 8), 9)
    taught(method, 0, torch.zeros(3, 2), torch.arange(16.0).view(2, 8) + 1)
    method.begin_task(1)
    b = method.updates["k"].B.detach()
    assert ((torch.arange(16.0).view(2, 8) + 1) * b).sum(0).abs().max() < 1e-5
    torch.testing.assert_close(b.norm(dim=0), torch.ones(8))


def test_what_a_merge_stores(toy: Callable[..., Any]) -> None:
    """Factors are 2 * (3 + 8) = 22 numbers a task, a delta 24."""
    wanted: list[tuple[dict[str, Any], list[int]]] = [
        ({"rule": "sum"}, [22, 24, 24]),
        ({"rule": "magnitude"}, [22, 24, 24]),
        ({"rule": "mean"}, [22, 24, 24]),
        ({"rule": "ties"}, [22, 44, 66]),
        ({"rule": "sum", "reference_quirks": ("factor_sum",)}, [22, 44, 66]),
        ({"rule": "sum", "orthogonal_init": True}, [22, 44, 66]),  # a delta and all B: 24 + 16 n
        ({"rule": "sum", "orthogonal_init": True, "reference_quirks": ("unit_columns",)}, [22, 40, 40]),
    ]
    for settings, sizes in wanted:
        method, found = toy(LoRAMerge, LoRAMergeConfig(rank=2, **settings), torch.zeros(3, 8), 3), []
        for task in range(3):
            taught(method, task, torch.ones(3, 2))
            found.append(method.stored_parameters())
        assert found == sizes, settings
        assert orthogonal_rows(torch.eye(8)[:2], 2, torch.Generator().manual_seed(0))[:, :2].abs().max() < 1e-12


# --- mix_of_show ------------------------------------------------------------------------------------------------------

E1, E2 = rows([1.0, 0, 0]), rows([0.0, 1, 0])


@pytest.mark.parametrize(
    ("inputs", "ridge", "merged"),
    [([E1, E2], 0.0, [8, 13, 9]), ([E1, E1], 0.0, [9.5, 8, 9]), ([E1, E2], 1.0, [7.5, 10.5, 9])],
)
def test_fusion_of_two_updates(toy: Callable[..., Any], inputs: Any, ridge: float, merged: list[float]) -> None:
    w = rows([7.0, 8, 9])
    method = toy(MixOfShow, MixOfShowConfig(rank=1, ridge=ridge), w, inputs=inputs)
    assert torch.equal(taught(method, 0, rows([1.0]), rows([1.0, 2, 3])), w + rows([1.0, 2, 3]))
    torch.testing.assert_close(taught(method, 1, rows([1.0]), rows([4.0, 5, 6])), torch.tensor([merged]).float())


def test_fusion_keeps_every_concepts_own_words_in_any_order(concepts: Callable[..., Any], tmp_path: Path) -> None:
    found, orders = [], ((0, 1, 2), (2, 0, 1))
    for order in orders:
        work = concepts("mix_of_show", tmp_path / str(order[0]), "stream.tasks=3", "method.rank=4")
        start = weights(work)
        for task in range(3):
            work.begin(task)
        products = dict(zip(order, drawn(work, order), strict=True))
        now = weights(work)
        found.append((now, work.method.get_buffer("moved_0") @ work.method.inverse))
        assert work.method.facts["fitted_words"] == 2
        for task in range(3):
            x = work.domain.concept_inputs(task, own=True)
            for name, weight in now.items():
                alone = start[name] + products[task][name]
                scale = (alone @ x.T).abs().max()
                assert ((weight - alone) @ x.T).abs().max() < 1e-4 * scale
                assert (weight - alone).abs().max() > 0.05
    # both are float64 from products in float32, which are the same
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-9)


def test_after_the_first_concept_the_model_is_its_own(concepts: Callable[..., Any], tmp_path: Path) -> None:
    work = concepts("mix_of_show", tmp_path)
    start = weights(work)
    (product,) = drawn(work, [0])
    for name, now in weights(work).items():
        assert torch.equal(now, start[name] + product[name])
    sizes = [(u.site.d_out, u.site.d_in) for u in work.method.updates.values()]
    pairs, sums = sum(2 * (o + i) for o, i in sizes), sum(o * i for o, i in sizes) + 128**2
    assert work.method.stored_parameters() == pairs < sums
    work.method.finished = sums // pairs
    assert work.method.stored_parameters() == sums // pairs * pairs
    work.method.finished += 1
    assert work.method.stored_parameters() == sums


def test_without_own_inputs_the_words_that_all_prompts_share_are_fitted_too(
    concepts: Callable[..., Any], tmp_path: Path
) -> None:
    for own, words in (("true", 2), ("false", 5)):
        work = concepts("mix_of_show", tmp_path / own, f"method.own_inputs={own}")
        drawn(work, range(2))
        assert work.method.facts["fitted_words"] == words


def test_sites_of_different_widths_are_refused(toy: Callable[..., Any]) -> None:
    class Wider(MixOfShow):
        name = "mix_of_show"

    domain: Any = SimpleNamespace(attach=lambda method: None, model=nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)))
    domain.sites = lambda: {str(i): Site(str(i), str(i), domain.model[i], 0, [2, 4][i]) for i in range(2)}
    with pytest.raises(UserError, match=r"these read \[2, 4\]; choose another model"):
        Wider(MixOfShowConfig(rank=1), domain, 2, 0)


# --- loraclr ----------------------------------------------------------------------------------------------------------


def test_margins_work_between_targets_that_are_near() -> None:
    for apart, loss, share in ((0.3, 0.04, 1.0), (0.6, 0.0, 0.0)):
        wanted = torch.tensor([[[1.0, 0]], [[1 + apart, 0]]])
        found = contrast(wanted, wanted, 0.5)
        assert (found[0].item(), found[1].item()) == (pytest.approx(loss, abs=1e-6), share)
    # targets at 0 and 5, outputs at 0 and 0.2: the first's target is near the second's output, in the code also others
    said, wanted = torch.tensor([[[0.0]], [[0.2]]]), torch.tensor([[[0.0]], [[5.0]]])
    text, code = (contrast(said, wanted, 0.5, code_pairs=c) for c in (False, True))
    assert text[0].item() == pytest.approx((4.8**2 + 0.3**2) / 2)
    assert code[0].item() == pytest.approx((4.8**2 + 0.3**2) / 2)
    assert text[1].item() == code[1].item() == 0.5
    said = torch.tensor([[[0.0]], [[0.2]], [[0.3]]])
    wanted = torch.tensor([[[0.0]], [[5.0]], [[9.0]]])
    assert contrast(said, wanted, 0.5)[1].item() == pytest.approx(1 / 3)
    assert contrast(said, wanted, 0.5, code_pairs=True)[1].item() == pytest.approx(2 / 3)


@pytest.fixture
def pair(toy: Callable[..., Any]) -> Callable[..., Tensor]:
    """pair(**settings) -> (method, offset) after both concepts, each of one row of inputs."""
    x = [rows([1.0, 2, 0]) / 5**0.5, rows([0.0, 1, 3]) / 10**0.5]

    def make(**settings: Any) -> Any:
        method = toy(LoRACLR, LoRACLRConfig(rank=1, **settings), rows([7.0, 8, 9]), inputs=x)
        method.domain.token_rows = lambda task: (torch.zeros(0, 4),)
        start = method.updates["k"].site.weight.clone()
        assert torch.equal(taught(method, 0, rows([1.0]), rows([1.0, 2, 3])), start + rows([1.0, 2, 3]))
        return method, taught(method, 1, rows([1.0]), rows([4.0, 5, 6])) - start

    return make


def test_a_long_merge_meets_the_targets_but_leaves_the_span_of_the_words(pair: Callable[..., Any]) -> None:
    none = {"margin": 0.0, "offset_weight": 0.0, "merge_decay": 0.0}
    method, offset = pair(merge_steps=2500, merge_lr=1e-2, **none)
    x = torch.cat([method.inputs(j) for j in range(2)])
    torch.testing.assert_close((x @ offset.T).flatten(), torch.tensor([2.236068, 7.273239]), rtol=0, atol=1e-4)
    torch.testing.assert_close(offset, rows([-2.506, 3.753, 6.416]), rtol=0, atol=2e-3)
    nearest = torch.tensor([[2.236068, 7.273239]]) @ torch.linalg.pinv(x).T
    torch.testing.assert_close(nearest, rows([0.087, 2.457, 6.848]), rtol=0, atol=1e-3)
    assert method.facts["error_left"] < 1e-6
    assert method.facts["margins_at_work"] == 0


def test_the_papers_merge_hardly_moves(pair: Callable[..., Any]) -> None:
    method, offset = pair()
    torch.testing.assert_close(offset.abs(), torch.full((1, 3), 0.005), rtol=0.02, atol=0)
    assert 0.99 < method.facts["error_left"] < 1
    assert method.stored_parameters() == 3 + 2
    seen, _ = pair(reference_quirks=("best_seen",)), None
    # 49 steps: the last one's outcome is not seen
    torch.testing.assert_close(seen[1].abs(), torch.full((1, 3), 0.0049), rtol=0.02, atol=0)


def test_terms_of_the_merge_pull_on_the_offset(pair: Callable[..., Any]) -> None:
    long = {"merge_steps": 60, "merge_lr": 5e-2}
    plain = pair(**long)[1]
    assert pair(offset_weight=10.0, **long)[1].norm() < plain.norm() - 0.1
    assert not torch.equal(pair(mse_weight=10.0, **long)[1], plain)
    apart = pair(margin=20.0, **long)
    assert apart[0].facts["margins_at_work"] == 1
    assert not torch.equal(apart[1], plain)


def test_a_merge_reads_tokens_and_end_token_and_keeps_what_moves_them(
    concepts: Callable[..., Any], tmp_path: Path
) -> None:
    work = concepts("loraclr", tmp_path, "concept.n_tokens=2", "concept.prompt=a photo of {token} on a table")
    drawn(work, range(2))
    for j in range(2):
        own = work.domain.concept_inputs(j, own=True)
        assert len(own) > 5
        assert torch.equal(work.method.inputs(j), own[[0, 1, -1]])
    sizes = [(u.site.d_out, u.site.d_in) for u in work.method.updates.values()]
    numbers = zip(*((2 * (o + i), o * i, 3 * o) for o, i in sizes), strict=True)
    pairs, delta, targets = (sum(each) for each in numbers)
    assert work.method.stored_parameters() == 2 * pairs < delta  # factors give the rest
    for finished in range(3, 30):
        for i, (out, _) in enumerate(sizes):
            work.method.register_buffer(f"moved_{finished - 1}_{i}", torch.zeros(3, out))
        work.method.finished = finished
        assert work.method.stored_parameters() == min(finished * pairs, delta + finished * targets)
    assert finished * pairs > delta + finished * targets
    assert 0 < work.method.facts["error_left"] < 1


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (MixOfShowConfig, {"ridge": -1.0}, "method.ridge must not be negative, got -1.0"),
        (LoRACLRConfig, {"margin": -1.0}, "method.margin must not be negative, got -1.0"),
        (LoRACLRConfig, {"merge_steps": 0}, "method.merge_steps must be at least 1, got 0"),
        (LoRAMergeConfig, {"rule": "max"}, "method.rule must be one of sum, magnitude, mean, ties, got 'max'"),
        (LoRAMergeConfig, {"density": 0.0}, "method.density must be above 0 and at most 1, got 0.0"),
        (
            LoRAMergeConfig,
            {"reference_quirks": ("factor_sum",)},
            "the quirk factor_sum is for method.rule=sum",
        ),
        (
            LoRAMergeConfig,
            {"reference_quirks": ("unit_columns",)},
            "the quirk unit_columns is for method.orthogonal_init=true",
        ),
        (LoRAMergeConfig, {"reference_quirks": ("ties_zero",)}, "the quirk ties_zero is for method.rule=ties"),
        (OrthogonalAdaptationConfig, {"merge_weight": 0.0}, "method.merge_weight must be positive, got 0.0"),
        (OrthogonalAdaptationConfig, {"rows": "same"}, "method.rows must be disjoint or random, got 'same'"),
        (
            OrthogonalAdaptationConfig,
            {"one_adapter": True},
            "method.one_adapter is an ablation of lora and clora; orthogonal_adaptation has none",
        ),
        (
            OrthogonalAdaptationConfig,
            {"align": True},
            "method.align is an option of lora, clora and inflora; orthogonal_adaptation has none",
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
