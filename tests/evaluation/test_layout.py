"""Where a subject is drawn: known shapes give known numbers."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sketches import centre_error, foreground, overlap, sketched

from emojiland.control_networks import random_layout


def boxed(*boxes, size=(20, 10), colour="white", background="black"):
    image = Image.new("RGB", size, background)
    for left, top, right, bottom in boxes:
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=colour)
    return image


@pytest.mark.parametrize(
    ("drawn", "wanted", "expected_overlap", "expected_error"),
    [
        ((4, 2, 8, 6), (4, 2, 8, 6), 1.0, 0.0),
        ((4, 2, 8, 6), (6, 2, 10, 6), 1 / 3, 0.2),
        ((4, 2, 8, 6), (4, 4, 8, 8), 1 / 3, 0.2),
        ((2, 2, 5, 6), (12, 2, 15, 6), 0.0, 1.0),
        ((4, 2, 8, 8), (4, 2, 8, 6), 2 / 3, 0.1),
    ],
)
def test_boxes_give_the_numbers_of_a_ruler(drawn, wanted, expected_overlap, expected_error):
    found = foreground(boxed(drawn, colour=(200, 30, 40), background=(40, 60, 200)))
    asked = sketched(boxed(wanted))
    assert overlap(found, asked) == pytest.approx(expected_overlap)
    assert centre_error(found, asked) == pytest.approx(expected_error)


def test_nothing_drawn_is_as_wrong_as_can_be():
    nothing, box = np.zeros((10, 20), dtype=bool), sketched(boxed((4, 2, 8, 6)))
    assert overlap(nothing, box) == 0 and overlap(nothing, nothing) == 1
    assert centre_error(nothing, box) == pytest.approx(5**0.5)


def test_the_worlds_own_pictures_follow_their_sketches():
    """Segmentation finds in renders what their sketches say: its own error is far below what it is to measure."""
    random = Random(0)
    layouts = [random_layout(random, width=width, scenes=["on a green background"]) for width in (64, 160) * 10]
    pairs = [(foreground(layout.picture.image), sketched(layout.sketch)) for layout in layouts]
    assert np.mean([overlap(*pair) for pair in pairs]) > 0.85
    assert np.mean([centre_error(*pair) for pair in pairs]) < 0.04
