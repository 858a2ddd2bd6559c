"""Image features: unit vectors of ViT and CLIP, plain prompts; the MMD against hand-computed values."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics.pairwise import polynomial_kernel
from torch.nn import functional as F

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.models.bundled import bundled_judge
from dualcl.benchmark.models.image_features import CLIP, features_name, load_features, mmd, plain_prompt
from dualcl.benchmark.models.vit import BackboneConfig, load_backbone
from dualcl.benchmark.models.weights import state_hash
from dualcl.datasets.drawing.portraits import ATTRIBUTES, draw_portrait, sample_attributes, sample_setting

# isort: split
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModel,
)


def pictures(n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear")
    return (255 * smooth).round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def vit():
    return load_features("auto", "cpu", "glyph-diffusion")


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load_features(str(clip_folder), "cpu", "glyph-diffusion")


# --- which model ----------------------------------------------------------------------------------------------------


def test_auto_follows_the_base_model():
    assert features_name("auto", "glyph-diffusion") == "glyph-vit"
    assert features_name("auto", "CompVis/stable-diffusion-v1-4") == CLIP
    assert features_name("glyph-vit", "CompVis/stable-diffusion-v1-4") == "glyph-vit"


def test_unknown_features_name_the_nearest():
    with pytest.raises(UserError, match="'glyph-vti'; did you mean 'glyph-vit'"):
        load_features("glyph-vti", "cpu", "glyph-diffusion")


def test_a_hub_model_that_is_not_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"nobody/no-clip.*local CLIP directory") as error:
        load_features("nobody/no-clip", "cpu", "x")
    assert "\n" not in str(error.value)


def test_a_directory_without_a_whole_clip_model(clip_folder, tmp_path):
    with pytest.raises(UserError, match=r"cannot load the CLIP model .*save_pretrained"):
        load_features(str(tmp_path), "cpu", "x")
    # an image tower alone would be completed with random weights
    CLIPVisionModel(CLIPConfig.from_pretrained(clip_folder).vision_config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model type is 'clip_vision_model', not 'clip'"):
        load_features(str(tmp_path), "cpu", "x")
    # and so would a file that has lost some
    shutil.copytree(clip_folder, tmp_path / "less")
    weights = load_file(clip_folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack text_projection\.weight"):
        load_features(str(tmp_path / "less"), "cpu", "x")


# --- a ViT's features -----------------------------------------------------------------------------------------------


def test_features_of_the_bundled_vit(vit):
    model, info = load_backbone(BackboneConfig(name="glyph-vit"))
    images = pictures(5, 32)
    x = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        direct = model.forward_head(model.forward_features(x), pre_logits=True)
    found = vit.images(images)
    assert (vit.name, vit.dim, vit.sha256) == ("glyph-vit", 128, info.weights_sha256)
    assert found.dtype == torch.float32
    assert found.shape == (5, 128)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(found, F.normalize(direct, dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([vit.images(images[i : i + 1]) for i in range(5)]), found, rtol=0, atol=1e-5)
    assert vit.images(images[:0]).shape == (0, 128)
    assert vit.texts(["a cat"]) is None


def test_images_of_other_sizes_are_resized_whole(vit):
    images = pictures(4, 32)
    large = images.repeat_interleave(3, 1).repeat_interleave(3, 2)
    framed = large.clone()
    framed[:, :6], framed[:, -6:] = 0, 255
    same = (vit.images(images) * vit.images(large)).sum(1)
    assert same.min() > 0.98
    assert ((vit.images(images) * vit.images(framed)).sum(1) < same - 0.01).all()


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_autocast_does_not_reach_the_features(kind, request):
    features = request.getfixturevalue(kind)
    images = pictures(3, 32)
    plain, words = features.images(images), features.texts(["a cat"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features.images(images), plain)
        assert words is None or torch.equal(features.texts(["a cat"]), words)


# --- CLIP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 60])
def test_clip_image_features_are_those_of_its_own_processor(clip, clip_folder, size):
    images = pictures(3, size)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    pixels = processor([Image.fromarray(i.numpy()) for i in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        direct = F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=1)
    found = clip.images(images)
    assert (clip.name, clip.dim, found.shape) == ("tiny-clip", 16, (3, 16))
    assert clip.sha256 == state_hash(model.state_dict())
    # resized pixels are rounded there, not here
    torch.testing.assert_close(found, direct, rtol=0, atol=1e-5 if size == 24 else 0.02)


def test_clip_text_features_and_their_cosine_with_images(clip, clip_folder):
    texts = ["a drawing of a red cat", "a drawing of a blue house on green", "a symbol"]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    images = pictures(3, 24)
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(images.numpy(), return_tensors="pt")["pixel_values"]
    found = clip.texts(texts)
    assert found.shape == (3, 16)
    for i, text in enumerate(texts):  # one at a time, unpadded
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), pixel_values=pixels)
        torch.testing.assert_close(found[i : i + 1], output.text_embeds, rtol=0, atol=1e-5)
        cosine = output.logits_per_text[0] / model.logit_scale.exp()
        torch.testing.assert_close(clip.images(images) @ found[i], cosine, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_long_texts_are_cut(clip):
    assert clip.texts(["a drawing of a red cat " * 20]).shape == (1, 16)


# --- prompts for text towers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "placeholders", "noun", "plain"),
    [
        ("a photo of <c1>", ["<c1>"], "dog", "a photo of dog"),
        ("a photo of <c1> dog", ["<c1>"], "dog", "a photo of dog"),
        ("a photo of <c1> doghouse", ["<c1>"], "dog", "a photo of dog doghouse"),
        ("<c1> in  the snow", ["<c1>"], "teddy bear", "teddy bear in the snow"),
        ("<c1> teddy bear in snow", ["<c1>"], "teddy bear", "teddy bear in snow"),
        ("a photo of <c1>, old", ["<c1>"], "", "a photo of , old"),
        ("a photo of <c1>", ["<c1>"], "", "a photo of"),
        ("a <c1> <c1>_1 <c1>_2 dog", ["<c1>", "<c1>_1", "<c1>_2"], "dog", "a dog"),
        ("a <c1> on <c1>", ["<c1>", "<c1>_1"], "dog", "a dog on dog"),
        ("a photo of sks", ["sks"], "cat", "a photo of cat"),
        ("a photo of <c1> and <c12>", ["<c1>"], "cat", "a photo of cat and <c12>"),
        ("a photo of a dog", [], "dog", "a photo of a dog"),
        ("a (.*) photo of <c+>", ["<c+>"], r"\1 dog", r"a (.*) photo of \1 dog"),
    ],
)
def test_plain_prompt(prompt, placeholders, noun, plain):
    assert plain_prompt(prompt, placeholders, noun) == plain


# --- MMD ------------------------------------------------------------------------------------------------------------


def unit(n, seed, dim=6):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_mmd_by_hand():
    e1, e2 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    # k(e1, e1) = 4, k(e1, e2) = 1: 4 + 4 - 2
    assert mmd(e1, e2, estimator="biased") == 6.0
    x, y = torch.cat([e1, e2]), torch.cat([e1, e1])
    # biased: (4 + 1 + 1 + 4)/4 + 4 - 2 (4 + 1)/2; unbiased: 1 + 4 - 5
    assert mmd(x, y, estimator="biased") == pytest.approx(1.5)
    assert mmd(x, y, estimator="unbiased") == pytest.approx(0.0)
    assert mmd(x, x, estimator="unbiased") == pytest.approx(1 + 1 - 5)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_mmd_against_sklearn(estimator):
    x, y = unit(7, 0), unit(4, 1)
    a, b = x.double().numpy(), y.double().numpy()
    xx, yy, xy = (polynomial_kernel(p, q, degree=2, gamma=1, coef0=1) for p, q in ((a, a), (b, b), (a, b)))
    if estimator == "biased":
        expected = xx.mean() + yy.mean() - 2 * xy.mean()
    else:
        expected = (xx.sum() - xx.trace()) / 42 + (yy.sum() - yy.trace()) / 12 - 2 * xy.mean()
    assert mmd(x, y, estimator=estimator) == pytest.approx(expected, rel=1e-12)
    assert mmd(y, x, estimator=estimator) == pytest.approx(mmd(x, y, estimator=estimator), rel=1e-12)


def test_biased_mmd_is_zero_for_equal_sets_and_never_negative():
    for seed in range(20):
        x = unit(5, seed)
        assert mmd(x, x, estimator="biased") == 0.0
        assert mmd(x, x[torch.randperm(5, generator=torch.Generator().manual_seed(seed))], estimator="biased") < 1e-15
        assert mmd(x, x + 1e-9, estimator="biased") >= 0.0
        assert mmd(x, unit(3, seed + 100), estimator="biased") > 0.0


def test_unbiased_mmd_has_mean_zero_for_one_distribution():
    values = [mmd(unit(8, s), unit(8, 1000 + s), estimator="unbiased") for s in range(400)]
    mean = sum(values) / 400
    spread = (sum((v - mean) ** 2 for v in values) / 399 / 400) ** 0.5
    assert abs(mean) < 4 * spread
    biased = [mmd(unit(8, s), unit(8, 1000 + s), estimator="biased") for s in range(400)]
    assert sum(biased) / 400 > 20 * spread


@pytest.mark.parametrize(("n", "m"), [(1, 3), (3, 1)])
def test_unbiased_mmd_needs_two(n, m):
    with pytest.raises(UserError, match=r"there are \d and \d; set eval.estimator=biased"):
        mmd(unit(n, 0), unit(m, 1), estimator="unbiased")
    with pytest.raises(ValueError, match="empty"):
        mmd(unit(0, 0), unit(m, 1), estimator="biased")


def test_features_and_distances_that_are_no_numbers_are_never_a_score():
    features = load_features("glyph-vit", "cpu", "glyph-diffusion")
    with torch.no_grad():
        next(features.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="the features of images by glyph-vit are not finite"):
        features.images(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    nothing = torch.full((2, 3), float("nan"))
    assert all(math.isnan(mmd(nothing, torch.eye(3), estimator=kind)) for kind in ("biased", "unbiased"))


def test_the_bundled_judge_reads_drawings_in_every_head_and_gives_features():
    count = 300
    whos = [sample_attributes(numpy_generator(7, "who", i)) for i in range(count)]
    drawings = [draw_portrait(w, sample_setting(numpy_generator(7, "setting", i))) for i, w in enumerate(whos)]
    images = torch.from_numpy(np.stack(drawings))
    judge = load_features("auto", "cpu", "portraits-diffusion")
    read = judge.attributes(images)
    for name in ATTRIBUTES:
        assert sum(one[name] == who[name] for one, who in zip(read, whos, strict=True)) >= 0.97 * count
    rows = judge.images(images[:3])
    assert rows.shape == (3, judge.dim)
    assert torch.allclose(rows.norm(dim=1), torch.ones(3))
    assert judge.texts(["a portrait"]) is None
    assert load_features("glyph-vit", "cpu", "").attributes(images[:2]) is None
    folder = bundled_judge()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 1.2 * 2**20
    card = json.loads((folder / "card.json").read_text())
    assert min(card["measured"]["right"].values()) >= 0.97
    assert {name: tuple(values) for name, values in card["attributes"].items()} == ATTRIBUTES
