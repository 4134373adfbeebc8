"""The guard: outliers are scaled down, negated copies excluded; duplicates and empty concepts are not counted.

All of it is decided before anything is recorded, from the changes alone: their inner products in each layer, relative
to the base weight, ⟨ΔW_i, ΔW_j⟩ / ‖W0‖². A concept's size in a stage is the root of the mean of ⟨ΔW_i, ΔW_i⟩ / ‖W0‖²
over the layers that it changes there. Honest concepts are within about twice each other's size in a stage, while in a
single layer they may differ fifty-fold: so files are compared stage by stage, and layers only with their own stage.

What no guard sees is a bad concept of usual size, nor that most of the files are outliers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from typing import Final

import torch
from torch import Tensor

from mixofshow.concepts.changes import Change
from mixofshow.concepts.concept import Concept
from mixofshow.fusion.recording import STAGES, Stage, stage_of

OUTLIER: Final = 1.3
"""A file is an outlier in a stage when its size is over so many times the others' median; it is scaled to just this size.

So much costs another less than a fifth more of its residual, by any method, and there is no jump where it begins.
"""
SPIKE: Final = 8.0
"""No single layer of it may be larger than so many times that median."""
TYPICAL: Final[Mapping[Stage, float]] = {"text": 0.03, "keys-and-values": 0.1, "picture": 0.1}
"""The median counts as no less than this, the size of a well tuned concept: beside quiet ones it is no outlier."""
NEGLIGIBLE: Final = 0.002
"""A concept that changes no layer by more of its norm is as good as one of words alone: it has no say in the layers."""
ALIKE: Final = 0.99
"""Two concepts whose changes in every stage (and words' vectors) have at least this cosine, and sizes within a tenth,
are one."""
OPPOSED: Final = -0.5
"""At most this cosine have a concept's changes and a negated copy's in some stage; honest ones have some -0.1 to 0.5."""
TELLING: Final = 0.01
"""By so much the cosines with all others must differ to tell which of two that undo each other is the copy."""

Grams = Mapping[str, Tensor]
"""By layer, the concepts' inner products there, (concepts, concepts), relative to the base weight's square."""


@dataclass(frozen=True)
class Verdict:
    """What a concept is scaled to by layer (1 where not named), whether it has a say in the layers' weights, and why."""

    why: str
    strengths: Mapping[str, float] = field(default_factory=dict)
    counted: bool = True

    @property
    def downweighted(self) -> bool:
        """Whether the guard did it."""
        return bool(self.strengths)

    @property
    def excluded(self) -> bool:
        """Whether it did so altogether."""
        return self.downweighted and not self.counted


def grams(bases: Mapping[str, Tensor], changes: Sequence[Mapping[str, Change]]) -> dict[str, Tensor]:
    """Inner products of the concepts' changes in the layers with these base weights, (out, in)."""
    found = {}
    for name, base in bases.items():
        scale = float(base.double().norm()) or 1.0
        rows = base.new_zeros(len(changes), base.numel(), dtype=torch.float32)
        for row, of_concept in zip(rows, changes, strict=True):
            if (change := of_concept.get(name)) is not None:
                row.copy_(change.matrix(dtype=torch.float32).flatten().div_(scale))
        found[name] = (rows @ rows.T).double().cpu()
    return found


def verdicts(bases: Mapping[str, Tensor], concepts: Sequence[Concept], *, guard: bool) -> dict[int, Verdict]:
    """By position, of those that do not take part as they are: empty ones, duplicates, and whom the guard scales down."""
    products = grams(bases, [concept.deltas for concept in concepts])
    names = [concept.info.name for concept in concepts]
    words = [concept.embeddings.double().flatten() for concept in concepts]
    found = negligible(products, len(concepts))
    found |= duplicates(products, names, words, gone=found)
    if guard:
        found |= negated(products, names, gone=found)
        found |= outliers(products, len(concepts), gone=found)
    return found


def as_judged(concepts: Sequence[Concept], found: Mapping[int, Verdict]) -> list[Concept]:
    """The concepts at the size that their verdicts leave them."""
    return [rescaled(one, found[k].strengths) if k in found else one for k, one in enumerate(concepts)]


def rescaled(concept: Concept, strengths: Mapping[str, float]) -> Concept:
    """The concept with its changes of some layers at another strength."""
    if not strengths:
        return concept
    deltas = {name: change.scaled(strengths.get(name, 1.0)) for name, change in concept.deltas.items()}
    return replace(concept, deltas=deltas)


def negligible(products: Grams, count: int) -> dict[int, Verdict]:
    """Those that change next to nothing; none if nobody changes more."""
    largest = [max((math.sqrt(one[k, k]) for one in products.values()), default=0.0) for k in range(count)]
    if max(largest, default=0.0) <= NEGLIGIBLE:
        return {}
    why = "changes next to nothing but words, and has no say in the layers"
    return {k: Verdict(why, counted=False) for k, size in enumerate(largest) if size <= NEGLIGIBLE}


def duplicates(
    products: Grams, names: Sequence[str], words: Sequence[Tensor], gone: Mapping[int, Verdict]
) -> dict[int, Verdict]:
    """Those that are one with an earlier concept, which counts for both."""
    found: dict[int, Verdict] = {}
    ones = torch.ones(len(names), len(names), dtype=torch.float64)
    alike = functools.reduce(torch.minimum, _cosines_by_stage(products).values(), ones)
    nothing = torch.zeros(len(names), dtype=torch.float64)
    sizes = sum((one.diagonal() for one in products.values()), nothing).sqrt()
    for late in range(len(names)):
        for early in range(late):
            if late in found or {late, early} & {*gone, *found} or alike[late, early] < ALIKE:
                continue
            same_words = words[late].shape == words[early].shape and (
                float(torch.cosine_similarity(words[late], words[early], 0)) >= ALIKE
            )
            if same_words and abs(sizes[late] - sizes[early]) <= 0.1 * sizes[early]:
                why = f"is <{names[early]}> once more, and the two count as one"
                found[late] = Verdict(why, counted=False)
    return found


def negated(products: Grams, names: Sequence[str], gone: Mapping[int, Verdict]) -> dict[int, Verdict]:
    """Of two that undo each other in some stage, the one that agrees less with all others there; both if these do not tell.

    Whoever is tuned on pictures changes a model in part as all others do (cosines of some 0.05, in the text encoder of
    0.3), which a negated copy does not. Copies of either are no witnesses: a negation given twice agrees with itself.
    """
    found: dict[int, Verdict] = {}
    counted = [k for k in range(len(names)) if k not in gone]
    by_stage = _cosines_by_stage(products)
    for number, one in enumerate(counted):
        for other in counted[:number]:
            against = {stage for stage, cosines in by_stage.items() if cosines[one, other] <= OPPOSED}
            if not against:
                continue
            alike = _cosines([product for name, product in products.items() if stage_of(name) in against])
            rest = [k for k in counted if alike[[one, other], k].abs().max() < -OPPOSED]
            lead = float((alike[one, rest] - alike[other, rest]).sum())
            unclear = abs(lead) < TELLING
            for k in [one, other] if unclear else [other if lead > 0 else one]:
                why = f"left out, for it undoes <{names[other if k == one else one]}>"
                why += ", and the others do not tell which is the copy" if unclear else ""
                found[k] = Verdict(why, dict.fromkeys(products, 0.0), counted=False)
    return found


def outliers(products: Grams, count: int, gone: Mapping[int, Verdict]) -> dict[int, Verdict]:
    """Those whose changes are far larger than the others', with what is left of them."""
    strengths: dict[int, dict[str, float]] = {}
    most: dict[int, float] = {}
    for stage in STAGES:
        layers = [name for name in products if stage_of(name) == stage]
        sizes = {k: [math.sqrt(products[name][k, k]) for name in layers] for k in range(count) if k not in gone}
        volumes = {k: _root_mean(own) for k, own in sizes.items()}
        for k, own in sizes.items():
            others = [volume for j, volume in volumes.items() if j != k and volume > 0]
            if not others:
                continue
            typical = max(median_low(others), TYPICAL[stage])
            clipped = [min(size, SPIKE * typical) for size in own]
            share = min(OUTLIER * typical / volume, 1.0) if (volume := _root_mean(clipped)) else 1.0
            turned_to = {n: share * now / was for n, now, was in zip(layers, clipped, own, strict=True) if was > 0}
            if less := {name: left for name, left in turned_to.items() if left < 1}:
                strengths[k] = strengths.get(k, {}) | less
                most[k] = max(most.get(k, 0.0), volumes[k] / typical)
    why = "{:.3g} times as loud as the others, turned down in {} layers, to {:.2g} at least"
    return {k: Verdict(why.format(most[k], len(left), min(left.values())), left) for k, left in strengths.items()}


def _root_mean(sizes: Sequence[float]) -> float:
    """Root mean square of those that are not 0."""
    there = [size**2 for size in sizes if size > 0]
    return math.sqrt(sum(there) / len(there)) if there else 0.0


def _cosines_by_stage(products: Grams) -> dict[Stage, Tensor]:
    """Of the concepts' changes in each stage, (concepts, concepts)."""
    layers: dict[Stage, list[Tensor]] = {}
    for name, product in products.items():
        layers.setdefault(stage_of(name), []).append(product)
    return {stage: _cosines(inside) for stage, inside in layers.items()}


def _cosines(products: Sequence[Tensor]) -> Tensor:
    """Of the concepts' changes over some layers, (concepts, concepts); 0 where one has none, and 1 where neither has."""
    total = torch.stack(list(products)).sum(0)
    sizes = total.diagonal().sqrt()
    none = sizes == 0
    return torch.where(none[:, None] & none, 1.0, total / (sizes[:, None] * sizes + none[:, None] + none))
