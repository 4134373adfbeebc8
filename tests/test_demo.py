"""The whole job on the embedded base, with the figures that it must reach (slow)."""

from __future__ import annotations

import json

import pytest

from mixofshow import MixOfShowPipeline, fuse, load_base, load_concept
from mixofshow.concepts.model import with_concept
from mixofshow.demo import CONCEPTS, run_demo
from mixofshow.evaluation.metrics import image_alignment
from mixofshow.evaluation.scorers import judge_scorer, references_of
from mixofshow.evaluation.suite_settings import usual_prompts
from mixofshow.evaluation.tasks import draw
from mixofshow.sampling.settings import Composition

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    run_demo(out)
    return out


def test_alignments(done):
    images = json.loads((done / "summary.json").read_text())["image_alignment"]
    assert images["single"] >= images["lower_bound"] + 0.05
    assert images["gradient"] >= images["single"] - 0.03
    assert images["average"] <= images["gradient"] - 0.02


def test_every_layer_fits_at_least_as_well_as_weight_fusion(done):
    base = load_base("emojiland")
    fused = fuse([load_concept(done / f"{name}.safetensors", base) for name in CONCEPTS], base)
    assert all(one.fused <= one.average * (1 + 1e-9) for one in fused.layers.values())


def test_one_concept_alone_is_itself(done):
    base = load_base("emojiland")
    concept = load_concept(done / f"{CONCEPTS[0]}.safetensors", base)
    fused = fuse([concept], base)
    assert max(one.residual for one in fused.layers.values()) <= 1e-3
    look = judge_scorer().images
    references = look(references_of(done / "pictures" / CONCEPTS[0] / "reference"))
    wanted = [
        Composition(prompt=prompt.format(concept.prompt), seed=100, num=2)
        for prompt in usual_prompts("emojiland")["subject"]["context"][:4]
    ]
    own, alone = (
        image_alignment(look([image for one in wanted for image in draw(model, one)]), references)
        for model in (with_concept(base, concept), fused.model)
    )
    assert alone == pytest.approx(own, abs=0.005)


def test_the_same_seed_is_the_same_picture(done):
    draw = MixOfShowPipeline.load(done / "model")
    first, second = (draw(f"a photo of a <{CONCEPTS[0]}>", seed=3)[0].tobytes() for _ in range(2))
    assert first == second


def test_the_report_stands_alone(done):
    text = (done / "report.html").read_text()
    assert text.count("data:image/png;base64,") > 20 and "://" not in text
