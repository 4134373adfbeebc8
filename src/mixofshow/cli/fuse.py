"""Recording and fusing concepts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixofshow.cli.options import BASE_PANEL, Base, Device, Storage, assignments, bases, with_loading, with_settings
from mixofshow.errors import ResourceError, SettingsError
from mixofshow.fusion.settings import FusionSettings, RecordingSettings
from mixofshow.progress import terminal_bar
from mixofshow.terminal import say

if TYPE_CHECKING:
    from mixofshow.concepts.model import ConceptModel
    from mixofshow.fusion.stages import Fused


app = typer.Typer()


@app.command()
@with_settings(RecordingSettings)
@with_loading
def record(
    *,
    files: Annotated[list[Path], typer.Argument(help="Concept files.")],
    out: Annotated[
        Path, typer.Option(help="Folder to keep the recordings in; fuse --statistics takes them from there.")
    ],
    base: Base = "emojiland",
    storage: Storage = "fp64",
    workers: Annotated[int, typer.Option(min=1, help="Concepts recorded at a time, each in a process (by Ray).")] = 1,
    device: Device = "cpu",
    loading: dict[str, Any],
    given: dict[str, Any],
) -> None:
    """Record concepts, so that fuse --mode independent need not do it."""
    from mixofshow.fusion.store import Store
    from mixofshow.fusion.workers import RecordingJob, record_all
    from mixofshow.outputs import check_outputs

    check_outputs(shared=[out], inputs=[*files, *bases(base)])
    settings, store = RecordingSettings.of(given, "options"), Store(out.absolute(), storage)
    job = RecordingJob(base, settings, store, device, loading)
    with terminal_bar("recording") as progress:
        for number, made in enumerate(record_all(files, job, workers=workers)):
            progress(number + 1, len(files), {})
            mean, largest = made.info.error
            lost = f", relative error {mean:.2g} on average, {largest:.2g} at most" if largest else ""
            say(f"{made.file.path}: {files[number]}, {_megabytes(made.file.path)}, {storage}{lost}")


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.2f} MB"


@app.command()
@with_settings(FusionSettings, leave_out=["options"])
@with_loading
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
        str | None,
        typer.Option(help="Default: the YAML's or the fused model's own, or emojiland.", rich_help_panel=BASE_PANEL),
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, as ridge=1e-6.")] = None,
    statistics: Annotated[Path | None, typer.Option(help="Folder that keeps what is recorded, for next time.")] = None,
    storage: Storage = "fp64",
    device: Device = "cpu",
    loading: dict[str, Any],
    given: dict[str, Any],
) -> None:
    """Fuse concept files into one model, or change a model that was fused. Every setting is an option."""
    from mixofshow.fusion.jobs import inputs_of, make_job
    from mixofshow.fusion.stages import fuse as run
    from mixofshow.fusion.store import Store
    from mixofshow.outputs import check_outputs

    out = out or model
    _require_a_place(out, as_delta, rank)
    read = [*inputs_of(files or [], model=model, out=out), *(add or []), *bases(base)]
    outputs = {"safetensors": [as_delta], "HTML": [report]}
    check_outputs(files=outputs, folders=[out], shared=[statistics], inputs=read)
    store = Store(statistics, storage) if statistics else None
    given |= {"options": assignments(setting)}
    how: dict[str, Any] = {"device": device, **loading}
    job = make_job(files or [], given, model=model, add=add or [], remove=remove or [], base=base, **how)
    with terminal_bar("fusing") as progress:
        fused = run(job.concepts, job.pipeline, job.settings, store=store, progress=progress)
    _write_fused(fused, out, as_delta, rank, report)


def _require_a_place(out: Path | None, as_delta: Path | None, rank: int | None) -> None:
    """Raise SettingsError where nothing is written, or what is to be cut is not."""
    if not (out or as_delta):
        raise SettingsError("nowhere to write to: give --out FOLDER, --as-delta FILE, or both")
    if rank and not as_delta:
        raise SettingsError("`rank`: expected `as_delta` beside it, the file whose layers are cut")


def _write_fused(fused: Fused, out: Path | None, as_delta: Path | None, rank: int | None, report: Path | None) -> None:
    """Each that is asked for; one that finds no room keeps no other from being written. Raises the first's error."""
    failed: list[ResourceError] = []
    with _noted(failed):
        if out:
            fused.model.save(out)
        _print_fused(out, fused)
    with _noted(failed):
        if as_delta:
            _write_delta(as_delta, fused.model, rank)
    with _noted(failed):
        if report:
            from mixofshow.evaluation.fusion_report import write_fusion_report

            write_fusion_report(report, fused)
            say(report)
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _noted(failed: list[ResourceError]) -> Iterator[None]:
    try:
        yield
    except ResourceError as error:
        failed.append(error)


def _print_fused(out: Path | None, fused: Fused) -> None:
    line = f"{out or 'fused'}: {len(fused.model.concepts)} concepts in {len(fused.model.weights)} layers"
    if fused.recorded:
        name, worst = max(fused.layers.items(), key=lambda item: item[1].residual)
        line += f"; largest residual {worst.residual:.2g} in {name}"
    say(line)
    for name, verdict in fused.verdicts.items():
        say(f"{'guard: ' if verdict.downweighted else ''}<{name}> {verdict.why}")
    if fused.verdicts and not fused.layers:
        say("guard: nobody's changes are left; the model is the base with the concepts' words")
    for name, (before, after) in fused.refitted.items():
        say(f"<{name}> refitted: loss {before:.3g} -> {after:.3g}")


def _write_delta(path: Path, model: ConceptModel, rank: int | None) -> None:
    lost = model.save_delta(path, rank)
    error = f"relative error {lost.overall:.2g}, at most {lost.worst:.2g} in {lost.layer}" if lost.worst else "exact"
    say(f"{path}: {_megabytes(path)}, {f'rank {rank}' if rank else 'in full'}: {error}")
