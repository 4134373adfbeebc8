"""The command line: reads options, calls one verb, prints what came of it. No logic of its own.

Torch and diffusers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Final

import typer

from mixofshow.cli import convert, evaluate, fuse, sample, study, tune
from mixofshow.errors import ours, printable

DEBUG: Final = "--debug"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune concepts on your pictures, fuse any number of them, draw them together, each where you put it.",
    epilog=f"{DEBUG}, anywhere in a command: errors in full length, with where they arose.",
)
for part in (tune, fuse, sample, convert, evaluate, study):
    app.add_typer(part.app)


LONGEST: Final = 300
"""Characters of an error's line, without --debug."""


class _OneLine(logging.Formatter):
    """Notices in one line, whatever stands in the names that they mention."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage())


def main() -> None:
    """Run a command; a foreseen error is one line, exit code 2 (input) or 3 (machine)."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # what they miss, such as torchvision, is nothing that we use
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    debug = DEBUG in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != DEBUG]
    try:
        app()
    except Exception as error:
        if (known := ours(error)) is None:
            raise
        if debug:
            traceback.print_exception(error)
        sys.stderr.write(f"error: {str(known) if debug else shortened(str(known))}\n")
        sys.exit(known.exit_code)


def shortened(message: str) -> str:
    """The message with its middle left out if it is long: what was found stands first, and the way out last."""
    if len(message) <= LONGEST:
        return message
    note = f" … ({DEBUG} says all) … "
    half = (LONGEST - len(note)) // 2
    return f"{message[:half]}{note}{message[-half:]}"
