"""Pictures of the class word, which keep the base from forgetting it (Custom Diffusion §3.2, DreamBooth §3.2)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import ResourceError, shown
from mixofshow.progress import Progress
from mixofshow.tuning.dataset import Example, read_folder
from mixofshow.tuning.settings import TuningSettings

DRAWN_AT_ONCE: Final = 8


def prior_prompt(settings: TuningSettings) -> str:
    """The caption of pictures of the class word."""
    return settings.prior.prompt or f"a photo of a {settings.class_word}"


@torch.no_grad()
def prior_examples(settings: TuningSettings, pipeline: Any, progress: Progress) -> list[Example]:
    """The folder's pictures, or as many as asked for, drawn by the base with its own scheduler; none without weight."""
    prompt = prior_prompt(settings)
    if not settings.prior.weight:
        return []
    if settings.prior.data:
        return read_folder(settings.prior.data, instance_prompt=prompt, skip_bad=settings.skip_bad, with_masks=False)
    images: list[Any] = []
    count, guidance = settings.prior.count, ConceptModel(pipeline).usual_guidance
    while len(images) < count:
        part = range(len(images), min(len(images) + DRAWN_AT_ONCE, count))
        generators = [torch.Generator().manual_seed(settings.seed + number) for number in part]
        drawn = pipeline([prompt] * len(part), generator=generators, guidance_scale=guidance, output_type="np").images
        if not np.isfinite(drawn).all():
            raise ResourceError(f"prior: the base draws '{shown(prompt)}' with values that are not finite; try fp32")
        images += pipeline.image_processor.numpy_to_pil(drawn)
        progress(len(images), count, {})
    return [Example(image, prompt, f"prior {number}") for number, image in enumerate(images)]
