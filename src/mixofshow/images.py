"""The one reader of pictures and masks: fully decoded, upright, RGB (masks: L), with notes of what was done to them."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from mixofshow.errors import BadInputError, MixOfShowError, SettingsError, nearest, shown

ImageSource = Path | bytes | Image.Image
"""A file, what is in one, or a picture in memory."""
Error = type[BadInputError]
"""What is raised about a picture: the kind that the caller promises."""
Alpha = Literal["fill", "mask"]
"""What becomes of transparency: it is filled with a colour, or it is that and the picture's mask."""

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
FORMATS: Final = ("PNG", "JPEG", "WEBP")
MAX_PIXELS: Final = 50_000_000
PART: Final = 2**22
"""Pixels that are scaled at a time."""
SMALL: Final = 32
"""A picture with a shorter side is mentioned: it holds next to nothing for any base."""

ORIENTATION: Final = 0x0112
PROFILE_MODES: Final = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour spaces of ICC profiles, and the modes of pictures that they can describe."""
WITH_ALPHA: Final = ("LA", "PA", "RGBA")
STRAIGHT: Final = {"La": "LA", "RGBa": "RGBA"}
"""Modes whose colours are multiplied by their transparency, and those in which they are not."""


@dataclass(frozen=True)
class DecodedImage:
    """A picture (RGB, upright), what its transparency says is the concept (L, same size), and what was done to it."""

    image: Image.Image
    mask: Image.Image | None = None
    notes: tuple[str, ...] = ()


def label(path: Path) -> str:
    """A file's name as it may stand in a message: what cannot be printed is escaped."""
    return "".join(letter if letter.isprintable() else shown(letter) for letter in path.name)


def colour_of(name: str) -> tuple[int, int, int]:
    """Red, green and blue in 0…255 of a colour's name or #rrggbb. Raises SettingsError."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise SettingsError(
            f"'pictures.background': expected a colour's name or #rrggbb, found '{shown(name)}'"
            + nearest(name, ImageColor.colormap)
        ) from error


def read_image(
    source: ImageSource,
    name: str,
    *,
    alpha: Alpha = "fill",
    background: str = "white",
    formats: Sequence[str] = FORMATS,
    error: Error = BadInputError,
) -> DecodedImage:
    """A picture with its transparency on `background`; `name` stands in messages.

    Raises an `error`, and SettingsError for a colour unknown.
    """
    colour = colour_of(background)
    with _upright(source, name, formats, error) as (picture, notes):
        opacity = _opacity(picture)
        image = _in_srgb(picture, notes)
        if min(image.size) < SMALL:
            notes.append(f"only {image.width} x {image.height} pixels: it will be enlarged")
        if opacity is None:
            return DecodedImage(image, None, tuple(notes))
        opaque = Image.new("RGB", image.size, colour)
        opaque.paste(image, mask=opacity)
        notes.append(f"transparency is filled with {background}" + (" and is its mask" if alpha == "mask" else ""))
        return DecodedImage(opaque, opacity if alpha == "mask" else None, tuple(notes))


def read_grey(
    source: ImageSource, name: str, *, formats: Sequence[str] = FORMATS, error: Error = BadInputError
) -> Image.Image:
    """A mask, or what else says how much of something is where: grey (L), upright, black where it is transparent."""
    with _upright(source, name, formats, error) as (picture, _):
        opacity = _opacity(picture)
        # No colour profile: a mask's numbers are not colours.
        grey = _in_8_bits(picture).convert("RGB").convert("L")
        return grey if opacity is None else Image.composite(grey, Image.new("L", grey.size, 0), opacity)


@contextlib.contextmanager
def opened(
    source: Path | bytes, name: str, *, formats: Sequence[str] = FORMATS, error: Error = BadInputError
) -> Iterator[Any]:
    """A picture's file, of which only the head is read, and is known to be none too large. Raises an `error`."""
    if isinstance(source, Path) and not os.path.isfile(source):  # of any name; `Path.is_file` raises for long ones
        raise error(f"{name}: not a file")  # opening a pipe would wait for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warnings: what matters is an error or a note
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=list(formats)) as image:
                _refuse_huge(image, name, error)
                yield image
    except (MixOfShowError, MemoryError):
        raise
    except Image.DecompressionBombError as bomb:
        raise error(f"{name}: too many pixels, at most {MAX_PIXELS} are read") from bomb
    except (
        Exception
    ) as broken:  # a broken file makes Pillow raise almost anything: struct.error, KeyError, zlib.error …
        raise error(f"{name}: not a readable picture ({_reason(source, broken, formats)})") from broken


def _refuse_huge(image: Image.Image, name: str, error: Error) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise error(f"{name}: {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")


@contextlib.contextmanager
def _upright(
    source: ImageSource, name: str, formats: Sequence[str], error: Error
) -> Iterator[tuple[Image.Image, list[str]]]:
    """The picture, upright, and notes of what was done to it. What goes wrong inside is an `error` too."""
    notes: list[str] = []
    if isinstance(source, Image.Image):
        _refuse_huge(source, name, error)
        if source.mode == "F":
            raise error(f"{name}: fractions (mode F), expected whole numbers of 8 or 16 bits")
        yield _straight(ImageOps.exif_transpose(source)), notes
        return
    with opened(source, name, formats=formats, error=error) as image:
        _refuse_animations(image, name, notes, error)
        _load(image, notes)
        ImageOps.exif_transpose(image, in_place=True)
        yield _straight(image), notes


def _straight(picture: Image.Image) -> Image.Image:
    """The picture with colours that are not multiplied by its transparency."""
    return picture.convert(STRAIGHT[picture.mode]) if picture.mode in STRAIGHT else picture


def _reason(source: Path | bytes, error: Exception, formats: Sequence[str]) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        kinds = f"neither {', '.join(formats[:-1])} nor {formats[-1]}" if len(formats) > 1 else f"not a {formats[0]}"
        return kinds if size else "the file is empty"
    return shown(error)


def _refuse_animations(image: Any, name: str, notes: list[str], error: Error) -> None:
    """Known from the header alone."""
    frames = getattr(image, "n_frames", 1)
    if image.format == "MPO":  # a telephone's JPEG with a depth map or a second view behind the photograph
        notes.append(f"the first of the {frames} pictures in it is used")
    elif frames > 1:
        raise error(f"{name}: an animation of {frames} frames, expected a single picture")


def _load(image: Any, notes: list[str]) -> None:
    """Read the file's pixels as they are stored, noting what the file says about them."""
    deep = any(";16" in str(tile.args) for tile in image.tile)
    turned = image.getexif().get(ORIENTATION, 1)
    image.load()
    if deep:
        notes.append("16 bits per channel are scaled to 8")
        clear = image.info.get("transparency")
        if isinstance(clear, tuple):  # Pillow scales the colours and leaves the one that is transparent at 16 bits
            image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode == "CMYK":
        notes.append("CMYK is turned into RGB")
    if turned in range(2, 9):
        notes.append(f"turned upright (EXIF orientation {turned})")


def _opacity(picture: Image.Image) -> Image.Image | None:
    """How opaque each pixel is (L), or None where all are wholly so."""
    if picture.mode in WITH_ALPHA:
        opacity = picture.getchannel("A")
    elif "transparency" not in picture.info:
        return None
    elif picture.mode.startswith("I"):
        clear = np.asarray(picture) == picture.info["transparency"]
        opacity = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    else:
        opacity = picture.convert("RGBA").getchannel("A")
    return opacity if opacity.getextrema() != (255, 255) else None


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8, which `convert` would cut off at 255; everything else as it is."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture)
    parts = np.array_split(values, max(1, values.size // PART))  # a whole picture in 32 bits would be a gigabyte
    scaled = Image.fromarray(np.concatenate([_scaled(part) for part in parts if part.size]))
    if "icc_profile" in picture.info:
        scaled.info["icc_profile"] = picture.info["icc_profile"]
    return scaled


def _scaled(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ((values.clip(0, 65535).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _in_srgb(picture: Image.Image, notes: list[str]) -> Image.Image:
    """RGB without transparency, through the picture's colour profile if it has one that is not sRGB's."""
    picture = _in_8_bits(picture)
    if not (profile := picture.info.get("icc_profile")):
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    try:
        return _through_profile(picture, profile, notes)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError) as error:
        notes.append(f"its colour profile cannot be used ({shown(error)}); its colours count as sRGB")
        return picture.convert("RGB")


def _through_profile(picture: Image.Image, data: bytes, notes: list[str]) -> Image.Image:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    name = ImageCms.getProfileDescription(profile).strip()
    mode = PROFILE_MODES[profile.profile.xcolor_space.strip()]
    stored = {"CMYK": "CMYK", "1": "L", "L": "L", "LA": "L"}.get(picture.mode, "RGB")
    if stored != mode and (stored, mode) != ("L", "RGB"):
        raise ValueError(f"it is for {mode} and the picture is {stored}")
    if mode == "RGB" and "srgb" in name.casefold():
        return picture.convert("RGB")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(picture.convert(mode), profile, srgb, outputMode="RGB")
    if converted is None:  # only when asked to work in place
        raise ValueError("no picture came of it")
    notes.append(f"colours are converted from '{shown(name)}' to sRGB")
    return converted
