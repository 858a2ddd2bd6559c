"""The families of text-to-image models there are, and which of them a model is of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import read_json
from dualcl.benchmark.models.bundled import bundled_diffusion, check_bundled
from dualcl.benchmark.models.stable_diffusion import StableDiffusion
from dualcl.benchmark.models.text_to_image import DTYPES, BaseConfig, TextToImage
from dualcl.benchmark.models.weights import CONVERT, finite, no_pickles, offline

INDEX = "model_index.json"
HALF = "fp16"
#: how the libraries say that there are no weights of a form
NO_FILE = re.compile(r"no file named|(have|contain) a file named", re.IGNORECASE)
#: asked in turn
FAMILIES: tuple[type[TextToImage], ...] = (StableDiffusion,)
#: weights and all that goes with them; what a model's small files say beside its weights
MODEL_FILES = ("*.safetensors", "*.json", "*.txt")
SETTING_FILES = ("config.json", "scheduler_config.json", "vocab.json", "merges.txt")


def part_files(patterns: Sequence[str]) -> list[str]:
    """Patterns of such files in the folders of a model's parts, of any family."""
    return [f"{part}/{pattern}" for part in sorted({p for f in FAMILIES for p in f.parts}) for pattern in patterns]


def load(config: BaseConfig, device: torch.device | str = "cpu") -> TextToImage:
    """Loads the model that `config` names, everything frozen.

    Raises UserError when it is not there, is of no family, lacks a part, or its parts do not fit one another.
    """
    bundled = bundled_diffusion()
    source, name, weights = _locate(config.model, bundled)
    index = _index(source, config)
    family = next((f for f in FAMILIES if index is None or f.reads(index)), None)
    if family is None:
        known = " and ".join(f.title for f in FAMILIES)
        raise UserError(f"{config.model} is a {(index or {}).get('_class_name')}; only {known} are supported")
    if config.model in bundled:
        for file, digest in read_json(bundled[config.model] / "card.json")["weights_sha256"].items():
            check_bundled(bundled[config.model] / file, digest)
    missing = [p for p in family.parts if isinstance(source, Path) and not (source / p).is_dir()]
    if missing:
        lacking = ", ".join(f"{p}/" for p in missing)
        raise UserError(f"{config.model} lacks {lacking}; a directory of {family.title} has {', '.join(family.parts)}")
    parts, halves = _load_parts(source, config, family.parts)
    model = family.built(parts, config, name=name, weights=weights, device=device)
    model.halves = tuple(halves)
    return model


def _locate(model: str, bundled: dict[str, Path]) -> tuple[Path | str, str, str]:
    """(source for from_pretrained, name, origin of the weights)."""
    if model in bundled:
        return bundled[model], model, "bundled"
    path = Path(model).expanduser()
    if path.is_dir():
        return path, path.name, "local directory"
    if path.exists():
        raise UserError(f"base.model={model} is a file; give a directory in diffusers layout")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"base.model={model} is no directory; {nearest(model, bundled, 'bundled models')}, or give a hub id such "
            "as CompVis/stable-diffusion-v1-4"
        )
    return model, model, f"hub: {model}"


def _index(source: Path | str, config: BaseConfig) -> dict[str, Any] | None:
    """What `model_index.json` says, before anything large is loaded; None where the hub has none to give.

    Parts of a hub's model may be in the cache without it; they then speak for themselves.
    """
    if isinstance(source, str):
        try:
            file = Path(cached_file(source, INDEX, revision=config.revision, local_files_only=offline()) or "")
        except Exception:  # each of the libraries raises kinds of its own; the parts' errors say what is wrong
            return None
    else:
        file = source / INDEX
    if not file.is_file():
        raise UserError(f"{config.model} holds no {INDEX}; give a directory in diffusers layout (save_pretrained)")
    try:
        index = read_json(file)
    except ValueError:
        index = None
    if not isinstance(index, dict):
        raise UserError(f"{file} is not valid JSON; save or download the model again")
    return index


def _load_parts(source: Path | str, config: BaseConfig, classes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The parts of a model in diffusers layout, networks in `config.weights_dtype`; UserError names one that lacks.

    Parts of which there is a file variant `fp16` alone are read from that, unless `config.variant` asks for another;
    they are named.
    """
    common: dict[str, Any] = {}
    if isinstance(source, str):
        common = {"revision": config.revision, "local_files_only": offline()}
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    parts: dict[str, Any] = {}
    halves = []
    for part, cls in classes.items():
        extra: dict[str, Any] = {}
        if issubclass(cls, nn.Module):
            # the name of the argument changed between versions of the libraries, converting afterwards works in all
            extra = {"use_safetensors": True, "variant": config.variant, "output_loading_info": True}
        try:
            with no_pickles(f"base.model={config.model}"):
                try:
                    loaded = cls.from_pretrained(source, subfolder=part, **common, **extra)
                except (OSError, ValueError) as error:
                    if not (extra and config.variant is None and NO_FILE.search(str(error))):
                        raise
                    try:
                        loaded = cls.from_pretrained(source, subfolder=part, **common, **{**extra, "variant": HALF})
                    except (OSError, ValueError):
                        raise error from None
                    halves.append(part)
        except UserError:
            raise
        except Exception as error:  # each of the libraries raises kinds of its own
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if extra and NO_FILE.search(first) and (pickle := _pickle(source, part)):
                raise UserError(
                    f"cannot load {part} of the model {config.model}: {pickle} is a pickle file, which is never "
                    f"loaded; {CONVERT}, with NEW a .safetensors of the same name"
                ) from None
            raise _unusable(part, config.model, source, first if len(first) <= 200 else f"{first[:200]}...") from None
        # where its files are missing, the library makes up a tokenizer of a few tokens
        if part.startswith("tokenizer") and len(loaded) < 256:
            raise _unusable(part, config.model, source, "it has no vocabulary")
        # such weights would be random ones, and nobody told
        if lacking := sorted(loaded[1]["missing_keys"]) if extra else []:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise _unusable(part, config.model, source, f"its file lacks {lacking[0]}{more}")
        parts[part] = loaded[0] if extra else loaded
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            finite(part.state_dict(), f"{name} of the model {config.model}")
            part.to(DTYPES[config.weights_dtype])
            if not all(bool(torch.isfinite(t).all()) for t in part.state_dict().values()):
                raise UserError(
                    f"{name} of the model {config.model} has weights too large for base.weights_dtype="
                    f"{config.weights_dtype}; set bf16 or fp32"
                )
    return parts, halves


def _pickle(source: Path | str, part: str) -> str | None:
    """The part's weights as a pickle file in a directory, if there are any."""
    found = sorted((source / part).glob("*.bin")) if isinstance(source, Path) else []
    return f"{part}/{found[0].name}" if found else None


def _unusable(part: str, model: str, source: Path | str, reason: str) -> UserError:
    """What is wrong with a part of a model, and the mend."""
    mend = "save or download the model again"
    if isinstance(source, str):
        unset = ", or unset HF_HUB_OFFLINE and DUALCL_OFFLINE" if offline() else ""
        mend = f"check the id (a model of .bin files alone is never loaded), give base.model a local directory{unset}"
    return UserError(f"cannot load {part} of the model {model}: {reason.rstrip('.')}; {mend}")
