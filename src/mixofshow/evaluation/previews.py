"""Preview grids while a concept is tuned: its words only, at 0.7, and as tuned, on fixed seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from mixofshow.concepts.concept import Concept
from mixofshow.grids import grid
from mixofshow.outputs import writing
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.settings import STEPS
from mixofshow.tuning.run import Preview

STRENGTHS: Final = {"words only (0)": 0.0, "0.7": 0.7, "1.0": 1.0}


def preview_grids(pipeline: Any, folder: Path, *, images: int = 4) -> Preview:
    """A callback for `tune` that writes `folder`/STEP.png, one row per strength, one column per seed."""

    def preview(concept: Concept, step: int) -> None:
        """Draw and write one grid."""
        pictures = [
            image
            for strength in STRENGTHS.values()
            for image in MixOfShowPipeline.single(pipeline, concept, strength=strength)(
                f"a photo of a {concept.prompt}", num_images_per_prompt=images, num_inference_steps=STEPS, seed=0
            )
        ]
        seeds = [f"seed {seed}" for seed in range(images)]
        sheet = grid(pictures, images, row_labels=list(STRENGTHS), column_labels=seeds, corner=f"step {step}")
        with writing(folder / f"{step:06d}.png") as path:
            sheet.save(path, "PNG")

    return preview
