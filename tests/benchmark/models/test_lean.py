"""The lean U-Net beside the plain one: equal bits, fewer bytes kept for the backward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import UNet2DConditionModel

from dualcl.benchmark.models import lean as lean_module
from dualcl.benchmark.models.lean import LARGE, LeanConv2d, LeanGEGLU, NormSilu, make_lean
from dualcl.benchmark.models.stable_diffusion import cross_attention_sites


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lean_module, "LARGE", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain() -> UNet2DConditionModel:
    """A U-Net with all kinds of blocks of Stable Diffusion."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=4,
        )
    return unet.eval().requires_grad_(False)


def lean_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    own = copy.deepcopy(unet)
    make_lean(own)
    return own


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, 7, 24, generator=generator).requires_grad_(True)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.tensor([3, 700][:batch]), text


def gradients(unet: Any, trained: dict[str, nn.Parameter], autocast: bool = False) -> list[Tensor]:
    """Loss, gradient of the text, and those of the trained weights."""
    for parameter in trained.values():
        parameter.requires_grad_(True)
    noisy, timesteps, text = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = unet(noisy, timesteps, encoder_hidden_states=text).sample.float().square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, [text, *trained.values()])]


def sites_of(unet: Any) -> dict[str, nn.Parameter]:
    return {name: site.module.weight for name, site in cross_attention_sites(unet).items()}


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 2
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_of_the_sites_are_the_same_bits(plain: UNet2DConditionModel, autocast: bool) -> None:
    lean, reference = lean_copy(plain), copy.deepcopy(plain)
    assert_same_bits(gradients(lean, sites_of(lean), autocast), gradients(reference, sites_of(reference), autocast))


def test_gradients_of_all_weights_are_the_same_bits(plain: UNet2DConditionModel) -> None:
    lean, reference = lean_copy(plain), copy.deepcopy(plain)
    assert_same_bits(
        gradients(lean, dict(lean.named_parameters())), gradients(reference, dict(reference.named_parameters()))
    )


def test_it_goes_together_with_gradient_checkpointing(plain: UNet2DConditionModel) -> None:
    lean, reference = lean_copy(plain), copy.deepcopy(plain)
    lean.enable_gradient_checkpointing()
    assert_same_bits(gradients(lean, sites_of(lean)), gradients(reference, sites_of(reference)))


def test_images_without_gradient_are_the_same_bits(plain: UNet2DConditionModel) -> None:
    noisy, timesteps, text = inputs()
    with torch.no_grad():
        ours, theirs = (unet(noisy, timesteps, encoder_hidden_states=text).sample for unet in (lean_copy(plain), plain))
    assert torch.equal(ours, theirs)


def test_names_and_weights_stay(plain: UNet2DConditionModel) -> None:
    lean = lean_copy(plain)
    kinds = {type(m) for m in lean.modules()}
    assert {LeanConv2d, NormSilu, LeanGEGLU} <= kinds
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(lean.state_dict().values(), plain.state_dict().values(), strict=True))


def kept_bytes(unet: Any) -> int:
    """What the graph of a forward pass holds when it is over."""
    for parameter in sites_of(unet).values():
        parameter.requires_grad_(True)
    noisy, timesteps, text = inputs()
    with profile(profile_memory=True) as seen:
        loss = unet(noisy, timesteps, encoder_hidden_states=text).sample.mean()
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


def test_the_graph_holds_less(plain: UNet2DConditionModel) -> None:
    ours, theirs = kept_bytes(lean_copy(plain)), kept_bytes(copy.deepcopy(plain))
    assert 0 < ours < 0.75 * theirs


def test_small_results_are_kept(plain: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_module, "LARGE", LARGE)
    assert kept_bytes(lean_copy(plain)) == kept_bytes(copy.deepcopy(plain))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_frozen_convolution_whose_input_has_the_shape_of_its_weight(stride: int) -> None:
    torch.manual_seed(0)
    lean = LeanConv2d(3, 3, 3, stride=stride, padding=1).double().requires_grad_(False)
    reference = nn.Conv2d(3, 3, 3, stride=stride, padding=1).double().requires_grad_(False)
    reference.load_state_dict(lean.state_dict())
    # a bias may be trained beside a frozen weight
    lean.bias.requires_grad_(True)  # type: ignore[union-attr]
    reference.bias.requires_grad_(True)  # type: ignore[union-attr]
    x = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    for conv in (lean, reference):
        conv.gradients = torch.autograd.grad(conv(x).square().sum(), [x, conv.bias])
    torch.testing.assert_close(lean.gradients, reference.gradients, rtol=1e-12, atol=1e-12)
