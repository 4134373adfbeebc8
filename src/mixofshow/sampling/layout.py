"""A picture with its regions drawn over it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mixofshow.sampling.regions import bounding_cells, coverage, shape_of
from mixofshow.sampling.settings import Region

TINT: Final = 0.35
SMALLEST_SIDE: Final = 512


def draw_layout(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """The picture, enlarged if it is small, each region tinted as far as it is covered and outlined, with its prompt."""
    scale = max(1, round(SMALLEST_SIDE / max(image.size)))
    large = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pixels = np.array(large, dtype=np.float32)
    labels = []
    for number, region in enumerate(regions):
        shape = shape_of(region, width=image.width, height=image.height)
        cover = coverage(shape, columns=large.width, rows=large.height)
        colour = 255 * np.array(colorsys.hsv_to_rgb(number / len(regions), 1, 1), dtype=np.float32)
        inside = cover.numpy() >= 0.5
        tint = np.maximum(TINT * cover.numpy(), _outline(inside))[..., None]
        pixels = (1 - tint) * pixels + tint * colour
        labels.append((bounding_cells(cover)[:2], f"{number + 1} {region.prompt}"))
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(12)
    for (left, top), text in labels:
        pen.text((left + 3, top + 2), text, fill="white", font=font, stroke_width=1, stroke_fill="black")
    return drawn


def _outline(inside: np.ndarray) -> np.ndarray:
    """1 on the cells inside that have a neighbour outside."""
    padded = np.pad(inside, 1)
    deep = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return (inside & ~deep).astype(np.float32)
