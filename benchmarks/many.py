"""Many concepts in one Emojiland: what fusing them costs each, by way of fusing, by both judges.

    python -m emojiland tunability --out out/many      tunes eighteen things that the base does not know
    python benchmarks/many.py [--folder out/many] [--json FILE] [--ways gradient,average] [--counts 2,4,8,14]
                              [--names clown,steamtrain]

Each concept is drawn at eight places by its own model and by every fused one, with equal seeds, and compared with its
held-out pictures; `base` is what the base draws of the class word. A broken-off run goes on: what the JSON file has is
not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Final

import torch
from figures import keep, known

from emojiland.tunability import pictures_of
from mixofshow import fuse, load_base, load_concept
from mixofshow.bases.emojiland.concepts import NEW_TO_THE_BASE
from mixofshow.concepts.concept import Concept
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.evaluation.metrics import image_alignment
from mixofshow.evaluation.scorers import imagenet_scorer, judge_scorer, references_of
from mixofshow.fusion.settings import PAPER, FusionSettings

WAYS: Final[dict[str, dict[str, Any]]] = {
    "gradient": {},
    "gradient-refitted": {"refit": 200},
    "gradient-refined": {"refine": 1},
    "gradient-paper": {**PAPER, "options": {"ridge": 1e-6, "toward": "base"}},
    "lbfgs": {**PAPER, "method": "lbfgs"},
    "average": {"method": "average", "steps": 1},
    "ties": {"method": "ties", "steps": 1},
    "regmean": {"method": "regmean"},
    "contrastive": {"method": "contrastive"},
}
SEED: Final = 100

Scores = dict[str, dict[str, float]]
"""By judge and concept, image alignment."""


def main() -> None:
    """Measure each concept alone, then fused with the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/many"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--counts", default="14")
    parser.add_argument("--names", default=",".join(NEW_TO_THE_BASE), help="whom the folder has, in this order")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    pipeline = load_base("emojiland")
    counts = [int(count) for count in options.counts.split(",")]
    names = options.names.split(",")[: max(counts)]
    concepts = [load_concept(options.folder / f"{name}.safetensors", pipeline) for name in names]
    scored = scoring(options.folder, concepts)
    figures = known(options.json)

    def measured(key: str, measure: Callable[[], Any]) -> Any:
        if key not in figures:
            figures[key] = measure()
            keep(figures, options.json)
        return figures[key]

    measured("base", lambda: scored([ConceptModel(pipeline)] * len(concepts), [one.info.class_word for one in concepts]))
    alone = measured("alone", lambda: scored([with_concept(pipeline, one) for one in concepts]))

    def fused(count: int, way: str) -> dict[str, Any]:
        started = time.perf_counter()
        model = fuse(concepts[:count], pipeline, FusionSettings.of(WAYS[way])).model
        return {"seconds": round(time.perf_counter() - started), **scored([model] * count)}

    for count, way in product(counts, options.ways.split(",")):
        show(f"{way} {count}", measured(f"{way} {count}", partial(fused, count, way)), alone)
    figures["mean"] = {key: means(found, list(alone)) for key, found in figures.items() if key != "mean"}
    keep(figures, options.json)


def scoring(folder: Path, concepts: list[Concept]) -> Callable[..., Scores]:
    """What looks at pictures of the first models' concepts, each asked for by its prompt or by another noun."""
    judges = {"judge": judge_scorer().images, "imagenet": imagenet_scorer()}
    kept = [references_of(folder / one.info.name / "reference") for one in concepts]
    references = {judge: [look(images) for images in kept] for judge, look in judges.items()}

    def scored(models: list[Any], nouns: list[str] | None = None) -> Scores:
        asked = nouns or [one.prompt for one in concepts]
        drawn = [pictures_of(model, noun, SEED) for model, noun in zip(models, asked, strict=False)]
        return {
            judge: {
                one.info.name: round(image_alignment(look(images), own), 4)
                for one, images, own in zip(concepts, drawn, references[judge], strict=False)
            }
            for judge, look in judges.items()
        }

    return scored


def means(found: dict[str, Any], judges: list[str]) -> dict[str, float]:
    """Over all concepts, of each judge."""
    return {judge: round(mean(found[judge].values()), 4) for judge in judges}


def show(title: str, found: dict[str, Any], alone: Scores) -> None:
    """The mean change of every judge, and the concept that lost most."""
    for judge in alone:
        change = {name: value - alone[judge][name] for name, value in found[judge].items()}
        worst = min(change, key=lambda name: change[name])
        print(
            f"{title}, {judge}: {mean(found[judge].values()):.4f} ({mean(change.values()):+.4f}), "
            f"worst {worst} {change[worst]:+.4f}, fused in {found['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
