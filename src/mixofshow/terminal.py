"""What is printed when a command is done. Names in it may be a stranger's: nothing in them colours or moves anything."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from mixofshow.errors import printable, shown

_SETTING: Final = re.compile(r"`([a-z][a-z_]*(?:\.[a-z_]+)?)`")


def say(*lines: object) -> None:
    """Lines on standard output."""
    for line in lines:
        print(printable(str(line)))


def as_options(message: str) -> str:
    """The message with settings, which it names as Python does (`skip_bad`), named as options (--skip-bad)."""
    return _SETTING.sub(lambda found: f"--{found[1].replace('_', '-')}", message)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str | tuple[str, str]]]) -> None:
    """A table on standard output; a cell is its text, or a text and its colour."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head)
    for row in rows:
        cells = [(cell, "") if isinstance(cell, str) else cell for cell in row]
        # Text, not str: rich would take what stands in brackets for a colour.
        table.add_row(*(Text(shown(text, 300), style) for text, style in cells))
    Console().print(table)


@contextlib.contextmanager
def forgiving_output() -> Iterator[Callable[[], str]]:
    """Inside, no work is broken off because something cannot be printed.

    What the encoding lacks is escaped; what a full disk refuses is lost, and the function that is yielded says why; a
    reader that has gone does not matter.
    """
    before = sys.stdout, sys.stderr
    lost = [_forgiving(stream) for stream in before]
    sys.stdout, sys.stderr = (stream for stream, _ in lost)

    def refused() -> str:
        sys.stdout.flush()
        error = getattr(lost[0][1], "error", None)
        return error.strerror or str(error) if error is not None and error.errno != errno.EPIPE else ""

    try:
        yield refused
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _forgiving(stream: Any) -> tuple[Any, _Lossy | None]:
    """A stream that never raises, and where it notes what it lost; of terminals and of tests' streams only escaped."""
    if stream is None:  # was closed before the program began
        return open(os.devnull, "w", encoding="utf-8"), None
    if stream not in (sys.__stdout__, sys.__stderr__) or stream.isatty():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return stream, None
    raw = _Lossy(stream.fileno(), "w", closefd=False)
    buffer = io.BufferedWriter(raw)
    text = io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)
    return text, raw


class _Lossy(io.FileIO):
    """A file that takes everything; `error` is the first that it met."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write, or pretend to."""
        try:
            return super().write(data) or 0
        except OSError as error:
            self.error = self.error or error
            return len(memoryview(data).cast("B"))
