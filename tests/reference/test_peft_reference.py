"""LoRA layers and merging against peft, run live: it is one of the packages that the tests install.

Ours: W + A B, A (d_out, r) from zero, B (r, d_in). peft: W + lora_alpha / r * lora_B lora_A, so lora_B is A, lora_A is
B and lora_alpha = r. On the ViT peft adapts the fused Q, K, V Linear: our three adapters on it are one of rank 3 r,
whose lora_B is zero off its three diagonal blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dualcl.benchmark.core.compat  # noqa: F401 - before transformers, which peft imports

# isort: split
from peft import LoraConfig, get_peft_model

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.domains import domain_class
from dualcl.methods.shared.low_rank import LowRankUpdate, inject

RANK, STEPS, LR = 4, 20, 1e-3
VALUES, TRAJECTORY = 1e-5, 1e-4
SETS = {
    "glyph-concepts": ("data.concepts=2", "data.per_concept=2", "train.batch_size=2", "train.steps=20"),
    "glyphs": (
        "data.train_per_class=8",
        "data.test_per_class=1",
        "train.batch_size=8",
        "train.epochs=8",
        "head.init=linear",
    ),
}
PRESETS = pytest.mark.parametrize("preset", list(SETS))
Measured = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def measured(writes_reference: bool, write_table: Callable[[str, str], None]) -> Iterator[Measured]:
    """What the tests found, by quantity and preset; goes into the README with `--write-reference`."""
    found: Measured = {}
    yield found
    if writes_reference:
        lines = ["| quantity | K, V of the bundled U-Net | Q, K, V of the bundled ViT |", "| --- | ---: | ---: |"]
        lines += [f"| {name} | {row['glyph-concepts']:.1e} | {row['glyphs']:.1e} |" for name, row in found.items()]
        write_table("peft", "\n".join(lines))


def make_domain(preset: str) -> tuple[Any, list[torch.nn.Parameter]]:
    """A fresh domain on the preset's bundled model with its first task begun, and that task's own parameters."""
    resolved = resolve(preset, "lora", ["threads=1", "method.rank=4", *SETS[preset]])
    domain: Any = domain_class(resolved.domain)(resolved, torch.device("cpu"))  # type: ignore[call-arg]
    return domain, domain.begin_task(0)


class Ours:
    """Our factors on all sites of a domain."""

    def __init__(self, preset: str) -> None:
        self.domain, self.own = make_domain(preset)
        self.updates = inject(self.domain.model, self.domain.sites(), RANK)

    def start(self, seed: int, zero: bool = False) -> None:
        """Starts a task with drawn factors, or with A at zero as every task really starts."""
        generator = torch.Generator().manual_seed(seed)
        for update in self.updates.values():
            update.start(generator)
            if not zero:
                with torch.no_grad():
                    update.A.normal_(std=0.05, generator=generator)

    def by_module(self) -> dict[str, list[LowRankUpdate]]:
        found: dict[str, list[LowRankUpdate]] = {}
        for update in self.updates.values():
            found.setdefault(update.site.module_name, []).append(update)
        return found

    def factors(self, of: Callable[[Tensor], Tensor | None] = lambda t: t) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) of every adapted Linear, or what `of` gives of each; blocks on the diagonal where it has several."""
        out = {}
        for name, group in self.by_module().items():
            a, b = [of(u.A) for u in group], [of(u.B) for u in group]
            assert all(t is not None for t in (*a, *b))
            out[name] = (torch.block_diag(*a).detach(), torch.cat(b).detach())  # type: ignore[arg-type]
        return out

    def weights(self) -> dict[str, Tensor]:
        """The Linears' frozen weights."""
        return {name: group[0].site.module.weight.detach().clone() for name, group in self.by_module().items()}

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for u in self.updates.values() for p in (u.A, u.B)]


class Peft:
    """peft's adapter on the same Linears of a domain with the same weights, its factors copied from ours."""

    def __init__(self, preset: str, ours: Ours) -> None:
        self.domain, self.own = make_domain(preset)
        self.names = list(ours.by_module())
        self.wrapped: Any = None
        self.start(ours)

    def start(self, ours: Ours, adapter: str = "default") -> None:
        """Adds an adapter that holds our present factors."""
        factors = ours.factors()
        rank = len(factors[self.names[0]][1])
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=self.names, lora_dropout=0.0, bias="none")
        if self.wrapped is None:
            self.wrapped = get_peft_model(self.domain.model, config, adapter_name=adapter)
        else:
            self.wrapped.add_adapter(adapter, config)
        for name, (a, b) in factors.items():
            layer = self.domain.model.get_submodule(name)
            with torch.no_grad():
                layer.lora_B[adapter].weight.copy_(a)
                layer.lora_A[adapter].weight.copy_(b)

    def hold_blocks(self, ours: Ours) -> None:
        """No gradient off the diagonal blocks, which ours do not have."""
        for name, group in ours.by_module().items():
            mask = torch.block_diag(*[torch.ones_like(u.A) for u in group])
            self.domain.model.get_submodule(name).lora_B["default"].weight.register_hook(mask.mul)

    def factors(self, of: Callable[[Tensor], Tensor | None] = lambda t: t) -> dict[str, tuple[Tensor, Tensor]]:
        out = {}
        for name in self.names:
            layer = self.domain.model.get_submodule(name)
            a, b = of(layer.lora_B["default"].weight), of(layer.lora_A["default"].weight)
            assert a is not None
            assert b is not None
            out[name] = (a.detach(), b.detach())
        return out

    def merge(self) -> dict[str, Tensor]:
        """Merges the adapter and takes it out; the Linears' weights."""
        self.wrapped.merge_and_unload()
        self.wrapped = None
        return {name: self.domain.model.get_submodule(name).weight.detach().clone() for name in self.names}

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for n, p in self.domain.model.named_parameters() if ".lora_" in n]


def output(domain: Any) -> Tensor:
    """The network's output for fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if domain.name == "classification":
            size = domain.backbone.input_size
            found: Tensor = domain.model(torch.randn(3, 3, size, size, generator=generator))
            return found
        text = domain.diffusion.encode_text(["a photo of <c1>", "a photo of red"]).states
        size = domain.diffusion.info.latent_shape[-1]
        latents = torch.randn(2, 4, size, size, generator=generator)
        denoised: Tensor = domain.model(latents, torch.tensor([40, 700]), encoder_hidden_states=text).sample
        return denoised


def worst(ours: dict[str, Any], theirs: dict[str, Any], difference: Callable[[Any, Any], float]) -> float:
    """The largest relative difference over all Linears (and both factors)."""
    assert ours.keys() == theirs.keys()
    pairs = [
        (a, b)
        for name in ours
        for a, b in (
            zip(ours[name], theirs[name], strict=True)
            if isinstance(ours[name], tuple)
            else [(ours[name], theirs[name])]
        )
    ]
    return max(difference(a, b) for a, b in pairs)


def note(measured: Measured, preset: str, found: dict[str, float]) -> None:
    for name, value in found.items():
        measured.setdefault(name, {})[preset] = value


def on_blocks(ours: Ours, factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """peft's factors or gradients without what lies off the diagonal blocks."""
    masks = {n: torch.block_diag(*[torch.ones_like(u.A) for u in g]) for n, g in ours.by_module().items()}
    return {name: (a * masks[name], b) for name, (a, b) in factors.items()}


def check_that_it_can_fail(ours: Ours, theirs: Peft, difference: Callable[[Any, Any], float]) -> None:
    """Two models indeed, and factors that are 1 % off show in the output."""
    assert ours.domain.model is not theirs.domain.model
    layers = [theirs.domain.model.get_submodule(name).lora_B["default"] for name in theirs.names]
    kept = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(1.01)
        assert difference(output(ours.domain), output(theirs.domain)) > VALUES
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.copy_(weight)


@PRESETS
def test_output_loss_gradients_and_merged_weights(
    preset: str, relative_difference: Callable[[Any, Any], float], measured: Measured
) -> None:
    ours = Ours(preset)
    ours.start(1)
    theirs = Peft(preset, ours)
    found = {"output": relative_difference(output(ours.domain), output(theirs.domain))}
    check_that_it_can_fail(ours, theirs, relative_difference)
    batch = next(ours.domain.batches(0, 0))
    losses = [side.domain.loss(batch) for side in (ours, theirs)]
    found["loss"] = relative_difference(*losses)
    for loss in losses:
        loss.backward()
    grads = [side.factors(lambda t: t.grad) for side in (ours, theirs)]
    assert min(float(g.abs().max()) for pair in grads[0].values() for g in pair) > 0
    found["gradients of A and B"] = worst(grads[0], on_blocks(ours, grads[1]), relative_difference)
    found["gradient of what every method learns"] = relative_difference(ours.own[0].grad, theirs.own[0].grad)
    before = ours.weights()
    for update in ours.updates.values():
        update.fold()
    merged = theirs.merge()
    found["merged weights"] = worst(ours.weights(), merged, relative_difference)
    found["merged updates"] = worst(
        {n: w - before[n] for n, w in ours.weights().items()},
        {n: w - before[n] for n, w in merged.items()},
        relative_difference,
    )
    found["output after merging"] = relative_difference(output(ours.domain), output(theirs.domain))
    note(measured, preset, found)
    assert max(found.values()) < VALUES, found


@PRESETS
def test_twenty_steps_of_adam(
    preset: str, relative_difference: Callable[[Any, Any], float], measured: Measured
) -> None:
    ours = Ours(preset)
    ours.start(1, zero=True)
    theirs = Peft(preset, ours)
    theirs.hold_blocks(ours)
    started = ours.factors()
    batches = [batch for _, batch in zip(range(STEPS), ours.domain.batches(0, 0), strict=False)]
    assert len(batches) == STEPS
    losses = []
    for side in (ours, theirs):
        optimizer = torch.optim.Adam([*side.parameters(), *side.own], lr=LR)
        for batch in batches:
            optimizer.zero_grad()
            loss = side.domain.loss(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    ends = ours.factors()
    assert all(float((a - started[n][0]).abs().max()) > 0.5 * LR for n, (a, _) in ends.items())
    found = {
        "20 steps of Adam: factors": worst(ends, theirs.factors(), relative_difference),
        "20 steps of Adam: what the factors moved": worst(
            *(
                {n: tuple(x - y for x, y in zip(f[n], started[n], strict=True)) for n in f}
                for f in (ends, theirs.factors())
            ),
            relative_difference,
        ),
        "20 steps of Adam: losses": relative_difference(torch.tensor(losses[:STEPS]), torch.tensor(losses[STEPS:])),
    }
    note(measured, preset, found)
    assert max(found.values()) < TRAJECTORY, found


@PRESETS
def test_two_tasks_folded_one_after_the_other(
    preset: str, relative_difference: Callable[[Any, Any], float], measured: Measured
) -> None:
    ours = Ours(preset)
    theirs = None
    for task in (1, 2):
        ours.start(task)
        if theirs is None:
            theirs = Peft(preset, ours)
        else:
            theirs.start(ours)
        merged = theirs.merge()
        for update in ours.updates.values():
            update.fold()
    assert theirs is not None
    found = {
        "two tasks folded: weights": worst(ours.weights(), merged, relative_difference),
        "two tasks folded: output": relative_difference(output(ours.domain), output(theirs.domain)),
    }
    note(measured, preset, found)
    assert max(found.values()) < VALUES, found


@PRESETS
def test_adapters_joined_by_rank_are_our_sum_and_added_factors_are_not(
    preset: str, relative_difference: Callable[[Any, Any], float], measured: Measured
) -> None:
    """S = A_1 B_1 + A_2 B_2 is `cat`; `linear` combines the factors apart and has A_1 B_2 + A_2 B_1 on top."""
    ours = Ours(preset)
    ours.start(1)
    theirs = Peft(preset, ours)
    for update in ours.updates.values():
        update.fold()
    ours.start(2)
    theirs.start(ours, "second")
    for update in ours.updates.values():
        update.fold()
    sums = {
        n: torch.cat([u.summed for u in sorted(g, key=lambda u: u.site.start)]) for n, g in ours.by_module().items()
    }
    delta = {}
    for kind in ("cat", "linear"):
        theirs.wrapped.add_weighted_adapter(["default", "second"], [1.0, 1.0], kind, combination_type=kind)
        delta[kind] = {n: theirs.domain.model.get_submodule(n).get_delta_weight(kind).detach() for n in sums}
    cat = worst(sums, delta["cat"], relative_difference)
    norm = {n: float((delta["linear"][n] - s).norm() / s.norm()) for n, s in sums.items()}
    note(measured, preset, {"`cat` of two adapters against our S": cat})
    note(
        measured,
        preset,
        {"`linear` of two adapters against our S: norm of the difference / norm of S": min(norm.values())},
    )
    assert cat < VALUES
    # cross terms of independent factors are as large as the terms themselves
    assert min(norm.values()) > 0.8, norm
    assert max(norm.values()) < 1.3, norm
