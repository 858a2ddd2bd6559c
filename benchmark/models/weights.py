"""Weights as files: safetensors, hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split

from dualcl.benchmark.core.errors import UserError

CONVERT = 'convert it where you trust it: safetensors.torch.save_file(torch.load(OLD, weights_only=True), "NEW")'


def state_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\t{tensor.dtype}\t{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def finite(state: Mapping[str, Tensor], name: str) -> None:
    """UserError that names the first tensor of `name` that holds a NaN or an infinity."""
    for key, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name}: its weight {key} holds NaN or infinity; save or download it again")


def offline() -> bool:
    """Whether the hub must not be asked."""
    return any(
        os.environ.get(k, "").lower() in ("1", "true", "yes", "on") for k in ("HF_HUB_OFFLINE", "DUALCL_OFFLINE")
    )


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


def read_metadata(file: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file that could be read."""
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


@contextlib.contextmanager
def no_pickles(what: str) -> Iterator[None]:
    """Within it a library that would unpickle weights, in whichever way it came to it, gets a UserError of `what`.

    safetensors are asked for everywhere; this is for what the libraries fall back to where there are none.
    """

    def refuse(file: Any, *args: Any, **kwargs: Any) -> None:
        raise UserError(f"{what}: {file} is a pickle file, which is never loaded; {CONVERT}")

    load = torch.load
    torch.load = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = load
