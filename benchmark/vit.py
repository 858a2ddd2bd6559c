"""Any timm vision transformer as a frozen backbone: weights, adaptation sites, prefixes for its attention blocks."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dualcl.benchmark.compat  # noqa: F401 - before timm

# isort: split
import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer import Attention, Block, VisionTransformer

from dualcl.benchmark.backbones import bundled_backbones, check_bundled
from dualcl.benchmark.domain import Site
from dualcl.benchmark.errors import UserError, nearest
from dualcl.benchmark.reading import CONVERT, no_pickles, read_json

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


def state_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\t{tensor.dtype}\t{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_safetensors(path: str | Path, key: str = "backbone.weights") -> dict[str, Tensor]:
    """All tensors of a safetensors file; UserError that names the file when missing, truncated or another format."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{key}: {file} does not exist")
    if file.suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar"):
        raise UserError(f"{key}: {file} is a pickle file, which is never loaded; {CONVERT}")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{key}: {file} is no valid safetensors file (truncated?): {error}; replace it") from None


def _load_into(model: nn.Module, state: dict[str, Tensor], file: str) -> None:
    """Loads weights strictly, classifier aside."""
    own = model.state_dict()
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


def checkpoint_blocks(model: Any) -> None:
    """Makes every block keep its input alone for the backward, and compute the rest again there.

    Not timm's `set_grad_checkpointing`: below a frozen embedding its older versions find no gradient.
    """
    for block in model.blocks:
        block.forward = functools.partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # the frozen network draws no random numbers
    out: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return out


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


class PrefixAttention(nn.Module):
    """A timm attention module that also attends to extra keys and values (prefix tuning).

    With no prefix set it calls the wrapped module as it is. Serves timm's Attention and EvaAttention / AttentionRope.
    """

    def __init__(self, attn: nn.Module, block: int) -> None:
        super().__init__()
        self.attn = attn
        self.prefix: tuple[Tensor, Tensor] | None = None
        split = isinstance(getattr(attn, "q_proj", None), nn.Linear)
        fused = isinstance(getattr(attn, "qkv", None), nn.Linear)
        known = all(hasattr(attn, n) for n in ("num_heads", "head_dim", "q_norm", "k_norm", "proj", "proj_drop"))
        if not known or split == fused:
            raise UserError(
                f"blocks.{block}.attn is a {type(attn).__name__}, which takes no prefixes; prompts need another ViT"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        attn: Any = self.attn
        if self.prefix is None:
            return attn(x, *args, **kwargs)
        rope = kwargs.pop("rope", args[0] if args else None) if hasattr(attn, "num_prefix_tokens") else None
        if any(v is not None and v is not False for v in kwargs.values()):
            raise UserError(f"attention arguments {sorted(kwargs)} cannot be combined with prefixes")
        return attend(attn, x, prefix=self.prefix, rope=rope)


def attend(
    attn: Any,
    x: Tensor,
    *,
    prefix: tuple[Tensor, Tensor] | None = None,
    rope: Tensor | None = None,
    queries: int | None = None,
) -> Tensor:
    """What a timm attention module gives for the first `queries` tokens (default: all), shape (B, queries, D).

    x (B, N, D) is attended to in full, and so are the keys and values of `prefix`, each (B, L, D).
    """

    def heads(t: Tensor) -> Tensor:
        # unflatten, as reshape cannot infer the number of heads of an empty prefix
        return t.unflatten(-1, (-1, int(attn.head_dim))).transpose(1, 2)

    gate = attn.gate(x[:, :queries]).sigmoid() if getattr(attn, "gate", None) is not None else None
    if attn.qkv is not None:
        qkv = attn.qkv(x)
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        q, k, v = (heads(part) for part in qkv.chunk(3, dim=-1))
    else:
        q, k, v = (heads(proj(x)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        skip, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        q, k = (
            torch.cat([t[:, :, :skip], apply_rot_embed_cat(t[:, :, skip:], rope, half=half)], dim=2).type_as(v)
            for t in (q, k)
        )
    q = q[:, :, :queries]
    if prefix is not None:
        keys, values = prefix
        k = torch.cat([heads(keys.to(k.dtype)), k], dim=2)
        v = torch.cat([heads(values.to(v.dtype)), v], dim=2)
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if getattr(attn, "norm", None) is not None:
        x = attn.norm(x)
    if gate is not None:
        x = x * gate
    out: Tensor = attn.proj_drop(attn.proj(x))
    return out


class ClassTokenBlock(Block):
    """A timm ViT's last block where only the class token is read off: no other token's output is computed.

    The keys and values of all tokens are, so that the class token's output is that of the whole block. Saves about a
    fifteenth of every pass of a ViT-B, forward and backward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, N, D) -> the class token alone (B, 1, D)."""
        attn: Any = self.attn
        prefix = None
        if isinstance(attn, PrefixAttention):
            attn, prefix = attn.attn, attn.prefix
        y = attend(attn, self.norm1(x), prefix=prefix, queries=1)
        x = x[:, :1] + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def read_class_token_only(model: Any) -> None:
    """Makes the last block compute the class token alone, where the features are that token and the parts are known.

    Other models (average pooling, attention pooling, blocks of another kind) stay as they are.
    """
    last = model.blocks[-1]
    known = type(model) is VisionTransformer and type(last) is Block and type(last.attn) is Attention
    if known and model.global_pool == "token" and model.attn_pool is None:
        last.__class__ = ClassTokenBlock


def wrap_prefix_attention(model: nn.Module) -> list[PrefixAttention]:
    """Wraps the attention of every block (once) and returns the wrappers in block order."""
    wrapped = []
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        if not isinstance(getattr(block, "attn", None), (PrefixAttention, nn.Module)):
            raise UserError(
                f"blocks.{i} ({type(block).__name__}) has no attention that takes prefixes; prompts need another ViT"
            )
        if not isinstance(block.attn, PrefixAttention):
            block.attn = PrefixAttention(block.attn, i)
        wrapped.append(block.attn)
    return wrapped
