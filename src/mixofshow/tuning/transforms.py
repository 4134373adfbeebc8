"""Pictures brought to size: cut, padded or put in buckets, their masks with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mixofshow.errors import SettingsError
from mixofshow.tuning.dataset import Example
from mixofshow.tuning.settings import PictureSettings

WIDEST: Final = 2.0
"""Buckets are at most this many times as wide as high, or as high as wide."""

CropBox = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture as it was read."""


@dataclass(frozen=True)
class Fitted:
    """A picture at its size.

    picture: (3, height, width) in [-1, 1]. mask: (1, height, width) in [0, 1], 1 where the concept is, or None.
    valid: (1, height, width), 1 where the picture is and 0 where it was padded, or None if it was not.
    """

    picture: Tensor
    mask: Tensor | None = None
    valid: Tensor | None = None


def fit(
    example: Example,
    settings: PictureSettings,
    *,
    size: int,
    multiple: int,
    generator: torch.Generator | None = None,
    flip: bool = False,
) -> Fitted:
    """A picture and its mask at size x size, or in the bucket of that area which its shape is nearest to.

    With a generator, `crop` cuts at a random place (two draws, whatever the picture), else around the middle.
    `flip` mirrors. `multiple` is what the sides of buckets are multiples of. Raises SettingsError without any bucket.
    """
    if settings.fit == "pad":
        fitted = _padded(example, size)
    elif settings.fit == "bucket":
        width, height = nearest_bucket(example.image.size, buckets(size, multiple))
        fitted = _cut(example, width, height, None)
    else:
        fitted = _cut(example, size, size, generator)
    return _mirrored(fitted) if flip else fitted


def variants(
    example: Example, settings: PictureSettings, *, size: int, multiple: int, generator: torch.Generator
) -> list[Fitted]:
    """The fixed set of a picture: its cuts, each followed by its mirror image if `settings.flip`.

    One cut is around the middle and draws nothing; several are at random places. With crops = 0 there is one too: the
    shape of those that `fit` cuts anew at every step.
    """
    count = max(1, settings.crops) if settings.fit == "crop" else 1
    place = generator if count > 1 else None
    cuts = [fit(example, settings, size=size, multiple=multiple, generator=place) for _ in range(count)]
    return [one for cut in cuts for one in ((cut, _mirrored(cut)) if settings.flip else (cut,))]


def buckets(size: int, multiple: int) -> list[tuple[int, int]]:
    """(width, height) pairs of multiples of `multiple`, each of at most size x size pixels and 1:2 to 2:1.

    For each width the largest height, and each pair both ways round. Raises SettingsError if `size` is too small.
    """
    if size < multiple:
        raise SettingsError(f"'pictures.size': {size} is too small for buckets in steps of {multiple} pixels")
    square = size // multiple * multiple
    found = {(square, square)}
    for width in range(multiple, int(WIDEST * size) + 1, multiple):
        height = size * size // width // multiple * multiple
        if height and 1 / WIDEST <= width / height <= WIDEST:
            found |= {(width, height), (height, width)}
    return sorted(found)


def nearest_bucket(size: tuple[int, int], choices: list[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) whose shape is nearest to a picture's in log(width / height); the larger of two as near."""
    shape = math.log(size[0] / size[1])
    # Rounded: two pairs of the same shape differ in the last bit of their logarithms.
    return min(choices, key=lambda pair: (round(abs(math.log(pair[0] / pair[1]) - shape), 9), -pair[0] * pair[1]))


def _cut(example: Example, width: int, height: int, generator: torch.Generator | None) -> Fitted:
    """The largest part of this shape, at a random place or the middle, resized: the short edge decides the scale."""
    box = _part(example.image.size, width, height, generator)
    picture = _picture(example.image.resize((width, height), Image.Resampling.LANCZOS, box))
    return Fitted(picture, _mask(example.mask, (width, height), box))


def _part(size: tuple[int, int], width: int, height: int, generator: torch.Generator | None) -> CropBox:
    """Where to cut. Resizing only this part spares the memory that a picture of 60000 x 1 would need whole."""
    scale = max(width / size[0], height / size[1])
    part = (min(width / scale, size[0]), min(height / scale, size[1]))
    free = (size[0] - part[0], size[1] - part[1])
    if generator is None:
        left, top = free[0] / 2, free[1] / 2
    else:
        left, top = (min(_draw(int(room * scale + 1e-6), generator) / scale, room) for room in free)
    return left, top, min(left + part[0], size[0]), min(top + part[1], size[1])


def _draw(last: int, generator: torch.Generator) -> int:
    """A whole number of pixels, so that a picture that needs no resizing is not blurred: 0 … last."""
    return int(torch.randint(last + 1, (), generator=generator))


def _padded(example: Example, size: int) -> Fitted:
    """The whole picture in the middle of a square: the long edge decides the scale.

    Padding is 0, middle grey: the encoder's view reaches over the edge, and grey is least like a thing of its own.
    """
    scale = size / max(example.image.size)
    width, height = (max(1, round(side * scale)) for side in example.image.size)
    left, top = (size - width) // 2, (size - height) // 2
    margins = (left, size - width - left, top, size - height - top)
    whole = (0.0, 0.0, float(example.image.width), float(example.image.height))
    picture = _picture(example.image.resize((width, height), Image.Resampling.LANCZOS))
    mask = _mask(example.mask, (width, height), whole)
    valid = functional.pad(torch.ones(1, height, width), margins)
    return Fitted(functional.pad(picture, margins), functional.pad(mask, margins) if mask is not None else None, valid)


def _picture(image: Image.Image) -> Tensor:
    """RGB to (3, height, width) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.array(image)).float() / 127.5 - 1, "height width rgb -> rgb height width")


def _mask(mask: Image.Image | None, size: tuple[int, int], box: CropBox) -> Tensor | None:
    """L to (1, height, width) in [0, 1]. Bilinear: Lanczos would ring, and count what is not the concept."""
    if mask is None:
        return None
    resized = mask.resize(size, Image.Resampling.BILINEAR, box)
    return rearrange(torch.from_numpy(np.array(resized)).float() / 255, "height width -> 1 height width")


def _mirrored(fitted: Fitted) -> Fitted:
    """Left and right exchanged."""

    def mirrored(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flip(-1)

    return Fitted(fitted.picture.flip(-1), mirrored(fitted.mask), mirrored(fitted.valid))
