"""Regionally controllable sampling (Mix-of-Show §3.4): inside a region, cross-attention reads that region's prompt.

For cells covered by regions i to the shares c_i, with weights w_i,

    h = (1 − a) · Attention(Q, K, V) + a · Σ w_i c_i Attention(Q_i, K_i, V_i) / Σ w_i c_i,    a = max c_i

with the global prompt's K and V first, and Q_i the queries of region i's cells only. Of regions in different depths
those in front take their part of a cell first, and c_i is of what they leave. All shares of a cell sum to 1 and the
output projection is affine, so it is called once, on h. Keys and values of all texts are computed once per picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F

from mixofshow.bases.layers import cross_attentions, text_groups
from mixofshow.bases.parts import plain
from mixofshow.concepts.changes import Change
from mixofshow.errors import BaseModelError
from mixofshow.sampling.regions import (
    Cells,
    Grid,
    Shape,
    area_coverage,
    bounding_cells,
    coverages,
    levels,
)

_WITHOUT: Final = (
    *("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross"),
    *("add_k_proj", "add_v_proj", "add_q_proj"),
    *("residual_connection", "fused_projections", "is_causal"),
)
"""Parts of diffusers' attention that the models we know leave empty, and that are not done here."""
INSIDE: Final = 0.5
"""A cell that is covered to this share belongs to a region, where it must be yes or no."""


@dataclass(frozen=True)
class RegionText:
    """A region's place and its text, (sides, layers, tokens, dim): with guidance, the negative one comes first.

    It counts by its weight, from `first_step` to `last_step` (from 1, both included), in front of those whose `front` is
    smaller. `words` are the places of its concepts' words among its tokens, and `changes` what these concepts change of the
    UNet's layers there.
    """

    shape: Shape
    text: Tensor
    weight: float = 1.0
    front: int = 0
    first_step: int = 1
    last_step: int | None = None
    words: tuple[int, ...] = ()
    changes: Mapping[str, Sequence[Change]] = field(default_factory=dict)

    def holds(self, step: int) -> bool:
        """Whether the region is there in a step."""
        return self.first_step <= step <= (self.last_step or step)


@dataclass(frozen=True)
class Piece:
    """What a text has of a feature map: a rectangle of cells, and its share in each of them, (rows, columns, 1)."""

    text: int
    area: Cells
    share: Tensor


RegionSchedule = Mapping[int, tuple[Grid, list[Piece]]]
"""For each feature map by its number of cells: its (columns, rows), and what each text has of it."""


class RegionalAttention:
    """What the UNet's attention reads at present, of a picture whose latents are `columns` × `rows`.

    `isolated` are those of the grids on which self-attention is kept apart.
    """

    def __init__(
        self,
        regions: Sequence[RegionText],
        grids: Sequence[Grid],
        isolated: Sequence[Grid] = (),
        *,
        like: Tensor,
        isolate: int,
        tiny: str,
    ) -> None:
        self.regions, self.grids, self.like, self.isolate = regions, grids, like, isolate
        self.isolated = isolated
        self.covers = [coverages(region.shape, grids, tiny=tiny) for region in regions]
        self.layers: list[CrossAttention] = []
        self._plan_of, self._mask_of, self._share_of = cache(self._planned), cache(self._apart), cache(self._shared)
        self.at(1)

    def forget(self) -> None:
        """Let go of keys, values and masks, which would else stay until Python looks for what refers to itself."""
        self.layers.clear()
        del self._plan_of, self._mask_of, self._share_of

    def at(self, step: int) -> None:
        """Take the regions that are there in this step, counted from 1."""
        self._there = tuple(number for number, region in enumerate(self.regions) if region.holds(step))
        self.plan: RegionSchedule = self._plan_of(self._there)
        isolated = step <= self.isolate and len(self._there) > 1
        self.apart: Mapping[int, Tensor] = self._mask_of(self._there) if isolated else {}

    def reads_any(self, texts: Collection[int]) -> bool:
        """Whether one of these texts, of which the global one is 0, is there at present."""
        return any(number + 1 in texts for number in self._there)

    def _stacked(self, there: Sequence[int], grid: Grid) -> Tensor:
        """The coverages of the global prompt (none) and the regions: (texts, rows, columns)."""
        level = self.grids.index(grid)
        return torch.stack([torch.zeros(grid[1], grid[0]), *(self.covers[number][level] for number in there)])

    def share(self, cells: int) -> Tensor:
        """Each text's share at present of the cells of a feature map by area, (texts, rows, columns); the global one first.

        Finer than what cross-attention reads, which takes whole cells of boxes.
        """
        return self._share_of(self._there, cells)

    def _shared(self, there: tuple[int, ...], cells: int) -> Tensor:
        columns, rows = next(one for one in self.grids if one[0] * one[1] == cells)  # of 1 × 1 there may be two
        covers = torch.zeros(1 + len(self.regions), rows, columns)
        for number in there:
            covers[number + 1] = area_coverage(self.regions[number].shape, columns=columns, rows=rows)
        return shares(covers, self.regions, together=True).to(self.like)

    def _planned(self, there: tuple[int, ...]) -> RegionSchedule:
        texts, found = (0, *(number + 1 for number in there)), {}
        for columns, rows in self.grids:
            pieces = []
            parts = shares(self._stacked(there, (columns, rows)), [self.regions[number] for number in there])
            for text, share in zip(texts, parts, strict=True):
                left, top, right, bottom = area = bounding_cells(share)
                if share.any():
                    pieces.append(Piece(text, area, share[top:bottom, left:right, None].to(self.like)))
            found[columns * rows] = (columns, rows), pieces
        return found

    def _apart(self, there: tuple[int, ...]) -> Mapping[int, Tensor]:
        """For each feature map: may a cell (first) read another (second)? Not when it lies in other regions only."""
        found, fronts = {}, [self.regions[number].front for number in there]
        for grid in self.isolated:
            # Few numbers go to the device, and become many there.
            inside = (visible(self._stacked(there, grid)[1:], fronts).flatten(1) >= INSIDE).to(self.like.device)
            alone = ~inside.any(0)
            mask = alone | alone[:, None]
            for region in inside:
                mask |= region & region[:, None]
            found[grid[0] * grid[1]] = mask
        return found


def shares(covers: Tensor, regions: Sequence[RegionText], *, together: bool = False) -> Tensor:
    """Each text's share in each cell, (texts, rows, columns), from coverages; the first gets what the regions leave.

    Regions of one depth take as much of a cell as the largest of them covers, or `together` their sum, since those that
    meet inside a cell cover it together.
    """
    found, left = torch.zeros_like(covers), torch.ones_like(covers[0])
    for here in _depths([one.front for one in regions]):
        weighted = torch.stack([regions[number].weight * covers[number + 1] for number in here])
        covered = torch.stack([covers[number + 1] for number in here])
        total, taken = weighted.sum(0), covered.sum(0).clamp(max=1) if together else covered.amax(0)
        found[[number + 1 for number in here]] = torch.where(
            total > 0, left * taken * weighted / torch.where(total > 0, total, 1), 0
        )
        left = left * (1 - taken)
    found[0] = left
    return found


def visible(covers: Tensor, fronts: Sequence[int]) -> Tensor:
    """What those in front leave of coverages, (regions, rows, columns) to the same."""
    found, left = covers.clone(), torch.ones_like(covers[0])
    for here in _depths(fronts):
        found[here] *= left
        left = left * (1 - covers[here].amax(0))
    return found


def _depths(fronts: Sequence[int]) -> list[list[int]]:
    """The numbers of what lies in each depth, those in front first."""
    found: dict[int, list[int]] = {}
    for number, front in enumerate(fronts):
        found.setdefault(front, []).append(number)
    return [found[front] for front in sorted(found, reverse=True)]


@dataclass(frozen=True)
class Text:
    """A text as a layer reads it, (rows, tokens, dim), and what a concept changes of the layer's keys and values."""

    states: Tensor
    keys: Sequence[Change] = ()
    values: Sequence[Change] = ()


class CrossAttention:
    """Processor of a cross-attention layer: one query for the picture, then each text where it has a share."""

    def __init__(self, attn: Any, texts: Sequence[Text], regional: RegionalAttention, batch: int) -> None:
        self.regional = regional
        self.texts = [_keys_values(attn, text, batch, regional.like) for text in texts]
        self.queries: list[Tensor] | None = None
        """Put a list here to be given the queries, (batch, rows, columns, heads · dim)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(batch, cells, dim) to the same. The text is known already, whatever is handed over."""
        (columns, rows), pieces = self.regional.plan[hidden_states.shape[1]]
        query = attn.to_q(hidden_states)
        if self.queries is not None:
            self.queries.append(query.unflatten(1, (rows, columns)))
        if len(pieces) == 1:  # it has all of every cell
            mixed = _attend(query, *self.texts[pieces[0].text], attn.scale)
        else:
            mixed = self._mixed(query.unflatten(1, (rows, columns)), pieces, attn.scale)
        return attn.to_out[1](attn.to_out[0](mixed))

    def _mixed(self, query: Tensor, pieces: Sequence[Piece], scale: float) -> Tensor:
        """(batch, rows, columns, heads · dim) -> (batch, cells, heads · dim)."""
        mixed = torch.zeros_like(query)
        for piece in pieces:
            left, top, right, bottom = piece.area
            inside = query[:, top:bottom, left:right].flatten(1, 2)
            attended = _attend(inside, *self.texts[piece.text], scale)
            mixed[:, top:bottom, left:right].addcmul_(piece.share, attended.unflatten(1, (bottom - top, right - left)))
        return mixed.flatten(1, 2)


class IsolatedSelfAttention:
    """Processor of a self-attention layer in which regions do not read each other."""

    def __init__(self, regional: RegionalAttention) -> None:
        self.regional = regional

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(batch, cells, dim) to the same."""
        key, value = (_in_heads(project(hidden_states), attn.heads) for project in (attn.to_k, attn.to_v))
        apart = self.regional.apart.get(hidden_states.shape[1])
        attended = _attend(attn.to_q(hidden_states), key, value, attn.scale, apart)
        return attn.to_out[1](attn.to_out[0](attended))


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ · scale) V: (batch, cells, heads · dim), keys and values in heads -> (batch, cells, heads · dim)."""
    query = _in_heads(query, key.shape[1])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


def _in_heads(states: Tensor, heads: int) -> Tensor:
    return states.unflatten(2, (heads, -1)).transpose(1, 2)


def _keys_values(attn: Any, text: Text, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, tokens, dim) -> keys and values, (batch, heads, tokens, dim): equal parts of the batch share a row."""
    device = attn.to_k.weight.device
    states = text.states.to(device if device.type != "meta" else like.device, like.dtype)

    def projected(project: nn.Module, changes: Sequence[Change]) -> Tensor:
        made = project(states)
        for change in changes:
            made = made + F.linear(states, change.matrix().to(states))
        made = _in_heads(made, attn.heads)
        return repeat(made, "rows ... -> (rows same) ...", same=batch // len(made)).to(like.device)

    return projected(attn.to_k, text.keys), projected(attn.to_v, text.values)


@contextlib.contextmanager
def regional(
    unet: Any,
    text: Tensor,
    regions: Sequence[RegionText],
    *,
    batch: int,
    columns: int,
    rows: int,
    isolate: int = 0,
    tiny: str = "nearest",
) -> Iterator[RegionalAttention]:
    """Inside, the UNet reads `text`, (texts, layers, tokens, dim), and in the regions theirs, for a batch of latents.

    The latents are `columns` × `rows`. Regions do not read each other's cells in the first `isolate` steps. `tiny` is
    that of `coverages`. Raises BaseModelError for attention of a kind that is not known here.
    """
    cross, groups = cross_attentions(unet), text_groups(unet)
    replaced: dict[str, Any] = dict(cross)
    if isolate and regions:
        replaced |= {name: plain(unet).get_submodule(name) for name in (f"{one.removesuffix('2')}1" for one in cross)}
    for name, module in replaced.items():
        _require_known(name, module)
    like = torch.empty(0, device=text.device, dtype=unet.dtype)
    grids = levels(columns, rows, depth := len(unet.config.block_out_channels))
    isolated = [grids[number] for number in sorted({_level_of(name, depth) for name in replaced if name not in cross})]
    handle = RegionalAttention(regions, grids, isolated, like=like, isolate=isolate, tiny=tiny)
    before = {name: module.processor for name, module in replaced.items()}
    try:
        for name, module in replaced.items():
            if name in cross:
                texts = [Text(text[:, groups[name]]), *(_text_of(region, name, groups[name]) for region in regions)]
                module.processor = CrossAttention(module, texts, handle, batch)
                handle.layers.append(module.processor)
            else:
                module.processor = IsolatedSelfAttention(handle)
        yield handle
    finally:
        for name, module in replaced.items():
            module.processor = before[name]
        handle.forget()


def _level_of(name: str, depth: int) -> int:
    """On which of the UNet's levels, the finest 0, a layer is."""
    block, number, *_ = name.split(".")
    if block == "down_blocks":
        return int(number)
    return depth - 1 - int(number) if block == "up_blocks" else depth - 1


def _text_of(region: RegionText, name: str, group: int) -> Text:
    keys, values = (region.changes.get(f"unet.{name}.{part}", ()) for part in ("to_k", "to_v"))
    return Text(region.text[:, group], keys, values)


def _require_known(name: str, attn: Any) -> None:
    found = [part for part in _WITHOUT if getattr(attn, part, None)]
    if attn.rescale_output_factor != 1:
        found.append("rescale_output_factor")
    if isinstance(attn.processor, nn.Module):
        found.append(type(attn.processor).__name__)
    if found:
        raise BaseModelError(f"{name}: attention with {', '.join(found)} cannot be used with regions")
