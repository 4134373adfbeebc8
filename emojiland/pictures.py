"""What the networks learn from: pictures of any things of the library on any ground, with captions, from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from PIL import Image

from emojiland.backdrops import backdrop
from emojiland.library import Library
from mixofshow.bases.emojiland.scenes import Scene, article
from mixofshow.bases.emojiland.sprites import recolour, sprite
from mixofshow.bases.emojiland.vocabulary import CLASSES, GENERATOR_SETS
from mixofshow.bases.emojiland.world import KNOWN_SCENES, SIZE, SOFTNESS, TINTS, Picture, Placement, compose, places

BLURRED_SHARE: Final = 0.15
CLASS_SHARE: Final = 0.6
SINGLE_SHARE: Final = 0.5
"""How many square pictures show one thing; the others show two, which are small and so need more practice."""
TINTED_SHARE: Final = 0.2
STYLES: Final = {"noto": "noto", "fluent-emoji-flat": "fluent", "twemoji": "twemoji", "openmoji": "openmoji"}
"""The word for each icon set's drawing style."""


@dataclass(frozen=True)
class Thing:
    """What stands in a picture: its name, a sprite, the word for its tint ("" as drawn) and for its drawing style."""

    name: str
    sprite: Image.Image
    style: str
    tint: str = ""


def random_thing(random: Random, library: Library) -> Thing:
    """One of the 24 classes more often than any other of the library; one in five tinted."""
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
    rooms = 1 if width == SIZE and random.random() < SINGLE_SHARE else max(2, math.ceil(width / SIZE))
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
