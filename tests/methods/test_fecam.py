"""FeCAM's correlations and distances by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dualcl.benchmark.core.errors import UserError
from dualcl.methods.fecam import FeCAMConfig, correlations, distances
from dualcl.methods.shared.symmetric import cholesky

SIGMA = torch.tensor([[4.0, 2.0], [2.0, 9.0]], dtype=torch.float64)


def distance(x: torch.Tensor, covariance: torch.Tensor, gamma1: float, gamma2: float) -> torch.Tensor:
    factor = cholesky(correlations(covariance, gamma1, gamma2), "not definite")
    return distances(x, torch.zeros(1, x.shape[1], dtype=x.dtype), factor[None])[:, 0]


@pytest.mark.parametrize(("gamma2", "rho", "wanted"), [(0.0, 0.156772, 1.728949), (1.0, 0.313545, 1.522598)])
def test_correlations_and_distances_by_hand(gamma2: float, rho: float, wanted: float) -> None:
    assert float(correlations(SIGMA, 1.0, gamma2)[0, 1]) == pytest.approx(rho, abs=1e-6)
    assert float(distance(torch.ones(1, 2, dtype=torch.float64), SIGMA, 1.0, gamma2)) == pytest.approx(wanted, abs=1e-6)


def test_much_shrinkage_gives_euclidean_distances() -> None:
    x = torch.randn(9, 2, dtype=torch.float64)
    torch.testing.assert_close(distance(x, SIGMA, 1e9, 0.0), x.square().sum(1), rtol=1e-6, atol=1e-6)


def test_variances_are_removed_and_correlations_are_not() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    one, two = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([9.0, 1.0], [1.0, 9.0]))
    torch.testing.assert_close(distance(x, one, 1.0, 0.0), distance(x, two, 1.0, 0.0))
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / 2**0.5
    near = torch.stack([distance(x, turn @ s @ turn.T, 1.0, 0.0) for s in (one, two)], 1).argmin(1)
    assert near.tolist() == [0, 1]


@pytest.mark.parametrize("given", [{"gamma1": -1.0}, {"gamma2": -1.0}, {"covariance": "pooled"}])
def test_settings_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(given))} must"):
        FeCAMConfig(**given)


# --- in a run ---------------------------------------------------------------------------------------------------------


def ended(domain: Any, method: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """All tasks; features of length 1 and labels of each, float64."""
    kept = []
    for task in range(3):
        domain.begin_task(task)
        method.begin_task(task)
        method.end_task(task)
        x, y = (torch.cat(part) for part in zip(*domain.training_features(task), strict=True))
        kept.append((x.double().numpy(), y.numpy()))
    return kept


PIXELS = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def wanted_scores(x: np.ndarray, mean: np.ndarray, sigma: np.ndarray, gamma1: float) -> np.ndarray:
    """As the formulas say, by an inverse."""
    shrunk = sigma + gamma1 * np.trace(sigma) / len(sigma) * np.eye(len(sigma))
    deviation = np.sqrt(np.diag(shrunk))
    away = x - mean
    inverse = np.linalg.inv(shrunk / np.outer(deviation, deviation))
    return np.asarray(-np.einsum("bi,ij,bj->b", away, inverse, away))


@pytest.mark.parametrize("covariance", ["class", "common"])
def test_scores_are_those_of_the_formulas(covariance: str, build: Callable[..., Any]) -> None:
    domain, method = build("fecam", f"method.covariance={covariance}", "method.gamma1=2")
    tasks = ended(domain, method)
    said = domain.predict(PIXELS).double().numpy()
    x = torch.nn.functional.normalize(domain.network.run(PIXELS).detach().double(), dim=1).numpy()
    common, known = np.zeros((32, 32)), 0
    for features, labels in tasks:
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
        new = len(np.unique(labels))
        common = (known * common + new * np.cov(features.T)) / (known + new)
        known += new
    for features, labels in tasks:
        for c in np.unique(labels):
            own = features[labels == c]
            sigma = np.cov(own.T) if covariance == "class" else common
            np.testing.assert_allclose(said[:, c], wanted_scores(x, own.mean(0), sigma, 2.0), rtol=1e-3, atol=1e-4)
    triangle = 32 * 33 // 2
    assert method.stored_parameters() == 7 * 32 + (7 if covariance == "class" else 1) * triangle
    assert domain.stored_parameters() == 0


def test_what_has_no_factor_is_named_with_the_mend(build: Callable[..., Any]) -> None:
    # five images of a class in 32 dimensions, and nothing added
    with pytest.raises(UserError, match=r"^the covariance of output 0 is not positive definite; raise method\.gamma1"):
        ended(*build("fecam", "method.gamma1=0"))
    domain, method = build("fecam")
    domain.begin_task(0)
    method.begin_task(0)
    one = torch.ones(2, 32) / 32**0.5
    domain.training_features = lambda task: iter([(one.repeat(3, 1), torch.tensor([0, 1, 2, 0, 1, 2]))])
    with pytest.raises(UserError, match=r"^the covariance of output 0 is 0: it takes different images$"):
        method.end_task(0)
