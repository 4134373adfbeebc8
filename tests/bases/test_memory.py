"""What is computed at once fits, is what it would be all at once, and goes when it is done with."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hollow import Ledger, Metered

from mixofshow import FusionSettings, MixOfShowPipeline, Region, fuse, make_settings
from mixofshow.bases import loading, memory
from mixofshow.bases.layers import cross_attentions
from mixofshow.concepts import model
from mixofshow.concepts.model import load_unfused
from mixofshow.fusion.refitting import refit
from mixofshow.sampling import attend
from mixofshow.sampling.composition import compose
from mixofshow.sampling.latents import decode
from mixofshow.sampling.settings import Composition
from mixofshow.tuning.batches import prior_examples
from mixofshow.tuning.settings import with_presets

GOLDEN_BASE = Path(__file__).parents[1] / "goldens" / "pipeline"
QUICK = FusionSettings(method="average", steps=1, prompts=("photo of a {}",), refit=1, prior=1.0, prior_prompts=("",))
TUNING = {"name": "thing", "class_word": "man", "data": ".", "prior.weight": 1.0, "prior.count": 5}


@pytest.fixture
def small(monkeypatch, golden_pipeline):
    """Two of the golden base's pictures fill the UNet, and one the autoencoder."""
    side = golden_pipeline.unet.config.sample_size
    monkeypatch.setattr(memory, "CELLS", 2 * side**2)
    monkeypatch.setattr(memory, "PIXELS", (side * golden_pipeline.vae_scale_factor) ** 2)


@contextlib.contextmanager
def batches_of(module):
    """How many a part is given at a time, while inside."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture
def uncollected():
    """Nothing is looked for that refers to itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_the_prior_is_drawn_in_pieces_that_fit(golden_pipeline, small, monkeypatch):
    def drawn():
        with batches_of(golden_pipeline.unet.conv_in) as steps, batches_of(golden_pipeline.vae.decoder) as decoded:
            found = prior_examples(make_settings(TUNING), golden_pipeline, lambda *_: None)
        return [np.array(one.image, dtype=int) for one in found], set(steps), decoded

    call = functools.partialmethod(type(golden_pipeline).__call__, num_inference_steps=2)
    monkeypatch.setattr(type(golden_pipeline), "__call__", call)
    pieces, steps, decoded = drawn()
    assert (steps, decoded) == ({4, 2}, [1] * 5)  # with guidance, each picture has two sides
    assert not golden_pipeline.vae.use_slicing
    monkeypatch.setattr(memory, "CELLS", 10**9)
    monkeypatch.setattr(memory, "PIXELS", 10**9)
    whole, steps, decoded = drawn()
    assert (steps, decoded) == ({10}, [5])
    assert max(np.abs(one - other).max() for one, other in zip(pieces, whole, strict=True)) <= 1


def test_latents_are_decoded_one_by_one_where_all_are_too_many(golden_pipeline, small):
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), batches_of(golden_pipeline.vae.decoder) as seen:
        found = decode(golden_pipeline, latents, "pt")
        alone = torch.cat([decode(golden_pipeline, one[None], "pt") for one in latents])
    assert seen == [1] * 6
    assert torch.equal(found, alone)


def test_decoding_takes_less_than_the_autoencoder_by_itself_and_gives_the_same(golden_pipeline):
    """On one with the proportions of Stable Diffusion's."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(8, 16, 32, 32), layers_per_block=2, norm_num_groups=4, **kinds).eval()
    pipeline, latents = copy.copy(golden_pipeline), torch.randn(1, 4, 32, 32)
    pipeline.vae = vae

    def measured(decoded):
        ledger = Ledger()
        with torch.no_grad(), Metered(ledger):
            return decoded(), ledger.peak["cpu"]

    whole, most = measured(lambda: vae.decode(latents / vae.config.scaling_factor).sample)
    ours, less = measured(lambda: decode(pipeline, latents, "pt"))
    assert torch.equal(ours, golden_pipeline.image_processor.postprocess(whole, output_type="pt"))
    assert less < 0.95 * most
    assert not any("forward" in vars(one) for one in vae.modules())


@pytest.mark.parametrize(("upscale", "expected"), [(1, [4, 4, 2]), (2, [2] * 5)])
def test_an_evaluation_draws_as_many_at_once_as_fit(upscale, expected, golden_pipeline, small):
    wanted = Composition(prompt="a man", num=5, steps=1, width=128, height=128, upscale=upscale, upscale_strength=1)
    with batches_of(golden_pipeline.unet.conv_in) as seen:
        found = compose(MixOfShowPipeline.of(model.ConceptModel(golden_pipeline)), wanted, at_once=True)
    assert len(found) == 5
    assert seen[:: len(seen) // len(expected)] == expected


def test_refitting_in_pieces_and_without_kept_activations_is_the_same(golden_pipeline, golden_concepts, monkeypatch):
    weights = fuse(golden_concepts, golden_pipeline, QUICK.model_copy(update={"refit": 0})).model.weights

    def refitted():
        recomputed, seen = [], []

        def look(module, args):
            if torch.is_grad_enabled():
                seen.append(len(args[0]))
                recomputed.append(golden_pipeline.unet.is_gradient_checkpointing)

        handle = golden_pipeline.unet.conv_in.register_forward_pre_hook(look)
        found = refit(golden_pipeline, golden_concepts, weights, QUICK)
        handle.remove()
        assert not golden_pipeline.unet.is_gradient_checkpointing
        return found.losses, max(seen), set(recomputed)

    whole, largest, recomputed = refitted()
    assert (largest, recomputed) == (5, {False})  # four lessons, and one of the prior
    monkeypatch.setattr(memory, "CELLS", golden_pipeline.unet.config.sample_size**2)
    monkeypatch.setattr(memory, "LARGE", 1)
    pieces, largest, recomputed = refitted()
    assert (largest, recomputed) == (1, {True})
    assert np.allclose([*pieces.values()], [*whole.values()], rtol=1e-3)


def test_what_attend_looks_at_may_be_computed_again(golden_pipeline, golden_concepts, monkeypatch):
    draw = MixOfShowPipeline.single(golden_pipeline, golden_concepts[0])
    how = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 0, "attend": 0.5, "output_type": "np"}
    regions = [Region(f"a {golden_concepts[0].prompt}", (0, 0, 32, 64))]
    kept = draw("a photo", regions=regions, **how)[0]
    without = draw("a photo", regions=regions, **{**how, "attend": 0})[0]
    monkeypatch.setattr(attend, "LARGE", 1)
    assert np.abs(draw("a photo", regions=regions, **how)[0] - kept).max() < 1e-4 < np.abs(without - kept).max()


def test_bases_of_sdxls_family_are_tuned_without_kept_activations_unless_told_otherwise():
    assert not with_presets(make_settings(TUNING), "any", "stable-diffusion").gradient_checkpointing
    assert with_presets(make_settings(TUNING), "any", "stable-diffusion-xl").gradient_checkpointing
    told = make_settings({**TUNING, "gradient_checkpointing": False})
    assert not with_presets(told, "any", "stable-diffusion-xl").gradient_checkpointing


def test_keys_and_values_go_with_their_picture(golden_pipeline, golden_concepts, uncollected):
    draw = MixOfShowPipeline.single(golden_pipeline, golden_concepts[0])
    layer, kept = next(iter(cross_attentions(golden_pipeline.unet).values())), []

    def note(pipeline, step, timestep, tensors):
        kept.extend(weakref.ref(one) for one in (layer.processor, layer.processor.regional))
        return {}

    regions = [Region(f"a {golden_concepts[0].prompt}", (0, 0, 32, 64)), Region("a man", (32, 0, 64, 64))]
    how = {"width": 64, "height": 64, "num_inference_steps": 2, "callback_on_step_end": note}
    for regional in (False, golden_concepts):
        draw("a photo", regions=regions, isolate=True, regional_lora=regional, **how)
    assert len(kept) == 8
    assert [one for one in kept if one() is not None] == []


def test_a_pipeline_and_its_weights_go_at_once(golden_pipeline, golden_concepts, uncollected):
    draw = MixOfShowPipeline.single(golden_pipeline, golden_concepts[0])
    draw("a man", width=64, height=64, num_inference_steps=1)
    kept = [weakref.ref(draw), weakref.ref(next(iter(draw.model.weights.values())))]
    del draw
    assert [one() for one in kept] == [None, None]


def test_one_base_is_there_at_a_time_while_a_model_is_taken_apart(
    golden_pipeline, golden_concepts, tmp_path, monkeypatch, uncollected
):
    fused = fuse(golden_concepts, golden_pipeline, QUICK.model_copy(update={"refit": 0})).model
    fused.save(tmp_path / "fused")
    loaded, there = loading.load_base, []

    def counted(name, **options):
        assert [one for one in there if one() is not None] == []
        pipeline = loaded(name, **options)
        there.append(weakref.ref(pipeline.unet))
        devices.append(str(options.get("device")))
        return pipeline

    devices = []
    monkeypatch.setattr(loading, "load_base", counted)
    monkeypatch.setattr(model, "load_base", counted)
    found = load_unfused(tmp_path / "fused", base=GOLDEN_BASE, device=torch.device("cpu", 0))
    assert devices == ["cpu", "cpu:0"]  # the fused one, of which little is taken, never comes to the base's device
    for name, weight in found.weights.items():
        torch.testing.assert_close(weight, fused.weights[name])
