"""Looking at cross-attention while a concept is tuned: where in the picture its words are read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from einops import rearrange
from torch import Tensor

from mixofshow.bases.layers import cross_attentions

Maps = list[Tensor]
"""Attention of each cross-attention layer, (batch · heads, pixels, tokens)."""


@contextlib.contextmanager
def recorded_attention(unet: Any) -> Iterator[Maps]:
    """Inside, every training pass of the UNet appends the attention of its cross-attention layers to the yielded list.

    The backward pass must be inside too: it may compute activations again.
    """
    maps: Maps = []

    def recording(scores: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def get_attention_scores(*arguments: Any) -> Tensor:
            attention = scores(*arguments)
            if torch.is_grad_enabled():
                maps.append(attention)
            return attention

        return get_attention_scores

    layers = list(cross_attentions(unet).values())
    own: list[Any] = [layer.processor for layer in layers]
    try:
        for layer in layers:
            # The fused kernels never hold the attention itself; this processor of diffusers does.
            layer.processor = AttnProcessor()
            layer.get_attention_scores = recording(layer.get_attention_scores)  # type: ignore[arg-type, assignment]
        yield maps
    finally:
        for layer, processor in zip(layers, own, strict=True):
            layer.processor = processor
            vars(layer).pop("get_attention_scores", None)


def words_attention(maps: Maps, positions: Tensor) -> dict[int, Tensor]:
    """By number of pixels, attention averaged over heads and layers at the words' places, (batch, pixels, words).

    positions: (batch, words), where the concept's words stand in each prompt.
    """
    batch, groups = len(positions), dict[int, Maps]()
    for attention in maps:
        heads = rearrange(attention, "(batch heads) pixels tokens -> batch heads pixels tokens", batch=batch)
        groups.setdefault(heads.shape[2], []).append(heads)
    found = {}
    for pixels, of_layers in groups.items():
        mean = torch.cat(of_layers, dim=1).mean(1)
        found[pixels] = torch.gather(mean, 2, positions[:, None, :].expand(-1, pixels, -1))
    return found
