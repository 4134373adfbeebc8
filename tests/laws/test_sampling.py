"""Laws of sampling: plain diffusers in the plain case, and the same bytes for the same seed."""

from __future__ import annotations

import copy
import hashlib

import diffusers
import numpy as np
import pytest
import torch

from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import ConceptModel, with_concept
from mixofshow.errors import BadInputError, MixOfShowError, SettingsError, TokenError
from mixofshow.sampling.conditioning import encode
from mixofshow.sampling.denoising import denoise
from mixofshow.sampling.latents import initial_latents
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.regions import Region

PROMPT, NEGATIVE = "photo of a red castle", "lowres"
SIZE = {"width": 64, "height": 48}
REGIONS = [Region("a <dogx1> <dogx2>", (0, 0, 32, 48)), Region("a <manx1> <manx2>", (24, 0, 64, 48), "bad hands")]
SCHEDULERS = [
    "DPMSolverMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
]


def with_scheduler(pipeline, name):
    """The pipeline with another scheduler; all the rest is shared."""
    other = copy.copy(pipeline)
    other.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    return other


def latents_of(model, seeds, *, regions=(), guidance_scale=5.0, steps=3):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad(), model.active():
        start = initial_latents(model.pipeline, generators, **SIZE)
        encoded = encode(model, PROMPT, NEGATIVE, regions, **SIZE, guided=guidance_scale != 1.0)
        return denoise(
            model.pipeline,
            start,
            encoded,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generators=generators,
        )


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_region_and_no_concept_is_plain_diffusers(scheduler, guidance_scale, golden_pipeline, relative_error):
    pipeline = with_scheduler(golden_pipeline, scheduler)
    found = latents_of(ConceptModel(pipeline), [7, 8], guidance_scale=guidance_scale)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    positive, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    expected = pipeline(
        prompt_embeds=positive.repeat(2, 1, 1),
        negative_prompt_embeds=negative.repeat(2, 1, 1),
        latents=initial_latents(pipeline, generators, **SIZE),
        generator=generators,
        **SIZE,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    assert relative_error(found, expected) < 1e-5


def test_the_picture_is_the_one_of_plain_diffusers(golden_pipeline):
    (found,) = MixOfShowPipeline.of(ConceptModel(golden_pipeline))(
        PROMPT, negative_prompt=NEGATIVE, **SIZE, seed=3, num_inference_steps=3, guidance_scale=5.0
    )
    start = initial_latents(golden_pipeline, [torch.Generator().manual_seed(3)], **SIZE)
    (expected,) = golden_pipeline(
        PROMPT, negative_prompt=NEGATIVE, latents=start, **SIZE, num_inference_steps=3, guidance_scale=5.0
    ).images
    assert found.size == (64, 48)
    assert np.abs(np.array(found, dtype=int) - np.array(expected, dtype=int)).max() <= 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_picture_does_not_depend_on_its_batch(scheduler, golden_pipeline, golden_concepts, relative_error):
    model = ConceptModel(with_scheduler(golden_pipeline, scheduler), vocabulary(golden_concepts))
    together = latents_of(model, [5, 6, 7], regions=REGIONS)
    for row, seed in zip(together, (5, 6, 7), strict=True):
        assert relative_error(row, latents_of(model, [seed], regions=REGIONS)[0]) < 1e-4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_same_seed_gives_the_same_bytes(scheduler, golden_pipeline, golden_concepts):
    draw = MixOfShowPipeline.of(ConceptModel(with_scheduler(golden_pipeline, scheduler), vocabulary(golden_concepts)))

    def pictures(seed):
        made = draw(PROMPT, regions=REGIONS, **SIZE, num_images_per_prompt=2, num_inference_steps=2, seed=seed)
        return [hashlib.sha256(picture.tobytes()).hexdigest() for picture in made]

    first, second = pictures(5)
    assert pictures(5) == [first, second]
    assert first != second
    assert pictures(6)[0] != first


def test_strength_zero_keeps_only_the_words(golden_pipeline, golden_concepts):
    concept = golden_concepts[0]
    only_words = ConceptModel(golden_pipeline, vocabulary([concept]))
    zero, full = (with_concept(golden_pipeline, concept, strength) for strength in (0, 1))
    regions = REGIONS[:1]
    assert torch.equal(latents_of(zero, [1], regions=regions), latents_of(only_words, [1], regions=regions))
    assert not torch.equal(latents_of(full, [1], regions=regions), latents_of(only_words, [1], regions=regions))


def test_sampling_leaves_the_model_as_it_was(golden_pipeline, golden_concepts):
    before = latents_of(ConceptModel(golden_pipeline), [1])
    MixOfShowPipeline.single(golden_pipeline, golden_concepts[0])("a <dogx>", **SIZE, num_inference_steps=1)
    with pytest.raises(ZeroDivisionError):
        MixOfShowPipeline.single(golden_pipeline, golden_concepts[0])("a <dogx>", **SIZE, progress=lambda *_: 1 // 0)
    assert torch.equal(latents_of(ConceptModel(golden_pipeline), [1]), before)


def test_progress_is_told_of_every_step(golden_pipeline):
    told = []
    MixOfShowPipeline.of(ConceptModel(golden_pipeline))(
        "", **SIZE, num_inference_steps=3, progress=lambda *step: told.append(step)
    )
    assert told == [(1, 3, {}), (2, 3, {}), (3, 3, {})]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"width": 100}, SettingsError),
        ({"width": 0}, SettingsError),
        ({"height": -8}, SettingsError),
        ({"width": 8192, "height": 8192}, SettingsError),
        ({"num_inference_steps": 0}, SettingsError),
        ({"num_inference_steps": 10**9}, SettingsError),
        ({"num_images_per_prompt": 0}, SettingsError),
        ({"seed": 2**63}, SettingsError),
        ({"seed": -1}, SettingsError),
        ({"guidance_scale": float("nan")}, MixOfShowError),
        ({"negative_prompt": "a <cat>"}, TokenError),
        ({"regions": [Region("a <dogx>", (0, 0, 1, 1))]}, TokenError),
        ({"regions": [Region("a castle", (0, 0, 999, 1))]}, BadInputError),
    ],
)
def test_refused_settings(settings, error, golden_pipeline):
    with pytest.raises(error) as raised:
        MixOfShowPipeline.of(ConceptModel(golden_pipeline))("", **(SIZE | {"num_inference_steps": 1} | settings))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_numbers_never_give_a_black_picture(broken, golden_pipeline):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    model = ConceptModel(golden_pipeline, weights={layer: torch.full((24, 32), broken)})
    with pytest.raises(MixOfShowError, match="not finite appeared at step 1 of 2"):
        MixOfShowPipeline.of(model)("", **SIZE, num_inference_steps=2)
