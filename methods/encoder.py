"""Tuning-free: an encoder, trained once on other pictures of the world, stands in for training; no step is taken.

Sources: Chen et al., PhotoVerse, arXiv 2309.05793 (second hand, and the unofficial idonahum/photoVerse, 02e28ef; its
own code is not public), and Ye et al., IP-Adapter, arXiv 2308.06721 (code tencent-ailab/IP-Adapter, 62e4af9). With h
the mean over a concept's pictures of what the encoder makes of one:

    text branch     pseudo-words = MLP(h), the concept's rows of the token table
    image branch    c = LayerNorm(Linear(h)),   out = Attn(Q, K, V) + s Attn(Q, c W'_k, c W'_v)

Prompts that name no concept, and the unconditional half of guidance, have the c of h = 0, as IP-Adapter's.

Differs from the papers: h is of a small convolutional network trained along, not CLIP's: an encoder must not be built
on the network that measures. There is no term on faces, one MLP for all rows, and branches are dropped at random in
training as IP-Adapter's picture and text, not fused as PhotoVerse's. PhotoVerse has five pseudo-words and a penalty on
the norm of the image branch's values; here there are as many rows as the preset gives a concept (one), and no such
term. A prompt that names several concepts has the mean of their c. `dualcl pretrain portraits-encoder` makes the
weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch

from dualcl.benchmark.core.domain import Domain, TokenRowsDomain
from dualcl.methods.base import Method, MethodConfig, check, register_method


@dataclass(frozen=True)
class EncoderConfig(MethodConfig):
    """What is given to the tuning-free method; no rate is used, for it takes no steps."""

    encoder: str = field(
        default="portraits-encoder",
        metadata={"help": "a bundled encoder or a folder that dualcl pretrain wrote; untrained: random, for tests"},
    )
    image_scale: float = field(
        default=1.0, metadata={"help": "s, weight of the image branch; 0: the text branch alone"}
    )
    shared_encoder: bool = field(
        default=False, metadata={"help": "leaves the encoder out of what is stored, as a part of the base model"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.image_scale >= 0, f"method.image_scale must not be negative, got {self.image_scale}")


@register_method(
    "encoder",
    domains=("customization",),
    summary="tuning-free: an encoder trained beforehand makes word and image tokens of a concept's pictures",
    source="arXiv 2309.05793 and 2308.06721",
)
class Encoder(Method):
    """Sets each concept's rows and image tokens from its pictures; the network stays as it is."""

    Config = EncoderConfig
    requires = ("token_rows",)
    frozen = True

    def __init__(self, config: EncoderConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.offered = cast(TokenRowsDomain, domain)
        self.encoder = self.offered.row_encoder(config.encoder, self.generator("untrained"))
        branch = self.encoder.branch
        self.reads_images = config.image_scale > 0 and branch is not None
        if self.reads_images:
            self.offered.read_images(branch, float(config.image_scale))
            self.register_buffer("embeddings", torch.zeros(n_tasks, branch.embedding))
        self.finished = 0
        self.facts: dict[str, Any] = {}

    def takes_steps(self, task: int) -> bool:
        """No task does."""
        return False

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Rows and image tokens of the mean over the concept's pictures."""
        each = self.encoder.embed(self.offered.concept_images(task))
        mean = each.double().mean(0, keepdim=True).float()
        self.offered.set_token_rows(task, [self.encoder.rows(mean)[0]])
        spread = (self.encoder.rows(each) - self.encoder.rows(mean)).double()
        self.facts = {"row_spread": float(spread.square().sum((1, 2)).mean().sqrt())}
        if self.reads_images:
            self.get_buffer("embeddings")[task] = mean[0]
        self.restored(task + 1)

    def restored(self, finished: int) -> None:
        """The network reads the image tokens of these tasks."""
        self.finished = finished
        for task in range(finished if self.reads_images else 0):
            self.offered.set_image_embedding(task, self.get_buffer("embeddings")[task])

    def stored_parameters(self) -> int:
        """The encoder's numbers, unless it is shared, and of each concept what the image branch reads."""
        table = self.get_buffer("embeddings") if self.reads_images else torch.zeros(0, 0)
        encoder = super().stored_parameters() - self.unread() - table.numel()
        return self.finished * table.shape[1] + (0 if self.config.shared_encoder else encoder)

    def unread(self) -> int:
        """Numbers of an image branch that the encoder has and this run does not use."""
        branch = None if self.reads_images else self.encoder.branch
        return 0 if branch is None else sum(p.numel() for p in branch.parameters())

    def diagnostics(self) -> dict[str, Any]:
        """Which encoder it is, and how far the last concept's pictures are from their mean row."""
        return {"encoder_sha256": self.encoder.card.get("sha256", "untrained"), **self.facts}

    def caveats(self) -> list[str]:
        """What was seen before the stream, and what is not the papers'."""
        card, size = self.encoder.card, sum(p.numel() for p in self.encoder.parameters()) - self.unread()
        seen = (
            f"{size:,} encoder weights, trained on {card.get('pictures', 0):,} pictures of this world before the stream"
        )
        own = [seen if card else "the encoder is untrained, its rows say nothing of the pictures"]
        shared = ["the encoder is not counted as stored"] if self.config.shared_encoder else []
        alone = [] if self.reads_images else ["the text branch alone, without IP-Adapter's attention to images"]
        return [*own, *shared, *alone, *super().caveats()]
