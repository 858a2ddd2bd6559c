import json

import pytest
import torch

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import StableDiffusionPipeline

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.models.portraits_judge import Judge, load_judge
from dualcl.benchmark.pretraining import portraits
from dualcl.benchmark.pretraining.portraits import PortraitsRecipe, drawn, prompted, right_share
from dualcl.benchmark.pretraining.recipes import pretrain
from dualcl.benchmark.pretraining.text_to_image import make_tokenizer
from dualcl.datasets.drawing.people import part_of
from dualcl.datasets.drawing.portrait_captions import caption_words, sample_caption
from dualcl.datasets.drawing.portraits import ATTRIBUTES, CAPTIONED, sample_attributes

JUDGE = {"pictures": 32, "test_pictures": 8, "steps": 2, "batch": 8}
TINY = {
    **{"pictures": 24, "vae_pictures": 16, "test_pictures": 4, "vae_steps": 2, "vae_batch": 4, "text_steps": 2},
    **{"text_batch": 4, "unet_steps": 3, "unet_batch": 4, "decoder_steps": 2, "width": 32, "inner_width": 32},
    **{"text_width": 32, "samples": 2, "sampling_steps": 2},
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    pretrain("portraits-judge", folder, seed=1, **JUDGE)
    return folder / "portraits_judge"


def test_a_small_judge_is_written_read_again_and_the_same_again(judged, tmp_path):
    judge, card = load_judge(judged)
    assert (judged / "model.safetensors").stat().st_size <= 1.2 * 2**20
    images = torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8)
    places = judge.read(images)
    assert places.shape == (3, len(ATTRIBUTES))
    assert (places < torch.tensor([len(v) for v in ATTRIBUTES.values()])).all()
    assert torch.equal(judge.read(images[1:2]), places[1:2])
    assert judge.features(torch.zeros(2, 3, 48, 48)).shape == (2, 192)
    assert set(card["measured"]["right"]) == set(ATTRIBUTES)
    assert pretrain("portraits-judge", tmp_path, seed=1, **JUDGE)["sha256"] == card["sha256"]


def test_a_damaged_judge_is_refused(judged, tmp_path):
    for file in judged.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        load_judge(tmp_path)


def test_a_small_model_is_trained_in_pieces_and_loads(judged, tmp_path, monkeypatch):
    monkeypatch.setattr(portraits, "load_judge", lambda: load_judge(judged))
    card = pretrain("portraits-diffusion", tmp_path / "a", **TINY)
    target = tmp_path / "a" / "portraits_diffusion"
    pipe = StableDiffusionPipeline.from_pretrained(target)
    assert pipe.unet.config.cross_attention_dim == 32
    assert 0 <= card["measured"]["samples"]["all"] <= 1
    assert "judge then reads" in " ".join((target / "README.md").read_text().split())
    assert json.loads((target / "card.json").read_text())["weights_sha256"] == card["weights_sha256"]

    class Killed(Exception):
        pass

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:  # after the first stage
        patch.setattr(portraits.Portraits, "text_and_unet", killed)
        with pytest.raises(Killed):
            pretrain("portraits-diffusion", tmp_path / "b", **TINY)
    assert pretrain("portraits-diffusion", tmp_path / "b", **TINY)["weights_sha256"] == card["weights_sha256"]
    with pytest.raises(UserError, match="of a training with another vae_lr"):
        pretrain("portraits-diffusion", tmp_path / "b", **TINY, vae_lr=1.0)


def test_what_is_drawn_is_kept_and_nobody_of_a_stream_is(tmp_path):
    said: list[str] = []
    first = drawn(tmp_path, "train", 30, 0, said.append, piece=20)
    again = drawn(tmp_path, "train", 30, 0, said.append, piece=20)
    assert said == ["drawing train 0 to 20", "drawing train 20 to 30"]
    assert torch.equal(first.images, again.images)
    assert {part_of(first.who(i)) for i in range(30)} == {"pretraining"}
    # other drawings are made anew
    drawn(tmp_path, "train", 30, 1, said.append, piece=20)
    assert len(said) == 4
    (tmp_path / "train-0-20.safetensors").write_bytes(b"cut")
    assert torch.equal(drawn(tmp_path, "train", 20, 0, said.append, piece=20).images, first.images[:20])


def test_right_is_what_was_asked_for_and_seen():
    class Blind(Judge):
        def read(self, images):
            return torch.zeros(len(images), len(ATTRIBUTES), dtype=torch.long)

    first = {name: values[0] for name, values in CAPTIONED.items()}
    named = [{"hat": first["hat"], "skin": "dark"}, {"hat": "crown"}]
    assert right_share(Blind(ATTRIBUTES), torch.zeros(2, 1), named) == {"all": 0.3333, "skin": 0.0, "hat": 0.5}


def test_prompts_say_what_they_name():
    texts, named = prompted(20, 0)
    assert len(set(texts)) == 20
    assert all(asked for asked in named)
    assert all(
        v.split()[-1] in text for text, asked in zip(texts, named, strict=True) for v in asked.values() if v != "none"
    )


def test_sites_are_as_wide_as_asked_the_bundle_small_and_captions_not_cut(tmp_path):
    recipe = PortraitsRecipe()
    tokenizer = make_tokenizer(tmp_path, caption_words(), recipe.text_length)
    text, unet = portraits.make_text(recipe, tokenizer), portraits.make_unet(recipe)
    shapes = [tuple(m.weight.shape) for name, m in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert shapes == 4 * [(192, 256)] + 4 * [(128, 256)]
    modules = (text, unet, portraits.make_vae(recipe))
    assert 2 * sum(p.numel() for m in modules for p in m.parameters()) <= 23.7e6  # bytes, of at most 24 MB
    rng = numpy_generator(0, "long")
    longest = max(
        (sample_caption(sample_attributes(rng), rng) for _ in range(3000)), key=lambda text: len(text.split())
    )
    assert len(tokenizer(longest).input_ids) <= recipe.text_length
