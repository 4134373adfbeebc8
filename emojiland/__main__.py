"""Emojiland's recipe and measurements: `python -m emojiland --help` lists them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated

import typer

RUN_FOLDER = Path.home() / ".cache/mixofshow/emojiland"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def main() -> None:
    """Emojiland, the embedded base model."""


@app.command()
def icons(
    packages: Annotated[Path, typer.Argument(help="Folder with the unpacked packages of the icon sets.")],
    out: Annotated[Path, typer.Option(help="The run's folder.")] = RUN_FOLDER,
) -> None:
    """Draw the icons that training learns from; see library.py."""
    from emojiland.library import write

    for icon_set, count in write(packages, out / "icons").items():
        typer.echo(f"{icon_set}: {count} icons")


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and sample grids.")] = RUN_FOLDER,
    stage: Annotated[
        list[str] | None, typer.Option(help="autoencoder, decoder, generator, judge; default: all.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Save and stop after this long; go on later.")] = 1e9,
    autoencoder_steps: Annotated[int | None, typer.Option(help="Train the autoencoder for so many steps.")] = None,
    decoder_steps: Annotated[int | None, typer.Option(help="The same for its decoder alone.")] = None,
    generator_steps: Annotated[int | None, typer.Option(help="The same for the generator.")] = None,
    judge_steps: Annotated[int | None, typer.Option(help="The same for the judge.")] = None,
    base: Annotated[str | None, typer.Option(help="Base whose weights the generator begins from.")] = None,
) -> None:
    """Train the three networks; the same command resumes."""
    from emojiland.pretrain import STAGES, Recipe
    from emojiland.pretrain import pretrain as run_recipe

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe(base=base)
    given = {
        "autoencoder": autoencoder_steps,
        "decoder": decoder_steps,
        "generator": generator_steps,
        "judge": judge_steps,
    }
    for name, steps in given.items():
        if steps is not None:
            recipe = dataclasses.replace(recipe, **{f"{name}_steps": steps})  # type: ignore[arg-type]
    run_recipe(recipe, out, stages=tuple(stage or STAGES), minutes=minutes)


@app.command()
def report(
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    per_class: Annotated[int, typer.Option(help="Pictures of every class, spread over all scenes.")] = 13,
    base: Annotated[str, typer.Option(help="Embedded base or folder to measure.")] = "emojiland",
    judge: Annotated[Path | None, typer.Option(help="Folder of the judge; default: the shipped one.")] = None,
    grids: Annotated[Path | None, typer.Option(help="Write the sampled pictures into this folder.")] = None,
) -> None:
    """Measure what Emojiland draws and print it beside what is required."""
    import json as json_module

    from emojiland.figures import AT_MOST, REQUIRED, falls_short
    from emojiland.figures import report as measure
    from mixofshow.bases.emojiland.judge import JUDGE_FOLDER
    from mixofshow.bases.loading import load_base

    figures = measure(load_base(base), per_class=per_class, judge_folder=judge or JUDGE_FOLDER, grids=grids)
    for name, value in figures.items():
        bound, mark = "at most" if name in AT_MOST else "at least", "not met" if falls_short(name, value) else "ok"
        typer.echo(f"{name:16} {value:8.3f}   required: {bound} {REQUIRED[name]:.2f}   {mark}")
    if json:
        json.write_text(json_module.dumps(figures, indent=1) + "\n")


@app.command()
def sheet(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    base: Annotated[str, typer.Option(help="Embedded base or folder to draw with.")] = "emojiland",
) -> None:
    """Draw forty-eight pictures at fixed seeds, to count what is broken."""
    from emojiland.figures import sheet as draw_sheet
    from mixofshow.bases.loading import load_base

    draw_sheet(load_base(base)).save(out)


@app.command()
def tunability(
    base: Annotated[str, typer.Option(help="Embedded base or folder to measure.")] = "emojiland",
    out: Annotated[Path, typer.Option(help="Folder for the concepts' pictures and what was drawn.")] = RUN_FOLDER
    / "tunability",
    concept: Annotated[
        list[str] | None, typer.Option(help="Only these; default: all that are new to the base.")
    ] = None,
) -> None:
    """Tune things that the base does not know with the default settings, and ask two judges whether they were learned."""
    from emojiland.tunability import measure, print_learned
    from mixofshow.bases.emojiland.concepts import NEW_TO_THE_BASE, class_word, write_concept
    from mixofshow.bases.loading import load_base
    from mixofshow.evaluation.scorers import imagenet_scorer, judge_scorer

    names = concept or NEW_TO_THE_BASE
    for name in names:
        write_concept(name, out / name)
    things = {name: (out / name, class_word(name)) for name in names}
    judges = {"judge": judge_scorer().images, "imagenet": imagenet_scorer()}
    print_learned(measure(load_base(base), things, judges, out))


@app.command()
def controls(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, previews and the networks.")] = RUN_FOLDER,
    kind: Annotated[list[str] | None, typer.Option(help="t2i-adapter, controlnet; default: both.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of training in all.")] = 2500,
    minutes: Annotated[float, typer.Option(help="Save and stop after this long; go on later.")] = 1e9,
) -> None:
    """Train the controls beside the shipped base; the same command resumes."""
    from emojiland.control_networks import KINDS, train_control
    from mixofshow.bases.loading import load_base

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in kind or KINDS:
        train_control(name, load_base("emojiland"), out, steps=steps, minutes=minutes)


if __name__ == "__main__":
    app()
