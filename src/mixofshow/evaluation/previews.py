"""Tuning a concept into a file, with preview grids on the way: its words only, at 0.7, and as tuned, on fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mixofshow.concepts.concept import Concept
from mixofshow.grids import grid
from mixofshow.progress import Progress, silent
from mixofshow.sampling.pictures import write_picture
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.settings import STEPS
from mixofshow.tuning.run import Preview
from mixofshow.tuning.settings import TuningSettings
from mixofshow.tuning.trainer import tune

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
        write_picture(sheet, folder / f"{step:06d}.png")

    return preview


def tune_into(
    target: Path,
    settings: TuningSettings,
    pipeline: Any,
    *,
    folder: Path,
    resume: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None],
) -> None:
    """Tune a concept into a file; checkpoints, curves and previews go to `folder`. What is written is said, a line each.

    What is stopped early is kept too: in the target's place if nothing is there, for what is whole is not replaced by
    what is not; else in `folder`. Raises as `tune` does.
    """

    def save(concept: Concept, place: Path) -> None:
        concept.save(place)
        steps, size = concept.info.settings["steps"], place.stat().st_size / 2**20
        say(f"{place}: {settings.placeholder}, {settings.method}, {steps} steps, {size:.2f} MB")

    def stopped(concept: Concept, step: int) -> None:
        save(concept, folder / f"{step:06d}.safetensors" if target.exists() else target)

    preview = preview_grids(pipeline, folder) if settings.preview_every else None
    watched: dict[str, Any] = {"progress": progress, "preview": preview, "stopped": stopped}
    tune(settings, pipeline, folder=folder, resume=resume, **watched, finished=lambda concept: save(concept, target))
