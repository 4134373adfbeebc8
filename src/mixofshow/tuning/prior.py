"""Pictures of the class word, which keep the base from forgetting it (Custom Diffusion §3.2, DreamBooth §3.2)."""

from __future__ import annotations

from typing import Any, Final

import torch

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
    count = settings.prior.count
    while len(images) < count:
        part = range(len(images), min(len(images) + DRAWN_AT_ONCE, count))
        generators = [torch.Generator().manual_seed(settings.seed + number) for number in part]
        images += pipeline([prompt] * len(part), generator=generators).images
        progress(len(images), count, {})
    return [Example(image, prompt, f"prior {number}") for number, image in enumerate(images)]
