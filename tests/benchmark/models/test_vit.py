"""timm backbones: sites that really act, prefixes against hand-written attention, weights files."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.vit import BackboneConfig, attention_sites, bundled_backbones, load_backbone
from dualcl.benchmark.models.vit_blocks import (
    PrefixAttention,
    checkpoint_blocks,
    read_class_token_only,
    wrap_prefix_attention,
)
from dualcl.benchmark.models.weights import read_safetensors, state_hash
from dualcl.methods.shared.low_rank import inject

# isort: split
import timm
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer import Attention

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
KINDS = {
    "fused": ("vit_tiny_patch16_224", {"img_size": 32, **SMALL}),
    "fused, rope": ("eva02_tiny_patch14_224", {"img_size": 28, **SMALL}),
    "split, rope": ("eva02_tiny_patch14_224", {"img_size": 28, "qkv_fused": False, **SMALL}),
    "fused, bias apart": ("eva_giant_patch14_224", {"img_size": 28, **SMALL}),
    "relative positions": ("beit_base_patch16_224", {"img_size": 32, **SMALL}),
}
PREFIXED = ("fused", "fused, rope", "split, rope", "fused, bias apart")
#: one model or more of each attention class, at width 48
FAMILIES = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch14_reg4_dinov2": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {"use_shared_rel_pos_bias": True},
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_base_patch16_cls_224": {},
    "vit_relpos_small_patch16_rpn_224": {},
    "vit_srelpos_small_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "eva_giant_patch14_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_dlittle_patch16_reg1_gap_256": {},
    "vit_dpwee_patch16_reg1_gap_256": {},
    "vit_pwee_patch16_reg1_gap_256": {},
    "samvit_base_patch16": {"global_attn_indexes": [1], "use_rel_pos": True},
    "vit_base_patch16_18x2_224": {},
    "naflexvit_base_patch16_gap": {},
    "qwen3_vit_88m": {},
    "gemma4_vit_167m": {"head_dim": 16, "num_kv_heads": 3, "intermediate_size": 96},
    "cait_xxs24_224": {},
    "xcit_nano_12_p16_224": {},
}
NO_PREFIXES = {"xcit_nano_12_p16_224"}


def backbone(kind, **more):
    name, kwargs = KINDS[kind]
    torch.manual_seed(0)
    model, info = load_backbone(BackboneConfig(name=name, pretrained=False, kwargs={**kwargs, **more}))
    with torch.no_grad():  # timm starts biases at zero and EVA near zero, which would hide mistakes
        for n, p in model.named_parameters():
            if "attn" in n:
                p.normal_(std=0.3)
    return model.double(), info


def pictures(info, n=2):
    size = info.input_size
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def features(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


# --- sites ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_q_k_and_v_of_every_block(kind):
    sites = attention_sites(backbone(kind)[0])
    assert list(sites) == [f"blocks.{b}.attn.{p}" for b in range(2) for p in "qkv"]
    assert {(s.d_out, s.d_in) for s in sites.values()} == {(32, 32)}
    modules = {s.module_name.rpartition(".")[2] for s in sites.values()}
    assert modules == ({"q_proj", "k_proj", "v_proj"} if "split" in kind else {"qkv"})


def test_test_vit_of_timm_has_sites():
    model, _ = load_backbone(BackboneConfig(name="test_vit", pretrained=False))
    assert len(attention_sites(model)) == 3 * len(model.blocks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_an_adapter_acts_as_the_same_change_of_the_weight(kind, part):
    model, info = backbone(kind)
    x = pictures(info)
    plain = features(model, x)
    direct = copy.deepcopy(model)
    updates = inject(model, attention_sites(model), rank=3)
    assert torch.equal(features(model, x), plain)
    generator = torch.Generator().manual_seed(2)
    for name, site in attention_sites(direct).items():
        if name.endswith(part):
            updates[name].start(generator)
            with torch.no_grad():
                updates[name].A.normal_(generator=generator)
                site.weight.add_(updates[name].A @ updates[name].B)
    adapted = features(model, x).detach()
    assert (adapted - plain).abs().max() > 1e-4
    torch.testing.assert_close(adapted, features(direct, x), rtol=0, atol=1e-9)
    for update in updates.values():
        update.fold()
    torch.testing.assert_close(features(model, x), adapted, rtol=0, atol=1e-9)


def test_a_site_is_a_counted_view_of_the_weight():
    model, _ = backbone("fused")
    site = attention_sites(model)["blocks.0.attn.k"]
    version, before = site.module.weight._version, site.module.weight.clone()
    site.weight.add_(1)
    assert torch.equal(site.module.weight[32:64], before[32:64] + 1)
    assert torch.equal(site.module.weight[:32], before[:32])
    assert site.module.weight._version > version
    assert not site.weight.requires_grad


def test_backbones_are_frozen_and_in_evaluation_mode():
    model, _ = backbone("fused")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


# --- prefixes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREFIXED)
def test_an_empty_prefix_is_the_plain_forward(kind):
    model, info = backbone(kind)
    x = pictures(info)
    plain = features(model, x)
    wrapped = wrap_prefix_attention(model)
    assert torch.equal(features(model, x), plain)
    for attention in wrapped:
        attention.added = (torch.zeros(2, 0, 32), torch.zeros(2, 0, 32))
    torch.testing.assert_close(features(model, x), plain, rtol=0, atol=1e-10)
    wrapped[1].added = (torch.ones(2, 1, 32), torch.ones(2, 1, 32))
    assert (features(model, x) - plain).abs().max() > 1e-4


def projections(attn, x):
    """q, k, v (B, N, D) by plain matrix products."""
    if attn.qkv is None:
        return [x @ p.weight.T + (0 if p.bias is None else p.bias) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
    bias = attn.qkv.bias if attn.qkv.bias is not None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return list((x @ attn.qkv.weight.T + bias).chunk(3, dim=-1))


def by_hand(attn, x, keys, values, rope=None):
    """Attention with extra keys and values, head by head."""
    q, k, v = projections(attn, x)
    width = x.shape[-1] // attn.num_heads
    out = []
    for h in range(attn.num_heads):
        part = slice(h * width, (h + 1) * width)
        qh, kh = q[..., part], k[..., part]
        if rope is not None:  # positions turn the patches' queries and keys, neither the class token nor a prefix
            qh, kh = (torch.cat([t[:, :1], apply_rot_embed_cat(t[:, 1:], rope)], dim=1) for t in (qh, kh))
        kh = torch.cat([keys[..., part], kh], dim=1)
        vh = torch.cat([values[..., part], v[..., part]], dim=1)
        out.append((qh @ kh.mT / width**0.5).softmax(dim=-1) @ vh)
    return attn.proj(attn.norm(torch.cat(out, dim=-1)))


@pytest.mark.parametrize("kind", PREFIXED)
def test_a_prefix_is_extra_keys_and_values(kind):
    model, _ = backbone(kind)
    attn = model.blocks[1].attn
    rope = model.rope.get_embed().double() if "rope" in kind else None
    n = 5 if rope is None else 1 + len(rope)
    generator = torch.Generator().manual_seed(3)
    x, keys, values = (torch.randn(3, length, 32, dtype=torch.float64, generator=generator) for length in (n, 4, 4))
    wrapped = PrefixAttention(attn, 1)
    wrapped.added = (keys, values)
    arguments = {} if rope is None else {"rope": rope}
    expected = by_hand(attn, x, keys, values, rope)
    torch.testing.assert_close(wrapped(x, **arguments), expected, rtol=0, atol=1e-10)
    assert (expected - by_hand(attn, x, keys[:, :0], values[:, :0], rope)).abs().max() > 1e-3


def test_wrapping_twice_wraps_once():
    model, _ = backbone("fused")
    assert wrap_prefix_attention(model) == wrap_prefix_attention(model)
    assert not isinstance(model.blocks[0].attn.attn, PrefixAttention)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_prefix_gives_timms_own_features_or_a_refusal(name):
    torch.manual_seed(0)
    size = 224 if "samvit" in name else 56 if "14" in name else 64
    sizes = {"img_size": size, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model, info = load_backbone(BackboneConfig(name=name, pretrained=False, kwargs={**sizes, **FAMILIES[name]}))
    with torch.no_grad():  # position terms start at zero
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = pictures(info).float()
    plain = features(model, x)
    if name in NO_PREFIXES:
        with pytest.raises(UserError, match=rf"^backbone {name}: blocks\.0.*prompts need another ViT$"):
            wrap_prefix_attention(model)
        return
    for attention in wrap_prefix_attention(model):
        attention.added = (torch.zeros(2, 0, 48), torch.zeros(2, 0, 48))
    torch.testing.assert_close(features(model, x), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "vit_dlittle_patch16_reg1_gap_256"])
def test_a_prefix_equal_to_tokens_acts_as_those_tokens(name):
    torch.manual_seed(0)
    kwargs = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
    attn = load_backbone(BackboneConfig(name=name, pretrained=False, kwargs=kwargs))[0].blocks[0].attn.double()
    x = torch.randn(2, 16, 48, dtype=torch.float64)
    more = torch.randn(2, 4, 48, dtype=torch.float64)
    whole = torch.cat([more, x], dim=1)
    _, keys, values = attn.qkv(more).chunk(3, dim=-1)
    keys = attn.k_norm(keys.unflatten(-1, (-1, attn.head_dim))).flatten(2)
    wrapped = PrefixAttention(attn, 0)
    wrapped.added = (keys, values)
    if "relpos" in name:
        bias = attn.rel_pos.get_bias()
        found = wrapped(x)
        attn.rel_pos = None
        expected = attn(whole, shared_rel_pos=F.pad(bias, (4, 0, 4, 0)))[:, 4:]
    else:
        found, expected = wrapped(x), attn(whole)[:, 4:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_attention_that_takes_no_prefix_is_refused():
    class Own(Attention):
        pass

    model, _ = backbone("fused")
    model.blocks[0].attn.__class__ = Own
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224: blocks\.0\.attn is a Own, which takes no prefixes"):
        wrap_prefix_attention(model)
    with pytest.raises(UserError, match=r"blocks\.3\.attn is a MultiheadAttention, which takes no prefixes"):
        PrefixAttention(nn.MultiheadAttention(8, 2), 3)
    with pytest.raises(UserError, match=r"blocks\.3\.attn \(Attention\) has heads narrower or wider"):
        PrefixAttention(Attention(8, 2, attn_head_dim=8), 3)
    model.blocks[0].attn = None
    with pytest.raises(UserError, match=r"blocks\.0 \(Block\) has no attention that takes prefixes"):
        wrap_prefix_attention(model)


def test_a_mask_cannot_be_combined_with_a_prefix():
    model, _ = backbone("fused")
    attention = wrap_prefix_attention(model)[0]
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    attention.added = (torch.ones(1, 2, 32), torch.ones(1, 2, 32))
    with pytest.raises(UserError, match=r"attn_mask.* cannot be combined with prefixes"):
        attention(x, attn_mask=torch.zeros(5, 5, dtype=torch.float64))
    assert attention(x, attn_mask=None, is_causal=False).shape == x.shape


# --- cheaper passes -------------------------------------------------------------------------------------------------

CLASS_TOKEN = {
    "plain": {},
    "layer scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 3},
    "norms": {"qk_norm": True},
}


@pytest.mark.parametrize("more", CLASS_TOKEN.values(), ids=CLASS_TOKEN)
@pytest.mark.parametrize("prefix", [False, True], ids=["bare", "prefix"])
def test_the_class_token_alone_is_that_of_the_whole_block(more, prefix):
    def passes(short):
        model, info = backbone("fused", **more)
        last = model.blocks[-1]
        factors = []
        if not prefix:
            inject(model, {n: s for n, s in attention_sites(model).items() if n.startswith("blocks.1.")}, 2)
            factors = [p for n, p in model.named_parameters() if n.endswith((".A", ".B"))]
            for update in last.attn.qkv.updates:
                update.active = True
        for i, p in enumerate(factors):
            p.data.normal_(generator=torch.Generator().manual_seed(i))
            p.requires_grad_(True)
        extra = torch.randn(2, 2, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        extra.requires_grad_(True)
        if short:
            read_class_token_only(model)
        if prefix:
            wrap_prefix_attention(model)[1].added = (extra[0], extra[1])
        seen = []
        last.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
        out = features(model, pictures(info))
        out.square().sum().backward()
        return seen[0], [out.detach(), *(p.grad for p in factors), *([extra.grad] if prefix else [])]

    tokens, expected = passes(short=False)
    assert tokens >= 5
    tokens, found = passes(short=True)
    assert tokens == 1
    assert all(t.abs().max() > 0 for t in expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "more"), [("fused", {"global_pool": "avg"}), ("fused", {"global_pool": "map"}), ("relative positions", {})]
)
def test_models_that_read_more_than_the_class_token_stay_whole(kind, more):
    model, info = backbone(kind, **more)
    expected = features(model, pictures(info))
    read_class_token_only(model)
    assert torch.equal(features(model, pictures(info)), expected)


def test_checkpointed_blocks_give_the_same_bits_and_keep_their_inputs_alone():
    def gradients(checkpointed):
        model, info = backbone("fused")
        if checkpointed:
            checkpoint_blocks(model)
        weights = [block.attn.qkv.weight.requires_grad_(True) for block in model.blocks]
        kept = []

        def pack(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = features(model, pictures(info)).square().sum()
        loss.backward()
        return sum(kept), [w.grad for w in weights]

    much, expected = gradients(False)
    little, found = gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert little < much / 4


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file for `tiny()`."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32, **SMALL)
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), file)
    return file


def tiny(file, **kwargs):
    config = BackboneConfig(name="vit_tiny_patch16_224", weights=str(file), kwargs={"img_size": 32, **SMALL, **kwargs})
    return load_backbone(config)


def test_weights_from_a_file_are_loaded_and_hashed(weights):
    model, info = tiny(weights)
    state = load_file(weights)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert info.weights == "tiny.safetensors"
    assert info.weights_sha256 == state_hash(state)
    assert info.input_size == 32


def test_a_classifier_in_the_file_is_left_out(weights, tmp_path):
    file = tmp_path / "with_head.safetensors"
    save_file({**load_file(weights), "head.weight": torch.ones(3, 32), "head.bias": torch.ones(3)}, file)
    assert tiny(file)[1].weights_sha256 == tiny(weights)[1].weights_sha256


@pytest.mark.parametrize("more", [{}, {"reg_tokens": 2, "no_embed_class": True}], ids=["class token", "registers"])
def test_a_position_table_of_another_size_is_resampled_as_timm_does(tmp_path, more):
    name, kwargs = "vit_small_patch14_dinov2", {"patch_size": 14, **SMALL, **more}
    torch.manual_seed(4)
    file = tmp_path / "large.safetensors"
    large = timm.create_model(name, num_classes=0, img_size=140, **kwargs)
    save_file(large.state_dict(), file)
    small = {**kwargs, "img_size": 84}
    model, info = load_backbone(BackboneConfig(name=name, weights=str(file), kwargs=small))
    overlay = {"file": str(file), "num_classes": 0}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **small).eval()
    x = pictures(info).float()
    assert info.input_size == 84
    assert torch.equal(model.pos_embed, theirs.pos_embed)
    assert torch.equal(features(model, x), features(theirs, x))


def change(state, kind):
    if kind == "missing":
        del state["norm.weight"]
    elif kind == "extra":
        state["blocks.7.norm1.weight"] = torch.ones(32)
    else:
        state["pos_embed"] = torch.ones(1, 17, 31)
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"odd\.safetensors lacks norm\.weight .*check backbone\.name and backbone\.kwargs"),
        ("extra", r"odd\.safetensors has blocks\.7\.norm1\.weight .*which the model lacks"),
        ("shape", r"pos_embed of shape \(1, \d+, 31\), the model wants \(1, 5, 32\); check backbone\.kwargs"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, tmp_path, kind, message):
    file = tmp_path / "odd.safetensors"
    save_file(change(load_file(weights), kind), file)
    with pytest.raises(UserError, match=message) as caught:
        tiny(file)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(weights, tmp_path):
    with pytest.raises(UserError, match=r"backbone\.weights: .*nowhere\.safetensors does not exist"):
        read_safetensors(tmp_path / "nowhere.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut\.safetensors is no valid safetensors file \(truncated\?\)"):
        read_safetensors(cut)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match=r"method\.start: .*text\.safetensors is no valid safetensors"):
        read_safetensors(tmp_path / "text.safetensors", key="method.start")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_pickles_are_never_loaded(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    torch.save({"a": torch.ones(2)}, file)
    with pytest.raises(UserError, match=rf"weights\{suffix} is a pickle file, which is never loaded; convert it"):
        read_safetensors(file)


def test_hash_changes_with_a_bit_a_name_a_shape_and_a_type():
    state = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    same = {"b": torch.zeros(2), "a": torch.arange(6.0)}
    assert state_hash(state) == state_hash(same)
    bit = state["a"].clone()
    bit.view(torch.int32)[3] ^= 1
    others = [
        {**state, "a": bit},
        {"a2": state["a"], "b": state["b"]},
        {**state, "a": state["a"].view(2, 3)},
        {**state, "b": torch.zeros(2, dtype=torch.int32)},
        {**state, "b": -torch.zeros(2)},
    ]
    hashes = [state_hash(state), *map(state_hash, others)]
    assert len(set(hashes)) == len(hashes)
    assert state_hash({"a": torch.arange(6.0).view(2, 3).T}) == state_hash(
        {"a": torch.arange(6.0).view(2, 3).T.contiguous()}
    )


@pytest.mark.parametrize("name", sorted(bundled_backbones()))
def test_a_bundled_backbone_has_the_weights_its_description_names(name):
    described = json.loads(bundled_backbones()[name].read_text(encoding="utf-8"))
    model, info = load_backbone(BackboneConfig(name=name))
    file = bundled_backbones()[name].with_suffix(".safetensors")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == described["sha256"]
    assert all(torch.equal(v.float(), model.state_dict()[k]) for k, v in load_file(file).items())
    assert info.weights == file.name
    assert sum(p.numel() for p in model.parameters()) == described["parameters"]
    assert (info.input_size, list(info.mean)) == (described["input_size"], described["mean"])
    untrained = load_backbone(BackboneConfig(name=name, pretrained=False))[1]
    assert untrained.weights == "random"
    assert untrained.weights_sha256 != info.weights_sha256


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig(name="glyph_vit"), r"unknown backbone\.name 'glyph_vit'; did you mean 'glyph-vit'"),
        (BackboneConfig(name="vit_tiny_patch16_225"), r"did you mean .*'vit_tiny_patch16_224'"),
        (BackboneConfig(name="resnet18", pretrained=False), r"resnet18 has no transformer blocks; choose a ViT"),
        (
            BackboneConfig(name="mixer_s32_224", pretrained=False),
            r"backbone mixer_s32_224 has blocks without attention",
        ),
        (
            BackboneConfig(name="test_vit", pretrained=False, kwargs={"img_size": [32, 64]}),
            r"backbone test_vit takes images of 32 x 64; they must be square",
        ),
        (
            BackboneConfig(name="vit_tiny_patch16_224", pretrained=False, kwargs={"img_size": 8}),
            r"backbone vit_tiny_patch16_224: its patches of .* are larger than images of 8 px",
        ),
        (
            BackboneConfig(name="test_vit", pretrained=False, kwargs={"in_chans": 1}),
            r"backbone\.kwargs\.in_chans=1: images have 3 channels",
        ),
        (
            BackboneConfig(name="test_vit", kwargs={"num_classes": 3}),
            r"backbone\.kwargs\.num_classes is set by the suite",
        ),
        (
            BackboneConfig(name="test_vit", pretrained=False, kwargs={"wings": 2}),
            r"backbone\.kwargs does not fit test_vit: .*wings",
        ),
        (
            BackboneConfig(name="test_vit", pretrained=False, kwargs={"embed_dim": 33, "num_heads": 2}),
            r"backbone test_vit cannot be built with",
        ),
    ],
)
def test_backbones_that_cannot_be_had_are_named(config, message):
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(config)
    assert "\n" not in str(caught.value)


def test_sites_need_three_equal_parts():
    model, _ = backbone("fused")
    model.blocks[1].attn.qkv = nn.Linear(32, 95)
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv has 95 rows, which are not three equal projections"):
        attention_sites(model)


def test_hand_written_attention_agrees_with_torch():
    model, _ = backbone("fused")
    attn, x = model.blocks[0].attn, torch.randn(2, 5, 32, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in projections(attn, x))
    expected = attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(by_hand(attn, x, x[:, :0], x[:, :0]), expected, rtol=0, atol=1e-12)
