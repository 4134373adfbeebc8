"""Emojiland's controls: the layouts they learn from, their recipe, and the weights that ship."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image
from sketches import foreground, overlap, sketched

from emojiland import control_networks
from emojiland.control_networks import KINDS, draw, random_layout, scattered, silhouettes, stage, train_control
from emojiland.training import new_run
from mixofshow.bases.emojiland.sprites import ICON_SIZE, sprite
from mixofshow.bases.emojiland.world import Placement
from mixofshow.bases.loading import EMBEDDED_CONTROLS, load_base

CLASSES = {"t2i-adapter": T2IAdapter, "controlnet": ControlNetModel}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_shape = pytest.mark.parametrize(("width", "count"), [(64, 1), (64, 2), (160, 1), (160, 3)])
MOST_BYTES = 8 * 10**6


@pytest.fixture(scope="module")
def base():
    return load_base("emojiland")


@every_shape
def test_sprites_lie_anywhere_but_whole_and_side_by_side(width, count):
    random = Random(0)
    laid = [scattered(random, count, width=width) for _ in range(200)]
    for one in laid:
        assert all(place.side / 2 <= place.x <= width - place.side / 2 for place in one)
        assert all(place.side / 2 <= place.y <= 64 - place.side / 2 for place in one)
        assert all(a.x + a.side / 2 <= b.x - b.side / 2 for a, b in pairwise(one))
    heights = [place.y for one in laid for place in one]
    assert max(heights) - min(heights) > 20  # pre-training has them all within 8 pixels


def test_a_silhouette_is_the_sprites_outline_filled():
    icon = sprite("noto", "cat-face")
    place = Placement(x=32, y=32, side=ICON_SIZE // 2, tilt=0)
    sketch = silhouettes([icon], [place])
    small = icon.getchannel("A").resize((place.side, place.side), Image.Resampling.LANCZOS)
    expected = Image.new("L", (64, 64))
    expected.paste(small, (32 - place.side // 2, 32 - place.side // 2))
    assert sketch.mode == "RGB"
    for channel in sketch.split():
        difference = np.asarray(channel).astype(int) - np.asarray(expected)
        assert np.abs(difference).max() <= 8


@every_shape
def test_a_layout_is_a_function_of_its_seed(width, count):
    first, second = (random_layout(Random(3), width=width, count=count) for _ in range(2))
    assert first.sketch.tobytes() == second.sketch.tobytes()
    assert first.picture.image.tobytes() == second.picture.image.tobytes()
    assert first.sketch.size == first.picture.image.size == (width, 64)
    assert len(first.picture.subjects) == count


@every_kind
def test_the_unet_takes_what_a_new_control_adds(kind, base):
    network = KINDS[kind].build(base.unet).eval()
    latents, text = torch.randn(2, 8, 16, 40), torch.randn(2, 48, base.unet.config.cross_attention_dim)
    moments = torch.tensor([900, 100])
    with torch.no_grad():
        added = KINDS[kind].residuals(network, torch.rand(2, 3, 64, 160), latents, moments, text)
        plain = base.unet(latents, moments, text).sample
        found = base.unet(latents, moments, text, **added).sample
    # A ControlNet begins with adding nothing (Zhang et al., 2023); a T2I-Adapter does not.
    assert torch.equal(found, plain) == (kind == "controlnet")
    assert torch.isfinite(found).all()


@every_kind
def test_only_the_control_learns(kind, base):
    network = KINDS[kind].build(base.unet)
    made = stage(kind, base, network, 10, 2)
    losses = [made.loss(network, seed) for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert not any(
        parameter.requires_grad for part in (base.unet, base.vae, base.text_encoder) for parameter in part.parameters()
    )


@every_kind
def test_training_leaves_a_folder_and_goes_on(kind, base, tmp_path, monkeypatch):
    monkeypatch.setattr(control_networks, "preview", lambda pipeline: Image.new("RGB", (1, 1)))
    assert not train_control(kind, base, tmp_path, steps=2, batch=2, minutes=0)
    assert train_control(kind, base, tmp_path, steps=2, batch=2)
    loaded = CLASSES[kind].from_pretrained(tmp_path / kind)
    (checkpoint,) = tmp_path.glob("*.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


def test_the_precision_of_an_earlier_run_is_forgotten():
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="no")
    assert new_run().mixed_precision == "bf16"


@every_kind
def test_the_weights_that_ship_are_small(kind):
    folder = EMBEDDED_CONTROLS[f"emojiland-{kind}"]
    assert 0 < sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES


@pytest.fixture(scope="module")
def unseen():
    return [random_layout(Random(2**40 + k), count=1, scenes=["on a green background"]) for k in range(6)]


def followed(images, layouts):
    """The mean overlap of what is drawn with what the sketches ask for."""
    pairs = zip(images, layouts, strict=True)
    return np.mean([overlap(foreground(image), sketched(layout.sketch)) for image, layout in pairs])


@pytest.fixture(scope="module")
def uncontrolled(base, unseen):
    """The same with the base alone, equal prompts and seeds."""
    images = base(
        [layout.picture.caption for layout in unseen],
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(unseen))],
    ).images
    return followed(images, unseen)


@every_kind
def test_sprites_lie_where_the_sketch_says(kind, base, unseen, uncontrolled):
    network = CLASSES[kind].from_pretrained(EMBEDDED_CONTROLS[f"emojiland-{kind}"], dtype=torch.float32)
    controlled = followed(draw(KINDS[kind].drawing(base, network), unseen, steps=10), unseen)
    assert controlled > 0.7 and controlled > uncontrolled + 0.25
