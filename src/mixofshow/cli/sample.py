"""Drawing pictures, and drawing them again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixofshow.cli.options import BASE_PANEL, Device, bases, with_loading, with_settings
from mixofshow.errors import SettingsError, shown
from mixofshow.progress import terminal_bar
from mixofshow.sampling.settings import AUTO, Composition
from mixofshow.terminal import say

app = typer.Typer()
Model = Annotated[
    str | None,
    typer.Option(help="Fused folder, delta file, or base model; default: --base.", rich_help_panel=BASE_PANEL),
]
DeltaBase = Annotated[
    str | None,
    typer.Option(
        help="Base model, default emojiland; of a delta file, where it is not here by the name that the file says.",
        rich_help_panel=BASE_PANEL,
    ),
]
Concepts = Annotated[
    list[Path] | None,
    typer.Option(
        "--concept",
        help="A concept file, or another tool's LoRA, to put on the base model; of several, each draws its own regions.",
    ),
]
Mask = Annotated[
    Path | None, typer.Option(help="With --image or --redo: draw anew where it is white, keep what is black.")
]
Redo = Annotated[
    Path | None, typer.Option(help="Picture of which only one --region, its number or a box, or a --mask is drawn over.")
]
Strength = Annotated[float, typer.Option(help="Of the concepts: 0 their words only, 1 as tuned.")]
ByHand = Annotated[
    list[str] | None, typer.Option(help='"left,top,right,bottom: prompt", in pixels, or "auto: prompt"; any number.')
]
Auto = Annotated[
    str | None, typer.Option(help="auto: find places for the concepts in the prompt that no region names.")
]
Controls = Annotated[
    list[str] | None, typer.Option(help='"network: NAME, picture: FILE, strength: 0.8", keys as in YAML; any number.')
]
ShowLayout = Annotated[
    Path | None,
    typer.Option(help="PNG to write: the first picture, or the draft in which places were found, under its regions."),
]
SaveRegions = Annotated[
    Path | None,
    typer.Option(help="YAML to write: the first picture's composition, its regions as masks beside it, to be edited."),
]


@app.command()
@with_settings(
    Composition,
    leave_out=["regions", "auto", "controls", "width", "height", "image", "mask", "redo", "clip_skip"],
)
@with_loading
def sample(
    *,
    composition: Annotated[Path | None, typer.Argument(help="YAML composition; the options below override it.")] = None,
    model: Model = None,
    base: DeltaBase = None,
    concept: Concepts = None,
    strength: Strength = 1.0,
    region: ByHand = None,
    regions: Auto = None,
    control: Controls = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture or rough layout to start from.")] = None,
    mask: Mask = None,
    redo: Redo = None,
    out: Annotated[Path, typer.Option(help="PNG to write; several are numbered.")] = Path("sample.png"),
    show_layout: ShowLayout = None,
    save_regions: SaveRegions = None,
    grid: Annotated[
        Path | None, typer.Option(help="PNG to write instead: a column per seed, a row per --vary.")
    ] = None,
    vary: Annotated[str | None, typer.Option(help="With --grid: KEY=VALUE,VALUE of a setting.")] = None,
    device: Device = "cpu",
    loading: dict[str, Any],
    given: dict[str, Any],
) -> None:
    """Draw pictures, with regions if you like. Every setting of a composition is an option, on top of the YAML."""
    from mixofshow.outputs import check_outputs
    from mixofshow.sampling.composition import picture_paths
    from mixofshow.sampling.drawing import beside, draw_grid, draw_pictures, drawn_together, open_pipeline

    typed = {"regions": region, "controls": control, "size": size, "image": image, "mask": mask, "auto": _auto(regions)}
    wanted, read = _wanted(composition, redo, given | {key: value for key, value in typed.items() if value})
    concepts, wanted = drawn_together(concept or [], wanted)
    model, base = _named(model, base)
    _check_grid(grid, wanted, vary=vary, show_layout=show_layout, save_regions=save_regions)
    targets = picture_paths(out, wanted.num) if grid is None else [grid]
    files = {"PNG": [*targets, show_layout, *beside(save_regions)], "YAML": [save_regions]}
    check_outputs(files=files, inputs=[*read, *bases(model, base), *concepts])
    how: dict[str, Any] = {"regional_lora": wanted.regional_lora, "composition": wanted, "device": device, **loading}
    pipeline = open_pipeline(model, base=base, concepts=concepts, strength=strength, **how)
    with terminal_bar("sampling") as progress:
        if grid is not None:
            draw_grid(pipeline, wanted, vary, grid, progress=progress)
        else:
            draw_pictures(pipeline, wanted, targets, layout=show_layout, regions=save_regions, progress=progress)
    say(*targets, *filter(None, [show_layout, save_regions]))


@app.command()
@with_loading
def replay(
    *,
    picture: Annotated[Path, typer.Argument(help="A PNG that sample wrote.")],
    out: Annotated[Path | None, typer.Option(help="PNG to write, default NAME-replay.png.")] = None,
    model: Model = None,
    base: DeltaBase = None,
    concept: Concepts = None,
    strength: Strength = 1.0,
    device: Device = "cpu",
    loading: dict[str, Any],
) -> None:
    """Draw the picture again, to the same bytes, from what the PNG says; refused if the model is another."""
    from mixofshow.outputs import check_outputs
    from mixofshow.sampling.drawing import open_pipeline
    from mixofshow.sampling.replay import composition_of
    from mixofshow.sampling.replay import replay as run

    out = out or picture.with_stem(f"{picture.stem}-replay")
    model, base = _named(model, base)
    check_outputs(files={"PNG": [out]}, inputs=[picture, *bases(model, base), *(concept or [])])
    wanted = composition_of(picture)
    how: dict[str, Any] = {"regional_lora": wanted.regional_lora, "composition": wanted, "device": device, **loading}
    pipeline = open_pipeline(model, base=base, concepts=concept or [], strength=strength, **how)
    with terminal_bar("replaying") as progress:
        run(pipeline, picture, out, progress=progress)
    say(out)


def _wanted(path: Path | None, redo: Path | None, options: dict[str, Any]) -> tuple[Composition, list[Path]]:
    """The composition of a YAML file and options, or the one that redoes a place of a picture; and the files it is from."""
    from mixofshow.sampling.composition import from_options, inputs_of
    from mixofshow.sampling.redo import from_redo_options

    if redo is None:
        return from_options(path, options), inputs_of(path, options)
    files = filter(None, [redo, path, options.get("mask")])
    return from_redo_options(redo, path, options), list(files)


def _named(model: str | None, base: str | None) -> tuple[str, str | None]:
    """The model, and the base of a delta file: without a model, the base is the model."""
    return (model, base) if model else (base or "emojiland", None)


def _auto(regions: str | None) -> bool:
    """Whether places are to be found. Raises SettingsError for another word."""
    if regions not in (None, AUTO):
        raise SettingsError(f"--regions: expected {AUTO}, found '{shown(regions)}'; a place by hand is --region")
    return regions == AUTO


def _check_grid(grid: Path | None, wanted: Composition, *, vary: str | None, **alone: Path | None) -> None:
    """Raise SettingsError for rows that a grid cannot have, or what goes with it only or never, before a model is loaded."""
    from mixofshow.sampling.drawing import grid_rows

    if grid is None and vary is not None:
        raise SettingsError("`vary`: expected `grid` beside it, which shows a row for each value")
    for name, path in alone.items():
        if grid is not None and path is not None:
            raise SettingsError(f"`{name}`: expected none with `grid`: it is of a picture that is written by itself")
    grid_rows(wanted, vary)
