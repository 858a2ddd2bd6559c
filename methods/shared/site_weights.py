"""The core of the methods that train the sites' weights in full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain, Site
from dualcl.methods.base import Method, ParamGroup


def whole_weights(sites: dict[str, Site]) -> dict[str, nn.Parameter]:
    """The weights of the Linears that hold the sites, by module name, in the order of the sites.

    Raises RuntimeError when the sites leave out rows of a Linear: its weight would train them too.
    """
    rows: dict[str, int] = {}
    for site in sites.values():
        rows[site.module_name] = rows.get(site.module_name, 0) + site.d_out
    weights = {site.module_name: site.module.get_parameter("weight") for site in sites.values()}
    partial = [name for name, weight in weights.items() if rows[name] != len(weight)]
    if partial:
        raise RuntimeError(f"the sites cover some rows of {partial[0]} only")
    return weights


class SiteWeights(Method):
    """Trains the weights of all sites in full, without their biases, one task after another."""

    def __init__(self, config: Any, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        # the same Parameter objects as the model's: saving and restoring the method restores the model
        self.weights = nn.ParameterList(whole_weights(domain.sites()).values())
        self.weights.requires_grad_(True)

    def trained(self) -> list[ParamGroup]:
        """The weights of all sites."""
        return [ParamGroup("weights", list(self.weights), self.config.lr, self.config.weight_decay)]

    def flat(self) -> Tensor:
        """All weights one after another, shape (n,), with gradient."""
        return torch.cat([w.reshape(-1) for w in self.weights])

    @torch.no_grad()
    def set_flat(self, values: Tensor) -> None:
        """Sets all weights from `values`, as `flat` gives them."""
        for weight, part in zip(self.weights, values.split([w.numel() for w in self.weights]), strict=True):
            weight.copy_(part.view_as(weight))
