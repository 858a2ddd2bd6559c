"""timm's ViTs, small: a dozen families of them, of which none differs and none ends in a traceback."""

from __future__ import annotations

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.models.vit_blocks import NO_ATTENTION, NO_BLOCKS, NO_PREFIXES, NO_VECTOR
from dualcl.benchmark.runs import backbone_check
from dualcl.benchmark.runs.backbone_check import check_backbone, summary, transformers

WORK = [
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"),
    *("vit_relpos_small_patch16_224", "vit_dlittle_patch16_reg1_gap_256", "vit_base_patch14_reg4_dinov2"),
    *("samvit_base_patch16", "naflexvit_base_patch16_gap", "qwen3_vit_88m", "cait_xxs24_224"),
    *("vit_pwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256", "vit_base_patch16_18x2_224"),
]
REFUSED = {
    "xcit_nano_12_p16_224": NO_PREFIXES,
    "qwen3_vit_88m_enc": NO_VECTOR,
    "swin_tiny_patch4_window7_224": NO_BLOCKS,
    "mixer_s32_224": NO_ATTENTION,
}


@pytest.mark.parametrize("name", WORK)
def test_a_family_works(name):
    assert check_backbone(name)[:3] == (name, "works", "")


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_for_a_reason_of_the_list(name):
    assert check_backbone(name)[:3] == (name, "refused", REFUSED[name])


def test_what_differs_is_found_and_counted(monkeypatch):
    monkeypatch.setattr(backbone_check, "_near", lambda one, two: False)
    found = check_backbone("vit_tiny_patch16_224")
    assert found[:3] == ("vit_tiny_patch16_224", "differs", "plain features")
    assert summary([found])[-1] == "differs: vit_tiny_patch16_224: plain features"


def test_the_command(capsys):
    assert main(["check", "--backbones", "vit_pwee*", "xcit_nano_12_p16_224"]) == 0
    said = capsys.readouterr().out
    assert "vit_pwee_patch16_reg1_gap_256: works" in said
    assert "2 ViTs (a flat list of blocks with attention): 1 work, 1 refused (50.0 %)" in said
    assert main(["check", "--backbones", "no-such*"]) == 2
    assert main(["check"]) == 2


def test_names_are_those_of_files_with_attention():
    chosen = transformers([])
    assert {*WORK, "swin_tiny_patch4_window7_224", "levit_128"} <= {*chosen}
    assert "resnet18" not in chosen
