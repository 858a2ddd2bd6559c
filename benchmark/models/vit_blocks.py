"""Blocks of a timm ViT: prefixes in attention, checkpointing, a last block for the class token alone."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm.layers
from timm.layers import apply_rot_embed_cat
from timm.models import beit
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention

from dualcl.benchmark.core.errors import UserError

#: not in older versions of timm
_DIFFERENTIAL: Any = getattr(timm.layers, "DiffAttention", None)
#: the classes, exactly, whose forward `attend` equals
_SERVED = {
    Attention,
    EvaAttention,
    beit.Attention,
    RelPosAttention,
    _DIFFERENTIAL,
    getattr(timm.layers, "AttentionRope", None),
}


def checkpoint_blocks(model: Any) -> None:
    """Makes every block keep its input alone for the backward, and compute the rest again there.

    Not timm's `set_grad_checkpointing`: below a frozen embedding its older versions find no gradient.
    """
    for block in model.blocks:
        block.forward = functools.partial(_checkpointed, block, block.forward)


def _checkpointed(block: Any, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    slots = _slots(block)
    added = [slot.added for slot in slots]

    def again(*args: Any, **kwargs: Any) -> Tensor:
        # in the backward, when another pass may have come since
        before = [slot.added for slot in slots]
        for slot, value in zip(slots, added, strict=True):
            slot.added = value
        try:
            return forward(*args, **kwargs)
        finally:
            for slot, value in zip(slots, before, strict=True):
                slot.added = value

    # the frozen network draws no random numbers
    out: Tensor = checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return out


class PrefixAttention(nn.Module):
    """A timm attention module that also attends to extra keys and values (prefix tuning).

    With no prefix set it calls the wrapped module as it is. Any class but those that `attend` equals is refused.
    """

    def __init__(self, attn: nn.Module, block: int, backbone: str = "the backbone") -> None:
        super().__init__()
        self.attn = attn
        #: keys and values (B, L, D) of the pass that is on
        self.added: tuple[Tensor, Tensor] | None = None
        kind = type(attn).__name__
        if type(attn) not in _SERVED:
            raise UserError(
                f"{backbone}: blocks.{block}.attn is a {kind}, which takes no prefixes; prompts need another ViT"
            )
        parts: Any = attn
        keys = parts.qkv.out_features // 3 if parts.qkv is not None else parts.k_proj.out_features
        if not keys == parts.proj.in_features == (parts.qkv or parts.q_proj).in_features:
            raise UserError(
                f"{backbone}: blocks.{block}.attn ({kind}) has heads narrower or wider than its tokens, or shared keys,"
                " which take no prefixes; prompts need another ViT"
            )
        self._names = list(inspect.signature(type(attn).forward).parameters)[2:]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        attn: Any = self.attn
        if self.added is None:
            return attn(x, *args, **kwargs)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        rope = given.pop("rope", None)
        shared = given.pop("shared_rel_pos_bias" if "shared_rel_pos_bias" in given else "shared_rel_pos", None)
        if any(v is not None and v is not False for v in given.values()):
            raise UserError(f"attention arguments {sorted(given)} cannot be combined with prefixes")
        return attend(attn, x, prefix=self.added, rope=rope, shared=shared)


def _position_bias(attn: Any, shared: Tensor | None) -> Tensor | None:
    """What is added to the scores of all tokens, (1, heads, N, N), as timm's forward adds it."""
    if hasattr(attn, "rel_pos"):
        return shared if attn.rel_pos is None else attn.rel_pos.get_bias()
    if getattr(attn, "relative_position_bias_table", None) is None:
        return shared
    own: Tensor = attn._get_rel_pos_bias()
    return own if shared is None else own + shared


def attend(
    attn: Any,
    x: Tensor,
    *,
    prefix: tuple[Tensor, Tensor] | None = None,
    rope: Tensor | None = None,
    shared: Tensor | None = None,
    queries: int | None = None,
) -> Tensor:
    """What a timm attention module gives for the first `queries` tokens (default: all), shape (B, queries, D).

    x (B, N, D) is attended to in full, and so are the keys and values of `prefix`, each (B, L, D), at no position.
    `shared` is the position bias that the model gives to all its blocks.
    """
    differential = type(attn) is _DIFFERENTIAL

    def heads(t: Tensor, width: int = int(attn.proj.in_features // attn.num_heads)) -> Tensor:
        # unflatten, as reshape cannot infer the number of heads of an empty prefix
        return t.unflatten(-1, (-1, width)).transpose(1, 2)

    def maps(t: Tensor) -> Tensor:
        # queries and keys: differential attention has two of half the width to each head of values
        return heads(t, int(attn.head_dim)) if differential else heads(t)

    gate = attn.gate(x[:, :queries]).sigmoid() if getattr(attn, "gate", None) is not None else None
    if attn.qkv is not None:
        qkv = attn.qkv(x)
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        q, k, v = qkv.chunk(3, dim=-1)
    else:
        q, k, v = (proj(x) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k, v = maps(q), maps(k), heads(v)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        skip, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        q, k = (
            torch.cat([t[:, :, :skip], apply_rot_embed_cat(t[:, :, skip:], rope, half=half)], dim=2).type_as(v)
            for t in (q, k)
        )
    q = q[:, :, :queries]
    bias = _position_bias(attn, shared)
    if bias is not None:
        bias = bias[..., :queries, :]
    if prefix is not None:
        keys, values = prefix
        k = torch.cat([maps(keys.to(k.dtype)), k], dim=2)
        v = torch.cat([heads(values.to(v.dtype)), v], dim=2)
        if bias is not None:
            bias = F.pad(bias, (keys.shape[1], 0))
    if differential:
        first, second = (F.scaled_dot_product_attention(q[:, i::2], k[:, i::2], v) for i in (0, 1))
        x = first - attn._compute_lambda().type_as(q) * second
        x = attn.sub_norm(x) * (1 - attn.lambda_init)
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    x = x.transpose(1, 2).flatten(2)
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
            attn, prefix = attn.attn, attn.added
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
    backbone = f"backbone {getattr(model, 'backbone_name', type(model).__name__)}"
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        if not isinstance(getattr(block, "attn", None), (PrefixAttention, nn.Module)):
            raise UserError(
                f"{backbone}: blocks.{i} ({type(block).__name__}) has no attention that takes prefixes; prompts need "
                "another ViT"
            )
        if not isinstance(block.attn, PrefixAttention):
            block.attn = PrefixAttention(block.attn, i, backbone)
        wrapped.append(block.attn)
    return wrapped


class SideSlot:
    """Where a block takes a side module: it reads the residual stream after attention and adds to what the MLP adds."""

    def __init__(self, block: Any, index: int) -> None:
        # others order norm, MLP and sum in another way
        if type(block) not in (Block, ClassTokenBlock, EvaBlock):
            raise UserError(
                f"blocks.{index} is a {type(block).__name__}, which takes no side modules; they need another ViT"
            )
        self.added: Callable[[Tensor], Tensor] | None = None
        self._seen: Tensor | None = None
        block.norm2.register_forward_pre_hook(self._see)
        block.drop_path2.register_forward_hook(self._add)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._seen = None if self.added is None else args[0]

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen, self._seen = self._seen, None
        return out if self.added is None or seen is None else out + self.added(seen)


class Additions:
    """What passes through a ViT may add to its blocks: prefixes of attention, side modules."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._slots: dict[str, list[Any]] = {}

    def allow(self, requires: Iterable[str]) -> None:
        """Prepares the blocks for `prefixes` and `sides`, as asked; UserError for blocks of other kinds."""
        if "prefixes" in requires and "prefixes" not in self._slots:
            self._slots["prefixes"] = wrap_prefix_attention(self._model)
        if "sides" in requires and "sides" not in self._slots:
            self._slots["sides"] = [SideSlot(block, i) for i, block in enumerate(self._model.blocks)]
            for block, slot in zip(self._model.blocks, self._slots["sides"], strict=True):
                block.side_slot = slot

    @contextlib.contextmanager
    def given(self, prefixes: Mapping[int, Any], sides: Mapping[int, Any]) -> Iterator[None]:
        """Inside, the blocks add these; outside, nothing."""
        used = []
        for kind, added in (("prefixes", prefixes), ("sides", sides)):
            if added and kind not in self._slots:
                raise ValueError(f'a pass with {kind} needs "{kind}" in the method\'s `requires`')
            for block, value in added.items():
                used.append(self._slots[kind][block])
                used[-1].added = value
        try:
            yield
        finally:
            for slot in used:
                slot.added = None


def _slots(block: Any) -> list[Any]:
    slots = [block.attn] if isinstance(getattr(block, "attn", None), PrefixAttention) else []
    return [*slots, block.side_slot] if hasattr(block, "side_slot") else slots
