"""Laws of controls: plain diffusers' numbers, sums, strengths in time and place, and refusals in one line."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from einops import repeat
from PIL import Image

from mixofshow.bases.layers import cross_attentions
from mixofshow.errors import BadInputError, SettingsError
from mixofshow.sampling.conditioning import EncodedPrompt
from mixofshow.sampling.controls import (
    AdapterControl,
    ControlNetControl,
    at_level,
    load_control,
    make_control,
    map_of_regions,
)
from mixofshow.sampling.denoising import added, denoise, noise_predictor

PROMPT, NEGATIVE = "photo of a red castle", "lowres"
WIDTH, HEIGHT = 96, 64
STEPS = 4
TOLERANCE = 1e-5


def noise_picture(width=WIDTH, height=HEIGHT, seed=0):
    values = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def control_net(unet, channels=(16, 32, 48, 64)):
    """The UNet's copy, whose outputs are not the zeros that a ControlNet begins with."""
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    torch.manual_seed(0)
    for name, values in network.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(values, std=0.1)
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def adapter(golden_pipeline):
    torch.manual_seed(0)
    unet = golden_pipeline.unet
    factor = golden_pipeline.vae_scale_factor
    channels = list(unet.config.block_out_channels)
    return T2IAdapter(channels=channels, num_res_blocks=1, downscale_factor=factor).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def controlnet(golden_pipeline):
    return control_net(golden_pipeline.unet, (16, 32, 48, 64)[: golden_pipeline.vae_scale_factor.bit_length()])


@pytest.fixture(params=["adapter", "controlnet"])
def network(request, adapter, controlnet):
    return {"adapter": adapter, "controlnet": controlnet}[request.param]


@pytest.fixture
def start(golden_pipeline):
    factor = golden_pipeline.vae_scale_factor
    shape = (2, golden_pipeline.unet.config.in_channels, HEIGHT // factor, WIDTH // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def texts(pipeline, rows):
    positive, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    return positive.repeat(rows, 1, 1), negative.repeat(rows, 1, 1)


@torch.no_grad()
def drawn(pipeline, start, controls):
    """Latents of the package's own loop, from layer-wise text."""
    layers, (positive, negative) = len(cross_attentions(pipeline.unet)), texts(pipeline, len(start))
    text = repeat(torch.cat([negative, positive]), "rows ... -> rows layers ...", layers=layers)
    return denoise(
        pipeline,
        start,
        EncodedPrompt(text, (), guided=True),
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        controls=controls,
    )


def plain(pipeline, start, picture, **options):
    """Latents of diffusers' own pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    positive, negative = texts(pipeline, len(start))
    return pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        image=picture,
        latents=start,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
        **options,
    ).images


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_t2i_adapter_is_plain_diffusers(strength, golden_pipeline, adapter, start, relative_error):
    reference = StableDiffusionAdapterPipeline.from_pipe(golden_pipeline, adapter=adapter)
    expected = plain(
        reference,
        start,
        [noise_picture()] * 2,
        adapter_conditioning_scale=strength,
        width=WIDTH,
        height=HEIGHT,
    )
    control = AdapterControl(adapter, noise_picture(), strength=strength)
    found = drawn(golden_pipeline, start, [control])
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, drawn(golden_pipeline, start, [])) > 1e-2


@pytest.mark.parametrize(("strength", "begin", "end"), [(1.0, 0.0, 1.0), (0.6, 0.0, 0.5), (1.0, 0.25, 0.8)])
def test_a_controlnet_is_plain_diffusers(strength, begin, end, golden_pipeline, controlnet, start, relative_error):
    reference = StableDiffusionControlNetPipeline.from_pipe(golden_pipeline, controlnet=controlnet)
    expected = plain(
        reference,
        start,
        [noise_picture()] * 2,
        controlnet_conditioning_scale=strength,
        control_guidance_start=begin,
        control_guidance_end=end,
    )
    control = ControlNetControl(controlnet, noise_picture(), strength=strength, start=begin, end=end)
    found = drawn(golden_pipeline, start, [control])
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, drawn(golden_pipeline, start, [])) > 1e-2


def asked(control, pipeline, start, step=1, steps=STEPS):
    text = texts(pipeline, len(start))[0][:, None]
    return control.residuals(start, torch.tensor(500), text, step, steps)


def tensors(residuals):
    """All levels of all of the arguments, in order."""
    return [level for value in residuals.values() for level in ([value] if torch.is_tensor(value) else value)]


def test_rows_share_texts_in_equal_parts(network, golden_pipeline, start):
    """One prompt for two pictures, with guidance: (negative, positive) stand for (negative, negative, positive, positive)."""
    positive, negative = (text[:, None] for text in texts(golden_pipeline, 1))
    latents, control = torch.cat([start, start]), make_control(network, noise_picture())
    few, many = (
        tensors(control.residuals(latents, torch.tensor(500), torch.cat(rows), 1, STEPS))
        for rows in ([negative, positive], [negative, negative, positive, positive])
    )
    assert all(torch.equal(one, other) for one, other in zip(few, many, strict=True))
    assert all(len(level) == len(latents) for level in few)


def test_strength_nought_adds_nothing(network, golden_pipeline, start):
    assert asked(make_control(network, noise_picture(), strength=0), golden_pipeline, start) == {}
    assert torch.equal(
        drawn(golden_pipeline, start, [make_control(network, noise_picture(), strength=0)]),
        drawn(golden_pipeline, start, []),
    )


def test_residuals_are_as_strong_as_asked(network, golden_pipeline, start):
    whole, half = (
        tensors(asked(make_control(network, noise_picture(), strength=strength), golden_pipeline, start))
        for strength in (1.0, 0.5)
    )
    assert len(whole) == len(half) > 0
    for one, other in zip(whole, half, strict=True):
        torch.testing.assert_close(other, one / 2)


def test_controls_add_up(adapter, controlnet, golden_pipeline, start):
    parts = [
        asked(make_control(network, noise_picture(seed=seed)), golden_pipeline, start)
        for seed, network in enumerate((adapter, adapter, controlnet, controlnet))
    ]
    total = added(parts)
    assert set(total) == set(parts[0]) | set(parts[2])
    for name, value in total.items():
        first, second = (part[name] for part in parts if name in part)
        for found, one, other in zip(*map(tensors_of, (value, first, second)), strict=True):
            torch.testing.assert_close(found, one + other)
    assert added([parts[0], {}])["down_intrablock_additional_residuals"] == [*tensors(parts[0])]
    assert added([]) == {}


def test_adapters_of_other_depths_do_not_add_up():
    shallow, deep = ({"down_intrablock_additional_residuals": [torch.ones(1)] * levels} for levels in (1, 2))
    with pytest.raises(ValueError, match="longer than"):
        added([shallow, deep])


@torch.no_grad()
def test_every_prediction_of_a_step_is_controlled(network, golden_pipeline, start):
    """The UNet empties the list that it is given; a step of regions with weights of their own predicts several times."""
    more = asked(make_control(network, noise_picture()), golden_pipeline, start)
    text = repeat(texts(golden_pipeline, 2)[0], "rows ... -> rows layers ...", layers=16)
    with noise_predictor(golden_pipeline, EncodedPrompt(text, (), guided=False), start) as predict:
        first, second, plain = (predict(start, torch.tensor(500), 1, given) for given in (more, more, {}))
    assert torch.equal(first, second) and not torch.equal(first, plain)


def tensors_of(value):
    return [value] if torch.is_tensor(value) else list(value)


@pytest.mark.parametrize(
    ("begin", "end", "active"),
    [(0.0, 1.0, range(1, 11)), (0.0, 0.5, range(1, 6)), (0.3, 1.0, range(4, 11)), (0.25, 0.75, range(4, 8))],
)
def test_a_control_keeps_to_its_steps(begin, end, active, network, golden_pipeline, start):
    control = make_control(network, noise_picture(), start=begin, end=end)
    assert [step for step in range(1, 11) if asked(control, golden_pipeline, start, step, 10)] == list(active)


def test_a_map_weighs_every_level_by_area(network, golden_pipeline, start):
    """The left half of the picture has no say, in any level; the rest is what it is without a map."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    mask[:, WIDTH // 2 :] = 1
    whole = tensors(asked(make_control(network, noise_picture()), golden_pipeline, start))
    weighed = tensors(asked(make_control(network, noise_picture(), strength_map=mask), golden_pipeline, start))
    for one, found in zip(whole, weighed, strict=True):
        columns = one.shape[-1]
        assert not found[..., : columns // 2].any()
        torch.testing.assert_close(found[..., -(columns // 2) :], one[..., -(columns // 2) :])
        if columns % 2:  # the cell that the border cuts
            torch.testing.assert_close(found[..., columns // 2], one[..., columns // 2] / 2)
    assert len({level.shape[-2:] for level in whole}) > 2


def test_maps_may_be_pictures_files_arrays_or_tensors(tmp_path, network, golden_pipeline, start):
    values = np.linspace(0, 255, HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)
    picture = Image.fromarray(values)
    picture.save(tmp_path / "map.png")
    shares = values.astype(np.float32) / 255
    found = [
        tensors(asked(make_control(network, noise_picture(), strength_map=given), golden_pipeline, start))
        for given in (picture, tmp_path / "map.png", str(tmp_path / "map.png"), shares, torch.from_numpy(shares))
    ]
    for one, other in pairwise(found):
        assert all(torch.allclose(a, b) for a, b in zip(one, other, strict=True))


def test_strengths_of_regions_become_a_map():
    left = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    middle = torch.tensor([[0.0, 1.0, 0.5, 0.0]])
    found = map_of_regions([(left, 0.0), (middle, 2.0)], outside=0.5)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 1.25, 0.5]]))


def test_a_level_is_the_mean_of_its_area():
    strengths = torch.rand(12, 18, generator=torch.Generator().manual_seed(0))
    expected = strengths.reshape(4, 3, 6, 3).mean((1, 3))
    torch.testing.assert_close(at_level(strengths, 4, 6), expected)


def test_a_t2i_adapter_runs_once_per_picture(adapter, golden_pipeline, start):
    control, runs = AdapterControl(adapter, noise_picture()), []
    handle = adapter.register_forward_hook(lambda *_: runs.append(1))
    try:
        drawn(golden_pipeline, start, [control])
        drawn(golden_pipeline, start, [control])
        assert len(runs) == 1
        drawn(golden_pipeline, start[..., :-4], [control])  # another size needs other features
        assert len(runs) == 2
    finally:
        handle.remove()


def test_another_size_is_adjusted_with_a_warning(network, golden_pipeline, start, caplog):
    large = noise_picture(2 * WIDTH, HEIGHT)
    with caplog.at_level(logging.WARNING):
        found = tensors(asked(make_control(network, large), golden_pipeline, start))
    (record,) = caplog.records
    assert f"{2 * WIDTH} x {HEIGHT}" in record.getMessage() and f"{WIDTH} x {HEIGHT}" in record.getMessage()
    caplog.clear()
    resized = large.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    expected = tensors(asked(make_control(network, resized), golden_pipeline, start))
    assert not caplog.records
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_is_transparent_asks_for_nothing(network, golden_pipeline, start):
    clear = Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0))
    black = Image.new("L", (WIDTH, HEIGHT))
    one, other = (tensors(asked(make_control(network, given), golden_pipeline, start)) for given in (clear, black))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_saved_network_is_loaded_as_what_it_is(network, golden_pipeline, start, tmp_path):
    network.save_pretrained(tmp_path / "net")
    loaded = load_control(tmp_path / "net", unet=golden_pipeline.unet)
    assert type(loaded) is type(network)
    one, other = (
        tensors(asked(make_control(which, noise_picture()), golden_pipeline, start)) for which in (network, loaded)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1}, "strength: expected 0 to 10, found -1"),
        ({"strength": float("nan")}, "strength: expected 0 to 10, found nan"),
        ({"start": 0.5, "end": 0.5}, "start, end: expected 0 <= start < end <= 1, found 0.5, 0.5"),
        ({"end": 1.5}, "start, end: expected 0 <= start < end <= 1, found 0.0, 1.5"),
        ({"strength_map": np.zeros((2, 2, 2))}, r"strength_map: expected rows and columns, found \(2, 2, 2\)"),
        ({"strength_map": np.full((2, 2), np.nan)}, "strength_map: expected numbers from 0 to 10, found nan to nan"),
        ({"strength_map": -np.ones((2, 2))}, "strength_map: expected numbers from 0 to 10, found -1 to -1"),
        ({"strength_map": "nowhere.png"}, "nowhere.png: cannot be read"),
    ],
)
def test_bad_settings_are_named(settings, message, network):
    with pytest.raises(BadInputError, match=message):
        make_control(network, noise_picture(), **settings)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_what_is_no_picture_is_refused(content, network, tmp_path):
    path = tmp_path / "sketch.png"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"sketch\.png: not a readable picture") as caught:
        make_control(network, path)
    assert "\n" not in str(caught.value)


def test_a_huge_picture_is_refused_unread(network):
    with pytest.raises(BadInputError, match="the picture: 8000 x 8000 pixels, at most 50000000 are read"):
        make_control(network, Image.new("1", (8000, 8000)))


def write(folder, config, weights=b""):
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no folder with the config.json of a network; known by name are emojiland-t2i-adapter"),
        ("{", "no folder with the config.json"),
        ("[]", "no folder with the config.json"),
        ("{}", "no folder with the config.json"),
        ('{"_class_name": "UNet2DConditionModel"}', "expected T2IAdapter or ControlNetModel, found UNet2DCondition"),
        ('{"_class_name": "T2IAdapter"}', "could not be loaded"),
        ('{"_class_name": "T2IAdapter", "channels": "many"}', "'channels': expected whole numbers"),
    ],
)
def test_a_folder_that_holds_no_control_is_refused(config, message, tmp_path):
    with pytest.raises(SettingsError, match=message) as caught:
        load_control(write(tmp_path / "net", config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.popitem(), "tensors missing or unknown: expected none, found adapter"),
        (lambda weights: weights.update(surplus=torch.zeros(1)), "expected none, found surplus"),
        (
            lambda weights: weights["adapter.conv_in.weight"].view(-1)[3:4].fill_(torch.nan),
            "not finite: .*conv_in.weight",
        ),
    ],
)
def test_weights_that_are_not_whole_are_refused(change, message, adapter, tmp_path):
    weights = {name: value.clone() for name, value in adapter.state_dict().items()}
    change(weights)
    config = json.dumps({**adapter.config, "_class_name": "T2IAdapter"})
    with pytest.raises(SettingsError, match=message):
        load_control(write(tmp_path / "net", config, safetensors.torch.save(weights)))


@pytest.mark.parametrize("part", [0, 7, 100, 0.5, 0.99])
def test_a_cut_file_is_refused(part, adapter, tmp_path):
    weights = safetensors.torch.save(adapter.state_dict())
    config = json.dumps({**adapter.config, "_class_name": "T2IAdapter"})
    length = part if isinstance(part, int) else int(part * len(weights))
    with pytest.raises(SettingsError, match="could not be loaded") as caught:
        load_control(write(tmp_path / "net", config, weights[:length]))
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(adapter, tmp_path):
    folder = write(tmp_path / "net", json.dumps({**adapter.config, "_class_name": "T2IAdapter"}))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(adapter.state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(SettingsError, match="could not be loaded"):
        load_control(folder)


def test_a_name_is_corrected():
    with pytest.raises(SettingsError, match="did you mean 'emojiland-controlnet'"):
        load_control("emojiland-contolnet")


def test_a_control_of_another_base_is_refused(golden_pipeline, tmp_path):
    T2IAdapter(channels=[8, 16], num_res_blocks=1).save_pretrained(tmp_path / "net")
    with pytest.raises(SettingsError, match=r"channels of its levels: expected the base model's \[.*found \[8, 16\]"):
        load_control(tmp_path / "net", unet=golden_pipeline.unet)
