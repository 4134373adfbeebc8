"""Preview grids while a concept is tuned: its words only, at 0.7, and as tuned, on fixed seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from PIL import Image

from mixofshow.concepts.concept import Concept
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.tuning.trainer import Preview

STRENGTHS: Final = (0.0, 0.7, 1.0)


def preview_grids(pipeline: Any, folder: Path, *, images: int = 4) -> Preview:
    """A callback for `tune` that writes `folder`/STEP.png, one row per strength."""

    def preview(concept: Concept, step: int) -> None:
        """Draw and write one grid."""
        rows = [
            MixOfShowPipeline.single(pipeline, concept, strength=strength)(
                f"a photo of a {concept.prompt}", num_images=images
            )
            for strength in STRENGTHS
        ]
        width, height = rows[0][0].size
        sheet = Image.new("RGB", (width * images, height * len(rows)))
        for y, row in enumerate(rows):
            for x, image in enumerate(row):
                sheet.paste(image, (x * width, y * height))
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"{step:06d}.png")

    return preview
