"""Prompts that concepts are evaluated on, by category. `{}` stands for the concept (or, for the bounds, its class word).

Twenty for each kind of concept, as in Mix-of-Show §4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ByCategory = Mapping[str, tuple[str, ...]]

EMOJILAND: Final[Mapping[str, ByCategory]] = {
    "subject": {
        "context": (
            "a photo of a {} on the beach",
            "a photo of a {} in the forest",
            "a photo of a {} in the desert",
            "a photo of a {} in the city",
            "a photo of a {} in the mountains",
        ),
        "style": (  # not the backgrounds that fusion records by default
            "a {} on a green background",
            "a {} on a yellow background",
            "a {} on a white background",
            "a photo of a {} on a green background",
            "a photo of a {} on a yellow background",
        ),
        "interaction": (
            "a photo of a {} and a cat in the forest",
            "a photo of a {} and a man on the beach",
            "a photo of a {} and a gift in the snow",
            "a photo of a penguin and a {} in the city",
            "a photo of a mushroom and a {} in the mountains",
        ),
        "attribute": (
            "a photo of a {} at night",
            "a photo of a {} in the snow",
            "a photo of a {} under the sea",
            "a {} at night",
            "a {} in the snow",
        ),
    },
    "scene": {
        "context": (
            "a photo of a cat in the {}",
            "a photo of a man in the {}",
            "a photo of a penguin in the {}",
            "a photo of a cook in the {}",
            "a photo of a frog in the {}",
            "a photo of a ninja in the {}",
            "a photo of a rabbit in the {}",
        ),
        "interaction": (
            "a photo of a cat and a dog in the {}",
            "a photo of a man and a guitar in the {}",
            "a photo of a woman and a pig in the {}",
            "a photo of a car and a house in the {}",
            "a photo of a lion and a panda in the {}",
            "a photo of a cook and an apple in the {}",
        ),
        "attribute": (
            "a car in the {}",
            "a crown in the {}",
            "a gift in the {}",
            "a mushroom in the {}",
            "a house in the {}",
            "an umbrella in the {}",
            "a guitar in the {}",
        ),
    },
}
"""For the embedded base, in its own words. It knows no styles and no adjectives: plain backgrounds stand for style,
light and weather for attributes; of places, what stands in them."""

GENERAL: Final[Mapping[str, ByCategory]] = {
    "subject": {
        "context": (
            "a photo of a {} on the beach",
            "a photo of a {} in the snow",
            "a photo of a {} in the jungle",
            "a photo of a {} in front of the Eiffel tower",
            "a photo of a {} on a city street at night",
        ),
        "style": (
            "an oil painting of a {}",
            "a watercolor painting of a {}",
            "a pencil sketch of a {}",
            "a pixel art picture of a {}",
            "a {} in the style of an anime",
        ),
        "interaction": (
            "a photo of a {} next to a dog",
            "a photo of a {} beside a red car",
            "a photo of a {} on top of a wooden table",
            "a photo of a child looking at a {}",
            "a photo of a {} near a river with a boat",
        ),
        "attribute": (
            "a photo of a {} with a hat",
            "a photo of a {} with a rainbow scarf",
            "a photo of a {} wearing sunglasses",
            "a photo of a wet {}",
            "a close-up photo of a {} made of wood",
        ),
    },
    "scene": {
        "context": (
            "a photo of a {}",
            "a photo of a {} at sunset",
            "a photo of a {} at night",
            "an aerial photo of a {}",
            "a wide photo of a {} seen from far away",
        ),
        "style": (
            "an oil painting of a {}",
            "a watercolor painting of a {}",
            "a pencil sketch of a {}",
            "a pixel art picture of a {}",
            "a {} in the style of an anime",
        ),
        "interaction": (
            "a photo of a dog in a {}",
            "a photo of a man standing in a {}",
            "a photo of a red car in a {}",
            "a photo of a child playing in a {}",
            "a photo of a table and two chairs in a {}",
        ),
        "attribute": (
            "a photo of a {} covered with snow",
            "a photo of a {} in the rain",
            "a photo of a {} in autumn",
            "a photo of a {} in thick fog",
            "a photo of a {} overgrown with flowers",
        ),
    },
}
"""For any other base: what is usually asked of characters, objects and places."""

WITHOUT_CONCEPTS: Final[Mapping[str, tuple[str, ...]]] = {
    "emojiland": (
        "a photo of a cat on the beach",
        "a photo of an astronaut in the snow",
        "a photo of a guitar in the city",
        "a photo of a police officer at night",
        "a photo of a mushroom in the forest",
        "a photo of a panda under the sea",
        "a photo of a woman and a dog in the mountains",
        "a house on a red background",
    ),
    "general": (
        "a photo of a cat on the beach",
        "a photo of an astronaut in the snow",
        "a photo of a guitar on a chair",
        "a photo of a man in a suit",
        "a photo of a bowl of fruit",
        "a landscape with mountains and a lake",
        "an oil painting of a ship",
        "a photo of a street at night",
    ),
}
"""Prompts that ask for no concept: what fusion should leave as it was."""


def prompts_by_category(base: str, kind: str) -> ByCategory:
    """The prompts for a base by name and a kind of concept, "subject" or "scene"."""
    return (EMOJILAND if base == "emojiland" else GENERAL)[kind]


def prompts_for(base: str, kind: str) -> tuple[str, ...]:
    """The same in one list."""
    return tuple(prompt for prompts in prompts_by_category(base, kind).values() for prompt in prompts)


def prompts_without_concepts(base: str) -> tuple[str, ...]:
    """Those that ask for no concept."""
    return WITHOUT_CONCEPTS["emojiland" if base == "emojiland" else "general"]
