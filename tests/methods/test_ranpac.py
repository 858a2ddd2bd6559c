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
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.methods.ranpac import RanPACConfig
from dualcl.methods.shared import symmetric
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
    for given, words in (({"width": -1}, "width must not"), ({"lambda_": 0.0}, "lambda_ must be positive")):
        with pytest.raises(UserError, match=words):
            RanPACConfig(**given)


@pytest.mark.parametrize("name", ["ranpac"])
def test_bfloat16_gives_the_same_accuracy(
    name: str, empty_record: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    """Means of three seeds within 0.5 points."""
    found: dict[str, list[float]] = {"fp32": [], "bf16": []}
    sets = ("input.workers=0", "device=cpu", "data.classes=10", "stream.tasks=2", "data.train_per_class=20")
    for precision, accuracies in found.items():
        for seed in range(3):
            resolved = resolve("glyphs", name, [f"precision={precision}", f"seed={seed}", *sets])
            work = Run(resolved, RunFolder(tmp_path / f"{precision}{seed}"), Reporter(quiet=True))
            row = work.execute(empty_record())["matrix"]["rows"][-1]
            accuracies.append(100 * sum(row["correct"]) / sum(row["total"]))
    fp32, bf16 = (sum(accuracies) / 3 for accuracies in found.values())
    print(f"{name}, A_last of seeds 0, 1, 2: {found}")
    assert fp32 > 40
    assert abs(fp32 - bf16) <= 0.5
