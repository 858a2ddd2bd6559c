"""Training in stages that go on where they were stopped, to the bit: every random number is a function of the step."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import as_json, atomic_write
from dualcl.benchmark.core.generators import torch_generator

Say = Callable[[str], None]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """AdamW: a short warm-up, a flat part, and from `flat` of the steps on a straight way down to 0."""

    steps: int
    lr: float
    warm: int = 100
    flat: float = 0.7
    weight_decay: float = 0.0
    #: of the moving average of the weights; 0 for none
    ema: float = 0.0

    @property
    def flat_until(self) -> int:
        """Up to here nothing depends on the number of steps."""
        return int(self.flat * self.steps)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        down = (self.steps - step) / max(1, self.steps - self.flat_until)
        return self.lr * min(1.0, (step + 1) / self.warm, down)


class Order:
    """Which pictures a step takes: shuffled passes, the last short batch of each left out."""

    def __init__(self, n: int, batch: int, seed: int, *key: int | str) -> None:
        self.n, self.batch, self.seed, self.key = n, min(batch, n), seed, key
        self.epoch, self.order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Indices (B,) of a step."""
        epoch, place = divmod(step, self.n // self.batch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = torch.randperm(self.n, generator=torch_generator(self.seed, *self.key, epoch))
        return self.order[place * self.batch : (place + 1) * self.batch]


@dataclass(frozen=True)
class _State:
    """What a training goes on from, in one safetensors file."""

    file: Path
    told: Any
    schedule: Schedule
    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer

    def _ordered(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def write(self, step: int, running: float) -> None:
        """After `step` steps, with the running loss."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not self.model:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, p in enumerate(self._ordered()):
            moments = self.optimizer.state[p]
            tensors |= {f"first.{i}": moments["exp_avg"], f"second.{i}": moments["exp_avg_sq"]}
        schedule = {"steps": self.schedule.steps, "flat_until": self.schedule.flat_until}
        facts = {"told": self.told, "step": step, **schedule, "running": running}
        # clones: a tensor may be stored once only
        blob = save({k: v.detach().contiguous().clone() for k, v in tensors.items()}, {"facts": json.dumps(facts)})
        with atomic_write(self.file) as handle:
            handle.write(blob)

    def read(self) -> tuple[int, float]:
        """Loads the file; returns the steps done and the running loss."""
        file, told, schedule = self.file, self.told, self.schedule
        try:
            with safe_open(file, "pt") as opened:
                facts = json.loads(opened.metadata()["facts"])
                tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is no state of a training ({error}); delete it to start anew") from None
        other = sorted(k for k in {*told, *facts["told"]} if told.get(k) != facts["told"].get(k))
        if other:
            raise UserError(f"{file} is of a training with another {other[0]}; give another --out, or delete it")
        step = int(facts["step"])
        same = facts["steps"] == schedule.steps and facts["flat_until"] == schedule.flat_until
        if not same and step > min(facts["flat_until"], schedule.flat_until):
            raise UserError(
                f"{file} is {step} steps into a training of {facts['steps']}, too far for one of {schedule.steps}; "
                "give another --out, or delete it"
            )

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

        self.model.load_state_dict(part("model"))
        if self.average is not self.model:
            self.average.load_state_dict(part("average"))
        state = self.optimizer.state_dict()
        state["state"] = {
            i: {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"first.{i}"],
                "exp_avg_sq": tensors[f"second.{i}"],
            }
            for i in range(len(self._ordered()))
        }
        self.optimizer.load_state_dict(state)
        return step, float(facts["running"])


def train(
    file: Path,
    told: Mapping[str, Any],
    model: M,
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    say: Say,
    *,
    every: float = 150.0,
    at_save: Callable[[M, int], None] | None = None,
) -> M:
    """Trains what of `model` wants a gradient on `loss(step)`; returns it, or the moving average of its weights.

    The state is written to `file` every so many seconds and at the end, and read from there at the start; `told` is all
    that the training depends on. A schedule of other steps may take over before the learning rate falls. UserError when
    the file is of another training, or the loss not finite. `at_save` gets what would be returned, and the steps done.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr)
    average = deepcopy(model).requires_grad_(False) if schedule.ema else model
    mean: list[Tensor] = list(average.parameters())
    state = _State(file, as_json(dict(told)), schedule, model, average, optimizer)
    step, running = state.read() if file.exists() else (0, 0.0)
    if step:
        say(f"{file.stem}: going on at step {step}")
    first, started, saved = step, time.monotonic(), time.monotonic()
    model.train()
    while step < schedule.steps:
        error = loss(step)
        value = float(error.detach())
        if not torch.isfinite(error):
            raise UserError(
                f"{file.stem}: the loss of step {step} is {value}; delete {file} and lower the learning rate"
            )
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if schedule.ema:
            with torch.no_grad():
                keep = min(schedule.ema, step / (step + 9))
                torch._foreach_lerp_(mean, [p.detach() for p in model.parameters()], 1 - keep)
        running = 0.98 * running + 0.02 * value if step > 1 else value
        if step % 50 == 0 or step == schedule.steps:
            pace = (time.monotonic() - started) / (step - first)
            say(f"{file.stem} step {step}/{schedule.steps}  loss {running:.4f}  {pace:.3f} s a step")
        if step == schedule.steps or time.monotonic() - saved > every:
            state.write(step, running)
            if at_save is not None:
                at_save(average, step)
            saved = time.monotonic()
    return average.eval()


def card_text(title: str, paragraphs: Sequence[str]) -> str:
    """A model card as Markdown."""
    wrap = textwrap.TextWrapper(116, break_on_hyphens=False, break_long_words=False)
    return f"# {title}\n\n" + "\n\n".join(wrap.fill(p) for p in paragraphs) + "\n"
