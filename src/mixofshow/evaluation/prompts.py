"""Prompts that concepts are evaluated on. `{}` stands for the concept (or, for the bounds, its class word)."""

from __future__ import annotations

from typing import Final

EMOJILAND: Final = {
    "subject": (
        "a photo of a {} on the beach",
        "a photo of a {} in the forest",
        "a photo of a {} in the snow",
        "a photo of a {} in the desert",
        "a photo of a {} in the city",
        "a photo of a {} at night",
        "a photo of a {} under the sea",
        "a photo of a {} in the mountains",
    ),
    "scene": (
        "a photo of a cat in the {}",
        "a photo of a man in the {}",
        "a photo of a car in the {}",
        "a photo of a penguin in the {}",
        "a photo of a crown in the {}",
        "a photo of a cook in the {}",
        "a photo of a frog in the {}",
        "a photo of a gift in the {}",
    ),
}
"""Prompts for the embedded base, in its own words."""

GENERAL: Final = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} in the jungle",
    "a photo of a {} in front of a castle",
    "a photo of a {} on a city street",
    "a photo of a {} at night",
    "a photo of a {} on a white background",
    "a painting of a {}",
    "a photo of a {} near a river",
)
"""Prompts for any other base."""


def prompts_for(base: str, kind: str) -> tuple[str, ...]:
    """The prompts for a base by name and a kind of concept, "subject" or "scene"."""
    return EMOJILAND[kind] if base == "emojiland" else GENERAL
