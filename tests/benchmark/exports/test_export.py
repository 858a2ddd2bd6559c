"""Exported runs: equal to ours in stock diffusers and peft, exact in rank, refused where a format cannot hold them."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from dualcl.benchmark.cli import main
from dualcl.benchmark.cli.options import EXPORT_FORMATS
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.exports.export import WRITERS, export, factorise
from dualcl.benchmark.exports.generate import open_model
from dualcl.benchmark.exports.usage import LORA_FILES
from dualcl.benchmark.models.bundled import bundled_diffusion
from dualcl.benchmark.models.image_branch import ImagePrompts
from dualcl.benchmark.models.stable_diffusion import StableDiffusion, cross_attention_sites
from dualcl.benchmark.models.tokens import CARD
from dualcl.benchmark.models.weights import state_hash
from dualcl.benchmark.runs.restore import restore

RANK, TASKS = 4, 3
PROMPTS = ["a photo of <c1> and <c3>", "a drawing of <c2>", "a photo of red"]
BASE = bundled_diffusion()["glyph-diffusion"]


def stock() -> Any:
    """The bundled model in diffusers' own pipeline, float32."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    return pipe.to(torch.float32)


def text_of(tokenizer: Any, encoder: Any, prompts: list[str] = PROMPTS) -> Tensor:
    ids = tokenizer(prompts, padding="max_length", max_length=24, return_tensors="pt").input_ids
    hidden: Tensor = encoder(ids).last_hidden_state
    return hidden


def denoised(unet: Any, text: Tensor) -> Tensor:
    """The U-Net's output for fixed latents and timesteps."""
    latents = torch.randn(len(text), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    predicted: Tensor = unet(latents, torch.tensor([20, 400, 900]), encoder_hidden_states=text).sample
    return predicted


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Warnings are errors, and diffusers' own log of unexpected or missing keys can be asked for."""
    diffusers_logging.enable_propagation()
    diffusers_logging.set_verbosity_warning()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.filterwarnings("error", message=".*(key|adapter|mismatch).*")
        yield lambda: [
            r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "key" in r.getMessage()
        ]
    diffusers_logging.disable_propagation()
    diffusers_logging.set_verbosity_error()


@pytest.fixture(scope="module")
def folder(concept_run: Callable[..., Path]) -> Path:
    return concept_run("clora", f"method.rank={RANK}", "method.lambda=10")


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[Tensor, Tensor]:
    """(text features, U-Net outputs) of the run itself."""
    with torch.no_grad():
        diffusion: StableDiffusion = restore(folder).domain.diffusion  # type: ignore[attr-defined]
        text = diffusion.encode_text(PROMPTS).states
        return text, denoised(diffusion.unet, text)


def load_words(pipe: Any, out: Path) -> None:
    for file in sorted((out / "learned_embeds").glob("*.safetensors")):
        pipe.load_textual_inversion(file)


def check_same(pipe_unet: Any, pipe: Any, ours: tuple[Tensor, Tensor]) -> None:
    text = text_of(pipe.tokenizer, pipe.text_encoder)
    torch.testing.assert_close(text, ours[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(denoised(pipe_unet, text), ours[1], atol=1e-5, rtol=1e-5)


# --- factors ----------------------------------------------------------------------------------------------------------


def folded(d_out: int, d_in: int, rank: int, tasks: int, size: float) -> tuple[Tensor, Tensor]:
    """(W_init, W_now) with the updates of `tasks` tasks summed in float32, as the runner folds them."""
    generator = torch.Generator().manual_seed(d_out)
    before = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
    summed = torch.zeros(d_out, d_in)
    for _ in range(tasks):
        a, b = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
        summed += size * a @ b
    return before, before + summed


@pytest.mark.parametrize("size", [1e-4, 1e-2])
@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (24, 128), (320, 768)])
def test_the_sum_of_all_updates_is_one_lora_of_the_summed_rank(shape: tuple[int, int], size: float) -> None:
    before, after = folded(*shape, rank=4, tasks=8, size=size)
    factors = factorise(before, after)
    assert factors.rank == min(4 * 8, *shape)
    up, down = factors.padded(factors.rank)
    # what is left is the rounding of the weights
    torch.testing.assert_close(before.double() + up.double() @ down.double(), after.double(), atol=5e-7, rtol=5e-7)
    assert factors.lost == 0


def test_no_update_has_no_rank() -> None:
    before, _ = folded(64, 128, 4, 1, 1e-2)
    factors = factorise(before, before.clone())
    assert (factors.rank, factors.total, factors.lost) == (0, 0, 0)


def test_a_limit_keeps_the_largest_terms_and_knows_what_it_lost() -> None:
    before, after = folded(64, 128, 4, 5, 1e-2)
    factors = factorise(before, after, rank=6)
    update = after.double() - before.double()
    assert factors.rank == 6
    assert float((update - factors.up @ factors.down).norm()) == pytest.approx(factors.lost**0.5, rel=1e-4)
    # the best approximation of that rank (Eckart-Young)
    values = torch.linalg.svdvals(update)
    assert factors.lost == pytest.approx(float(values[6:].square().sum()), rel=1e-4)
    assert factors.total == pytest.approx(float(update.square().sum()), rel=1e-6)
    assert factorise(before, after, rank=500).rank == 20


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diffusers-lora", "kohya"])
def test_lora_files_load_in_stock_diffusers(
    kind: str, folder: Path, ours: tuple[Tensor, Tensor], tmp_path: Path, silence: Callable[[], list[str]]
) -> None:
    card = export(folder, kind, tmp_path / "out")
    assert card["lora"] == {"rank": RANK * TASKS, "alpha": RANK * TASKS, "relative_error": 0.0}
    pipe = stock()
    sites = set(cross_attention_sites(pipe.unet))
    plain = state_hash(pipe.unet.state_dict())
    without = denoised(pipe.unet, ours[0])
    pipe.load_lora_weights(tmp_path / "out", weight_name=LORA_FILES[kind])
    load_words(pipe, tmp_path / "out")
    layers = {n: m for n, m in pipe.unet.named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == sites
    tensors = load_file(tmp_path / "out" / LORA_FILES[kind])
    assert len(tensors) == len(sites) * (3 if kind == "kohya" else 2)
    for layer in layers.values():
        assert set(layer.scaling.values()) == {1.0}
        assert any(torch.equal(layer.lora_B["default_0"].weight, t) for t in tensors.values())
    assert not silence()
    check_same(pipe.unet, pipe, ours)
    assert (without - ours[1]).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert state_hash(pipe.unet.state_dict()) == plain


def test_peft_files_load_in_peft(
    folder: Path, ours: tuple[Tensor, Tensor], tmp_path: Path, silence: Callable[[], list[str]]
) -> None:
    peft = pytest.importorskip("peft")
    export(folder, "peft", tmp_path / "out")
    pipe = stock()
    load_words(pipe, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(pipe.unet, tmp_path / "out")
    loaded = {k for k in model.state_dict() if "lora_" in k}
    assert {k.replace(".default", "") for k in loaded} == set(load_file(tmp_path / "out" / LORA_FILES["peft"]))
    check_same(model, pipe, ours)
    assert not silence()


def test_a_merged_model_loads_as_a_whole(folder: Path, ours: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    assert main(["export", str(folder), "--to", "merged", str(tmp_path / "out")]) == 0
    pipe: Any
    pipe, info = StableDiffusionPipeline.from_pretrained(tmp_path / "out"), None
    for part in ("unet", "vae"):
        _, info = type(getattr(pipe, part)).from_pretrained(tmp_path / "out" / part, output_loading_info=True)
        assert not any(info.values()), info
    _, info = type(pipe.text_encoder).from_pretrained(tmp_path / "out" / "text_encoder", output_loading_info=True)
    assert not any(info.values()), info
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)
    check_same(pipe.unet, pipe, ours)
    image = pipe("a photo of <c2>", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_exporting_leaves_run_and_base_as_they_were(folder: Path, tmp_path: Path) -> None:
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    export(folder, "diffusers-lora", tmp_path / "out")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files
    before: list[str] = []
    run = restore(folder, loaded=lambda domain: before.append(state_hash(domain.diffusion.unet.state_dict())))
    unet: Any = run.domain.model
    projections = {name: site.module for name, site in run.domain.sites().items()}
    for update in run.method.updates.values():  # type: ignore[union-attr]
        update.unfold()
    for name, module in projections.items():
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, module)
    assert [state_hash(unet.state_dict())] == before


# --- other methods ----------------------------------------------------------------------------------------------------


def test_full_updates_export_at_full_rank_or_cut_with_the_error_said(
    concept_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = concept_run("finetune")
    card = export(folder, "diffusers-lora", tmp_path / "full")
    assert card["lora"]["relative_error"] == 0
    now: Any = restore(folder).domain
    base = stock().unet.state_dict()

    def update(out: Path) -> tuple[float, float]:
        tensors, missed, total = load_file(out / LORA_FILES["diffusers-lora"]), 0.0, 0.0
        for name, site in now.sites().items():
            change = site.module.weight.double() - base[f"{name}.weight"].double()
            product = tensors[f"unet.{name}.lora_B.weight"].double() @ tensors[f"unet.{name}.lora_A.weight"].double()
            missed += float((change - product).square().sum())
            total += float(change.square().sum())
        return missed**0.5, total**0.5

    missed, total = update(tmp_path / "full")
    assert missed < 1e-5 * total
    assert main(["export", str(folder), "--to", "diffusers-lora", "--rank", "2", str(tmp_path / "cut")]) == 0
    said = json.loads((tmp_path / "cut" / CARD).read_text())["lora"]
    assert (said["rank"], said["alpha"]) == (2, 2)
    missed, total = update(tmp_path / "cut")
    assert 0 < said["relative_error"] == pytest.approx(missed / total, rel=1e-3)
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "cut")
    assert f"relative error {said['relative_error']:.2e}" in captured.err


def test_a_changed_network_is_no_lora_but_merges(concept_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = concept_run("dreambooth", "method.prior_weight=0", "stream.tasks=1")
    with pytest.raises(UserError, match=r"outside K and V.*--to merged"):
        export(folder, "kohya", tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
    export(folder, "merged", tmp_path / "out")
    pipe: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    diffusion = restore(folder).domain.diffusion  # type: ignore[attr-defined]
    now = diffusion.unet.state_dict()
    assert all(torch.equal(now[k], v) for k, v in pipe.unet.state_dict().items())
    base = stock().unet.state_dict()
    assert not torch.equal(now["conv_in.weight"], base["conv_in.weight"])


@pytest.mark.parametrize(
    "method", ["mix_of_show", "stamina", "lora_merge", "orthogonal_adaptation", "loraclr", "clora_null"]
)
def test_what_a_rival_ends_with_is_what_both_exports_hold(
    method: str, concept_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = concept_run(method, "method.rank=2", "stream.tasks=2")
    domain: Any = restore(folder).domain
    base, now = stock().unet.state_dict(), {name: site.module.weight for name, site in domain.sites().items()}
    export(folder, "diffusers-lora", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / LORA_FILES["diffusers-lora"])
    for name, weight in now.items():
        change = weight.double() - base[f"{name}.weight"].double()
        up, down = (tensors[f"unet.{name}.lora_{part}.weight"].double() for part in "BA")
        assert change.norm() > 1e-4
        torch.testing.assert_close(up @ down, change, rtol=0, atol=1e-5 * float(change.norm()))
    export(folder, "merged", tmp_path / "merged")
    pipe: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    merged = pipe.unet.state_dict()
    assert all(torch.equal(merged.pop(f"{name}.weight"), weight) for name, weight in now.items())
    assert all(torch.equal(base[name], tensor) for name, tensor in merged.items())


def test_updates_that_prompts_weigh_are_a_lora_for_each_concept(
    concept_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = concept_run("cidm", "method.rank=2", "stream.tasks=2")
    method: Any = restore(folder).method
    with pytest.raises(UserError, match=r"cidm weighs its updates anew for each prompt.*use --to diffusers-lora"):
        export(folder, "merged", tmp_path / "merged")
    for kind, up, down in (("diffusers-lora", "lora_B", "lora_A"), ("kohya", "lora_up", "lora_down")):
        out = tmp_path / kind
        card = export(folder, kind, out)
        assert (card["lora"], card["weights_changed"]) == ({"rank": 2, "alpha": 2, "relative_error": 0.0}, True)
        assert card["routing"]["power"] == 2
        assert torch.equal(load_file(out / card["routing"]["file"])["keys"], method.keys())
        for j, update in enumerate(method.routed().updates):
            tensors = load_file(out / f"c{j + 1}" / LORA_FILES[kind])
            found = [tensors[n] @ tensors[n.replace(up, down)] for n in tensors if f".{up}." in n]
            for product, (a, b) in zip(found, (update[n] for n in sorted(update)), strict=True):
                assert product.norm() > 0
                torch.testing.assert_close(product, a @ b, rtol=1e-4, atol=1e-6)
        with pytest.raises(UserError, match="which cidm weighs anew for each prompt; give the run's folder"):
            open_model(out, "cpu")
    pipe = stock()
    pipe.load_lora_weights(tmp_path / "kohya" / "c2", weight_name=LORA_FILES["kohya"])
    assert main(["export", str(folder), "--to", "textual-inversion", str(tmp_path / "words")]) == 0
    assert "also changed weights" in capsys.readouterr().err
    assert main(["export", str(folder), "--to", "peft", str(tmp_path / "peft")]) == 0
    assert "a LoRA for each concept, as c1; prompts weigh them by routing.safetensors" in capsys.readouterr().err
    assert (tmp_path / "peft" / "c2" / "adapter_config.json").is_file()


def test_embeddings_of_several_tokens(
    concept_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = concept_run("textual_inversion", "concept.n_tokens=2", "stream.tasks=2")
    with pytest.raises(UserError, match=r"no weight of the U-Net.*--to textual-inversion"):
        export(folder, "kohya", tmp_path / "lora")
    assert main(["export", str(folder), "--to", "textual-inversion", str(tmp_path / "out")]) == 0
    assert "U-Net" not in capsys.readouterr().err
    pipe = stock()
    load_words(pipe, tmp_path / "out")
    domain: Any = restore(folder).domain
    prompt = "a photo of <c2> and <c1>"
    expanded = domain.tokens.expand(prompt)
    assert expanded == pipe.maybe_convert_prompt(prompt, pipe.tokenizer) == "a photo of <c2> <c2>_1 and <c1> <c1>_1"
    hidden = domain.diffusion.encode_text([expanded]).states
    assert torch.equal(text_of(pipe.tokenizer, pipe.text_encoder, [expanded]), hidden)
    assert sorted(p.name for p in (tmp_path / "out" / "learned_embeds").iterdir()) == [
        "c1.safetensors",
        "c2.safetensors",
    ]


@pytest.mark.parametrize(("word", "n_tokens"), [("<Toy{number}>", 1), ("TOY{number}", 1), ("t\u00f6y{number}", 2)])
def test_words_of_any_kind_are_those_of_the_run(
    word: str, n_tokens: int, concept_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = concept_run("lora", f"concept.n_tokens={n_tokens}", f"concept.placeholder={word}", "stream.tasks=1")
    domain: Any = restore(folder).domain
    written = word.replace("{number}", "1")
    prompts = [f"a photo of {written}", f"{written}, red", f"my{written[0]} and"]
    hidden = domain.diffusion.encode_text([domain.tokens.expand(p) for p in prompts]).states
    for kind in ("merged", "textual-inversion", "kohya", "diffusers-lora", "peft"):
        export(folder, kind, tmp_path / kind)
        pipe: Any = StableDiffusionPipeline.from_pretrained(tmp_path / kind) if kind == "merged" else stock()
        load_words(pipe, tmp_path / kind)
        read = [pipe.maybe_convert_prompt(p, pipe.tokenizer) for p in prompts]
        torch.testing.assert_close(text_of(pipe.tokenizer, pipe.text_encoder, read), hidden, atol=1e-5, rtol=1e-5)


def test_words_that_exports_lack_stop_a_run_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "glyph-concepts-quick", "lora", "--out", str(tmp_path / "run"), "--quiet", "--set"]
    assert main([*words, "concept.placeholder=<Rex{number}>", "concept.n_tokens=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "concept.placeholder: '<Rex1>'" in line
    assert "write it '<rex1>'" in line
    assert not (tmp_path / "run" / "record.json").exists()


def test_an_export_draws_in_diffusers_what_the_run_draws(
    concept_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = concept_run("encoder", "method.encoder=untrained", "stream.tasks=2")
    assert main(["export", str(folder), "--to", "merged", str(tmp_path / "no")]) == 2
    assert "also reads tokens of pictures, which merged does not hold; use --to ip-adapter" in capsys.readouterr().err
    assert main(["export", str(folder), "--to", "ip-adapter", str(tmp_path / "out")]) == 0
    assert "pipe.load_ip_adapter(" in capsys.readouterr().err
    domain: Any = restore(folder).domain
    pipe, out = stock(), tmp_path / "out"
    pipe.load_ip_adapter(str(out), subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None)
    load_words(pipe, out)
    given = load_file(out / "image_embeds" / "c2.safetensors")["image_embeds"]
    prompts = ["a photo of <c2>", ""]
    embeds = [torch.cat([given, torch.zeros_like(given)])]
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 900])
    hidden = text_of(pipe.tokenizer, pipe.text_encoder, prompts)
    theirs = pipe.unet(noisy, times, hidden, added_cond_kwargs={"image_embeds": embeds}).sample
    drawn = domain.diffusion.predict(noisy, times, domain.diffusion.encode_text(prompts))
    torch.testing.assert_close(drawn, theirs, rtol=1e-4, atol=1e-5)
    again: Any = open_model(out)
    assert isinstance(again.diffusion.images, ImagePrompts)
    assert torch.equal(again.diffusion.predict(noisy, times, again.diffusion.encode_text(prompts)), drawn)
    (out / "image_embeds" / "c1.safetensors").unlink()
    with pytest.raises(UserError, match=r"image_embeds.c1.safetensors cannot be read"):
        open_model(out)
    plain = concept_run("lora", "stream.tasks=1", "train.steps=1")
    assert main(["export", str(plain), "--to", "ip-adapter", str(tmp_path / "none")]) == 2
    assert "lora reads no tokens of pictures" in capsys.readouterr().err


# --- what is written --------------------------------------------------------------------------------------------------


def test_files_say_what_they_are_and_were_made_on(folder: Path, tmp_path: Path) -> None:
    export(folder, "kohya", tmp_path / "out")
    record = json.loads((folder / "record.json").read_text())
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert card["base"]["name"] == "glyph-diffusion"
    assert card["base"]["weights_sha256"] == record["identity"]["weights_sha256"]
    assert [c["name"] for c in card["concepts"]] == record["network"]["concepts"]
    assert [c["placeholder"] for c in card["concepts"]] == ["<c1>", "<c2>", "<c3>"]
    assert card["run"]["method"] == "clora"
    for file in [*(tmp_path / "out").glob("*.safetensors"), *(tmp_path / "out" / "learned_embeds").iterdir()]:
        with safe_open(file, "pt") as handle:  # type: ignore[no-untyped-call]
            metadata = handle.metadata()
        assert metadata["dualcl_base_sha256"] == card["base"]["weights_sha256"]
        assert metadata["dualcl_method"] == "clora"
        assert json.loads(metadata["dualcl_placeholders"]) == ["<c1>", "<c2>", "<c3>"]
    # no path of this machine
    assert str(BASE.parent) not in (tmp_path / "out" / CARD).read_text()


def test_an_output_that_holds_anything_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    kept = tmp_path / "out" / "mine.txt"
    kept.write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        export(folder, "merged", tmp_path / "out")
    with pytest.raises(UserError, match="not an empty folder"):
        export(folder, "merged", kept)
    assert kept.read_text() == "mine"
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]
    (tmp_path / "empty").mkdir()
    export(folder, "textual-inversion", tmp_path / "empty")
    assert (tmp_path / "empty" / CARD).is_file()


def test_wrong_input_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(WRITERS) == EXPORT_FORMATS
    cases = [
        ([str(folder), "--to", "kohia", "OUT"], "did you mean 'kohya'"),
        ([str(tmp_path), "--to", "kohya", "OUT"], "no record.json"),
        ([str(tmp_path / "none"), "--to", "kohya", "OUT"], "no record.json"),
        ([str(folder), "--to", "merged", "--rank", "3", "OUT"], "--rank is for LoRA formats"),
        ([str(folder), "--to", "kohya", "--rank", "0", "OUT"], "from 1 on"),
    ]
    for words, message in cases:
        assert main(["export", *(str(tmp_path / w) if w == "OUT" else w for w in words)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
        assert error.startswith("dualcl: error:")
    assert list(tmp_path.iterdir()) == []


# --- restoring --------------------------------------------------------------------------------------------------------


def test_a_run_restores_without_its_photographs(tmp_path: Path, image_tree: Path) -> None:
    import shutil

    from dualcl.benchmark.config.resolve import resolve
    from dualcl.benchmark.runs.runner import run

    photos = tmp_path / "photos"
    for name in ("shade1", "shade4"):
        shutil.copytree(image_tree / "train" / name, photos / name)
    sets = [f"data.root={photos}", "train.steps=1", "train.epochs=1", "train.batch_size=1", "eval.n=1", "eval.steps=1"]
    with torch.enable_grad():
        run(resolve("concept-folder", "lora", [*sets, "eval.every=0"]), tmp_path / "run")
    shutil.rmtree(photos)
    restored = restore(tmp_path / "run")
    domain: Any = restored.domain
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert sorted(c.name for c in domain.stream.concepts) == ["shade1", "shade4"]
    assert [c.name for c in domain.stream.concepts] == record["network"]["concepts"]
    saved = load_file(tmp_path / "run" / "checkpoints" / "task_1" / "state.safetensors")
    for task in (0, 1):
        assert torch.equal(domain.tokens.rows[task], saved[f"domain.rows.{task}"])
    for update in restored.method.updates.values():  # type: ignore[union-attr]
        assert update.summed.any()
        assert torch.equal(update.site.weight, update.w_init + update.summed)


def test_a_run_on_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    record = json.loads((copy / "record.json").read_text())
    record["identity"]["weights_sha256"] = "0" * 64
    del record["sha256"]  # a record that was changed by hand is refused before
    (copy / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="pretrained weights are not those"):
        restore(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="no finished task yet"):
        restore(copy)
