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
    for name in NAMES:
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
