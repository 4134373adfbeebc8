"""What secure aggregation's quantization costs a fused model of Emojiland, by the way numbers are sent.

    python benchmarks/secure_sums.py --json out/secure-sums.json [--pictures 8]

Three concepts, of which only the changes of attention are taken, are fused in mode independent with equal weights, from
sums that were sent as
- limbs: whole numbers of 60 bits in three limbs, as this package does;
- flower: 2^22 levels between the largest and the smallest number, rounded at random, which is flwr 1.42's default, with
  one range for all numbers, as it has; the range being known, which it is not in life;
- by-array: the same with a range for each array;
- whitened: the same after the moments are whitened by the base's own, which everybody has.
Given are, for the usual ridge and for one that damps next to nothing, the error of the fused change relative to the
change itself, over all layers and in the worst; with --pictures, for the usual ridge, also image alignment with held-out
ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import keep
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from torch import Tensor

from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.bases.layers import layer, matrix
from mixofshow.bases.loading import load_base
from mixofshow.concepts.concept import Concept, load_concept, vocabulary
from mixofshow.concepts.model import ConceptModel
from mixofshow.evaluation.metrics import image_alignment
from mixofshow.evaluation.scorers import judge_scorer, references_of
from mixofshow.federation.plan import SECURE
from mixofshow.federation.sums import SumsShape, own_terms, solved
from mixofshow.fusion.recording import Source, record
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.statistics import input_of
from mixofshow.sampling.pipeline import MixOfShowPipeline

NAMES = ("clown", "robot", "steamtrain")
PROMPTS = ("photo of a {}",)
LEVELS = 2**22
ATTENTION = re.compile(r"attn")
Terms = dict[str, Tensor]


def quantized(numbers: Tensor, largest: float = 0.0) -> Tensor:
    """As Flower sends it, with this range or the best that there is."""
    largest = largest or float(numbers.abs().max()) or 1.0
    found = dequantize(quantize([numbers.numpy()], largest, LEVELS), largest, LEVELS)[0]
    return torch.from_numpy(found)


def by_limbs(shape: SumsShape, terms: list[Terms], _: Any) -> Terms:
    """Exact sums of rounded numbers."""
    sums = [sum(parts) for parts in zip(*map(shape.packed, terms), strict=True)]
    return shape.unpacked(sums)


def by_flower(shape: SumsShape, terms: list[Terms], _: Any) -> Terms:
    """Sums of numbers that were quantized over one range."""
    largest = max(float(one.abs().max()) for of_concept in terms for one in of_concept.values())
    return {name: sum((quantized(one[name], largest) for one in terms), torch.zeros(())) for name, *_ in shape.parts()}


def by_array(shape: SumsShape, terms: list[Terms], _: Any) -> Terms:
    """Sums of numbers that were quantized array by array."""
    return {name: sum((quantized(one[name]) for one in terms), torch.zeros(())) for name, *_ in shape.parts()}


def by_whitening(shape: SumsShape, terms: list[Terms], roots: Mapping[str, Tensor]) -> Terms:
    """Moments as L⁻¹ C L⁻ᵀ and right-hand sides as R L⁻ᵀ, with L Lᵀ the base's own moments."""
    found = {}
    for name, *_ in shape.parts():
        kind, _, rest = name.partition(" ")
        if kind == "change":
            found[name] = sum((quantized(one[name]) for one in terms), torch.zeros(()))
            continue
        root = roots[rest if kind == "moments" else input_of(rest)]
        total = torch.zeros(())
        for one in terms:
            right = torch.linalg.solve_triangular(root, one[name].T, upper=False).T
            total = total + quantized(torch.linalg.solve_triangular(root, right, upper=False) if kind == "moments" else right)
        found[name] = (root @ total if kind == "moments" else total) @ root.T
    return found


def base_roots(shape: SumsShape, settings: FusionSettings) -> dict[str, Tensor]:
    """Of what the base itself sees, damped so that they can be inverted."""
    seen = record(shape.pipeline, Source(None, ("a photo",), ("a photo",)), shape.layers, settings)
    roots = {}
    for name, one in seen.items():
        damped = one.moments + 1e-3 * one.moments.diagonal().mean() * torch.eye(len(one.moments), dtype=torch.float64)
        roots[name] = torch.linalg.cholesky(damped)
    return roots


def attention_only(concept: Concept) -> Concept:
    """The concept without its changes of convolutions and other layers, whose sums would take gigabytes."""
    return dataclasses.replace(concept, deltas={name: one for name, one in concept.deltas.items() if ATTENTION.search(name)})


WAYS = {"limbs": by_limbs, "by-array": by_array, "whitened": by_whitening, "flower": by_flower}
RIDGES = {"usual": {}, "next to none": {"ridge": 1e-6}}


def errors(true: Mapping[str, Tensor], found: Mapping[str, Tensor], base: Any) -> dict[str, float]:
    """Relative errors of the fused change: over all layers, and in the worst."""
    wrong = {name: float((found[name].double() - one.double()).norm()) for name, one in true.items()}
    change = {name: float((one.double() - matrix(layer(base, name)).double()).norm()) for name, one in true.items()}
    overall = sum(one**2 for one in wrong.values()) ** 0.5 / sum(one**2 for one in change.values()) ** 0.5
    return {"error": overall, "worst": max(wrong[name] / change[name] for name in true if change[name])}


def alignments(model: ConceptModel, concepts: list[Concept], count: int) -> dict[str, float]:
    """Image alignment of each concept's pictures with held-out ones, by Emojiland's judge."""
    judge, found = judge_scorer(), {}
    for one in concepts:
        folder = Path("out/secure-sums") / one.info.name
        write_concept(one.info.name, folder)
        drawn = MixOfShowPipeline.of(model)(f"a photo of a {one.prompt}", num_images_per_prompt=count, seed=100).images
        references = judge.images(references_of(folder / "reference"))
        found[one.info.name] = image_alignment(judge.images(drawn), references)
    return found


def main() -> None:
    """Measure, print, and write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path)
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--pictures", type=int, default=0)
    options.add_argument("--ways", default=",".join(["exact", *WAYS]))
    options.add_argument("--ridges", default=",".join(RIDGES))
    given = options.parse_args()
    torch.set_num_threads(1)
    base = load_base("emojiland")
    how: dict[str, Any] = {**SECURE, "steps": given.steps, "prompts": PROMPTS, "picture_prompts": PROMPTS}
    examples = Path(__file__).parents[1] / "examples" / "concepts"
    concepts = [attention_only(load_concept(examples / f"{name}.safetensors", base)) for name in NAMES]
    shape = SumsShape.of(base, [name for one in concepts for name in one.deltas])
    terms = [own_terms(shape, one, FusionSettings(**how)) for one in concepts]
    exact = {name: sum((one[name] for one in terms), torch.zeros(())) for name, *_ in shape.parts()}
    roots = base_roots(shape, FusionSettings(**how))
    results: list[dict[str, Any]] = []
    for ridge in given.ridges.split(","):
        settings = FusionSettings(**how, options=RIDGES[ridge])
        true = solved(shape, exact, len(terms), settings)
        for way in given.ways.split(","):
            np.random.seed(0)
            sums = exact if way == "exact" else WAYS[way](shape, terms, roots)
            weights = solved(shape, sums, len(terms), settings)
            row = {"ridge": ridge, "way": way, **errors(true, weights, base)}
            if given.pictures and ridge == "usual":
                row |= alignments(ConceptModel(base, vocabulary(concepts), weights), concepts, given.pictures)
            results.append(row)
            print("  ".join(f"{key} {value:.2e}" if isinstance(value, float) else f"{value:12}" for key, value in row.items()), flush=True)
    count = sum(one.numel() if not name.startswith("moments") else len(one) * (len(one) + 1) // 2 for name, one in exact.items())
    facts = {"numbers": count, "layers": len(shape.layers), "megabytes_masked": count * 3 * 4 / 2**20}
    print(facts)
    keep({**facts, "steps": given.steps, "pictures": given.pictures, "results": results}, given.json)


if __name__ == "__main__":
    main()
