"""Wrong input in the customization domain: exit code 2 and one line that names the thing and the mend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualcl.benchmark.cli import main


def photo(file: Path, width: int = 40, height: int = 40, seed: int = 0) -> None:
    """A picture of noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def make_photos(root: Path) -> Path:
    """Two concepts of two photographs."""
    for first, name in enumerate(("mug", "rex")):
        for i in range(2):
            photo(root / name / f"{i}.png", seed=2 * first + i)
    return root


class Place:
    """A folder with photographs and a preset of them and of a tiny model."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.photos = make_photos(root / "photos")
        self.preset = root / "own.yaml"
        self.preset.write_text(f"""
domain: customization
data: {{name: concept-folder, root: "{self.photos}"}}
base: {{model: "{model}"}}
train: {{epochs: 1, steps: 2, batch_size: 2, checkpoint_seconds: 0, log_every: 1}}
eval: {{n: 1, steps: 2, guidance: 1.0, features: glyph-vit}}
prior: {{n: 1, steps: 1, guidance: 1.0}}
threads: 1
methods: {{clora: {{rank: 2}}, lora: {{rank: 2}}}}
""")

    def run(self, *sets: str, out: Path, method: str = "clora", preset: str | Path | None = None) -> list[str]:
        """The arguments of `dualcl run`."""
        return ["run", str(preset or self.preset), method, "--out", str(out), "--quiet", *["--set"][: len(sets)], *sets]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Place:
    return Place(tmp_path_factory.mktemp("bad"), sd_folder)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """fails(argv, *words) -> the one line on stderr, which has all the words."""

    def check(argv: list[str], *words: str) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == ""
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("dualcl: error: ")
        for word in words:
            assert word in lines[0]
        return lines[0]

    return check


@pytest.fixture
def works(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], dict[str, Any]]:
    """works(argv of `dualcl run`) -> the record."""

    def check(argv: list[str]) -> dict[str, Any]:
        assert main(argv) == 0, capsys.readouterr().err
        record: dict[str, Any] = json.loads((Path(argv[argv.index("--out") + 1]) / "record.json").read_text())
        return record

    return check


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["concept.prompt=a photo"], ["concept.prompt", "{token}", "'a photo'"]),
        (["concept.prompt=a {color} {token}"], ["concept.prompt", "{color}", "{noun}"]),
        (["concept.placeholder=<v>"], ["concept.placeholder", "{number}", "'<v>'"]),
        (["concept.placeholder=<v {number}>"], ["concept.placeholder", "space"]),
        (["concept.n_tokens=0"], ["concept.n_tokens", "at least 1"]),
        (["concept.n_token=2"], ["concept.n_token'", "concept.n_tokens"]),
        (["concept.init=noun"], ["concept.init", "random", "word"]),
        (["base.weights_dtype=int8"], ["base.weights_dtype", "bf16"]),
        (["eval.prompt=a photo"], ["eval.prompt", "{token}"]),
        (["eval.n=0"], ["eval.n", "at least 1"]),
        (["eval.scheduler=pndm"], ["eval.scheduler", "ddim"]),
        (["prior.prompt=a photo"], ["prior.prompt", "{noun}"]),
        (["prior.n=0"], ["prior.n", "at least 1"]),
        (["train.steps=0"], ["train.steps", "at least 1"]),
        (["input.augment=crop_flip"], ["input.augment", "flip"]),
        (["stream.tasks=0"], ["stream.tasks", "at least 1"]),
        (['data.root=""'], ["data.root", "--set data.root=DIR"]),
        (["data.limit=1", "data.min_images=2"], ["data.limit", "data.min_images"]),
        (["precision=half"], ["precision", "bf16"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_values(
    place: Place, tmp_path: Path, fails: Callable[..., str], sets: list[str], words: list[str]
) -> None:
    fails(place.run(*sets, out=tmp_path / "run"), *words)
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["stream.tasks=3"], ["stream.tasks", "3", "2 concepts"]),
        (["train.epochs=2"], ["train.steps=2", "train.epochs=1", "got 2"]),
        (["train.drop_last=true"], ["train.drop_last=true", "leave it out"]),
        (["train.drop_last=true", "train.steps=null"], ["train.drop_last=true", "leave it out"]),
        (["concept.class_noun=true"], ["concept.class_noun=true", "class noun", "concept 'rex'", "data.noun"]),
        (["concept.init=word"], ["concept.init=word", "concept 'rex'", "data.noun"]),
        (["eval.prompt={token}, a {noun} on a table"], ["{token}, a {noun} on a table", "concept 'rex'", "data.noun"]),
        (["concept.init=word", "data.noun=hot dog"], ["concept.init=word", "'hot dog'", "not one", "random"]),
        (['concept.placeholder="{number}"'], ["'1'", "vocabulary", "another concept.placeholder"]),
        (["concept.n_tokens=30"], ["a photo of {token}", "24", "concept.n_tokens"]),
        (["eval.prompt={token} on a table in a garden at the sea in the evening sun"], ["{token} on a table", "24"]),
        (["base.weights_dtype=bf16"], ["base.weights_dtype=bf16", "precision=bf16"]),
        (["base.model=glyph-difusion"], ["glyph-difusion", "'glyph-diffusion'"]),
        (["base.model=/no/such/model"], ["/no/such/model", "no directory"]),
        (["method.rank=9"], ["method.rank=9", "8"]),
        (["eval.estimator=unbiased"], ["eval.estimator=unbiased", "eval.n"]),
        (["eval.steps=1000"], ["eval.steps", "below", "1000"]),
        (["eval.features=no-such-backbone"], ["no-such-backbone"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_values_that_do_not_fit_the_data_or_the_model(
    place: Place, tmp_path: Path, fails: Callable[..., str], sets: list[str], words: list[str]
) -> None:
    assert len(fails(place.run(*sets, out=tmp_path / "run"), *words)) < 400
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_methods_of_the_other_domain_and_steps_in_classification(
    place: Place, tmp_path: Path, fails: Callable[..., str]
) -> None:
    fails(place.run(method="l2p", out=tmp_path), "'l2p'", "'customization'", "classification")
    fails(place.run(method="dreambooth", preset="glyphs", out=tmp_path), "'dreambooth'", "customization")
    fails(place.run("train.steps=5", preset="glyphs", out=tmp_path / "run"), "train.steps", "train.epochs")
    fails(place.run("concept.n_tokens=2", preset="glyphs", out=tmp_path), "concept.n_tokens")
    fails(place.run("backbone.name=glyph-vit", out=tmp_path), "backbone.name", "base.model")


# --- photographs and words --------------------------------------------------------------------------------------------


def _no_photos(root: Path) -> list[str]:
    (root / "cup").mkdir()
    return [str(root / "cup"), "no images"]


def _only_text(root: Path) -> list[str]:
    (root / "cup").mkdir()
    (root / "cup" / "notes.txt").write_text("a cup")
    return [str(root / "cup"), "no images", ".png"]


def _photos_beside_the_folders(root: Path) -> list[str]:
    for name in ("mug", "rex"):
        (root / name / "0.png").rename(root / f"{name}.png")
        shutil.rmtree(root / name)
    return [str(root), "no concept folders"]


def _corrupt(root: Path) -> list[str]:
    file = root / "mug" / "1.png"
    file.write_bytes(file.read_bytes()[:300])
    return [str(file), "data.on_bad_image=skip"]


def _text_as_image(root: Path) -> list[str]:
    (root / "mug" / "2.jpg").write_text("not a picture")
    return [str(root / "mug" / "2.jpg"), "data.on_bad_image=skip"]


def _gone(root: Path) -> list[str]:
    shutil.rmtree(root)
    return [str(root), "does not exist"]


@pytest.mark.parametrize(
    "damage", [_no_photos, _only_text, _photos_beside_the_folders, _corrupt, _text_as_image, _gone]
)
def test_wrong_photographs(
    place: Place, tmp_path: Path, fails: Callable[..., str], damage: Callable[[Path], list[str]]
) -> None:
    root = make_photos(tmp_path / "photos")
    fails(place.run(f'data.root="{root}"', out=tmp_path / "run"), *damage(root))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mug: {prompts: [a photo of a mug]}", ["mug", "{token}"]),
        ("mug: {eval_prompts: ['a {token} on {place}']}", ["mug", "{place}"]),
        ("mog: {noun: mug}", ["'mog'", "'mug'"]),
        ("mug: mug", ["mug", "noun"]),
        ("- mug", ["mapping"]),
        ("mug: {nuon: cup}", ["nuon", "noun"]),
        ("mug: [", ["not valid YAML"]),
    ],
)
def test_wrong_prompt_files(
    place: Place, tmp_path: Path, fails: Callable[..., str], text: str, words: list[str]
) -> None:
    file = tmp_path / "words.yaml"
    file.write_text(text)
    fails(place.run(f'data.prompts="{file}"', out=tmp_path / "run"), str(file), *words)


def test_an_out_among_the_photographs_is_refused(place: Place, fails: Callable[..., str]) -> None:
    for out in (place.photos, place.photos / "mug"):
        fails(place.run(out=out), f"{out} lies in data.root={place.photos}", "choose an --out outside of it")
    assert sorted(p.name for p in place.photos.rglob("*")) == ["0.png", "0.png", "1.png", "1.png", "mug", "rex"]


def test_a_single_tiny_or_oblong_photograph_will_do_and_is_noted(
    place: Place, tmp_path: Path, works: Callable[..., dict[str, Any]]
) -> None:
    root = tmp_path / "photos"
    photo(root / "One & only!" / "wide.png", 90, 7)
    photo(root / "cat" / "tall.jpg", 9, 200)
    photo(root / "cat" / "dot.png", 1, 1)
    Image.new("L", (30, 30), 99).save(root / "cat" / "grey.png")
    record = works(place.run(f'data.root="{root}"', "stream.class_order=natural", out=tmp_path / "run"))
    assert record["status"] == "finished"
    warnings = record["network"]["warnings"]
    assert "One & only!: one image only" in warnings
    assert any("dot.png" in w and "1 pixels" in w for w in warnings)
    assert (tmp_path / "run" / "samples" / "after_2" / "1_one-only" / "0.png").is_file()
    # neither name nor noun is a word of the prompts
    assert record["network"]["concepts"] == ["One & only!", "cat"]


def test_a_bad_photograph_can_be_skipped_and_the_record_says_so(
    place: Place, tmp_path: Path, works: Callable[..., dict[str, Any]]
) -> None:
    root = make_photos(tmp_path / "photos")
    _corrupt(root)
    record = works(place.run(f'data.root="{root}"', "data.on_bad_image=skip", out=tmp_path / "run"))
    assert record["network"]["skipped_images"] == ["mug/1.png"]


# --- models -----------------------------------------------------------------------------------------------------------


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _without(part: str) -> Callable[[Path], list[str]]:
    def damage(model: Path) -> list[str]:
        shutil.rmtree(model / part)
        return [f"lacks {part}/"]

    return damage


def _weights(model: Path, part: str) -> Path:
    (file,) = (model / part).glob("*.safetensors")
    return file


def _cut(part: str) -> Callable[[Path], list[str]]:
    def damage(model: Path) -> list[str]:
        file = _weights(model, part)
        file.write_bytes(file.read_bytes()[:-100])
        return [f"cannot load {part} of the model"]

    return damage


def _lacks_a_weight(part: str) -> Callable[[Path], list[str]]:
    def damage(model: Path) -> list[str]:
        from safetensors.torch import load_file, save_file

        file = _weights(model, part)
        state = load_file(file)
        gone = sorted(k for k in state if k.endswith("weight"))[0]
        del state[gone]
        save_file(state, file, {"format": "pt"})
        return [f"cannot load {part} of the model", "weight"]

    return damage


def _no_weights(part: str) -> Callable[[Path], list[str]]:
    def damage(model: Path) -> list[str]:
        _weights(model, part).unlink()
        return [f"cannot load {part} of the model"]

    return damage


def _no_vocabulary(model: Path) -> list[str]:
    for file in (model / "tokenizer").iterdir():
        file.unlink()
    return ["cannot load tokenizer of the model"]


def _no_index(model: Path) -> list[str]:
    (model / "model_index.json").unlink()
    return ["no model_index.json", "diffusers layout"]


def _index(text: str, *words: str) -> Callable[[Path], list[str]]:
    def damage(model: Path) -> list[str]:
        (model / "model_index.json").write_text(text)
        return ["model_index.json", *words]

    return damage


def _xl(model: Path) -> list[str]:
    _edit(
        model / "model_index.json",
        _class_name="StableDiffusionXLPipeline",
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
    )
    return ["StableDiffusionXLPipeline", "only Stable Diffusion 1.x and 2.x"]


def _transformer(model: Path) -> list[str]:
    _edit(model / "model_index.json", _class_name="StableDiffusion3Pipeline", transformer=["diffusers", "X"])
    shutil.rmtree(model / "unet")
    return ["StableDiffusion3Pipeline", "only Stable Diffusion 1.x and 2.x"]


def _inpainting(model: Path) -> list[str]:
    from diffusers import UNet2DConditionModel

    config = {**UNet2DConditionModel.load_config(model / "unet"), "in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(model / "unet")
    return ["takes 9 channels", "no inpainting"]


def _other_text_encoder(model: Path) -> list[str]:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(model / "text_encoder")
    config.hidden_size = 32
    CLIPTextModel(config).save_pretrained(model / "text_encoder")
    return ["width 24", "has 32", "different models"]


def _small_vocabulary(model: Path) -> list[str]:
    from transformers import CLIPTextModel

    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    text_encoder.resize_token_embeddings(500)
    text_encoder.save_pretrained(model / "text_encoder")
    return ["the text encoder 500", "different models"]


def _predicts_samples(model: Path) -> list[str]:
    _edit(model / "scheduler" / "scheduler_config.json", prediction_type="sample")
    return ["'sample'", "epsilon and v_prediction"]


def _no_size(model: Path) -> list[str]:
    _edit(model / "unet" / "config.json", sample_size=None)
    return ["sample_size"]


def _broken_config(part: str, name: str) -> Callable[[Path], list[str]]:
    def damage(model: Path) -> list[str]:
        (model / part / name).write_text("{broken")
        return [f"cannot load {part} of the model"]

    return damage


MODELS: dict[str, Callable[[Path], list[str]]] = {
    **{f"no {part}": _without(part) for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")},
    **{f"{part} cut": _cut(part) for part in ("unet", "vae", "text_encoder")},
    **{f"{part} lacks a weight": _lacks_a_weight(part) for part in ("unet", "vae", "text_encoder")},
    "no weights": _no_weights("unet"),
    "no vocabulary": _no_vocabulary,
    "no index": _no_index,
    "index no json": _index("{", "not valid JSON"),
    "index a list": _index("[]", "not valid"),
    "index a number": _index("3", "not valid"),
    "xl": _xl,
    "transformer": _transformer,
    "inpainting": _inpainting,
    "text width": _other_text_encoder,
    "small vocabulary": _small_vocabulary,
    "predicts samples": _predicts_samples,
    "no size": _no_size,
    "unet config": _broken_config("unet", "config.json"),
    "text config": _broken_config("text_encoder", "config.json"),
    "tokenizer": _broken_config("tokenizer", "tokenizer.json"),
    "scheduler config": _broken_config("scheduler", "scheduler_config.json"),
}


@pytest.mark.parametrize("case", list(MODELS))
def test_wrong_models(place: Place, tmp_path: Path, fails: Callable[..., str], case: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(place.model, model)
    line = fails(place.run(f'base.model="{model}"', out=tmp_path / "run"), *MODELS[case](model))
    assert str(model) in line or "tokenizer has" in line
    assert len(line) < 700


def test_models_that_are_not_there(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("")
    fails(place.run(f'base.model="{file}"', out=tmp_path / "run"), str(file), "is a file", "diffusers layout")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = fails(
        place.run("base.model=dualcl-tests/no-such-model", out=tmp_path / "run"),
        "cannot load tokenizer of the model dualcl-tests/no-such-model",
        "local directory",
        "HF_HUB_OFFLINE",
    )
    assert len(line) < 500


# --- prior images -----------------------------------------------------------------------------------------------------


def test_prior_images_that_are_not_there(place: Place, tmp_path: Path, fails: Callable[..., str]) -> None:
    def argv(folder: Path) -> list[str]:
        return place.run(f'prior.images="{folder}"', method="custom_diffusion", out=tmp_path / "run")

    fails(argv(tmp_path / "none"), "prior.images", str(tmp_path / "none"), "prior.images=generated")
    (tmp_path / "empty").mkdir()
    fails(argv(tmp_path / "empty"), str(tmp_path / "empty"), "no images", "prior.images=generated")
    photo(tmp_path / "cut" / "0.png")
    (tmp_path / "cut" / "0.png").write_bytes((tmp_path / "cut" / "0.png").read_bytes()[:300])
    fails(argv(tmp_path / "cut"), str(tmp_path / "cut" / "0.png"), "replace or remove")


# --- runs that cannot go on -------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_keeps_the_concepts_learnt(
    place: Place, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = tmp_path / "run"
    # the penalty overflows as soon as there is an earlier update to protect: at the second concept
    line = fails(
        place.run("method.lambda_=1e300", "method.lr=0.1", out=out), " at task 2, step ", "method.lr", str(out)
    )
    record = json.loads((out / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] in line
    assert [row["after_task"] for row in record["matrix"]["rows"]] == [0]
    assert (out / "checkpoints" / "task_0" / "state.safetensors").is_file()
    assert [p.name for p in (out / "samples").glob("after_*")] == ["after_1"]


@pytest.mark.parametrize(
    ("method", "sets"),
    [
        ("finetune", ["method.lr=1e30"]),
        ("clora", ["method.lr=1e30"]),
        ("textual_inversion", ["method.head_lr=1e39"]),
        # one step: its loss is fine, what it leaves is not
        ("finetune", ["method.lr=1e30", "train.steps=1"]),
    ],
    ids=["finetune", "clora", "textual inversion", "last step"],
)
def test_a_learning_rate_that_explodes(
    place: Place, tmp_path: Path, fails: Callable[..., str], method: str, sets: list[str]
) -> None:
    fails(place.run(*sets, method=method, out=tmp_path / "run"), "method.lr")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["status"], record["matrix"]["rows"]) == ("failed", [])


def test_images_of_the_last_concepts_that_were_lost(
    place: Place, tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualcl.benchmark.runs.folder import RunFolder

    out, real = tmp_path / "run", RunFolder.log

    def log(self: RunFolder, **entry: Any) -> None:
        if entry["task"] == 1:
            raise KeyboardInterrupt
        real(self, **entry)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        assert main(place.run(out=out)) == 130
    (image,) = (out / "samples" / "after_1").rglob("*.png")
    image.unlink()
    fails(place.run(out=out), str(image), "is missing", "afresh")


def test_another_model_behind_the_same_configuration(place: Place, tmp_path: Path, fails: Callable[..., str]) -> None:
    from safetensors.torch import load_file, save_file

    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(place.model, model)
    # the second concept never comes to its end
    fails(place.run(f'base.model="{model}"', "method.lambda_=1e300", "method.lr=0.1", out=out))
    file = _weights(model, "unet")
    state = load_file(file)
    state["conv_in.bias"] = torch.nextafter(state["conv_in.bias"], torch.tensor(9.0))
    save_file(state, file, {"format": "pt"})
    fails(
        place.run(f'base.model="{model}"', "method.lambda_=1e300", "method.lr=0.1", out=out),
        "weights_sha256",
        "choose another --out",
    )
