"""Where and when a region is there is what was asked for, or refused: B5, B19, B24."""

from __future__ import annotations

from math import ceil

import pytest

from mixofshow import Region
from mixofshow.errors import RegionError
from mixofshow.sampling.regions import as_shares, cells, shape_of

FACTOR = 8


def test_an_edge_between_two_cells_stays_there():
    """B19: over all widths up to 2048 pixels, all edges and all levels; other edges are rounded inward."""
    for width in range(FACTOR, 2049, FACTOR):
        for columns in (width // FACTOR, ceil(width / 16), ceil(width / 32)):
            for edge in range(width + 1):
                exact = edge * columns, width
                left, _, right, _ = cells((edge / width, 0, edge / width, 1), columns=columns, rows=1)
                assert left == -(-exact[0] // width), (width, columns, edge)
                assert right == exact[0] // width, (width, columns, edge)


@pytest.mark.parametrize(
    ("when", "more", "message"),
    [
        ({"first_step": 5}, {}, "first_step: expected a step from 1 to 4"),
        ({"concept_from": 50}, {}, "concept_from: expected a step from 1 to 4"),
        ({"last_step": 2}, {"image": True, "strength": 0.5}, "last_step: expected a step from 3 to 4"),
    ],
)
def test_steps_that_never_come(when, more, message, draw):
    """B5: the region was silently not there."""
    region = Region("a <dogx>", (0, 0, 32, 48), **when)
    if more:
        more = {**more, "image": draw("", width=64, height=48, num_inference_steps=1)[0]}
    with pytest.raises(RegionError, match=message):
        draw("", regions=[region], width=64, height=48, num_inference_steps=4, **more)
    draw("", regions=[Region("a <dogx>", (0, 0, 32, 48), first_step=4)], width=64, height=48, num_inference_steps=4)


def test_units_are_said():
    """B24: a feather of 1 was the whole side, of 1.5 a pixel and a half."""
    size = {"width": 512, "height": 512}

    def feather(width, units=None):
        return shape_of(Region("", (0, 0, 256, 256), feather=width, units=units), **size).feather[0]

    assert feather(1, "px") == 1 / 512
    assert feather(1.5, "px") == 1.5 / 512
    assert feather(1) == feather(1.0, None) == 1
    shares = {"box": (0, 0, 1, 0.5)}
    assert as_shares(Region("", **shares), **size) == as_shares(Region("", **shares, units="share"), **size)
    assert as_shares(Region("", **shares, units="px"), **size) == (0, 0, 1 / 512, 0.5 / 512)
    assert feather(0.25, "px") == 0.25 / 512
    with pytest.raises(RegionError, match="outside"):
        as_shares(Region("", (0, 0, 2, 2), units="share"), **size)
    with pytest.raises(RegionError, match="'units': input should be 'px' or 'share'"):
        Region("", (0, 0, 2, 2), units="cm")
