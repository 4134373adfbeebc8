"""What Emojiland knows: its classes, the judge's further classes, and which icon set draws what."""

from __future__ import annotations

from typing import Final

CLASSES: Final[dict[str, str]] = {
    # class word(s) in captions -> icon name in every set
    "man": "man",
    "woman": "woman",
    "police officer": "police-officer",
    "cook": "cook",
    "astronaut": "astronaut",
    "ninja": "ninja",
    "firefighter": "firefighter",
    "santa": "santa-claus",
    "cat": "cat-face",
    "dog": "dog-face",
    "panda": "panda",
    "frog": "frog",
    "pig": "pig-face",
    "penguin": "penguin",
    "lion": "lion",
    "rabbit": "rabbit-face",
    "guitar": "guitar",
    "umbrella": "umbrella",
    "apple": "red-apple",
    "house": "house",
    "car": "automobile",
    "mushroom": "mushroom",
    "gift": "wrapped-gift",
    "crown": "crown",
}
"""The classes the generator is trained on."""

FURTHER_CLASSES: Final[dict[str, str]] = {
    "robot": "robot",
    "alien": "alien",
    "ghost": "ghost",
    "unicorn": "unicorn",
    "pumpkin": "jack-o-lantern",
    "dragon": "dragon-face",
    "octopus": "octopus",
    "owl": "owl",
    "tiger": "tiger-face",
    "koala": "koala",
    "snowman": "snowman",
    "backpack": "backpack",
    "camera": "camera",
    "trophy": "trophy",
    "diamond": "gem-stone",
    "teapot": "teapot",
    "rocket": "rocket",
    "clock": "alarm-clock",
    "cactus": "cactus",
    "fox": "fox",
    "bear": "bear",
    "monkey": "monkey-face",
    "builder": "construction-worker",
    "balloon": "balloon",
}
"""Classes that only the judge knows (and from which out-of-domain concepts are drawn)."""

ACCESSORIES: Final[dict[str, str]] = {"sunglasses": "sunglasses", "hat": "top-hat", "bow": "ribbon"}
"""Icons pasted onto others to tell two of one class apart."""

UNLIKE_CLASSES: Final = (
    "pizza",
    "hamburger",
    "locomotive",
    "helicopter",
    "ogre",
    "clown-face",
    "t-rex",
    "sailboat",
    "doughnut",
)
"""Icons of the sets kept for concepts, of kinds that are no class: food, vehicles, monsters, faces."""

GENERATOR_SETS: Final = ("noto", "fluent-emoji-flat")
CONCEPT_SETS: Final = ("twemoji", "openmoji")

ICONS_OF_SET: Final[dict[str, tuple[str, ...]]] = {
    icon_set: (
        *CLASSES.values(),
        *FURTHER_CLASSES.values(),
        *ACCESSORIES.values(),
        *(UNLIKE_CLASSES if icon_set in CONCEPT_SETS else ()),
    )
    for icon_set in (*GENERATOR_SETS, *CONCEPT_SETS)
}
