"""Pictures side by side on one sheet, with labels left of the rows and above the columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, zip_longest
from typing import Final

from PIL import Image, ImageDraw, ImageFont

SMALLEST_TEXT: Final = 12
TEXT_SHARE: Final = 16
"""Text is this many times smaller than the lowest picture is high, but never unreadable."""


def grid(
    images: Sequence[Image.Image],
    columns: int,
    *,
    gap: int = 1,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    corner: str = "",
    text_size: int | None = None,
) -> Image.Image:
    """Pictures `columns` in a row, each in the middle of its cell, `gap` pixels apart; `corner` is where labels meet.

    A column is as wide as its widest picture or label, a row as high as its highest. A sheet is a picture too: rows of
    pictures of other sizes are sheets in a sheet of one column.
    """
    size = text_size or max(SMALLEST_TEXT, min(image.height for image in images) // TEXT_SHARE)
    table = [list(images[start : start + columns]) for start in range(0, len(images), columns)]
    if column_labels:
        header = [label(text, size) for text in column_labels]
        if len(header) != len(table[0]):
            raise ValueError(f"{len(header)} labels for {len(table[0])} columns")
        table.insert(0, header)
    if row_labels:
        texts = [corner, *row_labels] if column_labels else row_labels
        table = [[label(text, size), *row] for text, row in zip(texts, table, strict=True)]
    return _pasted(table, gap)


def label(text: str, size: int) -> Image.Image:
    """Black text on white, with a margin; all labels of one size are equally high."""
    font = ImageFont.load_default(size)
    margin = size // 4
    width, height = (round(side) + 2 * margin for side in (font.getbbox(text)[2], font.getbbox("Åg")[3]))
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).text((margin, margin), text, fill="black", font=font)
    return picture


def _pasted(table: Sequence[Sequence[Image.Image]], gap: int) -> Image.Image:
    widths = [max(cell.width for cell in column if cell is not None) for column in zip_longest(*table)]
    heights = [max(cell.height for cell in row) for row in table]
    lefts, tops = (list(accumulate((side + gap for side in sides), initial=0)) for sides in (widths, heights))
    sheet = Image.new("RGB", (lefts[-1] - gap, tops[-1] - gap), "white")
    for row, top, height in zip(table, tops, heights, strict=False):
        for cell, left, width in zip(row, lefts, widths, strict=False):
            sheet.paste(cell, (left + (width - cell.width) // 2, top + (height - cell.height) // 2))
    return sheet
