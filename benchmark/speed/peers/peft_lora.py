"""peft's LoRA on timm's fused Q, K and V of every block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dualcl.benchmark.speed.peers.timm_vit import VERSIONS as TIMM
from dualcl.benchmark.speed.peers.timm_vit import build, training

# isort: split
import peft

VERSIONS = {**TIMM, "peft": peft.__version__}


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], int]]:
    """Works: step, which trains adapters of rank `setup["rank"]` and the classifier."""
    rank = setup["rank"]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=["qkv"])
    model = peft.inject_adapter_in_model(config, build(setup))
    model.head.requires_grad_(True)  # peft froze it
    return {"step": training(setup, model, [p for p in model.parameters() if p.requires_grad])}
