"""Regionally controllable sampling (Mix-of-Show §3.4): inside a region, cross-attention reads that region's prompt.

Cross-attention is independent for each image token, so the model's own processor can simply be called again on
the tokens of a region with the region's text; no attention is written anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mixofshow.bases.layers import cross_attentions
from mixofshow.sampling.regions import Box, cells, feature_grid, is_empty


@dataclass(frozen=True)
class RegionText:
    """A region's box in shares of the picture, and its text for every row of the batch, (batch, layers, tokens, dim)."""

    box: Box
    text: Tensor


class _RegionalProcessor:
    """Calls the wrapped processor for the whole picture and once more for each region, and averages overlaps."""

    def __init__(self, inner: Any, regions: Sequence[RegionText], index: int, columns: int, rows: int) -> None:
        self.inner = inner
        self.regions = [(region.box, region.text[:, index]) for region in regions]
        self.columns, self.rows = columns, rows

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        outside = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        columns, rows = feature_grid(hidden_states.shape[1], columns=self.columns, rows=self.rows)
        picture = rearrange(hidden_states, "batch (rows columns) dim -> batch rows columns dim", rows=rows)
        total = outside.new_zeros(outside.shape[0], rows, columns, outside.shape[2])
        count = outside.new_zeros(1, rows, columns, 1)
        for box, text in self.regions:
            area = cells(box, columns=columns, rows=rows)
            if is_empty(area):
                continue
            left, top, right, bottom = area
            inside = picture[:, top:bottom, left:right]
            made = self.inner(
                attn, rearrange(inside, "batch rows columns dim -> batch (rows columns) dim"), text, **kwargs
            )
            total[:, top:bottom, left:right] += rearrange(
                made, "batch (rows columns) dim -> batch rows columns dim", rows=bottom - top
            )
            count[:, top:bottom, left:right] += 1
        whole = rearrange(outside, "batch (rows columns) dim -> batch rows columns dim", rows=rows)
        blended = torch.where(count > 0, total / count.clamp(min=1), whole)
        return rearrange(blended, "batch rows columns dim -> batch (rows columns) dim")


@contextlib.contextmanager
def regional(unet: Any, regions: Sequence[RegionText], *, columns: int, rows: int) -> Iterator[None]:
    """Inside, the UNet's cross-attention follows the regions; `columns` × `rows` is the size of the latents."""
    if not regions:
        yield
        return
    layers = cross_attentions(unet)
    own = {name: module.processor for name, module in layers.items()}
    try:
        for index, (name, module) in enumerate(layers.items()):
            module.processor = _RegionalProcessor(own[name], regions, index, columns, rows)  # type: ignore[assignment]
        yield
    finally:
        for name, module in layers.items():
            module.processor = own[name]
