"""Regions: where on the picture a prompt holds, in pixels and in attention cells. All of the geometry is here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from mixofshow.errors import RegionError, shown

_REGION: Final = re.compile(r"\s*([^:]*?)\s*:\s*(.*)", re.DOTALL)

Box = tuple[float, float, float, float]
"""(left, top, right, bottom)."""
Cells = tuple[int, int, int, int]
"""(left, top, right, bottom) in whole cells of a feature map; right and bottom are not included."""


@dataclass(frozen=True)
class Region:
    """A part of the picture with a prompt of its own. `box` is in pixels, or in shares if no number is over 1.

    `negative_prompt` None means the one of the whole picture.
    """

    prompt: str
    box: Box
    negative_prompt: str | None = None

    @classmethod
    def parse(cls, text: str) -> Region:
        """From "left,top,right,bottom: prompt". Raises RegionError."""
        match = _REGION.fullmatch(text)
        numbers = match.group(1).split(",") if match else []
        try:
            left, top, right, bottom = (float(number) for number in numbers)
        except ValueError as error:
            raise RegionError(f"region '{shown(text)}': expected \"left,top,right,bottom: prompt\"") from error
        return cls(match.group(2) if match else "", (left, top, right, bottom))


def as_shares(region: Region, *, width: int, height: int) -> Box:
    """The region's box in shares of the picture, checked. Raises RegionError naming box and picture."""
    left, top, right, bottom = region.box
    where = f"region {tuple(region.box)} of '{shown(region.prompt, 40)}'"
    if not all(math.isfinite(edge) for edge in region.box):
        raise RegionError(f"{where}: its edges must be finite numbers")
    if max(region.box) > 1:
        left, right, top, bottom = left / width, right / width, top / height, bottom / height
    if left >= right or top >= bottom:
        raise RegionError(f"{where}: expected left < right and top < bottom")
    if left < 0 or top < 0 or right > 1 or bottom > 1:
        raise RegionError(f"{where}: lies outside the picture of {width} x {height} pixels")
    return left, top, right, bottom


def cells(box: Box, *, columns: int, rows: int) -> Cells:
    """The cells that lie wholly inside a box of shares: start rounded up, end rounded down, as in the reference."""
    left, top, right, bottom = box
    return math.ceil(left * columns), math.ceil(top * rows), math.floor(right * columns), math.floor(bottom * rows)


def is_empty(area: Cells) -> bool:
    """True when there is no cell in it."""
    left, top, right, bottom = area
    return left >= right or top >= bottom


def require_a_cell(region: Region, box: Box, *, columns: int, rows: int) -> None:
    """Raise RegionError unless the box covers at least one cell of the finest feature map."""
    if is_empty(cells(box, columns=columns, rows=rows)):
        raise RegionError(
            f"region {tuple(region.box)} of '{shown(region.prompt, 40)}': too small, it covers no cell of the {columns} x {rows} latents"
        )


def feature_grid(tokens: int, *, columns: int, rows: int) -> tuple[int, int]:
    """(columns, rows) of the UNet level that has this many tokens; each level halves the one above, rounding up."""
    while columns * rows > tokens:
        columns, rows = math.ceil(columns / 2), math.ceil(rows / 2)
    if columns * rows != tokens:
        raise ValueError(f"no level of the UNet has {tokens} tokens")
    return columns, rows
