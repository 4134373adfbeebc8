"""Looking into concept files, and files from and to other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mixofshow.cli.options import Base, bases, with_loading, with_settings
from mixofshow.concepts.interchange.settings import ConvertSettings
from mixofshow.terminal import say

app = typer.Typer()


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A concept file.")]) -> None:
    """Check a concept file and print what it says about itself."""
    from mixofshow.concepts.concept import load_concept

    concept = load_concept(file)
    table = concept.info.model_dump(mode="json")
    table |= {"hash": concept.hash, "placeholder": f"<{concept.info.name}>", "changed_layers": len(concept.deltas)}
    print(json.dumps(table, indent=1))


@app.command()
@with_settings(ConvertSettings)
@with_loading
def convert(
    *,
    source: Annotated[Path, typer.Argument(metavar="IN", help="A concept, LoRA or embedding file, of any tool.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File or, with --to, folder to write.")],
    base: Base = "emojiland",
    loading: dict[str, Any],
    given: dict[str, Any],
) -> None:
    """Make a concept of other tools' LoRA and embeddings, or --to diffusers or kohya those of a concept."""
    from mixofshow.bases.loading import load_base
    from mixofshow.concepts.interchange.convert import check_target
    from mixofshow.concepts.interchange.convert import convert as run
    from mixofshow.concepts.interchange.importing import read_ahead

    settings = ConvertSettings.of(given, "options")
    check_target(source, target, settings, bases(base))
    for file in filter(None, [source, settings.embeddings]):
        read_ahead(file)
    say(*run(source, target, load_base(base, **loading), settings))
