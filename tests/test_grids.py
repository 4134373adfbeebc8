"""Sheets of pictures: each picture is whole and where it should be, and labels cover none."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mixofshow.grids import grid, label


def noise(width: int, height: int, number: int = 0) -> Image.Image:
    """A picture like no other."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def at(sheet: Image.Image, picture: Image.Image, left: int, top: int) -> bool:
    cut = sheet.crop((left, top, left + picture.width, top + picture.height))
    return cut.tobytes() == picture.tobytes()


def ink(picture: Image.Image) -> int:
    """How many pixels are darker than grey."""
    return int((np.asarray(picture.convert("L")) < 128).sum())


@pytest.mark.parametrize("gap", [0, 1, 8])
@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(1, 1, (1, 1)), (6, 3, (3, 2)), (7, 3, (3, 3)), (2, 5, (2, 1)), (4, 1, (1, 4))]
)
def test_pictures_of_one_size(count, columns, shape, gap):
    pictures = [noise(10, 6, number) for number in range(count)]
    sheet = grid(pictures, columns, gap=gap)
    assert sheet.size == (shape[0] * (10 + gap) - gap, shape[1] * (6 + gap) - gap)
    for number, picture in enumerate(pictures):
        assert at(sheet, picture, number % columns * (10 + gap), number // columns * (6 + gap))


def test_what_is_no_picture_is_white():
    sheet = np.asarray(grid([Image.new("RGB", (4, 4))] * 3, 2, gap=2))
    assert (sheet[:4, 4:6] == 255).all() and (sheet[4:6] == 255).all() and (sheet[6:, 4:] == 255).all()


def test_pictures_of_other_sizes_are_in_the_middle_of_their_cells():
    small, high, wide = noise(4, 4, 1), noise(8, 12, 2), noise(20, 6, 3)
    sheet = grid([small, high, wide, small], 2, gap=2)
    assert sheet.size == (20 + 2 + 8, 12 + 2 + 6)
    assert at(sheet, small, 8, 4) and at(sheet, high, 22, 0) and at(sheet, wide, 0, 14) and at(sheet, small, 24, 15)


@pytest.mark.parametrize("side", [16, 64, 300])
@pytest.mark.parametrize("rows", [(), ("words only (0)", "0.7")])
@pytest.mark.parametrize("columns", [(), ("seed 0", "a far longer label", "2")])
def test_labels_stand_beside_the_pictures(rows, columns, side):
    pictures = [noise(side, side, number) for number in range(6)]
    sheet = grid(pictures, 3, gap=1, row_labels=rows, column_labels=columns)
    size = max(12, side // 16)
    widths = [max(side, label(text, size).width) for text in columns or [""] * 3]
    left = label(rows[0], size).width + 1 if rows else 0
    top = label("", size).height + 1 if columns else 0
    high = max(side, label("", size).height) if rows else side
    assert sheet.size == (left + sum(widths) + 2, top + 2 * high + 1)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, 3)
        start = left + sum(widths[:column]) + column + (widths[column] - side) // 2
        assert at(sheet, picture, start, top + row * (high + 1) + (high - side) // 2)
    texts = [label(text, size) for text in (*rows, *columns)]
    assert ink(sheet) == sum(map(ink, [*pictures, *texts]))  # no letter is lost under a picture or the edge


def test_the_corner_is_where_labels_meet():
    picture = noise(64, 64)
    sheet = grid([picture], 1, row_labels=["0.7"], column_labels=["seed 0"], corner="step 000200")
    corner = label("step 000200", 12)
    assert at(sheet, corner, 0, 0)
    assert at(sheet, picture, corner.width + 1, corner.height + 1)


def test_labels_are_black_on_white_whole_and_equally_high():
    labels = [label(text, 12) for text in ("x", "gjpqy", "ÅÄÖ", "seed 0")]
    assert len({one.height for one in labels}) == 1
    for one in labels:
        pixels = np.asarray(one)
        assert pixels.min() < 64 and pixels.max() == 255
        assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_sheets_in_a_sheet():
    tops, wide = [noise(9, 9, number) for number in range(3)], noise(31, 5, 9)
    sheet = grid([grid(tops, 3, gap=2), wide], 1, gap=4)
    assert sheet.size == (31, 9 + 4 + 5)
    assert at(sheet, wide, 0, 13) and all(at(sheet, top, 11 * number, 0) for number, top in enumerate(tops))


@pytest.mark.parametrize("labels", [{"row_labels": ["a"]}, {"column_labels": ["a"]}, {"column_labels": ["a"] * 3}])
def test_a_label_for_each_row_and_column(labels):
    with pytest.raises(ValueError, match=r"label|zip"):
        grid([noise(4, 4)] * 4, 2, **labels)
