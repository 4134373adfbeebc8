"""Emojiland: its world, its recipe, and the weights that ship."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import Image

from emojiland import autoencoder
from emojiland.clip import judged_pair
from emojiland.library import Library
from emojiland.pictures import random_picture
from emojiland.pretrain import JUDGE, WEIGHTS
from emojiland.training import Stage, optimizers, train
from mixofshow.bases.emojiland.concepts import ALL, CHARACTERS, OBJECTS, SCENES, concept_pictures, write_concept
from mixofshow.bases.emojiland.judge import to_tensor
from mixofshow.bases.emojiland.scenes import CONCEPT_SCENES
from mixofshow.bases.emojiland.sprites import recolour, sprite
from mixofshow.bases.emojiland.vocabulary import CLASSES, CONCEPT_SETS, GENERATOR_SETS, ICONS_OF_SET
from mixofshow.bases.emojiland.world import KNOWN_SCENES, places
from mixofshow.bases.layers import cross_attentions
from mixofshow.bases.loading import fingerprint, load_base
from mixofshow.errors import BadInputError

MEGABYTE = 10**6
ICONS = Library.shipped()


def test_the_world_is_a_function_of_its_seed():
    first, second = (random_picture(Random(7), ICONS) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes() and first.caption == second.caption
    assert random_picture(Random(8), ICONS).image.tobytes() != first.image.tobytes()


@pytest.mark.parametrize("width", [64, 160])
def test_captions_say_what_is_shown_from_left_to_right(width):
    random = Random(0)
    for _ in range(50):
        picture = random_picture(random, ICONS, width=width)
        found = [
            picture.caption.index(f" {word}") if f" {word}" in picture.caption else -1 for word in picture.subjects
        ]
        assert min(found) >= 0 and found == sorted(found)
        assert picture.caption.endswith(picture.scene) or " on a " not in picture.caption


@pytest.mark.parametrize(("width", "most"), [(64, 2), (160, 3)])
def test_a_wide_picture_has_room_for_three(width, most):
    """160 pixels are two and a half squares, and hold three things somewhat smaller; `round(2.5)` is 2."""
    random = Random(0)
    counts = [len(random_picture(random, ICONS, width=width).subjects) for _ in range(60)]
    assert set(counts) == set(range(1, most + 1))
    assert width == 64 or counts.count(3) >= 20


def test_the_judge_is_shown_each_thing_twice_and_captions_claim_nothing_untrue():
    random = Random(0)
    for _ in range(50):
        first, second = judged_pair(random, ICONS)
        assert first.subjects == second.subjects and first.image.tobytes() != second.image.tobytes()
        for one in (first, second):
            assert one.claims <= one.truths
            assert all(word in one.caption for word in one.subjects)


def test_sprites_lie_in_the_picture_side_by_side():
    random = Random(0)
    for count in (1, 2, 3):
        for _ in range(50):
            laid = places(random, count, width=64 * count)
            assert all(one.y - one.side / 2 >= 0 and one.y + one.side / 2 <= 72 for one in laid)
            assert all(left.x < right.x for left, right in itertools.pairwise(laid))


def test_concepts_are_kept_from_pretraining():
    assert not set(GENERATOR_SETS) & set(CONCEPT_SETS)
    assert not set(KNOWN_SCENES) & {f"in the {name.replace('-', ' ')}" for name in CONCEPT_SCENES}
    assert len(CHARACTERS) >= 6 and len(OBJECTS) >= 6 and len(SCENES) >= 4
    assert 24 <= len(CLASSES) <= 40
    for icon_set, names in ICONS_OF_SET.items():
        assert all(sprite(icon_set, name).getchannel("A").getbbox() for name in names), icon_set


def test_training_and_held_out_pictures_differ(tmp_path):
    for name in ALL:
        write_concept(name, tmp_path / name)
        shown = {
            part: {path.read_bytes() for path in (tmp_path / name / part).glob("*.png")}
            for part in ("train", "reference")
        }
        assert 5 <= len(shown["train"]) <= 8 and len(shown["reference"]) >= 5
        assert not shown["train"] & shown["reference"]
        assert all(f"<{name}>" in path.read_text() for path in (tmp_path / name / "train").glob("*.txt"))
    assert (
        concept_pictures("robot", 3, seed=0)[0].image.tobytes()
        == concept_pictures("robot", 3, seed=0)[0].image.tobytes()
    )
    with pytest.raises(BadInputError, match="did you mean 'robot'"):
        write_concept("robott", tmp_path)


def test_recolouring_keeps_the_shape_and_a_full_turn_the_colour():
    picture = sprite("twemoji", "cat-face")
    turned = recolour(picture, 0.5)
    assert turned.getchannel("A").tobytes() == picture.getchannel("A").tobytes()
    assert turned.tobytes() != picture.tobytes()
    assert recolour(picture, 1.0).tobytes() == recolour(picture, 0.0).tobytes()


def test_balancing_latents_changes_no_picture():
    torch.manual_seed(0)
    vae = autoencoder.build().eval()
    pictures = to_tensor(random_picture(Random(k), ICONS).image for k in range(8))
    before = autoencoder.reconstruct(vae, pictures)
    autoencoder.balance(vae, ICONS, count=64)
    after = autoencoder.reconstruct(vae, pictures)
    assert (before - after).norm() <= 1e-3 * before.norm()
    with torch.no_grad():
        random = Random(2 * 10**6)
        fresh = to_tensor(random_picture(random, ICONS).image for _ in range(64))
        latents = vae.encode(fresh).latent_dist.mode()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)


def test_the_decoder_learns_alone_and_latents_stay_what_they_are():
    torch.manual_seed(0)
    vae = autoencoder.build()
    stage = autoencoder.decoder_stage(vae, ICONS, steps=1, batch=2, learning_rate=1e-3)
    first, again, other = (stage.loss(stage.model, seed) for seed in (0, 0, 1))
    assert first == again != other
    first.backward()
    halves = {name: parameter.grad is not None for name, parameter in vae.named_parameters()}
    assert {name.split(".")[0] for name, learns in halves.items() if learns} == {"decoder", "post_quant_conv"}
    assert {name.split(".")[0] for name, learns in halves.items() if not learns} == {"encoder", "quant_conv"}


def test_the_figures_that_are_told_are_of_the_weights_that_ship():
    mark = fingerprint(load_base("emojiland"))
    for page in ("README.md", "emojiland/README.md"):
        assert mark in (Path(__file__).parents[2] / page).read_text()


def _toy_stage(steps: int = 6) -> Stage:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)

    def loss(model: torch.nn.Module, seed: int) -> torch.Tensor:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        return (model(inputs) - inputs).square().mean()

    return Stage("toy", model, loss, lambda model: Image.new("RGB", (1, 1)), steps, 1e-2)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    accelerator = Accelerator(cpu=True)
    whole = _toy_stage()
    (tmp_path / "whole").mkdir()
    assert train(whole, tmp_path / "whole", accelerator)
    (tmp_path / "broken").mkdir()
    for _ in range(6):  # each call finds its time used up after one step
        part = _toy_stage()
        finished = train(part, tmp_path / "broken", accelerator, minutes=0)
    assert finished
    assert torch.equal(part.model.weight, whole.model.weight)


def test_kernels_are_trained_wherever_they_were_moved():
    """What distributes a model over processes gives its parameters other memory."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(2, 3, 3)
    kernels, _ = optimizers(model, 1e-2)
    model.weight.data = model.weight.data.clone()
    before = model.weight.detach().clone()
    model(torch.randn(1, 2, 5, 5)).square().mean().backward()
    kernels.step()
    assert not torch.equal(model.weight, before)


def _size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_all_weights_are_small():
    assert _size(WEIGHTS) + _size(JUDGE) <= 45 * MEGABYTE
    assert 0 < _size(JUDGE) <= 15 * MEGABYTE


def test_the_base_is_an_ordinary_pipeline_of_stable_diffusion_shape():
    base = load_base("emojiland")
    plain = StableDiffusionPipeline.from_pretrained(WEIGHTS)
    assert type(base) is type(plain)
    layers = list(cross_attentions(base.unet))
    assert len(layers) == 16 and layers[6].startswith("mid_block")
    assert [block.__class__.__name__ for block in base.unet.down_blocks] == ["CrossAttnDownBlock2D"] * 3 + [
        "DownBlock2D"
    ]
    same = {name: value.float() for name, value in plain.unet.state_dict().items()}
    assert all(torch.equal(value, same[name]) for name, value in base.unet.state_dict().items())


@pytest.mark.slow
def test_required_figures():
    from emojiland.figures import falls_short, report

    figures = report(load_base("emojiland"), per_class=13)
    assert {name for name, value in figures.items() if falls_short(name, value)} == set(), figures
