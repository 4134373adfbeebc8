"""Controls on a base of SDXL's kind are plain diffusers', and those of another base are refused in one line."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)

from mixofshow import MixOfShowPipeline
from mixofshow.concepts.model import ConceptModel
from mixofshow.errors import SettingsError
from mixofshow.sampling.controls import make_control, require_fit
from mixofshow.sampling.latents import initial_latents
from tests.sampling.test_controls import HEIGHT, NEGATIVE, PROMPT, TOLERANCE, WIDTH, control_net, noise_picture

SIZE = {"width": WIDTH, "height": HEIGHT}
ASKED = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}


def adapter(unet):
    """Of the shape that SDXL's adapters have: one feature behind each level, and one for the middle."""
    torch.manual_seed(0)
    widths = list(unet.config.block_out_channels)
    return adapter_of([*widths, widths[-1]]).requires_grad_(False).eval()


def adapter_of(channels):
    return T2IAdapter(channels=channels, num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl")


def drawn(base, controls):
    draw = MixOfShowPipeline.of(ConceptModel(base))
    return draw(PROMPT, negative_prompt=NEGATIVE, controls=controls, seed=3, **SIZE, **ASKED)[0]


def plain(reference, base, **options):
    """The same by diffusers' own pipeline."""
    reference.set_progress_bar_config(disable=True)
    noise = initial_latents(base, [torch.Generator().manual_seed(3)], **SIZE)
    return reference(PROMPT, negative_prompt=NEGATIVE, image=noise_picture(), latents=noise, **ASKED, **options)[0][0]


@pytest.mark.parametrize(("strength", "begin", "end"), [(1.0, 0.0, 1.0), (0.6, 0.25, 0.8)])
def test_a_controlnet_is_plain_diffusers(strength, begin, end, xl_pipeline, relative_error):
    network = control_net(xl_pipeline.unet)
    expected = plain(
        StableDiffusionXLControlNetPipeline(**xl_pipeline.components, controlnet=network, add_watermarker=False),
        xl_pipeline,
        controlnet_conditioning_scale=strength,
        control_guidance_start=begin,
        control_guidance_end=end,
    )
    control = make_control(network, noise_picture(), strength=strength, start=begin, end=end)
    found = drawn(xl_pipeline, [control])
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, drawn(xl_pipeline, [])) > 1e-3


def test_a_controlnet_hears_the_pooled_prompt(xl_pipeline):
    """Not only the UNet does: without it, the network's own embedding of time would be another."""
    network, heard = control_net(xl_pipeline.unet), []
    handle = network.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    drawn(xl_pipeline, [make_control(network, noise_picture())])
    handle.remove()
    _, _, pooled, negative = xl_pipeline.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
    assert torch.allclose(heard[0]["text_embeds"], torch.cat([negative, pooled]), atol=1e-6)
    assert heard[0]["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_t2i_adapter_is_plain_diffusers(strength, xl_pipeline, relative_error):
    network = adapter(xl_pipeline.unet)
    expected = plain(
        StableDiffusionXLAdapterPipeline(**xl_pipeline.components, adapter=network),
        xl_pipeline,
        adapter_conditioning_scale=strength,
        **SIZE,
    )
    found = drawn(xl_pipeline, [make_control(network, noise_picture(), strength=strength)])
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, drawn(xl_pipeline, [])) > 1e-3


def changed(unet, **values):
    return ControlNetModel.from_config({**ControlNetModel.from_unet(unet).config, **values})


REFUSED = {
    "a ControlNet of other widths": (
        lambda unet: changed(unet, block_out_channels=(8, 8, 8)),
        r"channels of its levels: expected the base model's \[8, 16, 16\], found \[8, 8, 8\]",
    ),
    "a ControlNet of other text": (
        lambda unet: changed(unet, cross_attention_dim=24),
        "cross_attention_dim: expected the base model's 40, found 24",
    ),
    "a ControlNet that hears no pooled prompt": (
        lambda unet: changed(unet, addition_embed_type=None),
        "addition_embed_type: expected the base model's text_time, found None",
    ),
    "an adapter of Stable Diffusion": (
        lambda unet: T2IAdapter(channels=[8, 16, 16], num_res_blocks=1),
        r"channels of its levels: expected the base model's \[8, 16, 16, 16\], found \[8, 16, 16\]",
    ),
    "an adapter of the same widths": (
        lambda unet: T2IAdapter(channels=[8, 16, 16, 16], num_res_blocks=1),
        "adapter for SDXL: expected the base model's True, found False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_pipeline_refuses_a_control_of_another_base(name, xl_pipeline):
    make, message = REFUSED[name]
    fitting = make_control(adapter(xl_pipeline.unet), noise_picture())
    with pytest.raises(SettingsError, match=rf"controls\[1\]: {message}") as caught:
        drawn(xl_pipeline, [fitting, make_control(make(xl_pipeline.unet), noise_picture())])
    assert "\n" not in str(caught.value)


def test_an_adapter_of_sdxl_is_refused_by_stable_diffusion(v_pipeline):
    with pytest.raises(SettingsError, match="adapter for SDXL: expected the base model's False, found True"):
        require_fit(adapter_of([8, 8, 16, 16]), v_pipeline.unet)
