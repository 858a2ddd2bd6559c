"""Every bundled preset resolves for every method of its domain and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualcl.benchmark.config import PRESET_DIR, bundled_presets, load_preset, resolve
from dualcl.benchmark.errors import UserError
from dualcl.methods import available_methods

NAMES = sorted(p.stem for p in PRESET_DIR.glob("*.yaml"))


def test_the_promised_presets_are_there() -> None:
    assert set(NAMES) == set(bundled_presets())
    promised = {"glyphs", "glyphs-10", "image-folder", "cifar100-10", "imagenet-r-5", "imagenet-r-10", "imagenet-r-20"}
    promised |= {"glyph-concepts", "concept-folder", "dreambooth", "celeba-hq-10", "landmarks-10"}
    assert promised <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_preset_resolves_for_every_method(name: str) -> None:
    preset = load_preset(name)
    assert preset.summary
    assert preset.compare
    assert set(preset.compare) <= set(available_methods())
    methods = [m.name for m in available_methods().values() if preset.domain in m.domains]
    for method in methods:
        resolved = resolve(name, method)
        assert resolved.method == method
        used = {k for k in preset.values if not k.startswith("methods.")}
        assert used <= set(resolved.sources)


@pytest.mark.parametrize(("name", "tasks"), [("imagenet-r-5", 5), ("imagenet-r-10", 10), ("imagenet-r-20", 20)])
def test_imagenet_r_presets_differ_in_tasks_only(name: str, tasks: int) -> None:
    flat, base = resolve(name, "clora").flat(), resolve("imagenet-r-10", "clora").flat()
    assert flat["stream.tasks"] == tasks
    assert {k for k in flat if flat[k] != base[k]} <= {"preset", "stream.tasks"}
    assert (flat["train.epochs"], flat["train.batch_size"], flat["method.rank"]) == (50, 128, 64)
    assert flat["backbone.name"].endswith(".augreg2_in21k_ft_in1k")


def test_large_presets_pin_the_weights_by_a_full_tag() -> None:
    for name in (n for n in NAMES if load_preset(n).domain == "classification"):
        backbone = resolve(name, "ncm").flat()["backbone.name"]
        assert backbone == "glyph-vit" or "." in backbone


def test_compare_list_is_inherited_and_checked(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: glyphs\n")
    assert load_preset(str(own)).compare == load_preset("glyphs").compare
    own.write_text("extends: glyphs\ncompare: [ncm]\n")
    assert load_preset(str(own)).compare == ("ncm",)
    own.write_text("extends: glyphs\ncompare: ncm\n")
    with pytest.raises(UserError, match="compare must be a list"):
        load_preset(str(own))


@pytest.mark.parametrize(
    ("name", "data", "steps"), [("celeba-hq-10", "celeba-hq", 2000), ("landmarks-10", "landmarks", 500)]
)
def test_full_size_concepts_are_taught_as_the_paper_is_believed_to(name: str, data: str, steps: int) -> None:
    resolved = resolve(name, "clora")
    flat = resolved.flat()
    assert (resolved.data_name, flat["stream.tasks"], flat["data.min_images"]) == (data, 10, 15)
    assert (flat["train.epochs"], flat["train.steps"]) == (1, steps)
    assert flat["base.model"] == "CompVis/stable-diffusion-v1-4"
    assert (flat["method.rank"], flat["method.lr"], flat["method.lambda_"]) == (16, 5e-4, 1e8)
    assert (flat["concept.init"], flat["concept.class_noun"], flat["concept.prompt"]) == (
        "random",
        False,
        "a photo of {token}",
    )
    lora = resolve(name, "lora").flat()
    assert [lora[f"method.{k}"] for k in ("rank", "lr", "head_lr")] == [16, 5e-4, 5e-4]
    assert resolve(name, "custom_diffusion").flat()["method.lr"] == 5e-6
    ewc = resolve(name, "ewc").flat()
    assert (ewc["method.lr"], ewc["method.lambda_"]) == (5e-6, 1e6)


def test_the_users_own_concepts_start_from_the_bundled_model() -> None:
    own, bundled = resolve("concept-folder", "clora").flat(), resolve("glyph-concepts", "clora").flat()
    assert own["base.model"] == "glyph-diffusion"
    assert own["data.concepts"] is None
    differ = {k for k in own if k in bundled and own[k] != bundled[k] and not k.startswith("data.")}
    assert differ == {"preset"}


def test_dreambooth_is_trained_as_landmarks() -> None:
    flat, base = resolve("dreambooth", "clora").flat(), resolve("landmarks-10", "clora").flat()
    differ = {k for k in base if not k.startswith("data.") and flat[k] != base[k]}
    assert differ == {"preset", "eval.n"}
