"""What one quiet or loud file does to the others: residuals, and image alignment, of three concepts of the embedded base.

    python benchmarks/hostile.py [--json FILE] [--images 1] [--prompts 4] [--cases as-tuned,quiet,loud,...] [--set guard=false]

The third concept's changes are scaled as the case says, by 1, 0.01, 30 and 1000, or added once more times -1 under
another name. Each concept's residual is over all layers; its alignment is of pictures on prompts that were not recorded,
with equal seeds over all cases.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Final

import torch
from figures import keep, known
from many import _case, _scored

from mixofshow import fuse, load_base, load_concept
from mixofshow.bases.emojiland.concepts import write_concept
from mixofshow.cli.options import assignments
from mixofshow.concepts.concept import Concept
from mixofshow.fusion.guard import rescaled
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.solving import share, total

CONCEPTS: Final = Path(__file__).parents[1] / "examples/concepts"
NAMES: Final = ("clown", "steamtrain", "robot")
CASES: Final = {"as-tuned": 1.0, "quiet": 0.01, "loud": 30.0, "very-loud": 1000.0, "negated": -1.0}


def main() -> None:
    """Fuse and measure each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("out/hostile"))
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--set", dest="given", action="append", default=[])
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    pipeline, settings = load_base("emojiland"), FusionSettings.of(assignments(options.given))
    concepts = [load_concept(CONCEPTS / f"{name}.safetensors", pipeline) for name in NAMES]
    for name in NAMES:
        if not (options.folder / "pictures" / name / "reference").is_dir():
            write_concept(name, options.folder / "pictures" / name)
    judged = [_case(concept, options.folder) for concept in concepts]
    judged = [dataclasses.replace(one, prompts=one.prompts[: options.prompts]) for one in judged]
    figures = known(options.json)
    for case in options.cases.split(","):
        fused = fuse(_mixed(concepts, CASES[case]), pipeline, settings)
        for one in judged:
            name = one.concept.info.name
            kept = total(fused.layers.values(), name)
            image, _ = _scored(one, fused.model, options.images)
            figures[f"{case}_{name}"] = [round(share(kept.residual_sq, kept.target_sq), 3), round(image, 3)]
        print(case, {name: figures[f"{case}_{name}"] for name in NAMES}, flush=True)
        keep(figures, options.json)


def _mixed(concepts: list[Concept], scale: float) -> list[Concept]:
    """The concepts, of which the last is scaled, or stands beside its negative."""
    last = concepts[-1]
    other = rescaled(last, dict.fromkeys(last.deltas, scale))
    if scale > 0:
        return [*concepts[:-1], other]
    info = last.info.model_copy(update={"name": "other", "words": ("<other1>", "<other2>")})
    return [*concepts, dataclasses.replace(other, info=info)]


if __name__ == "__main__":
    main()
