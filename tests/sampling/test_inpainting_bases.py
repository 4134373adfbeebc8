"""Bases whose UNet is given a mask beside the latents: as diffusers has them, and what they cannot do."""

from __future__ import annotations

import copy
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from PIL import Image

from mixofshow import MixOfShowPipeline, Region, load_base, redo, tune
from mixofshow.bases.families import takes_masks
from mixofshow.errors import BaseModelError
from mixofshow.fusion.stages import fuse
from mixofshow.sampling.latents import initial_latents, masked_channels

SIZE = {"width": 64, "height": 48}
ASKED = {"prompt": "a castle", "guidance_scale": 3.0, "num_inference_steps": 5, **SIZE}


@pytest.fixture(scope="module")
def inpainting(golden_pipeline):
    """The golden base with a UNet of nine channels, random from one seed."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**golden_pipeline.unet.config, "in_channels": 9}).requires_grad_(False)
    parts = {**golden_pipeline.components, "unet": unet.eval()}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


@pytest.fixture(scope="module")
def folder(inpainting, tmp_path_factory):
    path = tmp_path_factory.mktemp("bases") / "inpainting"
    inpainting.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def draw(folder):
    return MixOfShowPipeline.from_pretrained(folder)


def picture() -> Image.Image:
    """The same at every call."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def mask(grey: int = 255) -> Image.Image:
    """Not along the edges of cells."""
    found = Image.new("L", (64, 48))
    found.paste(grey, (5, 9, 37, 39))
    return found


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_part_is_drawn_anew_as_diffusers_does_it(scheduler, strength, draw, inpainting, relative_error):
    theirs = copy.copy(inpainting)
    theirs.scheduler = getattr(diffusers, scheduler).from_config(inpainting.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    asked = {**ASKED, "image": picture(), "mask_image": mask(), "strength": strength, "output_type": "latent"}
    expected = theirs(**asked, generator=torch.Generator().manual_seed(7)).images
    draw.scheduler = theirs.scheduler
    found = torch.stack(list(draw(**asked, seed=7)))
    assert relative_error(found, expected) < 1e-5
    other = torch.stack(list(draw(**asked | {"mask_image": mask().rotate(180)}, seed=7)))
    assert relative_error(other, expected) > 1e-3


def test_what_the_mask_leaves_is_what_the_unet_sees(draw):
    generators = [torch.Generator().manual_seed(0)]
    like = initial_latents(draw, generators, **SIZE)
    assert like.shape == (1, 4, 6, 8)
    asked = (generators, like)

    def seen(image, where):
        generators[0].manual_seed(0)
        return masked_channels(draw, [image], where, *asked)

    changed = picture()
    changed.paste("red", (6, 10, 36, 38))
    assert torch.equal(seen(picture(), mask()), seen(changed, mask()))
    assert not torch.equal(seen(picture(), mask()), seen(changed, mask().point(lambda value: 255 - value)))
    cells = seen(picture(), mask())[0, 0]
    assert set(cells.unique().tolist()) == {0, 1} and 0 < cells.mean() < 0.5
    assert torch.equal(seen(picture(), mask(127))[0, 0], torch.zeros(6, 8))
    generators[0].manual_seed(0)
    whole = masked_channels(draw, [], None, *asked)
    assert whole.shape == (1, 5, 6, 8) and (whole[:, 0] == 1).all()


def test_the_rest_works_on_them_too(draw, tmp_path):
    """Drawing without a picture, from one without a mask, regions, the second pass, a place redone."""
    places = [Region("a cat", (0, 0, 32, 48))]
    asked = {**ASKED, "num_inference_steps": 3, "seed": 1}
    (whole,) = draw(**asked, regions=places, upscale=1.5)
    assert whole.size == (96, 72)
    assert draw(**asked, image=picture(), attend=0.02)[0].size == (64, 48)
    (found,) = redo(draw, picture(), Region("a cat", (8, 8, 40, 40)), steps=2)
    assert np.array_equal(np.array(found)[:, 40:], np.array(picture())[:, 40:])
    draw.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    again = MixOfShowPipeline.from_pretrained(tmp_path / "saved")
    assert again(**asked)[0].tobytes() == draw(**asked)[0].tobytes()


def test_concepts_of_a_sister_draw_on_it(folder, golden_concepts):
    draw = MixOfShowPipeline.from_pretrained(folder)
    draw.unet.takes_sisters = True
    for one in golden_concepts:
        draw.load_concept(one)
    places = [Region("a <dogx>", (0, 0, 32, 48)), Region("a <manx>", (32, 0, 64, 48))]
    asked = {**ASKED, "num_inference_steps": 2, "seed": 1, "image": picture(), "mask_image": mask()}
    own = draw(**asked, regions=places, regional_lora=True)[0]
    assert own.tobytes() != draw(**asked, regions=places)[0].tobytes()


def test_what_they_cannot_do_is_said(folder, golden_concepts, tmp_path):
    base = load_base(folder, allow_base="sister")
    assert takes_masks(base)
    with pytest.raises(BaseModelError, match="recording|fusing.*inpainting base"):
        fuse(golden_concepts, base)
    assert fuse(golden_concepts, base, method="average").model.weights
    picture().save(tmp_path / "one.png")
    with pytest.raises(BaseModelError, match="tuning: this is an inpainting base"):
        tune(base, tmp_path, name="thing", class_word="man", steps=1)
    config = folder.parent / "five"
    base.save_pretrained(config)
    table = json.loads((config / "unet" / "config.json").read_text())
    (config / "unet" / "config.json").write_text(json.dumps(table | {"in_channels": 5}))
    with pytest.raises(BaseModelError):
        load_base(config)
