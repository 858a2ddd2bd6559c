"""FT: full fine-tuning in sequence, with a loss over all outputs seen so far. Both domains."""

from __future__ import annotations

from dualcl.methods.base import register_method
from dualcl.methods.shared.whole_weights import WholeWeights


@register_method(
    "finetune",
    domains=("classification", "customization"),
    summary="FT: all weights the domain offers, loss over all outputs seen so far",
    source="arXiv 2211.13218 (baseline FT)",
)
class Finetune(WholeWeights):
    """Full fine-tuning with cross entropy on all outputs so far: old rows are trained by the new task's images too."""

    output_scope = "seen"
