"""Tuning a concept, and checking pictures before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixofshow.cli.options import bases, with_loading, with_settings
from mixofshow.errors import SettingsError
from mixofshow.progress import terminal_bar
from mixofshow.terminal import say
from mixofshow.tuning.settings import TuningSettings

app = typer.Typer()


@app.command()
@with_settings(TuningSettings)
@with_loading
def tune(
    *,
    file: Annotated[
        Path | None, typer.Argument(metavar="[YAML]", help="One concept, or several under `concepts`.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, default NAME.safetensors; of several concepts, a folder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings and stop.")] = False,
    print_schema: Annotated[bool, typer.Option("--print-schema", help="Print their JSON Schema and stop.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps …; auto: the fastest there is.")] = "auto",
    loading: dict[str, Any],
    given: dict[str, Any],
) -> None:
    """Tune a concept on a folder of pictures. Every key of the YAML is an option too, on top of it.

    Defaults are for Stable Diffusion; the embedded base and some methods have their own, which --print-config shows.
    """
    from mixofshow.outputs import check_file, check_outputs
    from mixofshow.reading import read_table
    from mixofshow.tuning import settings as tuning
    from mixofshow.tuning.checkpoints import run_folder
    from mixofshow.tuning.dataset import inputs_of

    if print_schema:
        print(tuning.schema(), end="")
        return
    table = read_table(file) if file else {}
    several = tuning.several(table, given, source=str(file or "options"))
    if print_config:
        whole = [tuning.with_presets(one, one.base) for one in several]
        print("---\n".join(map(tuning.printed, whole)), end="")
        return
    names = [f"{settings.name}.safetensors" for settings in several]
    targets = [(out / name if out and "concepts" in table else out) or Path(name) for name in names]
    read = [file, *(path for settings in several for path in (*inputs_of(settings), *bases(settings.base)))]
    for target in targets:
        check_file(target)  # so that it has a name, after which the run's folder is called
    folders = [run_folder(target, read) for target in targets]
    check_outputs(files={"safetensors": targets}, shared=folders, inputs=read)
    place = _place(several, device)
    for settings, target, folder in zip(several, targets, folders, strict=True):
        _tune_one(settings, target, folder, loading, resume=resume, place=place)


def _place(several: list[TuningSettings], device: str) -> Any:
    """The device of that name, for "auto" the one that is this process's, if all can be done there. Raises SettingsError."""
    from accelerate import PartialState

    from mixofshow.bases.loading import device_of
    from mixofshow.tuning.conflicts import refuse_impossible
    from mixofshow.tuning.settings import with_presets

    place = PartialState().device if device == "auto" else device_of(device)
    PartialState(cpu=place.type == "cpu")
    for settings in several:
        refuse_impossible(with_presets(settings, settings.base), place.type)
    return place


def _tune_one(settings: Any, target: Path, folder: Path, loading: dict[str, Any], *, resume: bool, place: Any) -> None:
    from accelerate import PartialState

    from mixofshow.bases.loading import load_base
    from mixofshow.evaluation.previews import tune_into

    hidden = not PartialState().is_main_process
    pipeline = load_base(settings.base, device=place, **{"dtype": settings.precision, **loading})
    with terminal_bar(f"tuning {settings.placeholder}", hidden=hidden) as progress:
        tune_into(target, settings, pipeline, folder=folder, resume=resume, progress=progress, say=say)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, as for tune.")],
    masks: Annotated[Path | None, typer.Option(help="Folder of masks; default: FOLDER/../masks.")] = None,
    name: Annotated[str | None, typer.Option(help="The concept, as for tune: captions must name it.")] = None,
    class_word: Annotated[str | None, typer.Option(help="Its class word, as for tune.")] = None,
    synonyms: Annotated[str | None, typer.Option(help="More words for it, as tune's --captions.synonyms.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the findings here.")] = None,
) -> None:
    """Read every picture, caption and mask of a folder, change none, and list what is wrong."""
    from mixofshow.outputs import check_outputs
    from mixofshow.tuning.captions import Naming
    from mixofshow.tuning.check import check_folder, report

    if (name is None) != (class_word is None):
        raise SettingsError("--name and --class-word: give both, or neither; captions are checked with both")
    naming = None
    if name is not None and class_word is not None:
        naming = Naming(f"<{name}>", [f"<{name}{number}>" for number in (1, 2)], class_word, synonyms)
    check_outputs(files={"JSON": [json_file]}, inputs=[folder, masks or folder.parent / "masks"])
    report(check_folder(folder, masks=masks, naming=naming), json_file)
