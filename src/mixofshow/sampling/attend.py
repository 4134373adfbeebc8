"""Attention-guided correction, after Attend-and-Excite (Chefer et al. 2023): no region's subject goes missing.

Before each of the first steps the latents are moved so that, in every region that names concepts, some cell reads the
concepts' words more:

    loss = Σ_regions (1 − max over the region's cells of the mean attention to its concepts' words)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from mixofshow.bases.memory import LARGE, recomputing
from mixofshow.sampling.attention import INSIDE, CrossAttention, RegionalAttention
from mixofshow.sampling.denoising import LatentCallback, StepContext

SHARE: Final = 0.4
"""The part of all steps in which latents are moved; the layout is settled by then."""
USUAL_CELLS: Final = 256
"""Attention is judged on the feature map of about as many cells, where it follows whole things (as in the paper)."""


def attend_and_excite(rate: float) -> LatentCallback:
    """Moves latents, in the first SHARE of the steps, by `rate` times their own size where the loss is at its most."""

    def correct(context: StepContext, latents: Tensor) -> Tensor:
        if context.step > SHARE * context.steps:
            return latents
        handle, large = context.predict.attention, latents.shape[-2] * latents.shape[-1] >= LARGE**2
        with torch.enable_grad(), queries_of(handle.layers) as queries, recomputing(context.predict.unet, on=large):
            moving = latents.detach().requires_grad_()
            context.predict(context.batched(moving, context.timestep), context.timestep, context.step, {})
            loss = missing(handle, queries, context.step, pictures=len(latents))
            if loss is None:
                return latents
            (slope,) = torch.autograd.grad(loss.sum(), moving)
        sizes = [one.flatten(1).norm(dim=1)[:, None, None, None] for one in (latents, slope)]
        return latents - rate * loss.detach()[:, None, None, None] * slope * sizes[0] / sizes[1].clamp(min=torch.finfo(slope.dtype).tiny)

    return correct


@contextlib.contextmanager
def queries_of(layers: Sequence[CrossAttention]) -> Iterator[list[list[Tensor]]]:
    """Inside, each layer's queries are kept in a list of its own."""
    kept: list[list[Tensor]] = [[] for _ in layers]
    for layer, queries in zip(layers, kept, strict=True):
        layer.queries = queries
    try:
        yield kept
    finally:
        for layer in layers:
            layer.queries = None


def missing(
    handle: RegionalAttention, queries: Sequence[Sequence[Tensor]], step: int, *, pictures: int
) -> Tensor | None:
    """The loss of each picture, 0 to 1, the mean over regions: (pictures,). None where no region names a concept."""
    grid = min(handle.grids, key=lambda one: abs(math.log(one[0] * one[1] / USUAL_CELLS)))
    judged = [(layer, seen[0][-pictures:]) for layer, seen in zip(handle.layers, queries, strict=True)]
    judged = [(layer, query) for layer, query in judged if query.shape[1:3] == grid[::-1]]
    losses = []
    for number, region in enumerate(handle.regions):
        inside = handle.covers[number][handle.grids.index(grid)] >= INSIDE
        if region.holds(step) and region.words and judged and inside.any():
            maps = [
                _attention(query[:, inside.to(query.device)], layer.texts[number + 1][0][-pictures:], region.words)
                for layer, query in judged
            ]
            losses.append(1 - torch.stack(maps).mean(0).amax(1))
    return torch.stack(losses).mean(0) if losses else None


def _attention(query: Tensor, key: Tensor, words: Sequence[int]) -> Tensor:
    """Mean attention over heads and words: (pictures, cells, heads · dim), (pictures, heads, tokens, dim) -> (…, cells)."""
    query = query.unflatten(2, (key.shape[1], -1)).transpose(1, 2)
    weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
    return weights[..., list(words)].mean((1, 3))
