"""The command line: reads options, calls one verb, prints what came of it. No logic of its own.

Torch and diffusers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import sys

import typer

from mixofshow.cli import convert, evaluate, fuse, sample, study, tune
from mixofshow.errors import MixOfShowError, ResourceError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune concepts on your pictures, fuse any number of them, draw them together, each where you put it.",
)
for part in (tune, fuse, sample, convert, evaluate, study):
    app.add_typer(part.app)


def main() -> None:
    """Run a command; a foreseen error is one line, exit code 2 (input) or 3 (machine)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except MixOfShowError as error:
        _fail(error)
    except MemoryError:
        _fail(ResourceError("out of memory; use a smaller batch or size"))


def _fail(error: MixOfShowError) -> None:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    sys.exit(error.exit_code)
