"""What a region's prompt lacks, said at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from mixofshow.errors import TokenError
from mixofshow.sampling.settings import Composition, Region
from mixofshow.studio.shelf import Card, known_words

COUNTS_THINGS: Final = ("emojiland",)
"""Bases that take from a caption how many things a wide picture shows, from left to right."""
AND: Final = re.compile(r"\band\b")


def advice(composition: Composition, shelf: Sequence[Card], base: str) -> list[str]:
    """A line for each region, empty where nothing is missing."""
    known, row = known_words(shelf), _row(composition)
    places = {number: place for place, number in enumerate(row)} if base in COUNTS_THINGS and len(row) > 1 else {}

    def line(number: int, region: Region) -> str:
        """What one region lacks."""
        if not region.prompt.strip():
            return "Say what is in this region."
        try:
            known.split(region.prompt)
        except TokenError as error:
            return str(error)
        card = card_of(region, shelf)
        if card is None:
            return "No concept's name is in this prompt; the base alone draws it." if shelf else ""
        if number in places and len(AND.split(region.prompt)) < len(row):
            wish = completed_prompt(card, places[number], len(row))
            return f"This base reads how many things there are from each prompt. Name all {len(row)}, as: {wish}"
        return ""

    return [line(number, region) for number, region in enumerate(composition.regions)]


def card_of(region: Region, shelf: Sequence[Card]) -> Card | None:
    """The concept that a region's prompt names first, in whatever case."""
    prompt = region.prompt.lower()
    found = [(place, card) for card in shelf for word in (card.word, *card.words) if (place := prompt.find(word)) >= 0]
    return min(found, key=lambda one: one[0])[1] if found else None


def completed_prompt(card: Card, place: int, count: int, scene: str = "") -> str:
    """The concept at its place in a row, and its class word at the other places."""
    things = [f"a {card.word if number == place else card.class_word}" for number in range(count)]
    return f"a photo of {' and '.join(things)}{f' {scene}' if scene else ''}"


def completed(composition: Composition, shelf: Sequence[Card], base: str, scene: str) -> Composition:
    """The composition with prompts written for all boxes that name a concept, and for the whole picture."""
    row = _row(composition)
    named = {number: card for number in row if (card := card_of(composition.regions[number], shelf))}
    row = [number for number in row if number in named]
    if not row:
        return composition
    counting = base in COUNTS_THINGS
    regions = list(composition.regions)
    for place, number in enumerate(row):
        where = (place, len(row)) if counting else (0, 1)
        regions[number] = replace(regions[number], prompt=completed_prompt(named[number], *where, scene))
    things = " and ".join(f"a {named[number].word}" for number in row)
    prompt = f"a photo of {things}{f' {scene}' if scene else ''}"
    return composition.model_copy(update={"regions": tuple(regions), "prompt": prompt})


def _row(composition: Composition) -> list[int]:
    """The regions' numbers from left to right, by their middles; masks are in no row."""
    middles = {number: _middle(one) for number, one in enumerate(composition.regions) if one.mask is None}
    return sorted(middles, key=middles.__getitem__)


def _middle(region: Region) -> float:
    xs = [region.box[0], region.box[2]] if region.box else [x for x, _ in region.polygon or ()]
    return sum(xs) / len(xs) if xs else 0.0
