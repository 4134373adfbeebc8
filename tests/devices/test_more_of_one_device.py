"""The same of other families of bases, of what steers a picture, and of what evaluating does."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image

from mixofshow import MixOfShowPipeline, Region, fuse, load_base, tune
from mixofshow.concepts.interchange.exporting import export_concept
from mixofshow.concepts.interchange.importing import open_concept
from mixofshow.concepts.interchange.settings import ImportSettings
from mixofshow.evaluation import previews
from mixofshow.evaluation.requests import BaseSource, DrawnBy, ImageRequest
from mixofshow.evaluation.tasks import DrawTask, FuseTask, TuneTask
from mixofshow.fusion.settings import FusionSettings, RecordingSettings
from mixofshow.fusion.stages import record_concept
from mixofshow.fusion.statistics import MomentAccumulator
from mixofshow.fusion.store import Store
from mixofshow.sampling.controls import make_control
from mixofshow.sampling.settings import Composition

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
QUICK = {"steps": 1, "prompts": ("photo of a {}",), "picture_prompts": ("photo of a {}",)}
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 0}


@pytest.fixture
def noise():
    values = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


@pytest.fixture
def hasty(golden_pipeline, monkeypatch):
    """Pictures of a prior and previews in one step."""
    monkeypatch.setattr(previews, "STEPS", 1)
    call = functools.partialmethod(type(golden_pipeline).__call__, num_inference_steps=1)
    monkeypatch.setattr(type(golden_pipeline), "__call__", call)


@pytest.mark.parametrize("family", ["v_pipeline", pytest.param("xl_pipeline", marks=pytest.mark.slow)])
def test_the_whole_job_on_bases_of_other_families(family, settings, gpu, request):
    base = copy.deepcopy(request.getfixturevalue(family)).to("cuda")
    names = ("one", "two")
    concepts = [tune(settings(name=name, steps=1, seed=seed), base) for seed, name in enumerate(names)]
    fused = fuse(concepts, base, FusionSettings(**QUICK, prior=0.1))
    regions = [
        Region(f"a {one.prompt}", (32 * place, 0, 32 * place + 32, 64)) for place, one in enumerate(fused.model.concepts)
    ]
    for regional in (False, True):
        MixOfShowPipeline.of(fused)("a photo", regions=regions, isolate=True, regional_lora=regional, **SMALL)


def test_a_prior_is_drawn_and_previews_are_shown(settings, gpu, hasty, tmp_path):
    base = load_base(GOLDEN_BASE, device="cuda")
    asked = settings(**{"method": "custom-diffusion", "prior.weight": 1.0, "prior.count": 2, "steps": 1})
    tune(asked, base)
    shown = settings(steps=1, preview_every=1)
    tune(shown, base, preview=previews.preview_grids(base, tmp_path / "previews", images=1))
    assert len(list((tmp_path / "previews").iterdir())) == 1


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_controls_with_a_strength_for_each_place(kind, few, noise, gpu):
    base = load_base(GOLDEN_BASE, device="cuda")
    torch.manual_seed(0)
    factor, widths = base.vae_scale_factor, list(base.unet.config.block_out_channels)
    if kind == "controlnet":
        hint = (16, 32, 48, 64)[: factor.bit_length()]
        network = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=hint)
    else:
        network = T2IAdapter(channels=widths, num_res_blocks=1, downscale_factor=factor)
    where = Image.new("L", (64, 64))
    where.paste(255, (0, 0, 32, 64))
    control = make_control(network.requires_grad_(False).eval().to("cuda"), noise, strength_map=where)
    MixOfShowPipeline.single(base, few[0])(f"a {few[0].prompt}", controls=[control], **SMALL)


def test_pictures_to_begin_with_and_to_change_a_part_of(few, noise, gpu):
    draw = MixOfShowPipeline.single(load_base(GOLDEN_BASE, device="cuda"), few[0])
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    (found,) = draw(f"a {few[0].prompt}", image=noise, mask_image=mask, strength=0.5, **SMALL)
    assert np.array_equal(np.array(found)[:, 32:], np.array(noise)[:, 32:])
    draw(f"a {few[0].prompt}", image=noise, upscale=1.5, **SMALL)


def test_recording_into_a_store_and_converting_there_and_back(few, gpu, tmp_path):
    base = load_base(GOLDEN_BASE, device="cuda")
    record_concept(few[0], base, RecordingSettings(**QUICK), Store(tmp_path / "kept"))
    lora = tmp_path / "lora" / export_concept(few[0], base, tmp_path / "lora", "kohya").lora
    found = open_concept(lora, base, ImportSettings(name="other", class_word="man"))
    MixOfShowPipeline.single(base, found)(f"a {found.prompt}", **SMALL)


def test_what_a_suite_gives_its_workers(settings, few, gpu, tmp_path):
    base = BaseSource(str(GOLDEN_BASE), "cuda")
    TuneTask(base, settings(steps=1), tmp_path / "tuned.safetensors").work()
    few[0].save(tmp_path / "few.safetensors")
    files = (tmp_path / "tuned.safetensors", tmp_path / "few.safetensors")
    FuseTask(base, files, FusionSettings(**QUICK, method="average"), tmp_path / "fused.safetensors").work()
    wanted = Composition(prompt="a <thing>", num=2, steps=1)
    fused = DrawnBy(base, "fused", delta=tmp_path / "fused.safetensors")
    request = ImageRequest(fused, wanted)
    DrawTask(fused, (request,), tmp_path / "pictures").work()
    assert len(request.pictures(tmp_path / "pictures")) == 2


def test_inputs_that_are_kept_row_by_row_wait_on_the_cpu(gpu):
    """Of all layers together they are more than a GPU holds; their moments stay where they are summed."""
    seen = MomentAccumulator(keep_inputs=True)
    seen.add("layer", torch.randn(3, 4).to("cuda"))
    found = seen.seen()["layer"]
    assert (found.inputs.device.type, found.moments.device.type) == ("cpu", "cuda")
