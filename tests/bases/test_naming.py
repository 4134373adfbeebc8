"""What names the classes in a picture, against renders of which the names are known."""

from __future__ import annotations

import pytest
import torch

from emojiland.naming import Namer, as_kept, parts, renders
from mixofshow.bases.loading import load_base
from mixofshow.evaluation.scorers import imagenet_scorer


def test_each_part_of_a_wide_picture_has_one_thing_in_its_middle() -> None:
    """Red, green, blue, a third of the width each: a part is of its own colour wherever nothing is mirrored or next."""
    from PIL import Image

    picture = Image.new("RGB", (160, 64))
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    for place, colour in enumerate(colours):
        picture.paste(colour, (round(place * 160 / 3), 0, round((place + 1) * 160 / 3), 64))
    assert [part.getpixel((32, 32)) for part in parts(picture, 3)] == list(colours)
    assert {part.size for part in parts(picture, 3)} == {(64, 64)}


def test_a_read_out_finds_what_features_say_linearly() -> None:
    """Features that are the class itself, from the picture's bytes: whatever is shown is named right."""
    shown = renders(1, 60, seed=1)
    known = {picture.image.tobytes(): picture.subjects[0] for picture in [*shown, *renders(1, 40, seed=5 * 10**6)]}
    words = sorted(set(known.values()))

    def features(images):
        return torch.eye(len(words))[[words.index(known[image.tobytes()]) for image in images]]

    namer = Namer.fitted(features, lessons={1: 40})
    taught = {picture.subjects[0] for picture in renders(1, 40, seed=5 * 10**6)}
    told = [picture for picture in shown if picture.subjects[0] in taught]
    assert len(told) > 20
    assert namer([picture.image for picture in told], 1) == [picture.subjects for picture in told]


@pytest.mark.slow
def test_all_names_are_right_on_renders_it_was_not_fitted_to() -> None:
    """As they are, and as the autoencoder keeps them."""
    vae = load_base("emojiland").vae
    namer = Namer.fitted(imagenet_scorer(), vae=vae)
    for count in (1, 2, 3):
        shown = renders(count, 60, seed=10**6)
        images, words = [picture.image for picture in shown], [picture.subjects for picture in shown]
        for found in (namer(images, count), namer(as_kept(vae, images), count)):
            assert sum(guess == right for guess, right in zip(found, words, strict=True)) / 60 >= 0.98, count
