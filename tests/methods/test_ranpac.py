"""Ridge sums, the choice of the ridge, packed matrices, and RanPAC on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as Sklearn

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.method_check import PROPERTIES, check_method
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run, run
from dualcl.methods.ranpac import RanPACConfig
from dualcl.methods.shared import symmetric
from dualcl.methods.shared.adapters import Bottleneck, CosineRows
from dualcl.methods.shared.ridge import STRENGTHS, Ridge, choose_strength, held_out, ridge_errors

CPU = torch.device("cpu")


def made(width: int, classes: int, *parts: tuple[torch.Tensor, torch.Tensor]) -> Ridge:
    ridge = Ridge(width, classes, CPU).double()
    for features, labels in parts:
        ridge.add(features.double(), labels)
    return ridge


@pytest.mark.parametrize("block", [1, 3, 4, 100])
@pytest.mark.parametrize("d", [1, 4, 7])
def test_symmetric_matrices_are_packed_row_by_row(block: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "BLOCK", block)
    x = torch.randn(2, d, d)
    whole = x + x.mT
    packed = symmetric.pack(whole)
    rows, columns = torch.triu_indices(d, d)
    assert torch.equal(packed, whole[:, rows, columns])
    assert packed.shape == (2, symmetric.packed_size(d))
    assert torch.equal(symmetric.unpack(packed, d), whole)
    ridge = Ridge(d, 2, CPU)
    ridge.add(whole[0], torch.arange(d) % 2)
    torch.testing.assert_close(symmetric.unpack(ridge.gram, d), whole[0].T @ whole[0])


def test_two_tasks_by_hand() -> None:
    parts = [(torch.tensor([[1.0, 0.0]]), torch.tensor([0])), (torch.tensor([[0.0, 2.0]]), torch.tensor([1]))]
    solved = made(2, 2, *parts).solve(1.0)
    torch.testing.assert_close(solved, torch.diag(torch.tensor([0.5, 0.4], dtype=torch.float64)))
    assert (torch.ones(2, dtype=torch.float64) @ solved).tolist() == pytest.approx([0.5, 0.4])


def test_any_order_of_tasks_and_all_at_once_is_sklearns_ridge() -> None:
    x, y = torch.randn(60, 9), torch.arange(60) % 6
    tasks = [(x[y // 2 == t], y[y // 2 == t]) for t in range(3)]
    whole = made(9, 6, (x, y)).solve(3.0)
    for order in itertools.permutations(tasks):
        torch.testing.assert_close(made(9, 6, *order).solve(3.0), whole, rtol=1e-6, atol=1e-9)
    wanted = Sklearn(alpha=3.0, fit_intercept=False).fit(x.double().numpy(), np.eye(6)[y.numpy()]).coef_.T
    torch.testing.assert_close(whole, torch.from_numpy(wanted), rtol=1e-6, atol=1e-9)


def test_the_chosen_ridge_by_hand() -> None:
    one = torch.ones(1, 1)
    errors = ridge_errors((one, one), (one, one / 2))
    assert errors.tolist() == pytest.approx([(1 / (1 + s) - 0.5) ** 2 for s in STRENGTHS])
    assert STRENGTHS[int(errors.argmin())] == 1


def test_samples_and_features_side_give_the_same_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    h, y, g, z = torch.randn(3, 5), torch.randn(3, 2), torch.randn(4, 5), torch.randn(4, 2)
    few = ridge_errors((h, y), (g, z), (1e-2, 1.0, 50.0))
    h, g = h.double(), g.double()
    for error, s in zip(few, (1e-2, 1.0, 50.0), strict=True):
        w = torch.linalg.solve(h.T @ h + s * torch.eye(5, dtype=torch.float64), h.T @ y.double())
        assert float(error) == pytest.approx(float((g @ w - z).square().mean()), rel=1e-9)
    h, y = torch.randn(8, 5), torch.randn(8, 2)  # the other side
    (many,) = ridge_errors((h, y), (g, z), (2.0,))
    w = torch.linalg.solve(h.double().T @ h.double() + 2 * torch.eye(5), h.double().T @ y.double())
    assert float(many) == pytest.approx(float((g @ w - z).square().mean()), rel=1e-9)


def test_a_fifth_of_each_class_is_held_out() -> None:
    labels = torch.tensor([4] * 10 + [5] * 3 + [6] + [7] * 15)
    one, two = (held_out(labels, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert [int(one[labels == c].sum()) for c in (4, 5, 6, 7)] == [2, 1, 0, 3]
    assert not torch.equal(one, two)
    none = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(UserError, match=r"too few training images to choose a ridge with; give method\.lambda_"):
        choose_strength(torch.randn(3, 2), torch.tensor([0, 1, 2]), range(3), none)


def test_columns_of_zeros_and_a_singular_gram_matrix() -> None:
    x, y = torch.randn(20, 6).relu(), torch.arange(20) % 4
    x[:, 2] = 0
    ridge = made(6, 4, (x, y))
    assert not ridge.solve(1e-8).isnan().any()
    single = Ridge(3, 2, CPU)
    single.add(1e4 * torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 1]))
    with pytest.raises(UserError, match="cannot be solved with a ridge of 1e-08; raise it"):
        single.solve(1e-8)
    solved, strength = single.solve_from(1e-8)
    assert 1e-8 < strength < 1
    assert solved.isfinite().all()


def ended(domain: Any, method: Any, tasks: range) -> Any:
    for task in tasks:
        domain.begin_task(task)
        method.begin_task(task)
        method.end_task(task)
    return domain.predict(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


SETS = ("method.width=500", "method.lambda_=10")


def test_tasks_give_what_all_classes_at_once_give(build: Callable[..., Any]) -> None:
    domain, method = build("ranpac", *SETS)
    one_by_one = ended(domain, method, range(3))
    other, whole = build("ranpac", *SETS, "stream.tasks=1", "stream.class_order=" + str([*domain.stream.class_order]))
    torch.testing.assert_close(ended(other, whole, range(1)), one_by_one, rtol=1e-3, atol=1e-4)
    assert domain.evaluate(range(3))["correct"] != [0, 0, 0]
    assert method.stored_parameters() == 500 * 501 // 2 + 500 * 7
    assert domain.stored_parameters() == 0
    assert method.diagnostics()["lambda"] == 10
    assert method.caveats() == ["nothing is adapted in the first task (the paper's phase 1)"]


def test_without_a_random_layer_the_features_are_the_networks(build: Callable[..., Any]) -> None:
    domain, method = build("ranpac", "method.width=0", "method.lambda_=2")
    said = ended(domain, method, range(1))
    ((x, y),) = [tuple(torch.cat(p) for p in zip(*domain.training_features(0), strict=True))]
    wanted = Sklearn(alpha=2.0, fit_intercept=False).fit(x.double().numpy(), np.eye(3)[y.numpy()])
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = domain.network.run(pixels).detach().double().numpy()
    torch.testing.assert_close(said, torch.from_numpy(wanted.predict(found)).float(), rtol=1e-3, atol=1e-4)


def test_the_cosine_of_another_code_is_an_option(build: Callable[..., Any]) -> None:
    domain, method = build("ranpac", *SETS, "method.reference_quirks=cosine_scores")
    said = ended(domain, method, range(3))
    assert said.abs().max() <= 1
    plain = ended(*build("ranpac", *SETS), range(3))
    features = domain.network.run(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    lengths = method.random(features).norm(dim=1, keepdim=True) * method.solved.norm(dim=0)
    torch.testing.assert_close(said * lengths, plain, rtol=1e-4, atol=1e-5)
    assert any("another classifier" in line for line in method.caveats())


def test_settings_are_checked() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"width": -1}, "width must not"),
        ({"lambda_": 0.0}, "lambda_ must be positive"),
        ({"adapt": "ssf"}, "adapt must be none or adapter, got 'ssf'"),
        ({"bottleneck": 0}, "bottleneck must be at least 1"),
    ]
    for given, words in bad:
        with pytest.raises(UserError, match=words):
            RanPACConfig(**given)


# --- first-task adaptation --------------------------------------------------------------------------------------------


def test_a_bottleneck_and_rows_by_cosine_by_hand() -> None:
    side = Bottleneck(2, 1, torch.Generator().manual_seed(0), CPU)
    x = torch.tensor([[[1.0, 1.0]], [[-1.0, -1.0]]])
    assert side(x).abs().max() == 0  # a fresh one adds nothing
    with torch.no_grad():
        side.down.copy_(torch.tensor([[1.0, 2.0]]))
        side.down_bias.fill_(0.5)
        side.up.copy_(torch.tensor([[3.0], [-1.0]]))
        side.up_bias.copy_(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(side(x), torch.tensor([[[1.05, -0.25]], [[0.0, 0.1]]]))
    rows = CosineRows(2, 2, torch.Generator().manual_seed(0), CPU)
    with torch.no_grad():
        rows.rows.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    features, label = torch.tensor([[3.0, 4.0]]), torch.tensor([1])
    torch.testing.assert_close(rows(features), torch.tensor([[0.6, 0.8]]))
    assert float(rows.loss(features, label).detach()) == pytest.approx(np.log(1 + np.exp(-0.2)))
    with torch.no_grad():
        rows.scale.fill_(5)
    assert float(rows.loss(features, label).detach()) == pytest.approx(np.log(1 + np.exp(-1)))


ADAPTED = ("method.adapt=adapter", "method.bottleneck=4", "method.width=100", "method.lambda_=10")


def test_without_a_step_adaptation_changes_nothing(build: Callable[..., Any]) -> None:
    adapted, plain = build("ranpac", *ADAPTED), build("ranpac", "method.width=100", "method.lambda_=10")
    torch.testing.assert_close(ended(*adapted, range(3)), ended(*plain, range(3)), rtol=1e-4, atol=1e-5)


def test_the_first_task_alone_adapts(tiny: Callable[..., Any], executed: Callable[..., Any], tmp_path: Path) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Watched(Run):
        def _stage(self, record: dict[str, Any], task: int, *given: Any) -> None:
            super()._stage(record, task, *given)
            kept[task] = {n: p.detach().clone() for n, p in self.method.named_parameters()}
            steps.append(record["tasks"][-1]["steps"])
            trained.append(record["tasks"][-1]["parameters_trained"])
            stored.append(record["tasks"][-1]["parameters_stored"])

    steps: list[int] = []
    trained: list[int] = []
    stored: list[int] = []
    work = executed(tiny("ranpac", *ADAPTED, "train.epochs=2"), tmp_path, Watched)
    sides = 5 * (2 * 32 * 4 + 4 + 32)
    assert steps == [6, 0, 0]
    assert trained == [sides + 3 * 32 + 1, 0, 0]  # with rows by cosine; the domain's stay 0 and do not count
    assert stored == [sides + 100 * 101 // 2 + 100 * seen for seen in (3, 5, 7)]
    moved = [n for n, p in kept[0].items() if n.startswith("adapters.") and n.endswith(".up") and p.abs().max() > 0]
    assert len(moved) == 5
    assert all(torch.equal(p, kept[2][n]) for n, p in kept[0].items())
    domain: Any = work.domain
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method: Any = work.method
    adapted = domain.network.run(pixels, sides=dict(enumerate(method.adapters)))
    assert (adapted - domain.network.run(pixels)).abs().max() > 1e-4
    torch.testing.assert_close(domain.predict(pixels), method.scores(adapted))
    assert method.caveats()[0].startswith("takes steps in the first task alone")


def test_a_method_that_adapts_keeps_every_promise() -> None:
    found = list(check_method("ranpac", ["method.adapt=adapter", "method.bottleneck=4"]))
    assert len(found) == 1 + len(PROPERTIES)
    assert [(what, problem) for _, what, problem, _ in found if problem] == []


def test_an_interrupted_adaptation_ends_the_same(tiny: Callable[..., Any], resumed: Callable[..., Any]) -> None:
    resumed(tiny("ranpac", *ADAPTED, "train.checkpoint_seconds=0"), "task 1, step 1")


def test_a_first_task_of_one_class_has_nothing_to_adapt_to(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task 1 has one class \(shade\d\)[^\n]*$"):
        run(tiny("ranpac", *ADAPTED, "stream.sizes=[1,3,3]"), tmp_path / "run")


def test_adaptation_is_float32_around_passes_in_bfloat16(build: Callable[..., Any]) -> None:
    domain, method = build("ranpac", *ADAPTED, "precision=bf16")
    domain.begin_task(0)
    method.begin_task(0)
    seen: set[torch.dtype] = set()
    domain.model.blocks[2].mlp.fc1.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    batch = next(iter(domain.batches(0, 0)))
    loss = method.loss(batch)
    loss.backward()
    assert (loss.dtype, seen) == (torch.float32, {torch.bfloat16})
    grads = [p.grad for g in method.trained() for p in g.params]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    assert all(side.up.grad.abs().max() > 0 for side in method.adapters)
    method.end_task(0)
    assert {t.dtype for t in method.state_dict().values()} == {torch.float32}
    assert method.scores(method.features(domain.images(batch), domain.network)).dtype == torch.float32


# --- precision --------------------------------------------------------------------------------------------------------

NARROW = "method.width=1000"


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("ranpac", (NARROW,)),
        ("ranpac", (NARROW, "method.lambda_=100")),
        ("fecam", ()),
        ("fecam", ("method.covariance=common",)),
    ],
)
def test_bfloat16_gives_the_same_accuracy(
    name: str, sets: tuple[str, ...], empty_record: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    """Means of three seeds within 0.5 points; what is kept is float32, solved in float64."""
    found: dict[str, list[float]] = {"fp32": [], "bf16": []}
    tiny = ("input.workers=0", "device=cpu", "data.classes=10", "stream.tasks=2", "data.train_per_class=20")
    for precision, accuracies in found.items():
        for seed in range(3):
            resolved = resolve("glyphs", name, [f"precision={precision}", f"seed={seed}", *tiny, *sets])
            work = Run(resolved, RunFolder(tmp_path / f"{precision}{seed}"), Reporter(quiet=True))
            row = work.execute(empty_record())["matrix"]["rows"][-1]
            accuracies.append(100 * sum(row["correct"]) / sum(row["total"]))
            assert {t.dtype for t in work.method.state_dict().values()} == {torch.float32}
    fp32, bf16 = (sum(accuracies) / 3 for accuracies in found.values())
    print(f"{name}, A_last of seeds 0, 1, 2: {found}")
    assert fp32 > 40
    assert abs(fp32 - bf16) <= 0.5
