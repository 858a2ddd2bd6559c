"""CIDM's routing: toy cases with their numbers, and what must hold of a run."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Site
from dualcl.benchmark.core.errors import UserError
from dualcl.methods.cidm import CIDM, CIDMConfig, route

#: keys of two concepts, and a text whose cosines to them are 0.6 and 0.3 in one place and less in the other
KEYS = torch.eye(3)[:2, None]
TEXT = torch.tensor([[[1.2, 0.6, 2 * math.sqrt(1 - 0.45)], [0.1, -0.2, 5.0]]])
W = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
OWN = {0: torch.eye(3)[:1], 1: torch.eye(3)[1:2]}


def toy(words: Any = OWN, rows: int = 1, **settings: Any) -> Any:
    """The method on one Linear of 3 inputs and 2 outputs; `words`: what a concept's tokens and the end token are."""
    model = nn.Sequential(OrderedDict(k=nn.Linear(3, 2, bias=False))).requires_grad_(False)
    model.k.weight.copy_(W)
    site = Site("k", "k", model.k, 0, 2)
    domain: Any = SimpleNamespace(attach=lambda method: None, sites=lambda: {"k": site}, model=model)
    domain.concept_inputs = lambda task, own=False: torch.cat([words[task], torch.ones(1, 3)])
    domain.token_rows = lambda task: (torch.zeros(rows, 4),)
    return CIDM(CIDMConfig(rank=1, **settings), domain, 2, 0)


def taught(method: Any, task: int, a: list[float], b: list[float]) -> None:
    method.begin_task(task)
    with torch.no_grad():
        method.updates["k"].A.copy_(torch.tensor(a)[:, None])
        method.updates["k"].B.copy_(torch.tensor([b]))
    method.end_task(task)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [0.970143, 0.242536]),
        ({"reference_quirks": ("code_weights",)}, [0.941176, 0.058824]),
        ({"reference_quirks": ("code_weights",), "alpha": 0.8}, [0.752941, 0.047059]),
        ({"threshold": 0.5}, [1.0, 0.0]),
        ({"threshold": 0.7}, [0.0, 0.0]),
    ],
)
def test_a_prompt_weighs_concepts_by_its_nearest_word(settings: Any, weights: list[float]) -> None:
    found = route(TEXT, KEYS, CIDMConfig(**settings))
    torch.testing.assert_close(found, torch.tensor([weights]), rtol=0, atol=1e-6)
    other = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(route(torch.cat([other, TEXT]), KEYS, CIDMConfig(**settings))[1:], found)


def test_words_that_point_away_count_nothing_but_in_the_code() -> None:
    away = torch.tensor([[[-0.6, 0.3, math.sqrt(1 - 0.45)]]])
    assert route(away, KEYS, CIDMConfig()).tolist() == [[0.0, 1.0]]
    code = route(away, KEYS, CIDMConfig(reference_quirks=("code_weights",)))
    torch.testing.assert_close(code, torch.tensor([[0.941176, 0.058824]]), rtol=0, atol=1e-6)
    assert route(-TEXT[:, :1], KEYS, CIDMConfig()).tolist() == [[0.0, 0.0]]


def test_concepts_that_are_alike_are_counted_more_than_once_together() -> None:
    """The weights' squares add up to one, not they: ten alike get 0.316 each, a tenth in the code."""
    keys = torch.eye(3)[:1, None].expand(10, 1, 3)
    text = route(TEXT, keys, CIDMConfig())
    code = route(TEXT, keys, CIDMConfig(reference_quirks=("code_weights",)))
    torch.testing.assert_close(text, torch.full((1, 10), 10**-0.5))
    torch.testing.assert_close(code, torch.full((1, 10), 0.1))


def test_one_concept_is_its_own_lora_and_two_are_weighed() -> None:
    method = toy()
    site, layer = method.updates["k"].site, method.domain.model
    taught(method, 0, [1.0, 2], [1.0, 0, 1])
    one, two = torch.tensor([[1.0, 0, 1], [2, 0, 2]]), torch.tensor([[0.0, 3, 0], [0, -3, 0]])
    torch.testing.assert_close(layer(TEXT), TEXT @ (W + one).T)
    method.begin_task(1)
    assert torch.equal(layer(TEXT), TEXT @ W.T)  # learnt by itself
    taught(method, 1, [1.0, -1], [0.0, 3, 0])
    torch.testing.assert_close(layer(TEXT), TEXT @ (W + 0.9701425 * one + 0.2425356 * two).T)
    assert torch.equal(site.weight, W)
    assert method.facts == {"own_weight": pytest.approx(0.948683), "all_weights": pytest.approx(1.264911)}
    assert method.stored_parameters() == 2 * (2 + 3) + 2 * 3


def test_the_mean_of_a_concepts_words_is_its_key_each_of_them_in_the_code() -> None:
    words = {0: torch.tensor([[2.0, 0, 0], [0, 0.5, 0]])}
    method = toy(words, rows=2)
    taught(method, 0, [1.0, 2], [1.0, 0, 1])
    torch.testing.assert_close(method.keys(), torch.tensor([[[0.5**0.5, 0.5**0.5, 0]]]))
    method = toy(words, rows=2, reference_quirks=("code_weights",))
    taught(method, 0, [1.0, 2], [1.0, 0, 1])
    assert torch.equal(method.keys(), torch.eye(3)[None, :2])
    assert method.stored_parameters() == 2 + 3 + 2 * 3


@pytest.mark.parametrize(
    ("settings", "penalty"),
    [
        ({"gamma_1": 1.0}, 12.0),
        ({"gamma_1": 0.1, "subspace": "inner"}, 0.1),
        ({"gamma_1": 1.0, "reference_quirks": ("means",)}, 3.0),
        ({"gamma_1": 0.1, "reference_quirks": ("means", "pull_to_one")}, 0.7),
    ],
)
def test_the_overlap_of_two_updates(settings: Any, penalty: float) -> None:
    method = toy(**settings)
    method.begin_task(0)
    assert method.penalty() is None
    taught(method, 0, [1.0, 2], [1.0, 0, 0])
    method.begin_task(1)
    with torch.no_grad():
        method.updates["k"].A.copy_(torch.tensor([[3.0], [-1]]))
    value = method.penalty()
    assert value.item() == pytest.approx(penalty)
    (grad,) = torch.autograd.grad(value, [method.updates["k"].A])
    assert grad.abs().max() > 0


def drawn(work: Any, task: int) -> None:
    work.begin(task)
    with torch.no_grad():
        for i, update in enumerate(work.method.updates.values()):
            update.A.copy_(torch.randn(update.A.shape, generator=torch.Generator().manual_seed(100 * task + i)))
    work.method.end_task(task)


def features(work: Any, prompt: str) -> Tensor:
    states: Tensor = work.domain.diffusion.encode_text([work.domain.tokens.expand(prompt)]).states
    return states


@torch.no_grad()
def test_a_prompt_without_concepts_is_the_pretrained_models(concepts: Callable[..., Any], tmp_path: Path) -> None:
    work = concepts("cidm", tmp_path, "method.threshold=0.9999")  # cosines of its texts are near 1
    sites = {name: site.module for name, site in work.domain.sites().items()}
    drawn(work, 0)
    drawn(work, 1)
    own = [work.domain.fill("a photo of {token}", j) for j in range(2)]
    for i, (name, linear) in enumerate(sites.items()):
        now = work.domain.model.get_submodule(name)
        for plain in ("a photo of a red star", ""):
            x = features(work, plain)
            assert torch.equal(now(x), linear(x))
        for j, prompt in enumerate(own):
            x = features(work, prompt)
            alone = linear(x) + x @ (work.method.factor("A", j, i) @ work.method.factor("B", j, i)).T
            torch.testing.assert_close(now(x), alone, rtol=1e-4, atol=1e-4)
            assert (alone - linear(x)).abs().max() > 0.1
    assert work.method.facts["own_weight"] == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_without_a_threshold_a_concept_gets_some_of_all_others(concepts: Callable[..., Any], tmp_path: Path) -> None:
    work = concepts("cidm", tmp_path)
    drawn(work, 0)
    assert work.method.facts == {"own_weight": pytest.approx(1), "all_weights": pytest.approx(1)}
    drawn(work, 1)
    weights = route(features(work, work.domain.fill("a photo of {token}", 0)), work.method.keys(), work.method.config)
    assert weights[0, 0] > weights[0, 1] > 0
    assert weights.square().sum().item() == pytest.approx(1)


def test_parts_of_projections_and_other_texts_are_refused() -> None:
    for stop, width, message in ((1, 3, "k is a part"), (2, 4, r"these read \[3, 4\]")):
        model = nn.Sequential(OrderedDict(k=nn.Linear(3, 2), v=nn.Linear(width, 2)))
        sites = {"k": Site("k", "k", model.k, 0, stop), "v": Site("v", "v", model.v, 0, 2)}
        domain: Any = SimpleNamespace(attach=lambda method: None, sites=lambda sites=sites: sites, model=model)
        with pytest.raises(UserError, match=f"{message}.*; choose another model"):
            CIDM(CIDMConfig(rank=1), domain, 2, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gamma_1": -1.0}, "method.gamma_1 must not be negative, got -1.0"),
        ({"subspace": "both"}, "method.subspace must be outer or inner, got 'both'"),
        ({"threshold": 1.0}, "method.threshold must be from 0 to below 1, got 1.0"),
        ({"alpha": 0.0}, "method.alpha must be positive, got 0.0"),
        ({"reference_quirks": ("means",)}, "the quirk means is for a method.gamma_1 above 0"),
        ({"one_adapter": True}, "method.one_adapter is an ablation of lora and clora; cidm has none"),
    ],
)
def test_wrong_values_are_named(given: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        CIDMConfig(**given)
    assert str(error.value) == message
