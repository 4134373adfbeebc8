"""The shelf of concepts: what their files say of themselves, taking in strangers' files, and portraits."""

from __future__ import annotations

import contextlib
import filecmp
import functools
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from mixofshow.concepts.concept import load_concept
from mixofshow.concepts.syntax import ANY_WORD
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import MixOfShowError, shown
from mixofshow.sampling.settings import Composition
from mixofshow.studio.workspace import Workspace, changed_at

logger = logging.getLogger(__name__)
LETTERS: Final = re.compile(r"[^a-z0-9_-]+")


@dataclass(frozen=True)
class Card:
    """What the page shows of a concept file. All of it but `path` is a stranger's; `word` is what prompts call it."""

    name: str
    words: tuple[str, ...]
    class_word: str
    path: Path
    base: str = ""
    method: str = ""
    author: str | None = None
    license: str | None = None
    size: int = 0
    portrait: Path | None = None

    @property
    def word(self) -> str:
        """As it is typed."""
        return f"<{self.name}>"

    @property
    def facts(self) -> str:
        """What there is to say of it, in one line."""
        parts = (
            f"{self.word}, a {self.class_word}",
            f"words {' '.join(self.words)}" if self.words != (self.word,) else "",
            f"by {shown(self.author)}" if self.author else "",
            shown(self.license) if self.license else "",
            f"{self.size / 2**20:.2f} MB",
            f"for {shown(self.base)}",
            self.method,
        )
        return " · ".join(part for part in parts if part)


def cards(workspace: Workspace) -> list[Card]:
    """A card for each concept file in the workspace that can be read."""
    return [card for path in workspace.concept_files() if (card := _card(path, changed_at(path), _portrait(path)))]


def unreadable(workspace: Workspace) -> list[str]:
    """What is wrong with the others, a line each."""
    return [said for path in workspace.concept_files() if (said := _problem(path, changed_at(path)))]


def _portrait(path: Path) -> Path | None:
    portrait = path.with_suffix(".png")
    return portrait if portrait.is_file() else None


@functools.lru_cache(maxsize=1000)
def _card(path: Path, changed: int, portrait: Path | None) -> Card | None:
    try:
        info, size = load_concept(path).info, path.stat().st_size
    except (MixOfShowError, OSError):
        return None
    return Card(
        info.name,
        info.words,
        shown(info.class_word),
        path,
        base=info.base,
        method=shown(info.method),
        author=info.author,
        license=info.license,
        size=size,
        portrait=portrait,
    )


@functools.lru_cache(maxsize=1000)
def _problem(path: Path, changed: int) -> str:
    try:
        load_concept(path)
    except MixOfShowError as error:
        return str(error)
    return ""


def known_words(shelf: Sequence[Card]) -> Vocabulary:
    """The words that prompts may use, to check prompts by; their vectors are empty."""
    words = dict.fromkeys((word for card in shelf for word in card.words), torch.empty(0))
    return Vocabulary(words, {card.word: card.words for card in shelf if card.word not in words})


def named_in(composition: Composition, shelf: Sequence[Card]) -> list[Card]:
    """The cards whose words stand in the composition's prompts, in the shelf's order."""
    found = {word.lower() for text in composition.texts for word in ANY_WORD.findall(text)}
    return [card for card in shelf if found & {card.word, *card.words}]


def file_name(text: str, taken: Sequence[str] = ()) -> str:
    """A name for a concept out of whatever a file is called, that is not taken yet."""
    plain = LETTERS.sub("-", text.lower()).strip("-_")[:24] or "concept"
    names = (plain, *(f"{plain}-{number}" for number in range(2, 10_000)))
    return next(name for name in names if name not in taken)


def taken_in(workspace: Workspace, source: Path, called: str, settings: dict[str, Any]) -> list[str]:
    """A concept file, or another tool's LoRA or embedding, onto the shelf: as `mixofshow convert` does it.

    Returns what came of it in lines. Raises as `convert` does.
    """
    from mixofshow.bases.loading import load_base
    from mixofshow.concepts.interchange.convert import check_target, convert
    from mixofshow.concepts.interchange.importing import read_ahead
    from mixofshow.concepts.interchange.settings import ConvertSettings

    ahead = read_ahead(source)
    name = settings.get("name") or (ahead.info.name if ahead else file_name(Path(called).stem))
    chosen = ConvertSettings.of(settings if ahead else {**settings, "name": name}, "options")
    target = workspace.concepts / f"{name}.safetensors"
    check_target(source, target, chosen)
    with replacing(workspace, target):
        return convert(source, target, load_base(workspace.base, **workspace.loading), chosen)


def put_aside(workspace: Workspace, words: Sequence[str]) -> list[str]:
    """Move the files of the concepts that prompts call so into the folder `removed`; returns their new names there."""
    moved = []
    for card in cards(workspace):
        if card.word in words:
            target = _place_aside(workspace, card.name)
            card.path.rename(target)
            _portrait_along(card.path, target)
            moved.append(target.name)
    return moved


@contextlib.contextmanager
def replacing(workspace: Workspace, file: Path) -> Iterator[None]:
    """Inside, a concept's file may be replaced by another of its name; it is in the folder `removed` then, which is said."""
    if not file.is_file():
        yield
        return
    aside = _place_aside(workspace, file.stem)
    shutil.copy2(file, aside)
    try:
        yield
    finally:
        if filecmp.cmp(file, aside, shallow=False):
            aside.unlink()
        else:
            _portrait_along(file, aside)
            logger.warning("<%s> was there before; that one is %s now", file.stem, workspace.shown(aside))


def _place_aside(workspace: Workspace, name: str) -> Path:
    removed = workspace.folder / "removed"
    removed.mkdir(exist_ok=True)
    return removed / f"{file_name(name, [path.stem for path in removed.iterdir()])}.safetensors"


def _portrait_along(file: Path, target: Path) -> None:
    if portrait := _portrait(file):
        portrait.rename(target.with_suffix(".png"))


def put_on(workspace: Workspace, sources: Sequence[Path]) -> None:
    """Copies of concept files onto the shelf; one that is there already stays. Raises ConceptFileError, TokenError."""
    workspace.open()
    for source in sources:
        concept = load_concept(source)
        target = workspace.concepts / f"{concept.info.name}.safetensors"
        if not target.exists():
            concept.save(target)
