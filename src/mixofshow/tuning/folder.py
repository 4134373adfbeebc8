"""What lies in a folder of pictures: which files are pictures, captions and masks, and which are there but not used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from PIL import Image

from mixofshow.errors import DatasetError, nearest
from mixofshow.images import SUFFIXES, label, read_grey
from mixofshow.tuning.captions import METADATA

Level = Literal["error", "warning", "note"]
"""It cannot be used; it is used but hardly meant; it is used, and this is what happens to it."""

CAPTIONS: Final = (".txt", ".caption")
"""Suffixes of captions, kohya's default last: of two captions of a picture the first counts."""
OTHER_TEXTS: Final = (".tags", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
OTHER_PICTURES: Final = (
    *(".avif", ".bmp", ".eps", ".gif", ".heic", ".heif", ".jfif"),
    *(".jp2", ".jxl", ".psd", ".svg", ".tga", ".tif", ".tiff"),
)
"""Texts and pictures of kinds that are not read, which are worth a word, as nobody would miss them otherwise."""

MASK_LABEL: Final = "-masklabel"
"""Behind a picture's name: OneTrainer's masks, which lie beside the pictures."""
_MASK_LIKE: Final = re.compile(r"(.+)[-_. ](mask|condlabel)", re.IGNORECASE)
NAMED: Final = 3


@dataclass(frozen=True)
class Finding:
    """Something about one file of a folder."""

    file: str
    level: Level
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


@dataclass(frozen=True)
class Folder:
    """Pictures in natural order, captions and masks by the stem of their picture, and what there is to say of the rest.

    `masks_in` is where every picture should have its mask, None if none needs to have one.
    """

    pictures: Sequence[Path]
    captions: dict[str, list[Path]]
    masks: dict[str, list[Path]]
    masks_in: Path | None
    findings: tuple[Finding, ...]


def look_into(folder: Path, masks: Path | None = None, *, with_masks: bool = True) -> Folder:
    """What is in a folder, with masks of `masks`, or of a folder of that name beside it. Raises DatasetError."""
    pictures = picture_paths(folder)
    stems = {path.stem for path in pictures}
    found = [*_strange_texts(folder, pictures), *_strange_pictures(folder, pictures)]
    captions = _by_stem(sorted(_files(folder, CAPTIONS), key=lambda path: CAPTIONS.index(path.suffix.lower())))
    labels = {_unlabelled(path): path for path in _files(folder, SUFFIXES) if _unlabelled(path)}
    for stem, path in labels.items():
        if stem not in stems:
            found.append(_warning(path, f"not used: the mask of no picture{nearest(stem, stems)}"))
    place = mask_folder(folder, masks) if with_masks else None
    in_place = _by_stem(_files(place, SUFFIXES)) if place else {}
    if place and masks is None and not stems & set(in_place):
        found.append(Finding(f"{label(place)}/", "warning", "not used: it has a mask of none of the pictures"))
        place, in_place = None, {}
    if stray := sorted(set(in_place) - stems):
        what = f"{len(stray)} masks belong to no picture: {_listed(in_place[stem][0] for stem in stray)}"
        found.append(Finding(f"{label(place or folder)}/", "warning", what))
    if with_masks and (own := [stem for stem in labels if stem in stems]):
        found.append(Finding(f"*{MASK_LABEL}", "warning", f"{_share(own, stems)} masks, which lie beside them"))
        for stem in own:
            in_place[stem] = [*in_place.get(stem, []), labels[stem]]
    if place and masks is None:
        what = f"{_share(stems & set(in_place), stems)} masks, of the folder beside theirs; `masks` names another"
        found.append(Finding(f"{label(place)}/", "warning", what))
    return Folder(pictures, captions, in_place, place, tuple(found))


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
    name = f"{label(path)}: its mask {label(files[0].parent)}/{label(files[0])}"
    mask = read_grey(files[0], name, error=DatasetError)
    if image is not None and mask.size != image.size:
        sizes = f"{mask.width} x {mask.height} pixels, the picture has {image.width} x {image.height}"
        raise DatasetError(f"{label(path)}: its mask has {sizes}; save the mask at the picture's size")
    return mask


def picture_paths(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order, 2 before 10, without masks. Raises DatasetError if there are none."""
    if not os.path.isdir(folder):
        raise DatasetError(f"{folder}: no such folder of pictures")
    if not (paths := [path for path in _files(folder, SUFFIXES) if not _unlabelled(path)]):
        inside = next((f"; there are some in {label(one)}" for one in _with_pictures(folder)), "")
        raise DatasetError(f"{folder}: no pictures in it; expected {', '.join(SUFFIXES)}{inside}")
    return paths


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files by suffix in natural order, without hidden ones such as macOS's `._1.jpg`."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key in which 2 comes before 10."""
    parts = re.split(r"(\d+)", path.name.casefold())
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(path.stem, []).append(path)
    return found


def _unlabelled(path: Path) -> str:
    """The stem of the picture of which this file is the mask, by its name; "" for a picture."""
    stem = path.stem
    return stem[: -len(MASK_LABEL)] if stem.lower().endswith(MASK_LABEL) else ""


def _with_pictures(folder: Path) -> list[Path]:
    inside = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path for path in sorted(inside, key=_natural) if _files(path, SUFFIXES)]


def _strange_texts(folder: Path, pictures: Sequence[Path]) -> Iterator[Finding]:
    """Text files that nothing reads."""
    stems, names = {path.stem for path in pictures}, {path.name: path for path in pictures}
    for path in _files(folder, (*CAPTIONS, *OTHER_TEXTS)):
        if path.suffix.lower() in CAPTIONS and path.stem not in stems:
            near = f"; call it {label(names[path.stem].with_suffix('.txt'))}" if path.stem in names else ""
            yield _warning(path, f"not read: it belongs to no picture{near or nearest(path.stem, stems)}")
        elif path.suffix.lower() in OTHER_TEXTS and path.name not in METADATA:
            places = f"{' and '.join(CAPTIONS)} files, {' and '.join(METADATA)}"
            yield _warning(path, f"not read: captions are those of {places}")


def _strange_pictures(folder: Path, pictures: Sequence[Path]) -> Iterator[Finding]:
    """Pictures that nothing reads, or that look like masks."""
    stems = {path.stem for path in pictures}
    for path in _files(folder, OTHER_PICTURES):
        yield _warning(path, f"not read; expected {', '.join(SUFFIXES)}")
    for path in _with_pictures(folder):
        yield Finding(f"{label(path)}/", "warning", "not read: a folder with pictures")
    for path in pictures:
        if (like := _MASK_LIKE.fullmatch(path.stem)) and like[1] in stems:
            mask = f"{like[1]}{MASK_LABEL}{path.suffix}"
            yield _warning(path, f"used as a picture, though it looks like a mask; that would be {mask}")


def _warning(path: Path, what: str) -> Finding:
    return Finding(label(path), "warning", what)


def _share(some: Iterable[str], stems: set[str]) -> str:
    return f"{len(list(some))} of {len(stems)} pictures have"


def _listed(paths: Iterable[Path]) -> str:
    names = [label(path) for path in paths]
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")
