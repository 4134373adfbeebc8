"""Whether pictures follow their sketches: what stands in them, and how far that is from what was asked for."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from PIL import Image

FRAME: Final = 2
"""Width in pixels of the frame whose usual colour is taken for the background's."""
DIFFERENT: Final = 48
"""From how large a difference in any of red, green and blue (0…255) on a pixel is not background."""

Pixels = np.ndarray[Any, np.dtype[np.bool_]]
"""True where something is, (height, width)."""


def foreground(image: Image.Image) -> Pixels:
    """What stands before a plain background, whose colour is the median of the picture's frame."""
    pixels = np.asarray(image.convert("RGB")).astype(np.int16)
    framed = np.ones(pixels.shape[:2], dtype=bool)
    framed[FRAME:-FRAME, FRAME:-FRAME] = False
    return np.abs(pixels - np.median(pixels[framed], axis=0)).max(-1) >= DIFFERENT


def sketched(sketch: Image.Image) -> Pixels:
    """What a sketch of white on black asks for."""
    return np.asarray(sketch.convert("L")) >= 128


def overlap(drawn: Pixels, wanted: Pixels) -> float:
    """Intersection over union; 1 where both are empty."""
    union = (drawn | wanted).sum()
    return float((drawn & wanted).sum() / union) if union else 1.0


def centre_error(drawn: Pixels, wanted: Pixels) -> float:
    """Distance between the centres of mass as a share of the height; with nothing drawn, the largest there can be."""
    height, width = wanted.shape
    if not drawn.any() or not wanted.any():
        return float(np.hypot(height, width) / height)
    return float(np.linalg.norm(np.argwhere(drawn).mean(0) - np.argwhere(wanted).mean(0)) / height)
