"""Linear probe: the frozen backbone with a trained classifier."""

from __future__ import annotations

from dualcl.methods.base import Method, register_method


@register_method(
    "linear_probe",
    domains=("classification",),
    summary="trains the current task's classifier rows only; the backbone stays frozen",
    source="baseline; no prompts at all, as asked for in JH-LEE-KR/dualprompt-pytorch#10",
)
class LinearProbe(Method):
    """Trains nothing of its own: the domain's classifier rows of the current task are all there is."""

    frozen = True
