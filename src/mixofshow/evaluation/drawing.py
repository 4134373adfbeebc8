"""The one place where evaluation draws pictures."""

from __future__ import annotations

from PIL import Image

from mixofshow.concepts.model import ConceptModel
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.regions import entry_region
from mixofshow.sampling.settings import Composition


def draw(model: ConceptModel, wanted: Composition) -> list[Image.Image]:
    """A composition's pictures in one batch; picture k is made from seed + k."""
    return MixOfShowPipeline.of(model)(
        wanted.prompt,
        regions=[entry_region(entry) for entry in wanted.regions],
        negative_prompt=wanted.negative_prompt,
        num_images_per_prompt=wanted.num,
        seed=wanted.seed,
        own_weights=wanted.own_weights,
        **wanted.drawing,
    )
