"""What a client thinks of the fused model: pictures drawn by it, beside the client's own held-out ones, as numbers only.

Alignment is the mean cosine of features of drawn and held-out pictures (Mix-of-Show §4.1). Three models draw from the
same seeds: the fused one, the client's own concept, and the base with the class word, which is what no concept at all
gives. Pictures, features and prompts stay here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from mixofshow.concepts.concept import Concept
from mixofshow.concepts.model import ConceptModel
from mixofshow.evaluation.metrics import image_alignment
from mixofshow.evaluation.scorers import Scorer, references_of
from mixofshow.sampling.pipeline import MixOfShowPipeline

PICTURES: Final = 4
STEPS: Final = 20


def judge(pipeline: Any, fused: ConceptModel, concept: Concept, folder: Path, scorer: Scorer) -> dict[str, float]:
    """Image alignment with a folder's pictures: of the fused model, of the concept alone, and of the base.

    Raises DatasetError.
    """
    references = scorer.images(references_of(folder))
    drawn_by = {
        "fused": (MixOfShowPipeline.of(fused), concept.prompt),
        "single": (MixOfShowPipeline.single(pipeline, concept), concept.prompt),
        "base": (MixOfShowPipeline.of(ConceptModel(pipeline)), concept.info.class_word),
    }
    how: dict[str, Any] = {"num_images_per_prompt": PICTURES, "num_inference_steps": STEPS, "seed": 0}
    return {
        name: image_alignment(scorer.images(draw(f"a photo of a {what}", **how).images), references)
        for name, (draw, what) in drawn_by.items()
    }
