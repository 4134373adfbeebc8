"""CLIP and DINO from folders: the same features as the libraries' own models give."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from mixofshow.bases.emojiland import judge
from mixofshow.bases.emojiland.sprites import sprite
from mixofshow.bases.emojiland.world import compose
from mixofshow.errors import BadInputError
from mixofshow.evaluation.scorers import BATCH, clip_scorer, dino_scorer, imagenet_scorer, judge_scorer

SIDE = 64
PICTURES = [
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for k in range(3)
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """Emojiland's judge as an ordinary CLIP folder."""
    folder = tmp_path_factory.mktemp("clip")
    clip, tokenizer = judge.load()
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder


def test_a_clip_gives_the_cosines_of_transformers_own_output(clip_folder):
    scorer = clip_scorer(clip_folder)
    texts = ["a photo of a cat on the beach", "a dog"]
    clip, tokenizer = judge.load()
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(images=PICTURES, return_tensors="pt").pixel_values
    words = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        own = clip(pixel_values=pixels, **{k: words[k] for k in ("input_ids", "attention_mask")})
    expected = own.logits_per_image / clip.logit_scale.exp()
    assert torch.allclose(scorer.images(PICTURES) @ scorer.texts(texts).T, expected, atol=1e-5)


MODELS = {
    "dinov2": lambda: (
        Dinov2Model(
            Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
        ),
        BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    ),
    "dino": lambda: (
        ViTModel(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=32,
                patch_size=16,
            ),
            add_pooling_layer=False,
        ),
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_dino_gives_its_class_token(kind, tmp_path):
    model, processor = MODELS[kind]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        token = model.eval()(**processor(images=PICTURES, return_tensors="pt")).last_hidden_state[:, 0]
    expected = token / token.norm(dim=-1, keepdim=True)
    found = dino_scorer(tmp_path)
    assert torch.allclose(found(PICTURES), expected, atol=1e-5)
    many = (PICTURES * BATCH)[: BATCH + 1]  # more than are looked at together
    assert torch.allclose(found(many)[[0, BATCH]], expected[[0, BATCH % 3]], atol=1e-5)


@pytest.mark.parametrize("load", [clip_scorer, dino_scorer])
def test_what_cannot_be_loaded_is_named_in_one_line(load, tmp_path):
    with pytest.raises(BadInputError, match="nothing-here: could not be loaded") as caught:
        load(tmp_path / "nothing-here")
    assert "\n" not in str(caught.value)


def test_a_network_of_photographs_tells_things_of_a_set_apart_that_it_has_never_seen():
    """By its own weights, from a package: pictures of one icon in three places are nearer than those of another."""
    names, places = ["robot", "rocket", "cactus"], ["on the beach", "in the city", "on a red background"]
    pictures = [
        compose([(name, sprite("twemoji", name))], place, Random(0)).image for name in names for place in places
    ]
    features = imagenet_scorer()(pictures)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(9))
    cosines = (features @ features.T).unflatten(0, (3, 3)).unflatten(2, (3, 3)).mean((1, 3))
    assert (cosines.argmax(1) == torch.arange(3)).all()


def test_a_judge_comes_without_a_librarys_words(capfd):
    judge.load.cache_clear()
    judge_scorer()
    assert capfd.readouterr() == ("", "")


def test_judges_are_on_the_device_that_is_asked_for(clip_folder):
    """B28: they judged on the CPU whatever the device was. This one computes nothing, so it can give nothing back."""
    scorer = clip_scorer(clip_folder, device="meta")
    for look in (lambda: scorer.images(PICTURES), lambda: scorer.texts(["a cat"])):
        with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
            look()
