"""Statistics that follow the features: the map and the classifier by hand, and in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dualcl.benchmark.core.errors import UserError
from dualcl.methods.clora_carry import CLoRACarryConfig, carrying_map, lda
from dualcl.methods.shared.class_statistics import Moments
from dualcl.methods.shared.symmetric import unpack


def test_the_map_finds_a_linear_drift_and_leaves_alone_what_it_does_not_see() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64)
    x[:, 3] = 0
    x -= x.mean(0)
    moved = torch.tensor([[2.0, 0, 0, 0], [0, 1, 3, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    found = carrying_map(Moments(x), x.T @ (x @ moved), 1e-9)
    torch.testing.assert_close(found, moved, rtol=1e-6, atol=1e-6)
    # much ridge: nothing moves; features that did not move: the identity at any ridge
    far = carrying_map(Moments(x), x.T @ (x @ moved), 1e9)
    torch.testing.assert_close(far, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
    still = carrying_map(Moments(x), x.T @ x, 0.3)
    torch.testing.assert_close(still, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_classifier_is_fishers() -> None:
    means = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)
    covariance = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    weight, bias = lda(means, covariance, 1e-12)
    inverse = np.linalg.inv(covariance.numpy() / 1.5)  # in units of the mean variance
    np.testing.assert_allclose(weight.numpy(), means.numpy() @ inverse, rtol=1e-9)
    np.testing.assert_allclose(bias.numpy(), [-0.5 * m @ inverse @ m for m in means.numpy()], rtol=1e-9)


@pytest.mark.parametrize(
    "given", [{"carry": "ridge"}, {"ridge": 0.0}, {"shrinkage": 0.0}, {"align": True}, {"one_adapter": True}]
)
def test_settings_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(given))} "):
        CLoRACarryConfig(**given)


# --- in a run ---------------------------------------------------------------------------------------------------------


def learnt(domain: Any, method: Any, tasks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All tasks, each with an update that is not small; features and labels of each as its end left them."""
    kept = []
    for task in range(tasks):
        domain.begin_task(task)
        method.begin_task(task)
        with torch.no_grad():
            for i, update in enumerate(method.updates.values()):
                generator = torch.Generator().manual_seed(100 * task + i)
                update.A.copy_(torch.randn(update.A.shape, generator=generator) * 0.3)
        method.end_task(task)
        kept.append(tuple(torch.cat(part).double() for part in zip(*domain.training_features(task), strict=True)))
    return kept


def test_without_carrying_it_is_the_statistics_at_each_task_s_end(build: Callable[..., Any]) -> None:
    domain, method = build("clora_carry", "method.rank=2", "method.carry=none")
    kept = learnt(domain, method, 3)
    means = torch.stack([x[y == c].mean(0) for x, y in kept for c in y.unique()])
    away = [x[y == c] - x[y == c].mean(0) for x, y in kept for c in y.unique()]
    torch.testing.assert_close(method.means[: len(means)].double(), means, rtol=1e-5, atol=1e-6)
    covariance = torch.stack([a.T @ a for a in away]).sum(0) / sum(len(y) for _, y in kept)
    torch.testing.assert_close(unpack(method.covariance.double(), means.shape[1]), covariance, rtol=1e-4, atol=1e-6)


def test_carried_means_are_nearer_to_where_old_images_lie_now(build: Callable[..., Any]) -> None:
    away = {}
    for carry, ridge in (("none", []), ("map", ["method.ridge=1e-2"])):
        domain, method = build("clora_carry", "method.rank=2", f"method.carry={carry}", *ridge)
        learnt(domain, method, 3)
        x, y = (torch.cat(part) for part in zip(*domain.training_features(0), strict=True))
        true = torch.stack([x[y == c].mean(0) for c in y.unique()])
        away[carry] = float((method.means[: len(true)] - true).norm())
    assert away["map"] < 0.9 * away["none"]
