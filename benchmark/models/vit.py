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
from dualcl.benchmark.models.preprocessing import preprocessing
from dualcl.benchmark.models.vit_blocks import (
    NO_ATTENTION,
    NO_BLOCKS,
    NOT_SQUARE,
    TOO_SMALL,
    Unserved,
    backbone_name,
    has_attention,
)
from dualcl.benchmark.models.weights import finite, no_pickles, read_safetensors, state_hash

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
    #: where mean, std and interpolation come from; None: a file of weights that does not say
    described_by: str | None = None


def _load_into(model: nn.Module, state: dict[str, Tensor], file: str) -> None:
    """Loads weights strictly, classifier aside; a position table of another size is resampled as timm does it."""
    own = model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    moved = [k for k in own if k in state and state[k].shape != own[k].shape and "pos" in k.rpartition(".")[2]]
    if convert is not None and moved:
        # the tables alone, with the patches that tell their grid: what else does not fit is named below
        part = {k: state[k] for k in ("patch_embed.proj.weight", *moved) if k in state}
        with contextlib.suppress(AssertionError, LookupError, RuntimeError, ValueError):
            resampled = convert(part, model)
            state = {**state, **{k: resampled[k] for k in moved}}
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
    state = {k: v.to(own[k].dtype) for k, v in state.items() if k in own}
    # what starts infinite, a clamp, may be so
    finite({k: v for k, v in state.items() if bool(own[k].isfinite().all())}, f"backbone.weights: {file}")
    model.load_state_dict(state)


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
    except (OSError, RuntimeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0][:160]
        if pretrained:
            raise UserError(
                f"cannot get the weights of {timm_name} ({said}); give backbone.weights=FILE.safetensors, or run once "
                "with a network to fill the cache"
            ) from None
        raise UserError(f"backbone {timm_name} cannot be built with {kwargs}: {said}") from None
    model.backbone_name = config.name  # for messages
    cfg = resolve_model_data_config(model)
    size = _image_size(model, kwargs, cfg)
    source = f"timm:{timm_name}" if pretrained else "random"
    if file is not None:
        _load_into(model, read_safetensors(file), file)
        source = Path(file).name
    elif pretrained:
        finite(dict(model.named_parameters()), f"backbone {timm_name}")
    said_by: str | None = "the bundled card" if described else f"tag {timm_name}"
    cfg = {**cfg, **{key: described[key] for key in ("mean", "std") if described}}
    if file is not None and not (described and config.weights is None):
        found, said_by = preprocessing(file, timm_name, model.pretrained_cfg)
        if found is None and described:
            found, said_by = {}, "the bundled card"
        # older versions took these for any file
        cfg |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD} if found is None else found
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            # EVA and BEiT else read qkv.weight without calling the Linear, which would bypass an adapter on it
            module.qkv_bias_separate = True
    model.requires_grad_(False)
    model.eval()
    info = BackboneInfo(
        name=config.name,
        weights=source,
        weights_sha256=state_hash(model.state_dict()),
        mean=tuple(float(m) for m in cfg["mean"]),
        std=tuple(float(s) for s in cfg["std"]),
        input_size=size,
        crop_pct=float(cfg["crop_pct"]),
        interpolation=str(cfg["interpolation"]),
        described_by=said_by,
    )
    return model, info


def _image_size(model: Any, kwargs: dict[str, Any], cfg: dict[str, Any]) -> int:
    """The side of the images that the model takes; Unserved for models that are no ViTs, and for other images."""
    name = backbone_name(model)
    encoder: Any = getattr(model, "encoder", None)
    if not hasattr(model, "blocks") and isinstance(getattr(encoder, "blocks", None), nn.Module):
        model.__dict__["blocks"] = encoder.blocks  # not as a module of its own: its weights have one name
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise Unserved(f"{name} has no transformer blocks; choose a ViT", NO_BLOCKS)
    if not hasattr(model, "patch_embed") and not all(map(has_attention, blocks)):
        raise Unserved(f"{name} has blocks without attention, and no patch_embed; choose a ViT", NO_ATTENTION)
    if kwargs.get("in_chans", 3) != 3:
        raise Unserved(
            f"{name}: backbone.kwargs.in_chans={kwargs['in_chans']}: images have 3 channels; leave it out", NOT_SQUARE
        )
    embed = getattr(model, "patch_embed", getattr(model, "embeds", getattr(encoder, "patch_embed", None)))
    size = getattr(embed, "img_size", None) or kwargs.get("img_size") or cfg["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise Unserved(
            f"{name} takes images of {height} x {width}; they must be square: set backbone.kwargs={{img_size: "
            f"{min(height, width)}}}",
            NOT_SQUARE,
        )
    patch = getattr(embed, "patch_size", 1)
    if max(patch if isinstance(patch, (tuple, list)) else [patch]) > height:
        raise Unserved(
            f"{name}: its patches of {patch} px are larger than images of {height} px; raise backbone.kwargs.img_size",
            TOO_SMALL,
        )
    return int(height)


def attention_sites(model: nn.Module) -> dict[str, Site]:
    """The Q, K and V projections of every block, fused (timm's `qkv`) or split (`q_proj`, `k_proj`, `v_proj`)."""
    sites: dict[str, Site] = {}

    def add(name: str, module: str, linear: nn.Linear, start: int, rows: int) -> None:
        sites[name] = Site(name, module, linear, start, start + rows)

    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        at = f"blocks.{i}"
        if hasattr(block, "in_split"):  # the MLP's rows come first
            first, *rows = block.in_split
            for n, part in enumerate("qkv"):
                add(f"{at}.attn.{part}", f"{at}.in_proj", block.in_proj, first + sum(rows[:n]), rows[n])
        several = [(f"{at}.attns.{j}.attn", b.attn) for j, b in enumerate(getattr(block, "attns", ()))]
        for place, attn in several or [(f"{at}.attn", getattr(block, "attn", None))]:
            fused = getattr(attn, "qkv", None)
            if isinstance(fused, nn.Linear):
                if fused.out_features % 3:
                    raise UserError(f"{place}.qkv has {fused.out_features} rows, which are not three equal projections")
                d = fused.out_features // 3
                for n, part in enumerate("qkv"):
                    add(f"{place}.{part}", f"{place}.qkv", fused, n * d, d)
                continue
            for part in "qkv":
                linear: Any = getattr(attn, f"{part}_proj", None)
                inner = isinstance(getattr(linear, "linear", None), nn.Linear)
                linear = linear.linear if inner else linear  # clamped around it
                if isinstance(linear, nn.Linear):
                    module = f"{place}.{part}_proj" + ".linear" * inner
                    add(f"{place}.{part}", module, linear, 0, linear.out_features)
    return sites
