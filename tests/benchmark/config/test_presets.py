"""Every bundled preset resolves for every method of its domain and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualcl.benchmark.config.presets import PRESET_DIR, bundled_presets, load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.methods import available_methods

NAMES = sorted(p.stem for p in PRESET_DIR.glob("*.yaml"))
#: not packaged, so beside the sources
CODA_GUIDE = PRESET_DIR / "README.md"


def test_the_promised_presets_are_there() -> None:
    assert set(NAMES) == set(bundled_presets())
    promised = {"glyphs", "glyphs-10", "image-folder", "cifar100-10", "imagenet-r-5", "imagenet-r-10", "imagenet-r-20"}
    promised |= {
        "portraits-10",
        "portraits-50",
        "glyph-concepts",
        "concept-folder",
        "dreambooth",
        "celeba-hq-10",
        "landmarks-10",
    }
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


CODA = {
    "imagenet-r-5-coda": "imagenet-r-5",
    "imagenet-r-10-coda": "imagenet-r-10",
    "imagenet-r-20-coda": "imagenet-r-20",
    "cifar100-10-coda": "cifar100-10",
    "domainnet-5-coda": "domainnet-5",
}


@pytest.mark.parametrize(("name", "own"), CODA.items())
def test_codas_presets_differ_from_the_suites_in_what_the_guide_says(name: str, own: str) -> None:
    flat, base = resolve(name, "ncm").flat(), resolve(own, "ncm").flat()
    assert {k for k in flat if flat[k] != base[k]} == {
        "preset",
        "backbone.name",
        "input.preprocess",
        "input.interpolation",
    }
    assert (flat["input.preprocess"], flat["input.interpolation"], flat["input.augment"]) == (
        "none",
        "bilinear",
        "crop_flip",
    )
    assert (flat["stream.class_order"], flat["stream.order_seed"], flat["head.init"]) == ("coda", None, "linear")
    assert flat["precision"] == "fp32"


@pytest.mark.parametrize("name", CODA)
def test_codas_presets_hold_the_values_of_its_configs_and_scripts(name: str) -> None:
    epochs = {"imagenet": 50, "cifar100": 20, "domainnet": 5}[name.split("-")[0]]
    classes = {"imagenet": 200, "cifar100": 100, "domainnet": 345}[name.split("-")[0]]
    for method in ("joint", "coda_prompt", "dualprompt", "l2p", "finetune", "finetune_pp"):
        flat = resolve(name, method).flat()
        assert [flat[f"train.{k}"] for k in ("epochs", "batch_size", "optimizer", "schedule", "drop_last")] == [
            epochs,
            128,
            "adam",
            "coda",
            True,
        ]
        assert classes % flat["stream.tasks"] == 0
        lr = 1e-3 if method in ("coda_prompt", "dualprompt", "l2p") else 5e-5
        assert [flat[f"method.{k}"] for k in ("lr", "head_lr", "weight_decay")] == [lr, lr, 0]
        assert flat["input.resize"] == (224 if name.startswith("cifar") else 256)
    coda, dual, l2p = (resolve(name, m).sections["method"] for m in ("coda_prompt", "dualprompt", "l2p"))
    assert (coda.pool, coda.length, coda.mu, coda.blocks) == (100, 8, 0, (0, 1, 2, 3, 4))
    assert (dual.expert_length, dual.general_length) == (20, 6)
    assert (dual.general_blocks, dual.expert_blocks) == ((0, 1), (2, 3, 4))
    assert (l2p.pool, l2p.length, l2p.top_k, l2p.prompted) == (30, 20, 5, (0,))
    assert "public CODA-Prompt code" in load_preset(name).tuning["l2p"]


def test_more_tasks_or_another_data_set_change_nothing_else() -> None:
    for name, own, differ in (
        ("cifar100-20", "cifar100-10", {"stream.tasks"}),
        ("domainnet-5", "imagenet-r-5", {"data.name", "data.root", "train.epochs"}),
    ):
        flat, base = resolve(name, "clora").flat(), resolve(own, "clora").flat()
        assert {k for k in flat if flat[k] != base.get(k)} == {"preset", *differ}
    assert (
        resolve("domainnet-5", "ncm").flat()["stream.tasks"],
        resolve("cifar100-20", "ncm").flat()["stream.tasks"],
    ) == (
        5,
        20,
    )


def test_the_guide_names_every_preset() -> None:
    text = CODA_GUIDE.read_text(encoding="utf-8")
    for family in (
        "renditions-10",
        "portraits-10",
        "image-folder",
        "concept-folder",
        "imagenet-r",
        "cifar100",
        "domainnet",
    ):
        assert f"`{family}" in text
    for name in ("celeba-hq-10", "landmarks-10", "dreambooth"):
        assert f"`{name}`" in text


def test_large_presets_pin_the_weights_by_a_full_tag() -> None:
    for name in (n for n in NAMES if load_preset(n).domain == "classification"):
        backbone = resolve(name, "ncm").flat()["backbone.name"]
        assert backbone in ("glyph-vit", "renditions-vit") or "." in backbone


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
    own, bundled = resolve("concept-folder", "clora").flat(), resolve("portraits-10", "clora").flat()
    assert own["base.model"] == "portraits-diffusion"
    assert own["data.concepts"] is None
    differ = {k for k in own if k in bundled and own[k] != bundled[k] and not k.startswith("data.")}
    assert differ == {"preset", "concept.init", "concept.prompt", "prior.prompt", "eval.prompt"}
    assert own["concept.init"] == "random"  # a word needs class nouns
    assert {own[k] for k in ("concept.prompt", "eval.prompt")} == {"a photo of {token}"}


def test_dreambooth_is_trained_as_landmarks() -> None:
    flat, base = resolve("dreambooth", "clora").flat(), resolve("landmarks-10", "clora").flat()
    differ = {k for k in base if not k.startswith("data.") and flat[k] != base[k]}
    assert differ == {"preset", "eval.n"}
