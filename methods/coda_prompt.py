"""CODA-Prompt: prompts assembled from components, weighted by how well the attended query matches their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import MethodConfig, ParamGroup, check, check_quirks, register_method
from dualcl.methods.shared.prompting import PromptMethod, check_blocks, check_depth, check_length, halves


def component_weights(query: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """Weights cos(q * a_m, k_m) of the components, shape (n_blocks, B, M).

    `query` (B, D), `attention` and `keys` (n_blocks, M, D). Equal to (q . (a_m * k_m)) / (sqrt(q^2 . a_m^2) |k_m|): two
    matrix products instead of a tensor of B x M x D. Source: arXiv 2211.13218.
    """
    query = query.to(keys.dtype)
    dots = query @ (attention * F.normalize(keys, dim=-1)).mT
    squares = query.square() @ attention.square().mT
    return dots / squares.clamp_min(1e-24).sqrt()


def orthogonality(rows: Tensor) -> Tensor:
    """Mean squared entry of T T' - 1 for each block of `rows` T (n_blocks, M, d), summed over the blocks, a scalar."""
    gram = rows @ rows.mT
    return (gram - torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)).square().mean(dim=(1, 2)).sum()


def orthonormal_rows(count: int, old: Tensor, generator: torch.Generator) -> Tensor:
    """`count` random rows, orthonormal and orthogonal to the rows of `old` (M, d), float64 on the CPU.

    Removes the whole span of the old rows. Needs M + count <= d.
    """
    basis = torch.linalg.qr(old.detach().to("cpu", torch.float64).T).Q
    rows = torch.randn(count, old.shape[1], generator=generator, dtype=torch.float64)
    for _ in range(2):  # the second pass removes the rounding error of the first
        rows = rows - (rows @ basis) @ basis.T
        rows = torch.linalg.qr(rows.T).Q.T
    return rows


def projected_rows(rows: Tensor, old: Tensor) -> Tensor:
    """`rows` (n, d) less their projection on each earlier row, of `old` (M, d) and of the result, then normalised.

    Orthogonal to the old rows only while these are orthogonal to each other, which they are not after training.
    Source: `gram_schmidt` of the public CODA-Prompt code.
    """
    earlier = list(old.to(rows))
    for row in rows:
        # an earlier row of length 0 takes nothing away; the public code would never end
        shares = [(row @ u) / (u @ u).clamp_min(1e-8) * u for u in earlier]
        earlier.append(row - torch.stack(shares).sum(dim=0) if shares else row)
    return F.normalize(torch.stack(earlier[len(old) :]), dim=-1)


@dataclass(frozen=True)
class CodaPromptConfig(MethodConfig):
    """Options of CODA-P; the defaults are those of the public code (`--prompt_param 100 8 0.0`)."""

    pool: int = field(
        default=100, metadata={"help": "components of all planned tasks together, per block (M in the paper)"}
    )
    length: int = field(
        default=8, metadata={"help": "length of a prompt, half keys and half values (L_p in the paper)"}
    )
    mu: float = field(
        default=0.0,
        metadata={"help": "weight of the orthogonality penalty (lambda in the paper: 0.1; 0 in the updated code)"},
    )
    blocks: tuple[int, ...] = field(default=(0, 1, 2, 3, 4), metadata={"help": "prompted blocks"})
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of the public code, for parity only: drop_remainder, project_in_turn"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "drop_remainder": "components that the number of tasks does not divide are left unused "
        "(public CODA-Prompt code)",
        "project_in_turn": "a task's components start orthogonal to earlier ones only as far as those are to each "
        "other (public CODA-Prompt code)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.pool >= 1, f"method.pool must be at least 1, got {self.pool}")
        check(self.mu >= 0, f"method.mu must not be negative, got {self.mu}")
        check_length("method.length", self.length)
        check_blocks("method.blocks", self.blocks)
        check_quirks(self.reference_quirks, self.QUIRKS)

    def share(self, task: int, n_tasks: int) -> int:
        """Components of task `task`: pool / n_tasks, the first tasks one more each where that leaves a remainder.

        A task beyond the planned `n_tasks` gets pool // n_tasks components on top of the pool.
        """
        left = 0 if "drop_remainder" in self.reference_quirks else self.pool % n_tasks
        return self.pool // n_tasks + (task < left)


@register_method(
    "coda_prompt",
    domains=("classification",),
    summary="CODA-P: prompts are sums of components, weighted by attended keys; each task adds components",
    source="arXiv 2211.13218",
)
class CodaPrompt(PromptMethod):
    """A sample's prompt is the sum over all components so far of cos(q * a_m, k_m) p_m, in each prompted block.

    Each task adds its share of the pool, started orthonormal and orthogonal to the earlier components (Gram-Schmidt in
    `begin_task`, as in the updated public code); that share is a parameter, earlier components are buffers.
    Penalty: mu times `orthogonality` of the keys, attentions and (flattened) prompts of all components so far.
    Unlike the public code, a pool that the number of tasks does not divide is used in full, see
    `CodaPromptConfig.share` (quirk `drop_remainder`), and new components are orthogonal to the whole span of the
    trained ones, see `orthonormal_rows` (quirk `project_in_turn`: `projected_rows`).
    """

    Config = CodaPromptConfig
    past_keys: Tensor
    past_attention: Tensor
    past_prompts: Tensor
    keys: nn.Parameter | None
    attention: nn.Parameter | None
    prompts: nn.Parameter | None

    def __init__(self, config: CodaPromptConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        check_depth("method.blocks", "method.blocks", config.blocks, self.n_blocks)
        check(
            config.pool >= n_tasks,
            f"method.pool={config.pool} leaves some of the {n_tasks} tasks without a component; "
            f"set method.pool to at least {n_tasks}",
        )
        check(
            config.pool <= self.feature_dim,
            f"method.pool={config.pool} components cannot start orthogonal in the backbone's {self.feature_dim} "
            f"dimensions; set method.pool to at most {self.feature_dim}",
        )
        self.components: list[int] = []
        n, dim, device = len(config.blocks), self.feature_dim, domain.device
        self.register_buffer("past_keys", torch.empty(n, 0, dim, device=device))
        self.register_buffer("past_attention", torch.empty(n, 0, dim, device=device))
        self.register_buffer("past_prompts", torch.empty(n, 0, config.length, dim, device=device))
        for name in ("keys", "attention", "prompts"):
            self.register_parameter(name, None)

    def begin_task(self, task: int) -> None:
        """Freezes the components of the task before and adds this task's, orthogonal to them.

        Raises UserError when a task beyond the plan finds no orthogonal directions left.
        """
        if self.keys is not None:
            keys, attention, prompts = self._current()
            self.past_keys = torch.cat([self.past_keys, keys.detach()], dim=1)
            self.past_attention = torch.cat([self.past_attention, attention.detach()], dim=1)
            self.past_prompts = torch.cat([self.past_prompts, prompts.detach()], dim=1)
        count, generator = self.config.share(task, self.n_tasks), self.generator("init", task)
        total = sum(self.components) + count
        check(
            total <= self.feature_dim,
            f"method.pool={self.config.pool} planned for {self.n_tasks} tasks means {total} components at task {task}, "
            f"but the backbone has {self.feature_dim} dimensions; lower method.pool",
        )
        self.components.append(count)
        self.keys = self._started(count, self.past_keys, generator)
        self.attention = self._started(count, self.past_attention, generator)
        self.prompts = self._started(count, self.past_prompts, generator)

    def trained(self) -> list[ParamGroup]:
        """The current task's components."""
        return self.group(*self._current())

    def provide(self, query: Tensor, training: bool) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Prefixes {block: (keys (B, length / 2, D), values (B, length / 2, D))} for queries (B, D)."""
        query = query.detach()
        keys, attention, prompts = self._current()
        # Components add up, so the frozen ones need no place in the graph.
        with torch.no_grad():
            frozen = component_weights(query, self.past_attention, self.past_keys) @ self.past_prompts.flatten(2)
        learning = component_weights(query, attention, keys) @ prompts.flatten(2)
        prefix_keys, prefix_values = halves((frozen + learning).unflatten(-1, prompts.shape[2:]))
        return {block: (prefix_keys[i], prefix_values[i]) for i, block in enumerate(self.config.blocks)}

    def penalty(self) -> Tensor | None:
        """The orthogonality penalty times mu, a scalar; None when mu is 0."""
        if self.config.mu == 0:
            return None
        past = (self.past_keys, self.past_attention, self.past_prompts)
        pairs = zip(past, self._current(), strict=True)
        terms = [orthogonality(torch.cat([old, new], dim=1).flatten(2)) for old, new in pairs]
        return self.config.mu * torch.stack(terms).sum()

    def diagnostics(self) -> dict[str, Any]:
        """Components per task so far; the sum exceeds the pool when there were more tasks than planned."""
        return {"components": list(self.components)}

    def _current(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        if self.keys is None or self.attention is None or self.prompts is None:
            raise RuntimeError(f"{type(self).name} has no components yet: begin_task comes first")
        return self.keys, self.attention, self.prompts

    def _started(self, count: int, old: Tensor, generator: torch.Generator) -> nn.Parameter:
        """`count` new rows per block, orthonormal and orthogonal to `old` (n_blocks, M, ...), like it in shape."""
        rows = torch.stack([self._started_block(count, block, generator) for block in old.flatten(2)])
        return nn.Parameter(rows.to(old).unflatten(-1, old.shape[2:]))

    def _started_block(self, count: int, old: Tensor, generator: torch.Generator) -> Tensor:
        """`count` new rows beside `old` (M, d), float64 on the CPU."""
        if "project_in_turn" not in self.config.reference_quirks:
            return orthonormal_rows(count, old, generator)
        rows = torch.randn(count, old.shape[1], generator=generator, dtype=torch.float64)
        return projected_rows(rows, old.detach().to("cpu"))

    def caveats(self) -> list[str]:
        """That each task's share of the pool is known from the start."""
        return ["knows the number of tasks in advance", *super().caveats()]


@dataclass(frozen=True)
class CodaPromptSmallConfig(CodaPromptConfig):
    """Options of CODA-P with as many parameters as L2P++ has.

    The public code holds no settings for the paper's CODA-P-S, so these are ours: 5 blocks x 20 x (4 + 2) = 600 vectors
    of the feature's size, beside 30 x (20 + 1) = 630 of L2P++ and 642 of DualPrompt with 10 tasks.
    """

    pool: int = field(
        default=20, metadata={"help": "components of all planned tasks together, per block (M in the paper)"}
    )
    length: int = field(
        default=4, metadata={"help": "length of a prompt, half keys and half values (L_p in the paper)"}
    )


@register_method(
    "coda_prompt_small",
    domains=("classification",),
    summary="CODA-P with fewer and shorter components, the size of L2P++",
    source="arXiv 2211.13218 (CODA-P-S; its settings are not in the public code)",
)
class CodaPromptSmall(CodaPrompt):
    """CODA-P with the smaller defaults of `CodaPromptSmallConfig`; nothing else differs."""

    Config = CodaPromptSmallConfig
