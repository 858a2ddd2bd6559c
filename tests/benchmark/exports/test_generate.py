"""`dualcl generate`: prompts, seeds, files, and the same images from a run and from its exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import StableDiffusionPipeline
from transformers import AddedToken, CLIPTokenizer

from dualcl.benchmark.cli import main
from dualcl.benchmark.cli.options import SCHEDULERS
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.exports.export import export
from dualcl.benchmark.exports.generate import Model, Word, expand_prompt, generate, open_model
from dualcl.benchmark.exports.usage import model_card
from dualcl.benchmark.models.bundled import bundled_diffusion
from dualcl.benchmark.models.tokens import CARD

WORDS = (
    Word("<c1>", ("<c1>", "<c1>_1"), "Black Cat"),
    Word("<c2>", ("<c2>", "<c2>_1"), "c2"),
    Word("<c3>", ("<c3>", "<c3>_1"), "red/dog"),
    Word("<c4>", ("<c4>", "<c4>_1"), "red dog"),
    Word("sks10", ("sks10",), "vase"),
    Word("sks1", ("sks1",), "pot"),
)
PROMPT = "a photo of <c1> and <c2>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The bundled model's, which knows WORDS as a run's does."""
    found: Any = CLIPTokenizer.from_pretrained(str(bundled_diffusion()["glyph-diffusion"]), subfolder="tokenizer")
    found.add_tokens([AddedToken(t, single_word=t.startswith("sks")) for w in WORDS for t in w.tokens])
    return found


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def text(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        found: dict[str, str] = image.text  # type: ignore[attr-defined]
        return found


@pytest.fixture(scope="module")
def folder(concept_run: Callable[..., Path]) -> Path:
    return concept_run("clora", "method.rank=4", "method.lambda=10")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(folder, "cpu")


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expanded", "used"),
    [
        ("a <c1>", "a <c1> <c1>_1", ["<c1>"]),
        ("<c2> and <c1>, <c2>", "<c2> <c2>_1 and <c1> <c1>_1, <c2> <c2>_1", ["<c2>", "<c1>"]),
        ("the <black cat> and the <Black-Cat>", "the <c1> <c1>_1 and the <c1> <c1>_1", ["<c1>"]),
        ("sks1 beside sks10, sks100", "sks1 beside sks10, sks100", ["sks1", "sks10"]),
        ("a <vase>", "a sks10", ["sks10"]),
        ("plain <|endoftext|> a < b", "plain <|endoftext|> a < b", []),
        ("<c1>'s <C3>s, <c1> <c1>_1", "<c1> <c1>_1's <c3> <c3>_1s, <c1> <c1>_1", ["<c1>", "<c3>"]),
        ("SKS1, sks1's my-sks1", "SKS1, sks1's my-sks1", ["sks1"]),
        ("mysks1 sks1s sks1_1 sks12 sks1\u0301 sks1\u00e9", "mysks1 sks1s sks1_1 sks12 sks1\u0301 sks1\u00e9", []),
        ("a<vase>s", "a sks10 s", ["sks10"]),
        ("<#1> and a<#5>", "<c1> <c1>_1 and a sks10", ["<c1>", "sks10"]),
    ],
)
def test_tags_become_tokens(prompt: str, expanded: str, used: list[str], tokenizer: Any) -> None:
    found, words = expand_prompt(prompt, WORDS, tokenizer)
    assert (found, [w.placeholder for w in words]) == (expanded, used)


def test_unknown_and_shared_names_are_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"unknown placeholder <c9> .*<c1> \(Black Cat\), <c2>"):
        expand_prompt("a <c9>", WORDS, tokenizer)
    with pytest.raises(UserError, match=r"<red dog> may be <#3> \(red/dog, placeholder <c3>\) or <#4> \(red dog, "):
        expand_prompt("a <red dog>", WORDS, tokenizer)
    for number in ("<#7>", "<#0>"):
        with pytest.raises(UserError, match=f"unknown placeholder {number}"):
            expand_prompt(f"a {number}", WORDS, tokenizer)
    with pytest.raises(UserError, match="knows: none"):
        expand_prompt("a <c1>", (), tokenizer)


def test_a_name_like_anothers_placeholder_is_refused_and_numbers_tell_them_apart(tokenizer: Any) -> None:
    words = [
        Word("<c1>", ("<c1>", "<c1>_1"), "c2"),
        Word("<c2>", ("<c2>", "<c2>_1"), "C1"),
        Word("sks1", ("sks1",), "2"),
    ]
    for tag in ("<c1>", "<C2>"):
        either = r"<#1> \(c2, placeholder <c1>\) or <#2> \(C1, placeholder <c2>\)"
        with pytest.raises(UserError, match=f"{tag} may be {either}; write the number, such as <#1>"):
            expand_prompt(f"a photo of {tag}", words, tokenizer)
    for number, tag in enumerate(("<#1>", "<#2>", "<#3>")):
        assert expand_prompt(f"a photo of {tag}", words, tokenizer)[1] == [words[number]]
    assert expand_prompt("a <2>", words, tokenizer)[1] == [words[2]]


# --- images of a run --------------------------------------------------------------------------------------------------


def test_command_writes_what_it_prints(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = json.loads((folder / "record.json").read_text())["network"]["concepts"][0]
    words = ["--prompt", PROMPT, "--prompt", f"a drawing of <{name}>", "-n", "2", "--seed", "5", "--steps", "2"]
    assert main(["generate", str(folder), *words, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    paths = [Path(line) for line in captured.out.splitlines()]
    assert paths == [p for p in paths if p.parent == tmp_path / "out"]
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    assert [(text(p)["prompt"], text(p)["seed"]) for p in paths] == [
        (PROMPT, "5"),
        (PROMPT, "6"),
        (f"a drawing of <{name}>", "5"),
        (f"a drawing of <{name}>", "6"),
    ]
    assert text(paths[0])["steps"] == "2"
    assert captured.err == ""
    assert all(pixels(p).shape == (32, 32, 3) for p in paths)
    # a concept's name is its placeholder
    assert (
        main(["generate", str(folder), "--prompt", "a drawing of <c1>", *words[4:], "--out", str(tmp_path / "b")]) == 0
    )
    named = [Path(line) for line in capsys.readouterr().out.splitlines()]
    for a, b in zip(paths[2:], named, strict=True):
        assert np.array_equal(pixels(a), pixels(b))


@pytest.mark.parametrize("method", ["clora", "custom_diffusion_merge"])
def test_images_of_the_evaluation_come_again(method: str, concept_run: Callable[..., Path], tmp_path: Path) -> None:
    sets = {"clora": ["method.rank=4", "method.lambda=10"], "custom_diffusion_merge": ["method.prior_weight=0"]}
    run = concept_run(method, *sets[method])
    opened = open_model(run, "cpu")
    saved = sorted((run / "samples" / "after_3").rglob("*.png"))
    assert len(saved) == 3
    for number, file in enumerate(saved):
        said = text(file)
        (again,) = generate(opened, [said["prompt"]], tmp_path / str(number), n=1, seed=int(said["seed"]))
        assert np.abs(pixels(again).astype(int) - pixels(file).astype(int)).max() <= 1


def test_an_image_is_a_function_of_its_own_seed(model: Model, tmp_path: Path) -> None:
    generator = torch.random.get_rng_state()
    many = generate(model, [PROMPT], tmp_path / "many", n=3, seed=1, steps=2)
    single = generate(model, [PROMPT], tmp_path / "single", n=1, seed=3, steps=2)
    assert np.abs(pixels(many[2]).astype(int) - pixels(single[0]).astype(int)).max() <= 1
    assert not np.array_equal(pixels(many[0]), pixels(many[2]))
    split = generate(model, [PROMPT], tmp_path / "split", n=3, seed=1, steps=2, batch_size=2)
    for a, b in zip(many, split, strict=True):
        assert np.abs(pixels(a).astype(int) - pixels(b).astype(int)).max() <= 1
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_settings_change_the_image_and_never_overwrite_another(model: Model, tmp_path: Path) -> None:
    first = generate(model, [PROMPT], tmp_path, n=1, steps=2)
    assert generate(model, [PROMPT], tmp_path, n=1, steps=2) == first
    kept = pixels(first[0])
    others = [
        generate(model, [PROMPT], tmp_path, n=1, steps=3)[0],
        generate(model, [PROMPT], tmp_path, n=1, steps=2, guidance=1.0)[0],
        generate(model, [PROMPT], tmp_path, n=1, steps=2, scheduler="dpm")[0],
        generate(model, [PROMPT], tmp_path, n=1, steps=2, negative_prompt="a drawing of <c3>")[0],
    ]
    assert len({*first, *others}) == 5
    assert np.array_equal(pixels(first[0]), kept)
    for other in others:
        assert not np.array_equal(pixels(other), kept)
    # defaults are those of the run
    assert (model.steps, model.guidance, model.scheduler) == (1, 7.5, "ddim")
    assert text(generate(model, ["<c1>"], tmp_path / "default", n=1)[0])["steps"] == "1"


def test_prompts_without_a_concept_work_with_a_note(model: Model, tmp_path: Path) -> None:
    said: list[str] = []
    assert len(generate(model, ["a photo of red", "<c1>"], tmp_path, n=1, steps=1, say=said.append)) == 2
    assert len(said) == 1
    assert "'a photo of red' holds no concept; this model knows: <c1>, <c2>, <c3>" in said[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a <c9>"], "unknown placeholder <c9>"),
        (["--prompt", "<c1>", "--after", "2"], "keeps the state after task 3 only"),
        (["--prompt", "<c1>", "--base", "glyph-difusion"], "base.model=glyph-difusion is no directory"),
        (["--prompt", "<c1>", "--scheduler", "ddmi"], "did you mean 'ddim'"),
        (["--prompt", "<c1>", "--guidance", "much"], "wants a number"),
        (["--prompt", "<c1>", "--device", "tpu"], "unknown device 'tpu'"),
        (["--prompt", "<c1>", "-n", "0"], "from 1 on"),
        ([], "--prompt"),
    ],
)
def test_wrong_input_is_one_line_and_makes_nothing(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SCHEDULERS == ("ddim", "dpm")
    assert main(["generate", str(folder), *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dualcl: error:")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["<c1>", "a <c9>"], {}, "unknown placeholder <c9>"),
        (["<c1>", "<c1> " + "red " * 40], {}, "tokens, the model takes 24"),
        (["<c1>"], {"negative_prompt": "<c9>"}, "unknown placeholder <c9>"),
        (["<c1>"], {"steps": 5000}, "--steps must be from 1 to 1000"),
        (["<c1>"], {"guidance": -1.0}, "--guidance must be a number from 0 on"),
        (["<c1>"], {"guidance": float("nan")}, "--guidance must be a number from 0 on"),
        (["<c1>"], {"seed": 2**63}, "--seed must be less than"),
    ],
)
def test_wrong_settings_are_found_before_any_image(
    prompts: list[str], settings: dict[str, Any], message: str, model: Model, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, prompts, tmp_path / "out", **{"n": 1, **settings})
    assert not (tmp_path / "out").exists()


def test_after_the_last_task_is_taken(folder: Path) -> None:
    assert open_model(folder, "cpu", after=3).source == "clora after task 3"


def test_other_folders_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "<c1>"]) == 2
    assert "neither a run (no record.json) nor an exported model" in capsys.readouterr().err
    (tmp_path / CARD).write_text("{}")
    assert main(["generate", str(tmp_path), "--prompt", "<c1>"]) == 2
    assert "is not the card of an exported model" in capsys.readouterr().err


def test_a_classification_run_makes_no_images(tiny: Callable[..., Any], tmp_path: Path) -> None:
    from dualcl.benchmark.runs.runner import run

    run(tiny("lora", "method.rank=2", "threads=1"), tmp_path / "run")
    with pytest.raises(UserError, match="domain classification; only customization runs make images"):
        open_model(tmp_path / "run", "cpu")
    with pytest.raises(UserError, match="domain classification; only customization runs can be exported"):
        export(tmp_path / "run", "kohya", tmp_path / "out")


# --- images of an export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diffusers-lora", "kohya", "peft", "merged"])
def test_an_export_makes_the_images_of_the_run(kind: str, folder: Path, model: Model, tmp_path: Path) -> None:
    export(folder, kind, tmp_path / "out")
    (ours,) = generate(model, [PROMPT], tmp_path / "ours", n=1, steps=2)
    exported = open_model(tmp_path / "out", "cpu")
    assert exported.words == model.words
    assert (exported.steps, exported.guidance, exported.scheduler) == (model.steps, model.guidance, model.scheduler)
    (theirs,) = generate(exported, [PROMPT], tmp_path / "theirs", n=1, steps=2)
    assert np.abs(pixels(ours).astype(int) - pixels(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["diffusers-lora", "kohya", "peft", "merged", "textual-inversion", "ip-adapter"])
def test_the_python_that_an_export_tells_draws_the_pictures_of_the_run(
    kind: str,
    concept_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "lora" in kind or kind in ("kohya", "peft"):
        pytest.importorskip("peft")
    method = {"textual-inversion": ["textual_inversion"], "ip-adapter": ["encoder", "method.encoder=untrained"]}
    sampling = ["eval.scheduler=ddim", "eval.guidance=7.5", "eval.steps=2"]
    if kind != "kohya":
        sampling = ["eval.scheduler=dpm", "eval.guidance=3", "eval.steps=3", "eval.negative_prompt=a drawing of red"]
    run = concept_run(*method.get(kind, ["lora"]), "stream.tasks=2", "concept.n_tokens=2", *sampling)
    out = tmp_path / "it's out"
    assert main(["export", str(run), "--to", kind, str(out)]) == 0
    facts, _, code = capsys.readouterr().err.partition("in Python:\n")
    assert f": {bundled_diffusion()['glyph-diffusion']}\n" in facts
    name, steps = ("ddim (DDIMScheduler)", 2) if kind == "kohya" else ("dpm (DPMSolverMultistepScheduler)", 3)
    assert f"the run's pictures: scheduler {name}, {steps} steps, guidance" in facts
    assert ("pip install peft" in facts) == (kind in ("diffusers-lora", "kohya", "peft"))
    about, card = (out / "README.md").read_text().split("---\n")[1:3]
    assert yaml.safe_load(about)["library_name"] == ("peft" if kind == "peft" else "diffusers")
    assert str(bundled_diffusion()["glyph-diffusion"].parent) not in card
    # what is printed runs anywhere, what the card holds in its folder
    monkeypatch.chdir(tmp_path)
    told: dict[str, Any] = {}
    exec(code, told)
    monkeypatch.chdir(out)
    carded: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```\n")[0], carded)
    (ours,) = generate(open_model(run, "cpu"), ["a photo of <c1>"], tmp_path / "ours", n=1)
    for theirs in (told["image"], carded["image"]):
        assert np.abs(pixels(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_a_card_names_what_hubs_can_find_and_escapes_names(folder: Path, tmp_path: Path) -> None:
    card = export(folder, "kohya", tmp_path / "out")
    assert "base_model" not in model_card(card)
    card["base"].update(
        name="CompVis/stable-diffusion-v1-4", weights="hub: CompVis/stable-diffusion-v1-4", variant="fp16"
    )
    card["concepts"][0].update(name="<b>`cat`")
    about, text = model_card(card).split("---\n")[1:3]
    assert yaml.safe_load(about)["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert "from_pretrained('CompVis/stable-diffusion-v1-4', variant='fp16')" in text
    assert r"`<c1>`: \<b\>\`cat\`" in text


def test_several_tokens_and_half_precision(concept_run: Callable[..., Path], tmp_path: Path) -> None:
    half = ["precision=bf16", "base.weights_dtype=bf16"]
    folder = concept_run("textual_inversion", "concept.n_tokens=2", "stream.tasks=2", *half)
    export(folder, "textual-inversion", tmp_path / "embeddings")
    export(folder, "merged", tmp_path / "merged")
    images = []
    for source in (folder, tmp_path / "embeddings", tmp_path / "merged"):
        opened = open_model(source, "cpu")
        assert opened.precision == "bf16"
        assert [w.tokens for w in opened.words] == [("<c1>", "<c1>_1"), ("<c2>", "<c2>_1")]
        (file,) = generate(opened, [PROMPT], tmp_path / str(len(images)), n=1, steps=2)
        images.append(pixels(file).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[0] - images[2]).mean() < 2  # bfloat16 has 8 bits
    pipe: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert pipe("a photo of <c1> <c1>_1", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_another_base_is_said_and_one_that_does_not_fit_refused(folder: Path, model: Model, tmp_path: Path) -> None:
    export(folder, "diffusers-lora", tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(bundled_diffusion()["glyph-diffusion"], other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    said: list[str] = []
    opened = open_model(tmp_path / "out", "cpu", base=str(other), say=said.append)
    assert len(said) == 1
    assert "other" in said[0]
    assert "is not the model this was made on, glyph-diffusion" in said[0]
    (here,) = generate(opened, [PROMPT], tmp_path / "here", n=1, steps=2)
    (there,) = generate(model, [PROMPT], tmp_path / "there", n=1, steps=2)
    assert not np.array_equal(pixels(here), pixels(there))

    said.clear()
    open_model(tmp_path / "out", "cpu", base="glyph-diffusion", say=said.append)
    assert said == []
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    save_file({k: torch.cat([v, v]) if ".lora_B." in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"no projection that fits .*give the base model"):
        open_model(tmp_path / "out", "cpu")
    file.write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be read"):
        open_model(tmp_path / "out", "cpu")


@pytest.mark.parametrize("word", ["<c{number}>", "my{number}"])
def test_a_merged_export_goes_on_with_words_behind_its_own(
    word: str, concept_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["stream.tasks=1", f"concept.placeholder={word}", "eval.features=glyph-vit"]
    first = concept_run("textual_inversion", *sets, "concept.n_tokens=2")
    export(first, "merged", tmp_path / "one")
    second = concept_run("lora", *sets, "data.skip=1", f"base.model={tmp_path / 'one'}")
    old, new = word.replace("{number}", "1"), word.replace("{number}", "2")
    opened = open_model(second, "cpu")
    assert [w.tokens for w in opened.words] == [(old, f"{old}_1"), (new,)]
    before, after = (json.loads((run / "record.json").read_text()) for run in (first, second))
    assert after["run"]["extends"]["config_hash"] == before["config_hash"]
    assert after["run"]["extends"]["weights_sha256"] == after["identity"]["weights_sha256"]
    both = f"a photo of {old} and {new}"
    (ours,) = generate(opened, [both], tmp_path / "ours", n=1, steps=2)
    export(second, "merged", tmp_path / "two")
    export(second, "kohya", tmp_path / "lora")
    for exported in (open_model(tmp_path / "two", "cpu"), open_model(tmp_path / "lora", base=str(tmp_path / "one"))):
        assert exported.words == opened.words
        (theirs,) = generate(exported, [both], tmp_path / exported.source, n=1, steps=2)
        assert np.abs(pixels(ours).astype(int) - pixels(theirs).astype(int)).max() <= 1
    pipe: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "two")
    base = len(StableDiffusionPipeline.from_pretrained(bundled_diffusion()["glyph-diffusion"]).tokenizer)
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(both, pipe.tokenizer), add_special_tokens=False).input_ids
    assert [i - base for i in ids if i >= base] == [0, 1, 2]
    # a damaged card is refused before anything is trained
    (tmp_path / "one" / CARD).write_text("[]")
    words = ["run", "glyph-concepts-quick", "lora", "--quiet", "--out", str(tmp_path / "run"), "--set"]
    assert main([*words, f"base.model={tmp_path / 'one'}"]) == 2
    assert "export again" in capsys.readouterr().err.splitlines()[-1]


def test_a_base_from_a_directory_must_be_named(folder: Path, tmp_path: Path) -> None:
    export(folder, "merged", tmp_path / "whole")
    with pytest.raises(UserError, match="whole model; leave out --base"):
        open_model(tmp_path / "whole", "cpu", base="glyph-diffusion")
    with pytest.raises(UserError, match="one state; leave out --after"):
        open_model(tmp_path / "whole", "cpu", after=1)
    export(folder, "kohya", tmp_path / "out")
    card = json.loads((tmp_path / "out" / CARD).read_text())
    card["base"].update(name="my-model", weights="local directory")
    (tmp_path / "out" / CARD).write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"made on the model directory my-model; say where it is with --base DIR"):
        open_model(tmp_path / "out", "cpu")
