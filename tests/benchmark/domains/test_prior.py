"""Prior images: made once by the frozen model, or a folder of the user's; their part in the loss."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains.prior import PriorConfig, prior_images
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.text_to_image import BaseConfig

CONFIG = PriorConfig(n=3, steps=2, guidance=2.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("DUALCL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prior"


@pytest.fixture
def calls(diffusion: Any) -> list[int]:
    """One entry per call of the U-Net."""
    made: list[int] = []
    diffusion.unet.register_forward_hook(lambda *_: made.append(1))
    return made


# --- generated --------------------------------------------------------------------------------------------------------


def test_they_are_made_once(diffusion: Any, calls: list[int]) -> None:
    images, digest = prior_images(diffusion, CONFIG, "symbol")
    assert (images.dtype, images.shape) == (torch.uint8, (3, 16, 16, 3))
    assert len({image.numpy().tobytes() for image in images}) == 3
    assert calls
    calls.clear()
    again, same = prior_images(diffusion, CONFIG, "symbol")
    assert calls == []
    assert same == digest
    assert torch.equal(again, images)


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 3}, {"guidance": 3.0}, {"prompt": "a drawing of {noun}"}])
def test_other_settings_give_other_images(diffusion: Any, calls: list[int], change: dict[str, Any]) -> None:
    _, digest = prior_images(diffusion, CONFIG, "symbol")
    calls.clear()
    _, other = prior_images(diffusion, replace(CONFIG, **change), "symbol")
    assert calls
    assert other != digest


def test_another_noun_and_another_model_have_images_of_their_own(diffusion: Any, loaded_sd: Any) -> None:
    _, digest = prior_images(diffusion, CONFIG, "symbol")
    _, other = prior_images(diffusion, CONFIG, "cat")
    assert other != digest
    changed = copy.deepcopy(loaded_sd)
    with torch.no_grad():
        changed.unet.conv_out.bias += 1
    changed = type(changed)(
        changed.tokenizer, changed.text_encoder, changed.unet, changed.vae, changed.scheduler, "other", ""
    )
    _, other = prior_images(changed, CONFIG, "symbol")
    assert other != digest


def _flip_a_bit(folder: Path) -> None:
    file = folder / "0001.png"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_bit,
        lambda folder: (folder / "0002.png").unlink(),
        lambda folder: (folder / "0000.png").write_bytes((folder / "0000.png").read_bytes()[:50]),
        lambda folder: (folder / "0000.png").write_bytes((folder / "0001.png").read_bytes()),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"n": null, "sha256": ""}'),
        lambda folder: Image.new("RGB", (5, 5)).save(folder / "0000.png"),
    ],
    ids=["bit", "file gone", "cut", "another image", "no manifest", "no json", "list", "no number", "size"],
)
def test_a_damaged_cache_is_made_again(
    diffusion: Any, calls: list[int], cache: Path, damage: Callable[[Path], Any]
) -> None:
    images, digest = prior_images(diffusion, CONFIG, "symbol")
    (folder,) = cache.iterdir()
    calls.clear()
    damage(folder)
    again, same = prior_images(diffusion, CONFIG, "symbol")
    assert calls
    assert same == digest
    assert torch.equal(again, images)
    calls.clear()
    prior_images(diffusion, CONFIG, "symbol")
    assert calls == []


def test_a_cache_that_cannot_be_written_is_done_without(diffusion: Any, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder would be")
    images, _ = prior_images(diffusion, CONFIG, "symbol")
    assert len(images) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_do_not_depend_on_the_precision_of_the_run_that_asks_first(
    diffusion: Any, cache: Path, dtype: torch.dtype
) -> None:
    _, digest = prior_images(diffusion, CONFIG, "symbol")
    shutil.rmtree(cache)
    with torch.autocast("cpu", dtype=dtype):
        _, other = prior_images(diffusion, CONFIG, "symbol")
    assert other == digest


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_model_in_half_precision_makes_them_too(sd_folder: Path, kind: Any) -> None:
    half = load(BaseConfig(model=str(sd_folder), weights_dtype=kind))
    images, _ = prior_images(half, CONFIG, "symbol")
    assert images.shape == (3, 16, 16, 3)


def test_they_are_the_frozen_models_whatever_the_method_and_the_task(
    sd_run: Callable[..., Any], empty_record: Callable[[], dict[str, Any]], diffusion: Any, cache: Path
) -> None:
    config = PriorConfig(n=2, steps=2, guidance=2.0)  # as the preset has it
    _, digest = prior_images(diffusion, config, "symbol")
    for method in ("custom_diffusion", "dreambooth"):
        shutil.rmtree(cache)
        run = sd_run(method, "method.lr=0.1")
        assert run.domain.facts()["prior"] == {"weight": 1.0, "images_sha256": {"a photo of a symbol": digest}}
        before = run.domain._prior["symbol"].mean.clone()
        run.execute(empty_record())
        assert torch.equal(run.domain._prior["symbol"].mean, before)
        assert run.domain.facts()["prior"]["images_sha256"] == {"a photo of a symbol": digest}


# --- a folder ---------------------------------------------------------------------------------------------------------


def fill(folder: Path, *colours: int) -> None:
    folder.mkdir(parents=True)
    for i, colour in enumerate(colours):
        Image.fromarray(np.full((20, 30, 3), colour, dtype=np.uint8)).save(folder / f"{i}.png")


def test_a_folder_of_the_users(diffusion: Any, calls: list[int], tmp_path: Path) -> None:
    fill(tmp_path / "own", 10, 20)
    fill(tmp_path / "own" / "cat", 30)
    config = PriorConfig(images=str(tmp_path / "own"))
    images, digest = prior_images(diffusion, config, "dog")
    assert images.shape == (2, 16, 16, 3)
    assert [int(i.unique()) for i in images] == [10, 20]
    images, other = prior_images(diffusion, config, "cat")
    assert [int(i.unique()) for i in images] == [30]
    assert other != digest
    assert calls == []


def test_pictures_beside_the_folders_of_nouns_are_told(diffusion: Any, tmp_path: Path, capsys: Any) -> None:
    fill(tmp_path / "own", 10)
    fill(tmp_path / "own" / "cats", 30)
    prior_images(diffusion, PriorConfig(images=str(tmp_path / "own")), "cat")
    assert "has no folder for 'cat' (cats): the 1 image(s) beside the folders are used" in capsys.readouterr().err
    prior_images(diffusion, PriorConfig(images=str(tmp_path / "own")), "cats")
    assert capsys.readouterr().err == ""


def test_folders_that_do_not_serve(diffusion: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prior\.images=.*no folder; give one with images, or prior\.images=generated"):
        prior_images(diffusion, PriorConfig(images=str(tmp_path / "none")), "cat")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    for noun in ("cat", "dog"):
        with pytest.raises(UserError, match=r"holds no images; add some, or set prior\.images=generated"):
            prior_images(diffusion, PriorConfig(images=str(tmp_path / "empty")), noun)
    fill(tmp_path / "bad", 10)
    (tmp_path / "bad" / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"prior.images: .*x\.png.*(replace|remove)"):
        prior_images(diffusion, PriorConfig(images=str(tmp_path / "bad")), "cat")


# --- in training ------------------------------------------------------------------------------------------------------


def test_every_batch_has_as_many_prior_images_and_the_loss_weighs_them(sd_run: Callable[..., Any]) -> None:
    run = sd_run("custom_diffusion", "method.prior_weight=0.25", "train.steps=3")
    run.begin(0)
    domain = run.domain
    batches = list(domain.batches(0, 0))
    assert len(batches) == 3
    for batch in batches:
        assert batch.prompts == ["a photo of <c1>"] * 2 + ["a photo of a symbol"] * 2
        assert batch.weights.tolist() == [0.5, 0.5, 0.125, 0.125]
        context = domain.diffusion.encode_text(batch.prompts).states
        predicted = domain.model(batch.noisy, batch.timesteps, encoder_hidden_states=context).sample
        error = (predicted - batch.target).square().mean((1, 2, 3))
        assert torch.allclose(domain.loss(batch), error[:2].mean() + 0.25 * error[2:].mean(), rtol=1e-5)


def test_all_prior_images_take_their_turn(sd_run: Callable[..., Any]) -> None:
    run = sd_run("custom_diffusion", "prior.n=4", "train.steps=4")
    run.begin(0)
    prior = run.domain._prior["symbol"]
    prior.mean.copy_(torch.arange(4.0)[:, None, None, None].expand_as(prior.mean))
    parts = [run.domain._prior_part(0, 0, step)[0].mean[:, 0, 0, 0].tolist() for step in range(4)]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2] + parts[3]) == [0, 1, 2, 3]


def test_no_weight_no_images(sd_run: Callable[..., Any], cache: Path) -> None:
    run = sd_run("custom_diffusion", "method.prior_weight=0")
    run.begin(0)
    assert next(run.domain.batches(0, 0)).prompts == ["a photo of <c1>"] * 2
    assert not cache.exists()


def test_concepts_of_several_nouns_have_their_own_prior(sd_run: Callable[..., Any], sd_preset: str) -> None:
    run = sd_run("custom_diffusion")
    stream = run.domain.stream
    nouns = [replace(concept, noun=noun) for concept, noun in zip(stream.concepts, ("cat", ""), strict=True)]
    run.domain.stream = replace(stream, concepts=tuple(nouns))
    run.domain.use_prior(1.0)
    run.begin(0)
    assert next(run.domain.batches(0, 0)).prompts[2:] == ["a photo of a cat"] * 2
    run.begin(1)
    assert next(run.domain.batches(1, 0)).prompts[2:] == ["a photo of a object"] * 2
