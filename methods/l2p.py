"""L2P++ and Deep L2P++: a shared pool of prompts, the best matching ones of which are prepended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import MethodConfig, ParamGroup, check, check_quirks, register_method
from dualcl.methods.shared.class_statistics import cosine
from dualcl.methods.shared.prompting import (
    PromptMethod,
    check_blocks,
    check_depth,
    check_length,
    count_choices,
    halves,
    majority,
)

SHALLOW = (0,)
DEEP = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class L2PConfig(MethodConfig):
    """Options of L2P; the defaults are those of L2P++ in the CODA-Prompt experiments."""

    pool: int = field(default=30, metadata={"help": "prompts in the pool of a block (M in the paper)"})
    length: int = field(
        default=20, metadata={"help": "length of a prompt, half keys and half values (L_p in the paper)"}
    )
    top_k: int = field(default=5, metadata={"help": "prompts chosen per sample (N in the paper)"})
    deep: bool = field(default=False, metadata={"help": "Deep L2P++: prompts in blocks 0-4 instead of block 0"})
    blocks: tuple[int, ...] = field(default=(), metadata={"help": "prompted blocks, if neither 0 nor (deep) 0-4"})
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of public codes, for parity only: batch_key_loss, batch_vote"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "batch_key_loss": "the key loss counts every sample with every sample's choice, summed over the batch "
        "(public CODA-Prompt code)",
        "batch_vote": "prompts chosen by a vote of the batch, also at test, where a batch holds one task: "
        "uses the task id in disguise (public L2P code)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.pool >= 1, f"method.pool must be at least 1, got {self.pool}")
        check(
            1 <= self.top_k <= self.pool,
            f"method.top_k must be between 1 and method.pool={self.pool}, got {self.top_k}",
        )
        check_length("method.length", self.length)
        check(
            not (self.deep and self.blocks),
            f"method.deep=true means blocks 0-4 but method.blocks={list(self.blocks)} is given too; set one of them",
        )
        check_blocks("method.blocks", self.prompted)
        check_quirks(self.reference_quirks, self.QUIRKS)

    @property
    def prompted(self) -> tuple[int, ...]:
        """The blocks that get prompts."""
        return self.blocks or (DEEP if self.deep else SHALLOW)


@register_method(
    "l2p",
    domains=("classification",),
    summary="L2P++: top-k prompts of a shared pool by cosine to a learnt key",
    source="arXiv 2112.08654; L2P++ of arXiv 2211.13218",
)
class L2P(PromptMethod):
    """Prepends to each prompted block the `top_k` prompts whose keys are nearest (cosine) to the sample's own query.

    The pool is shared: all its prompts and keys are trained in every task, by design; nothing is frozen between tasks.
    Key loss: sum over blocks and chosen keys of 1 - cos(q, key), averaged over the batch. The public CODA-Prompt code
    sums `cos_sim[:, idx]`, i.e. every sample with every sample's choice (a term that grows with the square of the
    batch): quirk `batch_key_loss`.
    Choice is per sample, also at evaluation; other public codes let the batch vote: quirk `batch_vote`.
    """

    Config = L2PConfig
    used: Tensor
    used_in_evaluation: Tensor

    def __init__(self, config: L2PConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.blocks = config.prompted
        field_to_set = "method.deep=false method.blocks" if config.deep else "method.blocks"
        check_depth("method.deep=true" if config.deep else "method.blocks", field_to_set, self.blocks, self.n_blocks)
        n, generator = len(self.blocks), self.generator("init")
        self.prompts = self.uniform(generator, n, config.pool, config.length, self.feature_dim)
        self.keys = self.uniform(generator, n, config.pool, self.feature_dim)
        counts = torch.zeros(n, config.pool, dtype=torch.int64, device=domain.device)
        self.register_buffer("used", counts)
        # Not in the state: an evaluation leaves the state as it is.
        self.register_buffer("used_in_evaluation", counts.clone(), persistent=False)

    def begin_task(self, task: int) -> None:
        """Starts the task's histogram of prompt use; the pool goes on as it is."""
        self.used.zero_()

    def trained(self) -> list[ParamGroup]:
        """The whole pool and its keys."""
        return self.group(self.prompts, self.keys)

    def provide(self, query: Tensor, training: bool) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Prefixes {block: (keys, values)}, each (B, top_k * length / 2, D), best match first, for queries (B, D)."""
        similarity = cosine(query.detach(), self.keys)
        best, chosen = similarity.topk(self.config.top_k, dim=-1)
        if "batch_vote" in self.config.reference_quirks:
            chosen = majority(chosen, self.config.pool)
            best = similarity.gather(-1, chosen)
        with torch.no_grad():
            counts = count_choices(chosen, self.config.pool)
            (self.used if training else self.used_in_evaluation).add_(counts)
        if training and "batch_key_loss" in self.config.reference_quirks:
            self._key_loss = ((1 - similarity) * counts.unsqueeze(1)).sum()
        elif training:
            self._key_loss = (1 - best).sum(dim=(0, 2)).mean()
        # A look-up has a deterministic backward on every device; advanced indexing has not.
        n, pool, length, dim = self.prompts.shape
        rows = chosen + pool * torch.arange(n, device=chosen.device).view(n, 1, 1)
        prompts = F.embedding(rows, self.prompts.flatten(0, 1).flatten(1)).unflatten(-1, (length, dim))
        keys, values = halves(prompts)
        return {b: (keys[i].flatten(1, 2), values[i].flatten(1, 2)) for i, b in enumerate(self.blocks)}

    def end_task(self, task: int) -> None:
        """Starts the histogram of the evaluation that follows."""
        self.used_in_evaluation.zero_()

    def diagnostics(self) -> dict[str, Any]:
        """How often each prompt was chosen per block: in the task's training, and at evaluation since its end."""
        return {
            "prompt_use": {str(b): self.used[i].tolist() for i, b in enumerate(self.blocks)},
            "prompt_use_in_evaluation": {
                str(b): self.used_in_evaluation[i].tolist() for i, b in enumerate(self.blocks)
            },
        }
