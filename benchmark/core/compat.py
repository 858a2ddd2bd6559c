"""Makes `import torchvision` work beside a torch build that its compiled operators were not made for.

PyPI's torchvision wheel is linked against CUDA libraries. Beside a CPU-only torch its operators (NMS, RoI align) do not
load, and registering their shape functions then fails the whole import with "operator torchvision::nms does not
exist". The suite uses torchvision's transforms and data sets only, which are pure Python, so the registrations of
operators that are not there are passed over; calling such an operator still gives torchvision's own error.
Import this module before torchvision or timm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_register_fake = torch.library.register_fake


def _tolerant(op: Any, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    decorate = _register_fake(op, *args, **kwargs)

    def apply(func: Any) -> Any:
        try:
            return decorate(func)
        except RuntimeError:
            if str(op).startswith("torchvision::"):
                return func
            raise

    return apply


torch.library.register_fake = _tolerant
try:
    from torchvision.extension import _has_ops
finally:
    torch.library.register_fake = _register_fake

#: False when torchvision's compiled operators do not match this torch
TORCHVISION_OPS = bool(_has_ops())
