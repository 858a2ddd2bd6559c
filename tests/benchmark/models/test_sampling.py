"""Sampling: stock diffusers' images, text projections once per prompt, independence of the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.sampling import _denoise, sample, shared_text
from dualcl.benchmark.models.stable_diffusion import cross_attention_sites
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.methods.shared.low_rank import AdaptedLinear, inject

# isort: split
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

PROMPTS = ["a drawing of a red umbrella on green", "a symbol", "a drawing of a blue cat"]
DEFAULTS = {"scheduler": "ddim", "steps": 3, "guidance": 4.0, "batch_size": 8}


@pytest.fixture(scope="module")
def loaded():
    return load(BaseConfig())


@pytest.fixture
def diffusion(loaded):
    return copy.deepcopy(loaded)


def generators(n, first=0):
    return [torch.Generator().manual_seed(first + k) for k in range(n)]


def images(diffusion, prompts=PROMPTS, first=0, **options):
    return sample(diffusion, prompts, generators(len(prompts), first), **{**DEFAULTS, **options})


def apart(a, b):
    return int((a.int() - b.int()).abs().max())


def sharpen(unet, seed=0, std=0.3):
    """Large weights of K and V, so that the text decides what is drawn even in a model that has learnt little."""
    generator = torch.Generator().manual_seed(seed)
    for site in cross_attention_sites(unet).values():
        with torch.no_grad():
            site.module.weight.add_(std * torch.randn(site.module.weight.shape, generator=generator))


def adapt(diffusion):
    """Low-rank side paths that do something, at every site."""
    updates = inject(diffusion.unet, cross_attention_sites(diffusion.unet), rank=2)
    for i, update in enumerate(updates.values()):
        update.start(torch.Generator().manual_seed(i))
        with torch.no_grad():
            update.A.normal_(generator=torch.Generator().manual_seed(100 + i))


# --- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prediction", "guidance"),
    [
        ("ddim", "v_prediction", 4.0),
        ("dpm", "v_prediction", 4.0),
        ("ddim", "epsilon", 1.0),
        ("dpm", "epsilon", 2.0),
        ("ddim", "v_prediction", 1.0),
    ],
)
def test_images_are_those_of_the_stock_pipeline(diffusion, name, prediction, guidance):
    diffusion.scheduler.register_to_config(prediction_type=prediction)
    sharpen(diffusion.unet)
    kind = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}[name]
    pipe = StableDiffusionPipeline(
        vae=diffusion.vae,
        text_encoder=diffusion.text_encoder,
        tokenizer=diffusion.tokenizer,
        unet=diffusion.unet,
        scheduler=kind.from_config(diffusion.scheduler.config, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        prompt=PROMPTS,
        negative_prompt=["a house"] * 3 if guidance > 1 else None,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=generators(3),
        output_type="np",
    ).images
    ours = images(diffusion, scheduler=name, steps=4, guidance=guidance, negative_prompt="a house")
    assert apart(ours, torch.from_numpy((stock * 255).round()).to(torch.uint8)) <= 1
    assert ours.float().std() > 10
    assert apart(ours, images(diffusion, PROMPTS[::-1], scheduler=name, steps=4, guidance=guidance)) > 10


def test_no_clipping_of_latents_even_when_the_model_says_so(diffusion):
    free = images(diffusion)
    diffusion.scheduler.register_to_config(clip_sample=True, clip_sample_range=0.1)
    assert torch.equal(images(diffusion), free)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_an_image_does_not_depend_on_its_batch(diffusion, scheduler):
    sharpen(diffusion.unet)
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[2]]
    together = images(diffusion, prompts, scheduler=scheduler, batch_size=5)
    alone = images(diffusion, prompts, scheduler=scheduler, batch_size=1)
    assert apart(together, alone) <= 1
    assert apart(together[0], together[3]) > 3  # the same prompt, another seed
    assert apart(images(diffusion, prompts[3:], first=3, scheduler=scheduler), together[3:]) <= 1


def test_the_negative_prompt_is_that_of_the_unconditional_pass(diffusion):
    sharpen(diffusion.unet)
    plain = images(diffusion, guidance=3.0)
    assert apart(images(diffusion, guidance=3.0, negative_prompt=PROMPTS[0])[1:], plain[1:]) > 10
    # where both passes have one prompt, guidance is without effect
    same = images(diffusion, PROMPTS[:1], guidance=3.0, negative_prompt=PROMPTS[0])
    assert apart(same, images(diffusion, PROMPTS[:1], guidance=1.0)) <= 1


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 3), (0.0, 3), (1.5, 6)])
def test_without_guidance_there_is_no_unconditional_pass(diffusion, guidance, rows):
    seen = []
    diffusion.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    images(diffusion, guidance=guidance)
    assert seen == [rows] * 3


def test_the_global_random_state_neither_matters_nor_changes(diffusion):
    torch.manual_seed(1)
    first, state = images(diffusion, scheduler="dpm"), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(images(diffusion, scheduler="dpm"), first)


def test_autocast_of_the_caller_is_used(diffusion):
    dtypes = set()
    diffusion.unet.mid_block.attentions[0].proj_in.register_forward_hook(lambda m, a, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = images(diffusion)
    assert dtypes == {torch.bfloat16}
    assert (mixed.float() - images(diffusion).float()).abs().mean() < 8


def test_no_prompt_no_image(diffusion):
    assert images(diffusion, []).shape == (0, 32, 32, 3)
    with pytest.raises(ValueError, match="3 prompts but 2"):
        sample(diffusion, PROMPTS, generators(2), **DEFAULTS)


# --- text projections -----------------------------------------------------------------------------------------------


def count_projections(unet):
    counts = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):

            def hook(module, args, out, name=name):
                counts.setdefault(name, []).append(len(args[0]))

            module.register_forward_hook(hook)
    return counts


@pytest.mark.parametrize("adapted", [False, True])
def test_projections_run_once_per_prompt_set_and_change_nothing(diffusion, adapted):
    sharpen(diffusion.unet)
    if adapted:
        adapt(diffusion)
    counts = count_projections(diffusion.unet)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    ours = images(diffusion, prompts)
    assert len(counts) == 14
    # one call for all steps, with a row for each prompt and one for the unconditional pass
    assert all(rows == [3] for rows in counts.values())

    noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators(4)])
    with torch.no_grad():
        text = diffusion.encode_text([""] * 4 + prompts)
        scheduler = diffusion.sampler("ddim", 3)
        direct = _denoise(diffusion, noise, text, scheduler, 4.0, generators(4))
    assert all(rows == [3, 8, 8, 8] for rows in counts.values())
    assert apart(ours, diffusion.decode(direct)) <= 1


def test_projections_run_again_for_other_prompts_only(diffusion):
    counts = count_projections(diffusion.unet)
    images(diffusion, [PROMPTS[0]] * 4 + [PROMPTS[1]] * 2, batch_size=2)
    assert all(rows == [2, 2] for rows in counts.values())


@pytest.mark.parametrize("adapted", [False, True])
def test_the_model_is_as_before_also_after_an_error(diffusion, adapted):
    if adapted:
        adapt(diffusion)
    before = dict(diffusion.unet.named_modules())
    state = {k: v.clone() for k, v in diffusion.unet.state_dict().items()}
    images(diffusion)

    def fail(module, args, out):
        raise KeyboardInterrupt

    handle = diffusion.unet.conv_out.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        images(diffusion)
    handle.remove()
    after = dict(diffusion.unet.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())
    assert all(torch.equal(v, state[k]) for k, v in diffusion.unet.state_dict().items())
    assert any(isinstance(m, AdaptedLinear) for m in after.values()) == adapted


def test_self_attention_is_left_alone(diffusion):
    inside = []
    with shared_text(diffusion.unet, diffusion.text_only) as projections:
        inside = [name for name, m in diffusion.unet.named_modules() if m in projections]
    assert len(inside) == 14
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in inside)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_weights_are_named(diffusion, value):
    site = next(iter(cross_attention_sites(diffusion.unet).values()))
    nn.init.constant_(site.module.weight, value)
    with pytest.raises(UserError, match=r"red umbrella.*diverged") as error:
        images(diffusion)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", [0, 1000])
def test_steps_out_of_range(diffusion, steps):
    with pytest.raises(UserError, match=f"from 1 to 999, got {steps}"):
        images(diffusion, steps=steps)
    assert diffusion.sampler("ddim", 999).timesteps.max() == 999
