"""Pictures: read from a file, or carried in a text, so that a composition needs no other file; and written."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mixofshow import images
from mixofshow.errors import BadInputError, shown
from mixofshow.images import read_grey, read_image
from mixofshow.outputs import writing
from mixofshow.reading import read_bytes
from mixofshow.replaceable import MARK, SOFTWARE

MAX_BYTES: Final = 64 * 2**20
FORMATS: Final = (*images.FORMATS, "BMP")
_EMBEDDED: Final = "data:image/png;base64,"

PictureSource = str | Path | Image.Image
"""A picture, a file, or a text from `embedded`."""


def read_picture(source: PictureSource | bytes, mode: str, name: str | Path = "the picture") -> Image.Image:
    """The picture, upright, in the mode "L" or "RGB"; what is transparent is black.

    Raises BadInputError that names the file, or calls what is in memory by its `name`.
    """
    if isinstance(source, str) and is_embedded(source):
        source, name = _from_text(source), "the embedded picture"
    elif isinstance(source, str | Path):
        name = Path(source)
        source = read_bytes(name, MAX_BYTES, BadInputError)
    if mode == "L":
        return read_grey(source, shown(name), formats=FORMATS)
    return read_image(source, shown(name), background="black", formats=FORMATS).image


def is_embedded(source: object) -> bool:
    """Whether this is a text that carries a picture, rather than naming a file."""
    return isinstance(source, str) and source.startswith(_EMBEDDED)


def embedded(image: Image.Image) -> str:
    """A picture as a text that `read_picture` reads; the same picture gives the same text."""
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return _EMBEDDED + base64.b64encode(data.getvalue()).decode()


def write_picture(image: Image.Image, path: Path, note: str | None = None) -> None:
    """Write a PNG whole or not at all, which says that it is ours, and carries a note. Raises as `writing` does."""
    about = PngInfo()
    about.add_text(*((SOFTWARE, MARK) if note is None else (MARK, note)))
    with writing(path) as temporary:
        image.save(temporary, "PNG", pnginfo=about)


def _from_text(text: str) -> bytes:
    try:
        return base64.b64decode(text.removeprefix(_EMBEDDED), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInputError(f"the embedded picture is damaged ({error})") from error
