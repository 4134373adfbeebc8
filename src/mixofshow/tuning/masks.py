"""Masks of pictures: where they lie, which is whose, and whether they fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mixofshow.errors import DatasetError
from mixofshow.tuning.pictures import label, read_mask


def mask_folder(folder: Path, given: Path | None) -> Path | None:
    """The folder of masks: as given, else `masks` beside the pictures, or None without one. Raises DatasetError."""
    if given is not None:
        if not os.path.isdir(given):
            raise DatasetError(f"{given}: no such folder of masks")
        return given
    beside = Path(os.path.abspath(folder)).parent / "masks"  # abspath: "." and "a/.." have no parent of their own
    return beside if beside.is_dir() and not beside.samefile(folder) else None


def read_mask_of(
    path: Path, files: Sequence[Path], folder: Path | None, image: Image.Image | None, own: Image.Image | None
) -> Image.Image | None:
    """The mask (L) of a picture out of its mask files, else the one that its transparency made.

    None without any, unless every picture should have one in `folder`. It has the picture's size; that is not checked
    for a picture that could not be read. Raises DatasetError.
    """
    if not files and (own is not None or folder is None):
        return own
    if not files:
        raise DatasetError(f"{label(path)}: no mask in {folder}; expected {label(path.with_suffix('.png'))}")
    if len(files) > 1:
        raise DatasetError(f"{label(path)}: {' and '.join(map(label, files))} in {folder}; keep one of them")
    mask = read_mask(files[0], name=f"{label(path)}: its mask {label(files[0].parent)}/{label(files[0])}")
    if image is not None and mask.size != image.size:
        sizes = f"{mask.width} x {mask.height} pixels, the picture has {image.width} x {image.height}"
        raise DatasetError(f"{label(path)}: its mask has {sizes}; save the mask at the picture's size")
    return mask
