"""Which pictures a suite needs: of the base, of each single concept, and of all concepts fused.

What is made is named by a hash of all that made it. So a suite that was broken off goes on where it stopped, and suites
that share a folder share what they have in common.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final

from PIL import Image

from mixofshow.bases.loading import load_base
from mixofshow.errors import BadInputError
from mixofshow.evaluation.suite_settings import ConceptEntry, Suite
from mixofshow.sampling.settings import Composition, Region

VERSION: Final = 2
"""Of how things are made, as far as no setting tells; another one makes everything anew."""
MARGINS: Final = (1 / 80, 3 / 32, 1 / 80, 1 / 32)
"""Left, top, right, bottom of a wide picture that belong to no region, in shares."""
WIDE: Final = 2.5
"""Width of wide pictures over their height."""


def digest(table: Mapping[str, Any]) -> str:
    """Hex digits over a table of plain values and the version."""
    text = json.dumps({"version": VERSION, **table}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class BaseSource:
    """A base by its name, the device it is put on, and other options of `load_base`."""

    name: str
    device: str = "cpu"
    options: tuple[tuple[str, Any], ...] = ()

    def load(self) -> Any:
        """The pipeline; a process keeps the one that it had last."""
        return _loaded(self)


@lru_cache(maxsize=1)
def _loaded(base: BaseSource) -> Any:
    return load_base(base.name, device=base.device, **dict(base.options))


@dataclass(frozen=True)
class DrawnBy:
    """What draws: the base, with a concept's file at some strength, or with a delta file. `identity` hashes all that."""

    base: BaseSource
    identity: str
    concept: Path | None = None
    strength: float = 1.0
    delta: Path | None = None


@dataclass(frozen=True)
class ImageRequest:
    """Pictures wanted of a model: `composition.num` of them, in batches as large as fit."""

    model: DrawnBy
    composition: Composition

    def paths(self, folder: Path) -> list[Path]:
        """Where they are kept."""
        key = digest({"model": self.model.identity, "composition": self.composition.model_dump(mode="json")})
        return [folder / key[:2] / f"{key}-{number}.png" for number in range(self.composition.num)]

    def pictures(self, folder: Path) -> list[Image.Image]:
        """The pictures. Raises BadInputError for one that is damaged."""
        return [_read(path) for path in self.paths(folder)]


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise BadInputError(f"{path}: cannot be read as a picture; remove it, and it is drawn again") from error


@dataclass(frozen=True)
class PromptRequest:
    """A request for a concept, its category, and what the pictures should show in ordinary words."""

    category: str
    plain: str
    request: ImageRequest


Arm = Mapping[str, tuple[PromptRequest, ...]]
"""What one way of drawing is asked for, by concept; in the same order for all arms."""


@dataclass(frozen=True)
class WideRequest:
    """A wide picture: whose concepts stand in it, and in which boxes of pixels; a request for every seed.

    One at a time: in a batch, rounding depends on how many are drawn together, and `replay` could not draw them again.
    """

    names: tuple[str, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    requests: tuple[ImageRequest, ...]

    def pictures(self, folder: Path) -> list[Image.Image]:
        """One for every seed. Raises BadInputError for one that is damaged."""
        return [picture for one in self.requests for picture in one.pictures(folder)]


@dataclass(frozen=True)
class RequestPlan:
    """All requests, by what they are for and by method."""

    bounds: Arm
    single: Mapping[str, Arm]
    words_only: Mapping[str, Arm]
    fused: Mapping[str, Arm]
    together: Mapping[str, tuple[WideRequest, ...]]
    base_without: tuple[ImageRequest, ...]
    fused_without: Mapping[str, tuple[ImageRequest, ...]]

    def requests(self) -> list[ImageRequest]:
        """Every request once."""
        arms = (self.bounds, *self.single.values(), *self.words_only.values(), *self.fused.values())
        alone = (asked.request for arm in arms for row in arm.values() for asked in row)
        wide = (request for row in self.together.values() for one in row for request in one.requests)
        return list(dict.fromkeys(chain(alone, wide, self.base_without, *self.fused_without.values())))


def make_plan(
    suite: Suite,
    base: DrawnBy,
    *,
    single: Mapping[str, Mapping[str, DrawnBy]],
    words_only: Mapping[str, Mapping[str, DrawnBy]],
    fused: Mapping[str, DrawnBy],
    side: int,
) -> RequestPlan:
    """The pictures of a suite, by what draws them: by method each single concept, those at alpha 0, the fused models.

    `side` is the base's own, in pixels.
    """

    def arm(models: Mapping[str, DrawnBy]) -> Arm:
        return {one.name: tuple(_asked(suite, one, models[one.name], one.noun)) for one in suite.concepts}

    def without(model: DrawnBy) -> tuple[ImageRequest, ...]:
        return tuple(_request(suite, model, prompt) for prompt in suite.without_concepts())

    return RequestPlan(
        bounds={one.name: tuple(_asked(suite, one, base, one.class_word)) for one in suite.concepts},
        single={key: arm(models) for key, models in single.items()},
        words_only={key: arm(models) for key, models in words_only.items()},
        fused={key: arm(dict.fromkeys((one.name for one in suite.concepts), model)) for key, model in fused.items()},
        together={key: tuple(_together(suite, model, side)) for key, model in fused.items()},
        base_without=without(base),
        fused_without={key: without(model) for key, model in fused.items()},
    )


def _asked(suite: Suite, concept: ConceptEntry, model: DrawnBy, noun: str) -> Iterator[PromptRequest]:
    for category, prompts in suite.prompts_of(concept.prompt_kind).items():
        for prompt in prompts:
            yield PromptRequest(
                category, prompt.format(concept.class_word), _request(suite, model, prompt.format(noun))
            )


def _request(suite: Suite, model: DrawnBy, prompt: str, **more: Any) -> ImageRequest:
    how = {"steps": suite.steps, "guidance_scale": suite.guidance_scale, "num": suite.images_per_prompt}
    return ImageRequest(model, Composition(**{"prompt": prompt, "seed": suite.seed, **how, **more}))


def _together(suite: Suite, model: DrawnBy, side: int) -> Iterator[WideRequest]:
    known = {concept.name: concept for concept in suite.concepts}
    width, height = int(WIDE * side) // 8 * 8, side
    for number, names in enumerate(suite.compositions.together):
        place = suite.compositions.places[number % len(suite.compositions.places)]
        concepts = [known[name] for name in names]
        prompt, regions = _listed([one.noun for one in concepts], place), tuple[Region, ...]()
        boxes = equal_shares(len(names), width, height)
        if suite.compositions.regions:
            boxes = columns(len(names), width, height)
            prompts = (_region_prompt(suite.base, concepts, own, place) for own in range(len(names)))
            regions = tuple(map(Region, prompts, boxes))
        wide = {"regions": regions, "width": width, "height": height, "num": 1}
        seeds = range(suite.seed, suite.seed + suite.compositions.images)
        yield WideRequest(names, boxes, tuple(_request(suite, model, prompt, **wide, seed=seed) for seed in seeds))


def equal_shares(count: int, width: int, height: int) -> tuple[tuple[int, int, int, int], ...]:
    """Boxes of pixels side by side that share all of a picture: where things are, if no regions tell."""
    edges = [round(number * width / count) for number in range(count + 1)]
    return tuple((left, 0, right, height) for left, right in pairwise(edges))


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
    one = concepts[own]
    if base != "emojiland":
        return _listed([one.noun], place)
    return _listed([one.noun if number == own else one.class_word for number in range(len(concepts))], place)


def _listed(nouns: Sequence[str], place: str) -> str:
    return f"a photo of {' and '.join(f'a {noun}' for noun in nouns)} {place}".strip()
