"""Emojiland's pictures: sprites pasted on scenes, with captions, composed from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from PIL import Image, ImageFilter

from mixofshow.bases.emojiland.scenes import CONCEPT_SCENES, PLAIN_SCENES, SCENES, Canvas, Scene, listed
from mixofshow.bases.emojiland.sprites import sprite
from mixofshow.bases.emojiland.vocabulary import CLASSES, GENERATOR_SETS

SIZE: Final = 64
"""Height of every picture, and width of the square ones, in pixels."""

WIDE: Final = 160
"""Width in pixels of wide pictures, which have room for three sprites."""

SPRITE_HEIGHT: Final = 0.56
"""How far down sprites stand on average, as a share of the height."""
SOFTNESS: Final = 0.65
"""Radius in pixels of the blur of blurred pictures: like a lens, it leaves no single-pixel detail."""

TINTS: Final = {"rosy": 1 / 8, "minty": 1 / 3, "azure": 1 / 2, "violet": 3 / 4}
"""Recoloured sprites by the word for their turn on the colour wheel."""
KNOWN_SCENES: Final = {**SCENES, **PLAIN_SCENES}

CONCEPT_SCENE_PHRASES: Final = {f"in the {name.replace('-', ' ')}": scene for name, scene in CONCEPT_SCENES.items()}


@dataclass(frozen=True)
class Placement:
    """Where a sprite lies: centre and side in pixels, tilt in degrees."""

    x: float
    y: float
    side: int
    tilt: float


@dataclass(frozen=True)
class Picture:
    """A composed picture, what it shows, and the caption that says so."""

    image: Image.Image
    caption: str
    subjects: tuple[str, ...]
    scene: str


def draw_scene(scene: Scene, random: Random, *, width: int = SIZE) -> Image.Image:
    """The scene alone, RGB, `width` × SIZE pixels."""
    canvas = Canvas(2 * width, 2 * SIZE)
    scene(canvas, random)
    return canvas.image.resize((width, SIZE), Image.Resampling.BOX)


def paste(picture: Image.Image, subject: Image.Image, place: Placement) -> None:
    """Lay a sprite onto a picture, in place."""
    turned = subject.rotate(place.tilt, Image.Resampling.BICUBIC)
    small = turned.resize((place.side, place.side), Image.Resampling.LANCZOS)
    corner = (round(place.x - place.side / 2), round(place.y - place.side / 2))
    picture.paste(small, corner, small)


def places(random: Random, count: int, *, width: int = SIZE) -> list[Placement]:
    """Places for `count` sprites side by side, left to right."""
    share = width / count
    largest = min(share, SIZE)
    sides = [
        round(largest * random.uniform(0.6, 0.74) if count == 1 else largest * random.uniform(0.82, 0.98))
        for _ in range(count)
    ]
    return [
        Placement(
            x=share * (k + 0.5) + random.uniform(-0.07, 0.07) * largest,
            y=SIZE * SPRITE_HEIGHT + random.uniform(-0.06, 0.06) * SIZE,
            side=side,
            tilt=random.uniform(-8, 8),
        )
        for k, side in enumerate(sides)
    ]


def compose(
    subjects: Sequence[tuple[str, Image.Image]],
    scene: str,
    random: Random,
    *,
    scenes: dict[str, Scene] = KNOWN_SCENES,
    width: int = SIZE,
    laid: Sequence[Placement] = (),
    softness: float = 0,
) -> Picture:
    """A picture of the given (word, sprite) pairs, left to right, in the named scene; evenly spread if not `laid`.

    Its caption is short. `softness` is the radius of a blur in pixels.
    """
    image = draw_scene(scenes[scene], random, width=width)
    for (_, subject), place in zip(subjects, laid or places(random, len(subjects), width=width), strict=True):
        paste(image, subject, place)
    if softness:
        image = image.filter(ImageFilter.GaussianBlur(softness))
    words = tuple(word for word, _ in subjects)
    caption = random.choice(["a photo of {}", "{}"]).format(listed(words)) + (f" {scene}" if scene else "")
    return Picture(image, caption, words, scene)


def random_subjects(random: Random, count: int) -> list[tuple[str, Image.Image]]:
    """(word, sprite) pairs of different classes, each from either of the generator's icon sets."""
    words = random.sample(list(CLASSES), count)
    return [(word, sprite(random.choice(GENERATOR_SETS), CLASSES[word])) for word in words]
