"""Regions of any shape: what they cover, and what is refused."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mixofshow.errors import RegionError
from mixofshow.sampling.attention import RegionText, shares
from mixofshow.sampling.regions import Region, Shape, bounding_cells, coverage, coverages, levels, shape_of

SIZE = {"width": 192, "height": 128}
TRIANGLE = ((10, 20), (180, 60), (30, 120))
STAR = ((20, 20), (100, 40), (180, 20), (120, 64), (180, 120), (100, 90), (20, 120), (70, 64))


def covered(columns=24, rows=16, **place):
    return coverage(shape_of(Region("", **place), **SIZE), columns=columns, rows=rows)


def inside(points, x, y):
    """Even-odd rule, point by point."""
    crossed = False
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            crossed = not crossed
    return crossed


@pytest.mark.parametrize("points", [TRIANGLE, STAR, STAR[::-1]])
@pytest.mark.parametrize("grid", [(24, 16), (7, 5), (1, 1)])
def test_a_polygon_covers_the_share_of_each_cell_that_lies_inside(points, grid):
    columns, rows = grid
    fine = 240
    xs, ys = (np.arange(fine) + 0.5) * 192 / fine, (np.arange(fine) + 0.5) * 128 / fine
    dots = torch.tensor([[float(inside(points, x, y)) for x in xs] for y in ys])
    edges = [[round(k * fine / count) for k in range(count + 1)] for count in (rows, columns)]
    expected = torch.tensor(
        [
            [dots[t:b, left:right].mean() for left, right in zip(edges[1], edges[1][1:], strict=False)]
            for t, b in zip(edges[0], edges[0][1:], strict=False)
        ]
    )
    found = covered(columns, rows, polygon=points)
    assert (found - expected).abs().max() < 0.1  # a cell has some hundred dots
    assert found.mean() == pytest.approx(float(dots.mean()), abs=2e-3)


@pytest.mark.parametrize("box", [(0, 0, 192, 128), (48, 32, 144, 128), (8, 8, 16, 16)])
def test_on_whole_cells_box_polygon_and_mask_are_one(box):
    left, top, right, bottom = box
    white = np.zeros((128, 192), np.uint8)
    white[top:bottom, left:right] = 255
    places = (
        {"box": box},
        {"polygon": ((left, top), (right, top), (right, bottom), (left, bottom))},
        {"mask": Image.fromarray(white)},
    )
    boxed, *others = (covered(**place) for place in places)
    assert all(torch.equal(boxed, other) for other in others)
    assert boxed.sum() == (right - left) * (bottom - top) / 64


@pytest.mark.parametrize("size", [(192, 128), (50, 31), (8, 3), (1, 1)])
@pytest.mark.parametrize("grid", [(24, 16), (5, 7), (1, 1)])
def test_a_mask_keeps_its_mean_on_every_grid(size, grid):
    pixels = np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)
    assert covered(*grid, mask=Image.fromarray(pixels)).mean() == pytest.approx(pixels.mean() / 255, abs=1e-5)


def test_a_mask_may_be_a_file(tmp_path):
    Image.new("RGB", (10, 10), (255, 255, 255)).save(tmp_path / "mask.png")
    assert torch.equal(covered(mask=tmp_path / "mask.png"), torch.ones(16, 24))


def test_feathering_is_a_linear_ramp():
    # An edge at cell 12 of 24 and a ramp of 4 cells: the mean of windows of 4 cells around each cell's middle.
    row = covered(box=(0, 0, 96, 128), feather=32)[0]
    expected = [1] * 10 + [0.875, 0.625, 0.375, 0.125] + [0] * 10
    assert row.tolist() == pytest.approx(expected)
    assert covered(box=(0, 0, 192, 128), feather=32).min() == 1
    assert torch.equal(covered(box=(0, 0, 96, 128), feather=0.25), covered(box=(0, 0, 96, 128), feather=32))
    assert torch.equal(covered(box=(0, 0, 96, 128), feather=7), covered(box=(0, 0, 96, 128)))


@pytest.mark.parametrize("place", [{"box": (10, 20, 100, 110)}, {"polygon": STAR}, {"polygon": TRIANGLE}])
@pytest.mark.parametrize("feather", [0, 20, 0.5])
def test_coverage_is_a_share_and_nothing_lies_outside_its_rectangle(place, feather):
    for columns, rows in levels(24, 16, 4):
        cover = covered(columns, rows, **place, feather=feather)
        assert cover.shape == (rows, columns)
        assert cover.min() >= 0 and cover.max() <= 1
        left, top, right, bottom = bounding_cells(cover)
        assert cover[top:bottom, left:right].count_nonzero() == cover.count_nonzero()


def test_a_tiny_box_takes_the_nearest_cell_and_that_is_said_once(caplog):
    shape = shape_of(Region("a cat", (8, 70, 17, 88)), **SIZE)
    with caplog.at_level(logging.WARNING):
        found = coverages(shape, levels(24, 16, 4))
    assert [int(cover.sum()) for cover in found] == [2, 1, 1, 1]
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "'a cat'" in message and "6 x 4" in message and "3 x 2" in message
    dropped = coverages(shape, levels(24, 16, 4), tiny="drop")
    assert not dropped[-1].any()
    assert found[-1][1, 0] == 1


@pytest.mark.parametrize(("left", "right", "nearest"), [(0.2, 0.4, 1), (0.1, 0.3, 0), (0.7, 0.9, 3), (0.99, 1.0, 3)])
def test_the_nearest_cell_is_that_in_which_the_middle_lies(left, right, nearest):
    """Of four columns, where the box lies across an edge and covers none of them wholly."""
    (found,) = coverages(Shape(box=(left, 0.0, right, 1.0)), [(4, 1)])
    assert found.flatten().nonzero().flatten().tolist() == [nearest]


def texts(*weights):
    """Regions of these weights, whose coverage is given elsewhere."""
    return [RegionText(Shape(box=(0, 0, 1, 1)), torch.zeros(0), weight) for weight in weights]


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 3, 0.5]])
def test_shares_are_the_formula(weights):
    covers = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    covers[0] = 0
    covers[:, 0] = 0
    found = shares(covers, texts(*weights))
    for row in range(5):
        for column in range(6):
            c = covers[1:, row, column].tolist()
            total = sum(w * one for w, one in zip(weights, c, strict=True))
            mix = [max(c) * w * one / total if total else 0 for w, one in zip(weights, c, strict=True)]
            assert found[:, row, column].tolist() == pytest.approx([1 - max(c), *mix], abs=1e-6)
    assert torch.allclose(found.sum(0), torch.ones(5, 6))


def test_a_region_alone_is_not_weakened_by_its_weight():
    cover = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    assert torch.equal(shares(cover, texts(0.01))[1], torch.ones(2, 2))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({}, "only one of them"),
        ({"box": (0, 0, 1, 1), "polygon": TRIANGLE}, "only one of them"),
        ({"polygon": ((0, 0), (1, 1))}, "expected 3 to 1000 points"),
        ({"polygon": ((0, 0), (0.5, 0.5), (1, 1))}, "enclose no area"),
        ({"polygon": ((0, 0), (1, 1), (1, 0), (0, 1))}, "crosses itself, the sides from points 1 and 3 meet"),
        ({"polygon": ((0, 0), (1, math.nan), (1, 0))}, "finite"),
        ({"polygon": ((0, 0), (300, 10), (10, 100))}, r"\(300, 10\) lies outside the picture of 192 x 128"),
        ({"polygon": ((-1, 0), (30, 10), (10, 100))}, "outside"),
        ({"mask": Image.new("L", (30, 20))}, "30 x 20 pixels is all black"),
        ({"mask": "/nowhere/mask.png"}, "cannot be read"),
        ({"mask": "data:image/png;base64,@@"}, "damaged"),
        ({"mask": "data:image/png;base64,AAAA"}, "not a readable picture"),
        ({"box": (0, 0, 1, 1), "weight": 0}, "'weight': input should be greater than 0"),
        ({"box": (0, 0, 1, 1), "weight": math.nan}, "weight"),
        ({"box": (0, 0, 1, 1), "strength": 1.5}, "'strength': input should be less than or equal to 1, found 1.5"),
        ({"box": (0, 0, 1, 1), "feather": -1}, "feather"),
        ({"box": (0, 0, 1, 1), "first_step": 0}, "first_step"),
        ({"box": (0, 0, 1), "weight": 1}, r"field required, found \(0, 0, 1\)"),
        ({"box": (0, 0, 1, 1), "wieght": 1}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"box": (0, 0, 1, 1), "first_step": 5, "last_step": 4}, "last_step: expected at least first_step, 5, found 4"),
    ],
)
def test_refused_regions(place, reason):
    with pytest.raises(RegionError, match=reason) as error:
        covered(**place)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"%PDF")
    with pytest.raises(RegionError, match="mask.png: not a readable picture"):
        covered(mask=tmp_path / "mask.png")
