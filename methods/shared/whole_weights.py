"""Full fine-tuning: all weights that the domain offers are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import Method, MethodConfig, ParamGroup


@dataclass(frozen=True)
class FinetuneConfig(MethodConfig):
    """Hyper-parameters of full fine-tuning; the reference code uses lr 5e-5 for it (protocols.md)."""

    lr: float = field(default=5e-5, metadata={"help": "learning rate of the weights"})


class WholeWeights(Method):
    """Trains the domain's full parameters, one task after another.

    In classification these are all weights of the backbone; in customization K and V of the cross-attention, which is
    Custom Diffusion (arXiv 2212.04488) in sequence without prior images.
    """

    Config: ClassVar[type[MethodConfig]] = FinetuneConfig

    def __init__(self, config: MethodConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        # the same Parameter objects as the model's: saving and restoring the method restores the model
        self.weights = nn.ParameterList(domain.full_parameters().values())
        self.weights.requires_grad_(True)

    def trained(self) -> list[ParamGroup]:
        """All weights."""
        return [ParamGroup("weights", list(self.weights), self.config.lr, self.config.weight_decay)]
