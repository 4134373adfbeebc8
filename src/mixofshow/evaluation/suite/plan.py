"""Which pictures a suite needs: of the base, of each single concept, and of all concepts fused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Final

from mixofshow.evaluation.suite.settings import ConceptEntry, Suite
from mixofshow.evaluation.suite.work import Model, Request
from mixofshow.sampling.settings import Composition, RegionEntry

MARGINS: Final = (1 / 80, 3 / 32, 1 / 80, 1 / 32)
"""Left, top, right, bottom of a wide picture that belong to no region, in shares."""
WIDE: Final = 2.5
"""Width of wide pictures over their height."""


@dataclass(frozen=True)
class Asked:
    """A request for a concept, its category, and what the pictures should show in ordinary words."""

    category: str
    plain: str
    request: Request


Arm = Mapping[str, tuple[Asked, ...]]
"""What one way of drawing is asked for, by concept; in the same order for all arms."""


@dataclass(frozen=True)
class Together:
    """A wide picture: whose concepts stand in it, and in which boxes of pixels."""

    names: tuple[str, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    request: Request


@dataclass(frozen=True)
class Models:
    """What draws: the base, and by method each single concept, those at alpha 0, and the fused models."""

    base: Model
    single: Mapping[str, Mapping[str, Model]]
    words_only: Mapping[str, Mapping[str, Model]]
    fused: Mapping[str, Model]


@dataclass(frozen=True)
class Plan:
    """All requests, by what they are for."""

    bounds: Arm
    single: Mapping[str, Arm]
    words_only: Mapping[str, Arm]
    fused: Mapping[str, Arm]
    together: Mapping[str, tuple[Together, ...]]
    base_without: tuple[Request, ...]
    fused_without: Mapping[str, tuple[Request, ...]]

    def requests(self) -> list[Request]:
        """Every request once."""
        arms = (self.bounds, *self.single.values(), *self.words_only.values(), *self.fused.values())
        alone = (asked.request for arm in arms for row in arm.values() for asked in row)
        wide = (one.request for row in self.together.values() for one in row)
        without = chain(self.base_without, *self.fused_without.values())
        return list(dict.fromkeys(chain(alone, wide, without)))


def make_plan(suite: Suite, models: Models, *, side: int) -> Plan:
    """The pictures of a suite; `side` is the base's own, in pixels."""

    def arm(by_concept: Mapping[str, Model]) -> Arm:
        return {one.name: tuple(_asked(suite, one, by_concept[one.name], noun=one.noun)) for one in suite.concepts}

    def fused(model: Model) -> Arm:
        return arm({one.name: model for one in suite.concepts})

    return Plan(
        bounds={one.name: tuple(_asked(suite, one, models.base, noun=one.class_word)) for one in suite.concepts},
        single={key: arm(row) for key, row in models.single.items()},
        words_only={key: arm(row) for key, row in models.words_only.items()},
        fused={key: fused(model) for key, model in models.fused.items()},
        together={key: tuple(_together(suite, model, side)) for key, model in models.fused.items()},
        base_without=_without(suite, models.base),
        fused_without={key: _without(suite, model) for key, model in models.fused.items()},
    )


def _asked(suite: Suite, concept: ConceptEntry, model: Model, *, noun: str) -> Iterator[Asked]:
    for category, prompts in suite.prompts_of(concept.prompt_kind).items():
        for prompt in prompts:
            yield Asked(category, prompt.format(concept.class_word), _request(suite, model, prompt.format(noun)))


def _request(suite: Suite, model: Model, prompt: str) -> Request:
    drawn = Composition(
        prompt=prompt,
        seed=suite.seed,
        num=suite.images_per_prompt,
        steps=suite.steps,
        guidance_scale=suite.guidance_scale,
    )
    return Request(model, drawn)


def _without(suite: Suite, model: Model) -> tuple[Request, ...]:
    return tuple(_request(suite, model, prompt) for prompt in suite.without_concepts())


def _together(suite: Suite, model: Model, side: int) -> Iterator[Together]:
    known = {concept.name: concept for concept in suite.concepts}
    width, height = int(WIDE * side) // 8 * 8, side
    for number, names in enumerate(suite.compositions.together):
        place = suite.compositions.places[number % len(suite.compositions.places)]
        concepts, boxes = [known[name] for name in names], columns(len(names), width, height)
        regions = tuple(
            RegionEntry(box=box, prompt=_region_prompt(suite.base, concepts, own, place))
            for own, box in enumerate(boxes)
        )
        wanted = Composition(
            prompt=_listed([one.noun for one in concepts], place),
            regions=regions,
            width=width,
            height=height,
            seed=suite.seed,
            num=suite.compositions.images,
            steps=suite.steps,
            guidance_scale=suite.guidance_scale,
        )
        yield Together(names, boxes, Request(model, wanted))


def columns(count: int, width: int, height: int) -> tuple[tuple[int, int, int, int], ...]:
    """Boxes of pixels side by side that share a wide picture's width."""
    left, top, right, bottom = MARGINS
    share = (1 - left - right) / count
    edges = [round((left + number * share) * width) for number in range(count + 1)]
    return tuple((start, round(top * height), end, round((1 - bottom) * height)) for start, end in pairwise(edges))


def _region_prompt(base: str, concepts: Sequence[ConceptEntry], own: int, place: str) -> str:
    """The concept alone; on Emojiland among things of its own class.

    That base takes from a caption how many things a wide picture shows, and draws them from left to right.
    """
    if base != "emojiland":
        return _listed([concepts[own].noun], place)
    one = concepts[own]
    return _listed([one.noun if number == own else one.class_word for number in range(len(concepts))], place)


def _listed(nouns: Sequence[str], place: str) -> str:
    return f"a photo of {' and '.join(f'a {noun}' for noun in nouns)} {place}".strip()
