"""Measuring, asking people, and the tour that shows everything."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mixofshow.cli.options import BASE_PANEL, Device, with_loading
from mixofshow.errors import SettingsError
from mixofshow.progress import terminal_bar
from mixofshow.terminal import print_table, say

if TYPE_CHECKING:
    from mixofshow.evaluation.suite import Suite

app = typer.Typer()
study = typer.Typer(no_args_is_help=True, help="Ask people which of two methods' pictures they prefer.")
app.add_typer(study, name="study")


@app.command()
@with_loading
def evaluate(
    *,
    what: Annotated[
        list[str], typer.Argument(help="One YAML suite; or FILE=FOLDER, concept files with held-out pictures of each.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, report and pictures; default, of a suite only, out/NAME.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 1,
    base: Annotated[str | None, typer.Option(help="Default emojiland.", rich_help_panel=BASE_PANEL)] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Of FILE=FOLDER: fusion methods; default gradient and average.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP to judge with, a folder or hub name; emojiland has its own judge.")
    ] = None,
    kind: Annotated[
        Literal["subject", "scene"] | None, typer.Option(help="Of FILE=FOLDER: which prompts; default subject.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Pictures per prompt; of FILE=FOLDER 4 by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Of FILE=FOLDER: write the figures here.")] = None,
    device: Device = "cpu",
    loading: dict[str, Any],
) -> None:
    """Measure identity and prompt fidelity, single concept -> fused: of a whole suite, or of a few files."""
    from mixofshow.evaluation.results import print_alignments, summary
    from mixofshow.evaluation.suite import run_suite
    from mixofshow.outputs import check_outputs, scratch, write_text

    settings = {"base": base, "clip": clip, "images_per_prompt": images}
    suite, usual = _suite(what, settings, {"--method": method, "--kind": kind, "--json": json_file})
    check_outputs(files={"JSON": [json_file]}, inputs=suite.inputs)
    with contextlib.ExitStack() as stack:
        target = out or usual or stack.enter_context(scratch())
        results = run_suite(suite, target, workers=workers, device=device, loading=loading, bars=terminal_bar)
    print_alignments(results)
    if json_file:
        write_text(json_file, json.dumps(summary(results), indent=1) + "\n")
    if out or usual:
        say(target / "report.html", target / "results.json", target / "results.csv")


def _suite(what: list[str], settings: dict[str, Any], of_files: dict[str, Any]) -> tuple[Suite, Path | None]:
    """The suite of a YAML file and where it usually goes; or of concept files, which leave nothing behind."""
    from mixofshow.evaluation.suite import read_suite, suite_of_files

    over = {key: value for key, value in settings.items() if value is not None}
    if not what[0].endswith((".yaml", ".yml")):
        methods, kind = of_files["--method"] or ["gradient", "average"], of_files["--kind"] or "subject"
        return suite_of_files(what, methods, kind, **over), None
    if given := [option for option, value in of_files.items() if value]:
        raise SettingsError(f"{given[0]}: is for FILE=FOLDER; a suite says it itself")
    if len(what) > 1:
        raise SettingsError(f"{what[1]}: one suite at a time")
    return read_suite(Path(what[0]), over), Path("out") / Path(what[0]).stem


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, concept files, model and report.")] = Path("out/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Use the concept files that ship with the package.")] = False,
) -> None:
    """The whole job on the embedded base: tune three concepts, fuse them, draw them together, measure."""
    from mixofshow.demo import run_demo

    run_demo(out, quick=quick)


@study.command()
def build(
    folder: Annotated[Path, typer.Argument(help="What `mixofshow evaluate SUITE.yaml` wrote.")],
    pairs: Annotated[list[str], typer.Option(help="Two methods to compare, as A,B; may be given several times.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("study.html"),
    count: Annotated[int, typer.Option(min=1, help="Pairs of pictures for each pair of methods.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of the lots that choose pictures and sides.")] = 0,
    state: Annotated[
        Literal["fused", "single"], typer.Option(help="Whose pictures: fused models' or single.")
    ] = "fused",
    outside: Annotated[
        bool, typer.Option("--outside", help="Also show pictures outside of the folder, as of concepts of your own.")
    ] = False,
) -> None:
    """Write one HTML page with pairs of pictures to choose from; it needs no server and sends nothing anywhere."""
    from mixofshow.evaluation.study import build_study
    from mixofshow.outputs import check_outputs

    check_outputs(files={"HTML": [out]}, inputs=[folder / "pictures.json", folder / "cache"])

    asked = build_study(folder, pairs, out, count=count, seed=seed, state=state, outside=outside)
    say(f"{out}: {asked} pairs of pictures")


@study.command()
def score(
    answers: Annotated[list[Path], typer.Argument(help="Files of answers that the page saved, one per person.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Count what people answered: preferences with 95 % intervals, and how far people agree (Fleiss' kappa)."""
    from mixofshow.evaluation.study import PREFERENCES, score_study
    from mixofshow.outputs import check_outputs, write_text

    check_outputs(files={"JSON": [json_file]}, inputs=answers)
    found = score_study(answers)
    print_table(PREFERENCES, [one.row for one in found])
    if json_file:
        write_text(json_file, json.dumps([asdict(one) for one in found], indent=1) + "\n")
