"""Joint training: the upper bound. Both domains."""

from __future__ import annotations

from dualcl.methods.base import register_method
from dualcl.methods.shared.whole_weights import WholeWeights


@register_method(
    "joint",
    domains=("classification", "customization"),
    summary="upper bound: all tasks' data at once, all weights",
    source="arXiv 2211.13218 (upper bound)",
)
class Joint(WholeWeights):
    """Full fine-tuning on all tasks together: not continual learning, the ceiling of a table."""

    joint = True
