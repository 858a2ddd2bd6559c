"""APER: class means of two features side by side, of the pretrained network and of one adapted in the first task.

Source: Zhou et al., arXiv 2303.07338 (IJCV 2024), formerly ADAM; public code zhoudw-zdw/RevisitingCIL, read at a2e6b71,
and LAMDA-PILOT, 5240714. In the first task bottlenecks (`shared/adapters.py`) and rows by cosine with a learnt scale
are trained; the rows are dropped, and nothing is trained any more. f is the pretrained feature and f* the adapted one,
m_c the mean of phi over a class's images in the evaluation view:

    phi(x) = [f(x); f*(x)],  not normalised one by one,   score_c(x) = cos(phi(x), m_c)

Without f* it is SimpleCIL, which is `ncm`. The longer of the two features weighs more.

Differs from the paper: its variant with adapters alone; scales and shifts, prompts and tuning of all weights are not
there. No dropout in the adapters; optimiser, epochs and schedule are the preset's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain, Images, Network
from dualcl.methods.base import register_method
from dualcl.methods.shared.adapters import AdapterConfig, AdapterMethod
from dualcl.methods.shared.class_statistics import cosine


@register_method(
    "aper",
    domains=("classification",),
    summary="APER: class means of plain and adapted features side by side; adapted in the first task alone",
    source="arXiv 2303.07338",
)
class APER(AdapterMethod):
    """Keeps one set of bottlenecks, and a mean of both features of every class."""

    means: Tensor

    def __init__(self, config: AdapterConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.register_buffer("means", torch.zeros(self.classes, 2, self.width))

    def takes_steps(self, task: int) -> bool:
        """The first one."""
        return task == 0

    def features(self, images: Images, network: Network) -> Tensor:
        """(B, 2, d): plain and adapted."""
        return torch.stack([network(images, key="plain"), self.read(images, network, 0)], 1)

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Keeps the means of the task's classes."""
        self.finished = task + 1
        outputs = self.classifier.outputs(task)
        self.means[outputs.start : outputs.stop].copy_(self.branch_means(task, 2))

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun), those of tasks that did not end lowest."""
        return self.with_lowest(cosine(features.flatten(1), self.means[: self.known].flatten(1)))

    def stored_parameters(self) -> int:
        """The bottlenecks, and two means of each class."""
        return super().stored_parameters() + 2 * self.known * self.width

    def caveats(self) -> list[str]:
        """When it learns, and what an answer costs."""
        steps = "takes steps in the first task alone: bottlenecks beside the MLPs are trained there and then stay"
        return [steps, "two passes per image", *super().caveats()]
