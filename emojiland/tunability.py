"""Whether a base can learn what it does not know: many things are tuned with default settings and told from one another.

A thing is learned when pictures of its own model are nearer its held-out pictures than those of all others, by judges
that had no part in training, and when the base asked for the class word is far from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.evaluation.metrics import image_alignment, reference_scores, self_alignment
from mixofshow.evaluation.scorers import ImageTower, references_of
from mixofshow.evaluation.tasks import draw
from mixofshow.grids import grid
from mixofshow.progress import Progress, silent
from mixofshow.sampling.settings import Composition
from mixofshow.tuning.trainer import tune

PROMPTS: Final = (
    "a photo of a {} on the beach",
    "a photo of a {} in the forest",
    "a photo of a {} in the snow",
    "a photo of a {} in the city",
    "a photo of a {} at night",
    "a photo of a {} on a green background",
    "a photo of a {} in the mountains",
    "a photo of a {} in the desert",
)
"""As the references are: one thing in a place."""


@dataclass(frozen=True)
class Learned:
    """One thing by one judge: cosines with its held-out pictures, and how often it is nearest its own."""

    lower_bound: float
    single: float
    among_references: float
    nearest: float


Judged = dict[str, dict[str, Learned]]
"""By judge, then by thing."""


def measure(
    pipeline: Any,
    things: Mapping[str, tuple[Path, str]],
    judges: Mapping[str, ImageTower],
    out: Path,
    *,
    seed: int = 100,
    progress: Progress = silent,
) -> Judged:
    """Of things by name: a folder with `train` and `reference` pictures, and the class word.

    Concepts are tuned with the base's default settings, unless `out` has them of an earlier run; beside each lies a
    grid of what it draws. Raises DatasetError, BadInputError.
    """
    drawn: dict[str, list[Image.Image]] = {}
    bound: dict[str, list[Image.Image]] = {}
    for name, (folder, class_word) in things.items():
        concept = _tuned(pipeline, name, folder, class_word, out / f"{name}.safetensors")
        drawn[name] = pictures_of(with_concept(pipeline, concept), concept.prompt, seed)
        bound[name] = pictures_of(ConceptModel(pipeline), class_word, seed)
        grid([*drawn[name], *bound[name]], columns=len(PROMPTS)).save(out / f"{name}.png")
        progress(len(drawn), len(things), {})
    kept = {name: references_of(folder / "reference") for name, (folder, _) in things.items()}
    return {judge: _judged(look, drawn, bound, kept) for judge, look in judges.items()}


def _tuned(pipeline: Any, name: str, folder: Path, class_word: str, file: Path) -> Concept:
    if file.exists():
        return load_concept(file, pipeline)
    concept = tune(pipeline, folder / "train", name=name, class_word=class_word)
    concept.save(file)
    return concept


Images = Mapping[str, Sequence[Image.Image]]


def _judged(look: ImageTower, drawn: Images, bound: Images, kept: Images) -> dict[str, Learned]:
    references = {name: look(images) for name, images in kept.items()}
    made = {name: look(images) for name, images in drawn.items()}
    return {
        name: Learned(
            lower_bound=image_alignment(look(bound[name]), own),
            single=image_alignment(made[name], own),
            among_references=self_alignment(own),
            nearest=nearest_share(made[name], references, name),
        )
        for name, own in references.items()
    }


def pictures_of(model: ConceptModel, noun: str, seed: int) -> list[Image.Image]:
    """The noun in each of the eight places."""
    return [image for prompt in PROMPTS for image in draw(model, Composition(prompt=prompt.format(noun), seed=seed))]


def nearest_share(made: Tensor, references: Mapping[str, Tensor], name: str) -> float:
    """How many of the pictures (pictures, dim) have their highest mean cosine with the references of `name`."""
    scores = torch.stack([reference_scores(made, own) for own in references.values()], dim=-1)
    return float((scores.argmax(-1) == list(references).index(name)).float().mean())


def summary(rows: Mapping[str, Learned]) -> dict[str, float]:
    """Of one judge: shares and means over all things, and the smallest distance of a thing from its lower bound."""
    every = list(rows.values())
    mean = {key: sum(asdict(one)[key] for one in every) / len(every) for key in asdict(every[0])}
    return {
        "nearest": mean["nearest"],
        "of_references": mean["single"] / mean["among_references"],
        "above_lower_bound": min(one.single - one.lower_bound for one in every),
    }


def print_learned(judged: Judged) -> None:
    """A table for each judge, a row for each thing, and its summary."""
    for judge, rows in judged.items():
        table = Table(*("thing", *asdict(next(iter(rows.values())))), title=judge)
        for name, row in rows.items():
            table.add_row(name, *(f"{value:.3f}" for value in asdict(row).values()))
        Console().print(table)
        Console().print("  ".join(f"{key} {value:.3f}" for key, value in summary(rows).items()))
