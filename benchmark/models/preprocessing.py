"""How images were prepared for a file of weights: what the file, a config.json beside it, or timm's tag says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
from timm.models import list_pretrained

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import parse_json, read_json
from dualcl.benchmark.models.weights import read_metadata


def _numbers(value: Any, least: float) -> bool:
    """Whether it is three finite numbers above `least`."""
    three = isinstance(value, (list, tuple)) and len(value) == 3
    return three and all(isinstance(v, (int, float)) and math.isfinite(v) and v > least for v in value)


def described(cfg: Any, where: str) -> dict[str, Any] | None:
    """Mean, std and interpolation of a description in timm's form; None without any, UserError for half of it."""
    if isinstance(cfg, Mapping) and isinstance(cfg.get("pretrained_cfg"), Mapping):
        cfg = cfg["pretrained_cfg"]
    if not isinstance(cfg, Mapping) or not {"mean", "std"} & set(cfg):
        return None
    for key, least in (("mean", -math.inf), ("std", 0)):
        if not _numbers(cfg.get(key), least):
            raise UserError(f"{where}: {key} is {cfg.get(key)!r}, not three numbers (red, green, blue); correct it")
    interpolation = cfg.get("interpolation", "bicubic")
    if interpolation not in ("bilinear", "bicubic"):
        raise UserError(f"{where}: interpolation is {interpolation!r}, not bilinear or bicubic; correct it")
    return {"mean": cfg["mean"], "std": cfg["std"], "interpolation": interpolation}


def _of_metadata(file: str) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for key, text in read_metadata(file).items():
        if key in ("pretrained_cfg", "mean", "std"):
            try:
                found[key] = parse_json(text)
            except ValueError as error:
                raise UserError(f"{file}: its metadata {key} is no JSON ({error}); write it again") from None
        elif key == "interpolation":
            found[key] = text
    return described(found, f"{file}: its metadata")


def _beside(file: str, architecture: str) -> dict[str, Any] | None:
    config = Path(file).parent / "config.json"
    read = read_json(config) if config.is_file() else None
    # a folder may hold weights of several architectures
    if isinstance(read, dict) and read.get("architecture", architecture) != architecture:
        return None
    return described(read, str(config))


def preprocessing(file: str, name: str, cfg: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """What is said of the weights in `file`, and who says it: metadata, config.json, or timm of the tag in `name`.

    `cfg` is timm's description of `name`. A name without a tag has one where timm knows one tag alone.
    """
    architecture, dot, _ = name.partition(".")
    if (found := _of_metadata(file)) is not None:
        return found, f"metadata of {Path(file).name}"
    if (found := _beside(file, architecture)) is not None:
        return found, f"config.json beside {Path(file).name}"
    tags = [name] if dot else list_pretrained(f"{architecture}.*")
    return (described(cfg, tags[0]), f"tag {tags[0]}") if len(tags) == 1 else (None, None)
