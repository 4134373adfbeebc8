"""An interface that is named after diffusers' is diffusers': B4, B7, B8, B25, B26, B42, case 18, the kind 10 of issue 19."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

import mixofshow
from mixofshow import MixOfShowPipeline, Region
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import MixOfShowError, RegionError, SettingsError
from mixofshow.sampling.inputs import REFUSED
from mixofshow.sampling.latents import decode, initial_latents
from mixofshow.sampling.pipeline import MixOfShowXLPipeline

ASKED = {"width": 64, "height": 48, "num_inference_steps": 3, "seed": 3}
LATENT = {**ASKED, "output_type": "latent"}
REGIONS = [Region("a <dogx>", (0, 0, 32, 48)), Region("a <manx>", (32, 0, 64, 48), negative_prompt="red")]


@pytest.mark.parametrize("method", ["__call__", "__init__"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(MixOfShowPipeline, StableDiffusionPipeline), (MixOfShowXLPipeline, StableDiffusionXLPipeline)],
)
def test_the_signature(method, ours, theirs):
    """Names, defaults and kinds; what is not taken is refused by name, with what to do instead."""
    assert issubclass(ours, theirs)
    mine, known = (inspect.signature(getattr(kind, method)).parameters for kind in (ours, theirs))
    free = {"guidance_scale", "safety_checker", "feature_extractor", "requires_safety_checker", "image_encoder"}
    for name, parameter in known.items():
        if name not in mine:
            assert name in REFUSED or name == "kwargs", name
            continue
        assert mine[name].kind == parameter.kind, name
        assert name in free or mine[name].default == parameter.default, name
    assert mine.get("guidance_scale") is None or mine["guidance_scale"].default is None  # what suits the base
    if ours is MixOfShowPipeline:
        shared = [name for name in known if name in mine]
        assert list(mine)[: len(shared)] == shared  # so that they mean the same by position


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_taken_says_what_to_do(name, draw):
    with pytest.raises(SettingsError, match=f"^{name}: expected None here; ") as error:
        draw("a castle", **ASKED, **{name: [torch.ones(1)]})
    assert "\n" not in str(error.value)
    draw("a castle", **ASKED | {"num_inference_steps": 1}, **{name: None})


def test_negative_prompts(draw):
    """B4, case 18: None ended in a TypeError, and so did a list."""
    prompts, negatives = ["a castle", "a <dogx>"], ["red", ""]
    together = torch.stack(list(draw(prompts, negative_prompt=negatives, regions=REGIONS, **LATENT)))
    for number, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        asked = LATENT | {"seed": ASKED["seed"] + number}
        (alone,) = draw(prompt, negative_prompt=negative or None, regions=REGIONS, **asked)
        assert torch.allclose(together[number], alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(draw("a castle", **LATENT)[0], together[0], atol=1e-3)
    with pytest.raises(SettingsError, match="negative_prompt: expected 2, one for each prompt, found 1"):
        draw(prompts, negative_prompt=["red"], **ASKED)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seed": 1.0}, "seed: expected a whole number"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"prompt": None}, "prompt: expected a text"),
        ({"prompt": [1]}, "prompt: expected a text"),
        ({"regions": [{"prompt": "a cat"}]}, r"regions\[0\]: expected a Region, found dict"),
        ({"image": "a.png"}, "image: expected"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, "latents: expected shape"),
        ({"latents": torch.zeros(1, 4, 6, 8), "image": Image.new("RGB", (64, 48))}, "latents: expected one of the two"),
        ({"eta": 0.5}, "eta: expected 0: DPMSolverMultistepScheduler has none"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "tensor_inputs: expected latents"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "set_adapters"),
    ],
)
def test_what_makes_no_sense_is_one_line(asked, message, draw):
    """B26: these were errors of other libraries."""
    with pytest.raises((SettingsError, RegionError), match=message) as error:
        draw(**{"prompt": "a castle", **ASKED} | asked)
    assert len(str(error.value)) <= 300


def test_without_a_seed_pictures_differ_as_torch_says(draw):
    asked = {"prompt": "a castle", **ASKED, "seed": None, "output_type": "latent"}
    torch.manual_seed(5)
    first, second = draw(**asked)[0], draw(**asked)[0]
    torch.manual_seed(5)
    assert torch.equal(draw(**asked)[0], first)
    assert not torch.equal(first, second)


def test_latents_are_the_noise(draw):
    noise = initial_latents(draw, [torch.Generator().manual_seed(3)], width=64, height=48)
    assert torch.equal(draw("a castle", latents=noise, **LATENT)[0], draw("a castle", **LATENT)[0])


def test_eta_is_that_of_ddim(draw, golden_pipeline):
    draw.scheduler = DDIMScheduler.from_config(golden_pipeline.scheduler.config)
    theirs = StableDiffusionPipeline.from_pipe(draw)
    theirs.set_progress_bar_config(disable=True)
    noise = initial_latents(draw, [torch.Generator().manual_seed(3)], width=64, height=48)
    asked = {"guidance_scale": 5.0, "eta": 0.7, "latents": noise, "output_type": "latent", **ASKED}
    del asked["seed"]
    found = draw("a castle", generator=[torch.Generator().manual_seed(4)], **asked)[0]
    assert torch.allclose(
        found, theirs("a castle", generator=[torch.Generator().manual_seed(4)], **asked).images[0], atol=1e-4
    )


def test_a_callback_may_stop(draw):
    """B25: all steps were done."""
    steps = []

    def stop(pipeline, step, timestep, tensors):
        steps.append((step, list(tensors)))
        pipeline._interrupt = step == 1
        return tensors

    asked = {"callback_on_step_end": stop, "upscale": 2.0, **LATENT}
    (found,) = draw("a castle", **asked)
    assert [step for step, _ in steps] == [0, 1]
    assert found.shape[-2:] == (6, 8)
    assert not draw.interrupt or draw("a castle", **LATENT)
    draw("a castle", **asked, callback_on_step_end_tensor_inputs=[])
    assert steps[-1] == (1, [])


def test_what_comes_back(draw):
    images, unsafe = draw("a castle", return_dict=False, **ASKED)
    assert images[0].tobytes() == draw("a castle", **ASKED).images[0].tobytes()
    assert unsafe is None
    found = draw("a castle", num_images_per_prompt=2, **ASKED, output_type="np")
    assert found.images.shape == (2, 48, 64, 3)
    assert np.array_equal(found[1], found.images[1])
    assert draw("a castle", **LATENT).images.shape == (1, 4, 6, 8)


def test_pipelines_are_made_of_each_other(draw, golden_pipeline):
    """B7, B42."""
    ours = MixOfShowPipeline.from_pipe(golden_pipeline)
    assert ours.unet is golden_pipeline.unet
    assert MixOfShowPipeline.from_pipe(draw).model.vocabulary is draw.model.vocabulary
    for kind in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image):
        made = kind.from_pipe(draw)
        made.set_progress_bar_config(disable=True)
        assert made.unet is draw.unet
    theirs = StableDiffusionPipeline.from_pipe(draw)(
        "a castle", generator=torch.Generator().manual_seed(3), **ASKED_THEIRS
    )
    ours = draw("a castle", generator=torch.Generator().manual_seed(3), **ASKED_THEIRS)
    assert np.abs(np.array(theirs.images[0], dtype=int) - np.array(ours[0], dtype=int)).max() <= 1
    made = MixOfShowPipeline.of(type("Fused", (), {"model": draw.model})())
    assert made.model.vocabulary is draw.model.vocabulary
    assert MixOfShowPipeline.of(draw).model.vocabulary is draw.model.vocabulary


ASKED_THEIRS = {"width": 64, "height": 48, "num_inference_steps": 2, "guidance_scale": 3.0}


def test_saving_takes_diffusers_options_or_refuses_them(draw, tmp_path):
    """B8: they were ignored."""
    with pytest.raises(SettingsError, match="safe_serialization"):
        draw.save_pretrained(tmp_path / "model", safe_serialization=False)
    with pytest.raises(SettingsError, match="push_to_hub"):
        draw.save_pretrained(tmp_path / "model", push_to_hub=True)
    draw.save_pretrained(tmp_path / "model", variant="fp16")
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    scheduler = DDIMScheduler()
    again = MixOfShowPipeline.from_pretrained(
        tmp_path / "model", variant="fp16", local_files_only=True, torch_dtype=torch.float64, scheduler=scheduler
    )
    assert again.scheduler is scheduler
    assert again.unet.dtype == torch.float64
    with pytest.raises(SettingsError, match="unknown option 'devise'; did you mean 'device'"):
        MixOfShowPipeline.from_pretrained(tmp_path / "model", devise="cpu")


def test_nothing_that_is_not_finite_becomes_a_picture(draw, golden_pipeline):
    """F31: decoding made it black."""
    latents = torch.full((1, 4, 6, 8), float("nan"))
    with pytest.raises(MixOfShowError, match="not finite appeared at decoding"):
        decode(golden_pipeline, latents)
    with pytest.raises(MixOfShowError, match="not finite appeared at step 1 of 3"):
        draw("a castle", **ASKED, callback_on_step_end=lambda *_: {"latents": latents})


IDLE = {
    "negative_prompt": ("red", "without guidance (`guidance_scale` 1)"),
    "guidance_rescale": (0.5, "without guidance (`guidance_scale` 1)"),
    "isolate": (True, "with fewer than two regions"),
    "attend": (0.05, "without regions"),
    "image_strength": (0.5, "without a picture to start from (`image`)"),
    "upscale_strength": (0.4, "without `upscale`"),
    "first_pass": (0.3, "where no places are found"),
    "smallest_place": (0.1, "where no places are found"),
    "largest_place": (0.5, "where no places are found"),
}


def test_what_changes_nothing_is_said(draw, caplog):
    draw("", guidance_scale=1.0, **ASKED)
    assert "changes nothing" not in caplog.text
    draw("", guidance_scale=1.0, **{name: value for name, (value, _) in IDLE.items()}, **ASKED)
    for name, (_, where) in IDLE.items():
        assert f"`{name}` changes nothing {where}" in caplog.text


def test_public_names_are_listed():
    """B41."""
    assert {"fuse", "tune", "load_unfused", "__version__"} <= set(dir(mixofshow))
    assert all(hasattr(mixofshow, name) for name in mixofshow.__all__)


def test_as_a_community_pipeline(golden_concepts, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    root = Path(__file__).parents[2]
    pipe = DiffusionPipeline.from_pretrained(
        root / "tests" / "goldens" / "pipeline",
        custom_pipeline=str(root / "examples" / "pipeline_mix_of_show.py"),
        trust_remote_code=True,
    )
    pipe.load_concept(golden_concepts[0])
    own = MixOfShowPipeline.of(ConceptModel(StableDiffusionPipeline.from_pipe(pipe)))
    own.load_concept(golden_concepts[0])
    assert torch.equal(pipe("a <dogx>", **LATENT)[0], own("a <dogx>", **LATENT)[0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"regions": REGIONS[0]}, "regions: expected a list of regions, found Region"),
        ({"generator": torch.Generator()}, "seed: expected None with a generator"),
    ],
)
def test_what_newcomers_write_is_refused_in_one_line(asked, message, draw):
    with pytest.raises(MixOfShowError, match=message):
        draw("a castle", **ASKED | asked)


@pytest.mark.parametrize("mask", [np.ones((8, 8)), torch.ones(8, 8)])
def test_a_mask_that_is_no_picture_is_refused(mask):
    with pytest.raises(RegionError, match="mask: expected a picture"):
        Region("a cat", mask=mask)


def test_there_is_no_safety_checker_to_be_rid_of():
    root = Path(__file__).parents[1] / "goldens" / "pipeline"
    pipe = MixOfShowPipeline.from_pretrained(root, safety_checker=None, requires_safety_checker=False)
    assert isinstance(pipe, StableDiffusionPipeline)
    with pytest.raises(SettingsError, match="unknown option 'safety_checker'"):
        MixOfShowPipeline.from_pretrained(root, safety_checker=object())
