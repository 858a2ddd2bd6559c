"""How often an evaluation sends a test image through the model: once, however many tasks; exceptions have names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.methods import available_methods


class Counted(Classification):
    """The real domain; counts the images that enter the patch embedding during each evaluation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.images = 0
        #: seen tasks and images of each evaluation
        self.evaluations: list[tuple[tuple[int, ...], int]] = []
        self.model.patch_embed.register_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, given: Any, embedded: torch.Tensor) -> None:
        self.images += len(embedded)

    def evaluate(self, seen: Sequence[int]) -> dict[str, Any]:
        before = self.images
        row = super().evaluate(seen)
        self.evaluations.append((tuple(seen), self.images - before))
        return row


def frozen_pass(domain: Classification) -> torch.Tensor:
    """What the model alone, without prompts, makes of the last task's test images."""
    images = next(domain._test_loader(2).eval_batches(6)).images
    with torch.no_grad():
        return domain._plain_features(images)


@pytest.mark.parametrize("name", [n for n, i in available_methods().items() if "classification" in i.domains])
def test_an_evaluation_is_one_pass_over_each_test_image(
    tiny: Callable[..., Any], empty_record: Callable[[], dict[str, Any]], tmp_path: Path, name: str
) -> None:
    resolved = tiny(name)
    domain = Counted(resolved, torch.device("cpu"))
    sizes = [len(task.test) for task in domain.stream.tasks]
    assert len(set(sizes)) > 1
    before = frozen_pass(domain)
    Run(resolved, RunFolder(tmp_path), Reporter(quiet=True), domain).execute(empty_record())
    trained, prompted = not torch.equal(frozen_pass(domain), before), domain._provider is not None
    assert not (trained and prompted)

    known: set[int] = set()
    for seen, images in domain.evaluations:
        every, new = sum(sizes[t] for t in seen), sum(sizes[t] for t in seen if t not in known)
        known |= {*seen}
        # trained weights: all anew; prompts: all with prompts, new ones without before, as queries; frozen: new ones
        assert images == (every if trained else every + new if prompted else new)
    assert known == {0, 1, 2}

    domain.evaluate(range(3))
    assert domain.evaluations[-1][1] == (sum(sizes) if prompted else 0)
