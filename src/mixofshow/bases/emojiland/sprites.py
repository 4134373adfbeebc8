"""The vendored icons: one row of square RGBA pictures per icon set."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Final

from PIL import Image

ICON_FOLDER: Final = Path(__file__).parent / "icons"
ICON_SIZE: Final = 96


@cache
def sprite(icon_set: str, name: str) -> Image.Image:
    """An icon of a set as RGBA of ICON_SIZE × ICON_SIZE pixels; do not draw on it, it is shared."""
    column = _names(icon_set).index(name)
    return _atlas(icon_set).crop((column * ICON_SIZE, 0, (column + 1) * ICON_SIZE, ICON_SIZE))


@cache
def _names(icon_set: str) -> list[str]:
    return json.loads((ICON_FOLDER / f"{icon_set}.json").read_text())["icons"]


@cache
def _atlas(icon_set: str) -> Image.Image:
    return Image.open(ICON_FOLDER / f"{icon_set}.png").convert("RGBA")


def recolour(picture: Image.Image, turn: float) -> Image.Image:
    """The RGBA picture with every hue turned on the colour wheel (1 is a full turn)."""
    alpha = picture.getchannel("A")
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    turned = hue.point([round(level + 256 * turn) % 256 for level in range(256)])
    result = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    result.putalpha(alpha)
    return result
