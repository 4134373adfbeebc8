"""Places, drawn procedurally. A scene takes a canvas and a seeded random source; no two are quite alike.

Canvases are RGB pictures twice as large as the final one, so that shrinking smooths the edges.
All lengths below are shares of the canvas height, so wide pictures show more of the same place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from random import Random
from typing import Final

from PIL import Image, ImageDraw

Scene = Callable[["Canvas", Random], None]
Colour = tuple[int, int, int]


class Canvas:
    """A picture with a pen that measures in heights: (0, 0) top left, y from 0 to 1, x from 0 to `width`."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height))
        self.width = width / height
        self._scale = height
        self._pen = ImageDraw.Draw(self.image)

    def band(self, top: float, bottom: float, colour: Colour) -> None:
        """A stripe over the whole width."""
        self._pen.rectangle((0, top * self._scale, self.image.width, bottom * self._scale), fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """A filled rectangle."""
        self._pen.rectangle([v * self._scale for v in (left, top, right, bottom)], fill=colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour, *, flat: float = 1.0) -> None:
        """A filled ellipse; `flat` is its height over its width."""
        edges = (x - radius, y - radius * flat, x + radius, y + radius * flat)
        self._pen.ellipse([v * self._scale for v in edges], fill=colour)

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """A filled polygon."""
        self._pen.polygon([(x * self._scale, y * self._scale) for x, y in points], fill=colour)

    def places(self, random: Random, spacing: float) -> list[float]:
        """x positions over the whole width, about `spacing` apart, starting anywhere."""
        start = random.uniform(-spacing, 0)
        count = math.ceil((self.width - start) / spacing) + 1
        return [start + (k + random.uniform(-0.15, 0.15)) * spacing for k in range(count)]


def tone(random: Random, colour: Colour, spread: int = 10) -> Colour:
    """The colour, a little lighter or darker."""
    shift = random.randint(-spread, spread)
    red, green, blue = (max(0, min(255, channel + shift)) for channel in colour)
    return red, green, blue


def beach(canvas: Canvas, random: Random) -> None:
    """Sky, sun, sea, sand."""
    sea, sand = random.uniform(0.38, 0.46), random.uniform(0.62, 0.7)
    canvas.band(0, sea, tone(random, (150, 215, 250)))
    canvas.disc(random.uniform(0.1, canvas.width - 0.1), random.uniform(0.1, 0.2), 0.09, (255, 225, 90))
    canvas.band(sea, sand, tone(random, (40, 140, 200)))
    canvas.band(sand, 1, tone(random, (240, 215, 150)))


def forest(canvas: Canvas, random: Random) -> None:
    """A dark green wall of trunks and crowns."""
    canvas.band(0, 1, tone(random, (60, 120, 70)))
    ground = random.uniform(0.72, 0.8)
    for x in canvas.places(random, 0.3):
        canvas.box(x - 0.035, 0.2, x + 0.035, ground + 0.03, (90, 62, 40))
        canvas.disc(x, random.uniform(0.12, 0.22), 0.2, tone(random, (35, 95, 50)))
    canvas.band(ground, 1, tone(random, (90, 150, 70)))


def snow(canvas: Canvas, random: Random) -> None:
    """Pale sky, white hills, firs."""
    canvas.band(0, 1, tone(random, (190, 212, 232)))
    for x in canvas.places(random, 0.5):
        canvas.polygon([(x - 0.13, 0.62), (x, random.uniform(0.15, 0.25)), (x + 0.13, 0.62)], (70, 120, 110))
    for x in canvas.places(random, 0.7):
        canvas.disc(x, 1.0, 0.6, (245, 248, 252), flat=0.75)
    canvas.band(0.8, 1, (245, 248, 252))


def desert(canvas: Canvas, random: Random) -> None:
    """Orange sky over dunes."""
    canvas.band(0, 1, tone(random, (252, 205, 135)))
    canvas.disc(random.uniform(0.1, canvas.width - 0.1), random.uniform(0.12, 0.22), 0.08, (255, 245, 190))
    for x in canvas.places(random, 0.6):
        canvas.disc(x, 1.0, 0.5, tone(random, (226, 150, 80)), flat=random.uniform(0.8, 1.0))
    for x in canvas.places(random, 0.7):
        canvas.disc(x, 1.15, 0.55, tone(random, (205, 125, 62)), flat=0.75)


def city(canvas: Canvas, random: Random) -> None:
    """Grey towers with lit windows above a street."""
    canvas.band(0, 1, tone(random, (185, 195, 215)))
    for x in canvas.places(random, 0.34):
        top, colour = random.uniform(0.12, 0.4), tone(random, (110, 118, 140), 18)
        canvas.box(x, top, x + 0.28, 0.85, colour)
        for row in range(3):
            for column in range(2):
                left, upper = x + 0.05 + 0.12 * column, top + 0.06 + 0.14 * row
                canvas.box(left, upper, left + 0.06, upper + 0.07, (245, 225, 140))
    canvas.band(0.82, 1, tone(random, (75, 75, 85)))


def night(canvas: Canvas, random: Random) -> None:
    """Dark blue sky, moon, stars, a black hill."""
    canvas.band(0, 1, tone(random, (22, 24, 70), 6))
    for x in canvas.places(random, 0.22):
        canvas.disc(x, random.uniform(0.05, 0.65), 0.022, (255, 250, 205))
    canvas.disc(random.uniform(0.15, canvas.width - 0.15), random.uniform(0.14, 0.22), 0.1, (250, 240, 180))
    canvas.band(random.uniform(0.78, 0.84), 1, tone(random, (14, 40, 40), 6))


def under_the_sea(canvas: Canvas, random: Random) -> None:
    """Turquoise water, bubbles, weeds and sand."""
    canvas.band(0, 0.5, tone(random, (40, 165, 190)))
    canvas.band(0.5, 1, tone(random, (25, 130, 165)))
    for x in canvas.places(random, 0.33):
        canvas.disc(x, random.uniform(0.08, 0.6), random.uniform(0.03, 0.05), (170, 230, 240))
    for x in canvas.places(random, 0.4):
        canvas.polygon([(x - 0.07, 0.95), (x, random.uniform(0.55, 0.65)), (x + 0.07, 0.95)], (225, 100, 125))
    canvas.band(random.uniform(0.84, 0.9), 1, tone(random, (205, 195, 140)))


def mountains(canvas: Canvas, random: Random) -> None:
    """Grey peaks with white caps behind a meadow."""
    canvas.band(0, 1, tone(random, (135, 195, 240)))
    for x in canvas.places(random, 0.62):
        top = random.uniform(0.08, 0.2)
        canvas.polygon([(x - 0.5, 0.8), (x, top), (x + 0.5, 0.8)], tone(random, (125, 120, 130), 14))
        canvas.polygon([(x - 0.14, top + 0.2), (x, top), (x + 0.14, top + 0.2)], (245, 248, 252))
    canvas.band(random.uniform(0.72, 0.78), 1, tone(random, (120, 180, 80)))


def plain(colour: Colour) -> Scene:
    """A scene of one colour."""

    def draw(canvas: Canvas, random: Random) -> None:
        canvas.band(0, 1, tone(random, colour, 6))

    return draw


def volcano(canvas: Canvas, random: Random) -> None:
    """Concept scene: a black cone, lava and a red sky."""
    canvas.band(0, 1, tone(random, (150, 45, 50)))
    for x in canvas.places(random, 1.1):
        canvas.polygon([(x - 0.7, 0.9), (x - 0.12, 0.2), (x + 0.12, 0.2), (x + 0.7, 0.9)], (50, 38, 45))
        canvas.polygon(
            [(x - 0.1, 0.2), (x + 0.1, 0.2), (x + 0.05, 0.5), (x + 0.16, 0.85), (x - 0.05, 0.85)], (255, 130, 20)
        )
    canvas.band(random.uniform(0.8, 0.85), 1, tone(random, (255, 110, 15)))


def candy_land(canvas: Canvas, random: Random) -> None:
    """Concept scene: pink sky, striped lollipops, mint hills."""
    canvas.band(0, 1, tone(random, (252, 190, 215)))
    for x in canvas.places(random, 0.45):
        y = random.uniform(0.2, 0.34)
        canvas.box(x - 0.02, y, x + 0.02, 0.85, (255, 255, 255))
        for radius, colour in ((0.15, (230, 60, 110)), (0.1, (255, 255, 255)), (0.05, (230, 60, 110))):
            canvas.disc(x, y, radius, colour)
    for x in canvas.places(random, 0.6):
        canvas.disc(x, 1.05, 0.45, tone(random, (150, 230, 190)), flat=0.7)


def alien_planet(canvas: Canvas, random: Random) -> None:
    """Concept scene: violet sky, a ringed planet, green craters."""
    canvas.band(0, 1, tone(random, (70, 30, 110)))
    x, y = random.uniform(0.25, canvas.width - 0.25), random.uniform(0.18, 0.26)
    canvas.disc(x, y, 0.24, (250, 220, 120), flat=0.25)
    canvas.disc(x, y, 0.14, (235, 130, 90))
    canvas.band(0.7, 1, tone(random, (90, 200, 110)))
    for x in canvas.places(random, 0.35):
        canvas.disc(x, random.uniform(0.76, 0.94), 0.1, (50, 140, 75), flat=0.4)


def rainbow_meadow(canvas: Canvas, random: Random) -> None:
    """Concept scene: a rainbow over flowers."""
    canvas.band(0, 1, tone(random, (205, 235, 255)))
    middle = canvas.width / 2 + random.uniform(-0.1, 0.1)
    bands = [(235, 70, 70), (250, 160, 50), (250, 235, 90), (90, 200, 100), (80, 130, 230), (205, 235, 255)]
    for ring, colour in enumerate(bands):
        canvas.disc(middle, 0.85, 0.75 - 0.07 * ring, colour)
    canvas.band(0.74, 1, tone(random, (130, 205, 90)))
    for x in canvas.places(random, 0.2):
        canvas.disc(x, random.uniform(0.8, 0.95), 0.04, random.choice([(250, 90, 160), (255, 255, 255)]))


COLOURS: Final[dict[str, Colour]] = {
    "red": (215, 50, 50),
    "orange": (245, 140, 40),
    "yellow": (250, 215, 70),
    "lime": (165, 220, 60),
    "green": (60, 165, 80),
    "teal": (20, 130, 125),
    "turquoise": (80, 215, 205),
    "blue": (55, 90, 210),
    "navy": (25, 35, 95),
    "purple": (125, 60, 170),
    "lavender": (195, 175, 235),
    "pink": (245, 150, 190),
    "magenta": (215, 40, 140),
    "brown": (125, 80, 50),
    "beige": (230, 210, 175),
    "grey": (140, 140, 145),
    "white": (246, 246, 246),
    "black": (20, 20, 22),
}


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(nouns: Iterable[str]) -> str:
    """The nouns as captions name what stands side by side, left to right."""
    return " and ".join(article(noun) for noun in nouns)


SCENES: Final[dict[str, Scene]] = {
    # phrase in captions -> how it is drawn
    "on the beach": beach,
    "in the forest": forest,
    "in the snow": snow,
    "in the desert": desert,
    "in the city": city,
    "at night": night,
    "under the sea": under_the_sea,
    "in the mountains": mountains,
}
"""The places the generator knows."""

PLAIN_SCENES: Final[dict[str, Scene]] = {
    f"on a {name} background": plain(COLOURS[name]) for name in ("red", "blue", "green", "yellow", "white")
}

CONCEPT_SCENES: Final[dict[str, Scene]] = {
    "volcano": volcano,
    "candy-land": candy_land,
    "alien-planet": alien_planet,
    "rainbow-meadow": rainbow_meadow,
}
"""Places kept for tuning, never seen in pre-training."""
