"""The one place where evaluation draws pictures."""

from __future__ import annotations

from PIL import Image

from mixofshow.concepts.model import ConceptModel
from mixofshow.sampling.composition import Composition
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.regions import Region


def draw(model: ConceptModel, wanted: Composition) -> list[Image.Image]:
    """A composition's pictures in one batch; picture k is made from seed + k."""
    return MixOfShowPipeline(model)(
        wanted.prompt,
        regions=[Region(entry.prompt, entry.box, entry.negative_prompt) for entry in wanted.regions],
        negative_prompt=wanted.negative_prompt,
        width=wanted.width,
        height=wanted.height,
        num_images=wanted.num,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        seed=wanted.seed,
    )
