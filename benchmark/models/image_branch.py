"""IP-Adapter's decoupled attention: beside a prompt's keys and values a few of a picture's, with weights of their own.

    out = Attn(Q, K, V) + s Attn(Q, c W'_k, c W'_v),   c (n, D) = LayerNorm(Linear(h))

h: what an encoder makes of a picture (arXiv 2308.06721). Without one, as in the unconditional half of guidance, h is 0.
The layers are diffusers' own, so that an export loads there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection

from dualcl.benchmark.models.tokens import expand


def cross_attentions(network: nn.Module) -> list[Attention]:
    """The layers of a U-Net that read the prompt, in the order of its modules."""
    found = [m for n, m in network.named_modules() if n.endswith("attn2") and isinstance(m, Attention)]
    return [m for m in found if m.is_cross_attention]


class ImageBranch(nn.Module):
    """Tokens of pictures, and the keys and values that each cross-attention makes of them."""

    def __init__(self, embedding: int, width: int, n_tokens: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.n_tokens, self.width, self.embedding = n_tokens, width, embedding
        self.projection: Any = ImageProjection(embedding, width, n_tokens)
        self.layers = nn.ModuleList(IPAdapterAttnProcessor2_0(size, width, (n_tokens,), 1.0) for size in layers)

    @property
    def sizes(self) -> list[int]:
        """Width of every layer's keys."""
        return [len(keys) for keys, _ in self.weights()]

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """W'_k and W'_v of every layer."""
        return [(layer.to_k_ip[0].weight, layer.to_v_ip[0].weight) for layer in self._layers()]

    def _layers(self) -> list[Any]:
        return list(self.layers)

    def ip_adapter(self) -> dict[str, Tensor]:
        """The weights under their names in an IP-Adapter's file; its tokens are 4."""
        tensors = {f"image_proj.proj.{k}": t for k, t in self.projection.image_embeds.state_dict().items()}
        tensors |= {f"image_proj.norm.{k}": t for k, t in self.projection.norm.state_dict().items()}
        for i, (keys, values) in enumerate(self.weights()):
            # numbered as the attentions of a U-Net, a self-attention before each
            n = 2 * i + 1
            tensors |= {f"ip_adapter.{n}.to_k_ip.weight": keys, f"ip_adapter.{n}.to_v_ip.weight": values}
        return {k: t.detach().cpu() for k, t in tensors.items()}

    @classmethod
    def of_ip_adapter(cls, tensors: Mapping[str, Tensor]) -> ImageBranch:
        """What `ip_adapter` gave; KeyError or RuntimeError where something is missing or does not fit."""
        order = [f"ip_adapter.{2 * i + 1}" for i in range(sum(k.endswith(".to_k_ip.weight") for k in tensors))]
        (size, embedding), width = tensors["image_proj.proj.weight"].shape, len(tensors["image_proj.norm.weight"])
        branch = cls(embedding, width, size // width, [len(tensors[f"{name}.to_k_ip.weight"]) for name in order])
        parts = {"proj": branch.projection.image_embeds, "norm": branch.projection.norm}
        for name, part in parts.items():
            part.load_state_dict({k: tensors[f"image_proj.{name}.{k}"] for k in ("weight", "bias")})
        with torch.no_grad():
            for name, (keys, values) in zip(order, branch.weights(), strict=True):
                keys.copy_(tensors[f"{name}.to_k_ip.weight"])
                values.copy_(tensors[f"{name}.to_v_ip.weight"])
        return branch.requires_grad_(False)

    @torch.no_grad()
    def fit(self, network: nn.Module) -> None:
        """W'_k and W'_v as the network's W_k and W_v."""
        for attention, (keys, values) in zip(cross_attentions(network), self.weights(), strict=True):
            keys.copy_(attention.to_k.weight)
            values.copy_(attention.to_v.weight)

    def tokens(self, embeddings: Tensor) -> Tensor:
        """c (N, n, D) of embeddings (N, E)."""
        found: Tensor = self.projection(embeddings)
        return found

    def none(self) -> Tensor:
        """c (n, D) without a picture."""
        return self.tokens(self.projection.image_embeds.weight.new_zeros(1, self.embedding))[0]

    @contextlib.contextmanager
    def on(self, network: nn.Module, scale: float) -> Iterator[None]:
        """Within it the network's cross-attentions read a pair, text (B, L, D) and a list of c (B, n, D)."""
        attentions = cross_attentions(network)
        before = [attention.processor for attention in attentions]
        try:
            for attention, layer in zip(attentions, self._layers(), strict=True):
                layer.scale = [scale]
                attention.set_processor(layer)
            yield
        finally:
            for attention, processor in zip(attentions, before, strict=True):
                attention.set_processor(processor)


class ImagePrompts:
    """Which picture tokens a prompt brings: those of the concepts it names, their mean if these are several."""

    def __init__(self, branch: ImageBranch, scale: float, tokenizer: Any, words: Callable[[], list[list[str]]]) -> None:
        self.branch, self.scale, self.tokenizer, self.words = branch, scale, tokenizer, words
        #: h (E,) by concept
        self.embeddings: dict[int, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """c (P, n, D) of prompts with expanded tokens; of those that name no concept what `ImageBranch.none` gives."""
        words, none, rows = self.words(), self.branch.none(), []
        for prompt in prompts:
            own = [self.embeddings[i] for i in expand(self.tokenizer, prompt, words)[1] if i in self.embeddings]
            rows.append(self.branch.tokens(torch.stack(own).to(none)).mean(0) if own else none)
        return torch.stack(rows)

    def on(self, network: nn.Module) -> contextlib.AbstractContextManager[None]:
        """`ImageBranch.on`."""
        return self.branch.on(network, self.scale)
