"""The paper's evaluation (Mix-of-Show §4.1): how much of each concept's identity is left, single → fused.

For every concept the same prompts and seeds are drawn by each model. `lower_bound` is the untuned base asked for the
class word, `single` the concept's own model, the others are fused models that hold all concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image
from torch import Tensor

from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.errors import SettingsError, shown
from mixofshow.evaluation.drawing import draw
from mixofshow.evaluation.metrics import image_alignment, text_alignment
from mixofshow.evaluation.prompts import prompts_for
from mixofshow.evaluation.scorers import Scorer
from mixofshow.progress import Progress, silent
from mixofshow.sampling.settings import STEPS, Composition
from mixofshow.tuning.dataset import read_folder

LOWER_BOUND: Final = "lower_bound"
SINGLE: Final = "single"


@dataclass(frozen=True)
class EvaluationSettings:
    """How many pictures, and how they are drawn."""

    images_per_prompt: int = 4
    num_inference_steps: int = STEPS
    guidance_scale: float | None = None
    seed: int = 100


@dataclass(frozen=True)
class Case:
    """A concept, the held-out pictures of it, and the prompts to draw it on."""

    concept: Concept
    references: Sequence[Image.Image]
    prompts: Sequence[str]


@dataclass(frozen=True)
class Score:
    """Alignments of one model's pictures of one concept, and some of the pictures."""

    image: float
    text: float
    samples: tuple[Image.Image, ...]


Scores = dict[str, dict[str, Score]]
"""By model, then by concept."""


def case_of(pair: str, pipeline: Any, base: str, kind: str) -> Case:
    """A case from "FILE=FOLDER" on the command line. Raises SettingsError, ConceptFileError, DatasetError."""
    file, found, folder = pair.partition("=")
    if not (found and file and folder):
        raise SettingsError(
            f"'{shown(pair)}': expected FILE=FOLDER, a concept file and a folder of held-out pictures of it"
        )
    return Case(load_concept(file, pipeline), references_of(Path(folder)), prompts_for(base, kind))


def references_of(folder: Path) -> list[Image.Image]:
    """Held-out pictures of a folder. Raises DatasetError."""
    return [example.image for example in read_folder(folder, instance_prompt="", with_masks=False)]


def evaluate(
    pipeline: Any,
    cases: Sequence[Case],
    fused: Mapping[str, ConceptModel],
    scorer: Scorer,
    settings: EvaluationSettings | None = None,
    *,
    progress: Progress = silent,
) -> Scores:
    """Score the lower bound, every single concept and every fused model on every case."""
    settings = settings or EvaluationSettings()
    base = ConceptModel(pipeline)
    total, done = len(cases) * (2 + len(fused)), 0
    scores: Scores = {name: {} for name in (LOWER_BOUND, SINGLE, *fused)}
    for case in cases:
        info, references = case.concept.info, scorer.images(case.references)
        asked = {
            LOWER_BOUND: (base, info.class_word),
            SINGLE: (with_concept(pipeline, case.concept), case.concept.prompt),
        }
        asked |= {name: (model, case.concept.prompt) for name, model in fused.items()}
        for name, (model, noun) in asked.items():
            scores[name][info.name] = score(model, noun, case, references=references, scorer=scorer, settings=settings)
            done += 1
            progress(done, total, {})
    return scores


def score(
    model: ConceptModel, noun: str, case: Case, *, references: Tensor, scorer: Scorer, settings: EvaluationSettings
) -> Score:
    """Draw the case's prompts with `noun` in them and compare with references and class-word texts."""
    images: list[Image.Image] = []
    for prompt in case.prompts:
        wanted = Composition(
            prompt=prompt.format(noun),
            num=settings.images_per_prompt,
            seed=settings.seed,
            steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )
        images += draw(model, wanted)
    asked = [
        prompt.format(case.concept.info.class_word)
        for prompt in case.prompts
        for _ in range(settings.images_per_prompt)
    ]
    made = scorer.images(images)
    return Score(
        image_alignment(made, references),
        text_alignment(made, scorer.texts(asked)),
        tuple(images[:: settings.images_per_prompt]),
    )


def means(scores: Scores) -> dict[str, dict[str, float]]:
    """Mean alignments by measure, then by model: {"image_alignment": {"single": …}, "text_alignment": …}."""

    def mean(model: str, measure: str) -> float:
        values = [getattr(one, measure) for one in scores[model].values()]
        return sum(values) / len(values)

    return {f"{measure}_alignment": {model: mean(model, measure) for model in scores} for measure in ("image", "text")}
