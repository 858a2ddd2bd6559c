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
import timm.models
from timm.layers import apply_rot_embed_cat
from timm.models import beit, cait, vision_transformer, vision_transformer_sam
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention
from torch.overrides import TorchFunctionMode

from dualcl.benchmark.core.errors import UserError

#: why a backbone is refused
NO_BLOCKS = "no flat list of transformer blocks"
NO_ATTENTION = "blocks without attention"
NO_VECTOR = "no vector for an image"
NOT_SQUARE = "images that are not square, or have no 3 channels"
TOO_SMALL = "patches larger than the image"
NO_PASS = "timm fails to pass an image through it"
NO_SITES = "no Linear for each of Q, K and V"
NO_PREFIXES = "attention that takes no prompts"
OTHER_HEADS = "heads narrower or wider than the tokens, or shared keys"


class Unserved(UserError):
    """A backbone that is not understood; `reason` is one of those above."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def backbone_name(model: Any) -> str:
    """What messages call the model."""
    return f"backbone {getattr(model, 'backbone_name', type(model).__name__)}"


def has_attention(block: nn.Module) -> bool:
    """Whether it is a block of a ViT."""
    return isinstance(getattr(block, "attn", getattr(block, "attns", getattr(block, "in_proj", None))), nn.Module)


#: not in older versions of timm
_DIFFERENTIAL: Any = getattr(timm.layers, "DiffAttention", None)
#: the classes, exactly, whose forward `attend` equals
_SERVED = {
    Attention,
    EvaAttention,
    beit.Attention,
    RelPosAttention,
    cait.TalkingHeadAttn,
    _DIFFERENTIAL,
    getattr(timm.layers, "AttentionRope", None),
}
#: those whose own forward is one call of torch's attention for each half of the heads: it is given the prefix there
_EXTENDED = {
    vision_transformer_sam.Attention,
    vision_transformer.ParallelScalingBlock,
    getattr(vision_transformer, "DiffParallelScalingBlock", None),
    getattr(getattr(timm.models, "gemma4_vit", None), "Gemma4Attention", None),
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
        if type(attn) not in _SERVED | _EXTENDED:
            raise Unserved(
                f"{backbone}: blocks.{block}.attn is a {kind}, which takes no prefixes; prompts need another ViT",
                NO_PREFIXES,
            )
        if not _plain_heads(attn):
            raise Unserved(
                f"{backbone}: blocks.{block}.attn ({kind}) has heads narrower or wider than its tokens, or shared keys,"
                " which take no prefixes; prompts need another ViT",
                OTHER_HEADS,
            )
        self._names = list(inspect.signature(type(attn).forward).parameters)[2:]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        attn: Any = self.attn
        if self.added is None:
            return attn(x, *args, **kwargs)
        if type(attn) in _EXTENDED:
            return extended(attn, self.added, attn, x, *args, **kwargs)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        rope = given.pop("rope", None)
        shared = given.pop("shared_rel_pos_bias" if "shared_rel_pos_bias" in given else "shared_rel_pos", None)
        if any(v is not None and v is not False for v in given.values()):
            raise UserError(f"attention arguments {sorted(given)} cannot be combined with prefixes")
        return attend(attn, x, prefix=self.added, rope=rope, shared=shared)


def _plain_heads(attn: Any) -> bool:
    """Whether keys and values are as wide as the tokens, each head with its own."""
    if hasattr(attn, "in_proj"):
        return True
    fused, out = getattr(attn, "qkv", None), getattr(attn, "proj", None) or attn.o_proj.linear
    if fused is not None:
        return bool(fused.out_features == 3 * out.in_features and fused.in_features == out.in_features)
    q, k, v = (getattr(p, "linear", p) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    return bool({k.out_features, v.out_features, out.in_features} == {q.in_features})


class _Extended(TorchFunctionMode):
    """Inside, calls of torch's attention also see the keys and values of a prefix, each (B, L, D)."""

    def __init__(self, heads: int, prefix: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.heads, self.prefix, self.calls = heads, prefix, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args
        keys, values = (self._like(own, given) for own, given in zip((k, v), self.prefix, strict=True))
        mask, self.calls = kwargs.get("attn_mask"), self.calls + 1
        if mask is not None:
            kwargs = {**kwargs, "attn_mask": F.pad(mask, (keys.shape[-2], 0), value=float(mask.dtype == torch.bool))}
        return func(q, torch.cat([keys, k], dim=-2), torch.cat([values, v], dim=-2), **kwargs)

    def _like(self, own: Tensor, given: Tensor) -> Tensor:
        """The prefix in the shape (.., L, d) of what it is put before: of each window, and of one half of the heads."""
        t = given.to(own.dtype).unflatten(-1, (-1, own.shape[-1])).transpose(1, 2)
        t = t[:, self.calls % (t.shape[1] // self.heads) :: t.shape[1] // self.heads]
        rows = own.shape[0] // (self.heads if own.dim() == 3 else 1)
        t = t.repeat_interleave(rows // len(t), dim=0)
        return t.flatten(0, 1) if own.dim() == 3 else t


def extended(
    module: Any, prefix: tuple[Tensor, Tensor], forward: Callable[..., Tensor], *args: Any, **kw: Any
) -> Tensor:
    """`forward` of a module of `_EXTENDED`, with extra keys and values at no position, in every window."""
    if any(v is not None and v is not False for k, v in kw.items() if k in ("attn_mask", "is_causal")):
        raise UserError("an attention mask cannot be combined with prefixes")
    with _Extended(int(module.num_heads), prefix) as mode:
        out = forward(*args, **kw)
    if not mode.calls:
        raise UserError("prompts need torch's fused attention here; leave TIMM_FUSED_ATTN unset")
    return out


class PrefixBlock:
    """The slot of a block that is its own attention: the parallel ones, with MLP and attention in one."""

    def __init__(self, block: Any) -> None:
        self.added: tuple[Tensor, Tensor] | None = None
        self._block = block
        whole = block.forward
        inner = whole.args[1] if isinstance(whole, functools.partial) else whole
        own = functools.partial(self._forward, inner)
        # below a checkpoint, so that the backward's pass has the prefix too
        block.forward = functools.partial(_checkpointed, block, own) if inner is not whole else own
        block.prefix_slot = self

    def _forward(self, inner: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
        return inner(x, **kwargs) if self.added is None else extended(self._block, self.added, inner, x, **kwargs)


class PrefixSeveral:
    """The slot of a block with several attentions side by side, which all get the same prefix."""

    def __init__(self, wrapped: list[PrefixAttention]) -> None:
        self.wrapped = wrapped

    @property
    def added(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the pass that is on."""
        return self.wrapped[0].added

    @added.setter
    def added(self, value: tuple[Tensor, Tensor] | None) -> None:
        for attention in self.wrapped:
            attention.added = value


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
    if type(attn) is cait.TalkingHeadAttn:
        weights = (q * attn.scale) @ k.mT  # mixed over the heads before and after the softmax
        weights = attn.proj_l(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        x = attn.proj_w(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v
    elif differential:
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


def wrap_prefix_attention(model: nn.Module) -> list[Any]:
    """Makes the attention of every block take prefixes (once) and returns what they are set on, in block order."""
    return [_prefix_slot(block, i, backbone_name(model)) for i, block in enumerate(model.blocks)]  # type: ignore[arg-type]


def _prefix_slot(block: Any, i: int, backbone: str) -> Any:
    if hasattr(block, "prefix_slot"):
        return block.prefix_slot
    if type(block) in _EXTENDED:
        return PrefixBlock(block)
    if isinstance(getattr(block, "attns", None), nn.ModuleList):
        for part in block.attns:
            part.attn = PrefixAttention(part.attn, i, backbone)
        block.prefix_slot = PrefixSeveral([part.attn for part in block.attns])
        return block.prefix_slot
    if not isinstance(getattr(block, "attn", None), nn.Module):
        raise Unserved(
            f"{backbone}: blocks.{i} ({type(block).__name__}) has no attention that takes prefixes; prompts need "
            "another ViT",
            NO_PREFIXES,
        )
    if not isinstance(block.attn, PrefixAttention):
        block.attn = PrefixAttention(block.attn, i, backbone)
    return block.attn


class SideSlot:
    """Where a block takes a side module: it reads the residual stream after attention and adds to what the MLP adds."""

    def __init__(self, block: Any, index: int, backbone: str = "the backbone") -> None:
        # others order norm, MLP and sum in another way
        if type(block) not in (Block, ClassTokenBlock, EvaBlock):
            raise UserError(
                f"{backbone}: blocks.{index} is a {type(block).__name__}, which takes no side modules; they need "
                "another ViT"
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
            name = backbone_name(self._model)
            self._slots["sides"] = [SideSlot(block, i, name) for i, block in enumerate(self._model.blocks)]
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
    prefix = getattr(block, "prefix_slot", None) or getattr(block, "attn", None)
    slots = [prefix] if isinstance(prefix, (PrefixAttention, PrefixBlock, PrefixSeveral)) else []
    return [*slots, block.side_slot] if hasattr(block, "side_slot") else slots
