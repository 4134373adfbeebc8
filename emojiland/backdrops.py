"""Grounds without end: any colour, gradient or pattern."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from random import Random
from typing import Final

from PIL import Image

from mixofshow.bases.emojiland.scenes import COLOURS, Canvas, Colour, Scene, article, plain, tone

PATTERNS: Final = ("stripes", "bands", "dots", "checks", "shapes")


def any_colour(random: Random) -> Colour:
    """Any colour, as often strong as pale or dark."""
    red, green, blue = colorsys.hsv_to_rgb(random.random(), random.random() ** 0.5, random.uniform(0.1, 1) ** 0.5)
    return round(255 * red), round(255 * green), round(255 * blue)


def gradient(first: Colour, second: Colour) -> Scene:
    """A scene that passes from one colour to another, in any direction."""

    def draw(canvas: Canvas, random: Random) -> None:
        ramp = Image.linear_gradient("L").rotate(random.uniform(0, 360), Image.Resampling.BILINEAR)
        middle = ramp.crop((64, 64, 192, 192)).resize(canvas.image.size)
        start, end = (Image.new("RGB", canvas.image.size, colour) for colour in (first, second))
        canvas.image.paste(Image.composite(start, end, middle))

    return draw


def pattern(kind: str, colours: Sequence[Colour]) -> Scene:
    """A scene of one of PATTERNS in the colours after the first, on the first."""

    def draw(canvas: Canvas, random: Random) -> None:
        canvas.band(0, 1, colours[0])
        size = random.uniform(0.08, 0.4)
        for column, x in enumerate(canvas.places(random, size)):
            for row in range(math.ceil(1 / size)):
                y, colour = row * size, colours[1 + (row if kind == "bands" else column) % (len(colours) - 1)]
                match kind:
                    case "stripes" if row == 0:
                        canvas.box(x, 0, x + 0.5 * size, 1, colour)
                    case "bands" if column == 0:
                        canvas.band(y, y + 0.5 * size, colour)
                    case "dots":
                        canvas.disc(x, y, random.uniform(0.15, 0.4) * size, colour)
                    case "checks" if (row + column) % 2:
                        canvas.box(x, y, x + size, y + size, colour)
                    case "shapes" if random.random() < 0.25:
                        canvas.polygon([(x + random.gauss(0, 0.2), y + random.gauss(0, 0.2)) for _ in range(4)], colour)

    return draw


def backdrop(random: Random) -> tuple[str, Scene]:
    """A background without end: its phrase for captions, and a scene of named colours, a little lighter or darker."""
    names = random.sample(list(COLOURS), random.choice((2, 2, 3)))
    colours = [tone(random, COLOURS[name], 12) for name in names]
    kind = random.choice(("plain", "plain", "gradient", *PATTERNS))
    if kind == "plain":
        return f"on {article(names[0])} background", plain(colours[0])
    if kind == "gradient":
        return f"on {article(names[0])} and {names[1]} gradient", gradient(*colours[:2])
    return f"on {article(names[0])} background with {' and '.join(names[1:])} {kind}", pattern(kind, colours)


def any_backdrop(random: Random) -> Scene:
    """One of any colours, for networks that must not know their colours by heart."""
    colours = [any_colour(random) for _ in range(random.randint(2, 4))]
    kind = random.choice(("plain", "gradient", random.choice(PATTERNS)))
    if kind == "plain":
        return plain(colours[0])
    return gradient(*colours[:2]) if kind == "gradient" else pattern(kind, colours)
