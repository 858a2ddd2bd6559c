"""`dualcl bench customization`: what is written, the adapters on it, and a script that is run step by step."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dualcl.benchmark.cli.bench import KINDS
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.speed import customization as bench_customization
from dualcl.benchmark.speed.pairs import PEERS
from dualcl.benchmark.speed.worker import load_adapter


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """One thread; adapters are made for processes of their own, and set variables of the environment."""
    threads, variables = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(variables)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_customization.add_arguments(parser)
    return parser.parse_args(["--size", "tiny", "--images", "2", "--steps", "2", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and images, as the bench writes them."""
    from dualcl.benchmark.speed.customization_work import write_images, write_model

    path = tmp_path_factory.mktemp("bench")
    model = write_model(path / "model", bench_customization.parts("tiny", 8))
    for name in ("concept", "class"):
        write_images(path / name, 3, model.info.image_size)
    return path


def setup_of(folder: Path, name: str, side: str = "ours", *words: str) -> dict[str, Any]:
    """What an adapter is handed for a comparison."""
    by_name = {c.name: c for c in bench_customization.comparisons(arguments(*words), str(folder), 8)}
    setup = getattr(by_name[name], side).setup
    return {**json.loads(json.dumps(setup)), "device": "cpu", "threads": 1, "checkout": None}


def test_comparisons_have_names_and_adapters_of_their_own() -> None:
    rows = bench_customization.comparisons(arguments(), "there", 8)
    assert tuple(row.name for row in rows) == bench_customization.NAMES
    for side in [side for row in rows for side in (row.ours, row.peer)]:
        assert (PEERS / f"{side.adapter}.py").is_file()
        assert side.setup["model"] == str(Path("there") / "model")
    assert KINDS["customization"][0] == bench_customization.__name__


def test_sizes_are_half_of_the_channels() -> None:
    from dualcl.benchmark.speed.concepts_work import STABLE_DIFFUSION_1

    half = bench_customization.parts("quarter", 64)
    for part, key in (("unet", "block_out_channels"), ("vae", "block_out_channels"), ("text_encoder", "hidden_size")):
        ours, full = (torch.tensor(parts[part][key]) for parts in (half, STABLE_DIFFUSION_1))
        assert torch.equal(2 * ours, full)
    assert half["unet"]["cross_attention_dim"] == half["text_encoder"]["hidden_size"]
    assert bench_customization.parts("full", 64)["vae"]["sample_size"] == 512


def test_the_model_is_read_back_with_a_vocabulary_of_full_size(folder: Path) -> None:
    model = load(BaseConfig(model=str(folder / "model")))
    assert len(model.tokenizer) == model.text_encoder.get_input_embeddings().num_embeddings == 49408
    assert model.vocabularies[0].length == 77
    # the words are those of the bundled tokenizer, and none of the added ones
    ids = model.vocabularies[0].ids(["a photo of a symbol"])[0]
    assert ids.max() < 1100
    assert model.info.image_size == 16
    assert len(list((folder / "class").glob("*.png"))) == 3


def test_ours_takes_steps_on_the_images_of_a_batch(folder: Path) -> None:
    adapter = load_adapter(PEERS / "dualcl_customization.py")
    works = adapter.make(setup_of(folder, "custom-diffusion"))
    assert works["step"]() == works["step"]() == 4
    works = adapter.make(setup_of(folder, "dreambooth-lora"))
    assert works["step"]() == 2


def test_both_sides_make_the_same_images(folder: Path) -> None:
    ours = load_adapter(PEERS / "dualcl_customization.py").make(setup_of(folder, "sampling-batched"))
    peer = load_adapter(PEERS / "diffusers_sampling.py").make(setup_of(folder, "sampling-batched", "peer"))
    assert ours["brightness"]() == pytest.approx(peer["brightness"](), abs=0.01)
    assert ours["sample"]() == peer["one_by_one"]() == peer["batched"]() == 2


SCRIPT = """
    import argparse

    import torch
    from accelerate import Accelerator


    def parse_args(words):
        parser = argparse.ArgumentParser()
        parser.add_argument("--train_batch_size", type=int)
        parser.add_argument("--with_prior_preservation", action="store_true")
        parser.add_argument("--max_train_steps", type=int)
        return parser.parse_known_args(words)[0]


    done = []


    def main(parsed):
        accelerator = Accelerator(log_with="no such tracker")
        first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        for number in range(args.max_train_steps):
            with accelerator.accumulate(first), accelerator.accumulate(second):
                done.append(number)
            if number == 3:
                raise RuntimeError("no step after the fourth")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A script of the form that the examples have, in their place."""
    file = tmp_path / "examples" / "custom_diffusion" / "train_custom_diffusion.py"
    file.parent.mkdir(parents=True)
    file.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    return tmp_path


def test_a_script_is_held_where_a_step_begins(folder: Path, checkout: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    adapter = load_adapter(PEERS / "diffusers_training.py")
    works = adapter.make({**setup_of(folder, "custom-diffusion", "peer"), "checkout": str(checkout)})
    import train_custom_diffusion as script  # type: ignore[import-not-found]

    assert script.done == []
    for number in range(3):
        assert works["step"]() == 4
        assert script.done == list(range(number + 1))
    with pytest.raises(RuntimeError, match="no step after the fourth"):
        works["step"]()


def test_a_checkout_without_the_script_is_named(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    adapter = load_adapter(PEERS / "diffusers_training.py")
    with pytest.raises(FileNotFoundError, match=r"train_dreambooth_lora\.py does not exist; give a checkout"):
        adapter.make({**setup_of(folder, "dreambooth-lora", "peer"), "checkout": str(tmp_path)})
