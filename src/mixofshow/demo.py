"""The tour: tune three concepts on the embedded base, fuse them, draw them together, measure, and write a report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from mixofshow.bases.emojiland.concepts import class_word, write_concept
from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import BadInputError, shown
from mixofshow.evaluation.prompts import prompts_by_category
from mixofshow.evaluation.protocol import (
    SINGLE,
    Case,
    EvaluationSettings,
    Scores,
    evaluate,
    means,
    references_of,
    score,
)
from mixofshow.evaluation.report import Page, alignment_rows, print_alignments
from mixofshow.evaluation.scorers import judge_scorer
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import Fused, fuse
from mixofshow.fusion.store import Store
from mixofshow.grids import grid
from mixofshow.outputs import check_outputs, refusals, write_text, writing
from mixofshow.progress import terminal_bar
from mixofshow.sampling.composition import compose
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.replay import maker_of, resolved, save_picture
from mixofshow.sampling.settings import STEPS, Composition, RegionEntry
from mixofshow.terminal import say
from mixofshow.tuning.settings import make_settings
from mixofshow.tuning.trainer import tune

CONCEPTS: Final = ("reddog", "greenhouse", "foxy")
"""Two of one class, and something else between them."""
WIDTH, HEIGHT = 160, 64
SCENE: Final = "in the forest"
REGIONS: Final = ((2, 6, 54, 62), (54, 6, 106, 62), (106, 6, 158, 62))
SEEDS: Final = 4


def run_demo(out: Path, *, quick: bool = False) -> None:
    """Everything into `out`: concept files, fused model, pictures, overview.png, report.html and summary.json.

    `quick` takes the concept files that ship with the package and draws fewer pictures.
    """
    started = time.monotonic()
    _check_folder(out)
    pipeline = load_base("emojiland")
    with refusals(out / "pictures"):
        for name in CONCEPTS:
            write_concept(name, out / "pictures" / name)
    concepts = [_shipped(name, pipeline) if quick else _tuned(name, out, pipeline) for name in CONCEPTS]
    fuse_exactly = partial(fuse, settings=FusionSettings(steps=8 if quick else 20), store=Store(out / "recordings"))
    with terminal_bar("fusing") as progress:
        gradient = fuse_exactly(concepts, pipeline, progress=progress)
        average = fuse(concepts, pipeline, FusionSettings(method="average", steps=1), progress=progress)
    gradient.model.save(out / "model")
    models = {"gradient": gradient.model, "average": average.model}
    pictures = _compositions(out, models, seeds=2 if quick else SEEDS)
    places = prompts_by_category("emojiland", "subject")
    prompts = places["context"][:2] if quick else (*places["context"], *places["attribute"][:3])
    cases = [
        Case(concept, references_of(out / "pictures" / concept.info.name / "reference"), prompts)
        for concept in concepts
    ]
    settings = EvaluationSettings(images_per_prompt=2 if quick else 4)
    with terminal_bar("evaluating") as progress:
        scores = evaluate(pipeline, cases, models, judge_scorer(), settings, progress=progress)
    facts = _facts(pipeline, cases, gradient, scores, settings, fuse_exactly=fuse_exactly)
    alignments = means(scores)
    summary = {**alignments, "seconds": round(time.monotonic() - started)}
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    with writing(out / "overview.png") as path:
        _overview(out, pictures).save(path, "PNG")
    _write_report(out, gradient, scores, pictures, facts)
    print_alignments(alignments)
    say(*facts, out / "report.html", out / "summary.json")


def _check_folder(out: Path) -> None:
    """Raise BadInputError for a folder with files that are not an earlier demo's, ResourceError for a disk."""
    check_outputs(shared=[out])
    if out.is_dir() and any(out.iterdir()) and not (out / "pictures" / CONCEPTS[0] / "train").is_dir():
        raise BadInputError(f"{shown(out, 100)}: holds files that are not the demo's; choose a new folder with --out")


def _tuned(name: str, out: Path, pipeline: Any) -> Concept:
    settings = make_settings({"name": name, "class_word": class_word(name), "data": out / "pictures" / name / "train"})
    with terminal_bar(f"tuning {settings.placeholder}") as progress:
        concept = tune(settings, pipeline, progress=progress)
    concept.save(out / f"{name}.safetensors")
    return concept


def _shipped(name: str, pipeline: Any) -> Concept:
    here = Path(__file__).parent
    for folder in (here / "examples", here.parents[1] / "examples"):  # in a wheel, in a checkout
        if (path := folder / "concepts" / f"{name}.safetensors").is_file():
            return load_concept(path, pipeline)
    raise BadInputError(f"{name}.safetensors: not found among the examples; run the demo without --quick")


def _facts(
    pipeline: Any,
    cases: Sequence[Case],
    gradient: Fused,
    scores: Scores,
    settings: EvaluationSettings,
    *,
    fuse_exactly: Callable[..., Fused],
) -> list[str]:
    """What must hold of any fusion, tried on these concepts; a line for each with its numbers."""
    concepts, first = [case.concept for case in cases], cases[0]
    better = sum(one.fused <= one.average for one in gradient.layers.values())
    alone = fuse_exactly([first.concept], pipeline)
    residual = max(one.residual for one in alone.layers.values())
    scorer, name = judge_scorer(), first.concept.info.name
    itself = score(
        alone.model,
        first.concept.prompt,
        first,
        references=scorer.images(first.references),
        scorer=scorer,
        settings=settings,
    )
    turned = fuse_exactly(concepts[::-1], pipeline).model.weights
    equal = all(torch.equal(weight, turned[layer]) for layer, weight in gradient.model.weights.items())
    draw = MixOfShowPipeline.of(gradient.model)
    prompt = f"a photo of a {first.concept.prompt}"
    there, again = (draw(prompt, num_inference_steps=STEPS, seed=1)[0].tobytes() for _ in range(2))
    return [
        f"gradient fusion fits at least as well as weight fusion in {better} of {len(gradient.layers)} layers",
        f"<{name}> fused alone: largest residual {residual:.1e}, "
        f"image alignment {itself.image:.4f} (its own model: {scores[SINGLE][name].image:.4f})",
        f"other order of the files: weights {'bit-equal' if equal else 'DIFFER'}",
        f"same seed twice: pictures {'bit-equal' if there == again else 'DIFFER'}",
    ]


def composition(seed: int, *, regions: bool) -> Composition:
    """The wide picture: all concepts in one prompt and, if asked for, each in a region of its own as well."""
    together = " and ".join(f"a <{name}>" for name in CONCEPTS)
    prompts = [_region_prompt(place) for place in range(len(CONCEPTS))]
    entries = tuple(RegionEntry(box=box, prompt=prompt) for prompt, box in zip(prompts, REGIONS, strict=True))
    return Composition(
        prompt=f"a photo of {together} {SCENE}",
        regions=entries if regions else (),
        width=WIDTH,
        height=HEIGHT,
        seed=seed,
    )


def _region_prompt(place: int) -> str:
    """The concept of a place, counted from the left, among things of its own class.

    Emojiland takes from a caption how many things a wide picture shows, and draws them from left to right.
    """
    name = CONCEPTS[place]
    words = [f"<{name}>" if other == place else class_word(name) for other in range(len(CONCEPTS))]
    return f"a photo of {' and '.join(f'a {word}' for word in words)} {SCENE}"


def _compositions(out: Path, models: Mapping[str, ConceptModel], *, seeds: int) -> dict[str, list[Image.Image]]:
    """Wide pictures by what drew them: regions with gradient fusion, one prompt only, regions with weight fusion."""
    ways = {
        "gradient fusion, a prompt in each region": (models["gradient"], True),
        "gradient fusion, one prompt for all": (models["gradient"], False),
        "weight fusion, a prompt in each region": (models["average"], True),
    }
    pictures: dict[str, list[Image.Image]] = {}
    for number, (label, (model, regions)) in enumerate(ways.items()):
        wanted = [composition(seed, regions=regions) for seed in range(seeds)]
        pipeline = MixOfShowPipeline.of(model)
        maker = maker_of(pipeline)
        with terminal_bar("sampling") as progress:
            pictures[label] = [compose(pipeline, one, progress=progress)[0] for one in wanted]
        for one, image in zip(wanted, pictures[label], strict=True):
            save_picture(image, out / f"wide-{number}-{one.seed}.png", resolved(one, pipeline), maker)
    return pictures


def _overview(out: Path, pictures: Mapping[str, Sequence[Image.Image]], *, scale: int = 4, gap: int = 8) -> Image.Image:
    """A training picture of each concept above one wide picture of each way to draw them together."""
    width, text_size = WIDTH * scale, HEIGHT * scale // 16
    side = (width - gap * (len(CONCEPTS) - 1)) // len(CONCEPTS)
    tops = [_enlarged(Image.open(out / "pictures" / name / "train" / "00.png"), side, side) for name in CONCEPTS]
    names = [f"<{name}>, a picture of it" for name in CONCEPTS]
    sheets = [grid(tops, len(tops), gap=gap, column_labels=names, text_size=text_size)]
    for label, images in pictures.items():
        large = _enlarged(images[0], width, HEIGHT * scale)
        sheets.append(grid([large], 1, gap=0, column_labels=[label], text_size=text_size))
    return grid(sheets, 1, gap=gap)


def _enlarged(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _write_report(
    out: Path,
    fused: Fused,
    scores: Scores,
    pictures: Mapping[str, Sequence[Image.Image]],
    facts: Sequence[str],
) -> None:
    page = Page("Mix-of-Show on Emojiland")
    page.heading("The concepts")
    page.paragraph("Pictures that each concept was tuned on; the base model has never seen any of them.")
    for name in CONCEPTS:
        page.figure(Image.open(out / "pictures" / name / "train" / "00.png"), f"<{name}>", scale=3)
    page.heading("All three in one picture")
    for label, images in pictures.items():
        page.paragraph(label)
        for seed, image in enumerate(images):
            page.figure(image, f"seed {seed}", scale=3)
    page.heading("How much identity is left")
    page.paragraph(
        "Cosine of drawn and held-out pictures (image) and of pictures and what was asked (text), on equal prompts and seeds."
    )
    page.table(("model", "image alignment", "text alignment"), alignment_rows(means(scores)))
    for model, by_name in scores.items():
        page.paragraph(model.replace("_", " "))
        for name, one in by_name.items():
            for image in one.samples[:3]:
                page.figure(image, f"<{name}>")
    page.heading("The fit of every layer")
    worst = sorted(fused.layers.items(), key=lambda item: -item[1].residual)[:10]
    page.paragraph(
        "What fusion leaves of the changes that the concepts want, as a share; the ten largest, with weight fusion's beside it."
    )
    page.table(
        ("layer", "gradient", "average"),
        [
            (name, f"{one.residual:.3f}", f"{(one.average / one.unchanged) ** 0.5:.3f}")
            for name, one in worst
            if one.unchanged
        ],
    )
    page.heading("What must hold")
    for fact in facts:
        page.paragraph(fact)
    page.save(out / "report.html")
