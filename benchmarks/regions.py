"""Does each concept stand in its region, and what do the options beyond the paper change?

    python benchmarks/regions.py [--json FILE] [--pictures FOLDER] [--compositions 120] [--parts accuracy,options,ways]
                                 [--model FOLDER]

Parts that are run by themselves are added to those in the JSON file.

Three concepts of Emojiland, two of which share a class word, are fused as examples/fuse-three.yaml says, and drawn in wide pictures:
every order of the three, every place the generator knows, fixed seeds, boxes alone.

accuracy: a network of photographs, which had no part in anything here, looks at each region's crop alone and names the
nearest of the fused concepts, by the world's own pictures of them in the same scene (`region_accuracy`; `of_fourteen`: of
fourteen, of which eleven are not in the model; `confusion` has a row for each concept asked for). `scene_accuracy` is how
often Emojiland's judge names the place from what lies outside of the boxes. Beside it: concepts that start in the sixth
step, after their class words have laid things out; one prompt for the whole picture; weight fusion; a background of its own
for each region (`binding_accuracy`: of the four colours Emojiland's judge names it in the region's crop); and `renders`,
the world's own pictures of the same things, which tell what the judges themselves get wrong.

ways: four ways to draw several concepts, at equal seeds: their LoRAs added up, by one prompt; fused, by one prompt;
fused, with regions; un-fused, each region by its own LoRA. `--model` is a fused folder of the three, for these.
`identity_accuracy`, `missing` and `doubled` are of who stands in a picture, wherever (evaluation/identities.py).

options: the same for each option on fewer pictures, with its time over that of plain regions. `leakage` is how much
a region's pixels (0 to 1) change when the prompt of the region beside it does.

places: places that are found, beside boxes by hand, see places.py.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import places
import torch
from figures import keep, known
from PIL import Image
from torch import Tensor

from emojiland.figures import rank_scenes
from mixofshow.bases.emojiland.concepts import NEW_TO_THE_BASE, SUBJECTS, class_word
from mixofshow.bases.emojiland.scenes import SCENES
from mixofshow.bases.emojiland.world import SIZE, WIDE, compose
from mixofshow.bases.emojiland.world import places as laid_out
from mixofshow.bases.loading import GUIDANCE
from mixofshow.concepts.adapters import summed_weights
from mixofshow.concepts.model import ConceptModel, load_unfused, with_words
from mixofshow.evaluation.identities import identities, summarized
from mixofshow.evaluation.metrics import image_alignment, interference, nearest_concept
from mixofshow.evaluation.tasks import draw
from mixofshow.fusion.jobs import make_job
from mixofshow.fusion.stages import fuse
from mixofshow.grids import grid
from mixofshow.sampling.settings import Composition, Region

EXAMPLE: Final = Path(__file__).parents[1] / "examples" / "fuse-three.yaml"
NAMES: Final = ("clown", "steamtrain", "robot")
FOURTEEN: Final = (*NAMES, *[name for name in NEW_TO_THE_BASE if name not in NAMES][:11])
"""Among whom a crop is told too; those of the model come first."""
BOXES: Final = ((4, 6, 50, 62), (57, 6, 103, 62), (110, 6, 156, 62))
"""A thing and little around it, so that there is something beside them that only the global prompt decides."""
BATCH: Final = 5
"""Pictures of a composition; only their seeds differ."""
STEPS: Final = 20
SHOWN: Final = 6
COLOURS: Final = ("on a red background", "on a blue background", "on a green background", "on a yellow background")
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "isolate": {"isolate": True},
    "isolate in 5 steps": {"isolate": 5},
    "concept_from 5": {"concept_from": 5},
    "attend 0.05": {"attend": 0.05},
    "regional_lora": {"regional_lora": True},
}
LEAKING: Final = ("plain", "isolate", "isolate in 5 steps")
"""Options of which leakage is measured, which takes the pictures once more."""


@dataclass(frozen=True)
class Wide:
    """Wide pictures with seeds from `seed` on: who stands in them from left to right, and where that is."""

    names: tuple[str, ...]
    scene: str
    seed: int
    count: int = BATCH
    backgrounds: tuple[str, ...] = ()
    """What each region's prompt says in the scene's stead, where that is something else."""


def wides(count: int) -> list[Wide]:
    """So many pictures: orders and scenes take turns."""
    orders, scenes = list(permutations(NAMES)), list(SCENES)
    return [
        Wide(orders[k % len(orders)], scenes[5 * k % len(scenes)], seed=BATCH * k, count=min(BATCH, count - BATCH * k))
        for k in range(-(-count // BATCH))
    ]


def with_backgrounds(wide: Wide) -> Wide:
    """The same with a plain background asked for in each region, each another."""
    first = wide.seed // BATCH
    return replace(wide, backgrounds=tuple(COLOURS[(first + k) % len(COLOURS)] for k in range(len(wide.names))))


def caption(words: Sequence[str], scene: str) -> str:
    """As the generator's own captions are."""
    return f"a photo of {' and '.join(f'a {word}' for word in words)} {scene}"


def region_prompt(wide: Wide, place: int) -> str:
    """The concept in its place, its class word in the others.

    Emojiland takes from a caption how many things a wide picture shows, and draws them from left to right. Between two
    class words that another concept shares, one in the middle would become that one: it stands in all places.
    """
    name, classes = wide.names[place], [class_word(one) for one in wide.names]
    shared, between = classes.count(classes[place]) > 1, 0 < place < len(classes) - 1
    beside = f"<{name}>" if shared and between else classes[place]
    words = [f"<{name}>" if other == place else beside for other in range(len(wide.names))]
    return caption(words, wide.backgrounds[place] if wide.backgrounds else wide.scene)


def one_prompt(wide: Wide) -> str:
    """All concepts, each with its own background where they have one."""
    backgrounds = wide.backgrounds or ("",) * len(wide.names)
    words = [f"<{name}> {background}".strip() for name, background in zip(wide.names, backgrounds, strict=True)]
    return caption(words, wide.scene)


def composition(wide: Wide, *, regions: bool = True, concept_from: int | None = None, **settings: Any) -> Composition:
    """The wide picture as a composition: class words for the whole, and a region for each concept.

    Without regions, one prompt that names the concepts.
    """
    entries = tuple(
        Region(region_prompt(wide, place), box, concept_from=concept_from) for place, box in enumerate(BOXES)
    )
    return Composition(
        prompt=caption([class_word(name) for name in wide.names], wide.scene) if regions else one_prompt(wide),
        regions=entries if regions else (),
        width=WIDE,
        height=SIZE,
        steps=STEPS,
        guidance_scale=GUIDANCE["emojiland"],
        seed=wide.seed,
        num=wide.count,
        **settings,
    )


def drawn(model: ConceptModel, asked: Sequence[Wide], **how: Any) -> tuple[list[Image.Image], float]:
    """Pictures, and the processor's seconds for each: those of the clock depend on what else the machine does."""
    started = time.process_time()
    images = [image for wide in asked for image in draw(model, composition(wide, **how))]
    return images, (time.process_time() - started) / len(images)


def renders(asked: Sequence[Wide]) -> list[Image.Image]:
    """The world's own pictures of what is asked for."""
    images = []
    for wide in asked:
        pairs = [(name, SUBJECTS[name].picture()) for name in wide.names]
        for number in range(wide.count):
            random = Random(wide.seed + number)
            laid = laid_out(random, len(pairs), width=WIDE)
            images.append(compose(pairs, wide.scene, random, width=WIDE, laid=laid).image)
    return images


class Judges(places.Photographs):
    """The network of photographs tells who stands where, Emojiland's judge what is around them."""

    def __init__(self) -> None:
        super().__init__(FOURTEEN)

    def figures(self, images: Sequence[Image.Image], asked: Sequence[Wide]) -> dict[str, Any]:
        """Of pictures in the order in which they were asked for."""
        each = [wide for wide in asked for _ in range(wide.count)]
        wanted = torch.tensor([[NAMES.index(name) for name in wide.names] for wide in each])
        judged, of_fourteen, aligned, who = [], [], list[float](), []
        for image, wide, numbers in zip(images, each, wanted.tolist(), strict=True):
            seen, all_there = self.look([image.crop(box) for box in BOXES]), self.known(wide.scene)
            there = all_there[: len(NAMES)]
            judged.append(nearest_concept(seen, there))
            of_fourteen.append(nearest_concept(seen, all_there))
            aligned += [image_alignment(row[None], there[number]) for row, number in zip(seen, numbers, strict=True)]
            who.append(identities(seen, there, numbers))
        identity = summarized([who], NAMES)
        outside = [ranked[0] for ranked in rank_scenes([around(image) for image in images])]
        found: dict[str, Any] = {
            "region_accuracy": rounded((torch.stack(judged) == wanted).double().mean()),
            "of_fourteen": rounded((torch.stack(of_fourteen) == wanted).double().mean()),
            "image_alignment": rounded(sum(aligned) / len(aligned)),
            "identity_accuracy": rounded(identity["accuracy"]),
            "missing": identity["missing"],
            "doubled": identity["doubled"],
            "scene_accuracy": share(scene == wide.scene for scene, wide in zip(outside, each, strict=True)),
            "confusion": confusion(wanted, torch.stack(judged)),
        }
        return found | (binding(images, each) if each[0].backgrounds else {})


def confusion(wanted: Tensor, judged: Tensor) -> list[list[float]]:
    """Of each concept (a row), how often its box is taken for which."""
    return [[rounded(one) for one in row] for row in interference(wanted.flatten(), judged.flatten(), len(NAMES))]


def binding(images: Sequence[Image.Image], each: Sequence[Wide]) -> dict[str, float]:
    """How often Emojiland's judge names the colour that was asked for behind a concept."""
    ranked = rank_scenes([image.crop(box) for image in images for box in BOXES])
    named = [next(scene for scene in scenes if scene in COLOURS) for scenes in ranked]
    asked = [background for wide in each for background in wide.backgrounds]
    return {"binding_accuracy": share(one == other for one, other in zip(named, asked, strict=True))}


def around(image: Image.Image) -> Image.Image:
    """What lies left and right of the boxes and between them, over the whole height, side by side."""
    edges = [0, *(edge for box in BOXES for edge in (box[0], box[2])), image.width]
    strips = [np.asarray(image)[:, left:right] for left, right in zip(edges[::2], edges[1::2], strict=True)]
    return Image.fromarray(np.concatenate(strips, axis=1))


def share(hits: Any) -> float:
    """Of what holds."""
    values = list(hits)
    return rounded(sum(values) / len(values))


def rounded(value: Any) -> float:
    """To three digits."""
    return round(float(value), 3)


def models(folder: Path | None, *, average: bool) -> dict[str, ConceptModel]:
    """The three fused as in the example, or found in a folder; un-fused; added up, un-fused; and fused by weights."""
    made = {} if folder is None else {"gradient": load_unfused(folder)}
    for name, given in (("gradient", {}), ("average", {"method": "average", "options": {}})):
        if name not in made and (average or name != "average"):
            job = make_job([EXAMPLE], given)
            made[name] = fuse(job.concepts, job.pipeline, job.settings).model
    apart = with_words(made["gradient"].pipeline, made["gradient"].concepts)
    added = summed_weights(apart.pipeline, [(one.deltas, 1.0) for one in apart.concepts])
    return made | {"apart": apart, "added": replace(apart, weights=added)}


def accuracy(known: dict[str, ConceptModel], judge: Judges, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures, and pictures, of each way to draw three concepts together."""
    plain = wides(count)
    coloured = [with_backgrounds(wide) for wide in plain]
    ways = {
        "renders": (plain, lambda: renders(plain)),
        "regions": (plain, lambda: drawn(known["gradient"], plain)[0]),
        "regions, concepts from step 5": (plain, lambda: drawn(known["gradient"], plain, concept_from=5)[0]),
        "one prompt": (plain, lambda: drawn(known["gradient"], plain, regions=False)[0]),
        "regions, weight fusion": (plain, lambda: drawn(known["average"], plain)[0]),
        "regions, a background each": (coloured, lambda: drawn(known["gradient"], coloured)[0]),
        "one prompt, a background each": (coloured, lambda: drawn(known["gradient"], coloured, regions=False)[0]),
    }
    figures, pictures = {}, {}
    for way, (asked, make) in ways.items():
        pictures[way] = make()
        figures[way] = judge.figures(pictures[way], asked)
        report(way, figures[way])
    return figures, pictures


def ways(known: dict[str, ConceptModel], judge: Judges, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures, and pictures, of each of four ways to draw several concepts; cost over that of the first."""
    asked = wides(count)
    table: dict[str, tuple[str, dict[str, Any]]] = {
        "LoRAs added up, one prompt": ("added", {"regions": False}),
        "fused, one prompt": ("gradient", {"regions": False}),
        "fused, with regions": ("gradient", {}),
        "a LoRA for each region": ("apart", {"regional_lora": True}),
    }
    figures, pictures, seconds = {}, {}, {}
    for way, (model, settings) in table.items():
        pictures[way], seconds[way] = drawn(known[model], asked, **settings)
        figures[way] = judge.figures(pictures[way], asked)
        figures[way]["cost"] = round(seconds[way] / next(iter(seconds.values())), 2)
        report(way, figures[way])
    return figures, pictures


def options(known: dict[str, ConceptModel], judge: Judges, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures, and pictures, of each option beyond the paper; cost over that of plain regions."""
    asked = wides(count)
    figures, pictures, seconds = {}, {}, {}
    for way, settings in OPTIONS.items():
        pictures[way], seconds[way] = drawn(known["gradient"], asked, **settings)
        figures[way] = judge.figures(pictures[way], asked)
        figures[way]["cost"] = round(seconds[way] / seconds["plain"], 2)
        if way in LEAKING:
            figures[way]["leakage"] = leakage(known["gradient"], asked, pictures[way], settings)
        report(way, figures[way])
    return figures, pictures


def leakage(
    model: ConceptModel, asked: Sequence[Wide], images: Sequence[Image.Image], settings: dict[str, Any]
) -> float:
    """Mean change of the first and last region's pixels when the middle one's prompt asks for a cat."""
    changed = [image for wide in asked for image in draw(model, with_a_cat(composition(wide, **settings)))]
    moved = [
        np.abs(np.asarray(one.crop(box), np.float32) - np.asarray(other.crop(box), np.float32)).mean() / 255
        for one, other in zip(images, changed, strict=True)
        for box in (BOXES[0], BOXES[-1])
    ]
    return round(float(np.mean(moved)), 4)


def with_a_cat(wanted: Composition) -> Composition:
    """The composition with a cat in the middle region; all else is as it was."""
    first, middle, last = wanted.regions
    cat = replace(middle, prompt=re.sub("<.*?>", "cat", middle.prompt))
    return wanted.model_copy(update={"regions": (first, cat, last)})


def report(way: str, figures: dict[str, Any]) -> None:
    """A line of the table."""
    numbers = "  ".join(f"{key} {value:.3f}" for key, value in figures.items() if isinstance(value, float))
    numbers += "".join(f"  {key} {value}" for key, value in figures.items() if isinstance(value, int))
    print(f"{way:<32}{numbers}", flush=True)


def side_by_side(pictures: dict[str, list[Image.Image]], count: int) -> Image.Image:
    """Some pictures of each way, a row for each."""
    shown = [image for images in pictures.values() for image in images[:: len(images) // count][:count]]
    return grid(shown, count, row_labels=list(pictures))


def found_places(asked: argparse.Namespace) -> None:
    """The part `places`, see places.py; a fifth as many pictures of each case."""
    cases = asked.cases.split(";")
    found, pictures = places.measure(places.fused(asked.concepts), -(-asked.compositions // 5), cases)
    before = known(asked.json)
    keep(before | {"places": before.get("places", {}) | found}, asked.json)
    if asked.pictures:
        asked.pictures.mkdir(parents=True, exist_ok=True)
        for case, ways_drawn in pictures.items():
            side_by_side(ways_drawn, min(SHOWN, len(ways_drawn["auto"]))).save(asked.pictures / f"places, {case}.png")


def main() -> None:
    """Fuse, draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for a sheet of pictures of each part")
    parser.add_argument("--compositions", type=int, default=120, help="wide pictures of each way; of options a quarter")
    parser.add_argument("--parts", default="accuracy,options,ways,places")
    parser.add_argument("--model", type=Path, help="folder of the three, fused, in place of fusing them")
    parser.add_argument("--cases", default=";".join(places.CASES), help="of places, with ; between them")
    parser.add_argument("--concepts", type=Path, help="folder of concepts for places, which are tuned where they are not")
    asked = parser.parse_args()
    torch.set_flush_denormal(True)
    count = asked.compositions
    parts = {"accuracy": (accuracy, count), "options": (options, -(-count // 4)), "ways": (ways, count)}
    result: dict[str, Any] = {"compositions": asked.compositions}
    chosen = asked.parts.split(",")
    if "places" in chosen:
        chosen.remove("places")
        found_places(asked)
    fused, judge = (models(asked.model, average="accuracy" in chosen), Judges()) if chosen else ({}, None)
    for part in chosen:
        measure, count = parts[part]
        result[part], pictures = measure(fused, judge, count)
        if asked.pictures:
            asked.pictures.mkdir(parents=True, exist_ok=True)
            side_by_side(pictures, min(SHOWN, count)).save(asked.pictures / f"{part}.png")
    keep(known(asked.json) | result, asked.json)


if __name__ == "__main__":
    main()
