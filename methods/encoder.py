"""Tuning-free: an encoder, trained once on other pictures of the world, gives a concept's rows; no step is taken.

Sources: Chen et al., PhotoVerse, arXiv 2309.05793 (second hand, and the unofficial idonahum/photoVerse, 02e28ef; its
own code is not public), and Ye et al., IP-Adapter, arXiv 2308.06721 (code tencent-ailab/IP-Adapter, 62e4af9). This is
the text branch: pseudo-words = an MLP of a picture's features, here the mean over a concept's pictures, then frozen.

Differs from the papers: there is no image branch, out = Attn(Q, K, V) + s Attn(Q, c W'_k, c W'_v), so s is 0; features
are those of a small convolutional network trained along, not CLIP's: an encoder must not be built on the network that
measures. There is no term on faces, and one MLP for all rows. `dualcl pretrain portraits-encoder` makes the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch

from dualcl.benchmark.core.domain import Domain, TokenRowsDomain
from dualcl.methods.base import Method, MethodConfig, register_method


@dataclass(frozen=True)
class EncoderConfig(MethodConfig):
    """What is given to the tuning-free method; no rate is used, for it takes no steps."""

    encoder: str = field(
        default="portraits-encoder",
        metadata={"help": "a bundled encoder or a folder that dualcl pretrain wrote; untrained: random, for tests"},
    )
    shared_encoder: bool = field(
        default=False, metadata={"help": "leaves the encoder out of what is stored, as a part of the base model"}
    )


@register_method(
    "encoder",
    domains=("customization",),
    summary="tuning-free: an encoder trained beforehand makes the token of the concept's pictures, no training",
    source="arXiv 2309.05793 and 2308.06721, the text branch",
)
class Encoder(Method):
    """Sets each concept's rows from its pictures; the network stays as it is."""

    Config = EncoderConfig
    requires = ("token_rows",)
    frozen = True

    def __init__(self, config: EncoderConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.encoder = cast(TokenRowsDomain, domain).row_encoder(config.encoder, self.generator("untrained"))
        self.facts: dict[str, Any] = {}

    def takes_steps(self, task: int) -> bool:
        """No task does."""
        return False

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Rows: the mean over the concept's pictures."""
        domain = cast(TokenRowsDomain, self.domain)
        each = self.encoder.rows(domain.concept_images(task)).double()
        domain.set_token_rows(task, [each.mean(0).float()])
        self.facts = {"row_spread": float((each - each.mean(0)).square().sum((1, 2)).mean().sqrt())}

    def stored_parameters(self) -> int:
        """The encoder's numbers, unless it is shared."""
        return 0 if self.config.shared_encoder else super().stored_parameters()

    def diagnostics(self) -> dict[str, Any]:
        """Which encoder it is, and how far the last concept's pictures are from their mean row."""
        return {"encoder_sha256": self.encoder.card.get("sha256", "untrained"), **self.facts}

    def caveats(self) -> list[str]:
        """What was seen before the stream, and what is not the papers'."""
        card, size = self.encoder.card, sum(p.numel() for p in self.encoder.parameters())
        seen = (
            f"{size:,} encoder weights, trained on {card.get('pictures', 0):,} pictures of this world before the stream"
        )
        own = [seen if card else "the encoder is untrained, its rows say nothing of the pictures"]
        shared = ["the encoder is not counted as stored"] if self.config.shared_encoder else []
        return [*own, *shared, "the text branch alone, without IP-Adapter's attention to images", *super().caveats()]
