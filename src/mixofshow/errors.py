"""Everything that can go wrong by no fault of the program, as one tree.

    MixOfShowError              one line that names what was found, what was expected and the way out
    ├── BadInputError           the input is at fault (exit code 2)
    │   ├── BaseModelError      no such base model, or one that this package cannot handle
    │   ├── ConceptFileError    a concept file that is cut, hostile, malformed or made for another base
    │   ├── TokenError          placeholder words: malformed, colliding, unknown, or cut from a prompt
    │   ├── DatasetError        training pictures or captions
    │   ├── RegionError         boxes outside the picture, inverted, or too small
    │   └── SettingsError       an unknown key or a value out of range
    └── ResourceError           the machine is at fault: disk, permissions, memory (exit code 3)

Anything else that leaves the package is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class MixOfShowError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 2


class BadInputError(MixOfShowError):
    """The input is at fault."""


class BaseModelError(BadInputError):
    """No such base model, or one that this package cannot handle."""


class ConceptFileError(BadInputError):
    """A concept file that is cut, hostile, malformed or made for another base."""


class TokenError(BadInputError):
    """Placeholder words: malformed, colliding, unknown, or cut from a prompt."""


class DatasetError(BadInputError):
    """Training pictures or captions."""


class RegionError(BadInputError):
    """Boxes outside the picture, inverted, or too small."""


class SettingsError(BadInputError):
    """An unknown key or a value out of range."""


class ResourceError(MixOfShowError):
    """Disk, permissions or memory."""

    exit_code: ClassVar[int] = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word most like this one, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def field_problem(error: Mapping[str, Any], known: Iterable[str]) -> str:
    """What pydantic found wrong with a field, in one line; for a key that nobody knows, the nearest of the known."""
    field = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key '{shown(field)}'{nearest(field, known)}"
    return f"'{shown(field)}': {error['msg'].lower()}, found {shown(error.get('input'))}"


def shown(text: object, limit: int = 80) -> str:
    """A stranger's text, escaped and cut, fit to stand in one line of a terminal or log."""
    line = ascii(str(text))[1:-1]
    return line if len(line) <= limit else line[: limit - 1] + "…"
