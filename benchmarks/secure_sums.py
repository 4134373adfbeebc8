"""What secure aggregation's quantization costs a fused model of Emojiland, by the way numbers are sent.

    python benchmarks/secure_sums.py --json out/secure-sums.json

Three concepts, of which only the changes of attention are taken, are fused in mode independent with equal weights, from
sums that were sent as
- limbs: whole numbers of 60 bits in three limbs, as this package does;
- flower: 2^22 levels between the largest and the smallest number of each array, rounded at random (flwr 1.42's default),
  the range being known, which it is not in life;
- whitened: the same after the moments are whitened by the base's own, which everybody has.
Given are the error of the fused change, relative to the change itself, and image alignment with held-out pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
LEVELS = 2**22
ATTENTION = re.compile(r"attn")
Terms = dict[str, Tensor]


def quantized(numbers: Tensor) -> Tensor:
    """As Flower sends it, with the best range that there is."""
    largest = float(numbers.abs().max()) or 1.0
    found = dequantize(quantize([numbers.numpy()], largest, LEVELS), largest, LEVELS)[0]
    return torch.from_numpy(found)


def by_limbs(shape: SumsShape, terms: list[Terms], _: Any) -> Terms:
    """Exact sums of rounded numbers."""
    sums = [sum(parts) for parts in zip(*map(shape.packed, terms), strict=True)]
    return shape.unpacked(sums)


def by_flower(shape: SumsShape, terms: list[Terms], _: Any) -> Terms:
    """Sums of quantized numbers."""
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


def main() -> None:
    """Measure, print, and write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--pictures", type=int, default=4)
    given = options.parse_args()
    base, settings = load_base("emojiland"), FusionSettings(**SECURE, steps=given.steps)
    examples = Path(__file__).parents[1] / "examples" / "concepts"
    concepts = [attention_only(load_concept(examples / f"{name}.safetensors", base)) for name in NAMES]
    shape = SumsShape.of(base, [name for one in concepts for name in one.deltas])
    terms = [own_terms(shape, one, settings) for one in concepts]
    exact = {name: sum((one[name] for one in terms), torch.zeros(())) for name, *_ in shape.parts()}
    roots = base_roots(shape, settings)
    judge = judge_scorer()
    out = Path("out/secure-sums")
    references = {}
    for name in NAMES:
        write_concept(name, out / name)
        references[name] = judge.images(references_of(out / name / "reference"))
    np.random.seed(0)
    true = solved(shape, exact, len(terms), settings)
    own = {name: matrix(layer(base, name)).double() for name in true}
    size = sum(float((true[name].double() - own[name]).square().sum()) for name in true) ** 0.5
    ways = {"exact": lambda *_: exact, "limbs": by_limbs, "flower": by_flower, "whitened": by_whitening}
    results = []
    for way, send in ways.items():
        started = time.process_time()
        weights = solved(shape, send(shape, terms, roots), len(terms), settings)
        error = sum(float((weights[n].double() - true[n].double()).square().sum()) for n in true) ** 0.5 / size
        draw = MixOfShowPipeline.of(ConceptModel(base, vocabulary(concepts), weights))
        how = {"num_images_per_prompt": given.pictures, "num_inference_steps": 20, "seed": 100}
        found = {
            one.info.name: image_alignment(judge.images(draw(f"a photo of a {one.prompt}", **how).images), references[one.info.name])
            for one in concepts
        }
        results.append({"way": way, "error": error, "alignment": found, "cpu_seconds": time.process_time() - started})
        print(f"{way:9} error {error:.2e}  " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
    count = sum(one.numel() if not name.startswith("moments") else len(one) * (len(one) + 1) // 2 for name, one in exact.items())
    facts = {"numbers": count, "layers": len(shape.layers), "megabytes_masked": count * 3 * 4 / 2**20}
    print(facts)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({**facts, "steps": given.steps, "pictures": given.pictures, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
