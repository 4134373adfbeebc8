"""What comes from outside, read once into memory and with limits: bytes, JSON, and the YAML that people write by hand.

Of YAML its core schema, and no more than a table of settings needs: what YAML 1.1 makes of `no`, `2001-01-01` or `1:30`
surprises, and what aliases and merges can be made to do fills the memory of whoever reads them.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import yaml

from mixofshow.errors import BadInputError, ConceptFileError, MixOfShowError, SettingsError, shown

MAX_FILE_BYTES: Final = 256 * 2**20
MAX_JSON_BYTES: Final = 100_000_000
MAX_YAML_BYTES: Final = 100_000
MAX_DEPTH: Final = 16
MAX_VALUES: Final = 20_000
"""Values in a file, those behind aliases counted as often as they are named."""
MAX_NUMBER: Final = 2**63
"""No number needs to be larger; those that are fit into no tensor."""

_PREFIX: Final = "tag:yaml.org,2002:"
_CORE: Final = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
"""Tag, what is written so, and with which characters it begins (§10.3.2 of YAML 1.2; merges are 1.1's)."""


def named_in(folder: Path, name: str | Path) -> Path:
    """Where a path leads that a file in `folder` names: relative to it, and `~` is the user's home."""
    try:
        return folder / Path(name).expanduser()
    except RuntimeError:  # ~nobody
        return folder / name


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises BadInputError."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES, BadInputError), str(path))


def parse_json(
    data: bytes | str, source: str, error: type[MixOfShowError] = BadInputError, *, finite: bool = True
) -> Any:
    """What a JSON text means: finite numbers, keys that stand once, texts that can be written again.

    Numbers need not be `finite` in diffusers' configurations, which know -Infinity. Raises an `error` that names the
    `source`.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refused_number if finite else float,
            parse_float=_finite,
            parse_int=_short,
        )
        if "\\ud" in text.lower():  # half a character is no text: it can be neither printed nor written
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as problem:
        raise error(f"{source}: not valid JSON ({shown(problem)})") from problem
    return value


def read_bytes(
    path: Path, limit: int = MAX_FILE_BYTES, error: type[MixOfShowError] = ConceptFileError, name: object = None
) -> bytes:
    """The whole of a regular file of at most `limit` bytes; never waits on a pipe or device.

    Raises an `error` that calls it by `name`, or by its path.
    """
    name = path if name is None else name
    try:
        with opened(path, error, name) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1) if size <= limit else b""
    except (OSError, ValueError) as problem:
        raise error(f"{name}: cannot be read ({getattr(problem, 'strerror', None) or problem})") from problem
    if (size := max(size, len(data))) > limit:
        raise error(f"{name}: {size} bytes, at most {limit} are read")
    return data


def opened(path: Path, error: type[MixOfShowError], name: object) -> BinaryIO:
    """A regular file, open for reading. Raises an `error` when it is none, OSError when it cannot be opened."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise error(f"{name}: not a regular file")
    return open(file, "rb")


def read_table(path: Path) -> dict[str, Any]:
    """The top-level table of a YAML file. Raises SettingsError."""
    try:
        text = read_bytes(path, MAX_YAML_BYTES, SettingsError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 at its byte {error.start}; save the file as UTF-8") from error
    return parse_table(text, str(path))


def parse_table(text: str, source: str) -> dict[str, Any]:
    """The table that a YAML text is. Raises SettingsError that names its `source`."""
    table = parse_value(text, source)
    if not isinstance(table, dict):
        raise SettingsError(f"{source}: expected a table of settings, found {type(table).__name__}")
    return table


def parse_value(text: str, source: str) -> Any:
    """What a YAML text means. Raises SettingsError that names its `source`."""
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise SettingsError(f"{source}: not valid YAML ({line}{shown(error.problem or error.context, 120)})") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise SettingsError(f"{source}: not valid YAML ({shown(str(error).replace(chr(10), ' '))})") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _refused_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{shown(text, 40)} is too large")
    return value


def _short(text: str) -> int:
    if len(text) > 32:
        raise ValueError(f"{shown(text, 40)} is too large")
    return int(text)


class _Loader(yaml.SafeLoader):
    """Core schema, keys that are texts and stand once, and limits that are met while reading, not after."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0
        self._open: list[tuple[str | None, int]] = []
        self._sizes: dict[str, int] = {}

    def get_event(self) -> Any:
        """The next event, counted."""
        event = super().get_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._sizes:
                _refuse(event, f"alias *{shown(event.anchor, 40)} stands for nothing before it")
            self._values += self._sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            self._open.append((event.anchor, self._values))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self._open.pop()
            self._note(anchor, self._values - before)
        elif isinstance(event, yaml.ScalarEvent):
            self._note(event.anchor, 1)
        if self._values > MAX_VALUES:
            _refuse(event, f"over {MAX_VALUES} values, counting what aliases stand for")
        if len(self._open) > MAX_DEPTH:
            _refuse(event, f"nested deeper than {MAX_DEPTH}")
        return event

    def _note(self, anchor: str | None, size: int) -> None:
        self._values += 1
        if anchor is not None:
            self._sizes[anchor] = size + 1

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping whose keys are the texts that are written."""
        node: Any = super().compose_mapping_node(anchor)
        seen = set()
        for number, (key, value) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "expected a text as a key")
            if key.tag == f"{_PREFIX}merge":
                continue
            if key.value in seen:
                _refuse(key, f"the key '{shown(key.value, 40)}' stands here twice")
            seen.add(key.value)
            node.value[number] = yaml.ScalarNode(f"{_PREFIX}str", key.value, key.start_mark, key.end_mark), value
        return node

    def construct_text(self, node: Any) -> str:
        """A text that can be written again."""
        text = str(self.construct_scalar(node))
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            _refuse(node, f"'{shown(text, 40)}' holds half a character")
        return text

    def construct_null(self, node: Any) -> None:
        """Nothing."""
        self._written_as("null", node)

    def construct_bool(self, node: Any) -> bool:
        """Yes or no."""
        return self._written_as("bool", node).lower() == "true"

    def construct_int(self, node: Any) -> int:
        """A whole number."""
        text = self._written_as("int", node)
        if len(text) > 64 or abs(value := int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))) >= MAX_NUMBER:
            _refuse(node, f"the number {shown(text, 40)} is too large")
        return value

    def construct_float(self, node: Any) -> float:
        """A number that is one."""
        text = self._written_as("float", node).lower()
        value = float(re.sub(r"\.(?=inf|nan)", "", text))
        if not math.isfinite(value):
            _refuse(node, f"'{shown(text, 40)}' is not a finite number")
        return value

    def _written_as(self, tag: str, node: Any) -> str:
        """The scalar's text. An explicit tag may stand before anything at all."""
        text = str(self.construct_scalar(node))
        if not _PATTERNS[tag].fullmatch(text):
            _refuse(node, f"'{shown(text, 40)}' is no {tag}")
        return text


_PATTERNS: Final = {tag: re.compile(f"(?:{pattern})$") for tag, pattern, _ in _CORE}
_MAKERS: Final[dict[str | None, Any]] = {
    f"{_PREFIX}null": _Loader.construct_null,
    f"{_PREFIX}bool": _Loader.construct_bool,
    f"{_PREFIX}int": _Loader.construct_int,
    f"{_PREFIX}float": _Loader.construct_float,
    f"{_PREFIX}str": _Loader.construct_text,
    f"{_PREFIX}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{_PREFIX}map": yaml.SafeLoader.construct_yaml_map,
    None: yaml.SafeLoader.construct_undefined,
}
_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = _MAKERS
for _tag, _, _first in _CORE:
    _Loader.add_implicit_resolver(f"{_PREFIX}{_tag}", _PATTERNS[_tag], list(_first) + [""] * (_tag == "null"))


def _refuse(at: Any, problem: str) -> NoReturn:
    """As the library refuses what it cannot make."""
    raise yaml.constructor.ConstructorError(None, None, problem, at.start_mark)
