"""The tour: tune three concepts on the embedded base, fuse them, draw them together, measure, and write a report.

It is a suite, and one composition without regions beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from mixofshow.bases.emojiland.concepts import class_word, write_concept
from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.model import ConceptModel, with_words
from mixofshow.errors import BadInputError, shown
from mixofshow.evaluation.metrics import image_alignment
from mixofshow.evaluation.report import number, samples, write_page
from mixofshow.evaluation.results import FOOTNOTE, SuiteRun, alignment_table, measures, print_alignments, summary
from mixofshow.evaluation.scorers import judge_scorer
from mixofshow.evaluation.suite import Suite, make_suite, perform
from mixofshow.evaluation.suite_settings import usual_prompts
from mixofshow.evaluation.tasks import draw
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.solving import share
from mixofshow.fusion.stages import Fused, fuse
from mixofshow.grids import grid
from mixofshow.outputs import check_outputs, refusals, write_text, writing
from mixofshow.progress import terminal_bar
from mixofshow.sampling.composition import compose
from mixofshow.sampling.pictures import write_picture
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.replay import maker_of, resolved, save_picture
from mixofshow.sampling.settings import Composition
from mixofshow.terminal import say
from mixofshow.tuning.settings import make_settings
from mixofshow.tuning.trainer import tune

CONCEPTS: Final = ("clown", "steamtrain", "robot")
"""Two of one class, and something else between them."""
QUICK_STEPS: Final = 4
"""Recorded of each concept by `quick`."""
SAMPLING_STEPS: Final = 15
"""More change nothing in Emojiland's pictures."""
WIDTH, HEIGHT = 160, 64
SCENE: Final = "in the forest"


def run_demo(out: Path, *, quick: bool = False) -> None:
    """Everything into `out`: concept files, fused model, pictures, overview.png, report.html and summary.json.

    `quick` takes the concept files that ship with the package and draws fewer pictures.
    """
    started = time.monotonic()
    _check_folder(out)
    base = load_base("emojiland")
    with refusals(out / "pictures"):
        for name in CONCEPTS:
            write_concept(name, out / "pictures" / name)
    files = {name: _shipped(name) if quick else _tuned(name, out, base) for name in CONCEPTS}
    concepts = [load_concept(file, base) for file in files.values()]
    with terminal_bar("fusing") as progress:
        gradient = fuse(concepts, base, FusionSettings(steps=QUICK_STEPS if quick else 20), progress=progress)
        average = fuse(concepts, base, FusionSettings(method="average", steps=1), progress=progress)
    gradient.model.save(out / "model")
    deltas = {name: out / "evaluation" / f"{name}.safetensors" for name in ("gradient", "average")}
    for fused, path in zip((gradient, average), deltas.values(), strict=True):
        fused.model.save_delta(path)
    # On so small a base a core by itself draws nearly as fast as two together.
    workers = min(len(CONCEPTS), os.cpu_count() or 1)
    run = perform(_suite(files, deltas, quick=quick), out / "evaluation", workers=workers, bars=terminal_bar)
    wide = _wide_pictures(out, run, gradient, with_words(base, concepts))
    facts = _facts(run, gradient, concepts, base)
    write_text(
        out / "summary.json",
        json.dumps({**summary(run.results), "seconds": round(time.monotonic() - started)}, indent=1) + "\n",
    )
    training = {name: Image.open(out / "pictures" / name / "train" / "00.png") for name in CONCEPTS}
    write_picture(_overview(training, wide), out / "overview.png")
    worst = sorted(gradient.layers.items(), key=lambda item: -item[1].residual)[:10]
    write_page(
        out / "report.html",
        "demo.html.j2",
        training=training,
        wide=wide,
        tables=[alignment_table(run.results, measure) for measure in measures(run.results) if "first" not in measure],
        **samples(run),
        worst=[(name, number(one.residual), number(share(one.average, one.unchanged))) for name, one in worst],
        footnote=FOOTNOTE,
        facts=facts,
    )
    print_alignments(run.results)
    say(*facts, out / "report.html", out / "summary.json")


def _check_folder(out: Path) -> None:
    """Raise BadInputError for a folder with files that are not an earlier demo's, ResourceError for a disk."""
    check_outputs(shared=[out])
    if out.is_dir() and any(out.iterdir()) and not (out / "pictures" / CONCEPTS[0] / "train").is_dir():
        raise BadInputError(f"{shown(out, 100)}: holds files that are not the demo's; choose a new folder with --out")


def _tuned(name: str, out: Path, base: Any) -> Path:
    settings = make_settings({"name": name, "class_word": class_word(name), "data": out / "pictures" / name / "train"})
    with terminal_bar(f"tuning {settings.placeholder}") as progress:
        concept = tune(settings, base, progress=progress)
    concept.save(out / f"{name}.safetensors")
    return out / f"{name}.safetensors"


def _shipped(name: str) -> Path:
    here = Path(__file__).parent
    for folder in (here / "examples", here.parents[1] / "examples"):  # in a wheel, in a checkout
        if (path := folder / "concepts" / f"{name}.safetensors").is_file():
            return path
    raise BadInputError(f"{name}.safetensors: not found among the examples; run the demo without --quick")


def _suite(files: Mapping[str, Path], deltas: Mapping[str, Path], *, quick: bool) -> Suite:
    """Each concept on some of the usual prompts, and all of them in one wide picture."""
    prompts = usual_prompts("emojiland")["subject"]
    chosen = {
        "context": prompts["context"][: 2 if quick else None],
        "attribute": prompts["attribute"][: 0 if quick else 3],
    }
    return make_suite(
        {
            "concepts": [{"name": name, "files": {"ed-lora": file.absolute()}} for name, file in files.items()],
            "methods": [
                {"tuning": "ed-lora", "fusion": name, "name": name, "fused": path.absolute()}
                for name, path in deltas.items()
            ],
            "prompts": {"subject": {category: row for category, row in chosen.items() if row}},
            "prior_prompts": [],
            "images_per_prompt": 1 if quick else 2,
            "steps": SAMPLING_STEPS,
            "compositions": {"together": [CONCEPTS], "places": [SCENE], "images": 1 if quick else 4},
        }
    )


def _wide_pictures(out: Path, run: SuiteRun, gradient: Fused, unfused: ConceptModel) -> dict[str, list[Image.Image]]:
    """Wide pictures by what drew them, also as wide-WAY-NUMBER.png: with regions, and by one prompt only."""
    regions = {key: row[0] for key, row in run.plan.together.items()}
    asked = [one.composition for one in regions["gradient"].requests]
    plain = _drawn(out, 1, gradient.model, [one.model_copy(update={"regions": ()}) for one in asked])
    own = _drawn(out, 3, unfused, [one.model_copy(update={"regional_lora": True}) for one in asked])
    for way, key in ((0, "gradient"), (2, "average")):
        for k, request in enumerate(regions[key].requests):
            with writing(out / f"wide-{way}-{k}.png") as path:
                shutil.copyfile(request.paths(run.pictures)[0], path)
    return {
        "nothing fused, a LoRA and a prompt in each region": own,
        "gradient fusion, a prompt in each region": regions["gradient"].pictures(run.pictures),
        "gradient fusion, one prompt for all": plain,
        "weight fusion, a prompt in each region": regions["average"].pictures(run.pictures),
    }


def _drawn(out: Path, way: int, model: ConceptModel, wanted: Sequence[Composition]) -> list[Image.Image]:
    pipeline = MixOfShowPipeline.of(model)
    maker = maker_of(pipeline)
    with terminal_bar("sampling") as progress:
        images = [compose(pipeline, one, progress=progress)[0] for one in wanted]
    for k, (composition, image) in enumerate(zip(wanted, images, strict=True)):
        save_picture(image, out / f"wide-{way}-{k}.png", resolved(composition, pipeline), maker)
    return images


def _facts(run: SuiteRun, gradient: Fused, concepts: Sequence[Concept], base: Any) -> list[str]:
    """What must hold of any fusion, tried on these concepts; a line for each with its numbers."""
    # Where all concepts show a layer the same, as the time alone, there is nothing better than the average.
    better = sum(one.fused <= one.average * (1 + 1e-9) for one in gradient.layers.values())
    little = FusionSettings(steps=1, picture_prompts=("a {}",))
    alone, there, back = (fuse(some, base, little) for some in (concepts[:1], concepts[:2], concepts[1::-1]))
    residual = max(one.residual for one in alone.layers.values())
    name, look = CONCEPTS[0], judge_scorer().images
    requests = [asked.request for asked in run.plan.fused["gradient"][name]]
    made = look([image for one in requests for image in draw(alone.model, one.composition)])
    itself = image_alignment(made, look(run.references[name]))
    single = run.results["methods"]["gradient"]["by_concept"]["image_alignment"][name]["single"]
    equal = all(torch.equal(weight, back.model.weights[layer]) for layer, weight in there.model.weights.items())
    again = Composition(prompt=f"a photo of a <{name}>", seed=1, steps=SAMPLING_STEPS)
    first, second = (draw(gradient.model, again)[0].tobytes() for _ in range(2))
    return [
        f"gradient fusion fits at least as well as weight fusion in {better} of {len(gradient.layers)} layers",
        f"<{name}> fused alone: largest residual {residual:.1e}, "
        f"image alignment {itself:.4f} (its own model: {single:.4f})",
        f"other order of the files: weights {'bit-equal' if equal else 'DIFFER'}",
        f"same seed twice: pictures {'bit-equal' if first == second else 'DIFFER'}",
    ]


def _overview(training: Mapping[str, Image.Image], wide: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """A training picture of each concept above one wide picture of each way to draw them together."""
    scale, gap = 4, 8
    width, text_size = WIDTH * scale, HEIGHT * scale // 16
    side = (width - gap * (len(CONCEPTS) - 1)) // len(CONCEPTS)
    tops = [image.resize((side, side), Image.Resampling.BICUBIC) for image in training.values()]
    names = [f"<{name}>, a picture of it" for name in training]
    sheets = [grid(tops, len(tops), gap=gap, column_labels=names, text_size=text_size)]
    for label, images in wide.items():
        large = images[0].resize((width, HEIGHT * scale), Image.Resampling.BICUBIC)
        sheets.append(grid([large], 1, gap=0, column_labels=[label], text_size=text_size))
    return grid(sheets, 1, gap=gap)
