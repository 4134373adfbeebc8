"""Regions without boxes beside boxes by hand and beside one prompt: the part `places` of benchmarks/regions.py.

Of Emojiland's concepts clown, steamtrain, robot and redogre are fused (the last one is tuned first, or read from
`--concepts FOLDER`), and drawn three ways at equal seeds: with boxes by hand, with `regions="auto"`, and by one prompt that
names them. Cases: three of different classes, and two of one class (in wide pictures, where Emojiland draws three things
reliably, beside a third), in wide and in square pictures.

`region_accuracy`: a network of photographs, which had no part in anything here, looks at a crop alone and names the nearest
of the four concepts, by the world's own pictures of them in the same scene and of about the same size, so that neither
decides (`renders`: what it gets right of the world's own pictures of the same things). Crops are the boxes, with "auto" what
bounds the places that were found, and of one prompt's picture the places that were found at the same seed ("one prompt,
boxes": the boxes). `cost` is the processor's time over that of one prompt, the median of the pictures'; the ways take turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from mixofshow.bases.emojiland.concepts import SUBJECTS, class_word, write_concept
from mixofshow.bases.emojiland.scenes import SCENES
from mixofshow.bases.emojiland.world import Placement, compose
from mixofshow.bases.loading import GUIDANCE, load_base
from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.model import ConceptModel
from mixofshow.evaluation.scorers import imagenet_scorer
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.regions import bounding_cells, coverage, shape_of
from mixofshow.sampling.settings import Region
from mixofshow.tuning.trainer import tune

EXAMPLES: Final = Path(__file__).parents[1] / "examples" / "concepts"
NAMES: Final = ("clown", "steamtrain", "robot", "redogre")
STEPS: Final = 20
REFERENCES: Final = 6
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """Which concepts stand beside each other, in all orders, in pictures of (width, height) with these boxes by hand."""

    groups: tuple[tuple[str, ...], ...]
    size: tuple[int, int]
    boxes: tuple[Box, ...]


WIDE_THREE: Final = ((4, 6, 50, 62), (57, 6, 103, 62), (110, 6, 156, 62))
SQUARE_THREE: Final = ((0, 16, 22, 60), (21, 16, 43, 60), (42, 16, 64, 60))
SQUARE_TWO: Final = ((1, 14, 31, 60), (33, 14, 63, 60))
CASES: Final[dict[str, Case]] = {
    "three classes, wide": Case((("clown", "steamtrain", "redogre"),), (160, 64), WIDE_THREE),
    "two of one class, wide": Case((("clown", "robot", "steamtrain"),), (160, 64), WIDE_THREE),
    "three classes, square": Case((("clown", "steamtrain", "redogre"),), (64, 64), SQUARE_THREE),
    "two of one class, square": Case((("clown", "robot"),), (64, 64), SQUARE_TWO),
}


@dataclass(frozen=True)
class Asked:
    """A picture: who stands in it from left to right, and where."""

    names: tuple[str, ...]
    scene: str
    seed: int
    size: tuple[int, int]
    boxes: tuple[Box, ...]

    def prompt(self, concepts: Sequence[int]) -> str:
        """As the generator's captions are, with concepts in these places and class words in the others."""
        words = [f"<{name}>" if k in concepts else class_word(name) for k, name in enumerate(self.names)]
        return f"a photo of {' and '.join(f'a {word}' for word in words)} {self.scene}"

    def drawn(self, draw: MixOfShowPipeline, way: str, **more: Any) -> tuple[Image.Image, list[Box]]:
        """The picture, and where the concepts are to be in it."""
        everyone = range(len(self.names))
        by_hand = [Region(self.prompt([k]), box) for k, box in enumerate(self.boxes)]
        prompt, regions = {
            "boxes": (self.prompt([]), by_hand),
            "auto": (self.prompt(everyone), "auto"),
            "one prompt": (self.prompt(everyone), ()),
        }[way]
        width, height = self.size
        how: dict[str, Any] = {"width": width, "height": height, "num_inference_steps": STEPS, "seed": self.seed}
        found = draw(prompt, regions=regions, guidance_scale=GUIDANCE["emojiland"], **how, **more)
        if way != "auto":
            return found[0], list(self.boxes)
        places = {region.prompt: self._bounds(region) for region in found.layouts[0].regions}
        # Who found no place has the whole picture's, where the network sees the largest thing.
        named = [next((box for prompt, box in places.items() if f"<{name}" in prompt), None) for name in self.names]
        return found[0], [box or (0, 0, width, height) for box in named]

    def _bounds(self, region: Region) -> Box:
        width, height = self.size
        return bounding_cells(coverage(shape_of(region, width=width, height=height), columns=width, rows=height))


def asked_of(case: Case, count: int) -> list[Asked]:
    """So many pictures: orders and scenes take turns."""
    orders = [order for group in case.groups for order in permutations(group)]
    scenes = list(SCENES)
    return [
        Asked(orders[k % len(orders)], scenes[5 * k % len(scenes)], 7000 + k, case.size, case.boxes)
        for k in range(count)
    ]


class Photographs:
    """The network of photographs, with the world's own pictures of some concepts in each scene."""

    def __init__(self, names: Sequence[str] = NAMES) -> None:
        self.look, self.names = imagenet_scorer(), names
        self.references: dict[str, list[Tensor]] = {}

    def known(self, scene: str) -> list[Tensor]:
        """Each concept in a scene, as the network sees it: (pictures, dim)."""
        if scene not in self.references:
            self.references[scene] = [self.look(alone(name, scene)) for name in self.names]
        return self.references[scene]

    def right(self, image: Image.Image, boxes: Sequence[Box], one: Asked) -> list[bool]:
        """Whether each crop is the concept that is asked for."""
        seen = self.look([image.crop(box) for box in boxes])
        means = torch.stack([references.mean(0) for references in self.known(one.scene)])
        return [self.names[int(number)] == name for number, name in zip((seen @ means.T).argmax(1), one.names, strict=True)]


def alone(name: str, scene: str) -> list[Image.Image]:
    """The world's own pictures of a concept in a scene, cut as boxes are."""
    random, pair = Random(f"{name} {scene}"), (name, SUBJECTS[name].picture())
    laid = [Placement(32, 36, random.randint(44, 52), random.uniform(-8, 8)) for _ in range(REFERENCES)]
    return [compose([pair], scene, random, laid=[place]).image.crop((6, 8, 58, 64)) for place in laid]


def render(one: Asked) -> Image.Image:
    """The world's own picture of what is asked for, with things in their boxes."""
    random, pairs = Random(one.seed), [(name, SUBJECTS[name].picture()) for name in one.names]
    laid = [
        Placement((left + right) / 2, (top + bottom) / 2, min(right - left, bottom - top), random.uniform(-8, 8))
        for left, top, right, bottom in one.boxes
    ]
    return compose(pairs, one.scene, random, width=one.size[0], laid=laid).image


def concepts_of(base: Any, folder: Path | None) -> list[Concept]:
    """The four concepts: as they ship with the package, from the folder, or tuned as Emojiland's defaults say."""
    found = []
    for name in NAMES:
        files = [place / f"{name}.safetensors" for place in (EXAMPLES, folder) if place]
        file = next((one for one in files if one.is_file()), None)
        found.append(load_concept(file, base) if file else _tuned(base, name))
    return found


def _tuned(base: Any, name: str) -> Concept:
    with TemporaryDirectory() as folder:
        write_concept(name, Path(folder))
        return tune(base, Path(folder) / "train", name=name, class_word=class_word(name), precision="bf16")


def fused(folder: Path | None) -> ConceptModel:
    """The four concepts in one model, as the example of three is made."""
    base = load_base("emojiland")
    settings = FusionSettings.of({"method": "gradient", "options": {"ridge": 0.03}, "steps": 20})
    return fuse(concepts_of(base, folder), base, settings).model


def measure(model: ConceptModel, count: int, cases: Sequence[str], **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of each case, and its pictures by the way they were drawn; `more` is said to all but one prompt."""
    draw, judge = MixOfShowPipeline.of(model), Photographs()
    figures, pictures = {}, {}
    for name in cases:
        asked = asked_of(CASES[name], count)
        figures[name], pictures[name] = _measured(draw, judge, asked, more)
        print(name, *(f"{key} {value}" for key, value in figures[name].items()), sep="  ", flush=True)
    return figures, pictures


def _measured(
    draw: MixOfShowPipeline, judge: Photographs, asked: Sequence[Asked], more: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    ways = ("boxes", "auto", "one prompt")
    right: dict[str, list[bool]] = {way: [] for way in (*ways, "one prompt, boxes", "renders")}
    seconds, images = {way: list[float]() for way in ways}, {way: list[Image.Image]() for way in ways}
    asked[0].drawn(draw, "one prompt")  # what is made once is not counted
    for one in asked:
        places: dict[str, list[Box]] = {}
        for way in ways:
            started = time.process_time()
            image, places[way] = one.drawn(draw, way, **({} if way == "one prompt" else more))
            seconds[way].append(time.process_time() - started)
            images[way].append(image)
        for way, crops in (("boxes", "boxes"), ("auto", "auto"), ("one prompt", "auto")):
            right[way] += judge.right(images[way][-1], places[crops], one)
        right["one prompt, boxes"] += judge.right(images["one prompt"][-1], one.boxes, one)
        right["renders"] += judge.right(render(one), one.boxes, one)
    accuracy = {way: round(sum(hits) / len(hits), 3) for way, hits in right.items()}
    over = {way: [a / b for a, b in zip(taken, seconds["one prompt"], strict=True)] for way, taken in seconds.items()}
    cost = {way: round(median(ratios), 2) for way, ratios in over.items()}
    return {"pictures": len(asked), "region_accuracy": accuracy, "cost": cost}, images
