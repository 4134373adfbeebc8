"""A folder of pictures and captions, read and checked as a whole before anything is trained."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mixofshow.errors import DatasetError, shown

logger = logging.getLogger(__name__)

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
FORMATS: Final = ("PNG", "JPEG", "WEBP")
MAX_PIXELS: Final = 50_000_000
MAX_CAPTION_BYTES: Final = 10_000


@dataclass(frozen=True)
class Example:
    """A picture (RGB, upright) and its caption."""

    image: Image.Image
    caption: str
    name: str


def read_folder(folder: Path, *, instance_prompt: str, skip_bad: bool = False) -> list[Example]:
    """All pictures of a folder in natural order. Raises DatasetError naming every file that cannot be used.

    With `skip_bad` such files are left out with a warning; none is ever changed.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder of pictures")
    paths = sorted((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES), key=_natural)
    if not paths:
        raise DatasetError(f"{folder}: no pictures in it; expected {', '.join(SUFFIXES)}")
    examples, problems = [], []
    for path in paths:
        try:
            examples.append(
                Example(read_picture(path), read_caption(path.with_suffix(".txt"), instance_prompt), path.name)
            )
        except DatasetError as error:
            problems.append(str(error))
    if problems and (not skip_bad or not examples):
        raise DatasetError("; ".join(problems) + ("" if skip_bad else "; --skip-bad leaves them out"))
    for problem in problems:
        logger.warning("left out: %s", problem)
    return examples


def read_picture(path: Path) -> Image.Image:
    """A picture, fully decoded, upright, RGB; transparency becomes white. Raises DatasetError."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DatasetError(
                    f"{path.name}: {opened.width} x {opened.height} pixels, at most {MAX_PIXELS} are read"
                )
            if (frames := getattr(opened, "n_frames", 1)) > 1:
                raise DatasetError(f"{path.name}: an animation of {frames} frames, expected a single picture")
            return _on_white(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path.name}: not a readable picture ({shown(error)})") from error


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        opaque = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(opaque, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def read_caption(path: Path, otherwise: str) -> str:
    """The text file's caption, or `otherwise` when there is none. Raises DatasetError."""
    if not path.exists():
        return otherwise
    data = path.read_bytes()
    if len(data) > MAX_CAPTION_BYTES:
        raise DatasetError(f"{path.name}: a caption of {len(data)} bytes, at most {MAX_CAPTION_BYTES} are read")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path.name}: not UTF-8 at byte {error.start}; save the caption as UTF-8") from error
    return " ".join(text.replace("\0", " ").split()) or otherwise


def with_placeholder(caption: str, placeholder: str, words: Sequence[str], class_word: str) -> str:
    """The caption, naming the concept: as it is if it does, else with the class word replaced. Raises DatasetError."""
    if placeholder in caption or any(word in caption for word in words):
        return caption
    named, count = re.subn(rf"\b{re.escape(class_word)}\b", placeholder, caption, count=1)
    if not count:
        raise DatasetError(f"caption '{shown(caption)}' names neither {placeholder} nor its class word '{class_word}'")
    return named


def as_tensor(images: Sequence[Image.Image], *, width: int, height: int) -> Tensor:
    """Pictures cut to one size around their middle, (pictures, 3, height, width) in [-1, 1]."""
    fitted = [ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS) for image in images]
    array = np.stack([np.asarray(image) for image in fitted])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key in which 2 comes before 10."""
    parts = re.split(r"(\d+)", path.name.casefold())
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]
