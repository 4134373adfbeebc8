"""A folder of pictures, captions and masks, read and checked as a whole before anything is trained."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypedDict, Unpack

import numpy as np
from PIL import Image

from mixofshow.concepts.syntax import foreign_marks, quoted
from mixofshow.errors import LISTED, DatasetError, listed, shown
from mixofshow.images import Alpha, colour_of, label, read_image
from mixofshow.tuning.captions import METADATA, Naming, read_caption, read_metadata
from mixofshow.tuning.folder import Finding, look_into, mask_folder, picture_paths, read_mask_of
from mixofshow.tuning.settings import TuningSettings

logger = logging.getLogger(__name__)

DARK: Final = 128
"""A mask without brighter values is taken for black: such as one of zeros and ones."""


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
class Reading:
    """What came of one file: an example unless a finding is an error, the digest of its pixels alone, its own caption."""

    example: Example | None
    findings: tuple[Finding, ...]
    pixels: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Beside:
    """What belongs to a picture: captions in files or from metadata, masks, and the folder where it should have a mask.

    The rest are `PictureOptions`.
    """

    instance_prompt: str
    texts: Sequence[Path] = ()
    caption: str | None = None
    masks: Sequence[Path] = ()
    masks_in: Path | None = None
    alpha: Alpha = "fill"
    background: str = "white"
    naming: Naming | None = None


class PictureOptions(TypedDict, total=False):
    """What becomes of transparency, and how captions must name the concept: if given, one that does not is an error."""

    alpha: Alpha
    background: str
    naming: Naming | None


class FolderOptions(PictureOptions, total=False):
    """How a folder is read.

    `instance_prompt` is the caption of pictures that have none. Masks are those of `masks`, or of a folder of that name
    beside the pictures if there is one; with `with_masks=False` none are read.
    """

    instance_prompt: str
    masks: Path | None
    with_masks: bool


Reader = Callable[[Path, Beside], Reading]


def read_folder(folder: Path, *, skip_bad: bool = False, **options: Unpack[FolderOptions]) -> list[Example]:
    """All pictures of a folder in natural order. Raises DatasetError naming every file that cannot be used.

    With `skip_bad` such pictures are left out with a warning; no file is ever changed.
    """
    every = list(readings(folder, **options))
    examples = [reading.example for reading in every if reading.example]
    findings = [finding for reading in every for finding in reading.findings]
    errors = [finding for finding in findings if finding.level == "error"]
    # A bad line of metadata is no bad picture: leaving it out would train its picture with another caption.
    whole = any(error.file in METADATA for error in errors)
    if errors and (not skip_bad or not examples or whole):
        raise DatasetError(_some_of(errors) + ("" if skip_bad or whole else "; `skip_bad` leaves them out"))
    if errors:
        bad = sum(any(finding.level == "error" for finding in reading.findings) for reading in every)
        logger.warning("%d of %d pictures are used; left out: %s", len(examples), len(examples) + bad, _some_of(errors))
    if doubts := [finding for finding in findings if finding.level == "warning"]:
        logger.warning("%s", _some_of(doubts))
    return examples


def read_one(path: Path, beside: Beside) -> Reading:
    """One picture with what belongs to it; all that is wrong with any of it is found, not only the first."""
    found: list[Finding] = []
    image = mask = None
    with _noted(label(path), found):
        picture = read_image(path, label(path), alpha=beside.alpha, background=beside.background, error=DatasetError)
        image, mask = picture.image, picture.mask
        found += [Finding(label(path), "note", note) for note in picture.notes]
    own = ""
    with _noted(_caption_label(path, beside), found):
        own = _caption(path, beside, found)
    if beside.masks or beside.masks_in:
        with _noted(label(path), found):
            mask = read_mask_of(path, beside.masks, beside.masks_in, image, mask)
            if mask is not None and (brightest := int(np.asarray(mask).max())) < DARK:
                what = f"its mask is all black (brightest value {brightest} of 255): nothing of the picture counts"
                found.append(Finding(label(path), "warning", what))
    if image is None or any(finding.level == "error" for finding in found):
        return Reading(None, tuple(found), caption=own)
    caption = own or beside.instance_prompt
    example = Example(image, caption, path.name, mask, _digest(image, mask, caption))
    return Reading(example, tuple(found), _digest(image, None, ""), own)


def readings(
    folder: Path,
    read: Reader = read_one,
    *,
    masks: Path | None = None,
    with_masks: bool = True,
    instance_prompt: str = "the instance prompt",
    **options: Unpack[PictureOptions],
) -> Iterator[Reading]:
    """One reading for each file of a folder in natural order, one at a time. Raises DatasetError for the folder."""
    colour_of(options.get("background", "white"))
    all_of_it = look_into(folder, masks, with_masks=with_masks)
    captions, problems = read_metadata(folder, {path.name for path in all_of_it.pictures})
    yield Reading(None, (*all_of_it.findings, *(Finding(file, "error", problem) for file, problem in problems)))
    seen: dict[str, str] = {}
    marked: list[str] = []
    for path in all_of_it.pictures:
        beside = Beside(
            instance_prompt,
            all_of_it.captions.get(path.stem, ()),
            captions.get(path.name),
            all_of_it.masks.get(path.stem, ()),
            all_of_it.masks_in,
            **options,
        )
        reading = read(path, beside)
        if reading.pixels and (first := seen.setdefault(reading.pixels, label(path))) != label(path):
            repeat = Finding(label(path), "warning", f"the same picture as {first}; it counts twice")
            reading = replace(reading, findings=(*reading.findings, repeat))
        if marks := foreign_marks(reading.caption or instance_prompt):
            marked.append(f"{quoted(marks)} in {_caption_label(path, beside)}")
        yield reading
    if marked:
        what = f"{len(marked)} have another tool's marks, read as ordinary text here: {marked[0]}"
        yield Reading(None, (Finding("captions", "warning", what),))


def inputs_of(settings: TuningSettings) -> list[Path]:
    """The folders that a run reads: pictures, masks, those of the class word. Raises DatasetError for no pictures."""
    folder = picture_paths(settings.data)[0].parent
    return [one for one in (folder, mask_folder(folder, settings.masks), settings.prior.data) if one]


@contextlib.contextmanager
def _noted(file: str, found: list[Finding]) -> Iterator[None]:
    """A DatasetError inside becomes a finding about the file."""
    try:
        yield
    except DatasetError as error:
        found.append(Finding(file, "error", str(error).removeprefix(f"{file}: ")))


def _caption_label(path: Path, beside: Beside) -> str:
    """What a problem with the picture's caption is said of."""
    return label(beside.texts[0]) if beside.texts else label(path)


def _caption(path: Path, beside: Beside, found: list[Finding]) -> str:
    """The picture's own caption, from either place, "" without one. Raises DatasetError."""
    file, text = path, beside.caption
    if beside.texts:
        file, *others = beside.texts
        text, notes, doubts = read_caption(file)
        found += [Finding(label(file), "note", note) for note in notes]
        found += [Finding(label(file), "warning", doubt) for doubt in doubts]
        what = f"not read: {label(file)} is the caption of {label(path)}"
        found += [Finding(label(other), "warning", what) for other in others]
        if beside.caption is not None:
            raise DatasetError(f"{label(file)}: metadata has a caption of this picture too; keep one of them")
    if text == "":
        what = f"the caption of {label(path)} is empty; '{shown(beside.instance_prompt)}' is used"
        found.append(Finding(label(file), "warning", what))
    if text and beside.naming:
        beside.naming.named(text)
    return text or ""


def _digest(image: Image.Image, mask: Image.Image | None, caption: str) -> str:
    """SHA-256 of everything that an example teaches."""
    digest = hashlib.sha256(repr((image.size, mask is not None, caption)).encode())
    digest.update(image.tobytes())
    digest.update(mask.tobytes() if mask else b"")
    return digest.hexdigest()


def _some_of(findings: Sequence[Finding]) -> str:
    """The first findings in one line, and how many more there are."""
    more = "; `mixofshow check` lists them" if len(findings) > LISTED else ""
    return listed([str(one) for one in findings]) + more
