"""Everything that can go wrong by no fault of the program, as one tree.

    MixOfShowError              one line that names what was found, what was expected and the way out
    ├── BadInputError           the input is at fault (exit code 2)
    │   ├── BaseModelError      no such base model, or one that this package cannot handle
    │   ├── ConceptFileError    a concept file that is cut, hostile, malformed or made for another base
    │   ├── TokenError          placeholder words: malformed, colliding, unknown, or cut from a prompt
    │   ├── DatasetError        training pictures or captions
    │   ├── RegionError         boxes outside the picture, inverted, or too small
    │   ├── DivergedError       training whose numbers are not finite any more
    │   └── SettingsError       an unknown key or a value out of range
    └── ResourceError           the machine is at fault: disk, permissions, memory (exit code 3)

Anything else that leaves the package is a bug and keeps its traceback; but what the system or a library says of input or
machine is made one of these by `ours`, at the door.
"""

from __future__ import annotations

import difflib
import errno
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, ClassVar, Final

LONGEST_SHOWN: Final = 80
"""Characters of a stranger's text in a message, at most."""
LISTED: Final = 3
"""Problems that a message names, at most."""


class MixOfShowError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with. Always one line that can be printed."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


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


class DivergedError(BadInputError):
    """Training whose numbers are not finite any more."""


class SettingsError(BadInputError):
    """An unknown key or a value out of range."""


class ResourceError(MixOfShowError):
    """Disk, permissions or memory."""

    exit_code: ClassVar[int] = 3


NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
REFUSED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EBUSY, errno.ENOTEMPTY})
MEMORY: Final = ("MemoryError", "OutOfMemoryError")
NO_MEMORY: Final = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory")


def ours(error: BaseException) -> MixOfShowError | None:
    """What a foreign error is in this tree; None for one that is neither the input's fault nor the machine's."""
    if isinstance(error, MixOfShowError):
        return error
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: importing the libraries takes seconds
    said = str(error)
    if not kinds.isdisjoint(MEMORY) or ("RuntimeError" in kinds and any(one in said for one in NO_MEMORY)):
        return ResourceError("out of memory; use a smaller batch or size")
    if "SafetensorError" in kinds:
        full = "os error 28" in said or "No space left" in said
        return (ResourceError if full else BadInputError)(f"a safetensors file: {shown(said, 200)}")
    if isinstance(error, OSError) and error.errno is not None:
        kind = ResourceError if error.errno in NO_ROOM | REFUSED else BadInputError
        where = f"{shown(Path(str(error.filename)), 160)}: " if error.filename else ""
        return kind(f"{where}{error.strerror or shown(said)}")
    if "ValidationError" in kinds and hasattr(error, "errors"):
        return SettingsError(field_problem(error.errors()[0], ()))
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word most like this one, or an empty string."""
    close = difflib.get_close_matches(word[:LONGEST_SHOWN], list(known), n=1, cutoff=0.5)
    return f"; did you mean '{shown(close[0])}'?" if close else ""


_IN_WORDS: Final = ((re.compile("a valid (?:tuple|list)"), "a list"), (re.compile(r"a valid dictionary(?: or \S.*)?"), "a table"))
"""Python's words for what a YAML file holds, in whose place stands what its readers call it."""


def require(holds: bool, name: str, found: object, expected: str) -> None:
    """Raise SettingsError unless it holds."""
    if not holds:
        raise SettingsError(f"{name}: expected {expected}, found {found}")


def field_problem(error: Mapping[str, Any], known: Iterable[str]) -> str:
    """What pydantic found wrong with a field, in one line; for a key that nobody knows, the nearest of the known."""
    field = ".".join(map(str, error["loc"]))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key '{shown(field)}'{nearest(field, known) or nearest(str(error['loc'][-1]), known)}"
    said = error["msg"].lower()
    for kind, in_words in _IN_WORDS:
        said = kind.sub(in_words, said)
    return f"'{shown(field)}': {shown(said, 200)}, found {shown(error.get('input'))}"


def listed(problems: Sequence[str]) -> str:
    """The first three of them in one line, and how many more there are."""
    more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    return "; ".join([*problems[:LISTED], *more])


def shown(value: object, limit: int = LONGEST_SHOWN) -> str:
    """What a stranger wrote, fit to stand in one line of a terminal or log: escaped, and cut to `limit` characters.

    A path keeps its end, which says more than its beginning.
    """
    text = _text(value)
    if len(text) <= limit and len(line := printable(text)) <= limit:
        return line
    if isinstance(value, PurePath):
        return "…" + printable(text[-limit:])[1 - limit :]
    return printable(text[:limit])[: limit - 1] + "…"


def printable(text: str) -> str:
    """The text in one line, with what a terminal obeys or turns around (control, format, surrogate) escaped."""
    return text if text.isprintable() else "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


_BRIEF: Final = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = LONGEST_SHOWN
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = _BRIEF.maxset = 20


def _text(value: object) -> str:
    """What `str` says; but of tables and numbers that might go on for ever, only the beginning."""
    if isinstance(value, list | tuple | dict | set | frozenset):
        return _BRIEF.repr(value)
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a number of {value.bit_length()} bits"
    return str(value)
