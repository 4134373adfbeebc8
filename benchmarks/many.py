"""Twelve concepts in one model of the embedded base: what fusing them costs each, by way of fusing.

    python benchmarks/many.py [--json FILE] [--folder out/many] [--ways gradient,average] [--counts 2,4,8,12]
                              [--images 2] [--tuning words]

Concepts are tuned once and kept in the folder. Each is then drawn on eight prompts by its own model and by every fused
one, with equal seeds. A broken-off run goes on: what the JSON file has is not measured again. `--tuning words` changes
only what cross-attention makes of the words; `attention` is ED-LoRA as the paper has it, whose changes of the picture's
layers do not fit into one small model.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from figures import keep, known

from mixofshow import fuse, load_base, load_concept, make_settings, tune
from mixofshow.bases.emojiland.concepts import SCENES, class_word, write_concept
from mixofshow.concepts.concept import Concept
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.evaluation.metrics import image_alignment, text_scores
from mixofshow.evaluation.scorers import judge_scorer, references_of
from mixofshow.evaluation.suite import read_suite
from mixofshow.evaluation.suite_settings import usual_prompts
from mixofshow.evaluation.tasks import draw
from mixofshow.fusion.settings import PAPER, FusionSettings
from mixofshow.sampling.settings import Composition

CONCEPTS: Final = (
    *("reddog", "bluedog", "foxy", "mintcat", "greencop"),
    *("greenhouse", "blueguitar", "bluecar", "teapot", "trophy"),
    *("volcano", "candy-land"),
)
TUNING: Final[dict[str, dict[str, Any]]] = {
    "words": {
        "unet": {"targets": "keys-and-values", "rate": 3e-3, "rank": 8},
        "text_encoder": {"rate": 3e-5},
        "words": {"rate": 1e-2},
    },
    "attention": {},
}
SUITE: Final = Path(__file__).parents[1] / "examples/suites/emojiland-table1.yaml"
PRIOR: Final = {key: read_suite(SUITE).methods[-1].fuse[key] for key in ("prior", "prior_prompts")}
"""As where fourteen are fused; none of these is a prompt that anything is measured on."""
WAYS: Final[dict[str, dict[str, Any]]] = {
    "gradient": PRIOR,
    "gradient-refitted": {**PRIOR, "refit": 100},
    "gradient-no-prior": {},
    "gradient-refined": {**PRIOR, "refine": 1},
    "gradient-independent": {**PRIOR, "mode": "independent"},
    "gradient-paper": {**PAPER, "options": {"ridge": 1e-6, "toward": "base"}},
    "lbfgs": {**PAPER, "method": "lbfgs"},
    "average": {"method": "average", "steps": 1},
    "ties": {"method": "ties", "steps": 1},
    "regmean": {"method": "regmean"},
}


def main() -> None:
    """Tune what is not there, then fuse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("out/many"))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--tuning", choices=TUNING, default="words")
    parser.add_argument("--counts", default=str(len(CONCEPTS)))
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    pipeline = load_base("emojiland")
    concepts = [_concept(name, options.folder, options.tuning, pipeline) for name in CONCEPTS]
    score = partial(_scored, folder=options.folder, images=options.images)
    single = [score(with_concept(pipeline, concept), concept) for concept in concepts]
    figures = known(options.json)
    for count in map(int, options.counts.split(",")):
        found = figures.setdefault(options.tuning, {}).setdefault(str(count), {})
        found["single"] = _mean(single[:count])
        for way in (way for way in options.ways.split(",") if way not in found):
            started = time.perf_counter()
            model = fuse(concepts[:count], pipeline, FusionSettings.of(WAYS[way])).model
            seconds = round(time.perf_counter() - started)
            found[way] = _mean([score(model, concept) for concept in concepts[:count]])
            image, text = (found[way][key] - found["single"][key] for key in found["single"])
            print(f"{count}, {way}: {found[way]} ({image:+.4f}, {text:+.3f}), fused in {seconds} s", flush=True)
            keep(figures, options.json)


def _concept(name: str, folder: Path, tuning: str, pipeline: Any) -> Concept:
    path, pictures = folder / f"{name}-{tuning}.safetensors", folder / "pictures" / name
    if not (pictures / "reference").is_dir():
        write_concept(name, pictures)
    if not path.is_file():
        table = {"name": name, "class_word": class_word(name), "data": pictures / "train", "tracker": "none"}
        tune(make_settings({**table, **TUNING[tuning]}), pipeline).save(path)
    return load_concept(path, pipeline)


def _scored(model: ConceptModel, concept: Concept, *, folder: Path, images: int) -> tuple[float, float]:
    """Image and text alignment of a model's pictures of one concept."""
    name, scorer = concept.info.name, judge_scorer()
    by_category = usual_prompts("emojiland")["scene" if name in SCENES else "subject"]
    prompts = (*by_category["context"], *by_category["attribute"][:3])
    wanted = [Composition(prompt=prompt.format(concept.prompt), num=images, seed=100) for prompt in prompts]
    made = scorer.images([image for one in wanted for image in draw(model, one)])
    texts = scorer.texts([prompt.format(concept.info.class_word) for prompt in prompts for _ in range(images)])
    references = scorer.images(references_of(folder / "pictures" / name / "reference"))
    return image_alignment(made, references), float(text_scores(made, texts).mean())


def _mean(scores: list[tuple[float, float]]) -> dict[str, float]:
    image, text = (sum(row) / len(scores) for row in zip(*scores, strict=True))
    return {"image_alignment": round(image, 4), "text_alignment": round(text, 3)}


if __name__ == "__main__":
    main()
