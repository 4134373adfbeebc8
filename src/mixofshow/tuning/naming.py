"""How captions name the concept: by its placeholder, or by a word for what it is, which the placeholder then replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from mixofshow.errors import DatasetError, shown

ANY_WORD: Final = re.compile(r"<[^<>\s]{1,64}>")
"""What prompts take for a placeholder."""
_JOINT: Final = r"[\s_-]+"


@dataclass(frozen=True)
class Naming:
    """The concept's placeholder, the words that stand for it, and the ordinary words for what it is.

    Case counts nowhere, as in text encoders; nor whether parts of a word are joined by blanks, "-" or "_".
    """

    placeholder: str
    words: tuple[str, ...]
    class_words: tuple[str, ...]

    @cached_property
    def _class_word(self) -> re.Pattern[str]:
        spelled = (_JOINT.join(map(re.escape, re.split(_JOINT, word.strip()))) for word in self.class_words)
        return re.compile(rf"(?<!\w)(?:{'|'.join(spelled)})(?!\w)", re.IGNORECASE)

    def named(self, caption: str) -> str:
        """The caption, naming the concept: as it is if it does, else with the class word replaced. Raises DatasetError."""
        own = {self.placeholder, *self.words}
        there = {word.lower() for word in ANY_WORD.findall(caption)}
        if strange := sorted(there - own):
            raise DatasetError(f"caption '{shown(caption)}' names {strange[0]}, which is no word of {self.placeholder}")
        if there:
            return caption
        named, count = self._class_word.subn(lambda _: self.placeholder, caption, count=1)
        if not count:
            raise DatasetError(
                f"caption '{shown(caption)}' names neither {self.placeholder} nor its class word "
                f"'{self.class_words[0]}'{self._hint(caption)}"
            )
        return named

    def _hint(self, caption: str) -> str:
        """What to do about it, if the caption has a word that is nearly one of them."""
        of_it = re.findall(rf"\w*(?:{'|'.join(map(re.escape, self.class_words))})\w*", caption, re.IGNORECASE)
        return f"; '{of_it[0]}' counts with --captions.synonyms {of_it[0]}" if of_it else "; write one of them into it"


def naming_of(placeholder: str, words: Iterable[str], class_word: str, synonyms: str | None = None) -> Naming:
    """The naming of a concept, with more words for what it is, separated by commas."""
    more = [word.strip() for word in (synonyms or "").split(",") if word.strip()]
    return Naming(placeholder, tuple(words), (class_word, *more))
