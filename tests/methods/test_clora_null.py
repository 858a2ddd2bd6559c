"""Updates that do not read what earlier prompts give: directions by hand, on one Linear, and on a real pipeline."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Site
from dualcl.benchmark.core.errors import UserError
from dualcl.methods.clora_null import CLoRANull, CLoRANullConfig, leading

#: what each prompt gives, two positions of width 4; all share the start token's
INPUTS = {
    "": [[3.0, 0, 0, 0], [3.0, 0, 0, 0]],
    "a": [[3.0, 0, 0, 0], [0, 2.0, 0, 0]],
    "b": [[3.0, 0, 0, 0], [0, 1.0, 1.0, 0]],
    "c": [[3.0, 0, 0, 0], [0, 1.0, 0, 0]],
}


def toy(prompts: Sequence[str], **settings: Any) -> CLoRANull:
    """The method on one Linear (3, 4) whose weight is drawn; its tasks are the prompts, a|b: a with caption b."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(k=nn.Linear(4, 3, bias=False))).requires_grad_(False)
    site = Site("k", "k", model.k, 0, 3)  # type: ignore[arg-type]
    domain: Any = SimpleNamespace(attach=lambda method: None, sites=lambda: {"k": site}, model=model)
    domain.texts = lambda task: tuple(prompts[task].split("|"))
    domain.prompt_inputs = lambda given: torch.cat([torch.tensor(INPUTS[p]) for p in given])
    domain.unconditional = ""
    domain.common_inputs = lambda n, whole: torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return CLoRANull(CLoRANullConfig(rank=2, **settings), domain, len(prompts), 0)


def start(method: CLoRANull, task: int) -> Any:
    method.begin_task(task)
    method.prepare(task)
    return method.updates["k"]


def step(method: CLoRANull, seed: int = 0) -> None:
    """A step of the optimiser that goes anywhere."""
    generator = torch.Generator().manual_seed(seed)
    for update in method.updates.values():
        for factor in (update.A, update.B):
            factor.data += torch.randn(factor.shape, generator=generator)
    method.stepped(False)


def test_directions_are_the_fewest_that_hold_the_share() -> None:
    gram = torch.diag(torch.tensor([1.0, 89.0, 10.0, 0.0], dtype=torch.float64))
    for share, wanted in ((0.0, []), (0.5, [1]), (0.89, [1]), (0.9, [1, 2]), (0.99, [1, 2]), (1.0, [1, 2, 0])):
        found = leading(gram, share).abs()
        torch.testing.assert_close(found, torch.eye(4, dtype=torch.float64)[:, wanted], msg=f"share {share}")


def test_what_earlier_prompts_are_given_stays_and_the_own_one_moves() -> None:
    method = toy(("a", "b"))
    update = start(method, 0)
    before = update.site.weight.clone()
    step(method)
    method.end_task(0)
    empty, a, b = (torch.tensor(INPUTS[p]) for p in ("", "a", "b"))
    moved = update.site.weight - before
    torch.testing.assert_close(empty @ moved.T, torch.zeros(2, 3), rtol=0, atol=1e-6)
    assert float((a[1] @ moved.T).norm()) > 0.1
    learnt = update.site.weight.clone()
    update = start(method, 1)
    step(method, 1)
    method.end_task(1)
    moved = update.site.weight - learnt
    for held in (empty, a):
        torch.testing.assert_close(held @ moved.T, torch.zeros(2, 3), rtol=0, atol=1e-5)
    # of [0, 1, 1, 0] the second number is a's
    assert float((b[1] @ moved.T).norm()) > 0.1
    torch.testing.assert_close(b[1] @ moved.T, torch.tensor([0.0, 0, 1, 0]) @ moved.T, rtol=0, atol=1e-5)


def test_b_starts_as_large_on_the_own_prompt_as_without_the_projection() -> None:
    method = toy(("a", "b"))
    start(method, 0)
    assert method.diagnostics()["gain"] == pytest.approx((13 / 4) ** 0.5)  # 3^2 + 2^2, of which 2^2 is outside
    method.end_task(0)
    method.begin_task(1)
    plain = method.updates["k"].B.clone()
    method.prepare(1)
    assert method.diagnostics()["held_directions"] == 2
    scaled = method.updates["k"].B
    torch.testing.assert_close(scaled[:, 2:], plain[:, 2:] * 11**0.5)  # 3^2 + 1 + 1, of which 1 is outside
    torch.testing.assert_close(scaled[:, :2], torch.zeros(2, 2), rtol=0, atol=1e-6)


def test_a_negative_prompt_is_held_beside_the_empty_one() -> None:
    method = toy(("a",))
    method.domain.unconditional = "b"  # type: ignore[attr-defined]
    update = start(method, 0)
    assert method.diagnostics()["held_directions"] == 2
    before = update.site.weight.clone()
    step(method)
    method.end_task(0)
    moved = update.site.weight - before
    for prompt in ("", "b"):
        torch.testing.assert_close(torch.tensor(INPUTS[prompt]) @ moved.T, torch.zeros(2, 3), rtol=0, atol=1e-6)
    assert float(moved.norm()) > 0.1


def refused(*texts: str) -> None:
    """The second task is, as the first one's texts use all that its own do."""
    method = toy(texts)
    start(method, 0)
    method.end_task(0)
    method.begin_task(1)
    with pytest.raises(UserError, match="task 2: earlier prompts use all"):
        method.prepare(1)


def test_a_prompt_that_gives_nothing_new_is_refused() -> None:
    refused("a", "c")
    method = toy(("a", "c"), epsilon=0.0)  # nothing is held: plain LoRA
    start(method, 0)
    method.end_task(0)
    assert start(method, 1) is not None
    assert method.diagnostics()["gain"] == 1.0


def test_captions_of_earlier_photographs_are_held_too() -> None:
    method = toy(("c", "b"))
    start(method, 0)
    method.end_task(0)
    start(method, 1)  # the prompt c leaves something of b free, c with the caption b nothing
    refused("c|b", "b")


def test_drift_under_captions_is_that_of_all_updates_so_far() -> None:
    method = toy(("a", "b"), common=3.0, captions=5)
    pretrained = method.updates["k"].site.weight.clone()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for task in range(2):
        update = start(method, task)
        step(method, task)
        now = method.penalty()
        assert now is not None
        moved = x @ (update.site.weight + update.A @ update.B - pretrained).T
        torch.testing.assert_close(now, 3 * moved.square().sum() / (x @ pretrained.T).square().sum())
        (gradient,) = torch.autograd.grad(now, [update.B])
        wanted = 3 * update.A.T @ (moved.T @ x) * 2 / (x @ pretrained.T).square().sum()
        torch.testing.assert_close(gradient, wanted)
        method.end_task(task)
    assert toy(("a",), common=0.0).penalty() is None


@pytest.mark.parametrize(
    "given",
    [{"epsilon": -0.1}, {"epsilon": 1.1}, {"common": -1.0}, {"captions": 0}, {"align": True}, {"one_adapter": True}],
)
def test_settings_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"method.{next(iter(given))} "):
        CLoRANullConfig(**given)


# --- in a run ---------------------------------------------------------------------------------------------------------


def weights(work: Any) -> list[Tensor]:
    return [u.site.weight.clone() for u in work.method.updates.values()]


def test_nothing_held_is_lora_bit_for_bit(
    concepts: Callable[..., Any], empty_record: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    done = []
    for name, *sets in (("lora",), ("clora_null", "method.epsilon=0", "method.common=0")):
        work = concepts(name, tmp_path / name, *sets)
        work.execute(empty_record())
        done.append(weights(work))
    assert all(torch.equal(a, b) for a, b in zip(*done, strict=True))


def test_a_finished_concept_keeps_what_its_prompts_feed_to_keys_and_values(
    concepts: Callable[..., Any], tmp_path: Path
) -> None:
    drift = {}
    for name, *sets in (("lora",), ("clora_null", "method.epsilon=1.0")):
        work = concepts(name, tmp_path / name, "method.lr=0.1", *sets)
        domain, method = work.domain, work.method
        for task in range(2):
            domain.begin_task(task)
            method.begin_task(task)
            method.prepare(task)
            if task == 1:
                before, own = weights(work), domain.prompt_inputs(domain.prompts(1))
                first = domain.prompt_inputs([*domain.prompts(0), ""])
            generator = torch.Generator().manual_seed(task)
            for update in method.updates.values():
                for factor in (update.A, update.B):
                    factor.data += 0.1 * torch.randn(factor.shape, generator=generator)
            method.stepped(True)
            method.end_task(task)
        moves = [after - w for after, w in zip(weights(work), before, strict=True)]
        drift[name] = [float(sum((x @ m.T).square().sum() for m in moves)) ** 0.5 for x in (first, own)]
    assert drift["lora"][0] > 0.1 * drift["lora"][1]
    assert drift["clora_null"][0] < 1e-4 * drift["clora_null"][1]
