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
from dualcl.methods import available_methods, method_class


class Counted(Classification):
    """The real domain; counts the images that enter the patch embedding during each evaluation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.passed_images = 0
        #: seen tasks and images of each evaluation
        self.evaluations: list[tuple[tuple[int, ...], int]] = []
        self.model.patch_embed.register_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, given: Any, embedded: torch.Tensor) -> None:
        self.passed_images += len(embedded)

    def evaluate(self, seen: Sequence[int]) -> dict[str, Any]:
        before = self.passed_images
        row = super().evaluate(seen)
        self.evaluations.append((tuple(seen), self.passed_images - before))
        return row


def frozen_pass(domain: Classification) -> torch.Tensor:
    """What the model alone, without prompts, makes of the last task's test images."""
    images = next(domain._test_loader(2).eval_batches(6)).images
    with torch.no_grad():
        return domain.network.run(images)


#: methods with other branches than one plain pass -> what they read after task t, by the key under which it stays
BRANCHES: dict[str, Callable[[int], list[Any]]] = {
    "aper": lambda t: ["plain", "adapted"],
    "ease": lambda t: [*range(t + 1)],
    "mos": lambda t: [*range(t + 1)],
    "tuna": lambda t: [*range(t + 1), f"universal {t}"],
}


#: the network is frozen, and an adapter beside it is not
MOVING = {"moal"}


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
    method = method_class(name)
    trained, prompted = not torch.equal(frozen_pass(domain), before), "prefixes" in method.requires
    assert not (trained and method.frozen)
    size = resolved.sections["eval"].batch_size

    branches = BRANCHES.get(name, lambda t: ["plain"])
    held: dict[Any, set[int]] = {}
    keeps = method.frozen and name not in MOVING
    for seen, images in [*domain.evaluations, *again(domain)]:
        every, passes = sum(sizes[t] for t in seen), 0
        for key in branches(seen[-1]):
            known = held.setdefault(key, set())
            # of what was kept under a key, one batch is computed again, to compare bits
            passes += sum(sizes[t] for t in seen if t not in known) + (min(size, sizes[0]) if known else 0)
            known |= {*seen}
        # not promised to be frozen: all anew; prompts: all with prompts, new ones before, as queries; frozen: new ones
        assert images == (every * prompted + passes if keeps else every)
    assert {*range(3)} in held.values()


def again(domain: Counted) -> list[tuple[tuple[int, ...], int]]:
    """One more evaluation."""
    domain.evaluate(range(3))
    return domain.evaluations[-1:]
