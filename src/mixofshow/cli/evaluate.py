"""Measuring, and the tour that shows everything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixofshow.cli.options import BASE_PANEL, Device, bases, with_loading
from mixofshow.errors import SettingsError
from mixofshow.progress import terminal_bar
from mixofshow.terminal import say

app = typer.Typer()


@app.command()
@with_loading
def evaluate(
    *,
    what: Annotated[
        list[str], typer.Argument(help="One YAML suite; or FILE=FOLDER, concept files with held-out pictures of each.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Of a suite: folder for results, report and pictures; default out/NAME.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Of a suite: processes at once.")] = 1,
    base: Annotated[
        str | None, typer.Option(help="Of FILE=FOLDER; default emojiland.", rich_help_panel=BASE_PANEL)
    ] = None,
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
    loading: dict[str, Any],
) -> None:
    """Measure identity and prompt fidelity, single concept -> fused: of a whole suite, or of a few files."""
    if not what[0].endswith((".yaml", ".yml")):
        how = {"device": device, **loading}
        named: dict[str, Any] = {"base": base or "emojiland", "kind": kind or "subject", "images": images or 4}
        _evaluate_files(what, method=method, clip=clip, json_file=json_file, loading=how, **named)
        return
    pairs_only = {"--base": base, "--method": method, "--kind": kind, "--json": json_file}
    pairs_only |= {f"--{option}": value for option, value in loading.items()}
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
    say(target / "report.html", target / "results.json", target / "results.csv")


def _evaluate_files(
    pairs: list[str],
    *,
    base: str,
    method: list[str] | None,
    clip: str | None,
    kind: str,
    images: int,
    json_file: Path | None,
    loading: dict[str, Any],
) -> None:
    from mixofshow.bases.loading import load_base
    from mixofshow.evaluation import protocol
    from mixofshow.evaluation.report import print_alignments, write_figures
    from mixofshow.evaluation.scorers import scorer_for
    from mixofshow.fusion.settings import FusionSettings
    from mixofshow.fusion.stages import fuse as run
    from mixofshow.outputs import check_outputs

    read = [Path(part) for pair in pairs for part in pair.split("=", 1)]
    check_outputs(files=[json_file], inputs=[*read, *bases(base)])
    pipeline = load_base(base, **loading)
    cases = [protocol.case_of(pair, pipeline, base, kind) for pair in pairs]
    fused = {
        name: run([case.concept for case in cases], pipeline, FusionSettings(method=name)).model
        for name in method or ["gradient", "average"]
    }
    scorer, settings = (
        scorer_for(base, clip, device=str(pipeline.device)),
        protocol.EvaluationSettings(images_per_prompt=images),
    )
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
