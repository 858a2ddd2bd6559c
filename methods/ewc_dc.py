"""EWC-DC: one adapter is trained on, held where it matters for which concept it says a picture shows.

Source: Jha et al., "Mining Your Own Secrets: Diffusion Classifier Scores for Continual Personalization of
Text-to-Image Diffusion Models", arXiv 2410.00700 (ICLR 2025). Its equations were not readable and no code is public:
reconstructed from the authors' figures and public reviews. Of a picture x noised to x_t, for candidate prompts c

    p(c | x) = softmax over c of  -||eps - eps(x_t, c)||^2 / T,    one time and noise for all candidates

The candidates are the task's own concept, one of the pretrained model, and earlier ones. After each task

    F <- gamma F + mean over its pictures of the squared gradient of  -ln p_own + mean ln p_other

(`fisher: likelihood`: of -ln p_own). Later tasks pay lambda / 2 sum F (theta - theta*)^2.

A concept stands under the first of its training prompts. Differs from the paper: lambda, gamma, T and sizes were not
found; K and V alone are adapted, with the domain's token rows, which the penalty does not hold.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain, ErrorsDomain
from dualcl.methods.base import check, register_method, unless
from dualcl.methods.lora import LoRA, LoRAConfig


@dataclass(frozen=True)
class EWCDCConfig(LoRAConfig):
    """Hyper-parameters of diffusion classifier scores in parameter space; none of them was found in the source."""

    one_adapter: bool = field(default=True, metadata={"help": "one pair of factors for all tasks: there is no other"})
    temperature: float = field(default=1.0, metadata={"help": "T, on errors that are summed over the latent"})
    pretrained_prompt: str = field(
        default="a photo", metadata={"help": "the candidate that stands for what the pretrained model knows"}
    )
    lambda_: float = field(default=1.0, metadata={"help": "lambda, weight of the penalty; 0: no Fisher information"})
    decay: float = field(default=1.0, metadata={"help": "gamma, factor on the Fisher of earlier tasks"})
    fisher: Literal["contrast", "likelihood"] = field(
        default="contrast", metadata={"help": "whose gradients are squared: own against other concepts, or own alone"}
    )
    fisher_batches: int = field(default=16, metadata={"help": "training batches behind it, at most all of them"})
    candidates: int = field(default=5, metadata={"help": "earlier concepts among its candidates, drawn for each batch"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.one_adapter, "ewc_dc and dsc train one pair of factors on; leave method.one_adapter true")
        check(not self.align, "method.align is an option of lora, clora and inflora; ewc_dc and dsc have none")
        check(self.temperature > 0, f"method.temperature must be positive, got {self.temperature}")
        check(self.lambda_ >= 0, f"method.lambda_ must not be negative, got {self.lambda_}")
        check(0 <= self.decay <= 1, f"method.decay must be between 0 and 1, got {self.decay}")
        known = self.fisher in ("contrast", "likelihood")
        check(known, f"method.fisher must be contrast or likelihood, got {self.fisher!r}")
        check(self.fisher_batches >= 1, f"method.fisher_batches must be at least 1, got {self.fisher_batches}")
        check(self.candidates >= 0, f"method.candidates must not be negative, got {self.candidates}")

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        of_fisher = ("decay", "fisher", "fisher_batches", "candidates", "temperature", "pretrained_prompt")
        return super().idle() | unless(self.lambda_, "method.lambda_ above 0", *of_fisher)


def summed_errors(predictions: Tensor, batch: Any, weights: Tensor) -> Tensor:
    """(B, P): ||eps - eps(x_t, c)||^2, summed over the latent, of predictions (B, P, C, h, w).

    `weights` (B,) make errors of the noise of what the model predicts (`noise_weights`).
    """
    return (predictions - batch.target.float()[:, None]).square().sum((2, 3, 4)) * weights[:, None]


def evidence(scores: Tensor, kind: str) -> Tensor:
    """Of scores (B, P), own concept first: -ln p_own + mean ln p_other, or -ln p_own alone; the mean over B."""
    logs = scores.log_softmax(1)
    own = -logs[:, 0]
    return (own + logs[:, 1:].mean(1) if kind == "contrast" else own).mean()


def entropy(scores: Tensor) -> Tensor:
    """Entropies (B,) of the candidates' distributions, of scores (B, P)."""
    logs = scores.log_softmax(1)
    return -(logs.exp() * logs).sum(1)


@register_method(
    "ewc_dc",
    domains=("customization",),
    summary="EWC-DC: one LoRA, held by the Fisher information of diffusion classifier scores (reconstructed)",
    source="arXiv 2410.00700 (its figures)",
)
class EWCDC(LoRA):
    """LoRA trained on, with a quadratic penalty that diffusion classifier scores weigh."""

    Config = EWCDCConfig
    requires = ("errors",)
    fisher: Tensor
    anchor: Tensor

    def __init__(self, config: EWCDCConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.scored.check_prompt(config.pretrained_prompt)
        self.factors: list[nn.Parameter] = [p for u in self.updates.values() for p in (u.A, u.B)]
        flat = self.flat().detach()
        for name in ("fisher", "anchor"):
            self.register_buffer(name, torch.zeros_like(flat) if config.lambda_ else None)
        self.facts: dict[str, Any] = {}

    @property
    def scored(self) -> ErrorsDomain:
        """The domain, which predicts under any prompt."""
        return cast(ErrorsDomain, self.domain)

    def logits(self, predictions: Tensor, batch: Any) -> Tensor:
        """Logits (B, P) of the candidates."""
        return -summed_errors(predictions, batch, self.scored.noise_weights(batch)) / float(self.config.temperature)

    def flat(self) -> Tensor:
        """All factors as one vector."""
        return torch.cat([p.reshape(-1) for p in self.factors])

    def penalty(self) -> Tensor | None:
        """lambda / 2 * sum of F (theta - theta*)^2; None in the first task."""
        if self.finished == 0 or self.config.lambda_ == 0:
            return None
        return float(self.config.lambda_) / 2 * (self.fisher * (self.flat() - self.anchor).square()).sum()

    def end_task(self, task: int) -> None:
        """Adds the task's Fisher information and moves the anchor."""
        if self.config.lambda_:
            self.facts = {**self.facts, **self.add_fisher(task)}
            self.anchor.copy_(self.flat().detach())
        super().end_task(task)

    def add_fisher(self, task: int) -> dict[str, Any]:
        """F <- gamma F + the mean over the task's pictures of squared gradients; facts of it."""
        config, share = self.config, self.domain.processes
        total, count, unsure = torch.zeros_like(self.fisher), 0, 0.0
        for step, batch in enumerate(itertools.islice(self.domain.batches(task, 0), config.fisher_batches)):
            drawn = torch.randperm(task, generator=self.generator("candidates", task, step))[: config.candidates]
            prompts = [self.scored.prompts(task)[0], config.pretrained_prompt]
            prompts += [self.scored.prompts(k)[0] for k in sorted(drawn.tolist())]
            for sample in self.domain.own_samples(batch):
                with torch.enable_grad():
                    logits = self.logits(self.scored.predictions(sample, prompts), sample)
                    grads = torch.autograd.grad(evidence(logits, config.fisher), self.factors)
                total += torch.cat([g.reshape(-1) for g in grads]).square()
                count, unsure = count + 1, unsure + float(entropy(logits.detach()).sum())
        sums = share.total(torch.tensor([count, unsure], dtype=torch.float64, device=total.device)).tolist()
        fisher = share.total(total) / sums[0]
        self.fisher.mul_(config.decay).add_(fisher)
        trace = float(fisher.double().sum())
        return {"fisher_trace": trace, "fisher_samples": int(sums[0]), "score_entropy": sums[1] / sums[0]}

    def stored_parameters(self) -> int:
        """The factors and their Fisher information."""
        return sum(p.numel() for p in self.factors) * (1 + bool(self.config.lambda_))

    def diagnostics(self) -> dict[str, Any]:
        """LoRA's; trace and pictures of the last task's Fisher information, and the mean entropy of p on these."""
        return {**super().diagnostics(), **self.facts}

    def caveats(self) -> list[str]:
        """That it is a reconstruction."""
        own = "reconstructed from figures and reviews of arXiv 2410.00700: not a reproduction of its numbers"
        return [own, *super().caveats()]
