"""Emojiland's pictures: sprites pasted on scenes, with captions, composed from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from PIL import Image, ImageFilter

from mixofshow.bases.emojiland.library import Library
from mixofshow.bases.emojiland.scenes import CONCEPT_SCENES, PLAIN_SCENES, SCENES, Canvas, Scene, article, backdrop
from mixofshow.bases.emojiland.sprites import recolour, sprite
from mixofshow.bases.emojiland.vocabulary import CLASSES, GENERATOR_SETS

SIZE: Final = 64
"""Height of every picture, and width of the square ones, in pixels."""

WIDE: Final = 160
"""Width in pixels of wide pictures, which have room for three sprites."""

SPRITE_HEIGHT: Final = 0.56
"""How far down sprites stand on average, as a share of the height."""
SOFTNESS: Final = 0.65
"""Radius in pixels of the blur of blurred pictures: like a lens, it leaves no single-pixel detail."""

BLURRED_SHARE: Final = 0.15
CLASS_SHARE: Final = 0.5
TINTED_SHARE: Final = 0.2
TINTS: Final = {"rosy": 1 / 8, "minty": 1 / 3, "azure": 1 / 2, "violet": 3 / 4}
"""Recoloured sprites by the word for their turn on the colour wheel."""
STYLES: Final = {"noto": "noto", "fluent-emoji-flat": "fluent", "twemoji": "twemoji", "openmoji": "openmoji"}
"""The word for each icon set's drawing style."""

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
    softness: float = SOFTNESS,
) -> Picture:
    """A picture of the given (word, sprite) pairs, left to right, in the named scene; evenly spread if not `laid`.

    Its caption is short. `softness` is the radius of the blur in pixels.
    """
    image = draw_scene(scenes[scene], random, width=width)
    for (_, subject), place in zip(subjects, laid or places(random, len(subjects), width=width), strict=True):
        paste(image, subject, place)
    image = image.filter(ImageFilter.GaussianBlur(softness))
    words = tuple(word for word, _ in subjects)
    named = " and ".join(article(word) for word in words)
    caption = random.choice(["a photo of {}", "{}"]).format(named) + (f" {scene}" if scene else "")
    return Picture(image, caption, words, scene)


@dataclass(frozen=True)
class Thing:
    """What stands in a picture: its name, a sprite, the word for its tint ("" as drawn) and for its drawing style."""

    name: str
    sprite: Image.Image
    style: str
    tint: str = ""


def random_thing(random: Random, library: Library) -> Thing:
    """One of the 24 classes as often as any other of the library; one in five tinted."""
    if random.random() < CLASS_SHARE:
        name, icon_set = random.choice(list(CLASSES)), random.choice(GENERATOR_SETS)
        picture = sprite(icon_set, CLASSES[name])
    else:
        icon = library.choose(random)
        name, icon_set, picture = icon.name, icon.icon_set, icon.picture
    tint = random.choice(list(TINTS)) if random.random() < TINTED_SHARE else ""
    return Thing(name, recolour(picture, TINTS[tint]) if tint else picture, STYLES[icon_set], tint)


def random_scene(random: Random) -> tuple[str, Scene]:
    """Phrase and scene: mostly one of the places that captions name, else a background without end."""
    return random.choice(list(KNOWN_SCENES.items())) if random.random() < 0.7 else backdrop(random)


def random_picture(random: Random, library: Library, *, width: int = SIZE) -> Picture:
    """A picture of the pre-training world, square or wide: one to three things of different names, left to right.

    Half of the captions say all that varies. The others are short, as people write; but a tint and blur are always
    said, so that who says nothing gets a thing in its own colours, and crisp.
    """
    rooms = 1 if width == SIZE and random.random() < 2 / 3 else max(2, round(width / SIZE))
    count = rooms if rooms < 3 else random.choice((1, 2, 3, 3))
    taken = sorted(random.sample(range(rooms), count))
    things = _of_different_names(random, library, count)
    laid = [places(random, rooms, width=width)[k] for k in taken]
    spoken = random.random() < 0.5
    sizes, sides = [""] * count, [""] * count
    if rooms == 1:
        laid, sizes[0], sides[0] = _anywhere(laid, random)
    phrase, scene = random_scene(random)
    blurred = random.random() < BLURRED_SHARE
    named = [
        " ".join(filter(None, [size * spoken, thing.tint, thing.style * spoken, thing.name]))
        for thing, size in zip(things, sizes, strict=True)
    ]
    listed = " and ".join(f"{article(name)}{side * spoken}" for name, side in zip(named, sides, strict=True))
    opening = "a blurred photo of " if blurred else random.choice(("a photo of ", ""))
    picture = compose(
        [(thing.name, thing.sprite) for thing in things],
        phrase,
        random,
        scenes={phrase: scene},
        width=width,
        laid=laid,
        softness=SOFTNESS if blurred else 0,
    )
    placed = spoken or random.random() < 0.8
    return replace(picture, caption=f"{opening}{listed}{f' {phrase}' if placed else ''}")


def _of_different_names(random: Random, library: Library, count: int) -> list[Thing]:
    things: dict[str, Thing] = {}
    while len(things) < count:
        thing = random_thing(random, library)
        things.setdefault(thing.name, thing)
    return list(things.values())


def _anywhere(laid: list[Placement], random: Random) -> tuple[list[Placement], str, str]:
    """A lone sprite in one of three sizes and three places, half of the time as it stands; the words for both."""
    (place,) = laid
    if random.random() < 0.5:
        return laid, "", ""
    size, factor = random.choice((("small", 0.62), ("", 1.0), ("large", 1.3)))
    word, shift = random.choice((("left", -1), ("middle", 0), ("right", 1)))
    side = round(factor * place.side)
    reach = max(0.0, (SIZE - side) / 2)
    return [replace(place, x=SIZE / 2 + shift * reach, side=side)], size, f" {'in' if not shift else 'on'} the {word}"


def random_subjects(random: Random, count: int) -> list[tuple[str, Image.Image]]:
    """(word, sprite) pairs of different classes, each from either of the generator's icon sets."""
    words = random.sample(list(CLASSES), count)
    return [(word, sprite(random.choice(GENERATOR_SETS), CLASSES[word])) for word in words]
