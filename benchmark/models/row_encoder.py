"""An encoder that reads a picture and gives rows of the token table, and tokens for a branch of the attentions.

Trained once, for one text-to-image model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.bundled import bundled_encoders, check_bundled
from dualcl.benchmark.models.image_branch import ImageBranch, cross_attentions

#: in place of weights: random ones, for tests
UNTRAINED = "untrained"
CARD, WEIGHTS = "card.json", "model.safetensors"
HIDDEN = 192


class RowEncoder(nn.Module):
    """Convolutions, and an MLP for `n_tokens` rows of width D; as drawn it gives the table's mean row and a little.

    `images`: tokens of the branch that reads pictures beside the text, `layers` its sizes; 0: there is none.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, width: int, n_tokens: int, images: int = 0, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.width, self.n_tokens = width, n_tokens
        #: of trained ones what their card says
        self.card: dict[str, Any] = {}

        def stage(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.GELU())

        self.body = nn.Sequential(stage(3, 32), stage(32, 64), stage(64, 96), nn.AdaptiveAvgPool2d(3))
        self.hidden = nn.Linear(96 * 9, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, n_tokens * width)
        self.branch = ImageBranch(HIDDEN, width, images, layers) if images else None
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def fit_table(self, table: Tensor) -> None:
        """Takes mean and deviation of a token table (n, D)."""
        self.centre.copy_(table.float().mean(0))
        self.scale.copy_(table.float().std(0))

    def forward(self, pixels: Tensor) -> Tensor:
        """h (B, E) of pictures (B, 3, S, S) in [-1, 1]."""
        return F.leaky_relu(self.norm(self.hidden(self.body(pixels).flatten(1))))

    def rows(self, embeddings: Tensor) -> Tensor:
        """Rows (B, n_tokens, D) of h (B, E); of a mean of h the mean of the rows."""
        return self.centre + self.scale * self.head(embeddings).unflatten(1, (self.n_tokens, self.width))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """h (N, E) of uint8 pictures (N, S, S, 3), each by itself."""
        inputs = images.to(self.centre.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.cat([self(one[None]) for one in inputs])


def fresh_encoder(
    table: Tensor, n_tokens: int, generator: torch.Generator, network: nn.Module | None = None, images: int = 4
) -> RowEncoder:
    """One that is not trained, for a token table (n, D); with a branch for the network's cross-attentions, if given."""
    layers = [] if network is None else [a.to_k.out_features for a in cross_attentions(network)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        encoder = RowEncoder(table.shape[1], n_tokens, images if layers else 0, layers)
    encoder.fit_table(table)
    if encoder.branch is not None and network is not None:
        encoder.branch.fit(network)
    return encoder.to(table.device).requires_grad_(False).eval()


def load_row_encoder(given: str) -> RowEncoder:
    """The bundled encoder of that name, or that of a folder, in float32; UserError when it is not there or damaged."""
    folder = bundled_encoders().get(given, Path(given).expanduser())
    if not (folder / CARD).is_file():
        raise UserError(
            f"method.encoder={given} is no bundled encoder and no folder of one; make it with dualcl pretrain "
            "portraits-encoder --out DIR, and set method.encoder=DIR/portraits_encoder"
        )
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        check_bundled(folder / WEIGHTS, card["sha256"])
        encoder = RowEncoder(card["width"], card["n_tokens"], card["image_tokens"], card["layers"])
        base, sha256, seen = card["base"], card["base_sha256"], card["pictures"]
        if not (isinstance(base, str) and isinstance(sha256, str) and isinstance(seen, int)):
            raise TypeError("its card is damaged")
        encoder.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} is no encoder as dualcl pretrain writes it ({error}); make it again") from None
    encoder.card = card
    return encoder.requires_grad_(False).eval()
