"""One picture, or one mask, from a file: fully decoded, upright, RGB (masks: L), with notes of what was done to it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from mixofshow.errors import DatasetError, SettingsError, nearest, shown

Read = TypeVar("Read")
Alpha = Literal["fill", "mask"]
"""What becomes of transparency: it is filled with a colour, or it is that and the picture's mask."""

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
FORMATS: Final = ("PNG", "JPEG", "WEBP")
MAX_PIXELS: Final = 50_000_000
SMALL: Final = 32
"""A picture with a shorter side is mentioned: it holds next to nothing for any base."""

ORIENTATION: Final = 0x0112
PROFILE_MODES: Final = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour spaces of ICC profiles, and the modes of pictures that they can describe."""


@dataclass(frozen=True)
class Picture:
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


def read_picture(path: Path, *, alpha: Alpha = "fill", background: str = "white") -> Picture:
    """A picture with its transparency on `background`. Raises DatasetError, and SettingsError for a colour unknown."""
    colour = colour_of(background)

    def finish(picture: Image.Image, notes: list[str]) -> Picture:
        opacity = _opacity(picture)
        image = _in_srgb(picture, notes)
        if min(image.size) < SMALL:
            notes.append(f"only {image.width} x {image.height} pixels: it will be enlarged")
        if opacity is None:
            return Picture(image, None, tuple(notes))
        opaque = Image.composite(image, Image.new("RGB", image.size, colour), opacity)
        notes.append(f"transparency is filled with {background}" + (" and is its mask" if alpha == "mask" else ""))
        return Picture(opaque, opacity if alpha == "mask" else None, tuple(notes))

    return _decoded(path, label(path), finish)


def read_mask(path: Path, *, name: str) -> Image.Image:
    """A mask: grey (L) and upright, black where it is transparent. `name` stands in messages. Raises DatasetError."""

    def finish(picture: Image.Image, _: list[str]) -> Image.Image:
        opacity = _opacity(picture)
        # No colour profile: a mask's numbers are not colours.
        grey = _in_8_bits(picture).convert("RGB").convert("L")
        return grey if opacity is None else Image.composite(grey, Image.new("L", grey.size, 0), opacity)

    return _decoded(path, name, finish)


def _decoded(path: Path, name: str, finish: Callable[[Image.Image, list[str]], Read]) -> Read:
    """What `finish` makes of the upright picture of a file. Raises DatasetError."""
    if not path.is_file():
        raise DatasetError(f"{name}: not a file")  # opening a pipe would wait for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warnings: what matters is an error or a note below
            with Image.open(path, formats=FORMATS) as opened:
                notes: list[str] = []
                _refuse_before_loading(opened, name, notes)
                return finish(ImageOps.exif_transpose(_loaded(opened, notes)), notes)
    except (DatasetError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{name}: too many pixels, at most {MAX_PIXELS} are read") from error
    except Exception as error:  # a broken file makes Pillow raise almost anything: struct.error, KeyError, zlib.error …
        raise DatasetError(f"{name}: not a readable picture ({_reason(path, error)})") from error


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"neither {', '.join(FORMATS[:-1])} nor {FORMATS[-1]}" if path.stat().st_size else "the file is empty"
    return shown(error)


def _refuse_before_loading(opened: Any, name: str, notes: list[str]) -> None:
    """Too many pixels or frames, known from the header alone. Raises DatasetError."""
    if opened.width * opened.height > MAX_PIXELS:
        raise DatasetError(f"{name}: {opened.width} x {opened.height} pixels, at most {MAX_PIXELS} are read")
    frames = getattr(opened, "n_frames", 1)
    if opened.format == "MPO":  # a telephone's JPEG with a depth map or a second view behind the photograph
        notes.append(f"the first of the {frames} pictures in it is used")
    elif frames > 1:
        raise DatasetError(f"{name}: an animation of {frames} frames, expected a single picture")


def _loaded(opened: Any, notes: list[str]) -> Image.Image:
    """The file's pixels as they are stored, noting what the file says about them."""
    deep = any(";16" in str(tile.args) for tile in opened.tile)
    turned = opened.getexif().get(ORIENTATION, 1)
    opened.load()
    if deep:
        notes.append("16 bits per channel are scaled to 8")
        clear = opened.info.get("transparency")
        if isinstance(clear, tuple):  # Pillow scales the colours and leaves the one that is transparent at 16 bits
            opened.info["transparency"] = tuple(value >> 8 for value in clear)
    if opened.mode == "CMYK":
        notes.append("CMYK is turned into RGB")
    if turned in range(2, 9):
        notes.append(f"turned upright (EXIF orientation {turned})")
    return opened


def _opacity(picture: Image.Image) -> Image.Image | None:
    """How opaque each pixel is (L), or None where all are wholly so."""
    if "A" in picture.getbands():
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
    values = np.asarray(picture).astype(np.uint32)
    scaled = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if "icc_profile" in picture.info:
        scaled.info["icc_profile"] = picture.info["icc_profile"]
    return scaled


def _in_srgb(picture: Image.Image, notes: list[str]) -> Image.Image:
    """RGB without transparency, through the picture's colour profile if it has one that is not sRGB's."""
    picture = _in_8_bits(picture)
    if not (profile := picture.info.get("icc_profile")):
        return picture.convert("RGB")
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
