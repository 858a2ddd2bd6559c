"""Textual Inversion: only the concept's token is learnt."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualcl.methods.base import Method, MethodConfig, register_method


@dataclass(frozen=True)
class TextualInversionConfig(MethodConfig):
    """Hyper-parameters of Textual Inversion; `lr` has nothing to act on."""

    head_lr: float = field(default=5e-4, metadata={"help": "learning rate of the token rows"})


@register_method(
    "textual_inversion",
    domains=("customization",),
    summary="trains the concept's token rows only; the whole model stays frozen, so nothing is forgotten",
    source="arXiv 2208.01618",
)
class TextualInversion(Method):
    """Trains nothing of its own: the domain's token rows of the current concept are all there is.

    Differs from the paper: prompts are the preset's, one unless it names more, not templates drawn anew; what a row
    starts from (`concept.init`), steps and rate are the preset's too.
    """

    Config = TextualInversionConfig
