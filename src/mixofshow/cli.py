"""The command line: reads options, calls one verb, prints what came of it. No logic of its own.

Torch and diffusers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixofshow.errors import MixOfShowError, ResourceError, SettingsError
from mixofshow.fusion.settings import FusionSettings, RecordingSettings
from mixofshow.options import assignments, with_settings
from mixofshow.progress import terminal_bar
from mixofshow.tuning.settings import TuningSettings

if TYPE_CHECKING:
    from mixofshow.concepts.model import ConceptModel
    from mixofshow.fusion.stages import Fused
    from mixofshow.fusion.store import Recording

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune concepts on your pictures, fuse any number of them, draw them together, each where you put it.",
)
Base = Annotated[str, typer.Option(help="Base model: emojiland, a diffusers folder, or a hub id in the local cache.")]
Storage = Annotated[str, typer.Option(help="How recordings are kept: fp64, fp32, fp16 or low-rank (plus diagonal).")]
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


@app.command()
@with_settings(TuningSettings)
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
    from mixofshow.files import read_table
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
@with_settings(RecordingSettings)
def record(
    *,
    files: Annotated[list[Path], typer.Argument(help="Concept files.")],
    out: Annotated[
        Path, typer.Option(help="Folder to keep the recordings in; fuse --statistics takes them from there.")
    ],
    base: Base = "emojiland",
    storage: Storage = "fp64",
    max_memory: Annotated[float | None, typer.Option(help="Gigabytes for what is being recorded.")] = None,
    device: Device = "cpu",
    given: dict[str, Any],
) -> None:
    """Record concepts, so that fuse --mode independent need not do it."""
    from mixofshow.bases.loading import load_base
    from mixofshow.concepts.concept import load_concept
    from mixofshow.fusion.settings import make_recording_settings
    from mixofshow.fusion.stages import record_concept
    from mixofshow.fusion.store import open_store

    settings, store = make_recording_settings(given, "options"), open_store(out, storage)
    pipeline = load_base(base, device=device)
    concepts = [load_concept(path, pipeline) for path in files]
    with terminal_bar("recording") as progress:
        for number, concept in enumerate(concepts):
            made = record_concept(concept, pipeline, settings, store, budget=max_memory and max_memory * 2**30)
            progress(number + 1, len(concepts), {})
            typer.echo(f"{made.file.path}: <{concept.info.name}>, {_megabytes(made.file.path)}, {storage}{_lost(made)}")


def _lost(recording: Recording) -> str:
    mean, largest = recording.error
    return f", relative error {mean:.2g} on average, {largest:.2g} at most" if largest else ""


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.2f} MB"


@app.command()
@with_settings(FusionSettings, leave_out=["options"])
def fuse(
    *,
    files: Annotated[
        list[Path] | None, typer.Argument(help="Concept files; or one YAML with a list of `concepts`, and settings.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write: a diffusers model, concepts.json, and the concepts.")
    ] = None,
    as_delta: Annotated[
        Path | None, typer.Option(help="One .safetensors of what changes of the base, also or instead.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Cut the layers in it to this rank; default: in full.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="HTML page to write: how well each concept is kept.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Fused folder to change; it is written anew if --out is not given.")
    ] = None,
    add: Annotated[list[Path] | None, typer.Option(help="With --model: a concept file to add; any number.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="With --model: a concept to take out; any number.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model; default: the YAML's or the fused model's own, or emojiland.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, as ridge=1e-6.")] = None,
    statistics: Annotated[Path | None, typer.Option(help="Folder that keeps what is recorded, for next time.")] = None,
    storage: Storage = "fp64",
    device: Device = "cpu",
    given: dict[str, Any],
) -> None:
    """Fuse concept files into one model, or change a model that was fused. Every setting is an option."""
    from mixofshow.files import refuse_unwritable
    from mixofshow.fusion.jobs import make_job
    from mixofshow.fusion.stages import fuse as run
    from mixofshow.fusion.store import open_store

    out = out or model
    if not (out or as_delta):
        raise SettingsError("nowhere to write to: give --out FOLDER, --as-delta FILE, or both")
    for target in filter(None, (out, as_delta, report)):
        refuse_unwritable(target, folder=target is out)
    store = open_store(statistics, storage) if statistics else None
    given |= {"options": assignments(setting)}
    job = make_job(files or [], given, model=model, add=add or [], remove=remove or [], base=base, device=device)
    with terminal_bar("fusing") as progress:
        fused = run(job.concepts, job.pipeline, job.settings, store=store, progress=progress)
    _write_fused(fused, out, as_delta, rank, report)


def _write_fused(fused: Fused, out: Path | None, as_delta: Path | None, rank: int | None, report: Path | None) -> None:
    if out:
        fused.model.save(out)
    _print_fused(out, fused)
    if as_delta:
        _write_delta(as_delta, fused.model, rank)
    if report:
        _write_report(report, fused)


def _print_fused(out: Path | None, fused: Fused) -> None:
    from mixofshow.fusion.solving import turned_down

    layers = len(fused.layers)
    line = f"{out or 'fused'}: {len(fused.model.concepts)} concepts in {layers} layers"
    if layers:
        name, worst = max(fused.layers.items(), key=lambda item: item[1].residual)
        line += f"; largest residual {worst.residual:.2g} in {name}"
    typer.echo(line)
    for loud, one in turned_down(fused.layers.values()).items():
        typer.echo(
            f"guard: <{loud}> turned down in {one.layers} of {layers} layers, to a weight of {one.weight:.2g} at least"
        )


def _write_delta(path: Path, model: ConceptModel, rank: int | None) -> None:
    lost = model.save_delta(path, rank)
    error = f"relative error {lost.overall:.2g}, at most {lost.worst:.2g} in {lost.layer}" if lost.worst else "exact"
    typer.echo(f"{path}: {_megabytes(path)}, {f'rank {rank}' if rank else 'in full'}: {error}")


def _write_report(path: Path, fused: Fused) -> None:
    from mixofshow.evaluation.fusion_report import fusion_page

    fusion_page(fused).save(path)
    typer.echo(str(path))


@app.command()
def sample(
    composition: Annotated[Path | None, typer.Argument(help="YAML composition; the options below override it.")] = None,
    model: Annotated[str, typer.Option(help="Fused folder, delta file, or base model.")] = "emojiland",
    base: Annotated[
        str | None, typer.Option(help="Base of a delta file, where it is not here by the name that the file says.")
    ] = None,
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
    guidance_scale: Annotated[float | None, typer.Option(help="Default: what suits the base.")] = None,
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
    known = load_model(model, base=base, device=device)
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
    what: Annotated[
        list[str], typer.Argument(help="One YAML suite; or FILE=FOLDER, concept files with held-out pictures of each.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Of a suite: folder for results, report and pictures; default out/NAME.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Of a suite: processes at once.")] = 1,
    base: Annotated[str | None, typer.Option(help="Of FILE=FOLDER: base model; default emojiland.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Of FILE=FOLDER: fusion methods; default gradient and average.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP to judge with, a folder or hub name; emojiland has its own judge.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Of FILE=FOLDER: prompts for a subject (default) or scene.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Pictures per prompt; of FILE=FOLDER 4 by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Of FILE=FOLDER: write the figures here.")] = None,
    device: Device = "cpu",
) -> None:
    """Measure identity and prompt fidelity, single concept → fused: of a whole suite, or of a few files."""
    if not what[0].endswith((".yaml", ".yml")):
        _evaluate_files(
            what,
            base=base or "emojiland",
            method=method,
            clip=clip,
            kind=kind or "subject",
            images=images or 4,
            json_file=json_file,
            device=device,
        )
        return
    pairs_only = {"--base": base, "--method": method, "--kind": kind, "--json": json_file}
    if given := [option for option, value in pairs_only.items() if value]:
        raise SettingsError(f"{given[0]}: is for FILE=FOLDER; of a suite, write it into {what[0]}")
    if len(what) > 1:
        raise SettingsError(f"{what[1]}: one suite at a time")
    from mixofshow.evaluation.report import print_alignments
    from mixofshow.evaluation.suite import read_suite, run_suite, suite_means

    path = Path(what[0])
    over = {"clip": clip, "images_per_prompt": images}
    suite = read_suite(path, {key: value for key, value in over.items() if value is not None})
    target = out or Path("out") / path.stem
    print_alignments(suite_means(run_suite(suite, target, workers=workers, device=device, bars=terminal_bar)))
    typer.echo(f"{target / 'report.html'}\n{target / 'results.json'}\n{target / 'results.csv'}")


def _evaluate_files(
    pairs: list[str],
    *,
    base: str,
    method: list[str] | None,
    clip: str | None,
    kind: str,
    images: int,
    json_file: Path | None,
    device: str,
) -> None:
    from mixofshow.bases.loading import load_base
    from mixofshow.evaluation import protocol
    from mixofshow.evaluation.report import print_alignments, write_figures
    from mixofshow.evaluation.scorers import scorer_for
    from mixofshow.fusion.settings import FusionSettings
    from mixofshow.fusion.stages import fuse as run

    pipeline = load_base(base, device=device)
    cases = [protocol.case_of(pair, pipeline, base, kind) for pair in pairs]
    fused = {
        name: run([case.concept for case in cases], pipeline, FusionSettings(method=name)).model
        for name in method or ["gradient", "average"]
    }
    scorer, settings = scorer_for(base, clip), protocol.EvaluationSettings(images_per_prompt=images)
    with terminal_bar("evaluating") as progress:
        scores = protocol.evaluate(pipeline, cases, fused, scorer, settings, progress=progress)
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
