"""The command line: reads options, calls one verb, prints what came of it. No logic of its own.

Torch and diffusers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from mixofshow.errors import MixOfShowError, ResourceError, SettingsError
from mixofshow.progress import terminal_bar
from mixofshow.tuning.settings import dotted_keys

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune concepts on your pictures, fuse any number of them, draw them together, each where you put it.",
)
Base = Annotated[str, typer.Option(help="Base model: emojiland, a diffusers folder, or a hub id in the local cache.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …")]


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


def _assignments(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as a table; values are read as YAML."""
    import yaml

    table = {}
    for pair in pairs or []:
        key, found, value = pair.partition("=")
        if not found:
            raise SettingsError(f"'{pair}': expected KEY=VALUE")
        table[key] = yaml.safe_load(value)
    return table


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every tuning setting by its dotted name, handed over as a table `given`."""
    own = [one for one in signature(command, eval_str=True).parameters.values() if one.name != "given"]
    keys = {key.replace(".", "__"): key for key, _ in dotted_keys()}

    @functools.wraps(command)
    def with_settings(**values: Any) -> None:
        given = {keys[name]: values.pop(name) for name in keys if name in values}
        command(**values, given={key: value for key, value in given.items() if value is not None})

    options = [_setting_option(name, field) for name, (_, field) in zip(keys, dotted_keys(), strict=True)]
    with_settings.__signature__ = Signature([*own, *options])  # type: ignore[attr-defined]
    with_settings.__annotations__ = {one.name: one.annotation for one in (*own, *options)}
    return with_settings


def _setting_option(name: str, field: Any) -> Parameter:
    key = name.replace("__", ".")
    spellings = [f"--{spelling}" for spelling in dict.fromkeys((key.replace("_", "-"), key))]
    kind: Any = str
    if field.annotation is bool:
        kind, spellings = bool, [f"{one}/--no-{one.removeprefix('--')}" for one in spellings[:1]]
    panel = f"Settings: {key.rpartition('.')[0] or 'the run'}"
    option = typer.Option(*spellings, help=field.description, rich_help_panel=panel, metavar="VALUE")
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


@app.command()
@_with_settings
def tune(
    *,
    config: Annotated[Path | None, typer.Argument(help="YAML of one concept, or of several under `concepts`.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, default NAME.safetensors; of several concepts, a folder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings and stop.")] = False,
    print_schema: Annotated[bool, typer.Option("--print-schema", help="Print their JSON Schema and stop.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps …; auto: the fastest there is.")] = "auto",
    given: dict[str, Any],
) -> None:
    """Tune a concept on a folder of pictures. Every key of the YAML is an option too, on top of it."""
    from mixofshow.sampling.composition import read_table
    from mixofshow.tuning import settings as tuning

    if print_schema:
        typer.echo(tuning.schema(), nl=False)
        return
    table = read_table(config) if config else {}
    several = tuning.several(table, given, source=str(config or "options"))
    if print_config:
        typer.echo("---\n".join(map(tuning.printed, several)), nl=False)
        return
    for settings in several:
        name = f"{settings.name}.safetensors"
        target = (out / name if out and "concepts" in table else out) or Path(name)
        _tune_one(settings, target, resume=resume, device=device)


def _tune_one(settings: Any, target: Path, *, resume: bool, device: str) -> None:
    from accelerate import PartialState

    from mixofshow.bases.loading import load_base
    from mixofshow.evaluation.previews import preview_grids
    from mixofshow.files import refuse_unwritable
    from mixofshow.tuning.trainer import tune as run

    refuse_unwritable(target)
    state = PartialState(cpu=device == "cpu")
    pipeline = load_base(settings.base, device=state.device if device == "auto" else device)
    folder = target.with_suffix("")
    preview = preview_grids(pipeline, folder) if settings.preview_every else None
    with terminal_bar(f"tuning {settings.placeholder}", hidden=not state.is_main_process) as progress:
        concept = run(settings, pipeline, folder=folder, resume=resume, progress=progress, preview=preview)
    if state.is_main_process:
        concept.save(target)
        steps, size = concept.info.settings["steps"], target.stat().st_size / 2**20
        typer.echo(f"{target}: {settings.placeholder}, {settings.method}, {steps} steps, {size:.2f} MB")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, as for tune.")],
    masks: Annotated[Path | None, typer.Option(help="Folder of masks; default: FOLDER/../masks.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the findings here.")] = None,
) -> None:
    """Read every picture, caption and mask of a folder, change none, and list what is wrong."""
    from mixofshow.tuning.check import check_folder, report

    report(check_folder(folder, masks=masks), json_file)


@app.command()
def fuse(
    files: Annotated[list[Path], typer.Argument(help="Concept files.")],
    out: Annotated[Path, typer.Option(help="Folder to write: a diffusers model and concepts.json.")],
    base: Base = "emojiland",
    method: Annotated[str, typer.Option(help="gradient, average, or another of docs/how-it-works.md.")] = "gradient",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, as ridge=1e-6.")] = None,
    device: Device = "cpu",
) -> None:
    """Fuse concept files into one model."""
    from mixofshow.bases.loading import load_base
    from mixofshow.concepts.concept import load_concept
    from mixofshow.files import refuse_unwritable
    from mixofshow.fusion.methods import method_settings
    from mixofshow.fusion.settings import FusionSettings
    from mixofshow.fusion.stages import fuse as run

    options = method_settings(method, _assignments(setting))
    refuse_unwritable(out, folder=True)
    pipeline = load_base(base, device=device)
    concepts = [load_concept(path, pipeline) for path in files]
    with terminal_bar("fusing") as progress:
        fused = run(concepts, pipeline, FusionSettings(method=method, options=options), progress=progress)
    fused.model.save(out)
    worst = max(fused.layers.items(), key=lambda item: item[1].residual)
    typer.echo(
        f"{out}: {len(concepts)} concepts in {len(fused.layers)} layers; largest residual {worst[1].residual:.2g} in {worst[0]}"
    )


@app.command()
def sample(
    composition: Annotated[Path | None, typer.Argument(help="YAML composition; the options below override it.")] = None,
    model: Annotated[str, typer.Option(help="Fused folder or base model.")] = "emojiland",
    concept: Annotated[Path | None, typer.Option(help="A single concept file to put on the base model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the whole picture shows.")] = None,
    region: Annotated[
        list[str] | None, typer.Option(help='"left,top,right,bottom: prompt", in pixels; any number.')
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option()] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    num: Annotated[int | None, typer.Option(help="How many pictures; picture k has seed + k.")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    guidance_scale: Annotated[float | None, typer.Option()] = None,
    strength: Annotated[float, typer.Option(help="Of the single concept: 0 its words only, 1 as tuned.")] = 1.0,
    out: Annotated[Path, typer.Option(help="PNG to write; several are numbered.")] = Path("sample.png"),
    device: Device = "cpu",
) -> None:
    """Draw pictures, with regions if you like."""
    from mixofshow.concepts.concept import load_concept
    from mixofshow.concepts.model import load_model, with_concept
    from mixofshow.sampling import composition as compositions
    from mixofshow.sampling.pipeline import MixOfShowPipeline

    given = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "size": size,
        "regions": region,
        "seed": seed,
        "num": num,
        "steps": steps,
        "guidance_scale": guidance_scale,
    }
    wanted = compositions.from_options(composition, {key: value for key, value in given.items() if value is not None})
    targets = compositions.picture_paths(out, wanted.num)
    known = load_model(model, device=device)
    if concept:
        file = load_concept(concept, known.pipeline)
        known = with_concept(known.pipeline, file, unet=strength, text_encoder=strength)
    with terminal_bar("sampling") as progress:
        images = compositions.compose(MixOfShowPipeline(known), wanted, progress=progress)
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        compositions.save_picture(image, target, wanted, number)
    typer.echo("\n".join(map(str, targets)))


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A concept file.")]) -> None:
    """Check a concept file and print what it says about itself."""
    from mixofshow.concepts.concept import load_concept

    concept = load_concept(file)
    table = concept.info.model_dump(mode="json")
    table |= {"hash": concept.hash, "placeholder": f"<{concept.info.name}>", "changed_layers": len(concept.deltas)}
    typer.echo(json.dumps(table, indent=1))


@app.command()
def evaluate(
    concept: Annotated[
        list[str], typer.Argument(help="FILE=FOLDER: a concept file and its held-out pictures; any number.")
    ],
    base: Base = "emojiland",
    method: Annotated[
        list[str] | None, typer.Option(help="Fusion methods to compare; default gradient and average.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Local CLIP to judge with; emojiland has its own.")] = None,
    kind: Annotated[str, typer.Option(help="Prompts for a subject or a scene.")] = "subject",
    images: Annotated[int, typer.Option(help="Pictures per prompt.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    device: Device = "cpu",
) -> None:
    """Measure identity and prompt fidelity, single concept → fused."""
    from mixofshow.bases.loading import load_base
    from mixofshow.evaluation import protocol
    from mixofshow.evaluation.report import print_alignments, write_figures
    from mixofshow.fusion.settings import FusionSettings
    from mixofshow.fusion.stages import fuse as run

    pipeline = load_base(base, device=device)
    cases = [protocol.case_of(pair, pipeline, base, kind) for pair in concept]
    fused = {
        name: run([case.concept for case in cases], pipeline, FusionSettings(method=name)).model
        for name in method or ["gradient", "average"]
    }
    with terminal_bar("evaluating") as progress:
        scores = protocol.evaluate(
            pipeline,
            cases,
            fused,
            protocol.scorer_for(base, clip),
            protocol.EvaluationSettings(images_per_prompt=images),
            progress=progress,
        )
    print_alignments(protocol.means(scores))
    if json_file:
        write_figures(json_file, protocol.means(scores), scores)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, concept files, model and report.")] = Path("out/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Use the concept files that ship with the package.")] = False,
) -> None:
    """The whole job on the embedded base: tune three concepts, fuse them, draw them together, measure."""
    from mixofshow.demo import run_demo

    run_demo(out, quick=quick)
