"""The command line: reads options, calls one verb, prints what came of it. No logic of its own.

This module imports next to nothing, so that Ctrl-C is heard while the rest is imported.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from mixofshow.errors import ours, printable
from mixofshow.processes import handling
from mixofshow.terminal import as_options, forgiving_output

DEBUG: Final = "--debug"
LONGEST: Final = 300
"""Characters of an error's line, without --debug."""


class _OneLine(logging.Formatter):
    """Notices in one line, whatever stands in the names that they mention."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(as_options(record.getMessage()))


class _Few(logging.Filter):
    """Of notices that differ only in what they name, such as 200 regions, the first ones; the others are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is one of the first of its kind."""
        self.counts[str(record.msg)] += 1
        return self.counts[str(record.msg)] <= NOTICES

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Say at the end how many were not shown."""
        try:
            yield
        finally:
            if count := sum(max(0, count - NOTICES) for count in self.counts.values()):
                sys.stderr.write(f"and {count} more notices of these kinds; {DEBUG} shows all\n")


NOTICES: Final = 3
"""Of a kind, without --debug."""
INTERRUPTED: Final = 130
TERMINATED: Final = 143
"""Exit codes as shells give them: 128 and the number of the signal."""


def __getattr__(name: str) -> Any:
    """`app`, the commands as one program, is imported when it is first asked for."""
    if name != "app":
        raise AttributeError(f"module 'mixofshow.cli' has no attribute '{name}'")
    from mixofshow.cli.commands import app

    return app


def main() -> None:
    """Run a command; a foreseen error is one line, exit code 2 (input) or 3 (machine). Ctrl-C is 130."""
    # SIGTERM ends the program as Ctrl-C does, so that temporary files go.
    with forgiving_output() as lost, handling(signal.SIGTERM, lambda *_: sys.exit(TERMINATED)):
        code = _run()
        if refused := lost():
            sys.stderr.write(f"error: standard output: {refused}; what the command does is done\n")
    sys.exit(code or (3 if refused else 0))


def _run() -> Any:
    """Run the command of `sys.argv` and return its exit code."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # what they miss, such as torchvision, is nothing that we use
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    debug = DEBUG in sys.argv[1:]
    arguments = [argument for argument in sys.argv if argument != DEBUG]
    sys.argv[1:] = [_at_home(argument, before) for before, argument in itertools.pairwise(arguments)]
    few = _Few()
    if not debug:
        handler.addFilter(few)
    try:
        with few.told():
            getattr(sys.modules[__name__], "app")()  # noqa: B009
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        return end.code
    except Exception as error:
        if (known := ours(error)) is None:
            raise
        if debug:
            traceback.print_exception(error)
        line = as_options(str(known))
        sys.stderr.write(f"error: {line if debug else shortened(line)}\n")
        return known.exit_code
    return 0


def _at_home(argument: str, before: str) -> str:
    """A path in the user's home folder as shells have it, who do so only where it stands alone and without quotes.

    A prompt, which may stand in quotes after the option `before` it, is no path.
    """
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    is_path = value.startswith(f"~{os.sep}") and "prompt" not in (option or before)
    return option + equals + os.path.expanduser(value) if is_path else argument


def shortened(message: str) -> str:
    """The message with its middle left out if it is long: what was found stands first, and the way out last."""
    if len(message) <= LONGEST:
        return message
    note = f" … ({DEBUG} says all) … "
    half = (LONGEST - len(note)) // 2
    return f"{message[:half]}{note}{message[-half:]}"
