"""Any timm vision transformer as a frozen backbone: weights, adaptation sites, prefixes for its attention blocks."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config

from dualcl.benchmark.core.domain import Site
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import read_json
from dualcl.benchmark.models.bundled import bundled_backbones, check_bundled
from dualcl.benchmark.models.weights import no_pickles, read_safetensors, state_hash

#: arguments of timm's that are not the user's: where weights come from, above all
_RESERVED = {
    "pretrained",
    "num_classes",
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "cache_dir",
}


@dataclass(frozen=True)
class BackboneConfig:
    """Which pretrained ViT."""

    name: str = field(default="glyph-vit", metadata={"help": "a bundled backbone or a timm name with its full tag"})
    pretrained: bool = field(default=True, metadata={"help": "load the tag's weights from the hub or its local cache"})
    weights: str | None = field(default=None, metadata={"help": "a local safetensors file instead"})
    kwargs: dict[str, Any] = field(default_factory=dict, metadata={"help": "timm arguments: img_size, patch_size, ..."})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "training memory of one block instead of all, for up to half more time", "volatile": True},
    )


@dataclass(frozen=True)
class BackboneInfo:
    """What a record must say of the weights."""

    name: str
    weights: str
    weights_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int
    crop_pct: float
    interpolation: str


def _load_into(model: nn.Module, state: dict[str, Tensor], file: str) -> None:
    """Loads weights strictly, classifier aside; a position table of another size is resampled as timm does it."""
    own = model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    table = state.get("pos_embed")
    if convert is not None and table is not None and "pos_embed" in own and table.shape != own["pos_embed"].shape:
        # the table alone, with the patches that tell its grid: what else does not fit is named below
        part = {k: state[k] for k in ("patch_embed.proj.weight", "pos_embed") if k in state}
        with contextlib.suppress(AssertionError, LookupError, RuntimeError, ValueError):
            state = {**state, "pos_embed": convert(part, model)["pos_embed"]}
    extra = sorted(k for k in state if k not in own and not k.startswith(("head.", "head_dist.", "fc.")))
    missing = sorted(k for k in own if k not in state)
    if extra or missing:
        what = [f"lacks {missing[0]} (and {len(missing) - 1} more)"] if missing else []
        what += [f"has {extra[0]} (and {len(extra) - 1} more), which the model lacks"] if extra else []
        raise UserError(f"backbone.weights: {file} {'; '.join(what)}; check backbone.name and backbone.kwargs")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"backbone.weights: {file} holds {name} of shape {tuple(state[name].shape)}, the model wants "
                f"{tuple(tensor.shape)}; check backbone.kwargs (img_size, patch_size)"
            )
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items() if k in own})


def load_backbone(config: BackboneConfig) -> tuple[nn.Module, BackboneInfo]:
    """The timm model without classifier, frozen and in evaluation mode, and what is known of its weights."""
    kwargs = dict(config.kwargs)
    reserved = _RESERVED & set(kwargs)
    if reserved:
        raise UserError(f"backbone.kwargs.{min(reserved)} is set by the suite itself; leave it out")
    timm_name, pretrained, file = config.name, config.pretrained and config.weights is None, config.weights
    described: dict[str, Any] = {}
    bundled = bundled_backbones()
    if config.name in bundled:
        described = read_json(bundled[config.name])
        timm_name, kwargs, pretrained = described["timm_name"], {**described["kwargs"], **kwargs}, False
        if file is None and config.pretrained:
            file = str(bundled[config.name].with_suffix(".safetensors"))
            check_bundled(Path(file), described["sha256"])
    elif not timm.is_model(timm_name):
        known = [*bundled, *timm.list_models("*vit*"), *timm.list_models("*vit*", pretrained=True)]
        raise UserError(
            f"unknown backbone.name {timm_name!r}; {nearest(timm_name, known).split(' (')[0]}"
            " (see `dualcl list backbones` and timm.list_models())"
        )
    try:
        with no_pickles(f"backbone.name={timm_name}"):
            model: Any = timm.create_model(timm_name, pretrained=pretrained, **{**kwargs, "num_classes": 0})
    except TypeError as error:
        raise UserError(f"backbone.kwargs does not fit {timm_name}: {error}") from None
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        if pretrained:
            raise UserError(
                f"cannot get the weights of {timm_name} ({str(error).splitlines()[0][:160]}); give "
                "backbone.weights=FILE.safetensors, or run once with a network to fill the cache"
            ) from None
        raise UserError(f"backbone {timm_name} cannot be built with {kwargs}: {str(error).splitlines()[0]}") from None
    if not hasattr(model, "blocks"):
        raise UserError(f"backbone {timm_name} has no transformer blocks; choose a ViT")
    if not hasattr(model, "patch_embed"):
        raise UserError(f"backbone {timm_name} has blocks but no patch_embed; choose a ViT")
    if kwargs.get("in_chans", 3) != 3:
        raise UserError(f"backbone.kwargs.in_chans={kwargs['in_chans']}: images have 3 channels; leave it out")
    model.backbone_name = config.name  # for messages
    source = f"timm:{timm_name}" if pretrained else "random"
    if file is not None:
        _load_into(model, read_safetensors(file), file)
        source = Path(file).name
    cfg = resolve_model_data_config(model)
    mean, std = cfg["mean"], cfg["std"]
    if described:
        mean, std = described["mean"], described["std"]
    elif file is not None:
        # the tag's data config describes the tag's weights, not the ones in this file
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            # EVA and BEiT else read qkv.weight without calling the Linear, which would bypass an adapter on it
            module.qkv_bias_separate = True
    model.requires_grad_(False)
    model.eval()
    size = model.patch_embed.img_size[0] if getattr(model.patch_embed, "img_size", None) else cfg["input_size"][-1]
    info = BackboneInfo(
        name=config.name,
        weights=source,
        weights_sha256=state_hash(model.state_dict()),
        mean=tuple(float(m) for m in mean),
        std=tuple(float(s) for s in std),
        input_size=int(size),
        crop_pct=float(cfg["crop_pct"]),
        interpolation=str(cfg["interpolation"]),
    )
    return model, info


def attention_sites(model: nn.Module) -> dict[str, Site]:
    """The Q, K and V projections of every block, fused (timm's `qkv`) or split (`q_proj`, `k_proj`, `v_proj`)."""
    sites: dict[str, Site] = {}
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        attn = getattr(block, "attn", None)
        fused = getattr(attn, "qkv", None)
        if isinstance(fused, nn.Linear):
            if fused.out_features % 3:
                raise UserError(
                    f"blocks.{i}.attn.qkv has {fused.out_features} rows, which are not three equal projections"
                )
            d = fused.out_features // 3
            for n, part in enumerate("qkv"):
                site = Site(f"blocks.{i}.attn.{part}", f"blocks.{i}.attn.qkv", fused, n * d, (n + 1) * d)
                sites[site.name] = site
            continue
        for part in "qkv":
            linear = getattr(attn, f"{part}_proj", None)
            if isinstance(linear, nn.Linear):
                name = f"blocks.{i}.attn.{part}"
                sites[name] = Site(name, f"{name}_proj", linear, 0, linear.out_features)
    return sites
