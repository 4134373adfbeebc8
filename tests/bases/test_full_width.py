"""Stable Diffusion 1.5's real architecture with random weights, at 256²: one step of everything (slow, 7 GB)."""

from __future__ import annotations

import gc

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from PIL import Image
from shapes import sd15

from mixofshow import MixOfShowPipeline, Region
from mixofshow.bases.layers import count_groups, lora_layers
from mixofshow.concepts.concept import load_concept
from mixofshow.fusion.settings import FusionSettings
from mixofshow.fusion.stages import fuse, record_concept
from mixofshow.fusion.store import Store
from mixofshow.sampling.controls import make_control
from mixofshow.sampling.latents import initial_latents
from mixofshow.tuning.settings import make_settings
from mixofshow.tuning.trainer import tune

pytestmark = pytest.mark.slow
SIDE = 256
ASKED = {"width": SIDE, "height": SIDE, "num_inference_steps": 1, "guidance_scale": 5.0, "output_type": "latent"}


def control_net(unet):
    """A ControlNet of the real size, whose outputs are not zeros."""
    network = ControlNetModel.from_unet(unet)
    for name, values in network.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(values, std=0.01)
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def fused_folder(golden_pipeline, tmp_path_factory):
    """Tune, save, record, fuse, draw with regions and a ControlNet, save; then all of it is forgotten but the folder."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "pictures").mkdir()
    Image.effect_noise((SIDE, SIDE), 100).convert("RGB").save(folder / "pictures" / "0.png")
    base = sd15(golden_pipeline.tokenizer, side=SIDE)
    assert (count_groups(base.unet), len(lora_layers(base))) == (16, 12 * 4 + 16 * 8)
    table = {"name": "thing", "class_word": "man", "data": folder / "pictures", "base": "wide", "steps": 1}
    tune(make_settings({**table, "batch_size": 1, "gradient_checkpointing": True}), base).save(
        folder / "thing.safetensors"
    )
    concept = load_concept(folder / "thing.safetensors", base)
    assert concept.embeddings.shape == (2, 16, 768)
    assert all(change.matrix().norm() > 0 for change in concept.deltas.values())
    settings = FusionSettings(mode="independent", steps=1)
    store = Store(folder / "kept")
    kept = record_concept(concept, base, settings, store).file.path
    fused = fuse([concept], base, settings, store=store)
    assert list((folder / "kept").iterdir()) == [kept] and len(fused.layers) == 176
    draw = MixOfShowPipeline.of(fused.model)
    control = make_control(control_net(base.unet), Image.new("RGB", (SIDE, SIDE), "white"))
    regions = [Region("a <thing>", (0, 0, 128, 256)), Region("a red man", (128, 0, 256, 256))]
    plain, with_regions, with_both = (
        draw("a beach", **ASKED, **more)[0]
        for more in ({}, {"regions": regions}, {"regions": regions, "controls": [control]})
    )
    assert all(torch.isfinite(one).all() for one in (plain, with_regions, with_both))
    assert not torch.equal(plain, with_regions) and not torch.equal(with_regions, with_both)
    fused.model.save(folder / "fused")
    return folder / "fused"


@pytest.fixture(autouse=True)
def _one_model_at_a_time():
    yield
    gc.collect()


def test_plain_diffusers_draws_the_same_from_the_fused_folder(fused_folder, relative_error):
    gc.collect()
    draw = MixOfShowPipeline.from_pretrained(fused_folder)
    noise = initial_latents(draw, [torch.Generator().manual_seed(0)], width=SIDE, height=SIDE)
    found = draw("a red castle", **ASKED)[0]
    assert not torch.equal(found, draw("a <thing>", **ASKED)[0])
    del draw
    gc.collect()
    plain = StableDiffusionPipeline.from_pretrained(fused_folder)
    plain.set_progress_bar_config(disable=True)
    assert relative_error(found, plain("a red castle", latents=noise, **ASKED).images[0]) < 1e-5
