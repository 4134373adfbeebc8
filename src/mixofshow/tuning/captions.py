"""Captions: read from `.txt` files or `metadata.jsonl`, and varied from step to step."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final

from mixofshow.errors import DatasetError, nearest, shown
from mixofshow.reading import parse_json
from mixofshow.tuning.pictures import label

if TYPE_CHECKING:  # reading captions needs neither, and `mixofshow check` does nothing else
    import torch

    from mixofshow.tuning.settings import CaptionSettings

METADATA: Final = "metadata.jsonl"
MAX_CAPTION_BYTES: Final = 10_000
MAX_METADATA_BYTES: Final = 100_000_000

TEMPLATES: Final[dict[str, tuple[str, ...]]] = {
    "character": (
        "a photo of {}",
        "a portrait of {}",
        "a close-up of {}'s face",
        "{} looking at the camera",
        "a full-length picture of {}",
        "{} standing in front of a plain wall",
        "a candid picture of {}",
        "{} seen from the side",
        "{} in soft daylight",
        "an indoor photo of {}",
    ),
    "object": (
        "a photo of a {}",
        "a close-up photo of a {}",
        "a {} on a table",
        "a picture of one {}",
        "a {} in the middle of the picture",
        "a {} against a plain background",
        "a sharp photo of a {}",
        "a {} in bright light",
        "a {} seen from a little above",
        "a rendering of a {}",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "an illustration in the style of {}",
        "a detailed work in the style of {}",
        "a sketch in the style of {}",
        "a colourful picture in the style of {}",
        "a poster in the style of {}",
    ),
    "scene": (
        "a photo of {}",
        "a wide view of {}",
        "{} on a clear day",
        "a landscape picture of {}",
        "a quiet view of {}",
        "{} seen from afar",
        "{} with nobody in it",
        "a postcard of {}",
        "{} in evening light",
    ),
}
"""Captions for a kind of concept; `{}` is its placeholder."""


def varied(caption: str, placeholder: str, settings: CaptionSettings, generator: torch.Generator) -> str:
    """The caption as this step shows it: from a template, its parts shuffled, or none at all, as the settings say.

    With all of them off it is returned as it is and nothing is drawn.
    """
    import torch

    if settings.templates != "none":
        choices = TEMPLATES[settings.templates]
        caption = choices[int(torch.randint(len(choices), (), generator=generator))].format(placeholder)
    if settings.shuffle:
        caption = _shuffled(caption, settings.keep, generator)
    if settings.dropout and float(torch.rand((), generator=generator)) < settings.dropout:
        return ""
    return caption


def _shuffled(caption: str, keep: int, generator: torch.Generator) -> str:
    """What stands between commas in another order; the first `keep` parts stay."""
    import torch

    parts = [part.strip() for part in caption.split(",") if part.strip()]
    rest = parts[keep:]
    order = torch.randperm(len(rest), generator=generator).tolist()
    return ", ".join(parts[:keep] + [rest[place] for place in order])


def read_caption(path: Path) -> tuple[str | None, list[str]]:
    """A text file's caption in one line, None without a file, "" from an empty one; and notes. Raises DatasetError."""
    if not path.exists():
        return None, []
    if not path.is_file():
        raise DatasetError(f"{label(path)}: not a file")
    try:
        with path.open("rb") as opened:
            data = opened.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise DatasetError(f"{label(path)}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_CAPTION_BYTES:
        size = path.stat().st_size
        raise DatasetError(f"{label(path)}: a caption of {size} bytes, at most {MAX_CAPTION_BYTES} are read")
    return _one_line(_decoded(data, label(path)))


def _decoded(data: bytes, name: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or 3 * data.count(0) > len(data):
        raise DatasetError(f"{name}: not UTF-8 at byte 0, it looks like UTF-16; save the caption as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{name}: not UTF-8 at byte {error.start}; save the caption as UTF-8") from error


def _one_line(text: str) -> tuple[str, list[str]]:
    notes = ["its NUL characters count as spaces"] if "\0" in text else []
    return " ".join(text.replace("\0", " ").split()), notes


def read_metadata(folder: Path, pictures: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Captions by picture from the lines {"file_name": …, "text": …} of `metadata.jsonl`, and what is wrong with it.

    Nothing if there is no such file. Raises DatasetError if it cannot be read at all.
    """
    path = folder / METADATA
    if not path.exists():
        return {}, []
    if not path.is_file() or (size := path.stat().st_size) > MAX_METADATA_BYTES:
        what = f"{size} bytes, at most {MAX_METADATA_BYTES} are read" if path.is_file() else "not a file"
        raise DatasetError(f"{METADATA}: {what}")
    captions: dict[str, str] = {}
    problems = []
    for number, line in _lines(path):
        try:
            name, text = _entry(line, pictures)
            if name in captions:
                raise DatasetError(f"a second caption of {shown(name)}")
            captions[name] = text
        except DatasetError as error:
            problems.append(f"line {number}: {error}")
    return captions, problems


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers, the first of which is 1."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _entry(line: bytes, pictures: Collection[str]) -> tuple[str, str]:
    """A line's picture and caption. Raises DatasetError."""
    try:
        entry: Any = parse_json(line.decode("utf-8"), "the line", DatasetError)
    except UnicodeDecodeError as error:
        raise DatasetError(f"not UTF-8 at its byte {error.start}; save the file as UTF-8") from error
    if not isinstance(entry, dict):
        raise DatasetError(f'expected {{"file_name": …, "text": …}}, found {shown(entry)}')
    name, text = (_text(entry, key) for key in ("file_name", "text"))
    parts = PureWindowsPath(name)  # knows slashes of both kinds, and drives
    if parts.anchor or ".." in parts.parts:
        raise DatasetError(f"file_name '{shown(name)}' leaves the folder")
    if (plain := name.removeprefix("./")) not in pictures:
        raise DatasetError(f"no picture '{shown(name)}' in the folder{nearest(name, pictures)}")
    if len(text.encode("utf-8", "replace")) > MAX_CAPTION_BYTES:
        raise DatasetError(f"a caption of {len(text)} letters, at most {MAX_CAPTION_BYTES} bytes are read")
    return plain, _one_line(text)[0]


def _text(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        found = f"found {shown(value)}" if key in entry else f"found only {shown(', '.join(entry))}"
        raise DatasetError(f"expected a text '{key}', {found}")
    return value
