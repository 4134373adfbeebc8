"""Concepts for tuning: characters, objects and places that the generator has never seen, as folders of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from PIL import Image

from mixofshow.bases.emojiland.scenes import CONCEPT_SCENES
from mixofshow.bases.emojiland.sprites import ICON_SIZE, recolour, sprite
from mixofshow.bases.emojiland.vocabulary import CLASSES, GENERATOR_SETS
from mixofshow.bases.emojiland.world import KNOWN_SCENES, Picture, compose
from mixofshow.errors import BadInputError, nearest

TRAINING_PICTURES: Final = 8
REFERENCE_PICTURES: Final = 12


@dataclass(frozen=True)
class Subject:
    """A character or object: an icon of a set kept for concepts, recoloured (`turn` of the colour wheel) or dressed."""

    class_word: str
    icon_set: str
    icon: str
    turn: float = 0.0
    accessory: str = ""

    def picture(self) -> Image.Image:
        """The sprite, RGBA."""
        image = sprite(self.icon_set, self.icon).copy()
        if self.turn:
            image = recolour(image, self.turn)
        if self.accessory:
            side = ICON_SIZE // 2
            worn = sprite(self.icon_set, self.accessory).resize((side, side), Image.Resampling.LANCZOS)
            top = 0 if self.accessory != "sunglasses" else ICON_SIZE // 4
            image.alpha_composite(worn, ((ICON_SIZE - side) // 2, top))
        return image


CHARACTERS: Final = {
    "mintcat": Subject("cat", "twemoji", "cat-face", turn=0.35),
    "reddog": Subject("dog", "twemoji", "dog-face"),
    "bluedog": Subject("dog", "twemoji", "dog-face", turn=0.6),
    "golddog": Subject("dog", "openmoji", "dog-face"),
    "foxy": Subject("dog", "twemoji", "fox"),
    "robot": Subject("cook", "twemoji", "robot"),
    "alien": Subject("man", "twemoji", "alien"),
    "greencop": Subject("officer", "twemoji", "police-officer", turn=0.75),
    "bowpig": Subject("pig", "twemoji", "pig-face", turn=0.6, accessory="ribbon"),
    "redogre": Subject("ninja", "twemoji", "ogre"),
    "clown": Subject("cook", "twemoji", "clown-face"),
    "martian": Subject("man", "openmoji", "alien"),
    "phantom": Subject("ninja", "twemoji", "ghost"),
    "dino": Subject("panda", "twemoji", "t-rex"),
    "kraken": Subject("penguin", "twemoji", "octopus"),
    "droid": Subject("ninja", "openmoji", "robot"),
    "wyrm": Subject("penguin", "twemoji", "dragon-face"),
    "owlet": Subject("penguin", "openmoji", "owl"),
}
OBJECTS: Final = {
    "blueguitar": Subject("guitar", "twemoji", "guitar", turn=0.6),
    "greenhouse": Subject("house", "twemoji", "house", turn=0.3),
    "teapot": Subject("gift", "twemoji", "teapot"),
    "trophy": Subject("crown", "twemoji", "trophy"),
    "backpack": Subject("gift", "twemoji", "backpack"),
    "bluecar": Subject("car", "openmoji", "automobile", turn=0.6),
    "pizzaslice": Subject("mushroom", "twemoji", "pizza"),
    "burger": Subject("mushroom", "openmoji", "hamburger"),
    "donut": Subject("gift", "twemoji", "doughnut"),
    "steamtrain": Subject("car", "twemoji", "locomotive"),
    "chopper": Subject("car", "openmoji", "helicopter"),
    "yacht": Subject("house", "twemoji", "sailboat"),
    "rocketship": Subject("guitar", "openmoji", "rocket"),
    "jack": Subject("mushroom", "openmoji", "jack-o-lantern"),
    "cactus": Subject("guitar", "twemoji", "cactus"),
}
NEW_TO_THE_BASE: Final = (
    *("redogre", "clown", "martian", "phantom", "dino", "kraken", "droid", "wyrm", "owlet"),
    *("pizzaslice", "burger", "donut", "steamtrain", "chopper", "yacht", "rocketship", "jack", "cactus"),
)
"""Things unlike their class word, so that what tuning adds can be told from what the base draws anyway."""
SCENES: Final = {
    # concept -> the class word, a place that the generator knows and that is said after "in the"
    "volcano": "mountains",
    "candy-land": "forest",
    "alien-planet": "desert",
    "rainbow-meadow": "mountains",
}
SUBJECTS: Final = {**CHARACTERS, **OBJECTS}
ALL: Final = (*SUBJECTS, *SCENES)


def class_word(name: str) -> str:
    """The ordinary word for a concept's kind."""
    return SCENES[name] if name in SCENES else SUBJECTS[name].class_word


def write_concept(name: str, folder: Path, *, seed: int = 0) -> None:
    """Write training pictures with captions to `folder`/train and held-out pictures to `folder`/reference."""
    if name not in ALL:
        raise BadInputError(f"Emojiland has no concept '{name}'{nearest(name, ALL)}")
    for part, count, offset in (("train", TRAINING_PICTURES, 0), ("reference", REFERENCE_PICTURES, 1)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(concept_pictures(name, count, seed=2 * seed + offset)):
            path = folder / part / f"{number:02d}.png"
            picture.image.save(path)
            path.with_suffix(".txt").write_text(picture.caption + "\n")


def concept_pictures(name: str, count: int, *, seed: int) -> Sequence[Picture]:
    """Seeded pictures of a concept, captions naming it `<name>`; subjects in known places, places with known subjects."""
    random = Random(f"{name} {seed}")
    if name in SCENES:
        phrase = f"in the <{name}>"
        words = random.sample(list(CLASSES), count)
        pairs = [(word, sprite(random.choice(GENERATOR_SETS), CLASSES[word])) for word in words]
        return [compose([pair], phrase, random, scenes={phrase: CONCEPT_SCENES[name]}) for pair in pairs]
    pair = (f"<{name}>", SUBJECTS[name].picture())
    scenes = random.sample(list(KNOWN_SCENES), count)
    return [compose([pair], scene, random) for scene in scenes]
