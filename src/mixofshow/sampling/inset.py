"""One place of a picture drawn over: enlarged with a margin, drawn by its own concepts, and set back without a seam.

What the place does not cover keeps its pixels bit for bit. Inside, the new picture fades in over `RAMP` of the place's
shorter side, so that there is nothing of it at the edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixofshow.errors import RegionError, SettingsError
from mixofshow.progress import Progress, silent
from mixofshow.sampling.pictures import read_picture
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.regions import WHOLE, Cells, Shape, bounding_cells, coverage, shape_of
from mixofshow.sampling.settings import Composition, Region

RAMP: Final = 0.125
"""Of the place's shorter side: how deep inside its edge the new picture begins to be all there is."""


@dataclass(frozen=True)
class Window:
    """What is drawn: a part of the picture, in its pixels, at a size (width, height) at which the base draws."""

    box: Cells
    size: tuple[int, int]


def draw_inset(pipeline: MixOfShowPipeline, composition: Composition, *, progress: Progress = silent) -> Image.Image:
    """The composition's image with its place `redo` drawn over as far as `image_strength` says, from its seed.

    Raises SettingsError without an image and where size or strength do not fit, RegionError for a place beside it.
    """
    place = composition.redo
    if place is None or composition.image is None:
        raise SettingsError("redo: expected an image of which the place is drawn over, found none")
    for name, usual in (("upscale", 1), ("mask", None)):
        if (found := getattr(composition, name)) != usual:
            raise SettingsError(f"{name}: expected {usual} with redo, found {found}")
    picture = read_picture(composition.image, "RGB")
    cover = pixels_covered(place, picture)
    window = window_of(cover, pipeline, composition.redo_margin)
    given = {"image": picture.crop(window.box), "free": _free(cover, window)}
    new = _drawn(pipeline, composition, place, **given, progress=progress)
    return set_back(picture, new, faded(cover), window)


def pixels_covered(place: Region, picture: Image.Image) -> Tensor:
    """How much of each pixel a place covers: (rows, columns). Raises RegionError where it covers none."""
    shape = shape_of(place, width=picture.width, height=picture.height)
    cover = coverage(shape, columns=picture.width, rows=picture.height)
    if not cover.any():
        raise RegionError(f"{shape.title}: covers no pixel of the picture of {picture.width} x {picture.height}")
    return cover


def window_of(cover: Tensor, pipeline: Any, margin: float) -> Window:
    """The place, (rows, columns), with a margin, a share of its longer side, and the size at which it is drawn.

    That has at least the area of the base's own pictures. Nothing is reduced, and as far as the picture allows both
    sides are enlarged alike.
    """
    rows, columns = cover.shape
    left, top, right, bottom = bounding_cells(cover)
    beside = math.ceil(margin * max(right - left, bottom - top))
    (left, right), (top, bottom) = _grown(left, right, beside, columns), _grown(top, bottom, beside, rows)
    factor = pipeline.vae_scale_factor
    usual = pipeline.unet.config.sample_size * factor
    scale = max(1.0, usual / math.sqrt((right - left) * (bottom - top)))
    wide, high = (math.ceil(round(side * scale / factor, 6)) * factor for side in (right - left, bottom - top))
    (left, right), (top, bottom) = (
        _as_wide(left, right, round(wide / scale), columns),
        _as_wide(top, bottom, round(high / scale), rows),
    )
    return Window((left, top, right, bottom), (wide, high))


def _grown(start: int, end: int, beside: int, count: int) -> tuple[int, int]:
    return max(0, start - beside), min(count, end + beside)


def _as_wide(start: int, end: int, wide: int, count: int) -> tuple[int, int]:
    """The range of 0 to `count`, grown on both sides until it is so wide, or all there is."""
    wide = min(max(wide, end - start), count)
    start = min(max(0, start - (wide - (end - start)) // 2), count - wide)
    return start, start + wide


def faded(cover: Tensor) -> Tensor:
    """The cover, (rows, columns), with a ramp inside its edge, from 0: how much of the new picture each pixel has."""
    rows, columns = cover.shape
    left, top, right, bottom = bounding_cells(cover)
    wide = 2 * RAMP * min(right - left, bottom - top)
    inside = Shape(mask=(cover > 0).double(), feather=(wide / columns, wide / rows))
    return cover * (2 * coverage(inside, columns=columns, rows=rows) - 1).clamp(min=0)


def set_back(picture: Image.Image, new: Image.Image, share: Tensor, window: Window) -> Image.Image:
    """The picture, of which each pixel is as much of the new one, put into the window, as its share (rows, columns)."""
    left, top, right, bottom = window.box
    old = np.array(picture)
    inside = old[top:bottom, left:right]
    fitted = new.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    weight = share[top:bottom, left:right, None].double().numpy()
    mixed = (1 - weight) * inside + weight * np.array(fitted, dtype=np.float64)
    old[top:bottom, left:right] = np.where(weight > 0, mixed.round(), inside).astype(np.uint8)
    return Image.fromarray(old)


def _free(cover: Tensor, window: Window) -> Image.Image:
    """The place in the window as a mask, white where it covers anything."""
    left, top, right, bottom = window.box
    white = torch.where(cover > 0, 255, 0)[top:bottom, left:right].numpy().astype(np.uint8)
    return Image.fromarray(white).resize(window.size, Image.Resampling.NEAREST)


def _drawn(
    pipeline: MixOfShowPipeline,
    composition: Composition,
    place: Region,
    *,
    image: Image.Image,
    free: Image.Image,
    progress: Progress,
) -> Image.Image:
    """A window of the picture drawn anew where it is free, with the place's prompt, concepts and LoRAs in all of it."""
    whole: dict[str, Any] = {"box": WHOLE, "units": "share", "polygon": None, "mask": None, "feather": 0}
    size = {"width": free.width, "height": free.height}
    found: list[Image.Image] = pipeline(
        place.prompt,
        regions=[replace(place, **whole, first_step=None, last_step=None)],
        negative_prompt=composition.negative_prompt,
        image=image,
        mask_image=free,
        seed=composition.seed,
        regional_lora=composition.regional_lora,
        progress=progress,
        **composition.settings | size | {"isolate": False},
    )
    return found[0]
