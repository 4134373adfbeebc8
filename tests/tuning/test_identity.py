"""What words alone carry, on the embedded base: the paper's Figure 3, by numbers."""

from __future__ import annotations

import pytest

from mixofshow.bases.emojiland.concepts import class_word, write_concept
from mixofshow.bases.loading import load_base
from mixofshow.evaluation.metrics import image_alignment
from mixofshow.evaluation.scorers import judge_scorer, references_of
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.tuning.settings import make_settings
from mixofshow.tuning.trainer import tune


@pytest.mark.slow
def test_the_words_of_ed_lora_carry_more_of_the_concept_than_those_of_lora(tmp_path):
    base, scorer, name = load_base("emojiland"), judge_scorer(), "clown"
    write_concept(name, tmp_path)
    references = scorer.images(references_of(tmp_path / "reference"))
    found = {}
    for method in ("ed-lora", "lora"):
        table = {"name": name, "class_word": class_word(name), "data": tmp_path / "train", "method": method}
        concept = tune(make_settings(table), base)
        for strength in (0.0, 1.0):
            draw = MixOfShowPipeline.single(base, concept, strength=strength)
            pictures = draw(f"a photo of a {concept.prompt}", num_images_per_prompt=16)
            found[method, strength] = image_alignment(scorer.images(pictures), references)
    print("image alignment by method and strength of the weights:", found)
    assert found["ed-lora", 0.0] > found["lora", 0.0]
