"""FT++: full fine-tuning in sequence, with a loss over the current task's outputs. Both domains."""

from __future__ import annotations

from dualcl.methods.base import register_method
from dualcl.methods.shared.whole_weights import WholeWeights


@register_method(
    "finetune_pp",
    domains=("classification", "customization"),
    summary="FT++: as finetune, loss and trained rows of the current task only",
    source="arXiv 2211.13218 (baseline FT++)",
)
class FinetunePP(WholeWeights):
    """Full fine-tuning with cross entropy on the current task's outputs only."""
