"""Pictures that a composition is given: read from a file, or carried in a text, so that it needs no other file."""

from __future__ import annotations

import base64
import binascii
import io
import stat
import warnings
from pathlib import Path
from typing import Final

from PIL import Image, ImageOps

from mixofshow.errors import BadInputError, shown

MAX_FILE_BYTES: Final = 64 * 2**20
MAX_PIXELS: Final = 2**24
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")
_EMBEDDED: Final = "data:image/png;base64,"

Source = str | Path | Image.Image
"""A picture, a file, or a text from `embedded`."""


def read_picture(source: Source, mode: str) -> Image.Image:
    """The picture, upright, in the mode "L" or "RGB". Raises BadInputError that names the file."""
    if isinstance(source, Image.Image):
        return source.convert(mode)
    if isinstance(source, str) and is_embedded(source):
        return _decoded(_from_text(source), "the embedded picture").convert(mode)
    return _decoded(_bytes(Path(source)), str(source)).convert(mode)


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


def _bytes(path: Path) -> bytes:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE_BYTES:
            raise BadInputError(f"{path}: expected a picture of at most {MAX_FILE_BYTES} bytes in a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error


def _decoded(data: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > MAX_PIXELS:
                raise BadInputError(
                    f"{shown(name)}: {image.width} x {image.height} pixels, at most {MAX_PIXELS} in all are read"
                )
            return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInputError(
            f"{shown(name)}: not a picture that can be read ({shown(error)}); expected one of {', '.join(FORMATS)}"
        ) from error
