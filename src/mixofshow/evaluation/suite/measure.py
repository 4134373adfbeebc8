"""From pictures to numbers: every request's pictures are looked at once, and every number is made from those features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mixofshow.evaluation import metrics
from mixofshow.evaluation.scorers import ImageTower, Scorer
from mixofshow.evaluation.suite.plan import Arm, Asked, Plan, Together
from mixofshow.evaluation.suite.settings import GROUPS, MEAN, ConceptEntry
from mixofshow.evaluation.suite.work import Request

ALONE: Final = "interaction"
"""The category whose pictures show other things too; confusing those for the concept proves nothing."""

Values = Mapping[str, Tensor]
"""By concept, a number for every picture, (prompts, seeds)."""
Slices = Mapping[str, Mapping[str, Tensor]]
"""By name, what a mean is taken over: by concept, the numbers of its prompts."""


@dataclass(frozen=True)
class Pictures:
    """Held-out and training pictures of each concept, as features (pictures, dim)."""

    references: Mapping[str, Tensor]
    training: Mapping[str, Tensor]


@dataclass
class Eye:
    """Looks at every request's pictures once. Features are (pictures, dim)."""

    tower: ImageTower
    folder: Path
    seen: dict[Request, Tensor] = field(default_factory=dict)

    def request(self, request: Request) -> Tensor:
        """Features of a request's pictures, (seeds, dim)."""
        if request not in self.seen:
            self.seen[request] = self.tower(request.pictures(self.folder))
        return self.seen[request]

    def row(self, row: Sequence[Asked]) -> Tensor:
        """Features of all pictures of a concept, (prompts, seeds, dim)."""
        return torch.stack([self.request(asked.request) for asked in row])

    def crops(self, one: Together) -> Tensor:
        """Features of each region of wide pictures, (seeds, regions, dim)."""
        parts = [picture.crop(box) for picture in one.request.pictures(self.folder) for box in one.boxes]
        return rearrange(self.tower(parts), "(seeds regions) dim -> seeds regions dim", regions=len(one.boxes))


def image_values(arm: Arm, eye: Eye, references: Mapping[str, Tensor], *, first: bool = False) -> Values:
    """Cosines with all references of the concept, or with the first only, as the paper's published script has it."""
    return {
        name: metrics.reference_scores(eye.row(row), references[name][:1] if first else references[name])
        for name, row in arm.items()
    }


def text_values(arm: Arm, eye: Eye, scorer: Scorer) -> Values:
    """CLIPScores with the prompts in which the concept is called by its class word."""
    return {
        name: metrics.text_scores(eye.row(row), scorer.texts([asked.plain for asked in row])[:, None])
        for name, row in arm.items()
    }


def slices(concepts: Sequence[ConceptEntry], arm: Arm) -> Slices:
    """The mean over everything, over each kind of concept, and over each category of prompts."""
    prompts = {name: [asked.category for asked in row] for name, row in arm.items()}
    every = {name: torch.arange(len(row)) for name, row in prompts.items()}
    found: dict[str, dict[str, Tensor]] = {MEAN: every}
    for kind, group in GROUPS.items():
        found[group] = {one.name: every[one.name] for one in concepts if one.kind == kind}
    for category in dict.fromkeys(category for row in prompts.values() for category in row):
        rows = {name: [k for k, one in enumerate(row) if one == category] for name, row in prompts.items()}
        found[category] = {name: torch.tensor(numbers) for name, numbers in rows.items() if numbers}
    return {name: chosen for name, chosen in found.items() if chosen}


def per_seed(values: Values, chosen: Mapping[str, Tensor]) -> Tensor:
    """The mean over a slice for each seed, (seeds,): over a concept's prompts, then over concepts."""
    return torch.stack([values[name][rows].double().mean(0) for name, rows in chosen.items()]).mean(0)


def region_hits(together: Iterable[Together], eye: Eye, references: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By concept, whether each of its regions is nearest to it of all fused concepts: 0 or 1, (pictures × seeds…,)."""
    names, hits = list(references), dict[str, list[Tensor]]()
    for one in together:
        judged = metrics.nearest_concept(eye.crops(one), list(references.values()))
        for place, name in enumerate(one.names):
            hits.setdefault(name, []).append((judged[:, place] == names.index(name)).double())
    return {name: torch.stack(rows) for name, rows in hits.items()}


def confusions(arm: Arm, eye: Eye, references: Mapping[str, Tensor]) -> Tensor:
    """Asked for i, judged as j; pictures with other things in them are left out. (concepts, concepts)."""
    names = list(references)
    asked, judged = [], []
    for name, row in arm.items():
        alone = [one for one in row if one.category != ALONE] or row
        found = metrics.nearest_concept(eye.row(alone).flatten(0, 1), list(references.values()))
        asked.append(torch.full_like(found, names.index(name)))
        judged.append(found)
    return metrics.interference(torch.cat(asked), torch.cat(judged), len(names))


def mean_diversity(arm: Arm, eye: Eye) -> float | None:
    """Mean over concepts of how much pictures of one prompt differ; none where there is one seed only."""
    found = [metrics.diversity(eye.row(row)) for row in arm.values()]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def mean_distance_to_training(arm: Arm, eye: Eye, training: Mapping[str, Tensor]) -> float:
    """Mean over concepts of pictures' distances to the nearest training picture."""
    found = [metrics.distance_to_nearest(eye.row(row).flatten(0, 1), training[name]) for name, row in arm.items()]
    return sum(found) / len(found)


def prior_drift(plan: Plan, key: str, eye: Eye) -> float | None:
    """How far pictures without concepts moved through a method's fusion; none without prompts for it."""
    before, after = plan.base_without, plan.fused_without[key]
    if not before:
        return None
    return metrics.drift(
        torch.cat([eye.request(one) for one in before]), torch.cat([eye.request(one) for one in after])
    )


def look(tower: ImageTower, pictures: Mapping[str, Sequence[Image.Image]]) -> dict[str, Tensor]:
    """Features by concept, (pictures, dim)."""
    return {name: tower(images) for name, images in pictures.items()}
