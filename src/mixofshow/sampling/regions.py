"""Regions: where on the picture a prompt holds, in pixels and in attention cells. All of the geometry is here."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from mixofshow.errors import BadInputError, RegionError
from mixofshow.sampling.pictures import read_picture
from mixofshow.sampling.settings import Box, Region, point

logger = logging.getLogger(__name__)

MAX_POINTS: Final = 1000
WHOLE: Final[Box] = (0.0, 0.0, 1.0, 1.0)
_SMALLEST_AREA: Final = 1e-9
"""Below this share of the picture a polygon is a line."""
_ROUNDING: Final = 1e-9
"""Of a cell: an edge between two cells, as a share of the picture, may come out beside itself by so much."""

Cells = tuple[int, int, int, int]
"""(left, top, right, bottom) in whole cells of a feature map; right and bottom are not included."""
Grid = tuple[int, int]
"""(columns, rows) of a feature map."""


@dataclass(frozen=True)
class Shape:
    """Where a region lies, checked: a polygon's corners (corners, 2), or a mask (rows, columns) of 0 to 1, or a box.

    Box, corners and `feather` (across, down) are in shares of the picture; `title` is for messages.
    """

    box: Box | None = None
    polygon: Tensor | None = None
    mask: Tensor | None = None
    feather: tuple[float, float] = (0.0, 0.0)
    title: str = "region"


def shape_of(region: Region, *, width: int, height: int) -> Shape:
    """The region's place on a picture of this size, in shares of it. Raises RegionError naming it and the numbers."""
    if region.auto:
        raise RegionError(f"{region.title}: its place is found while a picture is drawn, and is not known before")
    fading = region.feather * min(width, height) if region.in_shares(region.feather) else region.feather
    feather = (fading / width, fading / height)
    if region.box is not None:
        return Shape(box=as_shares(region, width=width, height=height), feather=feather, title=region.title)
    if region.polygon is not None:
        return Shape(polygon=_corners(region, width, height), feather=feather, title=region.title)
    return Shape(mask=_mask(region), feather=feather, title=region.title)


def rescaled(region: Region, before: tuple[int, int], after: tuple[int, int]) -> Region:
    """The region as it lies on a picture that was enlarged or reduced from (width, height) to another size."""
    if before == after:
        return region
    x, y = (new / old for new, old in zip(after, before, strict=True))
    moved: dict[str, Any] = {}
    if region.box is not None and not region.in_shares(max(region.box)):
        left, top, right, bottom = region.box
        moved["box"] = (left * x, top * y, right * x, bottom * y)
    if region.polygon is not None and not region.in_shares(max(max(one) for one in region.polygon)):
        moved["polygon"] = tuple((across * x, down * y) for across, down in region.polygon)
    if not region.in_shares(region.feather):
        moved["feather"] = region.feather * min(after) / min(before)
    return replace(region, **moved)


def as_shares(region: Region, *, width: int, height: int) -> Box:
    """The region's box in shares of the picture, checked. Raises RegionError naming box and picture."""
    box = region.box or (math.nan,) * 4
    left, top, right, bottom = box
    if not all(math.isfinite(edge) for edge in box):
        raise RegionError(f"{region.title}: its edges must be finite numbers")
    if not region.in_shares(max(box)):
        left, right, top, bottom = left / width, right / width, top / height, bottom / height
    if left >= right or top >= bottom:
        raise RegionError(f"{region.title}: expected left < right and top < bottom")
    if left < 0 or top < 0 or right > 1 or bottom > 1:
        raise RegionError(f"{region.title}: lies outside the picture of {width} x {height} pixels")
    return left, top, right, bottom


def _corners(region: Region, width: int, height: int) -> Tensor:
    """The polygon's corners in shares, (corners, 2), checked."""
    points = region.polygon or ()
    if not 3 <= len(points) <= MAX_POINTS:
        raise RegionError(f"{region.title}: expected 3 to {MAX_POINTS} points (x, y), found {len(points)}")
    corners = torch.tensor(points, dtype=torch.float64)
    if not corners.isfinite().all():
        raise RegionError(f"{region.title}: its points must be finite numbers")
    if not region.in_shares(float(corners.max())):
        corners = corners / torch.tensor([width, height], dtype=torch.float64)
    outside = ((corners < 0) | (corners > 1)).any(1)
    if outside.any():
        corner = point(points[int(outside.nonzero()[0])])
        raise RegionError(f"{region.title}: {corner} lies outside the picture of {width} x {height} pixels")
    if crossing := _crossing(corners):
        first, second = crossing
        raise RegionError(f"{region.title}: crosses itself, the sides from points {first + 1} and {second + 1} meet")
    if _area_before(corners, 1.0, 1.0).abs() < _SMALLEST_AREA:
        raise RegionError(f"{region.title}: its {len(points)} points enclose no area")
    return corners


def _crossing(corners: Tensor) -> tuple[int, int] | None:
    """The first two sides of a polygon that cross, by the numbers of the corners they start from."""
    starts, ends = corners, corners.roll(-1, 0)

    def side_of(points: Tensor) -> Tensor:
        """On which side of each side's line a point lies: (sides, points)."""
        along, to = (ends - starts)[:, None], points[None] - starts[:, None]
        turn = along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0]
        return turn.sign()

    apart = side_of(starts) * side_of(ends) < 0
    both = (apart & apart.T).nonzero()
    return (int(both[0, 0]), int(both[0, 1])) if len(both) else None


def _mask(region: Region) -> Tensor:
    """The mask picture as numbers from 0 to 1, (rows, columns)."""
    try:
        picture = read_picture(region.mask or "", "L")
    except BadInputError as error:
        raise RegionError(f"{region.title}: {error}") from error
    mask = torch.from_numpy(np.array(picture, dtype=np.float64) / 255)
    if not mask.any():
        raise RegionError(f"{region.title}: its mask of {picture.width} x {picture.height} pixels is all black")
    return mask


def coverage(shape: Shape, *, columns: int, rows: int) -> Tensor:
    """How much of each cell the shape covers, 0 to 1: (rows, columns).

    A box covers the cells that lie wholly inside it, as in the reference; a polygon or mask its share of each cell.
    """
    if shape.polygon is not None:
        cover = _polygon_coverage(shape.polygon, columns=columns, rows=rows)
    elif shape.mask is not None:
        high, wide = shape.mask.shape
        cover = _overlaps(_edges(rows), _edges(high)) @ shape.mask @ _overlaps(_edges(columns), _edges(wide)).T
    else:
        left, top, right, bottom = cells(shape.box or WHOLE, columns=columns, rows=rows)
        cover = torch.zeros(rows, columns, dtype=torch.float64)
        cover[top : max(top, bottom), left : max(left, right)] = 1
    return _feathered(cover, shape.feather).clamp(0, 1).round(decimals=6).float()


def area_coverage(shape: Shape, *, columns: int, rows: int) -> Tensor:
    """The same, but of a box too the share of each cell that lies inside, so that none is lost on a coarse grid."""
    if shape.box is None:
        return coverage(shape, columns=columns, rows=rows)
    left, top, right, bottom = shape.box
    down, across = _inside(top, bottom, rows), _inside(left, right, columns)
    return _feathered(down[:, None] * across, shape.feather).clamp(0, 1).round(decimals=6).float()


def _inside(start: float, end: float, count: int) -> Tensor:
    """How much of each of `count` equal parts of 0 to 1 lies between start and end: (count,)."""
    edges = _edges(count)
    return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0) * count


def coverages(shape: Shape, grids: Sequence[Grid], *, tiny: str = "nearest") -> list[Tensor]:
    """The shape's coverage of each grid, finest first.

    A box that covers no cell of a coarse grid takes the nearest there, and that is reported; with `tiny` "drop" it
    covers nothing there, as in the reference.
    """
    found = [coverage(shape, columns=columns, rows=rows) for columns, rows in grids]
    lost = [number for number, cover in enumerate(found) if not cover.any()] if tiny == "nearest" else []
    for number in lost:
        columns, rows = grids[number]
        found[number] = coverage(_grown(shape, columns, rows), columns=columns, rows=rows)
    if lost:
        _report(shape.title, ", ".join(f"{columns} x {rows}" for columns, rows in (grids[number] for number in lost)))
    return found


@functools.cache
def _report(title: str, maps: str) -> None:
    """Say it once, however many pictures and steps there are."""
    logger.warning("%s covers no whole cell of the feature maps of %s; there it takes the nearest", title, maps)


def _grown(shape: Shape, columns: int, rows: int) -> Shape:
    """The shape's box, made to cover at least one column and one row of cells."""
    left, top, right, bottom = shape.box or WHOLE
    (left, right), (top, bottom) = _nearest_cells(left, right, columns), _nearest_cells(top, bottom, rows)
    return Shape(box=(left, top, right, bottom))


def _nearest_cells(start: float, end: float, count: int) -> tuple[float, float]:
    """The range itself, or, when it holds no whole cell out of `count`, the cell in which its middle lies."""
    if _first_cell(start, count) < _last_cell(end, count):
        return start, end
    cell = min(int((start + end) / 2 * count), count - 1)
    return cell / count, (cell + 1) / count


def cells(box: Box, *, columns: int, rows: int) -> Cells:
    """The cells that lie wholly inside a box of shares: start rounded up, end rounded down, as in the reference."""
    left, top, right, bottom = box
    return _first_cell(left, columns), _first_cell(top, rows), _last_cell(right, columns), _last_cell(bottom, rows)


def _first_cell(start: float, count: int) -> int:
    return math.ceil(start * count - _ROUNDING)


def _last_cell(end: float, count: int) -> int:
    return math.floor(end * count + _ROUNDING)


def require_a_cell(shape: Shape, *, columns: int, rows: int) -> None:
    """Raise RegionError unless the shape covers something of the finest feature map."""
    if not coverage(shape, columns=columns, rows=rows).any():
        raise RegionError(f"{shape.title}: too small, it covers no cell of the {columns} x {rows} latents")


def levels(columns: int, rows: int, depth: int) -> list[Grid]:
    """(columns, rows) of each of the UNet's levels, finest first; each halves the one above, rounding up."""
    grids = [(columns, rows)]
    for _ in range(depth - 1):
        columns, rows = math.ceil(columns / 2), math.ceil(rows / 2)
        grids.append((columns, rows))
    return grids


def bounding_cells(cover: Tensor) -> Cells:
    """The smallest rectangle of cells outside which the coverage (rows, columns) is 0. An empty one is at 0."""
    down, across = cover.any(1).nonzero().flatten().tolist(), cover.any(0).nonzero().flatten().tolist()
    return (across[0], down[0], across[-1] + 1, down[-1] + 1) if down else (0, 0, 0, 0)


def _edges(count: int) -> Tensor:
    """Where `count` equal parts of 0 to 1 begin and end: (count + 1,)."""
    return torch.arange(count + 1, dtype=torch.float64) / count


def _overlaps(windows: Tensor, parts: Tensor) -> Tensor:
    """The share of each window's length that lies in each part, both given by their edges: (windows, parts)."""
    starts, ends = windows[:-1, None], windows[1:, None]
    return _overlap(starts, ends, parts)


def _overlap(starts: Tensor, ends: Tensor, parts: Tensor) -> Tensor:
    shared = (torch.minimum(ends, parts[1:]) - torch.maximum(starts, parts[:-1])).clamp(min=0)
    return shared / shared.sum(1, keepdim=True)


def _feathered(cover: Tensor, feather: tuple[float, float]) -> Tensor:
    """Each cell's mean over a window as wide as the feather, which turns a straight edge into a linear ramp.

    What lies beyond the picture does not count, so a region does not fade at the picture's own edge.
    """
    if feather == (0.0, 0.0):
        return cover
    across, down = (_windows(count, width) for count, width in zip(cover.shape[::-1], feather, strict=True))
    return down @ cover @ across.T


def _windows(count: int, width: float) -> Tensor:
    """For each cell, the shares that a window of this width (at least a cell) around its middle has in all cells."""
    edges, half = _edges(count), max(width, 1 / count) / 2
    middles = ((edges[1:] + edges[:-1]) / 2)[:, None]
    return _overlap((middles - half).clamp(min=0), (middles + half).clamp(max=1), edges)


def _polygon_coverage(corners: Tensor, *, columns: int, rows: int) -> Tensor:
    """The exact share of each cell inside a polygon: (rows, columns)."""
    before = _area_before(corners, _edges(columns), _edges(rows)[:, None])
    return (before[1:, 1:] - before[:-1, 1:] - before[1:, :-1] + before[:-1, :-1]).abs() * columns * rows


def _area_before(corners: Tensor, x: Tensor | float, y: Tensor | float) -> Tensor:
    """Signed area of the part of a polygon that lies left of x and above y, for all x and y at once.

    By Green's theorem it is the integral of min(y', y) dx' along the sides, as far as they lie left of x.
    """
    x, y = (torch.as_tensor(value, dtype=torch.float64)[..., None] for value in (x, y))
    (x0, y0), (x1, y1) = corners.T, corners.roll(-1, 0).T
    slope = (y1 - y0) / torch.where(x1 == x0, 1, x1 - x0)
    start, end = torch.minimum(x0, x), torch.minimum(x1, x)
    height0, height1 = y0 + slope * (start - x0), y0 + slope * (end - x0)

    def integral(height: Tensor) -> Tensor:
        """Of min(t, y) over t from 0 to the height."""
        return torch.where(height < y, height**2 / 2, y * height - y**2 / 2)

    rise = height1 - height0
    flat = rise.abs() < 1e-8  # the quotient below would lose its digits
    steep = (integral(height1) - integral(height0)) / torch.where(flat, 1, rise)
    mean = torch.where(flat, torch.minimum((height0 + height1) / 2, y), steep)
    return ((end - start) * mean).sum(-1)
