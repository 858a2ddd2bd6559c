"""What the prompt methods share: prompts as prefixes of attention blocks, option checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain, FeatureDomain, Images, Network
from dualcl.methods.base import Method, ParamGroup, check


def check_length(name: str, length: int) -> None:
    """Raises UserError unless `length` splits into equally many key and value positions."""
    check(length >= 2, f"{name} must be at least 2 (one key and one value position), got {length}")
    check(
        length % 2 == 0,
        f"{name} must be even, since half of a prompt goes to the keys and half to the values, got {length}; "
        f"use {length - 1} or {length + 1}",
    )


def check_blocks(name: str, blocks: tuple[int, ...]) -> None:
    """Raises UserError unless `blocks` is a list of distinct block indices."""
    check(len(blocks) > 0, f"{name} must name at least one attention block, got an empty list")
    check(min(blocks) >= 0, f"{name} must not hold negative block indices, got {list(blocks)}")
    check(len(set(blocks)) == len(blocks), f"{name} must not name a block twice, got {list(blocks)}")


def check_depth(name: str, field: str, blocks: tuple[int, ...], n_blocks: int) -> None:
    """Raises UserError when `blocks`, which the setting `name` asks for, reach beyond the backbone's `n_blocks`.

    The mend proposes a value for `field`: the blocks that exist, else the last one.
    """
    missing = [b for b in blocks if b >= n_blocks]
    mend = ",".join(str(b) for b in blocks if b < n_blocks) or str(n_blocks - 1)
    check(
        not missing,
        f"{name} asks for blocks {missing}, but the backbone has {n_blocks} attention blocks (0..{n_blocks - 1}); "
        f"set {field}={mend} or take a deeper backbone",
    )


def halves(prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Splits prompts (..., L, D) into what is prepended to the keys and to the values, each (..., L/2, D)."""
    keys, values = prompts.chunk(2, dim=-2)
    return keys, values


def count_choices(choice: Tensor, pool: int) -> Tensor:
    """How often each of `pool` members occurs in `choice` (n_blocks, ...), shape (n_blocks, pool); no device sync."""
    members = torch.arange(pool, device=choice.device)
    return (choice.flatten(1).unsqueeze(-1) == members).sum(dim=1)


def majority(choice: Tensor, pool: int) -> Tensor:
    """What a batch votes for: the k most frequent of its choices (n_blocks, B, k) among `pool` members, for each row.

    Most votes first, ties by the lower index. Source: `batchwise_prompt` of the public L2P code (google-research/l2p).
    """
    ranked = count_choices(choice, pool).sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, None, : choice.shape[-1]].expand_as(choice)


class PromptMethod(Method):
    """Base of the methods that learn prefixes for a frozen ViT; subclasses say what `provide` returns for queries.

    A query is the plain network's feature of the image.

    Prompts enter as prefix tuning: half of a prompt is prepended to a block's keys, half to its values. Tensors of all
    prompted blocks are stacked in their first axis.
    """

    requires = ("features", "prefixes")
    frozen = True

    def __init__(self, config: Any, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        network = cast(FeatureDomain, domain).network
        self.n_blocks = network.blocks
        self.feature_dim = network.width
        self._key_loss: Tensor | None = None

    def features(self, images: Images, network: Network) -> Tensor:
        """Features (B, D) of the network with the prefixes that its plain features of the same images choose."""
        with torch.no_grad():
            query = network(images, key="plain")
        return network(images, prefixes=self.provide(query, images.training))

    def provide(self, query: Tensor, training: bool) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Prefixes {block: (keys (B, L/2, D), values (B, L/2, D))} for queries (B, D)."""
        raise NotImplementedError

    def caveats(self) -> list[str]:
        """What an answer costs."""
        return ["two passes per image", *super().caveats()]

    def penalty(self) -> Tensor | None:
        """The key loss of the last training forward pass, a scalar; handed out once."""
        loss, self._key_loss = self._key_loss, None
        return loss

    def uniform(self, generator: torch.Generator, *shape: int) -> nn.Parameter:
        """A parameter drawn from uniform(0, 1), the reference's initialisation of L2P and DualPrompt."""
        return nn.Parameter(torch.rand(shape, generator=generator).to(self.domain.device))

    def group(self, *params: nn.Parameter) -> list[ParamGroup]:
        """`params` as the one group of the method."""
        return [ParamGroup("prompts", list(params), self.config.lr, self.config.weight_decay)]
