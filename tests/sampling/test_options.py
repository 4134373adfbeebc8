"""What goes beyond the paper: concept strength and start, isolation, guided attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixofshow import MixOfShowPipeline, Region
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import ConceptModel, load_model, load_unfused, with_concept
from mixofshow.errors import ConceptFileError, SettingsError
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse
from mixofshow.sampling.attend import attend_and_excite, missing, queries_of
from mixofshow.sampling.conditioning import concepts_in, encode, without_concepts
from mixofshow.sampling.denoising import StepContext, noise_predictor
from mixofshow.sampling.latents import initial_latents

ASKED = {"prompt": "two things near the castle", "width": 64, "height": 48, "num_inference_steps": 4, "seed": 0}
GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)


@pytest.fixture(scope="module")
def model(golden_pipeline, golden_concepts):
    return ConceptModel(golden_pipeline, vocabulary(golden_concepts), concepts=golden_concepts)


@pytest.fixture
def latents(model):
    draw = MixOfShowPipeline.of(model)

    def made(*regions, **how):
        return draw(**ASKED, regions=regions, output_type="latent", **how)[0]

    return made


@pytest.mark.parametrize(
    ("prompt", "plain", "names"),
    [
        ("a <dogx> in the snow", "a object in the snow", ("dogx",)),
        ("a <dogx1> <dogx2>, red", "a object , red", ("dogx",)),
        ("<manx> and a <dogx2> painting", "object and a object painting", ("manx", "dogx")),
        ("a castle", "a castle", ()),
    ],
)
def test_class_words_stand_for_concepts(prompt, plain, names, model):
    assert without_concepts(model, prompt) == plain
    assert concepts_in(model, prompt) == names


def test_a_concept_that_is_kept_is_called_by_its_short_name(model):
    """As it was written; `--save-regions` wrote the words that it stands for."""
    assert without_concepts(model, "a <dogx> and a <manx>", ["manx"]) == "a object and a <manx>"
    assert without_concepts(model, "<manx2> by <manx1> <manx2>", ["manx"]) == "<manx2> by <manx>"


def test_a_saved_model_knows_its_class_words(model, golden_concepts, golden_pipeline, tmp_path):
    fused = fuse(golden_concepts, golden_pipeline, FusionSettings.of({"method": "average"})).model
    fused.save(tmp_path / "model")
    fused.save_delta(tmp_path / "delta.safetensors")
    for found in (load_model(tmp_path / "model"), load_model(tmp_path / "delta.safetensors", base=GOLDEN_BASE)):
        assert without_concepts(found, "a <dogx> and a <manx>") == "a object and a object"
        assert found.concept_hashes == {one.info.name: one.hash for one in golden_concepts}


def test_without_class_words_strength_is_refused(model):
    unknown = ConceptModel(model.pipeline, model.vocabulary)
    with pytest.raises(SettingsError, match="class word of <dogx1> is not known"):
        MixOfShowPipeline.of(unknown)(**ASKED, regions=[Region("a <dogx>", LEFT, strength=0.5)])


@pytest.mark.parametrize(
    ("asked", "same"),
    [
        ({"strength": 1.0}, {"prompt": "a <dogx>"}),
        ({"strength": 0.0}, {"prompt": "a object"}),
        ({"concept_from": 1}, {"prompt": "a <dogx>"}),
        ({"concept_from": 3, "last_step": 2}, {"prompt": "a object", "last_step": 2}),
    ],
)
def test_strength_and_start_at_their_ends(asked, same, latents):
    expected = latents(Region(**{"box": LEFT} | same))
    assert torch.equal(latents(Region("a <dogx>", LEFT, **asked)), expected)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_half_a_concept_is_two_regions_of_half_weight(weight, latents, relative_error):
    other = Region("a castle", (0.25, 0, 0.75, 1))
    found = latents(Region("a <dogx>", LEFT, strength=0.5, weight=weight), other)
    two = [Region(prompt, LEFT, weight=weight / 2) for prompt in ("a object", "a <dogx>")]
    assert relative_error(found, latents(*two, other)) < 1e-5
    assert relative_error(found, latents(Region("a <dogx>", LEFT, weight=weight), other)) > 1e-4


def test_a_concept_that_starts_later_is_two_regions_in_turn(latents):
    found = latents(Region("a <dogx>", LEFT, concept_from=3))
    two = Region("a object", LEFT, last_step=2), Region("a <dogx>", LEFT, first_step=3)
    assert torch.equal(found, latents(*two))


def test_isolation_for_all_steps_or_the_first(latents):
    regions = Region("a <dogx>", LEFT), Region("a <manx>", RIGHT)
    free, first, all_of_them = (latents(*regions, isolate=steps) for steps in (False, 1, True))
    assert not torch.equal(free, first)
    assert not torch.equal(first, all_of_them)
    assert torch.equal(all_of_them, latents(*regions, isolate=4))
    assert torch.equal(free, latents(*regions, isolate=0))


def test_a_regional_lora_changes_nothing_where_fusing_has_nothing_to_do(
    golden_pipeline, golden_concepts, relative_error
):
    own = MixOfShowPipeline.of(with_concept(golden_pipeline, golden_concepts[0]))
    asked = {**ASKED, "regions": [Region("a <dogx>", LEFT)], "output_type": "latent"}
    (found,), (expected,) = own(**asked, own_weights=True), own(**asked)  # as it was called
    assert relative_error(found, expected) < 1e-5


def test_the_regional_loras_of_a_saved_model(golden_pipeline, golden_concepts, tmp_path, relative_error):
    fused = fuse(golden_concepts, golden_pipeline, FusionSettings.of({"method": "average"})).model
    fused.save(tmp_path / "model")
    again = load_unfused(tmp_path / "model", base=GOLDEN_BASE)
    again.pipeline.scheduler = golden_pipeline.scheduler
    asked = {**ASKED, "regions": [Region("a <dogx>", LEFT), Region("a <manx>", RIGHT)], "output_type": "latent"}
    for own, tolerance in ((False, 1e-6), (True, 1e-3)):  # concepts are kept in half precision
        (expected,), (found,) = (MixOfShowPipeline.of(one)(**asked, regional_lora=own) for one in (fused, again))
        assert relative_error(found, expected) < tolerance
    next((tmp_path / "model" / "concepts").iterdir()).unlink()
    with pytest.raises(ConceptFileError, match="its 1 files are not the concepts"):
        load_unfused(tmp_path / "model", base=GOLDEN_BASE)


def test_guided_attention_lowers_its_loss(model, latents):
    region = Region("a <dogx>", LEFT)
    draw = MixOfShowPipeline.of(model)
    encoded = encode(draw.model, "a castle", "", [region], width=64, height=48, guided=True)
    start = initial_latents(draw, [torch.Generator().manual_seed(0)], width=64, height=48)

    def loss(moved):
        batch = torch.cat([moved] * 2)
        with (
            torch.no_grad(),
            noise_predictor(draw, encoded, batch) as predict,
            queries_of(predict.attention.layers) as seen,
        ):
            predict(batch, torch.tensor(999), 1, {})
            return float(missing(predict.attention, seen, 1, pictures=1))

    batch = torch.cat([start] * 2)
    with torch.no_grad(), noise_predictor(draw, encoded, batch) as predict:
        moment = StepContext(predict, torch.tensor(999), 1, 4, lambda latents, timestep: torch.cat([latents] * 2))
        moved = attend_and_excite(0.02)(moment, start)
        later = StepContext(predict, torch.tensor(1), 4, 4, moment.batched)
        assert torch.equal(attend_and_excite(0.02)(later, start), start)
    assert loss(moved) < loss(start)
    assert not torch.equal(latents(region, attend=0.1), latents(region))
    plain = Region("a castle", LEFT)
    assert torch.equal(latents(plain, attend=0.1), latents(plain))
