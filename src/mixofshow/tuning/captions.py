"""Captions: read from files, checked to name the concept, and varied from step to step."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final

from mixofshow.concepts.syntax import ANY_WORD, require_brackets
from mixofshow.errors import DatasetError, TokenError, nearest, shown
from mixofshow.images import label
from mixofshow.reading import parse_json, parse_table

if TYPE_CHECKING:  # reading captions needs neither, and `mixofshow check` does nothing else
    import torch

    from mixofshow.tuning.settings import CaptionSettings

METADATA: Final = ("metadata.jsonl", "metadata.csv")
"""Captions of all pictures in one file, as in Hugging Face's folders of images."""
MAX_CAPTION_BYTES: Final = 10_000
MAX_METADATA_BYTES: Final = 100_000_000
BOM: Final = b"\xef\xbb\xbf"
_JOINT: Final = r"[\s_-]+"

TEMPLATES: Final[dict[str, list[str]]] = parse_table(
    files(__package__).joinpath("templates.yaml").read_text(encoding="utf-8"), "templates.yaml"
)
"""Captions for a kind of concept; `{}` is its placeholder."""


@dataclass(frozen=True)
class Naming:
    """The concept's placeholder, the words that stand for it, and ordinary words for what it is, separated by commas.

    Case counts nowhere, as in text encoders; nor whether parts of a word are joined by blanks, "-" or "_".
    """

    placeholder: str
    words: Sequence[str]
    class_word: str
    synonyms: str | None = None

    @cached_property
    def _class_words(self) -> list[str]:
        more = (word.strip() for word in (self.synonyms or "").split(","))
        return [self.class_word, *filter(None, more)]

    @cached_property
    def _any_class_word(self) -> re.Pattern[str]:
        spelled = (_JOINT.join(map(re.escape, re.split(_JOINT, word.strip()))) for word in self._class_words)
        return re.compile(rf"(?<!\w)(?:{'|'.join(spelled)})(?!\w)", re.IGNORECASE)

    def named(self, caption: str) -> str:
        """The caption, naming the concept: as it is if it does, else with the class word replaced. Raises DatasetError."""
        own = {self.placeholder, *self.words}
        try:
            require_brackets(caption, own)
        except TokenError as error:
            raise DatasetError(f"caption '{shown(caption)}': {error}") from error
        there = {word.lower() for word in ANY_WORD.findall(caption)}
        if strange := sorted(there - own):
            raise DatasetError(f"caption '{shown(caption)}' names {strange[0]}, which is no word of {self.placeholder}")
        if there:
            return caption
        named, count = self._any_class_word.subn(lambda _: self.placeholder, caption, count=1)
        if count:
            return named
        nearly = re.search(rf"\w*(?:{'|'.join(map(re.escape, self._class_words))})\w*", caption, re.IGNORECASE)
        way_out = (
            f"'{nearly[0]}' counts with `captions.synonyms` {nearly[0]}" if nearly else "write one of them into it"
        )
        raise DatasetError(
            f"caption '{shown(caption)}' names neither {self.placeholder} nor its class word '{self.class_word}'; {way_out}"
        )


def read_caption(path: Path) -> tuple[str, list[str], list[str]]:
    """A text file's caption in one line, with what was done to it, and what else it may mean. Raises DatasetError."""
    name = label(path)
    if not path.is_file():
        raise DatasetError(f"{name}: not a file")
    try:
        with path.open("rb") as opened:
            data = opened.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise DatasetError(f"{name}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_CAPTION_BYTES:
        size = path.stat().st_size
        raise DatasetError(f"{name}: a caption of {size} bytes, at most {MAX_CAPTION_BYTES} are read")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or 3 * data.count(0) > len(data):
        raise DatasetError(f"{name}: not UTF-8 at byte 0, it looks like UTF-16; save the caption as UTF-8")
    text = _decoded(data.removeprefix(BOM), f"{name}: not UTF-8 at byte", "caption")
    lines = sum(not line.isspace() for line in text.splitlines() if line)
    several = [f"its {lines} lines are one caption; other tools take one of them"] if lines > 1 else []
    return _in_one_line(text), ["its NUL characters count as spaces"] if "\0" in text else [], several


def _in_one_line(text: str) -> str:
    return " ".join(text.replace("\0", " ").split())


def _decoded(data: bytes, problem: str, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{problem} {error.start}; save the {what} as UTF-8") from error


def read_metadata(folder: Path, pictures: Collection[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Captions by picture from `metadata.jsonl` or `metadata.csv`, and what is wrong with it, by the file's name.

    Lines are {"file_name": …, "text": …}, or rows of such columns. Nothing if there is no such file. Raises
    DatasetError if it cannot be read at all.
    """
    there = [name for name in METADATA if (folder / name).exists()]
    if len(there) > 1:
        raise DatasetError(f"{there[0]}: there is {there[1]} too; keep one of them")
    captions: dict[str, str] = {}
    problems = []
    for name in there:
        rows = _rows if name.endswith(".csv") else _lines
        for number, entry in rows(_metadata_bytes(folder / name)):
            try:
                picture, text = _entry(entry, pictures)
                if picture in captions:
                    raise DatasetError(f"a second caption of {shown(picture)}")
                captions[picture] = text
            except DatasetError as error:
                problems.append((name, f"line {number}: {error}"))
    return captions, problems


def _metadata_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise DatasetError(f"{path.name}: not a file")
    if (size := path.stat().st_size) > MAX_METADATA_BYTES:
        raise DatasetError(f"{path.name}: {size} bytes, at most {MAX_METADATA_BYTES} are read")
    return path.read_bytes().removeprefix(BOM)


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """JSON lines that are not empty, with their numbers, the first of which is 1."""
    return ((number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip())


def _rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table with a head. Raises DatasetError where it cannot go on."""
    text = _decoded(data, f"{METADATA[1]}: not UTF-8 at byte", "file")
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), restkey="more", strict=True)
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise DatasetError(f"{METADATA[1]}: not a table of comma-separated values ({shown(error)})") from error


def _entry(entry: bytes | dict[str, Any], pictures: Collection[str]) -> tuple[str, str]:
    """The picture and the caption of a line of JSON, or of a row. Raises DatasetError."""
    if isinstance(entry, bytes):
        entry = parse_json(_decoded(entry, "not UTF-8 at its byte", "file"), "the line", DatasetError)
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
    return plain, _in_one_line(text)


def _text(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        found = f"found {shown(value)}" if key in entry else f"found only {shown(', '.join(entry))}"
        raise DatasetError(f"expected a text '{key}', {found}")
    return value


def varied(
    caption: str, placeholder: str, settings: CaptionSettings, generator: torch.Generator, keep: int | None = None
) -> str:
    """The caption as this step shows it: from a template, its parts shuffled, or none at all, as the settings say.

    With all of them off it is returned as it is and nothing is drawn. `keep` parts stay, in place of the settings'.
    """
    import torch

    if settings.templates != "none":
        choices = TEMPLATES[settings.templates]
        caption = choices[int(torch.randint(len(choices), (), generator=generator))].format(placeholder)
    if settings.shuffle:
        parts, first = _parts(caption), settings.keep if keep is None else keep
        order = torch.randperm(len(parts[first:]), generator=generator).tolist()
        caption = ", ".join(parts[:first] + [parts[first:][place] for place in order])
    if settings.dropout and float(torch.rand((), generator=generator)) < settings.dropout:
        return ""
    return caption


def whole_in_any_order(caption: str, words: Collection[str], keep: int, fits: Callable[[str], bool]) -> tuple[str, int]:
    """A caption that is shuffled, and how many of its first parts stay, so that no order can cut the concept's words.

    `fits` tells whether a text can be encoded without cutting them. They are moved to the front only where they might
    be cut: then they come first behind the parts that stay anyway, and stay too.
    """
    parts = _parts(caption)
    naming = [part for part in parts[keep:] if any(word in part.lower() for word in words)]
    others = [part for part in parts[keep:] if part not in naming]
    if not naming or fits(", ".join([*parts[:keep], *others, *naming])):
        return caption, keep
    return ", ".join([*parts[:keep], *naming, *others]), keep + len(naming)


def _parts(caption: str) -> list[str]:
    return [part.strip() for part in caption.split(",") if part.strip()]
