"""Pictures and masks to learn from: those of `images`, and what is wrong with one is a fault of the data."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mixofshow.errors import DatasetError
from mixofshow.images import MAX_PIXELS, SUFFIXES, Alpha, Picture, colour_of, label, read_grey, read_image

__all__ = ["MAX_PIXELS", "SUFFIXES", "Alpha", "Picture", "colour_of", "label", "read_mask", "read_picture"]


def read_picture(path: Path, *, alpha: Alpha = "fill", background: str = "white") -> Picture:
    """A picture with its transparency on `background`. Raises DatasetError, and SettingsError for a colour unknown."""
    return read_image(path, label(path), alpha=alpha, background=background, error=DatasetError)


def read_mask(path: Path, *, name: str) -> Image.Image:
    """A mask: grey (L) and upright, black where it is transparent. `name` stands in messages. Raises DatasetError."""
    return read_grey(path, name, error=DatasetError)
