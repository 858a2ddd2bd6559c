"""FeCAM's correlations and distances by hand."""

from __future__ import annotations

from typing import Any

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
