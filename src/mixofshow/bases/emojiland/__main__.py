"""`python -m mixofshow.bases.emojiland`: the pictures that concepts are tuned on; in a checkout, the whole recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

try:
    from emojiland.__main__ import app
except ModuleNotFoundError:  # the recipe is in the repository, not in the package
    app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
    app.callback()(lambda: None)


@app.command()
def concepts(out: Annotated[Path, typer.Argument(help="Folder to write to, one sub-folder per concept.")]) -> None:
    """Write the pictures of all concepts that the generator has never seen."""
    from mixofshow.bases.emojiland.concepts import ALL, write_concept

    for name in ALL:
        write_concept(name, out / name)
    print(f"{len(ALL)} concepts in {out}")


if __name__ == "__main__":
    app()
