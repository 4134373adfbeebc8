"""Asking people which of two methods' pictures they prefer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mixofshow.terminal import print_table, say

if TYPE_CHECKING:
    from mixofshow.evaluation.study import Preference

app = typer.Typer()
study = typer.Typer(no_args_is_help=True, help="Ask people which of two methods' pictures they prefer.")
app.add_typer(study, name="study")


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

    check_outputs(files=[out], inputs=[folder / "pictures.json", folder / "cache"])

    asked = build_study(folder, pairs, out, count=count, seed=seed, state=state, outside=outside)
    say(f"{out}: {asked} pairs of pictures")


@study.command()
def score(
    answers: Annotated[list[Path], typer.Argument(help="Files of answers that the page saved, one per person.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Count what people answered: preferences with 95 % intervals, and how far people agree (Fleiss' kappa)."""
    from mixofshow.evaluation.study import score_study
    from mixofshow.outputs import check_outputs, write_text

    check_outputs(files=[json_file], inputs=answers)
    found = score_study(answers)
    print_table(("preferred", "to", "question", "share", "95 %", "answers", "kappa"), map(_row, found))
    if json_file:
        write_text(json_file, json.dumps([asdict(one) for one in found], indent=1) + "\n")


def _row(one: Preference) -> tuple[str, ...]:
    low, high = one.interval
    kappa = "" if one.agreement is None else f"{one.agreement:.2f}"
    return (*one.pair, one.question, f"{one.share:.1%}", f"{low:.1%}–{high:.1%}", str(one.answers), kappa)
