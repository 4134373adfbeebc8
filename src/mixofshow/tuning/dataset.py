"""A folder of pictures, captions and masks, read and checked as a whole before anything is trained."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
from PIL import Image

from mixofshow.errors import DatasetError, shown
from mixofshow.tuning.captions import METADATA, read_caption, read_metadata
from mixofshow.tuning.masks import mask_folder, read_mask_of
from mixofshow.tuning.pictures import SUFFIXES, Alpha, colour_of, label, read_picture
from mixofshow.tuning.settings import TuningSettings

logger = logging.getLogger(__name__)

Level = Literal["error", "warning", "note"]
"""It cannot be used; it is used but hardly meant; it is used, and this is what happens to it."""

OTHER_SUFFIXES: Final = (
    *(".avif", ".bmp", ".eps", ".gif", ".heic", ".heif", ".jfif"),
    *(".jp2", ".jxl", ".psd", ".svg", ".tga", ".tif", ".tiff"),
)
"""Pictures of kinds that are not read, which are worth a word, as nobody would miss them otherwise."""

DARK: Final = 128
"""A mask without brighter values is taken for black: such as one of zeros and ones."""

SHOWN_AT_ONCE: Final = 10


@dataclass(frozen=True)
class Example:
    """A picture (RGB, upright), its caption, and its mask (L, same size): white where the concept is.

    `digest` tells examples apart: SHA-256 of pixels, mask and caption.
    """

    image: Image.Image
    caption: str
    name: str
    mask: Image.Image | None = None
    digest: str = ""


@dataclass(frozen=True)
class Finding:
    """Something about one file of a folder."""

    file: str
    level: Level
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


@dataclass(frozen=True)
class Reading:
    """What came of one file: an example unless a finding is an error, and the digest of its pixels alone."""

    example: Example | None
    findings: tuple[Finding, ...]
    pixels: str = ""


@dataclass(frozen=True)
class Beside:
    """What belongs to a picture: a caption from metadata, the folder of masks, and what becomes of transparency."""

    instance_prompt: str
    caption: str | None
    masks: Path | None
    alpha: Alpha
    background: str


Reader = Callable[[Path, Beside], Reading]


def read_folder(
    folder: Path,
    *,
    instance_prompt: str,
    skip_bad: bool = False,
    masks: Path | None = None,
    with_masks: bool = True,
    alpha: Alpha = "fill",
    background: str = "white",
) -> list[Example]:
    """All pictures of a folder in natural order. Raises DatasetError naming every file that cannot be used.

    With `skip_bad` such pictures are left out with a warning; no file is ever changed. Masks are those of `masks`, or
    of a folder of that name beside this one if there is one; with `with_masks=False` none are read.
    """
    every = list(
        readings(
            folder,
            instance_prompt=instance_prompt,
            masks=masks,
            with_masks=with_masks,
            alpha=alpha,
            background=background,
        )
    )
    examples = [reading.example for reading in every if reading.example]
    findings = [finding for reading in every for finding in reading.findings]
    errors = [finding for finding in findings if finding.level == "error"]
    # A bad line of metadata is no bad picture: leaving it out would train its picture with another caption.
    whole = any(error.file == METADATA for error in errors)
    if errors and (not skip_bad or not examples or whole):
        raise DatasetError(_listed(errors) + ("" if skip_bad or whole else "; --skip-bad leaves them out"))
    if errors:
        bad = sum(any(finding.level == "error" for finding in reading.findings) for reading in every)
        logger.warning("%d of %d pictures are used; left out: %s", len(examples), len(examples) + bad, _listed(errors))
    if doubts := [finding for finding in findings if finding.level == "warning"]:
        logger.warning("%s", _listed(doubts))
    return examples


def read_one(path: Path, beside: Beside) -> Reading:
    """One picture with what belongs to it; all that is wrong with any of it is found, not only the first."""
    found: list[Finding] = []
    image = mask = None
    caption = beside.instance_prompt
    with _noted(label(path), found):
        picture = read_picture(path, alpha=beside.alpha, background=beside.background)
        image, mask = picture.image, picture.mask
        found += [Finding(label(path), "note", note) for note in picture.notes]
    with _noted(label(path.with_suffix(".txt")), found):
        caption = _caption(path, beside, found)
    if beside.masks:
        with _noted(label(path), found):
            mask = read_mask_of(path, beside.masks, image, mask)
            if (brightest := int(np.asarray(mask).max())) < DARK:
                what = f"its mask is all black (brightest value {brightest} of 255): nothing of the picture counts"
                found.append(Finding(label(path), "warning", what))
    if image is None or any(finding.level == "error" for finding in found):
        return Reading(None, tuple(found))
    example = Example(image, caption, path.name, mask, _digest(image, mask, caption))
    return Reading(example, tuple(found), _digest(image, None, ""))


def readings(
    folder: Path,
    *,
    instance_prompt: str,
    masks: Path | None = None,
    with_masks: bool = True,
    alpha: Alpha = "fill",
    background: str = "white",
    read: Reader = read_one,
) -> Iterator[Reading]:
    """One reading for each file of a folder in natural order, one at a time. Raises DatasetError for the folder."""
    colour_of(background)
    paths = picture_paths(folder)
    captions, problems = read_metadata(folder, {path.name for path in paths})
    if problems:
        yield Reading(None, tuple(Finding(METADATA, "error", problem) for problem in problems))
    masks = mask_folder(folder, masks) if with_masks else None
    seen: dict[str, str] = {}
    for path in paths:
        beside = Beside(instance_prompt, captions.get(path.name), masks, alpha, background)
        yield _with_repeats(read(path, beside), label(path), seen)
    for path in _files(folder, OTHER_SUFFIXES):
        yield Reading(None, (Finding(label(path), "warning", f"not read; expected {', '.join(SUFFIXES)}"),))


def inputs_of(settings: TuningSettings) -> list[Path]:
    """The folders that a run reads: pictures, masks, those of the class word. Raises DatasetError for no pictures."""
    folder = picture_paths(settings.data)[0].parent
    return [one for one in (folder, mask_folder(folder, settings.masks), settings.prior.data) if one]


def picture_paths(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order, 2 before 10. Raises DatasetError if there are none."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder of pictures")
    if not (paths := _files(folder, SUFFIXES)):
        raise DatasetError(f"{folder}: no pictures in it; expected {', '.join(SUFFIXES)}")
    return paths


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files by suffix in natural order, without hidden ones such as macOS's `._1.jpg`."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    return sorted(found, key=_natural)


@contextlib.contextmanager
def _noted(file: str, found: list[Finding]) -> Iterator[None]:
    """A DatasetError inside becomes a finding about the file."""
    try:
        yield
    except DatasetError as error:
        found.append(Finding(file, "error", str(error).removeprefix(f"{file}: ")))


def _caption(path: Path, beside: Beside, found: list[Finding]) -> str:
    """The picture's caption, from either place or the instance prompt. Raises DatasetError."""
    file = path.with_suffix(".txt")
    text, notes = read_caption(file)
    found += [Finding(label(file), "note", note) for note in notes]
    if beside.caption is not None:
        if text is not None:
            raise DatasetError(f"{label(file)}: {METADATA} has a caption of this picture too; keep one of them")
        file, text = file.with_name(METADATA), beside.caption
    if text == "":
        what = f"the caption of {label(path)} is empty; '{shown(beside.instance_prompt)}' is used"
        found.append(Finding(label(file), "warning", what))
    return text or beside.instance_prompt


def _digest(image: Image.Image, mask: Image.Image | None, caption: str) -> str:
    """SHA-256 of everything that an example teaches."""
    digest = hashlib.sha256(repr((image.size, mask is not None, caption)).encode())
    digest.update(image.tobytes())
    digest.update(mask.tobytes() if mask else b"")
    return digest.hexdigest()


def _with_repeats(reading: Reading, name: str, seen: dict[str, str]) -> Reading:
    """The reading of the file `name`, with a warning if its pixels have been seen under another name."""
    if not reading.pixels or (first := seen.setdefault(reading.pixels, name)) == name:
        return reading
    repeat = Finding(name, "warning", f"the same picture as {first}; it counts twice")
    return replace(reading, findings=(*reading.findings, repeat))


def _listed(findings: Sequence[Finding]) -> str:
    """The first findings in one line, and how many more there are."""
    more = len(findings) - SHOWN_AT_ONCE
    rest = [f"and {more} more; `mixofshow check` lists them"] if more > 0 else []
    return "; ".join([*map(str, findings[:SHOWN_AT_ONCE]), *rest])


def with_placeholder(caption: str, placeholder: str, words: Sequence[str], class_word: str) -> str:
    """The caption, naming the concept: as it is if it does, else with the class word replaced. Raises DatasetError."""
    if placeholder in caption or any(word in caption for word in words):
        return caption
    named, count = re.subn(rf"\b{re.escape(class_word)}\b", placeholder, caption, count=1)
    if not count:
        raise DatasetError(f"caption '{shown(caption)}' names neither {placeholder} nor its class word '{class_word}'")
    return named


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key in which 2 comes before 10."""
    parts = re.split(r"(\d+)", path.name.casefold())
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]
