"""DualPrompt: general prompts shared by all tasks, and one expert prompt per task found by its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import MethodConfig, ParamGroup, check_quirks, register_method
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


@dataclass(frozen=True)
class DualPromptConfig(MethodConfig):
    """Options of DualPrompt; the defaults are those of the CODA-Prompt experiments."""

    general_blocks: tuple[int, ...] = field(default=(0, 1), metadata={"help": "blocks with a general prompt (g)"})
    general_length: int = field(default=6, metadata={"help": "length of a general prompt (L_g in the paper)"})
    expert_blocks: tuple[int, ...] = field(default=(2, 3, 4), metadata={"help": "blocks with expert prompts (e)"})
    expert_length: int = field(default=20, metadata={"help": "length of an expert prompt (L_e in the paper)"})
    reference_quirks: tuple[str, ...] = field(
        default=(),
        metadata={"help": "habits of public codes, for parity only: sum_key_loss, future_experts, batch_vote, reshape"},
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "sum_key_loss": "the key loss is summed over the batch, not averaged (public CODA-Prompt code)",
        "future_experts": "the untrained experts of tasks to come are candidates at test (public CODA-Prompt code)",
        "batch_vote": "experts chosen by a vote of the test batch, which holds one task: uses the task id in disguise "
        "(public L2P code)",
        "reshape": "expert prompts are reshaped without a permute: which half of whose prompt a sample gets, as keys "
        "and as values, depends on its place in the batch (public PyTorch copies of DualPrompt)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks("method.general_blocks", self.general_blocks)
        check_blocks("method.expert_blocks", self.expert_blocks)
        check_length("method.general_length", self.general_length)
        check_length("method.expert_length", self.expert_length)
        check_quirks(self.reference_quirks, self.QUIRKS)


@register_method(
    "dualprompt",
    domains=("classification",),
    summary="DualPrompt: general prompts for all tasks and one expert prompt per task",
    source="arXiv 2204.04799; settings of arXiv 2211.13218",
)
class DualPrompt(PromptMethod):
    """General prompts in the first blocks; in later blocks the expert of the task whose key is nearest to the query.

    In training the expert is the current task's; at evaluation each block of each sample takes the expert with the
    highest cosine, among the tasks seen so far. The public CODA-Prompt code also offers the untrained experts of tasks
    to come: quirk `future_experts`. Others let the test batch vote, or mix its samples: quirks `batch_vote`, `reshape`.
    Key loss: sum over the expert blocks of 1 - cos(q, key of the task), averaged over the batch; the public code sums
    over the batch (quirk `sum_key_loss`), which hardly matters under Adam, as keys get no other gradient.
    General prompts are trained in every task, by design. The current expert is a parameter, earlier ones are buffers.
    """

    Config = DualPromptConfig
    past_prompts: Tensor
    past_keys: Tensor
    prompt: nn.Parameter | None
    key: nn.Parameter | None
    future_prompts: Tensor
    future_keys: Tensor
    chosen: Tensor

    def __init__(self, config: DualPromptConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        check_depth("method.general_blocks", "method.general_blocks", config.general_blocks, self.n_blocks)
        check_depth("method.expert_blocks", "method.expert_blocks", config.expert_blocks, self.n_blocks)
        n, dim, device = len(config.expert_blocks), self.feature_dim, domain.device
        self.general = self.uniform(
            self.generator("init", "general"), len(config.general_blocks), config.general_length, dim
        )
        self.register_buffer("past_prompts", torch.empty(n, 0, config.expert_length, dim, device=device))
        self.register_buffer("past_keys", torch.empty(n, 0, dim, device=device))
        self.register_parameter("prompt", None)
        self.register_parameter("key", None)

    def begin_task(self, task: int) -> None:
        """Freezes the expert of the task before and draws one for this task."""
        if self.prompt is not None and self.key is not None:
            self.past_prompts = torch.cat([self.past_prompts, self.prompt.detach().unsqueeze(1)], dim=1)
            self.past_keys = torch.cat([self.past_keys, self.key.detach().unsqueeze(1)], dim=1)
        self.prompt, self.key = self._drawn(task)
        later = range(task + 1, self.n_tasks) if "future_experts" in self.config.reference_quirks else ()
        future = [self._drawn(t) for t in later]
        # Not in the state: they are drawn again, and an evaluation leaves the state as it is.
        for name, like, drawn in (
            ("future_prompts", self.past_prompts, [p.detach() for p, _ in future]),
            ("future_keys", self.past_keys, [k.detach() for _, k in future]),
        ):
            self.register_buffer(name, torch.stack(drawn, dim=1) if drawn else like[:, :0].clone(), persistent=False)
        counts = torch.zeros(
            len(self.config.expert_blocks), task + 1 + len(future), dtype=torch.int64, device=self.domain.device
        )
        self.register_buffer("chosen", counts, persistent=False)

    def trained(self) -> list[ParamGroup]:
        """The general prompts, and the current task's expert and key."""
        prompt, key = self._current()
        return self.group(self.general, prompt, key)

    def provide(self, query: Tensor, training: bool) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Prefixes {block: (keys, values)} for queries (B, D); each (B, general_length or expert_length / 2, D).

        A block that is both general and expert gets the expert's positions first.
        """
        query = query.detach()
        expert = self._own_expert(query) if training else self._nearest_expert(query)
        prefixes: dict[int, tuple[Tensor, Tensor]] = {}
        for i, block in enumerate(self.config.general_blocks):
            prefixes[block] = halves(self.general[i].expand(len(query), -1, -1))
        for i, block in enumerate(self.config.expert_blocks):
            keys, values = halves(expert[i])
            if "reshape" in self.config.reference_quirks:
                keys, values = torch.stack([keys, values]).reshape(len(query), 2, *keys.shape[1:]).unbind(1)
            if block in prefixes:
                general_keys, general_values = prefixes[block]
                keys, values = torch.cat([keys, general_keys], dim=1), torch.cat([values, general_values], dim=1)
            prefixes[block] = (keys, values)
        return prefixes

    def end_task(self, task: int) -> None:
        """Starts the histogram of the evaluation that follows."""
        self.chosen.zero_()

    def diagnostics(self) -> dict[str, Any]:
        """How often each task's expert was chosen per block at evaluation since the task's end."""
        counts = {str(b): self.chosen[i].tolist() for i, b in enumerate(self.config.expert_blocks)}
        return {"expert_choice_in_evaluation": counts}

    def _current(self) -> tuple[nn.Parameter, nn.Parameter]:
        if self.prompt is None or self.key is None:
            raise RuntimeError("dualprompt has no expert yet: begin_task comes first")
        return self.prompt, self.key

    def _drawn(self, task: int) -> tuple[nn.Parameter, nn.Parameter]:
        """The expert and key that task `task` starts from."""
        n, generator = len(self.config.expert_blocks), self.generator("init", task)
        prompt = self.uniform(generator, n, self.config.expert_length, self.feature_dim)
        return prompt, self.uniform(generator, n, self.feature_dim)

    def _own_expert(self, query: Tensor) -> Tensor:
        """The current task's expert for every sample, (n_blocks, B, L, D); keeps the key loss."""
        prompt, key = self._current()
        losses = (1 - cosine(query, key.unsqueeze(1))).sum(dim=(0, 2))
        self._key_loss = losses.sum() if "sum_key_loss" in self.config.reference_quirks else losses.mean()
        return prompt.unsqueeze(1).expand(-1, len(query), -1, -1)

    def _nearest_expert(self, query: Tensor) -> Tensor:
        """The expert with the nearest key for each block and sample, (n_blocks, B, L, D)."""
        prompt, key = self._current()
        keys = torch.cat([self.past_keys, key.unsqueeze(1), self.future_keys], dim=1)
        prompts = torch.cat([self.past_prompts, prompt.unsqueeze(1), self.future_prompts], dim=1)
        nearest = cosine(query, keys).argmax(dim=-1)
        if "batch_vote" in self.config.reference_quirks:
            nearest = majority(nearest.unsqueeze(-1), keys.shape[1]).squeeze(-1)
        self.chosen.add_(count_choices(nearest, keys.shape[1]))
        return prompts[torch.arange(len(prompts), device=nearest.device).unsqueeze(1), nearest]
