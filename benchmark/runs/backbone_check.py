"""Every timm ViT, made small with random weights: does it work, is it refused in one line, or is it wrong?

`dualcl check --backbones [GLOB ...]`: plain features and those under prompts of length 0 against timm's own; prompts
that learn; a low-rank update of a site. A ViT has a flat list of `blocks` with attention; others must be refused.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.models.vit import attention_sites
from dualcl.benchmark.models.vit_blocks import Unserved, has_attention
from dualcl.methods.shared.low_rank import inject

_TWO = {"embed_dim": 48, "depth": 2, "num_heads": 3}
#: tried in turn until timm builds the model: smaller ones first, then those with less to choose
SHRUNK: tuple[dict[str, Any], ...] = (
    {"img_size": 96, **_TWO, "head_dim": 16, "num_kv_heads": 3, "intermediate_size": 96},
    {"img_size": 64, **_TWO},
    {"img_size": 56, **_TWO},
    _TWO,
    {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2},
    {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_kv_heads": 1},
    {"img_size": 64, "depth": 2},
    {"img_size": 224, "embed_dim": 48, "num_heads": 1, "stages": [1, 1, 1, 1]},
    {"embed_dim": 48, "num_heads": 1, "stages": [1, 1, 1, 1], "global_att_blocks": []},
    {"img_size": 224, "depth": 2},
    {"depth": 2},
    {"img_size": 64, "depths": [1, 1, 1, 1]},
    {"depths": [1, 1, 1, 1]},
    {"depths": [1, 1, 1]},
    {"img_size": 64},
    {},
)
#: a model of more parameters is not built
LARGEST = 100_000_000
#: in the name of a class of a file with transformers
_SIGNS = ("attention", "attn", "transformer", "vit")


class Found(NamedTuple):
    """What became of a name: works, refused, differs, traceback, or not built; why, and how it was shrunk."""

    name: str
    outcome: str
    why: str
    flat: bool
    kwargs: dict[str, Any]


def transformers(globs: Sequence[str]) -> list[str]:
    """Names of timm whose file knows attention."""
    files: dict[str, bool] = {}
    chosen = []
    for name in timm.list_models():
        file = timm.model_entrypoint(name).__module__
        if file not in files:
            classes = [k.lower() for k, v in vars(sys.modules[file]).items() if isinstance(v, type)]
            files[file] = any(sign in known for known in classes for sign in _SIGNS)
        if files[file] and (not globs or any(fnmatch.fnmatch(name, glob) for glob in globs)):
            chosen.append(name)
    return chosen


def _built(name: str) -> tuple[Any, dict[str, Any]] | None:
    """The name in the first of the sizes that timm builds and passes an image through."""
    for kwargs in SHRUNK:
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in timm.create_model(name, num_classes=0, **kwargs).parameters())
            if size > LARGEST:
                continue
            model: Any = timm.create_model(name, num_classes=0, **kwargs).eval()
            side = kwargs.get("img_size") or model.pretrained_cfg["input_size"][-1]
            model(torch.zeros(1, 3, side, side))
        except Exception:
            continue
        return model, dict(kwargs)
    return None


def check_backbone(name: str) -> Found:
    """Whether dualcl understands the name, as `Found` says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = _built(name)
        if built is None:
            return Found(name, "not built", "", True, {})
        theirs, kwargs = built
        try:
            why = _difference(name, theirs, kwargs)
            return Found(name, "differs" if why else "works", why, True, kwargs)
        except Unserved as refusal:
            blocks = getattr(theirs, "blocks", getattr(getattr(theirs, "encoder", None), "blocks", ()))
            flat = isinstance(blocks, (nn.Sequential, nn.ModuleList)) and all(map(has_attention, blocks))
            named = name in str(refusal) and "\n" not in str(refusal)
            return Found(name, "refused" if named else "traceback", refusal.reason, flat, kwargs)
        except UserError as refusal:
            return Found(name, "refused" if name in str(refusal) else "traceback", str(refusal), True, kwargs)
        except Exception as error:
            return Found(name, "traceback", f"{type(error).__name__}: {error}".splitlines()[0], True, kwargs)


def _near(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and float((one - two).abs().max()) <= 1e-5 * max(1.0, float(two.abs().max()))


def _difference(name: str, theirs: Any, kwargs: dict[str, Any]) -> str:
    """What of our network is not as timm's, or does not learn; "" when all is right. UserError for a refusal."""
    sets = ["device=cpu", "backbone.pretrained=false", f"backbone.name={name}", "input.workers=0", "data.limit=2"]
    sets += [f"backbone.kwargs={json.dumps(kwargs)}", "data.classes=2", "stream.tasks=1"]
    torch.manual_seed(0)
    domain = Classification(resolve("glyphs", "l2p", sets), torch.device("cpu"))
    model: Any = domain.model
    network = domain.network
    for parameter in model.parameters():  # position terms start at zero
        parameter.data += 0.05 * torch.randn(parameter.shape)
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, domain.view.size, domain.view.size)
    with torch.no_grad():
        plain = network.run(images)
        if not _near(plain, theirs.forward_head(theirs.forward_features(images), pre_logits=True)):
            return "plain features"
    domain.sites()
    copied: Any = copy.deepcopy(model)
    sites = attention_sites(copied)
    first = next(iter(sites))
    update = inject(copied, {first: sites[first]}, 2)[first]
    update.start(torch.Generator().manual_seed(0))
    with torch.no_grad():
        update.A.normal_()
    adapted = network.run(images, model=copied)
    adapted.square().sum().backward()
    learns = update.A.grad is not None and bool(update.A.grad.isfinite().all() and update.A.grad.any())
    if not learns or torch.equal(adapted, plain):
        return "a low-rank update does not act or does not learn"
    network.allow(("prefixes",))
    width = model.embed_dim if hasattr(model, "embed_dim") else model.num_features
    blocks = range(network.blocks)
    with torch.no_grad():
        empty = torch.zeros(2, 0, width)
        if not _near(network.run(images, dict.fromkeys(blocks, (empty, empty))), plain):
            return "features with prompts of length 0"
    prompts = torch.randn(network.blocks, 2, 2, 4, width, requires_grad=True)
    given = network.run(images, {i: (prompts[i, 0], prompts[i, 1]) for i in blocks})
    given.square().sum().backward()
    if _near(given, plain) or prompts.grad is None or not bool(prompts.grad.isfinite().all() and prompts.grad.any()):
        return "prompts do not act or do not learn"
    with torch.no_grad():
        if not torch.equal(network.run(images), plain):
            return "features after prompts"
    return ""


def summary(found: Sequence[Found]) -> list[str]:
    """The counts in words, with the reasons of refusals and the names that are wrong."""
    flat = [f for f in found if f.flat and f.outcome != "not built"]
    count = Counter(f.outcome for f in flat)
    lines = [
        f"{len(flat)} ViTs (a flat list of blocks with attention): {count['works']} work, {count['refused']} "
        f"refused ({100 * count['refused'] / max(1, len(flat)):.1f} %), {count['differs']} differ, "
        f"{count['traceback']} tracebacks"
    ]
    reasons = Counter(f.why for f in flat if f.outcome == "refused")
    lines += [f"  refused, {reason}: {n}" for reason, n in reasons.most_common()]
    outside = Counter(f.outcome for f in found if not f.flat)
    lines.append(f"{sum(outside.values())} other transformers: " + ", ".join(f"{n} {o}" for o, n in outside.items()))
    left = [f.name for f in found if f.outcome == "not built"]
    lines.append(f"{len(left)} not built small" + (f": {', '.join(left)}" if left else ""))
    return lines + [f"{f.outcome}: {f.name}: {f.why}" for f in found if f.outcome in ("differs", "traceback")]
