"""All commands, as one program for typer.

Torch and diffusers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from mixofshow.cli import DEBUG, INTERRUPTED, convert, evaluate, federation, fuse, sample, studio, tune


class _Program(TyperGroup):
    """Ends with the exit code of Ctrl-C, which older versions of typer make 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=_Program,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune concepts on your pictures, fuse any number of them, draw them together, each where you put it.",
    epilog=f"{DEBUG}, anywhere in a command: errors in full length, with where they arose.",
)
for part in (tune, fuse, sample, convert, evaluate, federation, studio):
    app.add_typer(part.app)
