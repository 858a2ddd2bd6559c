"""Text-to-image models: sites, targets, what is frozen, precision, gradient checkpointing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.domains.concept_batches import ConceptBatch, Entries
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.stable_diffusion import StableDiffusion, cross_attention_sites
from dualcl.benchmark.models.text_to_image import BaseConfig, Text
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.runner import Run
from dualcl.benchmark.runs.runner import run as run_whole


@pytest.fixture(scope="module")
def bundled() -> StableDiffusion:
    return load(BaseConfig())


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_sites_are_k_and_v_of_every_cross_attention_and_nothing_else(
    bundled: StableDiffusion, loaded_sd: Any
) -> None:
    from diffusers.models.attention_processor import Attention

    for model, layers, width in ((bundled, 7, 128), (loaded_sd, 4, 24)):
        cross = {
            name: module
            for name, module in model.unet.named_modules()
            if isinstance(module, Attention) and name.endswith("attn2")
        }
        assert len(cross) == layers
        sites = cross_attention_sites(model.unet)
        assert list(sites) == [f"{name}.{leaf}" for name in cross for leaf in ("to_k", "to_v")]
        for name, module in cross.items():
            for leaf in ("to_k", "to_v"):
                site = sites[f"{name}.{leaf}"]
                assert site.module is getattr(module, leaf)
                assert (site.d_out, site.d_in) == (module.inner_dim, width)
                assert site.module.bias is None


def test_what_the_domain_lets_methods_train(sd_run: Callable[..., Any], loaded_sd: Any) -> None:
    domain = sd_run("textual_inversion").domain
    sites = cross_attention_sites(loaded_sd.unet)
    full = domain.full_parameters()
    assert set(full) == {f"{name}.weight" for name in sites}
    assert sum(p.numel() for p in full.values()) == sum(s.d_out * s.d_in for s in sites.values())
    whole = sum(p.numel() for p in loaded_sd.unet.parameters())
    assert sum(p.numel() for p in domain.network_parameters().values()) == whole == domain.adapted_parameters()
    domain.begin_task(0)
    domain.begin_task(1)
    assert domain.stored_parameters() == 2 * loaded_sd.text_encoder.config.hidden_size


def test_all_parts_are_frozen_and_hashed(loaded_sd: Any, sd_folder: Path, tmp_path: Path) -> None:
    for part in (loaded_sd.unet, loaded_sd.vae, loaded_sd.text_encoder):
        assert not any(p.requires_grad for p in part.parameters())
        assert not any(m.training for m in part.modules())
    info = loaded_sd.info
    assert (info.name, info.weights) == ("random-sd", "local directory")
    assert (info.image_size, info.latent_shape[-1], info.prediction_type) == (16, 8, "epsilon")
    again = load(BaseConfig(model=str(sd_folder)))
    assert again.info == info
    with torch.no_grad():
        again.unet.conv_in.bias[0] += 1e-6
    changed = StableDiffusion(
        again.tokenizer, again.text_encoder, again.unet, again.vae, again.scheduler, "x", "y"
    ).info
    assert changed.weights_sha256 != info.weights_sha256
    assert [p for p in info.parts if info.parts[p] != changed.parts[p]] == ["unet"]


def test_images_survive_encoding_and_decoding_as_the_vae_alone_does_it(loaded_sd: Any) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = loaded_sd.encode_images(pixels)
    posterior = loaded_sd.vae.encode(pixels).latent_dist
    scale = loaded_sd.vae.config.scaling_factor
    assert torch.equal(mean, posterior.mean * scale)
    assert torch.equal(std, posterior.std * scale)
    images = loaded_sd.decode(mean)
    assert (images.dtype, images.shape) == (torch.uint8, (2, 16, 16, 3))
    plain = (loaded_sd.vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1) * 255
    assert (images.permute(0, 3, 1, 2) - plain).abs().max() <= 0.51


# --- training ---------------------------------------------------------------------------------------------------------


def with_prediction(diffusion: Any, kind: str) -> Any:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(diffusion.scheduler.config, prediction_type=kind)
    parts = (diffusion.tokenizer, diffusion.text_encoder, diffusion.unet, diffusion.vae, scheduler)
    return StableDiffusion(*parts, "copy", "copy")


def first_batch(sd_run: Callable[..., Any], diffusion: Any, kind: str) -> tuple[Any, Any]:
    """The domain with its first task begun, and that task's first batch."""
    run = sd_run("finetune", diffusion=with_prediction(diffusion, kind))
    run.begin(0)
    return run.domain, next(run.domain.batches(0, 0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_targets_are_what_the_noise_schedule_says(sd_run: Callable[..., Any], diffusion: Any, kind: str) -> None:
    domain = sd_run("finetune", diffusion=with_prediction(diffusion, kind)).domain
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(6, 4, 8, 8, generator=generator)
    # without a spread, what was noised is known
    entries = Entries(clean, torch.zeros_like(clean), [("a symbol",)] * 6)
    batch = domain._noised([(entries, torch.ones(6))], torch_generator(0, "test"))
    config = domain.diffusion.scheduler.config
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)[batch.timesteps][:, None, None, None]
    assert len(set(batch.timesteps.tolist())) > 1
    noise = (batch.noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
    assert abs(noise.std() - 1) < 0.1
    wanted = noise if kind == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * clean
    assert torch.allclose(batch.target.double(), wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_errors_are_of_the_noise_whatever_the_network_predicts(
    sd_run: Callable[..., Any], diffusion: Any, kind: str
) -> None:
    domain, batch = first_batch(sd_run, diffusion, kind)
    predicted = domain.predictions(batch, ["a symbol"])[:, 0]
    kept = domain.diffusion.scheduler.alphas_cumprod[batch.timesteps][:, None, None, None]

    def noise(x: torch.Tensor) -> torch.Tensor:
        return x if kind == "epsilon" else kept.sqrt() * x + (1 - kept).sqrt() * batch.noisy

    wanted = (noise(predicted) - noise(batch.target)).square().mean((1, 2, 3))
    torch.testing.assert_close(domain.errors(batch, ["a symbol"])[:, 0], wanted)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_mean_squared_error_of_the_unets_prediction(
    sd_run: Callable[..., Any], diffusion: Any, kind: str
) -> None:
    domain, batch = first_batch(sd_run, diffusion, kind)
    context = domain.diffusion.encode_text(batch.prompts).states
    predicted = domain.model(batch.noisy, batch.timesteps, encoder_hidden_states=context).sample
    assert torch.allclose(domain.loss(batch), (predicted - batch.target).square().mean(), rtol=1e-6)
    # the samples one by one, for methods that need each one's gradient
    alone = torch.stack([domain.loss(one) for one in domain.samples(batch)])
    assert torch.allclose(alone.mean(), domain.loss(batch), rtol=1e-6)


@pytest.mark.parametrize("method", ["finetune", "clora", "textual_inversion", "custom_diffusion"])
def test_nothing_is_ever_in_training_mode_and_gradients_reach_what_is_declared_only(
    sd_run: Callable[..., Any], empty_record: Callable[[], dict[str, Any]], method: str
) -> None:
    run = sd_run(method)
    diffusion, seen = run.domain.diffusion, []

    def hook(module: nn.Module, inputs: Any) -> None:
        seen.append(module.training)

    parts = (diffusion.unet, diffusion.text_encoder, diffusion.vae)
    for part in parts:
        for module in part.modules():
            module.register_forward_pre_hook(hook)
    grads: list[dict[str, bool]] = []
    real = run.step

    def step(*args: Any) -> Any:
        result = real(*args)
        named = {f"{i}.{n}": p for i, part in enumerate(parts) for n, p in part.named_parameters()}
        grads.append({n: p.grad is not None for n, p in named.items()})
        return result

    run.step = step
    run.execute(empty_record())
    assert len(seen) > 1000
    assert not any(seen)
    assert len(grads) == 4
    for i, found in enumerate(grads):
        got = {name for name, there in found.items() if there}
        rows = {n for n in got if n.startswith("1.")}
        assert len(rows) == 1
        assert rows.pop().endswith(f"rows.{i // 2}")
        unet = {n for n in got if n.startswith("0.")}
        assert {n for n in got if n.startswith("2.")} == set()
        assert all(".attn2.to_k." in n or ".attn2.to_v." in n for n in unet)
        suffixes = {"finetune": {"weight"}, "custom_diffusion": {"weight"}, "clora": {"A", "B"}}.get(method, set())
        assert {n.rpartition(".")[2] for n in unet} == suffixes
        assert len(unet) == 8 * len(suffixes)


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_photographs_are_encoded_once_per_task_and_mirrored_ones_are_entries(
    sd_run: Callable[..., Any], empty_record: Callable[[], dict[str, Any]], augment: str
) -> None:
    run = sd_run("clora", f"input.augment={augment}", "train.steps=4")
    domain, sizes = run.domain, []
    real = domain.diffusion.vae.encode

    def encode(pixels: torch.Tensor) -> Any:
        sizes.append(len(pixels))
        return real(pixels)

    domain.diffusion.vae.encode = encode
    run.execute(empty_record())
    each = 6 if augment == "flip" else 3
    assert sum(sizes) == 2 * each
    entries = domain._training_entries(1)
    assert sum(sizes) == 2 * each
    assert len(entries) == each == domain._size(1)
    pixels = domain.pixels(1).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.allclose(entries.mean[:3], domain.diffusion.encode_images(pixels)[0], atol=1e-6)
    if augment == "flip":
        assert torch.allclose(entries.mean[3:], domain.diffusion.encode_images(pixels.flip(3))[0], atol=1e-6)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["finetune", "clora"])
def test_gradient_checkpointing_changes_the_memory_only(sd_run: Callable[..., Any], method: str) -> None:
    losses, grads, calls = [], [], []
    for on in ("false", "true"):
        run = sd_run(method, f"base.gradient_checkpointing={on}")
        run.begin(0)
        domain = run.domain
        count: list[str] = []
        last = domain.model.up_blocks[-1]
        for name, module in (("resnet", last.resnets[0]), ("attention", last.attentions[0].transformer_blocks[0])):
            module.register_forward_pre_hook(lambda *_, c=count, n=name: c.append(n))
        if method == "clora":
            for update in run.method.updates.values():  # a side path that does something
                nn.init.normal_(update.A, generator=torch.Generator().manual_seed(1))
        batch = next(domain.batches(0, 0))
        assert not batch.noisy.requires_grad
        loss = domain.loss(batch)
        loss.backward()
        trained = [p for g in run.method.trained() for p in g.params] + [domain.tokens.rows[0]]
        losses.append(loss.item())
        grads.append([p.grad.clone() for p in trained])
        calls.append(sorted(count))
    # the activations are really made a second time, or nothing was saved
    assert calls == [["attention", "resnet"], ["attention"] * 2 + ["resnet"] * 2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for plain, checkpointed in zip(*grads, strict=True):
        assert float(plain.abs().max()) > 0
        assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["clora", "custom_diffusion"])
@pytest.mark.parametrize(
    ("precision", "weights"), [("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_half_precision_runs_and_learns(
    sd_run: Callable[..., Any],
    empty_record: Callable[[], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    precision: str,
    weights: str,
) -> None:
    monkeypatch.setenv("DUALCL_CACHE", str(tmp_path))  # so that prior images are made here and now
    sets = [f"precision={precision}", f"base.weights_dtype={weights}", "method.lr=1e-3", "train.grad_clip=1.0"]
    run = sd_run(method, *sets)
    domain = run.domain
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[weights]
    projections = {id(p) for p in domain.full_parameters().values()}
    trained = {id(p) for p in run.method.parameters()}
    for part in (domain.model, domain.diffusion.vae, domain.diffusion.text_encoder):
        for name, p in part.named_parameters():
            kept = id(p) in projections or id(p) in trained
            assert p.dtype == (torch.float32 if kept else wanted), name
    before = {k: v.clone() for k, v in run.method.state_dict().items()}
    record = run.execute(empty_record())
    assert all(0 < t["final_loss"] < 100 for t in record["tasks"])
    assert [row["generated"] for row in record["matrix"]["rows"]] == [[1], [1, 1]]
    after = run.method.state_dict()
    assert all(v.dtype == torch.float32 and bool(torch.isfinite(v).all()) for v in after.values())
    assert any(not torch.equal(v, before[k]) for k, v in after.items())
    assert all(r.dtype == torch.float32 for r in domain.tokens.rows)


def test_the_loss_scale_survives_a_kill(sd_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaler(self: Run) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1, enabled=True)

    seen: list[tuple[int, int, float]] = []
    stop_at: tuple[int, int] | None = None
    real = RunFolder.save_checkpoint

    def save(self: RunFolder, name: str, tensors: Any, state: Any) -> None:
        real(self, name, tensors, state)
        if name == "partial":
            seen.append((state["task"], state["step"], state["scaler"]["scale"]))
            if seen[-1][:2] == stop_at:
                raise KeyboardInterrupt

    monkeypatch.setattr(Run, "fresh_scaler", scaler)
    monkeypatch.setattr(RunFolder, "save_checkpoint", save)
    resolved = resolve(sd_preset, "clora", ["precision=fp16", "train.steps=4"])
    whole = run_whole(resolved, tmp_path / "whole")
    undisturbed = list(seen)
    assert [s for _, _, s in undisturbed] == [2.0**13, 2.0**14, 2.0**15] * 2
    seen.clear()
    stop_at = (1, 2)
    with pytest.raises(KeyboardInterrupt):
        run_whole(resolved, tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoints" / "partial" / "state.json").read_text())
    assert state["scaler"]["scale"] == 2.0**14
    stop_at = None
    resumed = run_whole(resolved, tmp_path / "run")
    assert seen == undisturbed
    assert resumed["matrix"] == whole["matrix"]
    assert resumed["tasks"] == whole["tasks"]


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_model_saved_with_v_prediction_loads_and_trains(sd_folder: Path, sd_preset: str, tmp_path: Path) -> None:
    folder = tmp_path / "v"
    shutil.copytree(sd_folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    record = run_whole(resolve(sd_preset, "lora", [f"base.model={folder}"]), tmp_path / "run")
    assert (record["status"], record["network"]["prediction_type"]) == ("finished", "v_prediction")
    assert record["identity"]["backbone"] == "v"


def test_the_noise_schedule_is_the_models_whatever_the_saved_class(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pndm"
    shutil.copytree(sd_folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "_class_name": "PNDMScheduler", "skip_prk_steps": 1})
    )
    loaded = load(BaseConfig(model=str(folder)))
    plain = load(BaseConfig(model=str(sd_folder)))
    assert torch.equal(loaded.scheduler.alphas_cumprod, plain.scheduler.alphas_cumprod)


def test_a_sample_is_a_batch_of_one(sd_run: Callable[..., Any]) -> None:
    run = sd_run("custom_diffusion", "method.prior_weight=0.5")
    run.begin(0)
    batch: ConceptBatch = next(run.domain.batches(0, 0))
    ones = list(run.domain.samples(batch))
    assert [len(one.prompts) for one in ones] == [1] * len(batch.prompts)
    assert torch.equal(torch.cat([one.noisy for one in ones]), batch.noisy)
    assert [one.weights.tolist() for one in ones] == [[1.0], [1.0], [0.5], [0.5]]


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """hub(index) -> id of a model in a hub's cache, `sd_folder` with this model_index.json; None: without one."""
    import huggingface_hub.constants

    def put(index: Any) -> str:
        folder = tmp_path / "models--some--model"
        commit = "1234567890" * 4
        shutil.copytree(sd_folder, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        file = folder / "snapshots" / commit / "model_index.json"
        file.unlink() if index is None else file.write_text(json.dumps(index))
        return "some/model"

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return put


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("StableDiffusionXLPipeline", {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder_2": ["x", "y"]}),
        ("StableDiffusion3Pipeline", {"transformer": ["diffusers", "SD3Transformer2DModel"], "text_encoder_3": ["x"]}),
        ("PixArtAlphaPipeline", {"transformer": ["diffusers", "Transformer2DModel"]}),
    ],
)
def test_other_families_of_the_hub_are_refused_before_a_weight_is_read(
    hub: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch, name: str, parts: dict[str, Any]
) -> None:
    model = hub({"_class_name": name, **parts})
    monkeypatch.setattr(StableDiffusion, "parts", {})  # nothing could be loaded
    with pytest.raises(UserError) as error:
        load(BaseConfig(model=model))
    assert str(error.value) == f"some/model is a {name}; only Stable Diffusion 1.x and 2.x are supported"


@pytest.mark.parametrize("index", [{"_class_name": "StableDiffusionPipeline"}, None], ids=["index", "no index"])
def test_a_model_of_the_hub_is_that_of_its_folder(hub: Callable[[Any], str], loaded_sd: Any, index: Any) -> None:
    found = load(BaseConfig(model=hub(index)))
    assert found.info == dataclasses.replace(loaded_sd.info, name="some/model", weights="hub: some/model")


def test_a_broken_index_of_the_hub_is_named(hub: Callable[[Any], str]) -> None:
    with pytest.raises(UserError, match=r"model_index\.json is not valid JSON; save or download the model again"):
        load(BaseConfig(model=hub("text")))


def test_what_the_contract_says_of_a_text(diffusion: Any) -> None:
    text = diffusion.encode_text(["a symbol", "", "a house"])
    assert text.states.shape == (3, 24, 24)
    more = Text(text.states, pooled=text.states[:, 0])
    index = torch.tensor([2, 0, 2])
    assert torch.equal(more[index].states, text.states[index])
    assert torch.equal(more[index].further["pooled"], text.states[index, 0])
    assert diffusion.text_only == diffusion.sites().keys()
    attention = diffusion.unet.get_submodule(next(iter(diffusion.sites())).rpartition(".")[0])
    attention.is_cross_attention = False  # a second self-attention, as some U-Nets have
    parts = (diffusion.tokenizer, diffusion.text_encoder, diffusion.unet, diffusion.vae, diffusion.scheduler)
    again = StableDiffusion(*parts, "x", "y")
    assert again.text_only < again.sites().keys()
    assert len(again.sites()) - len(again.text_only) == 2


# --- what a U-Net may want --------------------------------------------------------------------------------------------


def wanting(sd_folder: Path, folder: Path, settings: dict[str, Any]) -> BaseConfig:
    """`sd_folder` with a U-Net of further settings, whose file has every weight."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(sd_folder, folder)
    config = {**UNet2DConditionModel.load_config(folder / "unet"), **settings}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return BaseConfig(model=str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"time_cond_proj_dim": 16},
        {"num_class_embeds": 10},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 16},
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32},
        {"addition_embed_type": "image", "encoder_hid_dim": 16},
        {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 24},
        {"attention_type": "gated"},
    ],
    ids=str,
)
def test_a_unet_that_wants_more_than_text_is_refused_by_name(
    sd_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as error:
        load(wanting(sd_folder, tmp_path / "m", settings))
    key, value = next(iter(settings.items()))
    assert f"{key}={value!r} in unet/config.json makes the U-Net want more" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"encoder_hid_dim": 24}, {"addition_embed_type": "text", "encoder_hid_dim": 24}])
def test_a_unet_that_makes_more_of_the_text_alone_is_run_as_it_is(
    sd_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = load(wanting(sd_folder, tmp_path / "m", {"addition_embed_type_num_heads": 2, **settings}))
    noise, text = torch.randn(1, 4, 8, 8), model.encode_text(["a symbol"])
    stock = model.network(noise, torch.tensor([7]), encoder_hidden_states=text.states).sample
    assert torch.equal(model.predict(noise, torch.tensor([7]), text), stock)
    assert model.text_only == frozenset()  # the sites read a projection of it


def test_a_text_encoder_that_masks_its_padding_is_refused(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "m")
    file = tmp_path / "m" / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_attention_mask": True}))
    with pytest.raises(UserError, match=r"use_attention_mask in text_encoder/config\.json is not supported"):
        load(BaseConfig(model=str(tmp_path / "m")))


# --- numbers out of range ---------------------------------------------------------------------------------------------


def overflowing(diffusion: Any, part: str) -> Any:
    """A model whose VAE holds numbers before a norm that float16 does not."""
    with torch.no_grad():
        for parameter in getattr(diffusion.vae, part).conv_in.parameters():
            parameter.mul_(1e5)
    return diffusion


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_vae_that_overflows_in_half_precision_runs_in_float32_or_is_refused(
    diffusion: Any, part: str, autocast: bool
) -> None:
    model, pixels = overflowing(diffusion, part), torch.rand(1, 3, 16, 16) * 2 - 1
    latents = torch.randn(1, 4, 8, 8)

    def made() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            return model.encode_images(pixels)[0] if part == "encoder" else model.decode(latents).float()

    with torch.no_grad():
        if not autocast:
            model.vae.half()
        first, dtype = made(), model.vae.dtype
        assert dtype == (torch.float32 if autocast else torch.float16)
        model.vae.float()
        exact = model.encode_images(pixels)[0] if part == "encoder" else model.decode(latents).float()
        model.vae.to(dtype)
    assert first.std() > 0
    assert torch.allclose(first, exact, atol=0.02 if part == "encoder" else 3)
    model.vae.register_to_config(force_upcast=False)
    with pytest.raises(UserError, match=r"that the VAE makes.* are not finite: .*precision=fp32"):
        made()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(("value", "words"), [("nan", "holds NaN or infinity"), (1e6, "too large for base.weights_d")])
def test_weights_that_are_no_numbers_are_refused_at_load(
    sd_folder: Path, tmp_path: Path, part: str, value: Any, words: str
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(sd_folder, tmp_path / "m")
    file = next((tmp_path / "m" / part).glob("*.safetensors"))
    state = load_file(file)
    state[max(state)].view(-1)[0] = float(value)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"^{part} of the model .*{words}"):
        load(BaseConfig(model=str(tmp_path / "m"), weights_dtype="fp16"))


def test_words_that_have_diverged_are_named_as_what_they_are(diffusion: Any) -> None:
    from dualcl.benchmark.models.sampling import sample

    with torch.no_grad():
        diffusion.text_encoder.get_input_embeddings().weight.fill_(float("nan"))
    how: Any = {"scheduler": "ddim", "steps": 2, "guidance": 1.0, "batch_size": 1}
    with pytest.raises(UserError, match="what the text encoder makes of 'a symbol' is not finite"):
        sample(diffusion, ["a symbol"], [torch.Generator()], **how)


def test_a_measure_that_is_not_finite_is_not_recorded_and_nothing_else_is_lost(
    sd_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualcl.benchmark.domains.customization import Customization

    real = Customization.evaluate

    def evaluate(self: Customization, seen: Any) -> dict[str, Any]:
        row = real(self, seen)
        return {**row, "mmd": [*row["mmd"][:-1], float("nan")]} if len(seen) == 2 else row

    monkeypatch.setattr(Customization, "evaluate", evaluate)
    with pytest.raises(UserError, match="mmd is not finite after task 2"):
        run_whole(resolve(sd_preset, "lora", []), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["status"], len(record["matrix"]["rows"])) == ("failed", 1)
