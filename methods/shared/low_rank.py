"""The low-rank core: one update per site, its injection into named Linears, and folding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Site


def fresh_factor(rank: int, d_in: int, generator: torch.Generator) -> Tensor:
    """B (rank, d_in), Kaiming-uniform; drawn on the CPU, so that a seed means the same numbers on every device."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)


class Update(Protocol):
    """What `AdaptedLinear` reads of an update: the factors of site.weight + A B."""

    site: Site

    @property
    def active(self) -> bool:
        """False: it is left out."""

    @property
    def A(self) -> Tensor:
        """(d_out, r)."""

    @property
    def B(self) -> Tensor:
        """(r, d_in)."""


class LowRankUpdate(nn.Module):
    """The update of one site: W_t = W_init + S_{t-1} + A_t B_t (arXiv 2304.06027, eq. 2).

    A (d_out, r) starts at zero and B (r, d_in) at Kaiming-uniform, so a fresh update changes nothing. S (d_out, d_in)
    sums the finished tasks' updates. The frozen weight of the Linear holds W_init + S; W_init is kept, so that folding
    recomputes and never drifts.
    """

    summed: Tensor

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        # at least float32: small steps on half-precision factors would be rounded away
        dtype = torch.promote_types(site.weight.dtype, torch.float32)
        like: dict[str, Any] = {"device": site.weight.device, "dtype": dtype}
        self.site = site
        self.rank = rank
        self.A = nn.Parameter(torch.zeros(site.d_out, rank, **like), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(rank, site.d_in, **like), requires_grad=False)
        self.register_buffer("summed", torch.zeros(site.d_out, site.d_in, **like))
        #: a copy on the CPU from the first fold on: until then the frozen weight is W_init
        self.w_init: Tensor | None = None
        #: False while A is zero for good (between tasks): the side path is then left out
        self.active = False
        #: (d_out, d_in) with gradient: what stands in for A B in a pass; None: A B itself
        self.instead: Tensor | None = None

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Starts a fresh A, B for a new task."""
        self.A.zero_()
        self.B.copy_(fresh_factor(self.rank, self.site.d_in, generator))
        self.A.requires_grad_(True)
        self.B.requires_grad_(True)
        self.active = True

    @torch.no_grad()
    def product(self) -> Tensor:
        """A B (d_out, d_in) in the factors' own precision."""
        return self.A @ self.B

    @torch.no_grad()
    def fold(self) -> None:
        """S_t = S_{t-1} + A_t B_t, into the frozen weight; A and B are cleared."""
        self.set_summed(self.summed + self.product())

    @torch.no_grad()
    def set_summed(self, summed: Tensor) -> None:
        """S_t = `summed`, into the frozen weight; A and B are cleared."""
        self.summed.copy_(summed)
        self.A.zero_()
        self.B.zero_()
        self.A.requires_grad_(False)
        self.B.requires_grad_(False)
        self.active = False
        self.refold()

    @torch.no_grad()
    def pause(self) -> None:
        """The weight holds W_init + A B, the factors are kept for `go_on`: for one adapter that is trained on."""
        self.summed.copy_(self.product())
        self.A.requires_grad_(False)
        self.B.requires_grad_(False)
        self.active = False
        self.refold()

    @torch.no_grad()
    def go_on(self) -> None:
        """Undoes `pause`: the weight is W_init, the factors are trained on."""
        self.summed.zero_()
        self.A.requires_grad_(True)
        self.B.requires_grad_(True)
        self.active = True
        self.refold()

    @torch.no_grad()
    def refold(self) -> None:
        """Sets the frozen weight to W_init + S."""
        if self.w_init is None:
            self.w_init = self.site.weight.to("cpu", copy=True)
        self.site.weight.copy_(self.w_init.to(self.summed.device) + self.summed)

    @torch.no_grad()
    def unfold(self) -> None:
        """Sets the frozen weight back to W_init, bit for bit."""
        if self.w_init is not None:
            self.site.weight.copy_(self.w_init)


class _MergedLinear(torch.autograd.Function):
    """x (n, d_in) -> x (W + sum of A B)' + bias, with r-sized gradients of the factors and none of W.

    Keeps x and the factors for the backward, which merges again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Linear, rows: Sequence[slice], *factors: Tensor) -> Tensor:
        ctx.base, ctx.rows = base, rows
        ctx.save_for_backward(x, *factors)
        return F.linear(x, _merged(base.weight, rows, factors), base.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        grad = grads[0]
        a, b = factors[::2], factors[1::2]
        parts = [grad[:, r] for r in ctx.rows]
        sizes = [f.shape[0] for f in b]
        hidden = (x @ torch.cat(b).T).split(sizes, dim=1)
        grad_hidden = torch.cat([part @ f for part, f in zip(parts, a, strict=True)], dim=1)
        grad_b = (grad_hidden.T @ x).split(sizes)
        grad_a = [part.T @ h for part, h in zip(parts, hidden, strict=True)]
        grad_x = grad @ _merged(ctx.base.weight, ctx.rows, factors) if ctx.needs_input_grad[0] else None
        pairs = [f for pair in zip(grad_a, grad_b, strict=True) for f in pair]
        return grad_x, None, None, *pairs


def _merged(weight: Tensor, rows: Sequence[slice], factors: Sequence[Tensor]) -> Tensor:
    merged = weight.detach().clone()
    for r, a, b in zip(rows, factors[::2], factors[1::2], strict=True):
        merged[r].addmm_(a, b)
    return merged


class AdaptedLinear(nn.Module):
    """A frozen Linear with low-rank updates of slices of its rows.

    Many inputs of a fused Linear go through the merged weight, whose gradient is never formed. Others take side paths:
    a merge would cost more than it saves, and in 16 bits round the update away.
    """

    def __init__(self, base: nn.Linear, updates: Iterable[Update]) -> None:
        super().__init__()
        self.base = base
        ordered = sorted(updates, key=lambda u: u.site.start)
        self.updates = nn.ModuleList(ordered)  # type: ignore[arg-type]
        self.in_features, self.out_features = base.in_features, base.out_features
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        active = [u for u in self._updates() if u.active]
        if not active:
            plain: Tensor = self.base(x)
            return plain
        if any(_instead(u) is not None for u in active):
            return self.dense_paths(x, active)
        if self._merges(x, active):
            rows = [slice(u.site.start, u.site.stop) for u in active]
            factors = [f for u in active for f in (u.A, u.B)]
            y: Tensor = _MergedLinear.apply(x.flatten(0, -2), self.base, rows, *factors)
            return y.unflatten(0, x.shape[:-1])
        return self.side_paths(x, active)

    def side_paths(self, x: Tensor, active: list[Update]) -> Tensor:
        """The frozen Linear plus the low-rank products, x (..., d_in) -> (..., d_out)."""
        y: Tensor = self.base(x)
        hidden = F.linear(x, torch.cat([u.B for u in active]))
        return y + F.linear(hidden, self._blocks(active))

    def dense_paths(self, x: Tensor, active: list[Update]) -> Tensor:
        """The frozen Linear plus what stands in for the low-rank products, x (..., d_in) -> (..., d_out)."""
        y: Tensor = self.base(x)
        full = torch.zeros(self.out_features, self.in_features, device=x.device, dtype=active[0].A.dtype)
        for u in active:
            given = _instead(u)
            full[u.site.start : u.site.stop] = u.A @ u.B if given is None else given
        return y + F.linear(x, full)

    def _merges(self, x: Tensor, active: list[Update]) -> bool:
        many = len(active) > 1 and x.dim() > 1 and x.numel() > self.in_features**2
        exact = {x.dtype, self.base.weight.dtype, *(u.A.dtype for u in active)} == {x.dtype}
        return many and exact and not torch.is_autocast_enabled(x.device.type) and not self.base.weight.requires_grad

    def _updates(self) -> list[Update]:
        return list(self.updates)  # type: ignore[arg-type]

    def _blocks(self, active: list[Update]) -> Tensor:
        """The factors A as one (d_out, sum of ranks) matrix, zero outside each update's rows and columns."""
        blocks = torch.block_diag(*[u.A for u in active])
        if blocks.shape[0] == self.out_features:
            return blocks
        rows = torch.cat([torch.arange(u.site.start, u.site.stop, device=blocks.device) for u in active])
        return blocks.new_zeros(self.out_features, blocks.shape[1]).index_copy(0, rows, blocks)


def _instead(update: Update) -> Tensor | None:
    return update.instead if isinstance(update, LowRankUpdate) else None


def inject(model: nn.Module, sites: dict[str, Site], rank: int) -> dict[str, LowRankUpdate]:
    """Replaces every Linear that has sites by an `AdaptedLinear`; returns the updates by site name."""
    updates = {name: LowRankUpdate(site, rank) for name, site in sites.items()}
    adapt(model, updates)
    return updates


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where the one of that name stands."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def adapt(model: nn.Module, updates: Mapping[str, Update]) -> None:
    """Replaces every Linear that has updates by an `AdaptedLinear`."""
    by_module: dict[str, list[Update]] = {}
    for update in updates.values():
        by_module.setdefault(update.site.module_name, []).append(update)
    for module_name, group in by_module.items():
        replace_module(model, module_name, AdaptedLinear(group[0].site.module, group))


class SidedLinear(nn.Module):
    """A module with what `sides` adds for its input; None: nothing."""

    def __init__(self, base: nn.Module, sides: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.base, self.sides = base, sides

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        y: Tensor = self.base(x)
        side = self.sides(x)
        return y if side is None else y + side


class Switched(Protocol):
    """Something beside a network that counts while `active`."""

    active: bool


@contextlib.contextmanager
def without_updates(updates: Iterable[Switched]) -> Iterator[None]:
    """The network as the finished tasks left it, without gradient: what is trained now is off until the end.

    A teacher that takes no memory. Without gradient, because micro-batches are run again in the backward, after it.
    """
    before = [(update, update.active) for update in updates]
    try:
        for update, _ in before:
            update.active = False
        with torch.no_grad():
            yield
    finally:
        for update, active in before:
            update.active = active
