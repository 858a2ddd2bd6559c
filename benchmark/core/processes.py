"""One run on several processes, one per device: `accelerate launch` or `torchrun` starts them, this joins them.

Data-parallel where it costs, and nowhere else: the rows of a batch go through the network in shares, one per process,
and every process gets all results. What comes after (classifier, losses, penalties) each computes alike on the whole
batch. So a loss may look at the whole batch, and no method, learning rate or batch size knows how many processes there
are; weights and records are those of one process up to rounding. The first process alone reads and writes the folder.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.devices import pick_device
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.machine import launched

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
_NOTHING = object()


class Processes:
    """The processes of a run and this one's place among them; without a launcher there is just this one."""

    def __init__(self, state: PartialState | None = None) -> None:
        self.index = 0 if state is None else int(state.process_index)
        self.count = 1 if state is None else int(state.num_processes)
        #: this process's device; None without a launcher
        self.device: torch.device | None = None if state is None else state.device
        #: whether this process works on something of its own, without the others
        self.alone = self.count == 1

    @property
    def main(self) -> bool:
        """Whether this is the process that reads and writes the run's folder."""
        return self.index == 0

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, passes through the network are this process's own and not shared."""
        before, self.alone = self.alone, True
        try:
            yield
        finally:
            self.alone = before

    # --- shares -----------------------------------------------------------------------------------------------------

    def mine(self, items: Iterable[T]) -> Iterator[T]:
        """The items that are this process's to do, every `count`-th: each is some process's, none is two's."""
        return itertools.islice(items, self.index, None, self.count)

    def rows(self, n: int) -> slice:
        """This process's rows of a batch of `n`: the shares differ by one row at most, and may be empty."""
        return slice(n * self.index // self.count, n * (self.index + 1) // self.count)

    # --- exchange ---------------------------------------------------------------------------------------------------

    def gathered(self, rows: Tensor, n: int) -> Tensor:
        """All `n` rows of a batch from every process's own ones (`rows`), differentiable.

        Its gradient in each process is that of the process's own rows times the number of processes: with parameters'
        gradients averaged over processes (`average`), what every process computes alike counts once, and so do rows.
        """
        out: Tensor = _Gathered.apply(rows, self, n)
        return out

    def average(self, params: Sequence[nn.Parameter]) -> None:
        """Averages gradients over processes; one that no process has stays None."""
        if self.count == 1:
            return
        has = torch.tensor([float(p.grad is not None) for p in params], device=self.device)
        self._add_up(has)
        there = [p for p, n in zip(params, has.tolist(), strict=True) if n]
        for p in there:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for kind in {p.dtype for p in there}:
            group = [p for p in there if p.dtype == kind]
            flat = torch.cat([p.grad.reshape(-1) for p in group if p.grad is not None])
            self._add_up(flat)
            flat /= self.count
            for p, grad in zip(group, flat.split([p.numel() for p in group]), strict=True):
                p.grad = grad.view_as(p)

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes of `value`, which is changed."""
        if self.count > 1:
            self._add_up(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.count == 1 else bool(self.total(torch.tensor(float(flag), device=self.device)))

    def together(self, done: Iterable[T]) -> list[T]:
        """Results for all items, in their order, from those of each process for its own (`mine`).

        Tensors of several processes come on the CPU.
        """
        own = list(done)
        if self.count == 1:
            return own
        own = [x.cpu() if isinstance(x, Tensor) else x for x in own]  # type: ignore[misc]
        shares: list[list[T]] = [[]] * self.count
        torch.distributed.all_gather_object(shares, own)
        rounds = itertools.zip_longest(*shares, fillvalue=_NOTHING)
        return [item for items in rounds for item in items if item is not _NOTHING]  # type: ignore[misc]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work()` gives in the main process, in all of them; so is a UserError that it raises there."""
        if self.count == 1:
            return work()
        told: list[Any] = [None, None]
        if self.main:
            try:
                told[0] = work()
            except UserError as error:
                told[1] = str(error)
        torch.distributed.broadcast_object_list(told, src=0, device=self.device)
        if told[1] is not None:
            raise UserError(told[1])
        result: T = told[0]
        return result

    def check_equal(self, params: Iterable[Tensor], what: str) -> None:
        """RuntimeError unless all processes hold the same bits."""
        if self.count == 1:
            return
        sums = torch.stack([sum_of_bits(p.detach()) for p in params]).tolist()
        if any(other != sums for other in self.together([sums])):
            raise RuntimeError(f"{what} differ between the {self.count} processes")

    def _add_up(self, value: Tensor) -> None:
        torch.distributed.all_reduce(value)


#: what a domain has outside a run, and in a run of one process
ALONE = Processes()


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, processes: Processes, n: int) -> Tensor:
        ctx.processes, ctx.n = processes, n
        out = rows.new_zeros(n, *rows.shape[1:])
        out[processes.rows(n)] = rows
        return processes.total(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.processes.rows(ctx.n)] * ctx.processes.count, None, None


def sum_of_bits(weights: Tensor) -> Tensor:
    """A sum, modulo 2^64, that every change of one number changes; in words of eight bytes where they are whole."""
    size, offset = (n * weights.element_size() for n in (weights.numel(), weights.storage_offset()))
    word = torch.int64 if size % 8 == 0 and offset % 8 == 0 else torch.int16
    return weights.reshape(-1).view(word).sum(dtype=torch.int64)


def join(device: str) -> Processes:
    """Joins the processes that were launched together for a run on this kind of device.

    UserError without the extra `multi`, and for the name of a single device when there are several processes.
    """
    if launched() == 1:
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError:
        raise UserError('several processes need accelerate: pip install "dualcl[multi]"') from None
    kind = pick_device(device)
    if kind.index is not None:
        raise UserError(f"device={device} is one device for {launched()} processes; set device={kind.type}")
    return Processes(PartialState(cpu=kind.type == "cpu"))
