"""What is NaN or infinite never becomes an accuracy."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains.classification import best
from dualcl.benchmark.models.vit import BackboneConfig, load_backbone

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", BAD)
def test_a_file_with_one_bad_weight_is_refused(value, tmp_path):
    kwargs = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
    name = "vit_tiny_patch16_224"
    state = load_backbone(BackboneConfig(name=name, pretrained=False, kwargs=kwargs))[0].state_dict()
    state["blocks.0.mlp.fc1.weight"][3, 5] = value
    save_file(state, tmp_path / "vit.safetensors")
    message = r"vit\.safetensors: its weight blocks\.0\.mlp\.fc1\.weight holds NaN or infinity"
    with pytest.raises(UserError, match=message):
        load_backbone(BackboneConfig(name=name, weights=str(tmp_path / "vit.safetensors"), kwargs=kwargs))


@pytest.mark.parametrize("name", ["ncm", "linear_probe", "lora", "l2p", "er", "lwf_mc"])
def test_features_that_overflow_are_named(name, build):
    domain, method = build(name)
    domain.model.norm.weight.data.fill_(float("inf"))  # as weights that are too large for the precision
    domain.begin_task(0)
    method.begin_task(0)
    step = (lambda: method.loss(next(domain.batches(0, 0)))) if method.takes_steps(0) else (lambda: method.end_task(0))
    with pytest.raises(UserError, match=r"^backbone \S+: features of .* are NaN or infinite"):
        step()


def test_scores_and_rows_that_overflow_are_named(build):
    domain, _ = build("linear_probe")
    domain.begin_task(0)
    domain.heads[0].bias.data[1] = float("nan")
    with pytest.raises(UserError, match="scores of test images of task 1 are NaN"):
        domain.evaluate([0])
    weight, bias = domain.output_rows(0)
    with pytest.raises(UserError, match="classifier rows of task 1 are NaN"):
        domain.set_output_rows(0, weight, bias)


def test_the_best_of_scores():
    scores = torch.tensor([[1.0, 3.0], [float("-inf"), 2.0], *([1.0, value] for value in BAD[:2]), [BAD[2]] * 2])
    assert best(scores).tolist() == [1, 1, -1, -1, -1]
