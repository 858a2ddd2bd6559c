"""The bundled tiny Stable Diffusion: what its card says holds for the files, and the command makes such a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.bundled import bundled_diffusion
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.pretraining.recipes import pretrain
from dualcl.datasets.drawing.captions import CLASS_NOUN, INK_AND_PAPER, caption_names, sample_caption, sample_scene
from dualcl.datasets.drawing.glyphs import CONCEPT_GLYPHS, STREAM_GLYPHS

FOLDER = bundled_diffusion()["glyph-diffusion"]
TINY: dict[str, Any] = {
    "classes": 3,
    "per_class": 6,
    "vae_steps": 2,
    "unet_steps": 2,
    "decoder_steps": 2,
    "reader_epochs": 1,
    "vae_batch": 4,
    "unet_batch": 4,
    "samples_per_class": 1,
    "sampling_steps": 2,
}


def test_all_parts_together_are_small() -> None:
    weights = list(FOLDER.rglob("*.safetensors"))
    assert len(weights) == 3
    assert sum(p.stat().st_size for p in weights) <= 12 * 2**20


def test_the_card_is_of_these_files() -> None:
    card = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    found = {
        p.relative_to(FOLDER).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in FOLDER.rglob("*.safetensors")
    }
    assert card["weights_sha256"] == found
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for share in card["measured"]["samples"]["glyph"], card["measured"]["samples"]["ink"]:
        assert f"{share:.1%}" in text
    assert "samples.png" in text
    # measured, not promised: the ink falls short of the 90 % that were aimed at, and the card says so
    assert card["measured"]["samples"]["glyph"] >= 0.8


def test_no_concept_and_no_class_of_the_stream_was_drawn_for_it() -> None:
    shown = {caption_names()[name] for name in json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))["glyphs"]}
    assert len(shown) >= 50
    assert not shown & {*CONCEPT_GLYPHS.values(), *STREAM_GLYPHS.values()}


def test_captions_are_true_and_their_words_are_whole_tokens() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    rng = np.random.default_rng(0)
    for name in list(caption_names())[:20]:
        scene = sample_scene(name, rng)
        assert (scene.ink, scene.paper) in INK_AND_PAPER
        assert scene.caption().endswith(f"{scene.ink} {name} on {scene.paper}")
        caption = sample_caption(scene, rng)
        assert (name in caption) != (f" {CLASS_NOUN}" in caption.replace(name, ""))
        words = scene.caption().split()
        assert len(tokenizer(" ".join(words), add_special_tokens=False).input_ids) == len(words)


def test_the_command_makes_a_model_that_loads_and_is_the_same_again(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name in "ab":
        pretrain("glyph-diffusion", tmp_path / name, seed=1, **TINY)
    a, b = (tmp_path / name / "glyph_diffusion" for name in "ab")
    cards = [json.loads((f / "card.json").read_text(encoding="utf-8")) for f in (a, b)]
    assert cards[0]["weights_sha256"] == cards[1]["weights_sha256"]
    assert cards[0]["measured"] == cards[1]["measured"]
    assert {p.name for p in (a / "tokenizer").iterdir()} >= {"tokenizer.json", "vocab.json", "merges.txt"}
    diffusion = load(BaseConfig(model=str(a)))
    assert (diffusion.info.image_size, diffusion.info.prediction_type) == (32, "v_prediction")
    bundled = load(BaseConfig())
    assert diffusion.unet.config.block_out_channels == bundled.unet.config.block_out_channels


def test_an_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unet_steps"):
        pretrain("glyph-diffusion", tmp_path, unet_step=3)
