"""The maintainer's library: all suitable icons of whole sets, which the networks learn from and the package does not ship.

    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat     # and unpack each
    python -m emojiland icons FOLDER_WITH_UNPACKED_PACKAGES

writes one `.npz` for each set into the run's folder. Names are the sets' own, in words.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
from PIL import Image

from mixofshow.bases.emojiland.sprites import sprite
from mixofshow.bases.emojiland.vocabulary import CLASSES, FURTHER_CLASSES, GENERATOR_SETS
from mixofshow.errors import BadInputError

UNSUITABLE: Final = re.compile(
    r"skin-tone|^flags?-|family|keycap|button$|(o-clock|oclock|thirty)$|zodiac|letter|^(digit|number)-|^\d+$|squared"
    r"|japanese|-square|circle$|diamond$|sign$|-mark$|arrow|symbol|-room$|^no-|^(a|b|ab|o|cl|ok|up|new|free|cool|sos|id)$"
    r"|^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus)$"
    r"|^(plus|minus|multiply|divide|infinity|registered|copyright|trade-mark|asterisk|hash|pound|bald|.*-haired)$"
    r"|couple|kiss-|people|holding-hands|men-|women-|-tone|-dark$|-light$|-medium$"
)
"""What is no picture of a thing (letters, signs), or one of many that hardly differ (skin tones, families, clocks)."""


@dataclass(frozen=True)
class Icon:
    """A thing's name, in words, the set that drew it, and its picture, RGBA and square."""

    name: str
    icon_set: str
    picture: Image.Image


class Library:
    """The icons of some sets."""

    def __init__(self, icons: list[Icon]) -> None:
        self.icons = icons

    @classmethod
    def load(cls, folder: Path, sets: tuple[str, ...] = GENERATOR_SETS) -> Library:
        """Of the named sets, as `write` left them in the folder."""
        icons: list[Icon] = []
        for icon_set in sets:
            path = folder / f"{icon_set}.npz"
            if not path.exists():
                raise BadInputError(f"{path}: not there; `python -m emojiland icons` makes it")
            with np.load(path) as file:
                icons += [
                    Icon(str(name), icon_set, Image.fromarray(pixels, "RGBA"))
                    for name, pixels in zip(file["names"], file["pictures"], strict=True)
                ]
        return cls(icons)

    @classmethod
    def shipped(cls, sets: tuple[str, ...] = GENERATOR_SETS) -> Library:
        """Of the icons in the package, under their class words."""
        words = {**CLASSES, **FURTHER_CLASSES}
        return cls([Icon(word, icon_set, sprite(icon_set, icon)) for icon_set in sets for word, icon in words.items()])

    def choose(self, random: Random) -> Icon:
        """Any of them."""
        return random.choice(self.icons)


def write(packages: Path, folder: Path, sets: tuple[str, ...] = GENERATOR_SETS) -> dict[str, int]:
    """Draw every suitable icon of the unpacked packages once; returns how many of each set."""
    from emojiland.vendor_icons import rasterize

    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for icon_set in sets:
        (root,) = packages.glob(f"iconify-json-{icon_set}-[0-9]*/package")
        package = json.loads((root / "icons.json").read_text())
        names = [name for name in sorted(package["icons"]) if not UNSUITABLE.search(name)]
        pictures = np.stack([np.asarray(rasterize(package, name)) for name in names])
        np.savez_compressed(
            folder / f"{icon_set}.npz", names=np.array([name.replace("-", " ") for name in names]), pictures=pictures
        )
        counts[icon_set] = len(names)
    return counts
