"""Models that are there in half precision alone, or as pickles."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.runs.runner import run as run_whole

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def base(sd_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sd_folder, tmp_path / "base")


def halved(base: Path, *parts: str) -> None:
    for part in parts:
        file = base / part / f"{STEMS[part]}.safetensors"
        state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(state, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()


@pytest.mark.parametrize("parts", [tuple(STEMS), ("unet",), ("vae", "text_encoder")], ids="+".join)
def test_what_is_there_in_half_precision_alone_is_read_and_said(loaded_sd: Any, base: Path, parts: Any) -> None:
    halved(base, *parts)
    found = load(BaseConfig(model=str(base)))
    assert {*found.halves} == {*parts}
    assert found.info.weights == loaded_sd.info.weights
    for part in STEMS:
        for key, tensor in getattr(loaded_sd, part).state_dict().items():
            ours = getattr(found, part).state_dict()[key]
            assert ours.dtype == tensor.dtype
            assert torch.equal(ours, tensor.half().to(tensor.dtype) if part in parts else tensor)


def test_the_record_names_parts_of_half_precision(base: Path, sd_preset: str, tmp_path: Path) -> None:
    halved(base, "vae")
    record = run_whole(resolve(sd_preset, "textual_inversion", [f"base.model={base}"]), tmp_path / "run")
    assert record["network"]["half_precision_files"] == ["vae"]


def test_another_variant_that_is_asked_for_is_not_replaced(base: Path) -> None:
    halved(base, "unet")
    with pytest.raises(UserError, match="cannot load "):
        load(BaseConfig(model=str(base), variant="ema"))


def test_a_damaged_file_is_not_replaced_by_a_variant(base: Path) -> None:
    file = base / "unet" / f"{STEMS['unet']}.safetensors"
    whole = file.read_bytes()
    halved(base, "unet")
    file.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="cannot load unet"):
        load(BaseConfig(model=str(base)))


@pytest.mark.parametrize("part", STEMS)
def test_of_a_pickle_it_is_said_how_to_convert_it(base: Path, part: str) -> None:
    file = base / part / f"{STEMS[part]}.safetensors"
    pickle = base / part / ("pytorch_model.bin" if part == "text_encoder" else f"{STEMS[part]}.bin")
    torch.save(load_file(file), pickle)
    file.unlink()
    with pytest.raises(UserError) as error:
        load(BaseConfig(model=str(base)))
    assert f"{part}/{pickle.name} is a pickle file, which is never loaded; convert it" in str(error.value)
    assert "\n" not in str(error.value)
