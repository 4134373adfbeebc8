"""Pictures that a composition is given: read from a file, or carried in a text, so that it needs no other file."""

from __future__ import annotations

import base64
import binascii
import io
import stat
from pathlib import Path
from typing import Final

from PIL import Image

from mixofshow import images
from mixofshow.errors import BadInputError, shown
from mixofshow.images import read_grey, read_image

MAX_FILE_BYTES: Final = 64 * 2**20
FORMATS: Final = (*images.FORMATS, "BMP")
_EMBEDDED: Final = "data:image/png;base64,"

Source = str | Path | Image.Image
"""A picture, a file, or a text from `embedded`."""


def read_picture(source: Source, mode: str) -> Image.Image:
    """The picture, upright, in the mode "L" or "RGB"; what is transparent is black. Raises BadInputError naming it."""
    if isinstance(source, Image.Image):
        return decode_picture(source, "the picture", mode)
    if isinstance(source, str) and is_embedded(source):
        return decode_picture(_from_text(source), "the embedded picture", mode)
    return decode_picture(picture_bytes(Path(source)), Path(source), mode)


def is_embedded(text: str) -> bool:
    """Whether a text carries a picture, rather than naming a file."""
    return text.startswith(_EMBEDDED)


def embedded(image: Image.Image) -> str:
    """A picture as a text that `read_picture` reads; the same picture gives the same text."""
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return _EMBEDDED + base64.b64encode(data.getvalue()).decode()


def _from_text(text: str) -> bytes:
    try:
        return base64.b64decode(text.removeprefix(_EMBEDDED), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInputError(f"the embedded picture is damaged ({error})") from error


def picture_bytes(path: Path) -> bytes:
    """A picture's file. Raises BadInputError when it is none, or too large to be one."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE_BYTES:
            raise BadInputError(f"{path}: expected a picture of at most {MAX_FILE_BYTES} bytes in a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error


def decode_picture(data: bytes | Image.Image, name: str | Path, mode: str) -> Image.Image:
    """What `read_picture` makes of a file's bytes; `name` is for messages."""
    if mode == "L":
        return read_grey(data, shown(name), formats=FORMATS)
    return read_image(data, shown(name), background="black", formats=FORMATS).image
