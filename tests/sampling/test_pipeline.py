"""The pipeline is a pipeline of diffusers: what that draws it draws, and what works on that works on it."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from mixofshow import MixOfShowPipeline, Region
from mixofshow.bases.layers import cross_attentions
from mixofshow.concepts.concept import vocabulary
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import MixOfShowError, SettingsError
from mixofshow.sampling.latents import initial_latents, picture_latents

SIZE = {"width": 64, "height": 48}
ASKED = {"prompt": "photo of a red castle", "negative_prompt": "lowres", "guidance_scale": 5.0}
REGIONS = [Region("a <dogx>", (0, 0, 32, 48)), Region("a <manx>", polygon=((24, 0), (64, 0), (64, 48)))]


@pytest.fixture
def fresh(golden_pipeline):
    """The golden base with modules of its own, which a test may change."""
    pipeline = copy.deepcopy(golden_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def picture(seed=0, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def latents(pipeline, **asked):
    return torch.stack(
        list(pipeline(**ASKED, **SIZE, num_inference_steps=4, output_type="latent", **{"seed": 0} | asked))
    )


def expected_latents(pipeline, **asked):
    start = initial_latents(pipeline, asked["generator"], **SIZE)
    return pipeline(
        **ASKED, **SIZE, num_inference_steps=4, num_images_per_prompt=2, output_type="latent", latents=start, **asked
    ).images


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_rescale_is_that_of_diffusers(rescale, draw, golden_pipeline, relative_error):
    expected = expected_latents(golden_pipeline, generator=generators(3, 4), guidance_rescale=rescale)
    found = latents(draw, seed=3, num_images_per_prompt=2, guidance_rescale=rescale)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "LCMScheduler",
        "DPMSolverSinglestepScheduler",
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_any_scheduler_and_prediction(name, prediction, draw, golden_pipeline, relative_error):
    own = golden_pipeline.scheduler.config
    config = {
        key: value for key, value in own.items() if key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")
    }
    pipeline = StableDiffusionPipeline(
        **golden_pipeline.components
        | {"scheduler": getattr(diffusers, name).from_config(config, prediction_type=prediction)},
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = expected_latents(pipeline, generator=generators(3, 4))
    draw.scheduler = pipeline.scheduler
    found = latents(draw, seed=3, num_images_per_prompt=2)
    assert relative_error(found, expected) < 1e-5
    alone = latents(draw, seed=4, regions=REGIONS)
    together = latents(draw, seed=3, num_images_per_prompt=2, regions=REGIONS)
    assert relative_error(together[1:], alone) < 1e-4


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"]
)
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_from_a_picture_as_diffusers_does_it(scheduler, strength, draw, golden_pipeline, relative_error):
    parts = golden_pipeline.components
    parts["scheduler"] = getattr(diffusers, scheduler).from_config(golden_pipeline.scheduler.config)
    theirs = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    asked = {"strength": strength, "num_inference_steps": 5, "output_type": "latent"}
    expected = torch.cat(
        [theirs(**ASKED, **asked, image=picture(k), generator=generators(7 + k)).images for k in (0, 1)]
    )
    draw.scheduler = theirs.scheduler
    found = draw(**ASKED, **asked, image=[picture(0), picture(1)], seed=7, num_images_per_prompt=2)
    assert relative_error(torch.stack(list(found)), expected) < 1e-5


def left_half(grey: int = 255) -> Image.Image:
    """A mask, white on the left half of a picture, `grey` there on request."""
    mask = Image.new("L", (SIZE["width"], SIZE["height"]))
    mask.paste(grey, (0, 0, SIZE["width"] // 2, SIZE["height"]))
    return mask


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("strength", [0.4, 0.8])
def test_a_part_is_drawn_anew_as_diffusers_does_it(scheduler, strength, draw, golden_pipeline, relative_error):
    parts = golden_pipeline.components
    parts["scheduler"] = getattr(diffusers, scheduler).from_config(golden_pipeline.scheduler.config)
    theirs = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    asked = {"strength": strength, "num_inference_steps": 5, "output_type": "latent", **SIZE}
    begun = picture(0).resize(left_half().size)
    asked |= {"image": begun, "mask_image": left_half()}
    expected = theirs(**ASKED | asked, generator=generators(7)).images
    draw.scheduler = theirs.scheduler
    found = draw(**ASKED | asked, seed=7)
    assert relative_error(torch.stack(list(found)), expected) < 1e-5


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_what_a_mask_leaves_black_stays_bit_for_bit(output_type, draw):
    begun, half = picture(0).resize(left_half().size), SIZE["width"] // 2
    asked = {**ASKED, **SIZE, "num_inference_steps": 3, "seed": 1, "image": begun, "output_type": output_type}
    made = draw(**asked, mask_image=left_half()).images[0]
    pixels = np.array(made) if output_type == "pil" else np.round(255 * np.array(made)).astype(np.uint8)
    pixels = pixels.transpose(1, 2, 0) if output_type == "pt" else pixels
    assert np.array_equal(pixels[:, half:], np.array(begun)[:, half:])
    assert not np.array_equal(pixels[:, :half], np.array(begun)[:, :half])
    whole = draw(**asked | {"output_type": "pil"}, mask_image=Image.new("L", begun.size, "white"))[0]
    assert whole.tobytes() == draw(**asked | {"output_type": "pil"})[0].tobytes()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (
            {"mask_image": left_half()},
            "mask_image: expected an image beside it, of which black is kept, found no image",
        ),
        (
            {"mask_image": left_half(0), "image": picture(0)},
            "mask_image: expected white where the picture is drawn anew",
        ),
        ({"mask_image": "mask.png", "image": picture(0)}, "mask_image: expected a picture"),
        ({"mask_image": left_half(), "image": picture(0), "upscale": 2}, "`upscale`: expected 1 with a mask"),
    ],
)
def test_masks_that_mean_nothing_are_refused(asked, reason, draw):
    with pytest.raises(SettingsError, match=reason):
        draw(**ASKED | asked)


def test_the_second_pass_starts_from_the_first(draw, relative_error):
    asked = {"prompt": "a castle", "regions": REGIONS, **SIZE, "num_inference_steps": 4}
    (found,) = draw(**asked, upscale=1.5, upscale_strength=0.5, seed=2)
    assert found.size == (96, 72)
    (small,) = draw(**asked, seed=2)
    large = [Region("a <dogx>", (0, 0, 48, 72)), Region("a <manx>", polygon=((36, 0), (96, 0), (96, 72)))]
    generator = generators(2)
    initial_latents(draw, generator, **SIZE)  # what the first pass took from the generator
    (expected,) = draw(
        **asked | {"regions": large, "width": 96, "height": 72}, image=small, strength=0.5, generator=generator
    )
    assert np.abs(np.array(found, dtype=int) - np.array(expected, dtype=int)).max() <= 1


def test_prompts_are_drawn_in_turn(draw, relative_error):
    prompts = ["a castle", "a <dogx> on the beach"]
    asked = {"regions": REGIONS, **SIZE, "num_inference_steps": 3, "output_type": "latent"}
    together = draw(prompts, num_images_per_prompt=2, seed=5, **asked)
    for number, row in enumerate(together):
        (alone,) = draw(prompts[number // 2], seed=5 + number, **asked)
        assert relative_error(row, alone) < 1e-4


def test_a_generator_is_a_seed(draw):
    (by_seed,), (by_generator,) = (
        draw("a castle", seed=4, **SIZE, num_inference_steps=2),
        draw("a castle", generator=torch.Generator().manual_seed(4), **SIZE, num_inference_steps=2),
    )
    assert by_seed.tobytes() == by_generator.tobytes()


def test_a_callback_sees_every_step_and_may_change_the_latents(draw):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((pipeline, step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    (found,) = draw("", **SIZE, num_inference_steps=3, output_type="latent", callback_on_step_end=callback)
    assert not found.any()
    assert [step for _, step, _ in seen] == [0, 1, 2]
    assert all(pipeline is draw for pipeline, _, _ in seen)
    times = [time for _, _, time in seen]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(("kind", "expected"), [("pil", Image.Image), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_kinds_of_output(kind, expected, draw):
    found = draw("", **SIZE, num_inference_steps=1, output_type=kind, num_images_per_prompt=2)
    assert len(found) == len(found.images) == 2
    assert all(isinstance(one, expected) for one in found)


def test_it_is_saved_and_loaded(draw, tmp_path):
    draw.save_pretrained(tmp_path / "model")
    again = MixOfShowPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    again.scheduler = draw.scheduler
    asked = {"prompt": "a <dogx>", "regions": REGIONS, **SIZE, "num_inference_steps": 2, "seed": 1}
    assert again(**asked)[0].tobytes() == draw(**asked)[0].tobytes()
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    assert all(torch.equal(one, draw.unet.state_dict()[name]) for name, one in plain.unet.state_dict().items())


def test_modules_are_shared_and_can_be_moved(fresh):
    draw = MixOfShowPipeline.of(ConceptModel(fresh))
    assert draw.components.keys() == fresh.components.keys()
    assert all(draw.components[name] is fresh.components[name] for name in draw.components)
    draw.to(torch.float64)
    assert fresh.unet.dtype == torch.float64
    assert latents(draw).dtype == torch.float64


def test_a_lora_on_top_is_that_of_diffusers(fresh, tmp_path, relative_error):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    before = latents(MixOfShowPipeline.of(ConceptModel(fresh)), seed=3)
    trained = copy.deepcopy(fresh)
    torch.manual_seed(0)
    trained.unet.add_adapter(
        LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(trained.unet), safe_serialization=True
    )
    theirs = copy.deepcopy(fresh)
    theirs.load_lora_weights(tmp_path)
    expected = expected_latents(theirs, generator=generators(3, 4))
    draw = MixOfShowPipeline.of(ConceptModel(fresh))
    draw.load_lora_weights(tmp_path)
    found = latents(draw, seed=3, num_images_per_prompt=2)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(found[:1], before) > 1e-3
    draw.unload_lora_weights()
    assert torch.equal(latents(draw, seed=3), before)


def test_channels_last_changes_nothing(fresh, golden_concepts, relative_error):
    draw = MixOfShowPipeline.of(ConceptModel(fresh, vocabulary(golden_concepts)))
    expected = latents(draw, regions=REGIONS, isolate=True)
    fresh.unet.to(memory_format=torch.channels_last)
    assert relative_error(latents(draw, regions=REGIONS, isolate=True), expected) < 1e-5


def test_regions_leave_processors_as_they_were(draw, golden_pipeline):
    before = [module.processor for module in cross_attentions(golden_pipeline.unet).values()]
    latents(draw, regions=REGIONS, isolate=2)
    assert [module.processor for module in cross_attentions(golden_pipeline.unet).values()] == before


class Push:
    """A control that adds to the middle block, as a ControlNet does."""

    def __init__(self, size):
        self.size, self.steps = size, []

    def residuals(self, latents, timestep, text, step, steps, *, told):
        self.steps.append((step, steps, tuple(text.shape), told))
        middle = torch.full((len(latents), 24, 1, 1), self.size)
        return {
            "down_block_additional_residuals": tuple(torch.zeros(1) for _ in range(12)),
            "mid_block_additional_residual": middle,
        }


def test_controls_are_added_in_every_step(draw, relative_error):
    without, push = latents(draw), Push(0.5)
    once = latents(draw, controls=[push])
    assert push.steps == [(step, 4, (2, 16, 77, 32), {}) for step in (1, 2, 3, 4)]
    assert relative_error(once, without) > 1e-3
    assert torch.allclose(latents(draw, controls=[Push(0.25), Push(0.25)]), once)
    assert torch.allclose(latents(draw, controls=[Push(0.5), Push(-0.5)]), without)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_inference_stepz": 3}, "did you mean 'num_inference_steps'"),
        ({"strength": 0}, "image_strength"),
        ({"strength": 0.01, "image": picture()}, "^`strength`: expected at least 1 of 4 steps, 0.25, found 0.01"),
        ({"image_strength": 0.01, "image": picture()}, "^`image_strength`: expected at least 1 of 4 steps"),
        ({"upscale": 2, "upscale_strength": 0.01}, "^`upscale_strength`: expected at least 1 of 4 steps"),
        ({"upscale": 0.5}, "upscale"),
        ({"guidance_rescale": 2}, "guidance_rescale"),
        ({"generator": generators(1, 2)}, "generator: expected 1"),
        ({"output_type": "jpg"}, "output_type: expected one of pil"),
        ({"image": [picture(), picture()]}, "image"),
    ],
)
def test_refused_settings(asked, message, draw):
    with pytest.raises(SettingsError, match=message) as error:
        draw("a castle", **SIZE, **{"num_inference_steps": 4} | asked)
    assert "\n" not in str(error.value)


def test_a_composition_s_name_for_a_setting_goes_before_diffusers(draw):
    totals = []
    draw("a castle", **SIZE, steps=2, progress=lambda step, total, _: totals.append(total))
    assert totals == [2, 2]
    with pytest.raises(SettingsError, match="'image_strength': .*found 7"):
        draw("a castle", **SIZE, image_strength=7)


def test_pictures_are_encoded_at_the_size_that_is_asked_for(draw):
    made = picture_latents(draw, [picture(size=(100, 30))], generators(1, 2), width=64, height=48)
    assert made.shape == (2, 4, *(side // draw.vae_scale_factor for side in (48, 64)))
    assert not torch.equal(made[0], made[1])


def test_the_usual_size_is_that_of_the_picture_to_start_from(draw):
    (found,) = draw("", image=picture(size=(83, 41)), num_inference_steps=2)
    factor = draw.vae_scale_factor
    assert found.size == (83 // factor * factor, 41 // factor * factor)
    with pytest.raises(MixOfShowError, match="width"):
        draw("", image=picture(), width=83, height=40)
